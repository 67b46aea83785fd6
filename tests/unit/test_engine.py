"""The engine's source, from a real git repository and a real HTTP server, both made here."""

import dataclasses
import functools
import hashlib
import io
import json
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stack import config, engine, host
from stack.config import Engine, Project
from stack.errors import Code, StackError
from tests import workspace

FILES = {"CMakeLists.txt": "project(llama)\n", "src/llama.cpp": "// code\n", "models/big.gguf": "x"}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    folder = tmp_path / "deployment"
    folder.mkdir()
    workspace.make(folder)
    (folder / ".cache").unlink()
    (folder / "uv.lock").unlink()
    return config.load(folder)


def pinned(project: Project, *, repository: str, commit: str) -> Project:
    pin = dataclasses.replace(project.engine, repository=repository, commit=commit)
    return dataclasses.replace(project, engine=pin)


def git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = host.run(["git", *author, *arguments], cwd=folder)
    assert done.status == 0, done
    return done.stdout.strip()


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_source_comes_from_git_without_what_no_build_needs(
    project: Project, tmp_path: Path
) -> None:
    origin = tmp_path / "origin"
    for name, text in FILES.items():
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        (origin / name).write_text(text)
    git(origin, "init", "--quiet")
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "--message=x")
    commit = git(origin, "rev-parse", "HEAD")

    folder = engine.source(pinned(project, repository=f"file://{origin}", commit=commit))

    assert contents(folder) == {"CMakeLists.txt", "src/llama.cpp"}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def pypi(tmp_path: Path) -> Iterator[str]:
    """Serve the test's folder over HTTP; return its address."""
    handler = functools.partial(Quiet, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def lock_archive(project: Project, folder: Path, address: str, *, commit: str) -> Path:
    """Make a source archive as PyPI's, and a uv.lock that names it."""
    files = {f"x-1.0/vendor/llama.cpp/{name}": text for name, text in FILES.items()}
    files |= {"x-1.0/vendor/llama.cpp/src/../../../../escaped": "x"}
    files |= {"x-1.0/.git/modules/vendor/llama.cpp/HEAD": f"{commit}\n"}
    path = folder / "x-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as made:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            made.addfile(entry, io.BytesIO(text.encode()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (project.root / "uv.lock").write_text(
        f"""[[package]]
name = "llama-cpp-python"
sdist = {{ url = "{address}/{path.name}", hash = "sha256:{digest}", size = {path.stat().st_size} }}
"""
    )
    return path


NOWHERE = "https://127.0.0.1:1/llama.cpp.git"


def test_source_comes_from_the_archive_where_git_does_not_answer(
    project: Project, tmp_path: Path, pypi: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    lock_archive(project, tmp_path, pypi, commit="c0ffee")

    folder = engine.source(pinned(project, repository=NOWHERE, commit="c0ffee"))

    assert contents(folder) == {"CMakeLists.txt", "src/llama.cpp"}
    assert "127.0.0.1 does not answer" in caplog.text


def changed(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("commit", "spoil", "reason"),
    [
        ("0ther", Path.exists, "holds llama.cpp 0ther, compose.yaml pins c0ffee"),
        ("c0ffee", changed, "not those of the hash"),
        ("c0ffee", Path.unlink, "404"),
    ],
    ids=["another-commit", "changed", "missing"],
)
def test_wrong_archive_is_refused_and_leaves_nothing(  # noqa: PLR0917  # all by name
    project: Project,
    tmp_path: Path,
    pypi: str,
    commit: str,
    spoil: Callable[[Path], object],
    reason: str,
) -> None:
    spoil(lock_archive(project, tmp_path, pypi, commit=commit))

    with pytest.raises(StackError, match=re.escape(reason)) as caught:
        engine.source(pinned(project, repository=NOWHERE, commit="c0ffee"))

    assert caught.value.code == Code.BUILD
    files = {path.name for path in project.cache.rglob("*") if path.is_file()}
    assert files == {host.MARKER}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like the engine's source."""
    made = tmp_path / "llama.cpp"
    for name, text in {**FILES, "tools/server/CMakeLists.txt": ""}.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(text)
    return made


def test_another_engine_from_a_folder_is_known_by_its_content(
    project: Project, folder: Path
) -> None:
    first = engine.fetch(project, str(folder))
    (folder / "models" / "big.gguf").write_text("no build needs it")
    same = engine.fetch(project, str(folder))
    (folder / "src" / "llama.cpp").write_text("// changed\n")
    other = engine.fetch(project, str(folder))

    assert first == same != other
    assert first.build == project.engine.build
    kept = engine.source(dataclasses.replace(project, engine=first))
    assert (kept / "src" / "llama.cpp").read_text() == FILES["src/llama.cpp"]
    assert not (kept / "models").exists()


def test_another_engine_from_a_ref_of_git(project: Project, folder: Path) -> None:
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=x")
    git(folder, "tag", "b12345")
    here = pinned(project, repository=f"file://{folder}", commit="none")

    found = engine.fetch(here, "b12345")

    assert found == Engine(f"file://{folder}", git(folder, "rev-parse", "HEAD"), 12345)
    assert (engine.source(dataclasses.replace(project, engine=found)) / "CMakeLists.txt").exists()
    with pytest.raises(StackError, match="b99999 cannot be had") as caught:
        engine.fetch(here, "b99999")
    assert caught.value.code == Code.BUILD


def test_another_engine_from_a_release(
    project: Project, tmp_path: Path, pypi: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = lock_archive(project, tmp_path, pypi, commit="c0ffee")
    listed = {
        "filename": "llama_cpp_python-9.9.9.tar.gz",
        "url": f"../{archive.name}",
        "hashes": {"sha256": hashlib.sha256(archive.read_bytes()).hexdigest()},
    }
    index = tmp_path / "simple" / "index.html"
    index.parent.mkdir()
    index.write_text(json.dumps({"files": [listed]}))
    monkeypatch.setattr(engine, "_INDEX", f"{pypi}/simple/")

    found = engine.fetch(project, "9.9.9")

    assert (found.commit, found.build) == ("c0ffee", project.engine.build)
    with pytest.raises(StackError, match=r"Release 9\.9\.8 cannot be had"):
        engine.fetch(project, "9.9.8")
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(StackError, match="not those of the hash"):
        engine.fetch(project, "9.9.9")


@pytest.mark.parametrize("wanted", ["./nowhere", "/"])
def test_folder_without_the_engine_is_no_engine(project: Project, wanted: str) -> None:
    with pytest.raises(StackError, match=r"holds no llama\.cpp"):
        engine.fetch(project, wanted)


def test_given_folder_is_taken_as_it_is(project: Project) -> None:
    settings = {"GLM_ENGINE_SOURCE": "my-llama.cpp"}

    assert engine.source(dataclasses.replace(project, settings=settings)) == (
        project.root / "my-llama.cpp"
    )
