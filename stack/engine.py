"""The engine's source: one folder for Docker and native builds alike.

From the git host where it answers, else from the PyPI archive of the same commit.
"""

import hashlib
import logging
import re
import shutil
import ssl
import tarfile
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from stack.config import Project
from stack.errors import Code, StackError
from stack.host import answers, own_folder, run, sync_folder

Progress = Callable[[int, int], None]

_log = logging.getLogger(__name__)

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


def _from_git(project: Project, part: Path) -> Path | None:
    url = urlsplit(project.engine.repository)
    host = url.hostname or ""
    if url.scheme != "file" and not answers(host, url.port or 443):
        _log.info("%s does not answer; taking the engine's source from its PyPI archive.", host)
        return None
    tree = part / "git"
    fetch = ["fetch", "--quiet", "--depth=1", project.engine.repository, project.engine.commit]
    for arguments in (["init", "--quiet"], fetch, ["checkout", "--quiet", "FETCH_HEAD"]):
        tree.mkdir(exist_ok=True)
        done = run(["git", *arguments], cwd=tree, timeout_s=600)
        if done.status:
            reason = done.stderr.strip().rpartition("\n")[2]
            _log.info("git: %s; taking the engine's source from its PyPI archive.", reason)
            return None
    shutil.rmtree(tree / ".git")
    for extra in tree.iterdir():
        if extra.name not in _PARTS:
            shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
    return tree


def _from_archive(project: Project, part: Path, progress: Progress | None) -> Path:
    path = part / "archive.tar.gz"
    _download(project, path, progress)
    tree, commit = part / "archive", ""
    inside = re.compile(rf"[^/]+/vendor/llama\.cpp/(({'|'.join(map(re.escape, _PARTS))})(/.*)?)")
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            match = inside.fullmatch(member.name)
            if content and match and ".." not in match[1]:
                target = tree / match[1]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())  # extract(filter=) is not in Debian 12's Python
            elif content and member.name.endswith("/.git/modules/vendor/llama.cpp/HEAD"):
                commit = content.read().decode().strip()
    if commit != project.engine.commit:
        raise StackError(
            f"The archive in uv.lock holds llama.cpp {commit[:12]}, compose.yaml pins "
            f"{project.engine.commit[:12]}.",
            "Move x-engine in compose.yaml and engine-source in pyproject.toml together.",
            Code.BUILD,
        )
    return tree


def _download(project: Project, path: Path, progress: Progress | None) -> None:
    """Fetch the source archive that uv.lock names, by its address, and check its hash.

    pip and uv would build the archive to learn its metadata, which a bare machine cannot.
    """
    import httpx  # noqa: PLC0415

    locked = tomllib.loads((project.root / "uv.lock").read_text())["package"]
    (archive,) = (each["sdist"] for each in locked if each["name"] == "llama-cpp-python")
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
                if progress:
                    progress(done, archive["size"])
        if f"sha256:{digest.hexdigest()}" != archive["hash"]:
            raise ValueError("its bytes are not those that uv.lock has the hash of")
    except (httpx.HTTPError, ValueError) as error:
        raise StackError(
            f"No engine source from {project.engine.repository} nor from PyPI: {error}.",
            "Mend the network, or set GLM_ENGINE_SOURCE to a folder with llama.cpp.",
            Code.BUILD,
        ) from error
