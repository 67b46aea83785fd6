"""What llama-server will take of a GPU, before anything loads: the VRAM ledger.

The formulas are llama.cpp's for MLA (`deepseek2`) at the pinned commit, with all layers on the GPU
and flash attention; a test holds them against measured figures.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from stack.config import Service
from stack.errors import Code, StackError
from stack.gguf_header import TYPES, Header

MIB = 1 << 20
RESERVE_MIB = 1024
# CUDA's context and kernels, cuBLAS, pools: what a process held beyond the other three figures on
# an H200 with CUDA 13.0, the same (593 and 594) for Q4 and Q8. Another card or toolkit may differ.
RUNTIME_MIB = 594
CELLS = 256  # the engine pads each sequence's context to a multiple of it
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # on CUDA
CARDS_GB = (24, 32, 48, 80, 96, 141)
PRIVATE_SLOTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Ledger:
    """What a service takes of its GPU; ``sources`` says in words where each figure is from."""

    weights_mib: int
    cache_mib: int
    compute_mib: int
    runtime_mib: int
    sources: Mapping[str, str]
    service: Service = field(repr=False)
    header: Header = field(repr=False)

    @property
    def total_mib(self) -> int:
        """All of it, as NVML reports it for the process."""
        return self.weights_mib + self.cache_mib + self.compute_mib + self.runtime_mib


@dataclass(frozen=True)
class Capacity:
    """The largest context on a card, of each private slot or (slots 0) of a shared pool; or 0."""

    card_gb: int
    slots: int
    context: int


@dataclass(frozen=True)
class _Cache:
    context: int  # tokens of all slots
    slots: int
    streams: int  # 1 where the slots share the cache, else a slot each
    kind: str = "f16"
    ubatch: int = 512


def _cache(service: Service, slots: int) -> _Cache:
    env = service.environment
    kind, ubatch = env.get("LLAMA_ARG_CACHE_TYPE_K", "f16"), env.get("LLAMA_ARG_UBATCH", "512")
    return _Cache(service.cells, slots, slots if service.private else 1, kind, int(ubatch))


def _key(header: Header, name: str) -> int:
    value = header.keys.get(f"deepseek2.{name}")
    if not isinstance(value, int):
        cause = f"No VRAM plan is known for {header.name or 'the model'}: no key deepseek2.{name}."
        raise StackError(cause, "Choose a GGUF file of GLM-4.7-Flash.", Code.USAGE)
    return value


def _shares_mib(header: Header, cache: _Cache) -> tuple[int, int, int]:
    """Return weights, cache and compute buffer; the last is the peak of one ubatch's graph.

    Attention holds the KQ mask, f16, each stream's cells by its tokens (`build_attn_inp_kq_mask`);
    for each head and token, in f32, the query, its absorbed form, both joined, and the result; the
    residual, its norm and the query's latent (deepseek2.cpp); and, unless the cache is f16, an f16
    copy of a layer's cells (fattn-common.cuh; of f32, K and V apart, `build_attn_mha`). With an
    f16 cache that is what the engine's planner reserves for GLM-4.7-Flash, to 0.1 MiB: the experts'
    buffers are less and reuse it. Logits are f32, one row a slot (`server_output_limits`).
    """
    if cache.kind not in CACHE_TYPES:
        cause = f"No VRAM plan is known for a cache of type {cache.kind!r}."
        raise StackError(cause, f"Known types: {', '.join(CACHE_TYPES)}.", Code.USAGE)
    names = ("key_length", "key_length_mla", "kv_lora_rank", "q_lora_rank", "head_count")
    key, query, latent, q_latent, heads = (_key(header, f"attention.{name}") for name in names)
    weights = sum(header.tensors.values())
    if "output.weight" in header.tensors:  # else the GPU gets a copy of the embedding in its place
        weights -= header.tensors.get("token_embd.weight", 0)
    cells = _cells(cache)
    kind, all_cells = TYPES[cache.kind.upper()], cells * cache.streams
    row_bytes = key // kind.block_elements * kind.block_bytes  # MLA keeps no V
    tokens = min(cache.ubatch, all_cells)
    row = heads * (query + key + 2 * latent) + 2 * _key(header, "embedding_length") + q_latent
    copied = {"f16": 0, "f32": key + latent}.get(cache.kind, key)
    attention = 2 * cells * tokens + 4 * row * tokens + 2 * copied * all_cells
    logits = 4 * min(cache.slots, tokens) * _key(header, "vocab_size")
    cached = all_cells * row_bytes * _key(header, "block_count")
    return -(-weights // MIB), -(-cached // MIB), -(-max(attention, logits) // MIB)


def ledger(service: Service, header: Header) -> Ledger:
    """Add up a service; raises StackError USAGE for a model without MLA, or an unknown cache."""
    weights, cache, compute = _shares_mib(header, _cache(service, service.slots))
    sources = dict.fromkeys(("weights_mib", "cache_mib"), "from the GGUF header")
    sources |= dict.fromkeys(("compute_mib", "runtime_mib"), "estimated")
    return Ledger(weights, cache, compute, RUNTIME_MIB, sources, service, header)


def slot_context(service: Service) -> int:
    """Return the tokens that a slot can hold, as the engine rounds them up."""
    return _cells(_cache(service, service.slots))


def _cells(cache: _Cache) -> int:
    return -(-cache.context // cache.streams // CELLS) * CELLS  # of each stream


def check_context(service: Service, header: Header) -> None:
    """Raise StackError USAGE where a slot's context is above the model's, or not positive."""
    most = _key(header, "context_length") * _cache(service, service.slots).streams
    if not 0 < service.cells <= most:
        cause = f"{service.name} cannot have a context of {service.cells:,} tokens."
        raise StackError(cause, f"Set GLM_CONTEXT to at most {most}.", Code.USAGE)


def fits(needed: Ledger, free_mib: int) -> None:
    """Raise StackError VRAM, with the largest context that fits, where a ledger does not."""
    service, total_mib = needed.service, needed.total_mib
    if total_mib <= free_mib:
        return
    largest = largest_context(service, needed.header, free_mib, service.slots)
    remedy = f"With {service.slots} slots GLM_CONTEXT={largest} fits and leaves 1 GiB."
    remedy = remedy if largest else "No context fits: free memory there, or take a smaller quant."
    where = f"free on GPU {', '.join(service.gpus)}"
    cause = f"{service.name} needs {total_mib:,} MiB, {free_mib:,} MiB are {where}."
    raise StackError(cause, remedy, Code.VRAM)


def largest_context(service: Service, header: Header, free_mib: int, slots: int) -> int:
    """Return the largest setting, within the model's context, that leaves 1 GiB free, or 0."""
    return _largest(header, _cache(service, slots), free_mib)


def _largest(header: Header, cache: _Cache, free_mib: float) -> int:
    def total_mib(context: int) -> int:
        return RUNTIME_MIB + sum(_shares_mib(header, replace(cache, context=context)))

    step, most = CELLS * cache.streams, _key(header, "context_length") * cache.streams
    contexts = range(step, most + 1, step)
    count = bisect_right(contexts, free_mib - RESERVE_MIB, key=total_mib)
    return contexts[count - 1] if count else 0


def capacity(header: Header, cards_gb: Iterable[int] = CARDS_GB) -> tuple[Capacity, ...]:
    """Return what fits on empty cards, less 1 GiB, with an f16 cache, at the engine's defaults."""
    caches = {0: _Cache(0, 4, 1)} | {slots: _Cache(0, slots, slots) for slots in PRIVATE_SLOTS}
    return tuple(
        Capacity(gb, slots, _largest(header, cache, gb * 1e9 / MIB) // cache.streams)
        for gb in cards_gb
        for slots, cache in caches.items()
    )
