"""The engine's source: one folder for Docker and native builds alike.

From the git host where it answers, else from the PyPI archive of the same commit.
"""

import hashlib
import logging
import os
import re
import shutil
import ssl
import tarfile
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from stack.config import Engine, Project
from stack.errors import Code, StackError
from stack.host import answers, own_folder, run, sync_folder

Progress = Callable[[int, int], None]

_log = logging.getLogger(__name__)
_INDEX = "https://pypi.org/simple/llama-cpp-python/"

# What the server needs of the tree; the rest, mostly test data, is 70 % of it.
_PARTS = (
    *("LICENSE", "licenses", "CMakeLists.txt", "cmake", "common", "ggml", "include", "scripts"),
    *("src", "tools", "vendor"),
)


def source(project: Project, *, progress: Progress | None = None) -> Path:
    """Return the folder with the engine's source at the pinned commit, fetching it once.

    `progress` receives (done, total) bytes of a download.

    Raises:
        StackError: BUILD when neither source can be had, or the archive holds another commit.

    """
    given = project.settings.get("GLM_ENGINE_SOURCE")
    if given and "://" not in given:
        return project.root / given
    folder = project.cache / "engine" / project.engine.commit[:12]
    if not folder.exists():
        own_folder(project.cache)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
            tree = _from_git(project, Path(part)) or _from_archive(project, Path(part), progress)
            tree.rename(folder)
        sync_folder(folder.parent)
    return folder


def fetch(project: Project, wanted: str, *, progress: Progress | None = None) -> Engine:
    """Fetch another engine's source to where `source` finds it, and return what it is.

    `wanted` is a folder, a version of the PyPI archive, or a ref of the git host. Where the build
    number is not to be had, it is the present engine's.

    Raises:
        StackError: USAGE for a folder without the engine, BUILD when it cannot be had.

    """
    cache = project.cache / "engine"
    own_folder(project.cache)
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".part-") as part:
        if os.sep in wanted or Path(wanted).is_dir():
            commit, build, tree = _from_folder(Path(wanted).expanduser(), Path(part))
        elif re.fullmatch(r"\d+\.\d+\.\d+", wanted):
            _fetch(_released(wanted), Path(part) / "archive.tar.gz", progress)
            (commit, tree), build = _unpack(Path(part)), None
        else:
            commit, build, tree = _from_ref(project, wanted, Path(part))
        folder = cache / commit[:12]
        if not folder.exists():
            tree.rename(folder)
            sync_folder(cache)
    return Engine(project.engine.repository, commit, build or project.engine.build)


def _from_folder(given: Path, part: Path) -> tuple[str, int | None, Path]:
    """Copy a folder, which may change later; it is known by its content, whatever git says."""
    if not (given / "tools" / "server" / "CMakeLists.txt").exists():
        raise StackError(
            f"{given} holds no llama.cpp.", "Give its top folder, a release or a ref.", Code.USAGE
        )
    tree, digest = part / "folder", hashlib.sha1(usedforsecurity=False)
    for path in sorted(each for name in _PARTS for each in _files(given / name)):
        target = tree / path.relative_to(given)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        digest.update(str(path.relative_to(given)).encode() + b"\0" + target.read_bytes())
    return f"folder{digest.hexdigest()[:34]}", None, tree


def _files(path: Path) -> list[Path]:
    return [each for each in (path, *path.rglob("*")) if each.is_file()]


def _from_ref(project: Project, ref: str, part: Path) -> tuple[str, int | None, Path]:
    tree = _from_git(project, part, ref)
    if tree is None:
        raise StackError(
            f"{ref} cannot be had from {project.engine.repository}.",
            "Name a release of the PyPI archive (0.3.36), or a folder with llama.cpp.",
            Code.BUILD,
        )
    commit = (part / "commit").read_text().strip()
    numbered = re.fullmatch(r"b(\d+)", ref)
    return commit, int(numbered[1]) if numbered else None, tree


def _from_git(project: Project, part: Path, ref: str | None = None) -> Path | None:
    url = urlsplit(project.engine.repository)
    host = url.hostname or ""
    if url.scheme != "file" and not answers(host, url.port or 443):
        _log.info("%s does not answer; no engine source from there.", host)
        return None
    tree = part / "git"
    fetch = ["fetch", "--quiet", "--depth=1", project.engine.repository]
    fetch.append(ref or project.engine.commit)
    for arguments in (["init", "--quiet"], fetch, ["checkout", "--quiet", "FETCH_HEAD"]):
        tree.mkdir(exist_ok=True)
        done = run(["git", *arguments], cwd=tree, timeout_s=600)
        if done.status:
            reason = done.stderr.strip().rpartition("\n")[2]
            _log.info("git: %s; no engine source from there.", reason)
            return None
    head = run(["git", "rev-parse", "HEAD"], cwd=tree)
    (part / "commit").write_text(head.stdout)
    shutil.rmtree(tree / ".git")
    for extra in tree.iterdir():
        if extra.name not in _PARTS:
            shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
    return tree


def _from_archive(project: Project, part: Path, progress: Progress | None) -> Path:
    _fetch(_locked(project), part / "archive.tar.gz", progress)
    commit, tree = _unpack(part)
    if commit != project.engine.commit:
        raise StackError(
            f"The archive in uv.lock holds llama.cpp {commit[:12]}, compose.yaml pins "
            f"{project.engine.commit[:12]}.",
            "Move x-engine in compose.yaml and engine-source in pyproject.toml together.",
            Code.BUILD,
        )
    return tree


def _unpack(part: Path) -> tuple[str, Path]:
    """Unpack the engine from an archive in `part`; return its commit and its folder."""
    tree, commit = part / "archive", ""
    inside = re.compile(rf"[^/]+/vendor/llama\.cpp/(({'|'.join(map(re.escape, _PARTS))})(/.*)?)")
    with tarfile.open(part / "archive.tar.gz") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            match = inside.fullmatch(member.name)
            if content and match and ".." not in match[1]:
                target = tree / match[1]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())  # extract(filter=) is not in Debian 12's Python
            elif content and member.name.endswith("/.git/modules/vendor/llama.cpp/HEAD"):
                commit = content.read().decode().strip()
    if not re.fullmatch(r"\w{4,40}", commit) or not tree.exists():
        raise StackError(
            "The archive does not say which llama.cpp it holds.",
            "Take another release, a ref of the git host, or a folder.",
            Code.BUILD,
        )
    return commit, tree


def _locked(project: Project) -> dict[str, Any]:
    """Return address, hash and size of the source archive that uv.lock names.

    pip and uv would build the archive to learn its metadata, which a bare machine cannot.
    """
    locked = tomllib.loads((project.root / "uv.lock").read_text())["package"]
    (archive,) = (each["sdist"] for each in locked if each["name"] == "llama-cpp-python")
    found: dict[str, Any] = archive
    return found


def _released(version: str) -> dict[str, Any]:
    """Return address, hash and size of a release's source archive, as PyPI lists it."""
    import httpx  # noqa: PLC0415

    listing = {"Accept": "application/vnd.pypi.simple.v1+json"}
    try:
        answer = httpx.get(_INDEX, headers=listing, verify=ssl.create_default_context())
        answer.raise_for_status()
        (file,) = (
            each
            for each in answer.json()["files"]
            if each["filename"] == f"llama_cpp_python-{version}.tar.gz"
        )
    except (httpx.HTTPError, ValueError) as error:
        why = "it has no such source archive" if isinstance(error, ValueError) else str(error)
        raise StackError(
            f"Release {version} cannot be had from {_INDEX}: {why}.",
            "Name another, a ref of the git host, or a folder with llama.cpp.",
            Code.BUILD,
        ) from error
    hashed = f"sha256:{file['hashes']['sha256']}"
    return {"url": urljoin(_INDEX, file["url"]), "hash": hashed, "size": file.get("size", 0)}


def _fetch(archive: dict[str, Any], path: Path, progress: Progress | None) -> None:
    """Fetch an archive by its address, and check its hash."""
    import httpx  # noqa: PLC0415

    digest, done = hashlib.sha256(), 0
    try:
        with (
            httpx.stream(
                "GET", archive["url"], follow_redirects=True, verify=ssl.create_default_context()
            ) as answer,
            path.open("wb") as file,
        ):
            answer.raise_for_status()
            for piece in answer.iter_raw():
                digest.update(piece)
                done += file.write(piece)
                if progress and archive["size"]:
                    progress(done, archive["size"])
        if f"sha256:{digest.hexdigest()}" != archive["hash"]:
            raise ValueError("its bytes are not those of the hash that uv.lock or PyPI has")
    except (httpx.HTTPError, ValueError) as error:
        raise StackError(
            f"No engine source from PyPI: {error}.",
            "Mend the network, or set GLM_ENGINE_SOURCE to a folder with llama.cpp.",
            Code.BUILD,
        ) from error
