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
    from stack.config import Service  # imports YAML, which takes longer than all this

_PATIENCE_S = 30  # waking a GPU takes seconds without persistence mode; a lost one may never answer
_MODES = {2: "prohibited", 3: "exclusive-process"}  # of nvmlComputeMode_t; 0 is the default
_SLOWED = {  # idleness and clocks that somebody set are not in it
    "sw power cap": "nvmlClocksEventReasonSwPowerCap",
    "hw slowdown": "nvmlClocksEventReasonHwSlowdown",
    "sw thermal slowdown": "nvmlClocksEventReasonSwThermalSlowdown",
    "hw thermal slowdown": "nvmlClocksEventReasonHwThermalSlowdown",
    "hw power brake": "nvmlClocksEventReasonHwPowerBrakeSlowdown",
}
_unfit = partial(StackError, code=Code.HOST)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The moving figures of a GPU at `time_s` of `time.monotonic`; used is total less free."""

    time_s: float
    total_mib: int | None
    free_mib: int | None
    used_mib: int | None
    utilisation_percent: int | None
    sm_mhz: int | None
    memory_mhz: int | None
    power_w: float | None
    energy_j: float | None
    """Counted since the driver was loaded; differences of it are what was used."""
    temperature_c: int | None
    throttle: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class Gpu(Reading):
    """One GPU. `architecture` is as CMake names it, for native code only: `120a-real`.

    `cuda` is the driver's version, not a toolkit's. `mode` limits who can use it: `MIG`,
    `prohibited` or `exclusive-process`. `pids`, the host's, have compute contexts where we see any.
    """

    index: int
    uuid: str
    name: str
    architecture: str
    driver: str | None
    cuda: str | None
    mode: str | None
    pids: tuple[int, ...]


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this machine that answer; none where no driver does."""
    return _survey()[0]


def of(service: "Service") -> tuple[Gpu, ...]:
    """Return those of the service's GPUs that answer, fit to serve it or not."""
    return tuple(each for each in gpus() if {str(each.index), each.uuid} & {*service.gpus})


def architectures() -> str:
    """Return what to compile for, so that every GPU of this machine has native code.

    Raises:
        StackError: HOST, where there is none.

    """
    here, listed = _survey()
    if not here:
        cause = f"There is no GPU to compile for: this machine has {listed}."
        raise _unfit(cause, "Name the architecture, as --arch 120a-real.")
    return ";".join(sorted({each.architecture for each in here}))


def lost(gpu: str) -> str | None:
    """Say why a GPU that was here, by index or UUID, is gone; None while it answers."""
    here, listed = _survey()
    known = any(gpu in (str(each.index), each.uuid) for each in here)
    return None if known else f"GPU {gpu} was lost: this machine has {listed}."


def used_by(pids: Collection[int], uuid: str) -> int | None:
    """Return the MiB of a GPU that exactly these processes hold.

    None where the driver hides it (WSL, other pid namespaces) or lists none of them.

    Raises:
        StackError: HOST, where the GPU was lost.

    """
    with _opened(uuid) as (nvml, handle):
        listed = _ask(nvml, "nvmlDeviceGetComputeRunningProcesses", handle) or ()
    # Every context takes memory: the 0 that some containers see is a hidden figure.
    held = [process.usedGpuMemory for process in listed if process.pid in pids]
    return sum(held) >> 20 if held and all(held) else None


def driver_for(cuda: str) -> int:
    """Return the lowest driver branch for a CUDA toolkit (CUDA Compatibility, minor versions)."""
    return {11: 450, 12: 525, 13: 580}[int(cuda.partition(".")[0])]


def require(service: "Service", *, chosen: bool = True, toolkit: str = "") -> tuple[Gpu, ...]:
    """Return the GPUs that a service asks for, able to serve it.

    `chosen`: a user named them, as several GPUs call for. `toolkit`: the CUDA version, say 13.0,
    of an engine that the driver must suit.

    Raises:
        StackError: HOST, with what is there.

    """
    here, listed = _survey() if service.gpus else ((), "")
    choose = "Choose one with GLM_GPU in .env, by index or UUID."
    if len(here) > 1 and not chosen:
        raise _unfit(f"{service.name} needs a choice of GPU; this machine has {listed}.", choose)
    by_name = {name: gpu for gpu in here for name in (str(gpu.index), gpu.uuid)}
    for wanted in service.gpus:
        if not (gpu := by_name.get(wanted)):
            mend = choose if here else "Install NVIDIA's driver, or reboot if it is installed."
            cause = f"{service.name} needs GPU {wanted}; this machine has {listed}."
            raise _unfit(cause, f"{mend} `invoke up --quant tiny` needs none.")
        if toolkit and gpu.driver and int(gpu.driver.partition(".")[0]) < driver_for(toolkit):
            needs = f"< {driver_for(toolkit)} required by CUDA {toolkit}"
            raise _unfit(f"NVIDIA's driver {gpu.driver} {needs}.", "Update it and reboot.")
        if gpu.mode and (gpu.pids or gpu.mode != "exclusive-process"):
            switch = "-mig 0" if gpu.mode == "MIG" else "-c DEFAULT"
            held = f", held by process {gpu.pids[0]}" if gpu.pids else ""
            cause = f"GPU {wanted} is in {gpu.mode} mode{held}."
            raise _unfit(cause, f"Run `sudo nvidia-smi -i {wanted} {switch}`.")
    return tuple(by_name[wanted] for wanted in service.gpus)


class Sampler:
    """Samples one GPU in a thread, from just before its block to just after.

    `readings` keep to a schedule counted from `start_s`; a slow one costs only those due meanwhile.
    A lost GPU raises StackError, HOST, where the block begins or ends.
    """

    def __init__(self, uuid: str, *, hertz: float = 20) -> None:
        """Ask nothing of the driver yet."""
        self.readings: tuple[Reading, ...] = ()
        self.start_s = self.end_s = 0.0
        self._uuid, self._period_s = uuid, 1 / hertz
        self._failure: StackError | None = _gone(uuid, "NVML does not answer")
        self._begun, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def peak_mib(self) -> int | None:
        """The highest `used_mib` so far."""
        return max((r.used_mib for r in self.readings if r.used_mib is not None), default=None)

    def __enter__(self) -> Self:
        """Wait for the first reading."""
        self._thread.start()
        self._begun.wait(_PATIENCE_S)
        if self._failure and not self.readings:
            self._ending.set()
            raise self._failure
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last reading; no failure to get it replaces an interrupt."""
        self._ending.set()
        self._thread.join(_PATIENCE_S)
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
                    late_s = (time.monotonic() - self.start_s) % self._period_s
                    self._ending.wait(self._period_s - late_s)
            self._failure = None
        except StackError as error:
            self._failure = error
        finally:
            self._begun.set()


def _gone(uuid: str, why: object) -> StackError:
    return _unfit(f"GPU {uuid} was lost: {why}.", "See `sudo dmesg | grep Xid`; reset or reboot.")


@contextlib.contextmanager
def _opened(uuid: str) -> Iterator[tuple[Any, Any]]:
    """Yield NVML and the GPU's handle, or None for a handle where no GPU is named."""
    import pynvml  # noqa: PLC0415  # most calls on machines without a GPU never need it

    try:
        pynvml.nvmlInit()
        try:
            yield pynvml, uuid and pynvml.nvmlDeviceGetHandleByUUID(uuid)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise _gone(uuid, error) from error


def _survey() -> tuple[tuple[Gpu, ...], str]:
    """Return the GPUs that answer, and in words all that are there."""
    here, words = [], []
    try:
        with _opened("") as (nvml, _):
            for index in range(nvml.nvmlDeviceGetCount()):
                try:
                    here.append(gpu := _gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index), index))
                    free = "unknown" if gpu.free_mib is None else f"{gpu.free_mib:,}"
                    words.append(f"{index} {gpu.name} {gpu.uuid} ({free} MiB free)")
                except nvml.NVMLError as error:
                    words.append(f"{index}, which does not answer ({error})")
    except StackError as error:
        words.append(f"no NVIDIA GPU that answers ({error.__cause__})")
    return tuple(here), ", ".join(words) or "no NVIDIA GPU"


def _gpu(nvml: Any, handle: Any, index: int) -> Gpu:
    ask = partial(_ask, nvml)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    cuda = ask("nvmlSystemGetCudaDriverVersion_v2")
    mig = ask("nvmlDeviceGetMigMode", handle)  # [now, after a reset]
    return Gpu(
        **vars(_read(nvml, handle)),
        index=index,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        architecture=f"{major}{minor}{'a' if major >= 9 else ''}-real",  # noqa: PLR2004
        driver=ask("nvmlSystemGetDriverVersion"),
        cuda=cuda and f"{cuda // 1000}.{cuda % 1000 // 10}",
        mode="MIG" if mig and mig[0] else _MODES.get(ask("nvmlDeviceGetComputeMode", handle)),
        pids=tuple(p.pid for p in ask("nvmlDeviceGetComputeRunningProcesses", handle) or ()),
    )


def _read(nvml: Any, handle: Any) -> Reading:
    time_s, ask = time.monotonic(), partial(_ask, nvml)
    memory = ask("nvmlDeviceGetMemoryInfo", handle)
    load = ask("nvmlDeviceGetUtilizationRates", handle)
    power_mw = ask("nvmlDeviceGetPowerUsage", handle)
    energy_mj = ask("nvmlDeviceGetTotalEnergyConsumption", handle)
    bits = ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
    slowed = (word for word, name in _SLOWED.items() if bits & getattr(nvml, name))
    return Reading(
        time_s=time_s,
        total_mib=memory and memory.total >> 20,
        free_mib=memory and memory.free >> 20,
        used_mib=memory and memory.used >> 20,
        utilisation_percent=load and load.gpu,
        sm_mhz=ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
        memory_mhz=ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
        power_w=power_mw and power_mw / 1000,
        energy_j=energy_mj and energy_mj / 1000,
        temperature_c=ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
        throttle=None if bits is None else tuple(slowed),
    )


def _ask(nvml: Any, call: str, *arguments: Any) -> Any:
    """Return NVML's answer, None where it has none; raise where that means a lost GPU."""
    try:
        answer = getattr(nvml, call)(*arguments)
    except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_ResetRequired, nvml.NVMLError_Unknown):
        raise
    except nvml.NVMLError:
        return None
    return None if answer in (2**32 - 1, 2**64 - 1) else answer  # NVML_VALUE_NOT_AVAILABLE_…
