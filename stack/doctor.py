"""Looks for what will keep a deployment from serving, before it does.

A check returns its evidence, or raises: StackError where serving will fail, Doubt where it may,
Moot where there is nothing to check. Ids are stable; scripts may rely on them.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from stack import config, gpu, host, integrity, keys, runtime
from stack.compose import Docker
from stack.config import Project, Service
from stack.errors import Code, StackError

COMPOSE, BUILDX, ENGINE, TOOLKIT = (2, 20, 2), (0, 13, 0), (26, 0, 0), (1, 17, 8)
FLAWS = "CVE-2025-23266, CVE-2025-23267"
# NVIDIA's Xid catalogue: the GPU is gone until it is reset; and: an application faulted.
GONE, FAULTED = {79, 119, 120, 154}, {13, 31, 43, 45}
_GB = 10**9
_BUILD_GB = 10
_SYSTEM_MIB = 2048


class Doubt(StackError):  # noqa: N818
    """What may work, and should be mended."""


class Moot(Exception):  # noqa: N818
    """Nothing to check here, and why."""


@dataclass(frozen=True)
class Finding:
    """What a check found, on what evidence, and the command that mends it."""

    id: str
    severity: str
    """`ok`, `doubt`, `failure` or `moot`."""
    evidence: str
    remedy: str = ""


@dataclass
class Case:
    """What the checks look at; the paths are the kernel's, and a test's."""

    project: Project
    services: list[Service]
    kernel_log: Path = Path("/dev/kmsg")
    devices: Path = Path("/dev")
    buses: Path = Path("/sys/bus/pci/devices")
    meminfo: Path = Path("/proc/meminfo")
    engine_answers: bool = field(default=False, init=False)

    @cached_property
    def docker(self) -> Docker:
        """The project's Docker runtime, asked only once its engine has answered."""
        return Docker(self.project)

    @cached_property
    def on_gpu(self) -> list[Service]:
        """The services that need a GPU; raises Moot where nothing here does."""
        found = [service for service in self.services if service.gpus]
        if not found:
            raise Moot("no quant that needs a GPU")
        return found

    def told(self) -> dict[str, str]:
        """Return what Docker's engine says of itself; raises Moot where it does not answer."""
        if not self.engine_answers:
            raise Moot("no Docker engine")
        return self._told

    @cached_property
    def _told(self) -> dict[str, str]:
        return self.docker.told()


def examine(root: Path, quants: Iterable[str] = ()) -> tuple[Finding, ...]:
    """Run every check for these quants; for all that this machine has the hardware for, if none."""
    try:
        project = config.load(root)
        services = [project.service(quant) for quant in quants]
    except StackError as error:
        return (Finding("settings", "failure", error.cause, error.remedy),)
    case = Case(project, services)
    if not services:
        nvidia = _nvidia(case.buses) or gpu.gpus()
        case.services = [s for s in project.services.values() if nvidia or not s.gpus]
    return run(case)


def run(case: Case) -> tuple[Finding, ...]:
    """Run every check on a case."""
    return tuple(_find(name, check, case) for name, check in CHECKS.items())


def status(findings: Iterable[Finding]) -> int:
    """Return the exit code: 2 for a failure, 1 for a doubt, 0 otherwise."""
    return max(({"failure": 2, "doubt": 1}.get(each.severity, 0) for each in findings), default=0)


def _find(name: str, check: Callable[[Case], str], case: Case) -> Finding:
    try:
        return Finding(name, "ok", check(case))
    except Moot as moot:
        return Finding(name, "moot", str(moot))
    except Doubt as doubt:
        return Finding(name, "doubt", doubt.cause, doubt.remedy)
    except StackError as error:
        return Finding(name, "failure", error.cause, error.remedy)


def _settings(case: Case) -> str:
    return f"{len(case.project.services)} quants"


def _key(case: Case) -> str:
    told = set()
    for service in case.services:
        if service.key_file.exists():
            keys.read(service)
            told.add(f"{service.key_file} is usable")
        else:
            keys.require_reachable(service, first_start="GLM_KEY_FILE" not in case.project.settings)
            told.add("none yet; the first `invoke up` makes it")
    return "; ".join(sorted(told))


def _docker(case: Case) -> str:
    try:
        case.docker.check()
    except runtime.NoEngineError as error:
        raise Doubt(error.cause, error.remedy, Code.HOST) from error
    case.engine_answers = True
    return f"engine {case.told()['engine']} answers"


def _docker_version(case: Case) -> str:
    return _at_least("Docker engine", case.told()["engine"], ENGINE)


def _compose(case: Case) -> str:
    return _at_least("Compose", case.told()["compose"], COMPOSE)


def _buildx(case: Case) -> str:
    return _at_least("Buildx", case.told()["buildx"], BUILDX)


def _at_least(what: str, version: str, least: tuple[int, int, int]) -> str:
    wanted = ".".join(map(str, least))
    if _version(version) >= least:
        return f"{what} {version}"
    mend = f"Install {what} {wanted} or later; on Debian, scripts/debian-docker does."
    raise StackError(f"{what} is {version or 'missing'}, {wanted} is needed.", mend, Code.HOST)


def _version(text: str) -> tuple[int, int, int]:
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else (0, 0, 0)


def _passthrough(case: Case) -> str:
    """Run a container with the GPU: what it sees proves more than any version."""
    service = case.on_gpu[0]
    case.told()
    seen = case.docker.gpus_seen(service)
    if seen is None:
        raise Moot("no image to run yet; `invoke build` makes one")
    here = {each.uuid for each in gpu.gpus()}
    if not seen or not {*seen} <= here:
        raise StackError(
            f"A container sees the GPUs {', '.join(seen) or 'none'}, the host {', '.join(here)}.",
            "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml, then restart Docker.",
            Code.HOST,
        )
    return f"a container sees {', '.join(seen)}"


def _gpu(case: Case) -> str:
    service = case.on_gpu[0]
    found = gpu.require(service, chosen="GLM_GPU" in case.project.settings)
    return ", ".join(f"{each.index} {each.name}, {each.total_mib:,} MiB" for each in found)


def _driver(case: Case) -> str:
    service = case.on_gpu[0]
    toolkit = service.build_args["CUDA_VERSION"]
    drivers = {each.driver for each in gpu.require(service, toolkit=toolkit)}
    return f"driver {', '.join(filter(None, drivers))} runs CUDA {toolkit}"


def _toolkit(case: Case) -> str:
    _ = case.on_gpu
    case.told()
    try:
        said = host.run(["nvidia-ctk", "--version"], timeout_s=10).stdout
    except StackError:
        said = ""
    version = next(iter(re.findall(r"version (\d+\.\d+\.\d+)", said)), "")
    if _version(version) >= TOOLKIT:
        return f"NVIDIA's container toolkit {version}"
    raise StackError(
        f"NVIDIA's container toolkit is {version or 'missing'}; containers break out of those "
        f"before 1.17.8 ({FLAWS}).",
        "sudo apt-get install --only-upgrade nvidia-container-toolkit, then restart Docker.",
        Code.HOST,
    )


def _cgroups(case: Case) -> str:
    _ = case.on_gpu
    driver = case.told()["cgroup"]
    if driver == "systemd":
        raise Doubt(
            "With the cgroup driver systemd, `systemctl daemon-reload` takes GPUs from containers.",
            'Set "exec-opts": ["native.cgroupdriver=cgroupfs"] in /etc/docker/daemon.json, or use '
            "CDI; `invoke watch` recreates a container that lost its GPU.",
            Code.HOST,
        )
    return f"cgroup driver {driver}"


def _nodes(case: Case) -> str:
    _ = case.on_gpu
    missing = [n for n in ("nvidiactl", "nvidia-uvm") if not (case.devices / n).exists()]
    if missing:
        raise StackError(
            f"{case.devices} lacks {' and '.join(missing)}.",
            "sudo nvidia-modprobe -u -c 0; at boot, before Docker (docs/watch.md).",
            Code.HOST,
        )
    return "nvidiactl and nvidia-uvm are there"


def _xid(case: Case) -> str:
    _ = case.on_gpu
    try:
        numbers = {int(n) for n in re.findall(r"NVRM: Xid \([^)]*\): (\d+)", _kernel_log(case))}
    except OSError as error:
        raise Moot(f"{case.kernel_log} cannot be read: {error.strerror}") from error
    listed = ", ".join(map(str, sorted(numbers)))
    if numbers & GONE:
        cause = f"The kernel tells of Xid {listed}: a GPU is gone until it is reset."
        raise StackError(cause, "sudo nvidia-smi --gpu-reset, or reboot.", Code.HOST)
    if numbers & FAULTED:
        cause = f"The kernel tells of Xid {listed}: a program on the GPU faulted."
        raise Doubt(cause, "See `invoke logs`; once is chance, often is a fault.", Code.HOST)
    return f"no Xid that matters{f' ({listed})' if listed else ''}"


def _kernel_log(case: Case) -> str:
    """Read what is in the kernel's log now; its device gives one record a read, and then blocks."""
    fd = os.open(case.kernel_log, os.O_RDONLY | os.O_NONBLOCK)
    records = []
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    record = os.read(fd, 1 << 16)
                except BrokenPipeError:  # overwritten before it was read
                    continue
                if not record:
                    break
                records.append(record)
    finally:
        os.close(fd)
    return b"".join(records).decode(errors="replace")


def _models(case: Case) -> str:
    told = []
    for listed in integrity.listing(case.services):
        if not listed.quant:
            continue
        told.append(f"{listed.quant} {listed.state}")
        fetch = f"uv run invoke download --quant {listed.quant}"
        if listed.state == "missing":
            raise Doubt(f"{listed.file} of {listed.quant} is missing.", fetch, Code.LOAD)
        if listed.state in ("mismatch", "unverified"):
            cause = f"{listed.file} of {listed.quant} is not known to be the locked one."
            raise StackError(cause, f"{fetch}, which verifies or replaces it.", Code.INTEGRITY)
    return ", ".join(told)


def _disk(case: Case) -> str:
    needed = {case.project.root: 1.0}
    for service in case.services:
        size_gb = 0 if service.model_file.exists() else service.model.size_gb or 0
        folder = _existing(service.models_folder)
        needed[folder] = needed.get(folder, 0) + size_gb
    if case.engine_answers and Path(root := case.told()["root"]).exists():
        needed[Path(root)] = 0 if all(map(case.docker.built, case.services)) else _BUILD_GB
    told = []
    for folder, wanted_gb in needed.items():
        free_gb = shutil.disk_usage(folder).free / _GB
        told.append(f"{folder} has {free_gb:.0f} GB free")
        if free_gb < wanted_gb:
            cause = f"{folder} has {free_gb:.1f} GB free, {wanted_gb:.1f} GB are needed."
            raise StackError(cause, "Free some, or set GLM_MODELS in .env.", Code.DISK)
    return ", ".join(told)


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def _memory(case: Case) -> str:
    fields = dict(line.split(":") for line in case.meminfo.read_text().splitlines() if line)
    free_mib = int(fields["MemAvailable"].split()[0]) >> 10
    caches = (int(s.environment.get("LLAMA_ARG_CACHE_RAM", 0)) for s in case.services)
    needed_mib = max(caches, default=0) + _SYSTEM_MIB
    if free_mib < needed_mib:
        cause = f"{free_mib:,} MiB of memory are available, a server wants {needed_mib:,}."
        raise Doubt(cause, "Close something, or lower LLAMA_ARG_CACHE_RAM.", Code.HOST)
    return f"{free_mib:,} MiB available"


def _ports(case: Case) -> str:
    told, runtimes = [], runtime.present(case.project) if case.engine_answers else []
    runtimes = runtimes or [runtime.native(case.project)]
    for service in case.services:
        ours = [s for _, s in runtime.servers_of(service, runtimes) if s.ended() is None]
        if service.port and not ours and (one := host.port_conflict(service.bind, service.port)):
            raise StackError(
                f"Port {service.port} of {service.quant} is taken by {one.holder}.",
                f"Stop it, or set GLM_{service.quant.upper()}_PORT in .env to another.",
                Code.PORT,
            )
        told.append(f"{service.port} {'serves' if ours else 'is free'}")
    return ", ".join(told)


def _engine(case: Case) -> str:
    chosen = case.docker if case.engine_answers else runtime.native(case.project)
    unbuilt = [service.quant for service in case.services if not chosen.built(service)]
    if unbuilt:
        cause = f"The pinned engine is not built ({chosen.name}) for {', '.join(unbuilt)}."
        raise Doubt(cause, f"uv run invoke build --quant {unbuilt[0]}", Code.BUILD)
    return f"b{case.project.engine.build} {case.project.engine.commit[:12]} ({chosen.name})"


def _clock(case: Case) -> str:
    newest = (case.project.root / "compose.yaml").stat().st_mtime
    if time.time() < newest:
        cause = f"The clock says {time.strftime('%Y-%m-%d %H:%M')}, before this tree was written."
        raise StackError(cause, "sudo timedatectl set-ntp true", Code.HOST)
    if not host.clock_synchronised():
        cause = "The kernel says that the clock is not synchronised."
        raise Doubt(cause, "sudo timedatectl set-ntp true", Code.HOST)
    return "synchronised"


def _libraries(case: Case) -> str:
    """CUDA's forward-compatibility libraries fail on GeForce cards (error 804)."""
    _ = case.on_gpu
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    compat = [f for f in folders if "compat" in Path(f).parts]
    if compat:
        cause = f"LD_LIBRARY_PATH has {compat[0]}, which hides the driver's own libcuda."
        raise StackError(cause, "Take it out of LD_LIBRARY_PATH.", Code.HOST)
    return "no forward-compatibility libraries in the way"


def _nvidia(buses: Path) -> bool:
    vendors = (path.read_text().strip() for path in buses.glob("*/vendor"))
    return "0x10de" in vendors


CHECKS: dict[str, Callable[[Case], str]] = {
    "settings": _settings,
    "key": _key,
    "docker": _docker,
    "docker-version": _docker_version,
    "compose": _compose,
    "buildx": _buildx,
    "gpu-in-container": _passthrough,
    "gpu": _gpu,
    "gpu-driver": _driver,
    "gpu-devices": _nodes,
    "gpu-libraries": _libraries,
    "gpu-xid": _xid,
    "container-toolkit": _toolkit,
    "cgroup-driver": _cgroups,
    "engine": _engine,
    "models": _models,
    "disk": _disk,
    "memory": _memory,
    "ports": _ports,
    "clock": _clock,
}
