"""What NVIDIA's driver says of this machine's GPUs, through NVML. Nothing else talks to NVML.

A figure that NVML does not give is None, never 0.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from stack.errors import Code, StackError

if TYPE_CHECKING:
    from stack.config import Service  # it reads YAML, which costs more than all of this module

DRIVER_FOR = {11: 450, 12: 525, 13: 580}
"""CUDA's major version to the lowest driver branch: CUDA Compatibility, minor version table."""
_PATIENCE_S = 30  # a driver without persistence mode takes seconds to wake a GPU, a lost one hangs


@dataclass(frozen=True)
class Reading:
    """The moving figures of one GPU at one time."""

    time_s: float
    """On `time.monotonic`'s clock."""
    total_mib: int | None
    free_mib: int | None
    used_mib: int | None
    """Of the whole device, what the driver keeps for itself included: total less free."""
    utilisation_percent: int | None
    """Of the driver's last sample period, which is up to a second long."""
    sm_mhz: int | None
    memory_mhz: int | None
    power_w: float | None
    """Averaged over one second by the driver, on most cards."""
    temperature_c: int | None
    throttle: tuple[str, ...] | None
    """What slows the clocks down. Idleness and clocks that somebody chose do not count."""


@dataclass(frozen=True)
class Gpu:
    """One GPU. `architecture` is as CMake names it, for native code only: `120a-real`."""

    index: int
    uuid: str
    name: str
    architecture: str
    driver: str | None
    """`580.159.04`"""
    cuda: str | None
    """The CUDA version of the installed driver, not of any toolkit: `13.0`."""
    mig: bool | None
    compute_mode: str | None
    """`default`, `exclusive-process` or `prohibited`."""
    pids: tuple[int, ...]
    """Processes that hold compute contexts, as the host sees them; empty where it does not."""
    now: Reading

    @property
    def total_mib(self) -> int | None:
        """All of its memory."""
        return self.now.total_mib

    @property
    def free_mib(self) -> int | None:
        """What was free when it was read."""
        return self.now.free_mib

    @property
    def used_mib(self) -> int | None:
        """What was in use when it was read, by anyone."""
        return self.now.used_mib

    def __str__(self) -> str:
        """Name it as `require` lists it."""
        free = "" if self.free_mib is None else f" ({self.free_mib:,} MiB free)"
        return f"{self.index} {self.name} {self.uuid}{free}"


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this machine that answer; none where no driver does."""
    return _survey()[0]


def lost(gpu: str) -> str | None:
    """Say why a GPU that once was here, by index or UUID, answers no more; None while it does."""
    here, silent = _survey()
    if any(gpu in (str(each.index), each.uuid) for each in here):
        return None
    return f"GPU {gpu} was lost: {'; '.join(silent) or 'the driver does not list it'}."


def used_by(pids: Collection[int], uuid: str) -> int | None:
    """Return the MiB that exactly these processes hold on a GPU.

    None where the driver hides it: under WSL, from another pid namespace, or of a process without
    a compute context there.

    Raises:
        StackError: HOST, where the GPU was lost.

    """
    with _opened(uuid) as (nvml, handle):
        listed = _ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
    # A context takes memory: in a container some drivers say 0 where they mean "not yours to see".
    held = [process.usedGpuMemory for process in listed if process.pid in pids]
    return sum(held) >> 20 if held and all(held) else None


def driver_for(cuda: str) -> int:
    """Return the lowest driver branch that runs programs of a CUDA toolkit's version."""
    return DRIVER_FOR[int(cuda.partition(".")[0])]


def require(
    service: "Service", *, chosen: bool = True, toolkit: str | None = None
) -> tuple[Gpu, ...]:
    """Return the GPUs that a service asks for, after making sure that they can serve it.

    `chosen` says that the user named them; where more than one is present, a default is no choice.
    `toolkit` is the CUDA version that the engine is, or would be, built with: `13.0`.

    Raises:
        StackError: HOST, with what is there.

    """
    if not service.gpus:
        return ()
    here, silent = _survey()
    listed = ", ".join([*map(str, here), *silent]) or "no NVIDIA GPU"
    if len(here) > 1 and not chosen:
        raise StackError(
            f"{service.name} needs a choice of GPU; this machine has {listed}.",
            "Set GLM_GPU in .env to an index or, to be safe from renumbering, a UUID.",
            Code.HOST,
        )
    by_name = {name: gpu for gpu in here for name in (str(gpu.index), gpu.uuid)}
    for wanted in service.gpus:
        if wanted not in by_name:
            mend = "Install NVIDIA's driver, or reboot where it is installed but does not answer."
            raise StackError(
                f"{service.name} needs GPU {wanted}; this machine has {listed}.",
                f"{'Choose one with GLM_GPU in .env.' if here else mend} "
                "`invoke up --quant tiny` needs none.",
                Code.HOST,
            )
        _check(by_name[wanted], toolkit)
    return tuple(by_name[wanted] for wanted in service.gpus)


def _check(gpu: Gpu, toolkit: str | None) -> None:
    major = (gpu.driver or "").partition(".")[0]
    if toolkit and major.isdecimal() and int(major) < (lowest := driver_for(toolkit)):
        raise StackError(
            f"NVIDIA's driver {gpu.driver} < {lowest} required by CUDA {toolkit}.",
            f"Install driver {lowest} or later and reboot.",
            Code.HOST,
        )
    if gpu.mig:
        mode, mend = "MIG mode enabled", "-mig 0"
    elif gpu.compute_mode == "prohibited":
        mode, mend = "compute mode prohibited", "-c DEFAULT"
    elif gpu.compute_mode == "exclusive-process" and gpu.pids:
        mode, mend = f"compute mode exclusive-process, held by pid {gpu.pids[0]}", "-c DEFAULT"
    else:
        return
    raise StackError(
        f"GPU {gpu.index} {gpu.name} has {mode}.",
        f"`sudo nvidia-smi -i {gpu.index} {mend}`, or choose another with GLM_GPU in .env.",
        Code.HOST,
    )


class Sampler:
    """Samples one GPU in a thread while its block runs, and keeps the readings afterwards.

    The first reading comes before the block, the last one after it. Readings keep to a schedule
    counted from the first; one that takes too long costs those that it overlaps, and no more.

    Raises:
        StackError: HOST, on entering or leaving the block, where the GPU was lost.

    """

    def __init__(self, uuid: str, *, hertz: float = 20) -> None:
        """Prepare to sample; nothing is asked of the driver yet."""
        self._uuid = uuid
        self._period_s = 1 / hertz
        self._readings: list[Reading] = []
        self._failure: StackError | None = None
        self._begun, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._sample, name=f"nvml {uuid}", daemon=True)

    @property
    def readings(self) -> tuple[Reading, ...]:
        """Everything read so far, oldest first."""
        return tuple(self._readings)

    @property
    def peak_mib(self) -> int | None:
        """The highest `used_mib` so far."""
        known = (each.used_mib for each in self.readings if each.used_mib is not None)
        return max(known, default=None)

    @property
    def start_s(self) -> float:
        """When the first reading began, on `time.monotonic`'s clock."""
        return self._readings[0].time_s

    @property
    def end_s(self) -> float:
        """When the last reading began."""
        return self._readings[-1].time_s

    def __enter__(self) -> Self:
        """Start, and wait for the first reading."""
        self._thread.start()
        if not self._begun.wait(_PATIENCE_S) or self._failure:
            self._ending.set()
            raise self._failure or _gone(self._uuid, "NVML does not answer")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Take the last reading and stop; an interrupt is not replaced by a failure."""
        self._ending.set()
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            self._failure = _gone(self._uuid, "NVML does not answer")
        if self._failure and (kind is None or issubclass(kind, Exception)):
            raise self._failure

    def _sample(self) -> None:
        try:
            with _opened(self._uuid) as (nvml, handle):
                start_s, more = time.monotonic(), True
                while more:
                    more = not self._ending.is_set()
                    self._readings.append(_read(nvml, handle))
                    self._begun.set()
                    now_s = time.monotonic()
                    self._ending.wait(_due(start_s, now_s, self._period_s) - now_s)
        except StackError as error:
            self._failure = error
        finally:
            self._begun.set()


def _due(start_s: float, now_s: float, period_s: float) -> float:
    """Return the next time after `now_s` on the schedule."""
    return start_s + (int((now_s - start_s) / period_s) + 1) * period_s


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    import pynvml  # noqa: PLC0415  # most calls on machines without a GPU never need it

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):  # a lost GPU must not hide behind this
            pynvml.nvmlShutdown()


@contextlib.contextmanager
def _opened(uuid: str) -> Iterator[tuple[Any, Any]]:
    import pynvml  # noqa: PLC0415

    try:
        with _nvml() as nvml:
            yield nvml, _handle(nvml, uuid)
    except pynvml.NVMLError as error:
        raise _gone(uuid, error) from error


def _gone(uuid: str, why: object) -> StackError:
    return StackError(
        f"GPU {uuid} was lost: {why}.",
        "`sudo dmesg | grep -i xid` says more; reset the GPU or reboot.",
        Code.HOST,
    )


def _handle(nvml: Any, uuid: str) -> Any:
    """Find a GPU by its index: NVML's own search by UUID fails where any other GPU is lost."""
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
    """Return the GPUs that answer, and what is to be said of those that do not."""
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
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    cuda = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
    mig = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
    modes = {
        nvml.NVML_COMPUTEMODE_DEFAULT: "default",
        nvml.NVML_COMPUTEMODE_PROHIBITED: "prohibited",
        nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: "exclusive-process",
    }
    processes = _ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
    return Gpu(
        index=index,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        architecture=f"{major}{minor}{'a' if major >= 9 else ''}-real",  # noqa: PLR2004
        driver=_ask(nvml, nvml.nvmlSystemGetDriverVersion),
        cuda=cuda and f"{cuda // 1000}.{cuda % 1000 // 10}",
        mig=mig and mig[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        compute_mode=modes.get(_ask(nvml, nvml.nvmlDeviceGetComputeMode, handle)),
        pids=tuple(process.pid for process in processes),
        now=_read(nvml, handle),
    )


def _read(nvml: Any, handle: Any) -> Reading:
    time_s = time.monotonic()
    # A GPU that cannot say how full it is has gone; UMA ones (GB10) are the exception.
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, absent=nvml.NVMLError_NotSupported)
    load = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    power_mw = _ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    bits = _ask(nvml, nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    words = {
        nvml.nvmlClocksEventReasonSwPowerCap: "sw power cap",
        nvml.nvmlClocksEventReasonHwSlowdown: "hw slowdown",
        nvml.nvmlClocksEventReasonSwThermalSlowdown: "sw thermal slowdown",
        nvml.nvmlClocksEventReasonHwThermalSlowdown: "hw thermal slowdown",
        nvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "hw power brake",
    }
    return Reading(
        time_s=time_s,
        total_mib=memory and memory.total >> 20,
        free_mib=memory and memory.free >> 20,
        used_mib=memory and memory.used >> 20,
        utilisation_percent=load and load.gpu,
        sm_mhz=_ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        memory_mhz=_ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
        power_w=None if power_mw is None else power_mw / 1000,
        temperature_c=_ask(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        throttle=None if bits is None else tuple(w for bit, w in words.items() if bits & bit),
    )


def _ask(nvml: Any, call: Callable[..., Any], *args: Any, absent: Any = None) -> Any:
    """Return NVML's answer, or None where it has none: any error but of a lost GPU, or `absent`."""
    try:
        answer = call(*args)
    except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_ResetRequired):
        raise
    except absent or nvml.NVMLError:
        return None
    unknown = (nvml.NVML_VALUE_NOT_AVAILABLE_uint, nvml.NVML_VALUE_NOT_AVAILABLE_ulonglong)
    return None if answer in [value.value for value in unknown] else answer
