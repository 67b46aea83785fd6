"""Judges: whether a run may be believed, and whether the server met its target."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from bench.calibration import LATE_MS, LIMIT, Calibration
from bench.stats import FLOORS, wilson
from stack.errors import Code, StackError

if TYPE_CHECKING:
    from bench.analysis import Point

Verdict = Literal["PASS", "FAIL", "UNRESOLVED"]
"""What the samples prove at 95 % confidence: the one, the other, or neither."""

CPU = 0.8
COALESCED = 0.05
STEADY = 0.95
"""The share of the clients that is in flight, all through the window and in its mean."""
DISAGREEMENT = 0.02
"""Of token counts, and of Little's law."""
SEND_MS = 1
"""A schedule delay below it is no fault, however short the TTFT."""


@dataclass(frozen=True)
class Slo:
    """A target: `share` of the requests have both their TTFT and their TPOT within the limits.

    The defaults are MLPerf's interactive limits for an 8B model; its others are 2000 and 100 ms.
    """

    ttft_ms: float = 500
    tpot_ms: float = 30
    share: float = 0.95

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `ttft=500,tpot=30`, or with `share=0.99`; what is not named keeps its default.

        Raises:
            StackError: USAGE, with an example.

        """
        names = {"ttft": "ttft_ms", "tpot": "tpot_ms", "share": "share"}
        try:
            pairs = [part.split("=") for part in re.sub(r"\s", "", text).split(",")]
            values = {names[name]: float(value) for name, value in pairs}
            slo = cls(**values)
            if len(values) == len(pairs) and slo._possible():
                return slo
        except (KeyError, ValueError):
            pass
        raise StackError(
            f"{text!r} is no service level objective.",
            "Write milliseconds, and a share if not 0.95: --slo ttft=500,tpot=30,share=0.99",
            Code.USAGE,
        )

    def _possible(self) -> bool:
        return all(0 < limit < float("inf") for limit in (self.ttft_ms, self.tpot_ms)) and (
            0 < self.share < 1
        )

    def __str__(self) -> str:
        """Say it as a sentence's part."""
        return f"TTFT within {self.ttft_ms:g} ms and TPOT within {self.tpot_ms:g} ms"


@dataclass(frozen=True)
class Outcome:
    """The verdict on one load, over all its repeats, and its reason in one line."""

    verdict: Verdict
    reason: str


def faults(
    point: "Point", calibration: Calibration | None, *, throttled: Sequence[str] = ()
) -> tuple[str, ...]:
    """Say why a run is INVALID, one line a reason; nothing where it is VALID.

    A run that was not calibrated is not valid. `throttled` names what slowed the GPU down. Failed
    requests, and that they keep clients from being in flight, are the server's verdict instead.
    """
    if not point.window_s and not point.failed:
        return (f"no steady window: never {point.clients} in flight after the warm-up",)
    slowed = (f"the GPU was slowed down by {reason}" for reason in throttled)
    return (*_of_client(point, calibration), *_of_samples(point), *slowed)


def _of_client(point: "Point", calibration: Calibration | None) -> Iterator[str]:
    itl_ms, ttft_ms = point.itl.mean or 0, point.ttft.mean or 0
    coalesced, lag_ms = point.coalesced or 0, point.lag_p99 or 0
    delay_ms = point.client_queue.mean or 0
    if calibration is None:
        yield "the client was not calibrated"
    elif calibration.reason:
        yield calibration.reason
    elif itl_ms and calibration.receive_p99_ms > LIMIT * itl_ms:
        error = f"{calibration.receive_p99_ms:.2f} ms, the time between tokens {itl_ms:.2f} ms"
        yield f"the client's error is {error}"
    if point.client_cpu > CPU:
        yield f"the client was busy {100 * point.client_cpu:.0f} % of the time"
    if coalesced > COALESCED:
        yield f"{100 * coalesced:.0f} % of the reads held several events, which share a stamp"
    if lag_ms > max(LATE_MS if (point.kernel or 0) > 0.99 else 0, LIMIT * itl_ms):
        yield f"the client's event loop came back {lag_ms:.1f} ms late"
    if delay_ms > max(SEND_MS, LIMIT * ttft_ms) and not point.overloaded:
        yield f"requests were sent {delay_ms:.1f} ms after they were due"


def _of_samples(point: "Point") -> Iterator[str]:
    few = point.concurrency < STEADY * point.clients
    if point.rate is None and few and not point.failed:
        yield f"only {point.concurrency:.1f} of {point.clients} clients were in flight"
    if abs(point.little) > DISAGREEMENT:
        yield f"latencies leave out {100 * point.little:.1f} % of the time in flight (Little's law)"
    for name, error in (("usage", point.usage_error), ("/metrics", point.metrics_error)):
        if error is not None and abs(error) > DISAGREEMENT:
            yield f"tokens seen differ by {100 * error:+.1f} % from the server's {name}"
    if point.requests < FLOORS["p50"] and not point.failed:
        ended = f"{point.requests} requests ended in {point.window_s:.1f} s"
        yield f"too few samples: {ended}, a median needs {FLOORS['p50']}"


def decide(successes: int, count: int, share: float) -> Verdict:
    """Say whether a true share of successes is at least `share`, by the Wilson interval."""
    interval = wilson(successes, count)
    if interval.low >= share:
        return "PASS"
    return "FAIL" if interval.high < share else "UNRESOLVED"


def judge(points: Sequence["Point"], slo: Slo) -> Outcome:
    """Judge the repeats of one load against the SLO, failures included."""
    count, good = sum(p.requests for p in points), sum(p.good for p in points)
    if any(point.overloaded for point in points):
        return Outcome("FAIL", "more requests came than ended: there is no steady state")
    verdict, interval = decide(good, count, slo.share), wilson(good, count)
    if not count:
        return Outcome(verdict, "no request ended")
    low, high = (f"{100 * each:.1f} %" for each in (interval.low, interval.high))
    reason = (
        f"{100 * interval.value:.1f} % of {count:,} requests had {slo} ({low} to {high}); "
        f"{100 * slo.share:.0f} % should"
    )
    failed = sum(p.failed for p in points)
    if failed:
        first = min(p.first_error_s for p in points if p.first_error_s is not None)
        kinds = ", ".join(dict.fromkeys(kind for p in points for kind in p.errors))
        reason += f"; {failed:,} failed ({kinds}), the first {first:.1f} s into its run"
    return Outcome(verdict, reason)


def knee(points: Sequence[tuple[float, float, float]]) -> float | None:
    """Return the load with the most throughput for its latency: Kleinrock's power (1979).

    Points are (load, throughput, mean latency). None where it is the highest load, as the knee may
    lie beyond.
    """
    power = {load: rate / latency for load, rate, latency in points if latency}
    best = max(power, key=power.__getitem__, default=None)
    return None if best is None or best == max(power) else best
