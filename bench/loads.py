"""The runs of a load test by load, and what their repeats say together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from bench import ceiling, results, stats, verdict
from bench.analysis import Point
from bench.results import Measurement, Summary
from bench.stats import Interval
from bench.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class Load:
    """The repeats of one load: the valid ones, or all where none is."""

    name: str
    closed: bool
    level: float
    """Clients, or requests a second."""
    runs: Sequence[Measurement]
    all_runs: Sequence[Measurement]
    ceiling: ceiling.Ceiling | None
    verdict: Verdict

    def each(self, value: Callable[[Point], float | None]) -> list[float]:
        """Return a figure of each run that has it."""
        found = (value(run.point) for run in self.runs)
        return [figure for figure in found if figure is not None]

    def mean(self, value: Callable[[Point], float | None]) -> Interval | None:
        """Return the mean of a figure over the runs, with its interval."""
        found = self.each(value)
        return stats.mean(found) if found else None

    def value(self, value: Callable[[Point], float | None]) -> float:
        """Return that mean alone, 0 where there is none."""
        found = self.mean(value)
        return found.value if found else 0

    def total(self, value: Callable[[Point], int]) -> int:
        """Add up a count over the runs."""
        return sum(value(run.point) for run in self.runs)

    @cached_property
    def tokens(self) -> Interval:
        """Output tokens a second."""
        return stats.mean([run.point.tokens_s for run in self.runs])

    @property
    def latency_ms(self) -> float:
        """The mean E2E latency."""
        return self.value(lambda p: p.e2e.mean)

    @property
    def top(self) -> float | None:
        """The ceiling of output tokens a second."""
        found = self.ceiling.at(int(self.level)) if self.ceiling and self.closed else None
        return found.whole_tokens_s if found else None

    @property
    def ratio(self) -> float | None:
        """Served over the ceiling."""
        return self.value(lambda p: p.tokens_s) / self.top if self.top else None

    @property
    def decode_ratio(self) -> float | None:
        """The same while streams decode."""
        shares = [ceiling.share(run.point, run.slots, self.ceiling) for run in self.runs]
        known = [share.decode for share in shares if share and share.decode]
        return stats.mean(known).value if known else None


def of(summary: Summary) -> list[Load]:
    """Return the loads of a summary, the lightest first."""
    found = []
    for (arrivals, clients, rate), runs in results.by_load(summary.measurements).items():
        valid = [run for run in runs if not run.faults] or runs
        load = Load(
            name=results.name_of((arrivals, clients, rate)),
            closed=rate is None,
            level=clients if rate is None else rate,
            runs=valid,
            all_runs=runs,
            ceiling=summary.ceiling,
            verdict=verdict.judge([run.point for run in valid], summary.slo).verdict,
        )
        found.append(load)
    return found


def knee(loads: Sequence[Load]) -> Load | None:
    """Return the load at the knee (see `verdict.knee`)."""
    level = verdict.knee([(load.level, load.tokens.value, load.latency_ms) for load in loads])
    return next((load for load in loads if load.level == level), None)
