"""The summary of a load test as a file, and the comparison of two of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.analysis import Point
from bench.stats import Interval
from bench.verdict import Slo

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the figures come from; what differs here makes two summaries incomparable (*)."""

    host: str
    """CPU model and the number of cores (*)."""
    gpu: str | None
    """(*)"""
    driver: str | None
    engine: str
    """Build and commit."""
    model: str
    """The file's name (*)."""
    stand_in: bool
    runtime: str
    """docker, native or attached."""
    server: Mapping[str, str]
    """Its settings, LLAMA_ARG_* (*: context, slots, cache)."""
    client: str
    """Library and event loop."""
    python: str
    commit: str | None
    """Of this tree."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run at one load, with what was measured around it."""

    point: Point
    repeat: int
    faults: tuple[str, ...]
    """Why it is INVALID; empty where it is VALID."""
    calibration: Mapping[str, float]
    """The client's errors, `ttft_p99_ms`, `itl_p99_ms`, `stamp_p99_ms`, cpu_us_event: shown."""
    slots: int | None = None
    deferred: float | None = None
    """Mean of the requests that the server held back."""
    joules_token: float | None = None
    series: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """Telemetry by name (`power_w`, `deferred`, ...): (seconds since the run's begin, value)."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A load test: every run of it, in the order in which they ran."""

    schema: int = SCHEMA
    at: str
    """UTC, ISO 8601."""
    provenance: Provenance
    settings: Mapping[str, Any]
    """Of the load: prompt and output lengths, arrivals, duration, seed, ... (*)."""
    slo: Slo
    measurements: tuple[Measurement, ...]
    ceiling: Mapping[str, float] = field(default_factory=dict)
    """The engine's own output tokens/s (`llama-batched-bench`), by the number of streams."""
    interrupted: str | None = None
    """Why it ended early."""


@dataclass(frozen=True)
class Change:
    """One metric at one load, new over old: `same`, `better`, `worse` or `unresolved`."""

    load: str
    metric: str
    ratio: Interval
    verdict: str


def write(summary: Summary, path: Path) -> None:
    """Write it whole or not at all; raises StackError DISK where that is not possible."""
    raise NotImplementedError


def read(path: Path) -> Summary:
    """Read what `write` wrote.

    Raises:
        StackError: USAGE, where the file is absent, no summary, or of another schema.

    """
    raise NotImplementedError


def compare(new: Summary, old: Summary, *, threshold: float = 0.05) -> tuple[Change, ...]:
    """Compare each load that both have: the baseline gate fails if any change is `worse`.

    `worse` and `better` need the whole 95 % interval beyond the threshold, `same` all of it
    within; runs that are not valid are left out.

    Raises:
        StackError: USAGE, where machine, model or settings differ: that comparison says nothing.

    """
    raise NotImplementedError
