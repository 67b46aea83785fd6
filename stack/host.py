"""The programs, locks, files and ports of this machine. The only module that starts a process."""

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import platform
import re
import signal
import socket
import stat
import subprocess  # noqa: TID251
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from stack import bounded_log
from stack.errors import Code, StackError

MARKER = ".made-by-glm-server"
_NOT_OURS_ALONE = {"checks"}  # where nox leaves results before we are ever called
_INTERRUPT_GRACE_S = 10


@dataclass(frozen=True)
class Result:
    """What a finished program left: exit status and its two streams, decoded."""

    status: int
    stdout: str
    stderr: str


def reason(done: Result) -> str:
    """Return the line of a failed program's words that says most: its last error, or last line."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    return (telling or lines or ["it said nothing"])[-1]


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float | None = None,
    show: int | None = None,
    line: Callable[[str], None] | None = None,
    patience_s: float = 0,
) -> Result:
    """Run a program to its end and return its result, whatever its status.

    `show` lets it write to a file descriptor of this process (2 for progress); `line` receives
    each line of its output as it comes. It runs in a process group of its own: when this call is
    left early, by Ctrl-C or a time limit, the whole group is ended before it returns. A program
    that must not stop half-way is given `patience_s` to end by itself first.

    Raises:
        StackError: HOST, where the program does not exist or outlasts `timeout_s`.

    """
    try:
        process = subprocess.Popen(
            list(argv),
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=show or subprocess.PIPE,
            stderr=subprocess.STDOUT if show or line else subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise StackError(
            f"{argv[0]} is not installed.", f"Install {argv[0]} and try again.", Code.HOST
        ) from error
    timed_out = threading.Event()

    def expire() -> None:
        timed_out.set()
        _end(process, patience_s)

    timer = threading.Timer(timeout_s or 0, expire)
    collected = []
    with process:
        try:
            if timeout_s:
                timer.start()
            if line and process.stdout:
                for text in process.stdout:
                    collected.append(text)
                    line(text.rstrip())
            out, err = process.communicate()
        except BaseException:
            _end(process, patience_s)
            raise
        finally:
            timer.cancel()
    if timed_out.is_set():
        raise StackError(
            f"`{' '.join(map(str, argv[:3]))} …` gave no answer within {timeout_s:g} s.",
            "See whether what it talks to hangs, then try again.",
            Code.HOST,
        )
    return Result(process.returncode, "".join(collected) or out or "", err or "")


def _end(process: "subprocess.Popen[str]", patience_s: float) -> None:
    """End a process group: wait, interrupt, then kill; another Ctrl-C skips to the next step."""
    with contextlib.suppress(ProcessLookupError):
        for number, limit_s in ((0, patience_s), (signal.SIGINT, _INTERRUPT_GRACE_S)):
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.wait(limit_s)
                break
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# Dash and bash alike: a shell's own /proc entry keeps its pid and start time through exec.
_TELL_AND_BECOME = """
read -r stat </proc/$$/stat && echo "$stat" >"$0" || exit
env -i "$1" -I -S "$2" "$3" "$4" "$5" $$ >/dev/null 2>&1 &
shift 5
exec "$@"
"""


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    log: Path,
    pid_file: Path,
    log_bytes: int = 10**7,
    log_files: int = 1,
) -> None:
    """Start a program that outlives this one, in a session of its own.

    Its output goes to `log`, emptied first and bounded from then on (see `bounded_log`). It writes
    `pid_file` itself (see `Process.read`), so that none is ever lost, whenever this process is
    killed. `Popen` would warn that nobody waits.
    """
    pid_file.unlink(missing_ok=True)
    for part in log.parent.glob(f"{log.name}.*"):
        part.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    bound = (sys.executable, bounded_log.__file__, str(log), str(log_bytes), str(log_files))
    shell = ["/bin/sh", "-c", _TELL_AND_BECOME, str(pid_file), *bound, *argv]
    os.posix_spawn(shell[0], shell, env, file_actions=files, setsid=True)


def own_folder(folder: Path) -> None:
    """Make a folder where it is missing, and mark it as ours to remove unless others use it."""
    folder.mkdir(parents=True, exist_ok=True)
    if {each.name for each in folder.iterdir()} <= _NOT_OURS_ALONE:
        with contextlib.suppress(OSError):  # a full disk is told by what has to be written
            (folder / MARKER).write_text("Made by glm-server; `invoke clean` may remove it.\n")


@contextlib.contextmanager
def lock(folder: Path, *, verb: str) -> Iterator[None]:
    """Hold the project's lock; the kernel drops it with the process, so none is ever stale.

    Raises:
        StackError: BUSY, naming the holder, when another operation has it.

    """
    own_folder(folder)
    with (folder / "lock").open("a+") as file, _held(file, f"invoke {verb}", "operation"):
        yield


@contextlib.contextmanager
def machine_lock(name: str, *, what: str) -> Iterator[None]:
    """Hold one of the machine's locks, between all its users and deployments, likewise.

    Raises:
        StackError: BUSY, naming the holder, when another process has it; HOST, where a file that
            is no lock is in its place.

    """
    path = _lock_folder() / f"glm-{name}.lock"
    flags = os.O_RDWR | os.O_NOFOLLOW
    try:
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL)
            os.fchmod(fd, 0o666)
        except FileExistsError:  # no O_CREAT: Linux forbids it for others' files in such folders
            fd = os.open(path, flags)
    except OSError as error:
        raise StackError(
            f"The lock {path} cannot be opened: {error.strerror}.",
            "Remove that file, once no `invoke` is at work.",
            Code.HOST,
        ) from error
    with os.fdopen(fd, "r+") as file, _held(file, f"invoke in {Path.cwd()}", what):
        yield


def _lock_folder() -> Path:
    """Return /run/lock where every user may write, as on Debian and Ubuntu, else /tmp.

    By the folder's mode, not by what this user may do: all must agree. $TMPDIR differs by user.
    """
    folder, shared = Path("/run/lock"), stat.S_IWOTH | stat.S_ISVTX
    usual = folder.is_dir() and folder.stat().st_mode & shared == shared
    return folder if usual else Path("/tmp")  # noqa: S108


@contextlib.contextmanager
def _held(file: IO[str], holder: str, what: str) -> Iterator[None]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise StackError(
            f"Another {what} is at work: {file.read().strip() or 'unknown'}.",
            "Wait for it to end, then try again.",
            Code.BUSY,
        ) from None
    file.truncate(0)
    with contextlib.suppress(OSError):  # a full disk must not keep anybody from stopping servers
        os.pwrite(file.fileno(), f"{holder}, pid {os.getpid()}".encode(), 0)
    try:
        yield
    finally:
        file.truncate(0)


class Interrupts:
    """Lets the first Ctrl-C, SIGTERM or hang-up of a block raise, and notes those that follow.

    So what the first one calls for, to undo what was begun, is done whole. Signals that were
    ignored stay so.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, note: Callable[[], None]) -> None:
        """Take what to do at each signal after the first."""
        self._note, self._shielded = note, False
        self._former: dict[signal.Signals, Any] = {}

    def shield(self) -> None:
        """Let none raise from here on."""
        self._shielded = True

    def __enter__(self) -> Self:
        """Take the signals over."""
        for number in self._NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, former in self._former.items():
            signal.signal(number, former)

    def _handle(self, *_: object) -> None:
        if self._shielded:
            self._note()
        else:
            self._shielded = True
            raise KeyboardInterrupt


def write_atomic(
    path: Path, content: str | bytes, *, mode: int = 0o644, owner: int | None = None
) -> None:
    """Write a small file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            if owner is not None:
                os.fchown(fd, owner, owner)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(fd)
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket: its address, and its process where we may see it."""

    address: str
    holder: str


def listeners(port: int) -> tuple[Listener, ...]:
    """Return who listens on a TCP port, of either address family, in this network namespace."""
    return tuple(
        Listener(address, _holder(inode)) for address, p, inode in _listening() if p == port
    )


def listening_port(pid: int) -> int | None:
    """Return the lowest TCP port that a process listens on, or None."""
    sockets = {_link(fd) for fd in Path(f"/proc/{pid}/fd").glob("*")}
    ports = [port for _, port, inode in _listening() if f"socket:[{inode}]" in sockets]
    return min(ports, default=None)


def _listening() -> Iterator[tuple[str, int, str]]:
    """Yield address, port and socket inode of each listening TCP socket."""
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        rows = table.read_text().splitlines()[1:] if table.exists() else []
        for fields in map(str.split, rows):
            if fields[3] == "0A":
                address, _, port = fields[1].rpartition(":")
                yield _address(address), int(port, 16), fields[9]


def _address(text: str) -> str:
    """Decode /proc/net/tcp's address: 32-bit words in host order, little-endian here."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:  # gone meanwhile, or another user's
        return ""


def _holder(inode: str) -> str:
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        if _link(fd) == f"socket:[{inode}]":
            pid = int(fd.parts[2])
            return f"{name(pid)} (pid {pid})"
    return "a process that this user may not see"


def port_conflict(bind: str, port: int) -> Listener | None:
    """Return a listener that stands in the way of serving `bind`:`port`.

    One on another specific address does not, except on loopback: `localhost` may mean ::1, and
    a client would reach a stranger there.
    """
    for listener in listeners(port):
        theirs, ours = ipaddress.ip_address(listener.address), ipaddress.ip_address(bind)
        if theirs == ours or theirs.is_unspecified or ours.is_unspecified:
            return listener
        if theirs.is_loopback and ours.is_loopback:
            return listener
    return None


def addresses() -> tuple[str, ...]:
    """Return this machine's own IPv4 addresses beyond loopback."""
    found_ = set()
    for line in Path("/proc/net/fib_trie").read_text().split("|--")[1:]:
        address, *rest = line.split()
        if "host" in rest and "LOCAL" in rest:
            found_.add(address)
    return tuple(sorted(a for a in found_ if not ipaddress.ip_address(a).is_loopback))


def answers(host: str, port: int, *, timeout_s: float = 3) -> bool:
    """Return whether a TCP connection to `host`:`port` opens within `timeout_s`."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Usage:
    """A process's CPU time since its start, to a tick (10 ms), and its resident memory now."""

    cpu_s: float
    resident_mib: float


class _Timex(ctypes.Structure):
    """The kernel's struct timex, as far as its status; room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("figures", ctypes.c_long * 4),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


def clock_synchronised() -> bool:
    """Return whether the kernel's clock is kept by somebody, as adjtimex(2) tells (STA_UNSYNC)."""
    told = _Timex()
    ctypes.CDLL(None).adjtimex(ctypes.byref(told))
    return not told.status & 0x40


def busy_s() -> float:
    """Return the CPU time of all that ran on this machine since boot, and that of its host's."""
    user, nice, system, _idle, _iowait, *interrupts = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """A process that cannot be mistaken for a later one with the same pid.

    `started` is field 22 of /proc/<pid>/stat: clock ticks after boot.
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """Return the living process with this pid; a zombie counts as gone."""
        fields = _stat(pid)
        return cls(pid, int(fields[19])) if fields and fields[0] not in "ZX" else None

    @classmethod
    def read(cls, pid_file: Path) -> "Process | None":
        """Return the process, living or not, that wrote its /proc/<pid>/stat line to a file."""
        try:
            pid, _, rest = pid_file.read_text().partition(" ")
            return cls(int(pid), int(rest.rpartition(") ")[2].split()[19]))
        except (FileNotFoundError, IndexError, ValueError):  # not there yet, or in the writing
            return None

    def alive(self) -> bool:
        """Return whether this very process still runs."""
        return Process.of(self.pid) == self

    def age_s(self) -> float | None:
        """Return the seconds since its start; None once it is gone."""
        up_s = float(Path("/proc/uptime").read_text().split()[0])
        return up_s - self.started / os.sysconf("SC_CLK_TCK") if self.alive() else None

    def activity(self) -> tuple[str, ...]:
        """Return page faults and CPU ticks: they move while it works, not while it is stuck."""
        fields = _stat(self.pid)
        return tuple(fields[i] for i in (7, 9, 11, 12)) if fields else ()

    def usage(self) -> "Usage | None":
        """Return what it has used so far; None once it is gone."""
        fields = _stat(self.pid)
        if not fields or int(fields[19]) != self.started:
            return None
        ticks, pages = int(fields[11]) + int(fields[12]), int(fields[21])
        return Usage(ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to its process group, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            if self.alive():
                os.killpg(self.pid, number)


def processor() -> str:
    """Return the CPU's model and the number of cores."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def name(pid: int) -> str:
    """Return a process's name."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return "a process that ended"


def children(pid: int) -> tuple[int, ...]:
    """Return the pids of a process's children."""
    try:
        return tuple(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except (FileNotFoundError, ProcessLookupError):
        return ()


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat after the name, from field 3 on; empty when gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
