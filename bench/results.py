"""The summary of a load test as a file, and the comparison of two of them."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from bench.analysis import Point
from bench.calibration import Calibration
from bench.ceiling import Ceiling
from bench.stats import Interval, ratio
from bench.telemetry import Span
from bench.verdict import Slo
from stack.errors import Code, StackError
from stack.host import write_atomic

SCHEMA = 2
"""Counts up with every change to what a summary holds; `_newer` brings older ones up."""
THRESHOLD = 0.05
Load = tuple[str, int, float | None]
"""Arrivals, clients and rate: what makes two points the same one."""
# What is compared, by name: its value, and whether more of it is better.
METRICS: Mapping[str, tuple[Callable[[Point], float | None], bool]] = {
    "output tokens/s": (lambda p: p.tokens_s, True),
    "TTFT p50": (lambda p: p.ttft.p50, False),
    "TTFT p99": (lambda p: p.ttft.percentiles["p99"], False),
    "ITL p50": (lambda p: p.itl.p50, False),
    "ITL p99": (lambda p: p.itl.percentiles["p99"], False),
    "TPOT p50": (lambda p: p.tpot.p50, False),
    "E2E p50": (lambda p: p.e2e.p50, False),
}
# The same tree may serve otherwise than before, and that is what a baseline is to show: engine,
# driver, runtime and the server's settings may differ.
_SAME = ("host", "gpu", "model")


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
    calibration: Calibration | None
    slots: int | None = None
    """Of the server: clients beyond it wait."""
    span: Span | None = None
    """Telemetry over the window."""
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
    ceiling: Ceiling | None = None
    """The engine's own rates, measured in the same session."""
    wrong_limit: float | None = None
    """The share of wrong answers that the model's record allows; None where it does not tell."""
    interrupted: str | None = None
    """Why it ended early."""
    verdict: str | None = None
    """Its last line: VALID or INVALID, then PASS, FAIL or UNRESOLVED, and why; None till then."""


@dataclass(frozen=True)
class Change:
    """One metric at one load, new over old: `same`, `better`, `worse` or `unresolved`."""

    load: str
    metric: str
    ratio: Interval
    verdict: str


def write(summary: Summary, path: Path) -> None:
    """Write it whole or not at all. Raises as `save`."""
    save(asdict(summary), path)


def save(value: Any, path: Path, *, indent: int | None = None) -> None:
    """Write plain values whole or not at all, with six digits of each figure.

    Raises:
        StackError: DISK, where that is not possible.

    """
    try:
        write_atomic(path, json.dumps(plain(value), allow_nan=False, indent=indent) + "\n")
    except OSError as error:
        raise StackError(
            f"{path} could not be written: {error.strerror or error}.",
            "Free space there or make it writable, or name another folder.",
            Code.DISK,
        ) from error


def plain(value: Any) -> Any:
    """Return what JSON can hold, with six digits; an infinite percentile becomes a word."""
    match value:
        case Mapping():
            return {key: plain(each) for key, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
        case float():
            return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def read(path: Path) -> Summary:
    """Read what `write` wrote.

    Raises:
        StackError: USAGE, where the file is absent, no summary, or of another schema.

    """
    try:
        value = _newer(json.loads(path.read_text()))
        schema = value["schema"]
        if schema == SCHEMA:
            summary: Summary = parse(Summary, value)
            return summary
        cause = f"{path} has schema {schema}, this version writes and reads {SCHEMA}."
    except OSError as error:
        cause = f"{path} could not be read: {error.strerror}."
    except (KeyError, TypeError, ValueError) as error:
        cause = f"{path} is no summary of a load test: {error}."
    raise StackError(cause, "Measure it again: `invoke bench` writes one.", Code.USAGE)


def _newer(value: dict[str, Any]) -> dict[str, Any]:
    """Bring a summary of schema 1 up: then no answer was known."""
    if value["schema"] != 1:
        return value
    for each in value["measurements"]:
        each["point"]["wrong"] = None
    return {**value, "schema": SCHEMA, "wrong_limit": None}


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def parse(kind: Any, value: Any) -> Any:
    """Build a value of a type from JSON, strictly: no name more, none less, no other type."""
    if isinstance(kind, type) and is_dataclass(kind):
        names = {each.name for each in fields(kind)}
        if not isinstance(value, dict) or set(value) != names:
            wrong = names.symmetric_difference(value if isinstance(value, dict) else ())
            raise ValueError(f"{kind.__name__} has other fields: {sorted(wrong)}")
        hints = _hints(kind)
        return kind(**{name: parse(hints[name], each) for name, each in value.items()})
    parts = get_args(kind)
    origin = get_origin(kind)
    if origin is tuple and isinstance(value, list):
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(parse(part, each) for part, each in zip(kinds, value, strict=True))
    if origin is Mapping and isinstance(value, dict):
        return {key: parse(parts[1], each) for key, each in value.items()}
    if parts and origin not in (tuple, Mapping):  # X | None
        return None if value is None else parse(parts[0], value)
    if kind is float and value in ("inf", "-inf"):
        return float(value)
    if kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    raise ValueError(f"{value!r} is no {getattr(kind, '__name__', kind)}")


def load_of(point: Point) -> Load:
    """Return the load of a point."""
    return point.arrivals, point.clients, point.rate


def _order(each: Measurement) -> tuple[float, int, int]:
    return each.point.rate or 0, each.point.clients, each.repeat


def by_load(measurements: Iterable[Measurement]) -> dict[Load, list[Measurement]]:
    """Return the repeats of each load, the lightest load first."""
    found: dict[Load, list[Measurement]] = {}
    for each in sorted(measurements, key=_order):
        found.setdefault(load_of(each.point), []).append(each)
    return found


def name_of(load: Load) -> str:
    """Say a load in two words."""
    arrivals, clients, rate = load
    few = f"{clients} client" + "s" * (clients != 1)
    return few if rate is None else f"{rate:g}/s {arrivals}"


def compare(new: Summary, old: Summary, *, threshold: float = THRESHOLD) -> tuple[Change, ...]:
    """Compare each load of the old one: a baseline gate fails if any change is `worse`.

    `worse` and `better` need the whole 95 % interval of the ratio beyond the threshold, `same` all
    of it within. Runs that are not valid are left out; with fewer than two repeats on either side,
    or none in the new one, nothing is resolved.

    Raises:
        StackError: USAGE, where machine, model or the load's settings differ.

    """
    _same(new, old)
    ours, theirs = by_load(new.measurements), by_load(old.measurements)
    return tuple(
        change
        for load, before in theirs.items()
        for name in METRICS
        if (change := _change(load, name, ours.get(load, []), before, threshold))
    )


def _same(new: Summary, old: Summary) -> None:
    pairs = [(name, getattr(new.provenance, name), getattr(old.provenance, name)) for name in _SAME]
    names = sorted(new.settings.keys() | old.settings.keys())
    pairs += [(name, new.settings.get(name), old.settings.get(name)) for name in names]
    for name, ours, theirs in pairs:
        if plain(ours) != plain(theirs):
            raise StackError(
                f"The two cannot be compared: {name} is {ours}, in the baseline {theirs}.",
                "Compare with a baseline of the same machine, model and settings, or make one.",
                Code.USAGE,
            )


def _change(
    load: Load,
    name: str,
    new: Iterable[Measurement],
    old: Iterable[Measurement],
    threshold: float,
) -> Change | None:
    value, more = METRICS[name]
    sides = [[value(m.point) for m in side if not m.faults] for side in (new, old)]
    ours, theirs = ([each for each in side if each] for side in sides)
    if any(None in side for side in sides):  # too few samples for this percentile
        return None
    if not ours or not theirs:
        return Change(name_of(load), name, Interval(math.nan, 0, math.inf), "unresolved")
    found = ratio(ours, theirs)
    return Change(name_of(load), name, found, _sense(found, threshold, more=more))


def _sense(found: Interval, threshold: float, *, more: bool) -> str:
    low, high = 1 - threshold, 1 / (1 - threshold)
    if found.low > high or found.high < low:
        return "better" if (found.low > high) == more else "worse"
    return "same" if low <= found.low and found.high <= high else "unresolved"
