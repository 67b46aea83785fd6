"""The engine's source, from a real git repository and through real pip, both made here."""

import dataclasses
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from stack import config, engine, host
from stack.config import Project
from stack.errors import Code, StackError
from tests import workspace

FILES = {"CMakeLists.txt": "project(llama)\n", "src/llama.cpp": "// code\n", "models/big.gguf": "x"}
# pip asks an archive for its metadata before it gives it; this one answers without other packages.
BACKEND = """
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    import pathlib
    info = pathlib.Path(folder) / "llama_cpp_python-1.0.dist-info"
    info.mkdir()
    text = "Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: 1.0\\n"
    (info / "METADATA").write_text(text)
    return info.name
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


@pytest.fixture
def project(tmp_path: Path) -> Project:
    folder = tmp_path / "deployment"
    folder.mkdir()
    workspace.make(folder)
    (folder / ".cache").unlink()
    (folder / "docker").unlink()
    (folder / "docker").mkdir()
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


def archive(project: Project, folder: Path, *, commit: str) -> None:
    """Make a source archive as PyPI's, and pin it by its hash."""
    top = "llama_cpp_python-1.0"
    files = {f"{top}/vendor/llama.cpp/{name}": text for name, text in FILES.items()}
    files |= {f"{top}/.git/modules/vendor/llama.cpp/HEAD": f"{commit}\n"}
    files |= {f"{top}/backend.py": BACKEND, f"{top}/pyproject.toml": PYPROJECT}
    path = folder / f"{top}.tar.gz"
    with tarfile.open(path, "w:gz") as made:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            made.addfile(entry, io.BytesIO(text.encode()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    listed = f"llama_cpp_python==1.0 --hash=sha256:{digest}\n"
    (project.root / "docker" / "engine-source.txt").write_text(listed)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let pip see one folder and no index, and no git host answer."""
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


NOWHERE = "https://127.0.0.1:1/llama.cpp.git"


def test_source_comes_from_the_archive_where_git_does_not_answer(
    project: Project, offline: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    archive(project, offline, commit="c0ffee")

    folder = engine.source(pinned(project, repository=NOWHERE, commit="c0ffee"))

    assert contents(folder) == {"CMakeLists.txt", "src/llama.cpp"}
    assert "127.0.0.1 does not answer" in caplog.text


def test_archive_of_another_commit_is_refused(project: Project, offline: Path) -> None:
    archive(project, offline, commit="0ther")

    with pytest.raises(StackError, match=r"holds llama\.cpp 0ther, not c0ffee") as caught:
        engine.source(pinned(project, repository=NOWHERE, commit="c0ffee"))

    assert caught.value.code == Code.BUILD
    assert not any(path.is_file() for path in project.cache.rglob("*"))


def test_archive_that_was_changed_is_refused(project: Project, offline: Path) -> None:
    archive(project, offline, commit="c0ffee")
    with next(offline.glob("*.tar.gz")).open("ab") as file:
        file.write(b"\0")

    with pytest.raises(StackError, match="No engine source") as caught:
        engine.source(pinned(project, repository=NOWHERE, commit="c0ffee"))

    assert caught.value.code == Code.BUILD


def test_given_folder_is_taken_as_it_is(project: Project) -> None:
    settings = {"GLM_ENGINE_SOURCE": "my-llama.cpp"}

    assert engine.source(dataclasses.replace(project, settings=settings)) == (
        project.root / "my-llama.cpp"
    )
