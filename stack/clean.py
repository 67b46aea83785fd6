"""Finds and removes what this deployment left on the machine: what carries its label or marker.

Models are not among it.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stack import runtime
from stack.compose import Docker
from stack.config import Project
from stack.errors import Code, StackError
from stack.host import MARKER


@dataclass(frozen=True)
class Item:
    """One thing that can be removed."""

    kind: str
    name: str
    size_mb: float
    remove: Callable[[], object]


def items(project: Project) -> tuple[Item, ...]:
    """Return what can be removed, folders last: the lock is in one.

    Raises:
        StackError: USAGE, where something runs, or a folder is not known to be ours.

    """
    for where, server in runtime.alive(project):
        raise StackError(
            f"{server.service.name} ({where.name}) runs.",
            "Stop it first: `invoke down`.",
            Code.USAGE,
        )
    both = (project.root / ".cache", project.state)
    folders = [each for each in both if each.is_symlink() or each.exists()]
    for folder in folders:
        require_ours(folder)
    found = [
        Item(kind, name, size / 1e6, delete)
        for where in runtime.present(project)
        if isinstance(where, Docker)
        for kind, name, size, delete in where.left()
    ]
    found += [
        Item("folder", str(each), _size(each) / 1e6, partial(remove, each)) for each in folders
    ]
    return tuple(found)


def require_ours(folder: Path) -> None:
    """Make sure that a folder is one that we made.

    Raises:
        StackError: USAGE, with the reason.

    """
    if folder.is_symlink():
        raise _refused(folder, f"is a link to {folder.readlink()}")
    if folder.resolve() == Path(folder.anchor) or folder.is_mount():
        raise _refused(folder, "is the root of a file system")
    if not (folder / MARKER).is_file():
        raise _refused(folder, f"has no {MARKER}, so it may be somebody else's")


def remove(folder: Path) -> None:
    """Remove a folder of ours; interrupted, it can be removed again. Raises as `require_ours`."""
    require_ours(folder)
    for path in folder.iterdir():
        if path.name == MARKER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / MARKER).unlink()
    folder.rmdir()


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def _refused(folder: Path, why: str) -> StackError:
    return StackError(
        f"{folder} {why}; nothing was removed.",
        "Look at it, and remove it by hand if it is yours.",
        Code.USAGE,
    )
