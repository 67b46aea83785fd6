"""What the engine itself can do, without a server: the ceiling that serving is held against.

`llama-batched-bench` and `llama-bench` of the same build run as the server would: the same model,
context, cache, batch, device and limits. They need the memory that the server needs, so they run
before it starts or after it stopped.

Like for like means the same prompt length P, the same output length N and the same number of
streams C. At each C the benchmark reads C prompts of P tokens in T_PP, then decodes N tokens of all
C streams side by side in T_TG, without sampling:

    decode ceiling  = C N / T_TG                 prefill ceiling = C P / T_PP
    whole ceiling   = C N / (T_PP + T_TG)        (output tokens over the whole time)

Served over ceiling, at C clients of a closed loop and S slots:

    whole   = (output tokens stamped in the window / its length) / whole ceiling
    decode  = min(C, S) x (tokens / time of one stream's gaps in the window) / decode ceiling

The first asks for all that serving costs: HTTP, tokenizer, templates, sampling, scheduling, slots
that wait. The second leaves out prompts and waiting: what one step costs, and how many share it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from stack.config import Service
from stack.errors import Code, StackError
from stack.runtime import Runtime

if TYPE_CHECKING:
    from bench.analysis import Point

REPEATS = 3
LIMIT_S = 900
MOST_STREAMS = 256  # sequences in one context, LLAMA_MAX_SEQ
# llama-bench alone reads no LLAMA_ARG_*.
_OPTIONS = {
    "LLAMA_ARG_MODEL": "--model",
    "LLAMA_ARG_BATCH": "--batch-size",
    "LLAMA_ARG_UBATCH": "--ubatch-size",
    "LLAMA_ARG_CACHE_TYPE_K": "--cache-type-k",
    "LLAMA_ARG_CACHE_TYPE_V": "--cache-type-v",
    "LLAMA_ARG_FLASH_ATTN": "--flash-attn",
    "LLAMA_ARG_THREADS": "--threads",
    "LLAMA_ARG_DEVICE": "--device",
    "LLAMA_ARG_N_GPU_LAYERS": "--n-gpu-layers",
}


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The engine's rates with so many streams, in tokens a second: medians of the repeats."""

    streams: int
    prefill_tokens_s: float
    decode_tokens_s: float
    whole_tokens_s: float
    """Output tokens over prefill and decode together."""

    def decode_share(self, slots: int | None, rate: float) -> float:
        """Return what so many clients are decoded at one stream's rate in `slots`, of that."""
        return min(self.streams, slots or self.streams) * rate / self.decode_tokens_s


@dataclass(frozen=True, kw_only=True)
class Single:
    """`llama-bench`'s rates of one stream, tokens a second, with their standard deviations."""

    prefill_tokens_s: float
    prefill_deviation: float
    decode_tokens_s: float
    decode_deviation: float


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The engine's own rates for one shape of request."""

    prompt_tokens: int
    output_tokens: int
    repeats: int
    single: Single
    streams: tuple[Streams, ...]
    """Those that fit in the context."""

    def at(self, streams: int) -> Streams | None:
        """Return the rates with so many streams; None where they did not fit or were not asked."""
        return next((each for each in self.streams if each.streams == streams), None)


@dataclass(frozen=True)
class Share:
    """What is served of the engine's ceiling; see the formulas above."""

    whole: float
    decode: float | None


def share(point: "Point", slots: int | None, top: Ceiling | None) -> Share | None:
    """Hold a run against the ceiling; None for an open loop, or where there is no such ceiling."""
    engine = top.at(point.clients) if top and point.rate is None else None
    if engine is None:
        return None
    rate = point.decode_tokens_s
    return Share(
        point.tokens_s / engine.whole_tokens_s,
        engine.decode_share(slots, rate) if rate else None,
    )


def measure(
    runtime: Runtime,
    service: Service,
    *,
    streams: Sequence[int],
    prompt_tokens: int,
    output_tokens: int,
    repeats: int = REPEATS,
    limit_s: float = LIMIT_S,
) -> Ceiling:
    """Run both benchmarks for prompts and outputs of these lengths; the server must not run.

    Each may take `limit_s`.

    Raises:
        StackError: LOAD when one fails, VERIFY when what it says cannot be read.

    """
    asked = sorted({each for each in streams if each <= MOST_STREAMS})
    batched = runtime.tool(
        service,
        "llama-batched-bench",
        *("-npp", str(prompt_tokens), "-ntg", ",".join([str(output_tokens)] * repeats)),
        *("-npl", ",".join(map(str, asked)), "--output-format", "jsonl"),
        timeout_s=limit_s,
    )
    single = runtime.tool(
        service,
        "llama-bench",
        *options(service.environment),
        *("--n-prompt", str(prompt_tokens), "--n-gen", str(output_tokens)),
        *("--repetitions", str(repeats), "--output", "json"),
        timeout_s=limit_s,
    )
    return Ceiling(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        repeats=repeats,
        single=parse_single(single.stdout),
        streams=parse_batched(batched.stdout),
    )


def options(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the server's settings as options of `llama-bench`."""
    for name, option in _OPTIONS.items():
        if name in environment:
            yield from (option, environment[name])


def parse_batched(stdout: str) -> tuple[Streams, ...]:
    """Read the JSON lines of `llama-batched-bench`. Raises StackError VERIFY."""
    try:
        rows = [json.loads(line) for line in stdout.splitlines() if line.strip()]
        counts = sorted({int(row["pl"]) for row in rows})
        return tuple(_streams(count, [r for r in rows if r["pl"] == count]) for count in counts)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _unreadable("llama-batched-bench", stdout) from error


def _streams(count: int, rows: Iterable[Mapping[str, Any]]) -> Streams:
    rates = [
        (
            count * row["pp"] / row["t_pp"],
            count * row["tg"] / row["t_tg"],
            count * row["tg"] / (row["t_pp"] + row["t_tg"]),
        )
        for row in rows
    ]
    prefill, decode, whole = map(median, zip(*rates, strict=True))
    return Streams(
        streams=count, prefill_tokens_s=prefill, decode_tokens_s=decode, whole_tokens_s=whole
    )


def parse_single(stdout: str) -> Single:
    """Read the JSON of `llama-bench`: one test of prefill, one of decode. Raises StackError."""
    try:
        prefill, decode = json.loads(stdout)
        if not (prefill["n_prompt"] and decode["n_gen"]):
            raise ValueError("the tests came in another order")
        return Single(
            prefill_tokens_s=float(prefill["avg_ts"]),
            prefill_deviation=float(prefill["stddev_ts"]),
            decode_tokens_s=float(decode["avg_ts"]),
            decode_deviation=float(decode["stddev_ts"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable("llama-bench", stdout) from error


def _unreadable(tool: str, stdout: str) -> StackError:
    return StackError(
        f"{tool} gave no figures that can be read: {stdout.strip()[:200] or 'nothing'!r}.",
        "The engine is another one than the pinned: `invoke build`.",
        Code.VERIFY,
    )
