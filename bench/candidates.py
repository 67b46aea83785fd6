"""The candidates of a tune, what was measured of each, and which is the best. Pure.

A candidate's score is the geometric mean, over the numbers of clients, of output tokens a second;
with an SLO times the share of answers that met it (a half more of one more, so that of few none
that met it are not nothing). Of several runs at one load each weighs as its window
is long. What fails at any load, by a crash, for lack of memory or in one request, has no score.

What is chosen untuned stays, unless another is better by 2 % in all, and better in each round that
both were in.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from bench.analysis import Point
from stack.config import Service, Settings

UNTUNED = "as chosen"
GAIN = 1.02
"""Less is noise."""
# The settings that are varied: the engine's name, ours, and what is tried for so many clients.
KNOBS: Sequence[tuple[str, str, Any]] = (
    ("LLAMA_ARG_N_PARALLEL", "slots", lambda n: (n, 2 * n)),
    ("LLAMA_ARG_BACKEND_SAMPLING", "GPU sampling", lambda _: (0, 1)),
    ("LLAMA_ARG_KV_UNIFIED", "shared cache", lambda _: (0, 1)),
    ("LLAMA_ARG_UBATCH", "micro-batch", lambda _: (512, 2048)),
    ("LLAMA_ARG_THREADS", "threads", lambda _: (1, os.cpu_count() or 1)),
    ("LLAMA_ARG_THREADS_HTTP", "HTTP threads", lambda n: (4 * n,)),
)
KEPT = (*(name for name, *_ in KNOBS), "LLAMA_ARG_CTX_SIZE", "LLAMA_ARG_LOAD_MODE")
"""What a profile keeps."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one number of clients got of a candidate."""

    clients: int
    tokens_s: float
    window_s: float
    ttft_ms: float | None
    """The mean, as of the next: a short run has too few for a median."""
    itl_ms: float | None
    requests: int
    good: int
    """Of `requests`, those within the SLO, or the default one."""
    decode_tokens_s: float | None
    """Of one stream."""
    failed: str
    """Why it counts for nothing: a request that failed, say."""
    client_cpu: float
    """Of one core: near 1 it was the load generator that set the pace."""

    @classmethod
    def of(cls, point: Point) -> Self:
        """Take what counts of a point."""
        failed = ""
        if point.failed:
            kinds = ", ".join(point.errors)
            failed = f"{point.failed} of {point.requests} requests failed: {kinds}"
        elif not point.window_s:
            failed = f"never were {point.clients} clients served at the same time"
        return cls(
            clients=point.clients,
            tokens_s=point.tokens_s,
            window_s=point.window_s,
            ttft_ms=point.ttft.mean,
            itl_ms=point.itl.mean,
            decode_tokens_s=point.decode_tokens_s,
            requests=point.requests,
            good=point.good,
            failed=failed,
            client_cpu=point.client_cpu,
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One start of a candidate, with each number of clients; or how it failed."""

    candidate: str
    settings: Settings
    """What it changes, by the names of `.env`."""
    round: int
    duration_s: float
    """Of each load."""
    seconds: float
    """All that it took."""
    context: int
    """Tokens of a slot; 0 where it was not begun."""
    ready_s: float | None
    serves: Settings
    """As it was served: what a profile keeps, by the names of `.env`."""
    runs: tuple[Run, ...]
    failed: str


def candidates(service: Service, most: int, pinned: Settings) -> dict[str, Settings]:
    """Return what to try beside a service as chosen, by name, the likeliest gain first.

    One setting changed at a time, of those that `compose.yaml` has a variable for and that are not
    `pinned`.
    """
    variables = {name: variable for variable, name in service.settable.items()}
    found: dict[str, Settings] = {UNTUNED: {}}
    for name, words, values in KNOBS:
        variable = variables.get(name)
        if variable is None or variable in pinned:
            continue
        for value in values(most):
            if str(value) != service.environment.get(name):
                found[f"{words} {value}"] = {variable: str(value)}
    return found


def scores(trials: Sequence[Trial], clients: Sequence[int], *, slo: bool) -> dict[str, float]:
    """Return the score of each candidate that has none failed, the best first."""
    failed = {trial.candidate for trial in trials if trial.failed}
    found = {}
    for name in dict.fromkeys(trial.candidate for trial in trials):
        runs = [run for trial in trials if trial.candidate == name for run in trial.runs]
        rates = [_rate([run for run in runs if run.clients == n], slo=slo) for n in clients]
        if name not in failed:
            found[name] = math.prod(rates) ** (1 / len(rates))
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _rate(runs: Sequence[Run], *, slo: bool) -> float:
    whole_s = sum(run.window_s for run in runs)
    parts = ((run.good + 0.5) / (run.requests + 1) if slo else 1 for run in runs)
    made = sum(run.tokens_s * run.window_s * part for run, part in zip(runs, parts, strict=True))
    return made / whole_s if whole_s else 0


def winner(
    trials: Sequence[Trial], clients: Sequence[int], *, slo: bool
) -> tuple[str, float | None]:
    """Return the best candidate and its gain over what is chosen untuned, None if that failed.

    Raises StopIteration where none has a score.
    """
    found = scores(trials, clients, slo=slo)
    untuned = found.get(UNTUNED)
    if not untuned:
        return next(iter(found)), None
    rounds = [
        scores([each for each in trials if each.round == number], clients, slo=slo)
        for number in {each.round for each in trials}
    ]
    for name, score in found.items():
        both = [each for each in rounds if name in each and UNTUNED in each]
        if score >= GAIN * untuned and all(each[name] > each[UNTUNED] for each in both):
            return name, score / untuned
    return UNTUNED, 1.0


def joined(tried: Mapping[str, Settings], found: Mapping[str, float]) -> dict[str, Settings]:
    """Return one more candidate where several changes were better alone: all of them."""
    least = GAIN * (found.get(UNTUNED) or math.inf)
    better = [name for name in found if name in tried and found[name] >= least]
    changes: dict[str, str] = {}
    for name in reversed(better):  # of two values of one setting the better one
        changes |= tried[name]
    parts = [name for name in better if tried[name].items() <= changes.items()]
    return {" + ".join(sorted(parts)): changes} if len(parts) > 1 else {}
