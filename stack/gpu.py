"""What NVIDIA's driver says of this machine's GPUs, through NVML."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stack.config import Service
from stack.errors import Code, StackError


@dataclass(frozen=True)
class Gpu:
    """One GPU. `architecture` is as CMake names it, for native code only: `120a-real`."""

    index: int
    uuid: str
    name: str
    architecture: str
    total_mib: int
    free_mib: int
    pids: tuple[int, ...]
    """Processes that hold compute contexts, as the host sees them."""


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this machine; none where no driver answers."""
    with _nvml() as nvml:
        if nvml is None:
            return ()
        return tuple(_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    import pynvml  # noqa: PLC0415  # most calls on machines without a GPU never need it

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        index=index,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        architecture=f"{major}{minor}{'a' if major >= 9 else ''}-real",  # noqa: PLR2004
        total_mib=memory.total >> 20,
        free_mib=memory.free >> 20,
        pids=tuple(p.pid for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
    )


def require(service: Service) -> None:
    """Make sure that the GPUs a service asks for are in this machine.

    Raises:
        StackError: HOST, with what is there.

    """
    here = gpus()
    for wanted in service.gpus:
        if not any(wanted in (str(gpu.index), gpu.uuid) for gpu in here):
            listed = ", ".join(f"{gpu.index} {gpu.name} {gpu.uuid}" for gpu in here)
            mend = "Choose one with GLM_GPU in .env." if here else "Install NVIDIA's driver."
            raise StackError(
                f"{service.name} needs GPU {wanted}; this machine has {listed or 'no NVIDIA GPU'}.",
                f"{mend} `invoke up --quant tiny` needs none.",
                Code.HOST,
            )
