"""Judges: whether a run may be believed, and whether the server met its target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from bench.analysis import Point


Verdict = Literal["PASS", "FAIL", "UNRESOLVED"]
"""What the samples prove at 95 % confidence: the one, the other, or neither."""


@dataclass(frozen=True)
class Slo:
    """A target: `share` of the requests have both their TTFT and their TPOT within the limits."""

    ttft_ms: float = 500
    tpot_ms: float = 30
    share: float = 0.95

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `ttft=500,tpot=30`; what is not named keeps its default.

        Raises:
            StackError: USAGE, with an example.

        """
        raise NotImplementedError


@dataclass(frozen=True)
class Outcome:
    """The verdict on one load, over all its repeats, and its reason in one line."""

    verdict: Verdict
    reason: str


def faults(
    point: "Point", *, itl_error_ms: float | None, throttled: Sequence[str] = ()
) -> tuple[str, ...]:
    """Say why a run is INVALID, one line a reason; nothing where it is VALID.

    `itl_error_ms` is the client's p99 error of the inter-token latency in the calibration, None
    where there was none, which is a reason too. `throttled` names what slowed the GPU down.
    """
    raise NotImplementedError


def decide(successes: int, count: int, share: float) -> Verdict:
    """Say whether a true share of successes is at least `share`, by the Wilson interval."""
    raise NotImplementedError


def judge(points: Sequence["Point"], slo: Slo) -> Outcome:
    """Judge the repeats of one load against the SLO, failures included."""
    raise NotImplementedError


def knee(points: Mapping[float, float]) -> float | None:
    """Return the load (clients or rate) from which more of it brings little; None if none does.

    `points` gives the throughput at each load.
    """
    raise NotImplementedError
