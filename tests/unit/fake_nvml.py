"""A strict stand-in for `pynvml`, with the real package's signatures, constants, structs, errors.

Each GPU is the answers in which it differs from an idle H200: a value, an error to raise, or a
function of the arguments after the handle. A function that has no answer here does not exist.
"""

import inspect
import sys
from functools import partial
from typing import Any

import pynvml
import pytest

LOST = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
UNKNOWN = pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
UNSUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
NO_DRIVER = pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


def memory(used_mib: int) -> Any:
    """Return what an H200 says of its memory."""
    total, used = 143771 << 20, used_mib << 20
    return pynvml.c_nvmlMemory_t(total=total, free=total - used, used=used)


def process(pid: int, used: int | None) -> Any:
    """Return a compute process that holds so many bytes."""
    found = pynvml.nvmlStructToFriendlyObject(pynvml.c_nvmlProcessInfo_v3_t(pid=pid))
    found.usedGpuMemory = used
    return found


H200 = {
    "nvmlDeviceGetName": "NVIDIA H200",
    "nvmlDeviceGetCudaComputeCapability": (9, 0),
    "nvmlDeviceGetMigMode": [0, 0],
    "nvmlDeviceGetComputeMode": pynvml.NVML_COMPUTEMODE_DEFAULT,
    "nvmlDeviceGetComputeRunningProcesses": [],
    "nvmlDeviceGetMemoryInfo": memory(600),
    "nvmlDeviceGetUtilizationRates": pynvml.c_nvmlUtilization_t(gpu=0, memory=0),
    "nvmlDeviceGetClockInfo": {pynvml.NVML_CLOCK_SM: 345, pynvml.NVML_CLOCK_MEM: 3201}.get,
    "nvmlDeviceGetPowerUsage": 76_500,
    "nvmlDeviceGetTotalEnergyConsumption": 1_234_500,
    "nvmlDeviceGetTemperature": {pynvml.NVML_TEMPERATURE_GPU: 31}.get,
    "nvmlDeviceGetCurrentClocksEventReasons": pynvml.nvmlClocksEventReasonGpuIdle,
}


class FakeNvml:
    """`pynvml` on a machine with these GPUs, `GPU-0` and so on; `machine` is its own answers."""

    def __init__(self, *gpus: dict[str, Any], **machine: Any) -> None:
        self.opened = 0
        self.gpus = [H200 | {"nvmlDeviceGetUUID": f"GPU-{i}"} | gpu for i, gpu in enumerate(gpus)]
        self.machine = {
            "nvmlInit": lambda: self._open(1),
            "nvmlShutdown": lambda: self._open(-1),
            "nvmlSystemGetDriverVersion": "580.159.04",
            "nvmlSystemGetCudaDriverVersion_v2": 13020,
            "nvmlDeviceGetCount": len(gpus),
            "nvmlDeviceGetHandleByIndex": self.gpus.__getitem__,
            "nvmlDeviceGetHandleByUUID": self._find,
        } | machine

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "FakeNvml":
        monkeypatch.setitem(sys.modules, "pynvml", self)
        return self

    def __getattr__(self, name: str) -> Any:
        if name in H200 or name == "nvmlDeviceGetUUID" or name in self.machine:
            return partial(self._call, name)
        if name.startswith(("nvmlDevice", "nvmlSystem")):
            raise AttributeError(name)
        return getattr(pynvml, name)

    def _call(self, name: str, *arguments: Any) -> Any:
        inspect.signature(getattr(pynvml, name)).bind(*arguments)
        if not self.opened and name != "nvmlInit":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        answers = self.machine
        if name not in answers:
            answers, arguments = arguments[0], arguments[1:]
        answer = answers[name]
        if isinstance(answer, Exception):
            raise answer
        return answer(*arguments) if callable(answer) else answer

    def _open(self, change: int) -> None:
        self.opened += change

    def _find(self, uuid: str) -> dict[str, Any]:
        found = [gpu for gpu in self.gpus if gpu["nvmlDeviceGetUUID"] == uuid]
        if not found:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return found[0]
