"""Fetches model files from the hub: resumed, hashed as they arrive, then locked and put in place.

`huggingface_hub` gives addresses, tokens, metadata and connections. The bytes are moved here: its
own download (2.4), through Xet or not, deletes what it has when it fails and begins anew under
another name, so that nothing is ever resumed, and takes no hash of what arrived.
"""

import contextlib
import email.utils
import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self, TypeVar

import httpx2
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.constants import ENDPOINT, HF_HUB_DOWNLOAD_TIMEOUT
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
)

from stack import gguf_header, host, integrity
from stack.config import Service
from stack.errors import Code, StackError
from stack.integrity import OWN_FOLDER, Copy, Locked, Note, Progress, Stamp

T = TypeVar("T")

BRANCH = "main"
MARGIN_BYTES = 10 * 10**9
ATTEMPTS = 5
"""How often in a row it tries without getting further."""
LONGEST_WAIT_S = 300
"""The longest that a hub may ask to wait."""
SILENCE_S = min(HF_HUB_DOWNLOAD_TIMEOUT, 60)
"""How long a connection may be silent; a slow one never is."""

_log = logging.getLogger(__name__)
_TOKEN = "Set HF_TOKEN, or run `uv run hf auth login`; accept the licence on the model's page."  # noqa: S105
_REMEDIES = {
    401: _TOKEN,
    403: _TOKEN,
    404: "See whether the repository in compose.yaml and the file's name in .env are right.",
    429: "Wait, or set HF_TOKEN: the hub allows more to those it knows.",
}
_NETWORK = "See to the network (HTTPS_PROXY, SSL_CERT_FILE, HF_ENDPOINT); the same command goes on."


class _PassingError(StackError):
    """A failure that may pass: after `wait_s` seconds, where the hub said so."""

    wait_s: float | None = None
    unreachable = False


@dataclass(frozen=True)
class Fetched:
    """What a download did for a service."""

    service: Service
    files: tuple[Locked, ...]
    before: tuple[Locked, ...]
    """The entries that the lock had of these files."""
    fetched_bytes: int


def download(
    services: Sequence[Service], *, update: bool = False, progress: Progress
) -> tuple[Fetched, ...]:
    """Bring services' files here, verified and locked.

    `update` takes the newest commit in place of the locked one. Where it fails, what has arrived is
    kept, lock and files in place are untouched, and the next call goes on.

    Raises:
        StackError: USAGE for a model that is on no hub; BUSY while another download runs; DISK;
            DOWNLOAD; INTEGRITY where the hub's bytes, or the file here, are not the locked ones.

    """
    for service in services:
        if integrity.is_made_here(service):
            raise StackError(
                f"{service.model.path.name} is on no hub.",
                "Name a quant whose file is on the hub.",
                Code.USAGE,
            )
    folder = services[0].models_folder
    with integrity.exclusive(folder, verb="download"):
        jobs = [_Job(service, update=update, progress=progress) for service in services]
        _check_space(folder, sum(job.missing_bytes for job in jobs))
        return tuple(job.run() for job in jobs)


def _check_space(folder: Path, missing_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if missing_bytes and free_bytes < missing_bytes + MARGIN_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{missing_bytes / 1e9:.2f} GB are missing, {MARGIN_BYTES / 1e9:.0f} GB must stay "
            f"free, and {free_bytes / 1e9:.2f} GB are",
        )


class _Job:
    """The download of one model: what it should be, and which files of it are missing."""

    def __init__(self, service: Service, *, update: bool, progress: Progress) -> None:
        self.service, self.progress = service, progress
        self.copies = integrity.copies(service)
        self.folder = service.models_folder
        self.targets = self._targets(update=update)
        self.missing = [
            target
            for copy, target in zip(self.copies, self.targets, strict=True)
            if not self._is_here(copy, target)
        ]
        for target in self.targets:
            _drop_other_parts(self.folder, target)

    @property
    def missing_bytes(self) -> int:
        """The bytes that are still to come."""
        return sum(max(0, each.size - _size(_part(self.folder, each))) for each in self.missing)

    def _targets(self, *, update: bool) -> tuple[Locked, ...]:
        """Return what each file should be: as locked, else as the hub has it at one commit."""
        locked = [copy.locked.revision for copy in self.copies if copy.locked and not update]
        revision, targets = locked[0] if locked else BRANCH, []
        for copy in self.copies:
            if copy.locked and not update:
                targets.append(copy.locked)
                continue
            repository = self.service.model.repository or ""
            told = patiently(lambda: _ask(repository, copy.file, revision), lambda: 0)  # noqa: B023
            revision = told.revision
            if copy.locked and copy.locked.sha256 == told.sha256:
                told = replace(told, first_seen=copy.locked.first_seen)
            targets.append(told)
        return tuple(targets)

    def _is_here(self, copy: Copy, target: Locked) -> bool:
        """Return whether the file in place is the wanted one.

        Raises:
            StackError: INTEGRITY where it is another, which nobody here fetched or verified.

        """
        known = [each for each in (copy.locked, target) if each]
        ours = copy.ours
        if copy.stamp and not copy.sha256 and copy.stamp.size in {each.size for each in known}:
            copy = integrity.hashed(copy, target, self.progress)
        ours = ours or copy.sha256 in {each.sha256 for each in known}
        if copy.path.exists() and not ours:
            raise integrity.mismatch(copy, f"Move it away from {self.folder}, then again.", target)
        return copy.sha256 == target.sha256

    def run(self) -> Fetched:
        """Fetch what is missing, then lock and put in place all of it together."""
        missing_bytes = self.missing_bytes
        notes = [_fetch(target, self.folder, self.progress) for target in self.missing]
        self._check_headers()
        # The lock first: what it says is then either in place, or whole in its partial file.
        integrity.write_lock(self.folder, self.targets)
        for target, note in zip(self.missing, notes, strict=True):
            path = self.folder / target.file
            path.parent.mkdir(parents=True, exist_ok=True)
            _part(self.folder, target).replace(path)
            host.sync_folder(path.parent)
            integrity.note(self.folder, target.file, note)
        before = tuple(copy.locked for copy in self.copies if copy.locked)
        return Fetched(self.service, self.targets, before, missing_bytes)

    def _check_headers(self) -> None:
        """Refuse what the hub has by its hash, and yet is no such model. Raises as the callees."""
        paths = [
            _part(self.folder, each) if each in self.missing else self.folder / each.file
            for each in self.targets
        ]
        header, *_ = [gguf_header.read_file(path) for path in paths]
        gguf_header.require(paths[0], header, self.service.model.header)


def _part(folder: Path, target: Locked) -> Path:
    name = target.file.replace("/", "_")
    return folder / OWN_FOLDER / f"{name}.{target.sha256[:16]}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _drop_other_parts(folder: Path, target: Locked) -> None:
    """Remove partial files of what the hub had under the same name before."""
    part = _part(folder, target)
    for other in part.parent.glob("*.part"):
        if other != part and other.name.startswith(f"{target.file.replace('/', '_')}."):
            other.unlink()


def _fetch(target: Locked, folder: Path, progress: Progress) -> Note:
    """Complete a partial file; one with wrong bytes is fetched once more from its start.

    Raises:
        StackError: DOWNLOAD, or INTEGRITY where its bytes are wrong again.

    """
    path = _part(folder, target)
    for _ in range(2):
        with _Part(path, target, progress) as part:
            patiently(part.receive, lambda: part.size)
            note = part.finish()
        if note.sha256 == target.sha256:
            return note
        path.unlink()
        _log.warning("%s arrived with wrong bytes.", target.file)
    raise StackError(
        f"{target.file} arrived twice with wrong bytes: its SHA-256 is {note.sha256}, expected is "
        f"{target.sha256}.",
        "Try another network or HF_ENDPOINT; nothing was put in place.",
        Code.INTEGRITY,
    )


class _Part:
    """A partial file, and the hash of what is in it so far."""

    def __init__(self, path: Path, target: Locked, progress: Progress) -> None:
        self.target, self.progress = target, progress
        self.name = Path(target.file).name
        path.touch()
        self.file = path.open("r+b", buffering=0)
        self.digest, self.size = hashlib.sha256(), 0
        block, there = memoryview(bytearray(integrity.BLOCK_BYTES)), path.stat().st_size
        while count := self.file.readinto(block):
            self._count(block[:count])
            progress(f"hash of {self.name} so far", self.size, there)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _count(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.size += len(data)

    def restart(self) -> None:
        """Forget what is there."""
        self.file.seek(0)
        self.file.truncate()
        self.digest, self.size = hashlib.sha256(), 0

    def receive(self) -> None:
        """Receive what is missing, with one request.

        Raises:
            StackError: DOWNLOAD; INTEGRITY where the hub has other bytes than the wanted ones.

        """
        target = self.target
        if self.size > target.size:
            self.restart()
        if self.size == target.size:
            return
        told = _ask(target.repository, target.file, target.revision)
        if (told.sha256, told.size) != (target.sha256, target.size):
            self.restart()
            raise _other_bytes(target, f"{told.size:,} bytes with SHA-256 {told.sha256}")
        url = hf_hub_url(target.repository, target.file, revision=target.revision)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if self.size:
            headers["Range"] = f"bytes={self.size}-"
        with (
            _translated(target.file),
            get_session().stream("GET", url, headers=headers, timeout=SILENCE_S) as response,
        ):
            if response.status_code == httpx2.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise _other_bytes(target, response.headers.get("Content-Range", "less"))
            hf_raise_for_status(response)
            self._take(response)
        if self.size < target.size:
            raise passing(f"{target.file} ended early, at {self.size:,} of {target.size:,} bytes")

    def _take(self, response: httpx2.Response) -> None:
        pieces = response.iter_raw()
        piece = next(pieces, b"")
        offset, total = extent(response)
        foreign = not offset and not gguf_header.MAGIC.startswith(piece[:4] or b"?")
        if foreign or total not in (None, self.target.size):
            what = gguf_header.foreign(piece) if foreign else f"{total:,} bytes"
            raise _other_bytes(self.target, what)
        if offset != self.size:
            if offset:
                raise passing(f"{self.target.file} went on at {offset:,}, not at {self.size:,}")
            self.restart()  # the range was ignored
        while piece:
            if self.size + len(piece) > self.target.size:
                raise _other_bytes(self.target, f"more than {self.target.size:,} bytes")
            left = memoryview(piece)
            while left:  # a disk that fills up takes a part first
                left = left[self.file.write(left) :]
            self._count(piece)
            self.progress(self.name, self.size, self.target.size)
            piece = next(pieces, b"")

    def finish(self) -> Note:
        """Bring it to the disk; return its hash."""
        os.fsync(self.file.fileno())
        return Note(Stamp.of(os.fstat(self.file.fileno())), self.digest.hexdigest())


def extent(response: httpx2.Response) -> tuple[int, int | None]:
    """Return where a response's bytes begin in the file, and the file's size where it says so."""
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if told:
        return int(told[1]), int(told[2]) if told[2] != "*" else None
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _other_bytes(target: Locked, what: str) -> StackError:
    return StackError(
        f"The hub does not have {target.file} of revision {target.revision[:12]} any more, or "
        f"something stands between: it sends {what}; expected are {target.size:,} bytes with "
        f"SHA-256 {target.sha256}.",
        "Try another network; if the repository has changed, --update moves the lock to it.",
        Code.INTEGRITY,
    )


def _ask(repository: str, file: str, revision: str) -> Locked:
    """Return what the hub has of a file at a branch or commit, with one request and no retry.

    Raises:
        StackError: DOWNLOAD; INTEGRITY where it is no large file, so that the hub has no hash.

    """
    with _translated(f"{repository}/{file}"):
        url = hf_hub_url(repository, file, revision=revision)
        told = get_hf_file_metadata(url, timeout=SILENCE_S)
    if not told.commit_hash or told.size is None:
        cause = f"{ENDPOINT} answers, but not as a model hub does."
        raise StackError(cause, _NETWORK, Code.DOWNLOAD)
    if not re.fullmatch("[0-9a-f]{64}", told.etag or ""):
        raise StackError(
            f"{repository} has {file}, but as a small text file ({told.size:,} bytes), no model.",
            "See whether the file's name in .env is right.",
            Code.INTEGRITY,
        )
    return Locked(
        file=file,
        repository=repository,
        revision=told.commit_hash,
        size=told.size,
        sha256=told.etag or "",
        first_seen=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def patiently(attempt: Callable[[], T], reached: Callable[[], int]) -> T:
    """Try until it succeeds, as long as it gets further or has tries left.

    A hub that cannot be reached at the first try is not tried again: there is no network.
    """
    idle, start, furthest = 0, reached(), reached()
    while True:
        try:
            return attempt()
        except _PassingError as error:
            if reached() > furthest:
                idle, furthest = 0, reached()
            idle += 1
            if idle == ATTEMPTS or (error.unreachable and furthest == start):
                raise
            wait_s = 2.0 ** (idle - 1) if error.wait_s is None else error.wait_s
            _log.info("%s Again in %.0f s.", error.cause, wait_s)
            time.sleep(wait_s)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn errors of the hub's client and of the network into ours."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        cause = f"{what} is not here, or not whole, and HF_HUB_OFFLINE is set."
        remedy = "Unset it to download; `uv run invoke models` shows what is here."
        raise StackError(cause, remedy, Code.DOWNLOAD) from error
    except HfHubHTTPError as error:
        raise refused(what, error.response) from error
    except httpx2.TimeoutException as error:
        raise passing(f"{what}: nothing came for {SILENCE_S:g} s") from error
    except (httpx2.ConnectError, httpx2.ProxyError) as error:
        cause = f"{what}: {error.request.url.host} cannot be reached: {error}"
        raise passing(cause, unreachable=True) from error
    except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
        raise passing(f"{what}: the connection broke: {error}") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, HFValidationError) as error:
        cause = " ".join(f"{what}: {error}.".split())
        raise StackError(cause, _NETWORK, Code.DOWNLOAD) from error


def passing(cause: str, *, wait_s: float | None = None, unreachable: bool = False) -> StackError:
    """Return an error that may pass."""
    error = _PassingError(f"{' '.join(cause.split())}.", _NETWORK, Code.DOWNLOAD)
    error.wait_s, error.unreachable = wait_s, unreachable
    return error


def refused(what: str, response: httpx2.Response) -> StackError:
    """Return the error of an answer that is none; it may pass where its status says so."""
    status = response.status_code
    cause = f"The hub answers {status} {response.reason_phrase} for {what}."
    remedy = _REMEDIES.get(status, "Try again later; the same command goes on.")
    error = StackError(cause, remedy, Code.DOWNLOAD)
    if status in (408, 429) or status >= 500:  # noqa: PLR2004
        limit = parse_ratelimit_headers(response.headers)
        wait_s = retry_after_s(response.headers.get("Retry-After", ""))
        if wait_s is None and limit:
            wait_s = limit.reset_in_seconds
        if wait_s is not None and wait_s > LONGEST_WAIT_S:
            error.args = (f"{cause[:-1]}, and asks to wait {wait_s:.0f} s.\n{remedy}",)
            return error
        error = _PassingError(cause, remedy, Code.DOWNLOAD)
        error.wait_s = wait_s
    return error


def retry_after_s(value: str) -> float | None:
    """Return the seconds of a Retry-After header, given as seconds or as a date."""
    if value.isdecimal():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time())
