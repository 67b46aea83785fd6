"""What the lock says that a model's files are, and whether the files here are that.

`models.lock` is committed. `.download/` beside it holds what is this machine's own: partial files,
the download's lock, and notes of which bytes were hashed, which hold until a file's size, mtime or
inode changes. Host and container share both.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stack import gguf_header, host
from stack.config import Service
from stack.errors import Code, StackError

LOCK, OWN_FOLDER = "models.lock", ".download"
STAND_IN = ".stand-in.gguf"
# Of 128 KiB to 4 MiB, the fastest with a cache of 1 MiB.
BLOCK_BYTES = 1 << 18

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Locked:
    """A file as the hub has it at a revision; `size` is in bytes, `first_seen` in UTC."""

    file: str
    repository: str
    revision: str
    size: int
    sha256: str
    first_seen: str


@dataclass(frozen=True)
class Stamp:
    """What changes when a file is written to or replaced."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        """Return the stamp of a file with this status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass(frozen=True)
class Note:
    """That a file with this stamp was hashed, from its first byte to its last."""

    stamp: Stamp
    sha256: str


@dataclass(frozen=True)
class Copy:
    """A file of a model, here or missing, beside what the lock and the notes say of it."""

    folder: Path
    file: str
    """Its name in the folder of models, in the lock and in the repository."""
    locked: Locked | None
    stamp: Stamp | None
    """None where it is missing."""
    note: Note | None

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder / self.file

    @property
    def sha256(self) -> str | None:
        """Its hash, where one was taken and holds."""
        return self.note.sha256 if self.note and self.note.stamp == self.stamp else None

    @property
    def ours(self) -> bool:
        """Whether it was fetched or verified here, whatever it holds now."""
        return bool(self.note and self.stamp and self.note.stamp.inode == self.stamp.inode)

    @property
    def state(self) -> str:
        """How far it can be trusted, in a word: only a `verified` one is served."""
        if self.stamp is None:
            return "missing"
        if self.locked is None:
            return "unverified"
        if self.stamp.size != self.locked.size or self.sha256 not in (None, self.locked.sha256):
            return "mismatch"
        return "verified" if self.sha256 else "unverified"


def read_lock(folder: Path) -> dict[str, Locked]:
    """Read the lock of a folder of models, by file; there may be none.

    Raises:
        StackError: USAGE where it cannot be read, since a guess would unlock everything.

    """
    path = folder / LOCK
    try:
        entries = [Locked(**entry) for entry in json.loads(path.read_text())]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise StackError(
            f"{path} cannot be read: {error}.", "Restore it, for example from git.", Code.USAGE
        ) from error
    return {entry.file: entry for entry in entries}


def write_lock(folder: Path, entries: Iterable[Locked]) -> None:
    """Put entries into the lock, in place of older ones of the same files."""
    merged = read_lock(folder) | {entry.file: entry for entry in entries}
    listed = [asdict(merged[file]) for file in sorted(merged)]
    host.write_atomic(folder / LOCK, json.dumps(listed, indent=2, sort_keys=True) + "\n")


def _notes(folder: Path) -> dict[str, Note]:
    """Read the notes; what cannot be read was not noted, and is hashed again."""
    try:
        raw: Mapping[str, dict[str, int]] = json.loads(_notes_file(folder).read_text())
        return {
            file: Note(Stamp(note["size"], note["mtime_ns"], note["inode"]), str(note["sha256"]))
            for file, note in raw.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def note(folder: Path, file: str, fresh: Note) -> None:
    """Note the hash of a file's bytes; a folder that cannot be written to keeps no notes."""
    merged = _notes(folder) | {file: fresh}
    plain = {name: {**asdict(each.stamp), "sha256": each.sha256} for name, each in merged.items()}
    try:
        host.write_atomic(_notes_file(folder), json.dumps(plain, indent=2, sort_keys=True) + "\n")
    except OSError:
        return


def _notes_file(folder: Path) -> Path:
    return folder / OWN_FOLDER / "verified.json"


def _stamp(path: Path) -> Stamp | None:
    return Stamp.of(path.stat()) if path.is_file() else None


def is_made_here(service: Service) -> bool:
    """Return whether a service's file is of no hub: a stand-in, or one without a repository."""
    return not service.model.repository or service.model.path.name.endswith(STAND_IN)


def copies(service: Service) -> tuple[Copy, ...]:
    """Return the files of a service's model, each part of a split one.

    Raises:
        StackError: USAGE for a file outside the folder of models, or a lock that cannot be read.

    """
    folder = service.models_folder
    if ".." in service.model.path.parts:
        raise StackError(
            f"{service.model_file} is not in {folder}.",
            f"Set GLM_{service.quant.upper()}_FILE to a file in GLM_MODELS.",
            Code.USAGE,
        )
    lock, notes = read_lock(folder), _notes(folder)
    found = []
    for path in gguf_header.parts(service.model_file):
        file = path.relative_to(folder).as_posix()
        entry = lock.get(file)
        if entry and entry.repository != service.model.repository:
            entry = None  # of another model that had this name
        found.append(Copy(folder, file, entry, _stamp(path), notes.get(file)))
    return tuple(found)


def is_verified(service: Service) -> bool:
    """Return whether a service's files are the locked ones by the notes, none being hashed now."""
    found = copies(service)
    revisions = {copy.locked.revision for copy in found if copy.locked}
    return len(revisions) == 1 and all(copy.state == "verified" for copy in found)


@contextlib.contextmanager
def exclusive(folder: Path, *, verb: str) -> Iterator[None]:
    """Hold the lock of a folder of models, on the host and in containers alike.

    Raises:
        StackError: BUSY while another has it; DISK where the folder cannot be written to.

    """
    try:
        with host.lock(folder / OWN_FOLDER, verb=verb):
            notes = _notes_file(folder)
            halves = (*notes.parent.glob(f".{notes.name}.*"), *folder.glob(f".{LOCK}.*"))
            for half in halves:  # of a run that was killed while it wrote one
                half.unlink(missing_ok=True)
            yield
    except OSError as error:
        raise StackError(
            f"{folder} cannot be written to: {error.strerror or error}.",
            "Free disk space there, or let this user write; the same command goes on.",
            Code.DISK,
        ) from error


def hash_file(path: Path, progress: Progress | None = None) -> Note:
    """Hash a file from its first byte to its last.

    Raises:
        StackError: INTEGRITY where it cannot be read, or changes meanwhile.

    """
    digest, block, done = hashlib.sha256(), bytearray(BLOCK_BYTES), 0
    view = memoryview(block)
    try:
        with path.open("rb", buffering=0) as file:
            before = Stamp.of(os.fstat(file.fileno()))
            while count := file.readinto(block):
                digest.update(view[:count])
                done += count
                if progress:
                    progress(f"hash of {path.name}", done, before.size)
            after = Stamp.of(os.fstat(file.fileno()))
    except OSError as error:
        cause = f"{path} cannot be read: {error.strerror or error}."
        raise StackError(cause, "Let this user read it.", Code.INTEGRITY) from error
    if before != after or done != before.size:
        cause = f"{path} changed while it was hashed."
        raise StackError(cause, "See who writes to it, then try again.", Code.INTEGRITY)
    return Note(after, digest.hexdigest())


def hashed(copy: Copy, wanted: Locked, progress: Progress | None = None) -> Copy:
    """Return a copy with the hash of its bytes.

    It is noted where the file is, or once was, the wanted one: a file with a note is `ours`. Raises
    as `hash_file`.
    """
    fresh = hash_file(copy.path, progress)
    if copy.ours or fresh.sha256 == wanted.sha256:
        note(copy.folder, copy.file, fresh)
    return replace(copy, stamp=fresh.stamp, note=fresh)


def require_verified(service: Service, progress: Progress | None = None) -> None:
    """Make sure that a service's files are the locked ones, hashing those that changed.

    Files of no hub have no lock.

    Raises:
        StackError: LOAD where one is missing, INTEGRITY where one is not, or not known to be, what
            the lock says.

    """
    if is_made_here(service):
        return
    fetch = f"uv run invoke download --quant {service.quant}"
    found = copies(service)
    for copy in found:
        if copy.state == "missing":
            raise StackError(
                f"{service.name} needs {copy.file} ({service.model.size_gb} GB in all) "
                f"in {service.models_folder}.",
                f"{fetch}; or try --stand-in (random weights).",
                Code.LOAD,
            )
        if copy.locked is None:
            raise StackError(
                f"{copy.file} is not in {LOCK}: nobody knows whether it is what "
                f"{service.model.repository} has.",
                f"{fetch}, which looks that up and keeps the file if it is.",
                Code.INTEGRITY,
            )
        if copy.state == "unverified":
            copy = hashed(copy, copy.locked, progress)  # noqa: PLW2901
        if copy.state != "verified":
            raise mismatch(copy, f"{fetch}, which replaces it.")
    if len({copy.locked.revision for copy in found if copy.locked}) > 1:
        raise StackError(
            f"{LOCK} has parts of {service.model.path.name} from different revisions.",
            f"{fetch} --update",
            Code.INTEGRITY,
        )


def mismatch(copy: Copy, remedy: str, wanted: Locked | None = None) -> StackError:
    """Return the error of a file that is not the locked one, with what differs."""
    locked, stamp = wanted or copy.locked, copy.stamp
    if not locked:
        raise ValueError(f"{copy.file} is not locked")
    if not stamp:
        differs = "it is no regular file"
    elif stamp.size != locked.size:
        differs = f"it has {stamp.size:,} bytes, expected are {locked.size:,}"
    else:
        differs = f"its SHA-256 is {copy.sha256}, expected is {locked.sha256}"
    where = f"{locked.repository} at {locked.revision[:12]}"
    return StackError(f"{copy.path} is not the file of {where}: {differs}.", remedy, Code.INTEGRITY)


@dataclass(frozen=True)
class Listed:
    """A model file, here or expected; `revision` is empty where it is not locked."""

    quant: str
    """Empty for a file that no quant has."""
    file: str
    size: int | None
    revision: str
    state: str
    """`verified`, `unverified`, `missing`, `mismatch`, `stand-in`, `random` or `unused`."""


def listing(services: Iterable[Service], *, verify: Progress | None = None) -> tuple[Listed, ...]:
    """Return the files of services, then what else lies in their folders of models.

    With `verify`, each locked file is hashed, noted or not. Raises as `hash_file`.
    """
    found: dict[Path, Listed] = {}
    folders = set()
    for service in services:
        folders.add(service.models_folder)
        for copy in copies(service):
            if verify and copy.locked and copy.stamp:
                copy = hashed(copy, copy.locked, verify)  # noqa: PLW2901
            state = copy.state
            if is_made_here(service) and copy.stamp:
                state = next((word for word in ("stand-in", "random") if word in copy.file), "own")
            size = copy.stamp.size if copy.stamp else copy.locked.size if copy.locked else None
            revision = copy.locked.revision if copy.locked else ""
            found[copy.path] = Listed(service.quant, copy.file, size, revision, state)
    for folder in folders:
        for path in sorted({*folder.rglob("*.gguf")} - found.keys()):
            state = "stand-in" if path.name.endswith(STAND_IN) else "unused"
            file = path.relative_to(folder).as_posix()
            found[path] = Listed("", file, path.stat().st_size, "", state)
    return tuple(found.values())


def leftovers(folder: Path) -> tuple[Path, ...]:
    """Return what can go: partial files, and files fetched here that the lock no longer has.

    Nothing that a user put there is among them, nor what is behind a link.
    """
    lock, notes = read_lock(folder), _notes(folder)
    partial = [
        *(folder / OWN_FOLDER).glob("*.part"),
        *folder.glob(".*.gguf.part"),  # of random weights
        *(folder / ".cache" / "huggingface" / "download").rglob("*.incomplete"),
    ]
    unlocked = [
        folder / file
        for file, noted in notes.items()
        if file not in lock and Copy(folder, file, None, _stamp(folder / file), noted).ours
    ]
    inside = folder.resolve()
    return tuple(
        path
        for path in sorted((*partial, *unlocked))
        if path.resolve() == inside / path.relative_to(folder) and path.is_file()
    )
