"""What the engine's log says of where the model went."""

import re
from dataclasses import dataclass

_BUFFER = re.compile(r" (\w+) (model|KV|compute) buffer size = +([\d.]+) MiB")
_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")


@dataclass(frozen=True)
class Allocation:
    """What the engine allocated on the GPU, in MiB, and how many of the layers are there."""

    model_mib: float
    cache_mib: float
    compute_mib: float
    layers: int
    layers_total: int


def allocation(log: str) -> Allocation:
    """Read a load from a log (verbosity 4). What it does not mention is 0: it is on the CPU."""
    last = {(device, kind): float(size) for device, kind, size in _BUFFER.findall(log)}
    on_gpu = {"model": 0.0, "KV": 0.0, "compute": 0.0}
    for (device, kind), size in last.items():
        on_gpu[kind] += size if re.fullmatch(r"CUDA\d+", device) else 0
    layers, total = (_OFFLOADED.findall(log) or [("0", "0")])[-1]
    return Allocation(on_gpu["model"], on_gpu["KV"], on_gpu["compute"], int(layers), int(total))
