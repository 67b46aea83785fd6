"""Makes one HTML page of a summary, with nothing to load from anywhere and no script."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from bench import ceiling, results, stats, verdict
from bench.analysis import BINS, Point
from bench.ceiling import Share
from bench.results import Measurement, Summary
from bench.stats import Interval, Spread

CSS = Path(__file__).with_name("report.css")
WIDTH = 480
"""Of every figure, in its own units: two stand side by side on a desktop."""
LEFT = 84
"""Where what is drawn begins in each, right of the labels."""
NONE = "\N{EN DASH}"
Scale = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class _Load:
    """The runs of one load: the valid ones, or all where none is."""

    name: str
    level: float
    runs: Sequence[Measurement]
    all_runs: Sequence[Measurement]
    top: float | None
    """The ceiling's output tokens a second."""
    shares: Sequence[Share]
    verdict: str

    def each(self, value: Callable[[Point], float | None]) -> list[float]:
        """Return a figure of each run that has it."""
        found = (value(run.point) for run in self.runs)
        return [figure for figure in found if figure is not None]

    def mean(self, value: Callable[[Point], float | None]) -> Interval | None:
        """Return the mean over the runs with its interval."""
        found = self.each(value)
        return stats.mean(found) if found else None

    def total(self, value: Callable[[Point], int]) -> int:
        """Add up a count over the runs."""
        return sum(value(run.point) for run in self.runs)

    @cached_property
    def tokens(self) -> Interval:
        """Output tokens a second."""
        return stats.mean([run.point.tokens_s for run in self.runs])

    @property
    def row(self) -> str:
        """Its name where there is little room."""
        return self.name if self.runs[0].point.rate is None else self.name.partition(" ")[0]

    @property
    def latency_ms(self) -> float | None:
        """The mean E2E latency."""
        found = self.each(lambda p: p.e2e.mean)
        return fmean(found) if found else None

    @property
    def ratio(self) -> float | None:
        """Served output tokens over the engine's own."""
        return fmean(share.whole for share in self.shares) if self.shares else None

    @property
    def decode_ratio(self) -> float | None:
        """The same while streams decode."""
        known = [share.decode for share in self.shares if share.decode]
        return fmean(known) if known else None


def page(summary: Summary) -> str:
    """Return the page."""
    loads = _loads(summary)
    knee = _knee(loads)
    body = "\n".join(
        part
        for part in (
            _head(summary),
            _tiles(summary, loads, knee),
            _figures(loads, knee),
            _table(summary, loads),
            _provenance(summary),
        )
        if part
    )
    title = f"Load test of {escape(summary.provenance.model)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>\n{CSS.read_text()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _loads(summary: Summary) -> list[_Load]:
    found = []
    for load, runs in results.by_load(summary.measurements).items():
        _, clients, rate = load
        level = clients if rate is None else rate
        valid = [run for run in runs if not run.faults] or runs
        top = summary.ceiling.at(clients) if summary.ceiling and rate is None else None
        shares = [ceiling.share(run.point, run.slots, summary.ceiling) for run in valid]
        found.append(
            _Load(
                name=results.name_of(load),
                level=level,
                runs=valid,
                all_runs=runs,
                top=top.whole_tokens_s if top else None,
                shares=[share for share in shares if share],
                verdict=verdict.judge([run.point for run in valid], summary.slo).verdict,
            )
        )
    return found


def _knee(loads: Sequence[_Load]) -> _Load | None:
    points = [(load.level, load.tokens.value, load.latency_ms or 0) for load in loads]
    level = verdict.knee(points)
    return next((load for load in loads if load.level == level), None)


# Words


def _number(value: float | None, unit: str = "") -> str:
    """Say a figure with three digits that count."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "\N{INFINITY}"
    return f"{value:,.{_digits(value)}f}{unit}"


def _digits(value: float) -> int:
    size = abs(value)
    return 0 if size >= 100 or value == 0 else 1 if size >= 10 else 2 if size >= 0.1 else 3


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.{0 if abs(value) >= 0.1 else 1}f} %"


def _head(summary: Summary) -> str:
    origin = summary.provenance
    where, when = origin.gpu or origin.host, summary.at[:16].replace("T", " ")
    invalid = Counter(fault for run in summary.measurements for fault in run.faults)
    validity = "VALID" if summary.measurements and not invalid else "INVALID"
    line = summary.verdict or f"{validity}: {summary.interrupted or 'no verdict was given'}"
    words, _, reason = line.partition(": ")
    title = ", ".join(f'<span class="{escape(w)}">{escape(w)}</span>' for w in words.split(", "))
    parts = [
        f'<p class="eyebrow">{escape(f"Load test of {origin.model} on {where}, {when} UTC")}</p>',
        f"<h1>{title}</h1>",
        f'<p class="reason">{escape(reason)}</p>',
    ]
    if origin.stand_in:
        parts.append(
            '<p class="notice"><strong>A stand-in was measured:</strong> random weights of the '
            "model\N{RIGHT SINGLE QUOTATION MARK}s shape. Its speed and memory are the real "
            "file\N{RIGHT SINGLE QUOTATION MARK}s; its answers are noise.</p>"
        )
    if summary.interrupted and summary.interrupted not in line:
        parts.append(f'<p class="notice">It ended early: {escape(summary.interrupted)}.</p>')
    if invalid:
        items = "".join(f"<li>{escape(why)} (runs: {n})</li>" for why, n in invalid.most_common(6))
        parts.append(f'<div class="notice">Why runs are not valid:<ul>{items}</ul></div>')
    return f"<header>{''.join(parts)}</header>"


def _tiles(summary: Summary, loads: Sequence[_Load], knee: _Load | None) -> str:
    if not loads:
        return ""
    best = max(loads, key=lambda load: load.tokens.value)
    chosen = knee or best
    tiles = []
    if chosen.ratio is not None:
        others = [load for load in (loads[0], loads[-1]) if load.ratio and load is not chosen]
        also = "; ".join(f"{_percent(load.ratio)} at {load.name}" for load in others)
        also = f" ({also})" if also else ""
        note = f"of the engine\N{RIGHT SINGLE QUOTATION MARK}s own rate at {chosen.name}{also}"
        tiles.append((_percent(chosen.ratio), "", note))
    tiles.append((_number(best.tokens.value), "tokens/s", f"output, the most, at {best.name}"))
    ttft, itl = chosen.mean(lambda p: p.ttft.mean), chosen.mean(lambda p: p.itl.mean)
    if ttft and itl:
        note = f"to the first token, then {_number(itl.value)} ms each; means at {chosen.name}"
        tiles.append((_number(ttft.value), "ms", note))
    passed = [load for load in loads if load.verdict == "PASS"]
    big, _, unit = passed[-1].name.partition(" ") if passed else ("none", "", "")
    tiles.append((big, unit, f"{'is the most' if passed else 'of the loads'} with {summary.slo}"))
    cells = "".join(
        f"<div><b>{big} <small>{unit}</small></b><span>{escape(note)}</span></div>"
        for big, unit, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


# Figures


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0, width):.1f}" '
        f'height="{max(0, height):.1f}" class="{kind}"/>'
    )


def _dot(x: float, y: float, kind: str = "a dot", radius: float = 4.5) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{kind}"/>'


def _path(points: Iterable[tuple[float, float]], kind: str, base: float | None = None) -> str:
    """Draw a line, or the area between it and `base`."""
    places = list(points)
    if not places:
        return ""
    line = "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
    if base is not None:
        line += f"L{places[-1][0]:.1f},{base:.1f}L{places[0][0]:.1f},{base:.1f}Z"
    return f'<path d="M{line}" class="{kind}"/>'


def _linear(low: float, high: float, begin: float, end: float) -> Scale:
    return lambda value: begin + (value - low) / ((high - low) or 1) * (end - begin)


def _ticks(high: float) -> list[float]:
    """Return 0 and up to five round figures above, the last at or beyond `high`."""
    rough = max(high, 1e-9) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [step * n for n in range(math.ceil(high / step - 1e-9) + 1)]


def _levels(loads: Sequence[_Load], begin: float, end: float) -> Scale:
    """Return a scale on which doubling the load is always the same way."""
    place = _linear(math.log(loads[0].level), math.log(loads[-1].level), begin, end)
    return lambda level: place(math.log(level))


def _figure(title: str, note: str, height: float, parts: Iterable[str]) -> str:
    head = f"<figcaption><h2>{escape(title)}</h2><p>{escape(note)}</p></figcaption>"
    svg = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return f"<figure>{head}{svg}{''.join(parts)}</svg></figure>"


def _figures(loads: Sequence[_Load], knee: _Load | None) -> str:
    known = [load for load in loads if load.tokens.value]
    if not known:
        return ""
    main = [_split(known), _distribution(known)]
    if len(known) > 1:
        main = [_served(known), _curve(known, knee), *main]
    lines = [_timeline(load) for load in known]
    return (
        f'<section class="figures">{"".join(main)}</section>'
        "<section><h2>While it ran</h2>"
        f'<div class="figures">{"".join(lines)}</div></section>'
    )


def _served(loads: Sequence[_Load]) -> str:
    """Draw throughput against load, below the engine's ceiling."""
    left, right, upper, lower = LEFT, WIDTH - 62, 14, 220
    tops = [(load.level, load.top) for load in loads if load.top]
    ticks = _ticks(max([top for _, top in tops] + [load.tokens.value for load in loads]))
    x, y = _levels(loads, left + 24, right - 8), _linear(0, ticks[-1], lower, upper)
    served = [(x(load.level), y(load.tokens.value)) for load in loads]

    def parts() -> Iterator[str]:
        for tick in ticks:
            yield _rule(left, y(tick), right, y(tick)) + _text(
                left - 8, y(tick) + 4, _number(tick), "end"
            )
        engine = [(x(level), y(top)) for level, top in tops]
        yield _path(engine, "line c-line")
        yield _path(served, "line a-line")
        yield from _whiskers(loads, x, y)
        yield "".join(_dot(*place) for place in served)
        end = served[-1][1] + 4
        if engine:
            yield _text(right, engine[-1][1] + 4, "ceiling")
            end = max(end, engine[-1][1] + 20)
        yield _text(right, end, "served", "strong")
        last = -math.inf
        for load in loads:
            place = x(load.level)
            if place - last >= 34:
                last = place
                yield _text(place, lower + 20, f"{load.level:g}", "middle")
                if tops:
                    yield _text(place, lower + 38, _percent(load.ratio), "middle strong")
        yield _text(left - 8, lower + 20, _unit(loads), "end")
        if tops:
            yield _text(left - 8, lower + 38, "of ceiling", "end strong")

    note = "Output tokens/s at each load"
    note += "; bars are 95 % intervals." if any(len(load.runs) > 1 for load in loads) else "."
    if tops:
        note = f"{note[:-1]}. The ceiling is llama-batched-bench: same build, model, settings."
    return _figure("Throughput", note, lower + (46 if tops else 28), parts())


def _unit(loads: Sequence[_Load]) -> str:
    return "clients" if loads[0].runs[0].point.rate is None else "requests/s"


def _whiskers(loads: Sequence[_Load], x: Scale, y: Scale) -> Iterator[str]:
    for load in loads:
        low, high = load.tokens.low, load.tokens.high
        if math.isfinite(high):
            yield _rule(x(load.level), y(max(0, low)), x(load.level), y(high), "axis")


def _curve(loads: Sequence[_Load], knee: _Load | None) -> str:
    """Draw what latency a throughput costs, and the knee."""
    left, right, upper, lower = LEFT, WIDTH - 24, 28, 220
    known = [load for load in loads if load.latency_ms]
    if not known:
        return ""
    rates = _ticks(max(load.tokens.value for load in known))
    times = _ticks(max((load.latency_ms or 0) / 1000 for load in known))
    x, y = _linear(0, rates[-1], left, right), _linear(0, times[-1], lower, upper)
    places = [(x(load.tokens.value), y((load.latency_ms or 0) / 1000)) for load in known]

    def parts() -> Iterator[str]:
        for tick in times:
            yield _rule(left, y(tick), right, y(tick))
            yield _text(left - 8, y(tick) + 4, f"{tick:g}", "end")
        for tick in rates:
            yield _text(x(tick), lower + 20, _number(tick), "middle")
        yield _text(right, lower + 38, "output tokens/s", "end")
        yield _path(places, "line a-line")
        labelled: list[tuple[float, float]] = []
        for load, (across, up) in sorted(
            zip(known, places, strict=True), key=lambda p: p[0] != knee
        ):
            yield _dot(across, up)
            if load is knee:
                yield _dot(across, up, "ring", 8.5)
            if all(abs(across - x) > 40 or abs(up - y) > 15 for x, y in labelled):
                labelled.append((across, up))
                words, kind = (" knee", "end strong") if load is knee else ("", "end")
                yield _text(across - 10, up - 9, f"{load.level:g}{words}", kind)

    note = f"Mean E2E latency in seconds; the labels are {_unit(loads)}."
    if knee:
        note += " The knee has the most throughput for its latency."
    return _figure("Latency against throughput", note, lower + 46, parts())


_SPLIT = (("client", "c"), ("queue", "b"), ("prefill", "a"))


def _split(loads: Sequence[_Load]) -> str:
    """Draw where the time to the first token goes."""
    left, right, row = LEFT, WIDTH - 96, 36

    def mean(load: _Load, value: Callable[[Point], float | None]) -> float:
        found = load.mean(value)
        return found.value if found else 0

    rows = []
    for load in loads:
        total = mean(load, lambda p: p.ttft.mean)
        parts_ms = [
            mean(load, lambda p: p.client_queue.mean),
            mean(load, lambda p: p.queue.mean),
            mean(load, lambda p: p.prefill.mean),
        ]
        known = parts_ms[2] > 0
        rows.append((load, total, parts_ms if known else [parts_ms[0], 0, total], known))
    most = max(max(total, sum(parts_ms)) for _, total, parts_ms, _ in rows)
    x = _linear(0, most, left, right)
    told = all(known for *_, known in rows)

    def parts() -> Iterator[str]:
        place: float = left
        for name, kind in _SPLIT if told else (("client", "c"), ("queue + prefill", "a")):
            yield _box(place, 4, 11, 11, kind) + _text(place + 17, 14, name)
            place += 90
        for n, (load, total, parts_ms, _) in enumerate(rows):
            upper = 28 + n * row
            yield _text(left - 10, upper + 18, load.row, "end")
            begin = 0.0
            for part, (_, kind) in zip(parts_ms, _SPLIT, strict=True):
                yield _box(x(begin), upper, x(begin + part) - x(begin), row - 10, kind)
                begin += part
            yield _text(x(begin) + 8, upper + 18, _number(total, " ms"), "strong")

    note = "Means, from when the request was due; the figure is TTFT from its sending."
    if not told:
        note = "Means. This server\N{RIGHT SINGLE QUOTATION MARK}s headers do not tell its queue."
    return _figure("Time to the first token", note, 28 + row * len(rows), parts())


def _distribution(loads: Sequence[_Load]) -> str:
    """Draw the time between tokens of each load, one above the other, on one logarithmic axis."""
    left, right, row = LEFT, WIDTH - 122, 36
    bins = [_bins(load) for load in loads]
    numbers = [n for each in bins for n in each]
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers) + 1
    x = _linear(low, high, left, right)
    lower = 28 + row * len(loads)

    def parts() -> Iterator[str]:
        yield _text(WIDTH - 62, 14, "p50", "end") + _text(WIDTH, 14, "p99", "end")
        for exponent, lead in ((e, m) for e in range(-3, 6) for m in (1, 2, 5)):
            place = BINS * (exponent + math.log10(lead))
            if low <= place <= high and (lead == 1 or high - low < 2.4 * BINS):
                yield _rule(x(place), 22, x(place), lower)
                yield _text(x(place), lower + 17, f"{lead * 10.0**exponent:g}", "middle")
        yield _text(WIDTH, lower + 17, "ms", "end")
        for index, (load, found) in enumerate(zip(loads, bins, strict=True)):
            base = 28 + row * (index + 1) - 6
            most = max(found.values(), default=1)
            steps = [
                (x(edge), base - (row - 8) * found.get(n, 0) / most)
                for n in range(min(found, default=0), max(found, default=-1) + 1)
                for edge in (n, n + 1)
            ]
            yield _path(steps, "a-soft", base) + _path(steps, "line a-line")
            yield _rule(left, base, right, base, "axis")
            yield _text(left - 10, base - 4, load.row, "end")
            p50 = load.mean(lambda p: p.itl.p50)
            worst = max(load.each(lambda p: p.itl.percentiles["p99"]), default=None)
            yield _text(WIDTH - 62, base - 4, _number(p50.value if p50 else None), "end strong")
            yield _text(WIDTH, base - 4, _number(worst), "end strong")

    note = "ITL by token, all runs of a load together; p99 is of the worst run."
    return _figure("Time between tokens", note, lower + 24, parts())


def _bins(load: _Load) -> Counter[int]:
    """Return tokens by the number of their bin, without the ten-thousandth at either end."""
    found: Counter[int] = Counter()
    for run in load.runs:
        for bound, count in run.point.itl_histogram:
            found[round(BINS * math.log10(bound))] += count
    few = found.total() / 10_000
    return Counter({number: count for number, count in found.items() if count > few})


def _timeline(load: _Load) -> str:
    """Draw the first run of a load: tokens, requests, power."""
    run = load.runs[0]
    point, pieces, left, right, strip = run.point, run.point.timeline, LEFT, WIDTH - 14, 50
    end_s = pieces[-1].at_s + (pieces[1].at_s if len(pieces) > 1 else 0.1)
    x = _linear(0, end_s, left, right)

    def steps(values: Iterable[float]) -> list[tuple[float, float]]:
        edges = pairwise([*(piece.at_s for piece in pieces), end_s])
        return [(s, v) for edge, v in zip(edges, values, strict=True) for s in edge]

    lines = {
        "tokens/s": (steps(piece.tokens_s for piece in pieces), "a"),
        "in flight": (steps(piece.in_flight for piece in pieces), "b"),
        "watts": ([(s, w) for s, w in run.series.get("power_w", ()) if 0 <= s <= end_s], "a"),
    }
    waiting = steps(piece.waiting for piece in pieces)
    shown = {name: line for name, line in lines.items() if line[0]}
    lower = 20 + len(shown) * (strip + 18)

    def parts() -> Iterator[str]:
        begin, end = x(point.begin_s), x(point.begin_s + point.window_s)
        yield _box(begin, 18, end - begin, lower - 24, "band")
        yield _text(
            min(max((begin + end) / 2, left + 44), right - 44), 12, "steady window", "middle"
        )
        for n, (name, (line, kind)) in enumerate(shown.items(), 1):
            base = 14 + n * (strip + 18)
            top = _ticks(max(value for _, value in line))[-1]
            y = _linear(0, top, base, base - strip)

            def placed(
                values: Sequence[tuple[float, float]], y: Scale = y
            ) -> list[tuple[float, float]]:
                return [(x(s), y(v)) for s, v in values]

            if name == "tokens/s":
                yield _path(placed(line), "a-soft", base)
            if name == "in flight":
                yield _path(placed(waiting), "c", base)
                yield _text(left - 8, base - 4, "waiting", "end")
            else:
                yield _text(left - 8, base + 2, "0", "end")
            yield _path(placed(line), f"line {kind}-line") + _rule(left, base, right, base, "axis")
            yield _text(left - 8, base - strip + 9, f"{top:,g}", "end")
            yield _text(left - 8, base - strip + 26, name, "end strong")
        for tick in _ticks(end_s):
            if tick <= end_s:
                yield _text(x(tick), lower + 12, f"{tick:g}" + " s" * (tick == 0), "middle")

    title = f"{load.name}, run {run.repeat + 1} of {len(load.all_runs)}"
    note = f"{_number(point.tokens_s)} tokens/s in the window, {point.concurrency:.1f} in flight"
    return _figure(title, f"{note}.", lower + 18, parts())


# The table

Figure = Callable[[Point], float | None]
Cell = Callable[[_Load], str]


def _mean(value: Figure) -> Cell:
    """Say a mean over the runs, with half its 95 % interval where there is one."""

    def cell(load: _Load) -> str:
        found = load.mean(value)
        if found is None:
            return NONE
        half = f"{found.high - found.value:,.{_digits(found.value)}f}"
        some = f" <small>\N{PLUS-MINUS SIGN} {half}</small>" if half != "inf" else ""
        return _number(found.value) + some

    return cell


def _worst(value: Figure, say: Callable[[float | None], str] = _number) -> Cell:
    """Say the figure of the run in which it is furthest from 0: tails are never averaged."""
    return lambda load: say(max(load.each(value), key=abs, default=None))


def _least(value: Figure, say: Callable[[float | None], str] = _number) -> Cell:
    return lambda load: say(min(load.each(value), default=None))


def _p99(of: Callable[[Point], Spread]) -> Cell:
    """Say the worst run's p99, and that with failures as infinite where it differs."""

    def cell(load: _Load) -> str:
        plain = max(load.each(lambda p: of(p).percentiles["p99"]), default=None)
        failed = max(load.each(lambda p: of(p).tail["p99"]), default=None)
        return _number(plain) + (f" <small>{_number(failed)}</small>" if failed != plain else "")

    return cell


def _of_run(value: Callable[[Measurement], float | None]) -> Cell:
    """Say a mean of what was measured around the runs."""

    def cell(load: _Load) -> str:
        found = [each for run in load.runs if (each := value(run)) is not None]
        return _number(fmean(found)) if found else NONE

    return cell


def _attained(load: _Load) -> str:
    count, good = load.total(lambda p: p.requests), load.total(lambda p: p.good)
    share = stats.wilson(good, count)
    between = f"{100 * share.low:.0f}\N{EN DASH}{100 * share.high:.0f}"
    return f"{_percent(share.value)} <small>{between}</small>" if count else NONE


def _failed(load: _Load) -> str:
    return f"{load.total(lambda p: p.failed)} <small>of {load.total(lambda p: p.requests)}</small>"


def _judged(load: _Load) -> str:
    return f'<span class="{load.verdict}">{load.verdict}</span>'


def _valid(load: _Load) -> str:
    return f"{sum(not run.faults for run in load.all_runs)} <small>of {len(load.all_runs)}</small>"


def _error(load: _Load) -> str:
    errors = [run.calibration.receive_p99_ms for run in load.runs if run.calibration]
    itl = load.mean(lambda p: p.itl.mean)
    if not errors or not itl:
        return NONE
    return f"{_number(max(errors))} <small>{_percent(max(errors) / itl.value)}</small>"


ROWS: Mapping[str, Mapping[str, Cell]] = {
    "Throughput": {
        "output tokens/s": _mean(lambda p: p.tokens_s),
        "of the engine\N{RIGHT SINGLE QUOTATION MARK}s ceiling": lambda load: _percent(load.ratio),
        "decode alone, of the ceiling\N{RIGHT SINGLE QUOTATION MARK}s": lambda load: _percent(
            load.decode_ratio
        ),
        "prompt tokens/s": _mean(lambda p: p.prompt_tokens_s),
        "requests/s": _mean(lambda p: p.requests_s),
        "requests in flight": _mean(lambda p: p.concurrency),
    },
    "Latency, ms": {
        "TTFT p50": _mean(lambda p: p.ttft.p50),
        "TTFT p99": _p99(lambda p: p.ttft),
        "TTFT p99 from when due": _p99(lambda p: p.ttft_scheduled),
        "first answer token p50": _mean(lambda p: p.ttfa.p50),
        "ITL p50": _mean(lambda p: p.itl.p50),
        "ITL p99": _p99(lambda p: p.itl),
        "TPOT p50": _mean(lambda p: p.tpot.p50),
        "E2E p50": _mean(lambda p: p.e2e.p50),
        "E2E p99": _p99(lambda p: p.e2e),
        "stalls, of all gaps": _worst(lambda p: p.stalls, _percent),
    },
    "Target": {
        "requests within it": _attained,
        "goodput/s": _mean(lambda p: p.goodput_s),
        "failed": _failed,
        "verdict": _judged,
    },
    "Server": {
        "slots": lambda load: str(load.runs[0].slots or NONE),
        "requests deferred": _of_run(lambda run: run.span.deferred if run.span else None),
        "cached prompt tokens": _worst(lambda p: p.cached, _percent),
        "fairness (Jain)": _least(lambda p: p.fairness),
        "longest wait over shortest": _worst(lambda p: p.wait_ratio),
        "GPU power, W": _of_run(lambda run: run.span.power_w if run.span else None),
        "GPU memory, MiB": _of_run(lambda run: run.span.vram_mib if run.span else None),
        "J/token": _of_run(lambda run: run.joules_token),
    },
    "Why to believe it": {
        "valid runs": _valid,
        "client error p99, ms, of ITL": _error,
        "TTFT error p99, ms": _of_run(
            lambda run: run.calibration.ttft_p99_ms if run.calibration else None
        ),
        "client CPU per event, \N{MICRO SIGN}s": _of_run(
            lambda run: run.calibration.cpu_us if run.calibration else None
        ),
        "client CPU": _worst(lambda p: p.client_cpu, _percent),
        "kernel stamps": _least(lambda p: p.kernel, _percent),
        "reads that share a stamp": _worst(lambda p: p.coalesced, _percent),
        "event loop late p99, ms": _worst(lambda p: p.lag_p99),
        "sent late, ms": _worst(lambda p: p.client_queue.mean),
        "tokens counted by the server": _least(lambda p: p.exact, _percent),
        "tokens against usage": _worst(lambda p: p.usage_error, _percent),
        "tokens against /metrics": _worst(lambda p: p.metrics_error, _percent),
        "Little\N{RIGHT SINGLE QUOTATION MARK}s law": _worst(lambda p: p.little, _percent),
        "prefill less the server\N{RIGHT SINGLE QUOTATION MARK}s, ms": _worst(
            lambda p: p.prefill_residual.mean
        ),
        "decode less the server\N{RIGHT SINGLE QUOTATION MARK}s, ms": _worst(
            lambda p: p.decode_residual.mean
        ),
    },
}
"""What the table says, by heading; a row that is blank at every load is left out."""


def _table(summary: Summary, loads: Sequence[_Load]) -> str:
    if not loads:
        return ""
    body = ""
    for heading, rows in ROWS.items():
        body += f'<tr class="group"><th colspan="{len(loads) + 1}">{heading}</th></tr>'
        for name, cell in rows.items():
            cells = [cell(load) for load in loads]
            if set(cells) != {NONE}:
                told = "".join(f"<td>{each}</td>" for each in cells)
                body += f'<tr><th scope="row">{name}</th>{told}</tr>'
    note = (
        f"The target is {_percent(summary.slo.share)} of the requests with {summary.slo}, and is "
        "shown with its 95 % interval. \N{PLUS-MINUS SIGN} is half the 95 % interval over the "
        "runs; p99 is of the worst run, then with failures as infinite, where there were some."
    )
    names = "".join(f'<th scope="col">{load.name}</th>' for load in loads)
    return (
        f'<section><h2>Every load</h2><p class="soft">{escape(note)}</p><div class="wide">'
        f'<table aria-label="Every load"><thead><tr><td></td>{names}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _provenance(summary: Summary) -> str:
    origin = summary.provenance
    stand_in = ", a stand-in: random weights" if origin.stand_in else ""
    pairs = {
        "model": origin.model + stand_in,
        "GPU": f"{origin.gpu}, driver {origin.driver}" if origin.gpu else "none",
        "host": origin.host,
        "engine": origin.engine,
        "runtime": origin.runtime,
        "client": f"{origin.client}, Python {origin.python}",
        "commit": origin.commit or "unknown",
        "measured": summary.at,
        "load": ", ".join(f"{name} {_words(value)}" for name, value in summary.settings.items()),
        "server": ", ".join(
            f"{name.removeprefix('LLAMA_ARG_').lower()} {value}"
            for name, value in sorted(origin.server.items())
        )
        or "its settings are not known",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(words)}</dd>" for name, words in pairs.items())
    return (
        f"<section><h2>What was measured, and with what</h2><dl>{rows}</dl></section>"
        "<footer>TTFT: from the last byte of the request to the first token. ITL: gap between "
        "reads over their tokens. TPOT: first to last token over the tokens after the first read. "
        "E2E: to the last token. Throughput counts tokens stamped inside the steady window, never "
        "whole requests. A blank percentile has fewer samples than MLPerf asks for.</footer>"
    )


def _words(value: object) -> str:
    return "\N{EN DASH}".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
