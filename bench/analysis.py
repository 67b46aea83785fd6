"""Turns what one run saw into what it says: a Point. Pure; definitions as in docs/loadtest.md.

A sample belongs to the window if the stamp that completes it is inside: a gap by its later read,
TTFT by the first token, TPOT and E2E latency by the end. So requests over an edge bias nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from bench.records import Run
from bench.stats import Spread
from bench.verdict import Slo

STEADY = 0.95
"""The share of the target that is in flight all through the window."""


@dataclass(frozen=True)
class Window:
    """The span that is judged, half open; empty where there was none."""

    begin_ns: int
    end_ns: int


@dataclass(frozen=True)
class Slice:
    """A piece of the time line, from the run's begin to its end."""

    at_s: float
    """Its begin, since the run's."""
    tokens_s: float
    in_flight: float
    waiting: float
    """Of those in flight, without a first token."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run at one load. Milliseconds, but where the name says seconds; shares are 0 to 1.

    None stands for what could not be known, never 0.
    """

    arrivals: str
    clients: int
    rate: float | None
    seed: int
    begin_s: float
    """The window's begin, since the run's."""
    window_s: float

    requests: int
    """Ended inside the window, whole or not; the cut ones are in neither figure."""
    failed: int
    cut: int
    reconnected: int
    errors: Mapping[str, int]
    """Failures by class, of the whole run."""
    first_error_s: float | None

    client_queue: Spread
    queue: Spread
    """Waiting for a slot; no samples where the headers do not mark its begin."""
    prefill: Spread
    ttft: Spread
    ttft_scheduled: Spread
    ttfa: Spread
    icl: Spread
    itl: Spread
    tpot: Spread
    e2e: Spread
    prefill_residual: Spread
    """Prefill as seen, less the server's `prompt_ms`."""
    decode_residual: Spread
    """First to last token as seen, less the server's `predicted_ms`."""

    tokens_s: float
    """Output tokens; one whose gap crosses an edge of the window counts by its share inside."""
    prompt_tokens_s: float
    """Prompt tokens that were not cached."""
    requests_s: float
    """Whole answers."""
    concurrency: float
    """Mean number in flight."""
    little: float
    """1 - (requests x E2E latency) / time in flight, edges by their share: what latency hides."""
    growth: float
    """Arrivals less ends, per arrival: above 0 the server does not keep up."""

    good: int
    """Of `requests`, those within the SLO."""
    goodput_s: float

    exact: float | None
    """Share of tokens that the server counted; the rest are one an event."""
    usage_error: float | None
    """Tokens seen against `usage`, of whole answers: relative difference."""
    metrics_error: float | None
    """Tokens seen against the server's own total over the run: relative difference."""
    cached: float | None
    """Share of prompt tokens from the cache."""

    fairness: float | None
    """Jain's index over the clients' tokens."""
    wait_ratio: float | None
    """The mean TTFT of the worst client over that of the best."""
    stalls: float | None
    """Share of gaps above 5 x their median."""
    coalesced: float | None
    """Share of reads that held more than one event, and so share a stamp."""
    kernel: float | None
    """Share of reads with the kernel's stamp."""
    client_cpu: float
    """Of one core."""
    lag_p99: float | None
    """How late the event loop came back."""

    itl_histogram: tuple[tuple[float, int], ...]
    """(lower bound in ms, tokens); each bin is 10^(1/20) wide."""
    timeline: tuple[Slice, ...]


def window(run: Run) -> Window:
    """Return the steady window of a run."""
    raise NotImplementedError


def analyse(run: Run, slo: Slo, *, server_tokens: int | None = None) -> Point:
    """Return what a run says.

    `server_tokens` is how many the server says it made meanwhile (`tokens_predicted_total` of
    `/metrics`, difference over the run).
    """
    raise NotImplementedError
