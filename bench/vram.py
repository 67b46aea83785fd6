"""Measures what a service takes of its GPU, from before it starts to after it stopped.

All sizes are MiB: NVML's figure of the server's own process where the driver shows it, else the
GPU's difference to the baseline; `method` says which.
"""

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from stack import client, gguf_header, gpu, plan, runtime
from stack.config import Project, Service
from stack.errors import Code, StackError
from stack.runtime import Runtime
from stack.server import Server
from stack.wait import wait_until

T = TypeVar("T")

RELEASED_MIB = 256
RELEASE_LIMIT_S = 30
ANSWER_TOKENS = 128
PREFILL_LEFT = 64
"""Tokens of the context that the largest prompt leaves free."""


@dataclass(frozen=True)
class Vram:
    """One server's memory: planned, told by the engine, measured."""

    quant: str
    model: str
    stand_in: bool
    context: int
    slots: int
    method: str
    planned: dict[str, int]
    engine: dict[str, float]
    baseline_mib: int
    loaded_mib: int
    prefill_tokens: int
    prefill_s: float
    prefill_peak_mib: int
    load_clients: int
    load_peak_mib: int
    decode_tokens_s: float
    """One client, at an empty context."""
    released_mib: int
    released_s: float
    ready_s: float

    @property
    def planned_mib(self) -> int:
        """The plan's sum."""
        return sum(self.planned.values())

    @property
    def peak_mib(self) -> int:
        """The most it ever held."""
        return max(self.loaded_mib, self.prefill_peak_mib, self.load_peak_mib)

    @property
    def unexplained_mib(self) -> float:
        """What is measured beyond the engine's buffers: CUDA's context, kernels, cuBLAS."""
        told = (self.engine[key] for key in ("model_mib", "cache_mib", "compute_mib"))
        return self.loaded_mib - sum(told)


def measure(chosen: Runtime, project: Project, service: Service) -> Vram:
    """Start a service, load all its slots, fill its context once, and stop it again.

    Raises:
        StackError: where it does not start, fit, generate or give its memory back.

    """
    (device,) = gpu.require(service)
    ledger = plan.ledger(service, gguf_header.read(service.model_file))
    baseline = _used(device.uuid)
    with runtime.serving(chosen, project, service) as up:
        loaded_all = _used(device.uuid)
        own = gpu.used_by([each.pid for each in up.server.processes], device.uuid)
        loaded = loaded_all - baseline if own is None else own
        others = loaded_all - loaded
        # In this order: the slots share the context, and a full one leaves the others no room.
        load_peak, _ = _peak(device.uuid, lambda: _load(up.server))
        tokens = service.context - PREFILL_LEFT
        prefill_peak, filled = _peak(device.uuid, lambda: _fill(up.server, tokens))
    stopped = time.monotonic()
    released = wait_until(
        lambda: used if (used := _used(device.uuid)) <= baseline + RELEASED_MIB else None,
        timeout_s=RELEASE_LIMIT_S,
        what=f"GPU {device.uuid} has not its memory back",
    )
    return Vram(
        quant=service.quant,
        model=service.model_file.name,
        stand_in="stand-in" in service.model_file.name,
        context=service.context,
        slots=service.slots,
        method="difference" if own is None else "process",
        planned={key: value for key, value in vars(ledger).items() if key.endswith("_mib")},
        engine=asdict(up.allocation) if up.allocation else {},
        baseline_mib=baseline,
        loaded_mib=loaded,
        prefill_tokens=filled.prompt_tokens,
        prefill_s=filled.prompt_tokens / filled.prefill_tokens_s,
        prefill_peak_mib=prefill_peak - others,
        load_clients=service.slots,
        load_peak_mib=load_peak - others,
        decode_tokens_s=up.first.decode_tokens_s,
        released_mib=released - baseline,
        released_s=time.monotonic() - stopped,
        ready_s=up.ready_s,
    )


@dataclass(frozen=True)
class Together:
    """Several servers on one GPU at the same time."""

    planned: dict[str, int]
    baseline_mib: int
    loaded_mib: int
    """All of them, beyond the baseline."""


def together(chosen: Runtime, project: Project, services: Sequence[Service]) -> Together:
    """Start services one after another on their GPU, and stop them again. Raises as `measure`."""
    (device,) = gpu.require(services[0])
    headers = (gguf_header.read(service.model_file) for service in services)
    ledgers = map(plan.ledger, services, headers)
    baseline = _used(device.uuid)
    with contextlib.ExitStack() as running:
        for service in services:
            running.enter_context(runtime.serving(chosen, project, service))
        loaded = _used(device.uuid) - baseline
    return Together({each.service.quant: each.total_mib for each in ledgers}, baseline, loaded)


def _used(uuid: str) -> int:
    (used_mib,) = (each.used_mib for each in gpu.gpus() if each.uuid == uuid)
    return _known(used_mib)


def _known(used_mib: int | None) -> int:
    if used_mib is None:
        raise StackError(
            "NVML does not tell this GPU's memory in use.",
            "There is nothing to measure on such a driver.",
            Code.HOST,
        )
    return used_mib


def _peak(uuid: str, work: Callable[[], T]) -> tuple[int, T]:
    """Return the GPU's highest use while `work` ran, and what it returned."""
    with gpu.Sampler(uuid) as sampler:
        result = work()
    return _known(sampler.peak_mib), result


def _fill(server: Server, tokens: int) -> client.Completion:
    """Send one prompt of so many tokens, given as ids: no tokenizer stands between."""
    return client.complete(server, [_token(i) for i in range(tokens)], tokens=8, limit_s=900)


def _load(server: Server) -> None:
    """Keep every slot busy at once, with prompts that together leave half of the context free."""
    slots = server.service.slots
    length = min(2048, server.service.context // (2 * slots))
    prompts = [[_token(7 * slot + i) for i in range(length)] for slot in range(slots)]

    def ask(slot: int) -> client.Completion:
        return client.complete(server, prompts[slot], tokens=ANSWER_TOKENS, seed=slot)

    with concurrent.futures.ThreadPoolExecutor(slots) as clients:
        list(clients.map(ask, range(slots)))


def _token(number: int) -> int:
    """Return the id of a plain character, which every vocabulary of the family has."""
    return 32 + number % 64
