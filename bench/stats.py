"""Statistics of the load test, from the standard library alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, stdev

# The fewest samples from which MLPerf's LoadGen estimates a percentile at 99 % confidence
# (mlcommons/inference, loadgen/early_stopping.cc); below it a percentile is None.
FLOORS: Mapping[str, int] = {"p50": 11, "p90": 64, "p95": 130, "p99": 662}
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Spread:
    """How one quantity is distributed. Percentiles are nearest ranks, never between samples.

    `tail` has the percentiles again with each failure counted as an infinite sample.
    """

    count: int
    failures: int
    mean: float | None
    percentiles: Mapping[str, float | None]
    tail: Mapping[str, float | None]

    @property
    def p50(self) -> float | None:
        """The median."""
        return self.percentiles["p50"]


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % confidence interval; infinitely wide where one sample says all."""

    value: float
    low: float
    high: float


def spread(samples: Iterable[float], failures: int = 0) -> Spread:
    """Describe samples, of whatever unit, and the failures that have none."""
    ordered = sorted(samples)
    return Spread(
        len(ordered),
        failures,
        fmean(ordered) if ordered else None,
        _percentiles(ordered, len(ordered)),
        _percentiles(ordered, len(ordered) + failures),
    )


def _percentiles(ordered: Sequence[float], count: int) -> dict[str, float | None]:
    def at(percent: int) -> float:
        rank = -(-percent * count // 100)
        return ordered[rank - 1] if rank <= len(ordered) else math.inf

    return {name: at(int(name[1:])) if count >= floor else None for name, floor in FLOORS.items()}


def wilson(successes: int, count: int) -> Interval:
    """Return a share with its 95 % score interval (Wilson 1927); all of 0..1 where count is 0."""
    if not count:
        return Interval(math.nan, 0.0, 1.0)
    share, z2 = successes / count, _Z * _Z / count
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4) / (1 + z2)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


@lru_cache
def student_t(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    For whole degrees of freedom its probability is a finite sum (Abramowitz & Stegun 26.7.3-4),
    which bisection inverts.
    """
    low, high = 0.0, 13.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """Return the probability that Student's t is between -t and t."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    cosine2 = math.cos(angle) ** 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine2 * k / (k + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def mean(samples: Sequence[float]) -> Interval:
    """Return the mean of independent repeats with its Student-t interval."""
    value, count = fmean(samples), len(samples)
    if count < 2:
        return Interval(value, -math.inf, math.inf)
    half = student_t(count - 1) * stdev(samples) / math.sqrt(count)
    return Interval(value, value - half, value + half)


def ratio(new: Sequence[float], old: Sequence[float]) -> Interval:
    """Return how many times `old` the repeats of `new` are: geometric means, Student-t interval.

    The variance is pooled: runs of the same load on the same machine are as noisy. With three
    repeats a side and 1 % noise, Welch's interval misses 12 % of the 10 % slowdowns, this 3 %.
    All samples must be above 0.
    """
    logs = [[math.log(each) for each in samples] for samples in (new, old)]
    difference = fmean(logs[0]) - fmean(logs[1])
    counts = [len(each) for each in logs]
    if min(counts) < 2:
        return Interval(math.exp(difference), 0.0, math.inf)
    freedom = sum(counts) - 2
    pooled = sum(stdev(each) ** 2 * (len(each) - 1) for each in logs) / freedom
    half = student_t(freedom) * math.sqrt(pooled * sum(1 / count for count in counts))
    return Interval(*map(math.exp, (difference, difference - half, difference + half)))


def jain(shares: Sequence[float]) -> float | None:
    """Return Jain's fairness index (1984): 1 where all get the same, 1/n where one gets all."""
    squares = len(shares) * sum(share * share for share in shares)
    return sum(shares) ** 2 / squares if squares else None
