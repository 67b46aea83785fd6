"""What NVIDIA's driver says of this machine's GPUs, through NVML; a figure it lacks is None."""

import contextlib
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from stack.errors import Code, StackError

if TYPE_CHECKING:
    from stack.config import Service  # reads YAML, which takes longer to import than all this

# The lowest driver branch by CUDA's major version: CUDA Compatibility, minor version table.
_DRIVERS = {11: 450, 12: 525, 13: 580}
_NOT_AVAILABLE = (2**32 - 1, 2**64 - 1)  # NVML_VALUE_NOT_AVAILABLE_uint, _ulonglong
_PATIENCE_S = 30  # a driver without persistence mode takes seconds to wake a GPU, a lost one hangs
_SLOWED = {  # the nvmlClocksEventReason… that cost performance and that nobody chose
    "SwPowerCap": "sw power cap",
    "HwSlowdown": "hw slowdown",
    "SwThermalSlowdown": "sw thermal slowdown",
    "HwThermalSlowdown": "hw thermal slowdown",
    "HwPowerBrakeSlowdown": "hw power brake",
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The moving figures of one GPU, of all its users. `time_s` is on `time.monotonic`'s clock."""

    time_s: float
    total_mib: int | None
    free_mib: int | None
    used_mib: int | None
    """Total less free: what the driver keeps for itself is in it."""
    utilisation_percent: int | None
    sm_mhz: int | None
    memory_mhz: int | None
    power_w: float | None
    temperature_c: int | None
    throttle: tuple[str, ...] | None
    """What slows the clocks: power and heat, not idleness nor clocks that somebody set."""


@dataclass(frozen=True, kw_only=True)
class Gpu(Reading):
    """One GPU. `architecture` is as CMake names it, for native code only: `120a-real`."""

    index: int
    uuid: str
    name: str
    architecture: str
    driver: str | None
    cuda: str | None
    """The version of the driver, not of a toolkit: `13.0`."""
    mig: bool | None
    compute_mode: str | None
    """`default`, `exclusive-process` or `prohibited`."""
    pids: tuple[int, ...]
    """Processes that hold compute contexts, as the host sees them; empty where that is hidden."""

    def __str__(self) -> str:
        """Name it for a user to choose from."""
        free = "" if self.free_mib is None else f" ({self.free_mib:,} MiB free)"
        return f"{self.index} {self.name} {self.uuid}{free}"


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this machine that answer; none where no driver does."""
    return _survey()[0]


def lost(gpu: str) -> str | None:
    """Say why a GPU that was here, by index or UUID, no longer answers; None while it does."""
    here, silent = _survey()
    if any(gpu in (str(each.index), each.uuid) for each in here):
        return None
    return f"GPU {gpu} was lost: {'; '.join(silent) or 'the driver does not list it'}."


def used_by(pids: Collection[int], uuid: str) -> int | None:
    """Return the MiB that exactly these processes hold on a GPU.

    None where the driver hides it (WSL, other pid namespaces), or lists none of them there.

    Raises:
        StackError: HOST, where the GPU was lost.

    """
    with _opened(uuid) as (nvml, handle):
        listed = _ask(nvml, "nvmlDeviceGetComputeRunningProcesses", handle) or ()
    # Every context takes memory: a 0, seen in containers, means that the figure is hidden.
    held = [process.usedGpuMemory for process in listed if process.pid in pids]
    return sum(held) >> 20 if held and all(held) else None


def driver_for(cuda: str) -> int:
    """Return the lowest driver branch that runs what a CUDA toolkit, say 13.0, builds."""
    return max(low for major, low in _DRIVERS.items() if major <= int(cuda.partition(".")[0]))


def require(
    service: "Service", *, chosen: bool = True, toolkit: str | None = None
) -> tuple[Gpu, ...]:
    """Return the GPUs that a service asks for, and make sure that they can serve it.

    `chosen`: whether a user named them, which a machine with several GPUs takes. `toolkit`: the
    CUDA version of the engine's build, if the driver must suit it.

    Raises:
        StackError: HOST, with what is there.

    """
    if not service.gpus:
        return ()
    here, silent = _survey()
    listed = ", ".join([*map(str, here), *silent]) or "no NVIDIA GPU"
    by_name = {name: gpu for gpu in here for name in (str(gpu.index), gpu.uuid)}
    choose = "Choose one with GLM_GPU in .env, by index or UUID."
    if len(here) > 1 and not chosen:
        cause = f"{service.name} runs on one GPU, and none is chosen; this machine has {listed}."
        raise StackError(cause, choose, Code.HOST)
    for wanted in service.gpus:
        if wanted not in by_name:
            mend = choose if here else "Install NVIDIA's driver, or reboot if it is installed."
            raise StackError(
                f"{service.name} needs GPU {wanted}; this machine has {listed}.",
                f"{mend} `invoke up --quant tiny` needs none.",
                Code.HOST,
            )
        _check(by_name[wanted], toolkit)
    return tuple(by_name[wanted] for wanted in service.gpus)


def _check(gpu: Gpu, toolkit: str | None) -> None:
    branch = (gpu.driver or "").partition(".")[0]
    if toolkit and branch.isdecimal() and int(branch) < (low := driver_for(toolkit)):
        cause = f"NVIDIA's driver {gpu.driver} < {low} required by CUDA {toolkit}."
        raise StackError(cause, f"Install driver {low} or later and reboot.", Code.HOST)
    taken = gpu.compute_mode == "exclusive-process" and gpu.pids
    if gpu.mig or taken or gpu.compute_mode == "prohibited":
        mode = "MIG enabled" if gpu.mig else f"compute mode {gpu.compute_mode}"
        raise StackError(
            f"GPU {gpu} has {mode}{f' and is held by pid {gpu.pids[0]}' if taken else ''}.",
            f"`sudo nvidia-smi -i {gpu.index} {'-mig 0' if gpu.mig else '-c DEFAULT'}` ends that.",
            Code.HOST,
        )


class Sampler:
    """Samples one GPU in a thread while its block runs: first just before it, last just after.

    `readings` keep to a schedule counted from `start_s`; one that takes long costs only those due
    meanwhile. `start_s` and `end_s`, the first's and the last's time, are on `time.monotonic`'s.

    Raises:
        StackError: HOST, on entering or leaving the block, where the GPU was lost.

    """

    def __init__(self, uuid: str, *, hertz: float = 20) -> None:
        """Ask nothing of the driver yet."""
        self._uuid, self._period_s = uuid, 1 / hertz
        self.readings: tuple[Reading, ...] = ()
        self.start_s = self.end_s = 0.0
        self._failure: StackError | None = None
        self._begun, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def peak_mib(self) -> int | None:
        """The highest `used_mib` so far."""
        return max((r.used_mib for r in self.readings if r.used_mib is not None), default=None)

    def __enter__(self) -> Self:
        """Wait for the first reading."""
        self._thread.start()
        if not self._begun.wait(_PATIENCE_S) or self._failure:
            self._ending.set()
            raise self._failure or _gone(self._uuid, "NVML does not answer")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last reading; an interrupt is not replaced by a failure to get it."""
        self._ending.set()
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            self._failure = _gone(self._uuid, "NVML does not answer")
        if self._failure and (kind is None or issubclass(kind, Exception)):
            raise self._failure

    def _sample(self) -> None:
        try:
            with _opened(self._uuid) as (nvml, handle):
                more = True
                while more:
                    more = not self._ending.is_set()
                    self.readings += (_read(nvml, handle),)
                    self.start_s, self.end_s = (self.readings[i].time_s for i in (0, -1))
                    self._begun.set()
                    now_s = time.monotonic()
                    self._ending.wait(_due(self.start_s, now_s, self._period_s) - now_s)
        except StackError as error:
            self._failure = error
        finally:
            self._begun.set()


def _due(start_s: float, now_s: float, period_s: float) -> float:
    """Return the next time after `now_s` on the schedule."""
    return start_s + (int((now_s - start_s) / period_s) + 1) * period_s


def _gone(uuid: str, why: object) -> StackError:
    remedy = "`sudo dmesg | grep -i xid` says more; reset the GPU or reboot."
    return StackError(f"GPU {uuid} was lost: {why}.", remedy, Code.HOST)


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    import pynvml  # noqa: PLC0415  # most calls on machines without a GPU never need it

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):  # else it would hide how a GPU was lost
            pynvml.nvmlShutdown()


@contextlib.contextmanager
def _opened(uuid: str) -> Iterator[tuple[Any, Any]]:
    import pynvml  # noqa: PLC0415

    try:
        with _nvml() as nvml:
            yield nvml, _handle(nvml, uuid)
    except pynvml.NVMLError as error:
        raise _gone(uuid, error) from error


def _handle(nvml: Any, uuid: str) -> Any:
    """Find a GPU by index, since NVML's search by UUID may fail where any other one is lost."""
    trouble = nvml.NVMLError(nvml.NVML_ERROR_NOT_FOUND)
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            if nvml.nvmlDeviceGetUUID(handle) == uuid:
                return handle
        except nvml.NVMLError as error:
            trouble = error
    raise trouble


def _survey() -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """Return the GPUs that answer, and words for what does not."""
    import pynvml  # noqa: PLC0415

    here, silent = [], []
    try:
        with _nvml() as nvml:
            for index in range(nvml.nvmlDeviceGetCount()):
                try:
                    here.append(_gpu(nvml, index))
                except nvml.NVMLError as error:
                    silent.append(f"{index}, which does not answer ({error})")
    except pynvml.NVMLError as error:
        silent.append(f"no NVIDIA GPU that answers ({error})")
    return tuple(here), tuple(silent)


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    ask = partial(_ask, nvml)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    cuda = ask("nvmlSystemGetCudaDriverVersion_v2")
    mig = ask("nvmlDeviceGetMigMode", handle)
    modes = {
        nvml.NVML_COMPUTEMODE_DEFAULT: "default",
        nvml.NVML_COMPUTEMODE_PROHIBITED: "prohibited",
        nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: "exclusive-process",
    }
    return Gpu(
        **vars(_read(nvml, handle)),
        index=index,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        architecture=f"{major}{minor}{'a' if major >= 9 else ''}-real",  # noqa: PLR2004
        driver=ask("nvmlSystemGetDriverVersion"),
        cuda=cuda and f"{cuda // 1000}.{cuda % 1000 // 10}",
        mig=mig and mig[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        compute_mode=modes.get(ask("nvmlDeviceGetComputeMode", handle)),
        pids=tuple(p.pid for p in ask("nvmlDeviceGetComputeRunningProcesses", handle) or ()),
    )


def _read(nvml: Any, handle: Any) -> Reading:
    time_s, ask = time.monotonic(), partial(_ask, nvml)
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:  # memory shared with the host; any other error is a loss
        memory = None
    load = ask("nvmlDeviceGetUtilizationRates", handle)
    power_mw = ask("nvmlDeviceGetPowerUsage", handle)
    bits = ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
    slowed = {getattr(nvml, f"nvmlClocksEventReason{end}"): word for end, word in _SLOWED.items()}
    return Reading(
        time_s=time_s,
        total_mib=memory and memory.total >> 20,
        free_mib=memory and memory.free >> 20,
        used_mib=memory and memory.used >> 20,
        utilisation_percent=load and load.gpu,
        sm_mhz=ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
        memory_mhz=ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
        power_w=None if power_mw is None else power_mw / 1000,
        temperature_c=ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
        throttle=None if bits is None else tuple(w for bit, w in slowed.items() if bits & bit),
    )


def _ask(nvml: Any, call: str, *arguments: Any) -> Any:
    """Return NVML's answer, or None where it has none; only the loss of a GPU raises."""
    try:
        answer = getattr(nvml, call)(*arguments)
    except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_ResetRequired):
        raise
    except nvml.NVMLError:
        return None
    return None if answer in _NOT_AVAILABLE else answer
