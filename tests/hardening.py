"""What a running container lets its server do, read back from it, and what is wrong with that.

Each of CHECKS takes what was read and yields complaints; a sound container gets none.
"""

import re
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import yaml
from docker.models.containers import Container

from stack import host
from stack.compose import Docker
from stack.config import Service
from stack.wait import wait_until
from tests.workspace import ROOT

# The kernel's own file systems, made anew for each container. Whether one can be written is tried.
PSEUDO = {"cgroup", "cgroup2", "devpts", "devtmpfs", "mqueue", "proc", "sysfs", "tmpfs"}
SCRATCH = ["/dev/mqueue", "/dev/shm", "/tmp"]  # noqa: S108  # all that a server may write
DEVICES = {"console", "full", "null", "ptmx", "random", "tty", "urandom", "zero"}
GPU_DEVICES = {"nvidiactl", "nvidia-modeset", "nvidia-uvm", "nvidia-uvm-tools"}
NAMESPACES = ("ipc", "mnt", "net", "pid", "uts")

# Runs beside the server, as its user and with its rights; $0 is the server's pid there.
LOOK = r"""
root=/proc/$0/root
points=$(cut -d' ' -f5 /proc/$0/mountinfo | sort -u)
echo @mounts; cat /proc/$0/mountinfo
echo @namespaces; for each in ipc mnt net pid uts; do readlink /proc/$0/ns/$each; done
echo @devices; find $root/dev -xdev \( -type b -o -type c \) -printf '%P\n'
echo @sockets; find $root/ -path $root/proc -prune -o -type s -printf '/%P\n' 2>/dev/null
for each in $points; do if [ -S $root$each ]; then echo $each; fi; done # find sees what is beneath
echo @written
for each in $points /app /etc; do
    if [ -d $root$each ]; then
        if (: >$root$each/trial) 2>/dev/null; then rm $root$each/trial; echo $each; fi
    elif [ -f $root$each ]; then # not the null device that hides a file of the kernel's
        if (: >>$root$each) 2>/dev/null; then echo $each; fi
    fi
done
echo @executed
for each in $points; do
    if [ -d $root$each ] && cp /bin/true $root$each/trial 2>/dev/null; then
        if $root$each/trial 2>/dev/null; then echo $each; fi
        rm $root$each/trial
    fi
done
"""


@dataclass(frozen=True)
class Seen:
    """What was read of a running container."""

    service: Service
    status: Mapping[str, str]
    """The server's /proc/PID/status."""
    limits: Mapping[str, str]
    """Its own and its cgroup's: `pids`, `memory` (bytes), `nofile`, `core`."""
    configured: Mapping[str, str]
    """The same as `docker compose config` prints them."""
    look: Mapping[str, list[str]]
    """What LOOK printed, by its sections."""
    probes: tuple[bool, bool]
    """Whether the health check connects to the server, by itself and under the server's filter."""
    files: tuple[tarfile.TarInfo, ...]
    """The container's own files, without what is mounted."""


def see(docker: Docker, service: Service, container: Container) -> Seen:
    """Read a running container back."""
    proc = wait_until(lambda: _server(container), timeout_s=10, what=f"no server in {container}")
    status = dict(re.findall(r"(\w+):\t(.*)", (proc / "status").read_text()))
    looked = docker.beside(service, container, LOOK, status["NSpid"].split()[-1])
    sections = re.split(r"^@(\w+)\n", looked.stdout, flags=re.MULTILINE)[1:]
    return Seen(
        service=service,
        status=status,
        limits=_limits(proc),
        configured=_configured(docker, service),
        look={
            name: text.splitlines()
            for name, text in zip(sections[::2], sections[1::2], strict=True)
        },
        probes=(connects(container), connects(container, "/app/confine")),
        files=files(container),
    )


def _server(container: Container) -> Path | None:
    """Return the /proc folder of the server in a container, once it is there."""
    container.reload()
    first = container.attrs["State"]["Pid"]
    for pid in (first, *host.children(first)):
        if host.name(pid) == "llama-server":
            return Path(f"/proc/{pid}")
    return None


def _limits(proc: Path) -> dict[str, str]:
    own = dict(re.findall(r"^Max (.+?) {2,}(\w+)", (proc / "limits").read_text(), re.MULTILINE))
    groups = {
        name: Path("/sys/fs/cgroup") / ("" if names == "" else name) / path.lstrip("/")
        for names, path in re.findall(r"(?m)^\d+:(.*):(.*)$", (proc / "cgroup").read_text())
        for name in names.split(",")
    }
    held = {"nofile": own["open files"], "core": own["core file size"]}
    for limit, names in (
        ("pids", ("pids.max",)),
        ("memory", ("memory.max", "memory.limit_in_bytes")),
    ):
        # cgroup v1 has a tree for each controller, v2 one for all, whose name is empty.
        found = (groups[tree] / name for tree in (limit, "") if tree in groups for name in names)
        held[limit] = next(file.read_text().strip() for file in found if file.exists())
    return held


def _configured(docker: Docker, service: Service) -> dict[str, str]:
    config = docker.compose("config", "--format", "json", service.name).stdout
    raw = yaml.safe_load(config)["services"][service.name]
    return {
        "pids": str(raw["pids_limit"]),
        "memory": str(raw["mem_limit"]),
        "nofile": str(raw["ulimits"]["nofile"]),
        "core": str(raw["ulimits"]["core"] or 0),  # Compose prints {} for 0
    }


def connects(container: Container, *confined: str) -> bool:
    """Return whether the health check can open a connection, whatever the answer is."""
    _, said = container.exec_run([*confined, "/app/probe"])
    return b"nothing listens" not in said and b"no socket" not in said


def files(container: Container) -> tuple[tarfile.TarInfo, ...]:
    """Return the files of a container, without their content."""
    stream = cast("IO[bytes]", _Stream(cast("Iterator[bytes]", container.export())))
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        return tuple(archive)


class _Stream:
    """What the SDK yields, as a file that tarfile can read once."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (chunk := next(self._chunks, b"")):
            self._rest += chunk
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


Complaints = Iterator[str]


def user(seen: Seen) -> Complaints:
    """Neither user, group nor a further group is root."""
    for name in ("Uid", "Gid"):
        if "0" in seen.status[name].split():
            yield f"{name} {seen.status[name]}"
    if "0" in seen.status["Groups"].split():
        yield "it is in root's group"


def capabilities(seen: Seen) -> Complaints:
    """No capability in any of the five sets."""
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if int(seen.status[name], 16):
            yield f"{name} {seen.status[name]}"


def privileges(seen: Seen) -> Complaints:
    """NoNewPrivs: no setuid program could give it rights."""
    if seen.status["NoNewPrivs"] != "1":
        yield "it could gain privileges from a setuid program"


def seccomp(seen: Seen) -> Complaints:
    """Two filters of system calls, Docker's and its own, and its own keeps it from connecting."""
    if seen.status["Seccomp"] != "2":
        yield "no filter of system calls"
    # Docker's and that of docker/confine.c; kernels before 5.9 do not tell how many.
    elif int(seen.status.get("Seccomp_filters", "2")) < 2:
        yield "no filter of its own"
    if seen.probes != (True, False):
        yield f"(without, with) the filter the health check connects: {seen.probes}"


def mounts(seen: Seen) -> Complaints:
    """Nothing but file systems of the kernel is mounted for writing."""
    for line in seen.look["mounts"]:
        fields = line.split()
        point, options, kind = fields[4], fields[5], fields[fields.index("-") + 1]
        if kind not in PSEUDO and "ro" not in options.split(","):
            yield f"{point} ({kind}) is mounted for writing"


def written(seen: Seen) -> Complaints:
    """What can be written, by trying, is /tmp, /dev/shm and /dev/mqueue alone."""
    if seen.look["written"] != SCRATCH:
        yield f"it wrote to {seen.look['written']}"


def executed(seen: Seen) -> Complaints:
    """Nothing that it could write can be run, by trying."""
    if places := seen.look["executed"]:
        yield f"it ran a program of its own in {places}"


def devices(seen: Seen) -> Complaints:
    """The asked GPUs' device nodes and the usual ones, no other."""
    found = set(seen.look["devices"]) - DEVICES
    gpus = {name for name in found if re.fullmatch(r"nvidia\d+", name)}
    if len(gpus) != len(seen.service.gpus):
        yield f"GPUs {gpus}, asked for {seen.service.gpus}"
    if strange := found - gpus - (GPU_DEVICES if gpus else set()):
        yield f"devices {strange}"


def sockets(seen: Seen) -> Complaints:
    """No socket of a daemon in its files."""
    # The container toolkit mounts its own daemons' sockets for those who asked for a GPU.
    own = "/run/nvidia-" if seen.service.gpus else "none"
    if found := [path for path in seen.look["sockets"] if not path.startswith(own)]:
        yield f"sockets {found}"


def namespaces(seen: Seen) -> Complaints:
    """Ipc, mnt, net, pid and uts are its own, none is the host's."""
    for name, link in zip(NAMESPACES, seen.look["namespaces"], strict=True):
        if link == str(Path(f"/proc/self/ns/{name}").readlink()):
            yield f"the host's own {name} namespace"


def limits(seen: Seen) -> Complaints:
    """Pids, memory, open files and core size are the configured ones."""
    for name, value in seen.configured.items():
        if seen.limits[name] != value:
            yield f"{name} is {seen.limits[name]}, {value} is configured"


def setuid(seen: Seen) -> Complaints:
    """No setuid or setgid file in the image."""
    for file in seen.files:
        if file.isfile() and file.mode & (stat.S_ISUID | stat.S_ISGID):
            yield f"{file.name} is setuid or setgid"


def executables(seen: Seen) -> Complaints:
    """The programs in the image are those of docker/executables.txt, and no library can be run."""
    listed = set((ROOT / "docker" / "executables.txt").read_text().split())
    for name in sorted(listed ^ {f"/{file.name}" for file in seen.files if _program(file)}):
        yield f"{name} is {'missing' if name in listed else 'not in docker/executables.txt'}"


def _program(file: tarfile.TarInfo) -> bool:
    # Docker makes empty files where it mounts its own.
    return file.isfile() and bool(file.mode & 0o111) and file.size > 0


CHECKS: Mapping[str, Callable[[Seen], Complaints]] = {
    check.__name__: check
    for check in (
        *(user, capabilities, privileges, seccomp, mounts, written, executed),
        *(devices, sockets, namespaces, limits, setuid, executables),
    )
}


@dataclass(frozen=True)
class Insecure:
    """A container that differs from a sound one in one thing, and the checks that it fails."""

    fails: tuple[str, ...]
    config: Mapping[str, Any] | None = None
    host: Mapping[str, Any] | None = None
    """Changes of the container's configuration, and of its HostConfig."""
    file: str = ""
    """An executable setuid file added to it."""
