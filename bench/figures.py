"""The figures of the report, as SVG of one width and one left edge, coloured by report.css."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import pairwise

from bench.analysis import BINS
from bench.loads import Load

WIDTH = 480
LEFT = 84
"""Where what is drawn begins, right of its labels."""
FOOT = 220
"""The lower edge of what is drawn, in the two large ones."""
ROW = 36
STRIP = 50
NONE = "\N{EN DASH}"
Place = tuple[float, float]
Scale = Callable[[float], float]


def words(text: str) -> str:
    """Return text as HTML, with typographer's apostrophes."""
    return escape(text, quote=False).replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")


def number(value: float | None, unit: str = "") -> str:
    """Say a figure with three digits that count."""
    if value is None or math.isnan(value):
        return NONE
    return "\N{INFINITY}" if math.isinf(value) else f"{value:,.{digits(value)}f}{unit}"


def digits(value: float) -> int:
    """Return how many decimals make three digits that count."""
    size = abs(value)
    return 0 if size >= 100 or value == 0 else 1 if size >= 10 else 2 if size >= 0.1 else 3


def percent(value: float | None) -> str:
    """Say a share."""
    return NONE if value is None else f"{100 * value:.{0 if abs(value) >= 0.1 else 1}f} %"


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{words(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _box(x: float, y: float, width: float, height: float, kind: str) -> str:
    size = f'width="{width:.1f}" height="{height:.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} class="{kind}"/>'


def _dot(x: float, y: float, kind: str = "a dot", radius: float = 4.5) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{kind}"/>'


def _path(places: Sequence[Place], kind: str, base: float | None = None) -> str:
    """Draw a line, or the area between it and `base`."""
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


def _steps(edges: Sequence[float], values: Iterable[float]) -> list[Place]:
    """Return the outline of bars between edges."""
    return [(x, y) for pair, y in zip(pairwise(edges), values, strict=True) for x in pair]


def _figure(title: str, note: str, height: float, parts: Iterable[str]) -> str:
    head = f"<figcaption><h2>{words(title)}</h2><p>{words(note)}</p></figcaption>"
    svg = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return f"<figure>{head}{svg}{''.join(parts)}</svg></figure>"


def _unit(loads: Sequence[Load]) -> str:
    return "clients" if loads[0].closed else "requests/s"


def _row_name(load: Load) -> str:
    return load.name if load.closed else f"{load.level:g}/s"


def throughput(loads: Sequence[Load]) -> str:
    """Draw output tokens/s against the load, below the engine's ceiling; doublings are even."""
    right, tops = WIDTH - 62, [load for load in loads if load.top]
    ticks = _ticks(max(rate for load in loads for rate in (load.top or 0, load.tokens.value)))
    y = _linear(0, ticks[-1], FOOT, 14)
    log = _linear(math.log(loads[0].level), math.log(loads[-1].level), LEFT + 24, right - 8)
    at = {load.level: log(math.log(load.level)) for load in loads}
    engine = [(at[load.level], y(load.top or 0)) for load in tops]
    served = [(at[load.level], y(load.tokens.value)) for load in loads]

    def parts() -> Iterator[str]:
        for tick in ticks:
            yield _rule(LEFT, y(tick), right, y(tick))
            yield _text(LEFT - 8, y(tick) + 4, number(tick), "end")
        yield _path(engine, "line c-line") + _path(served, "line a-line")
        label, last = served[-1][1] + 4, -math.inf
        if engine:
            yield _text(right, engine[-1][1] + 4, "ceiling")
            yield _text(LEFT - 8, FOOT + 38, "of ceiling", "end strong")
            label = max(label, engine[-1][1] + 20)
        yield _text(right, label, "served", "strong")
        yield _text(LEFT - 8, FOOT + 20, _unit(loads), "end")
        for load, (x, mean) in zip(loads, served, strict=True):
            if math.isfinite(load.tokens.high):
                low, high = max(0, load.tokens.low), min(ticks[-1], load.tokens.high)
                yield _rule(x, y(low), x, y(high), "axis")
            yield _dot(x, mean)
            if x - last >= 34:
                last = x
                yield _text(x, FOOT + 20, f"{load.level:g}", "middle")
                if engine:
                    yield _text(x, FOOT + 38, percent(load.ratio), "middle strong")

    note = "Output tokens/s at each load"
    note += "; bars are 95 % intervals." if any(len(load.runs) > 1 for load in loads) else "."
    if engine:
        note = f"{note[:-1]}. The ceiling is llama-batched-bench: same build, model, settings."
    return _figure("Throughput", note, FOOT + (46 if engine else 28), parts())


def latency(loads: Sequence[Load], knee: Load | None) -> str:
    """Draw what latency a throughput costs, and the knee; a label that has no room is left out."""
    right = WIDTH - 24
    rates = _ticks(max(load.tokens.value for load in loads))
    times = _ticks(max(load.latency_ms for load in loads) / 1000)
    x, y = _linear(0, rates[-1], LEFT, right), _linear(0, times[-1], FOOT, 28)
    places = [(x(load.tokens.value), y(load.latency_ms / 1000)) for load in loads]

    def parts() -> Iterator[str]:
        for tick in times:
            yield _rule(LEFT, y(tick), right, y(tick))
            yield _text(LEFT - 8, y(tick) + 4, f"{tick:g}", "end")
        for tick in rates:
            yield _text(x(tick), FOOT + 20, number(tick), "middle")
        yield _text(right, FOOT + 38, "output tokens/s", "end")
        yield _path(places, "line a-line")
        labelled: list[Place] = []
        for load, (x1, y1) in sorted(zip(loads, places, strict=True), key=lambda p: p[0] != knee):
            yield _dot(x1, y1)
            if load is knee:
                yield _dot(x1, y1, "ring", 8.5) + _text(x1 - 10, y1 - 9, "knee", "end strong")
            elif all(abs(x1 - x2) > 44 or abs(y1 - y2) > 15 for x2, y2 in labelled):
                yield _text(x1 - 10, y1 - 9, f"{load.level:g}", "end")
            else:
                continue
            labelled.append((x1, y1))

    note = f"Mean E2E latency in seconds; the labels are {_unit(loads)}."
    if knee:
        note += f" The knee, {knee.level:g}, has the most throughput for its latency."
    return _figure("Latency against throughput", note, FOOT + 46, parts())


def first_token(loads: Sequence[Load]) -> str:
    """Draw where the time to the first token goes."""
    told = all(load.value(lambda p: p.prefill.mean) for load in loads)
    kinds = {"client": "c"} | ({"queue": "b", "prefill": "a"} if told else {"queue + prefill": "a"})

    def split(load: Load) -> list[float]:
        server = (
            [load.value(lambda p: p.queue.mean), load.value(lambda p: p.prefill.mean)]
            if told
            else [load.value(lambda p: p.ttft.mean)]
        )
        return [load.value(lambda p: p.client_queue.mean), *server]

    rows = [split(load) for load in loads]
    x = _linear(0, max(map(sum, rows)), LEFT, WIDTH - 96)

    def parts() -> Iterator[str]:
        for n, (name, kind) in enumerate(kinds.items()):
            yield _box(LEFT + 90 * n, 4, 11, 11, kind) + _text(LEFT + 90 * n + 17, 14, name)
        for n, (load, row) in enumerate(zip(loads, rows, strict=True)):
            begin, y = 0.0, 28 + n * ROW
            yield _text(LEFT - 10, y + 18, _row_name(load), "end")
            for part_ms, kind in zip(row, kinds.values(), strict=True):
                yield _box(x(begin), y, x(part_ms) - x(0), ROW - 10, kind)
                begin += part_ms
            ttft_ms = load.value(lambda p: p.ttft.mean)
            yield _text(x(begin) + 8, y + 18, number(ttft_ms, " ms"), "strong")

    note = "Means, from when the request was due; the figure is TTFT from its sending."
    if not told:
        note = "Means. This server's headers do not mark the end of its queue."
    return _figure("Time to the first token", note, 28 + ROW * len(rows), parts())


def between_tokens(loads: Sequence[Load]) -> str:
    """Draw the ITL of each load, one above the other, on one logarithmic axis."""
    right, foot = WIDTH - 122, 28 + ROW * len(loads)
    bins = [_bins(load) for load in loads]
    low, high = min(map(min, bins)), max(map(max, bins)) + 1
    spare = max(2, (BINS // 2 - (high - low)) // 2)
    low, high = low - spare, high + spare
    x = _linear(low, high, LEFT, right)

    def parts() -> Iterator[str]:
        yield _text(WIDTH - 62, 14, "p50", "end") + _text(WIDTH - 2, 14, "p99", "end")
        for exponent, lead in ((e, m) for e in range(-3, 6) for m in (1, 2, 5)):
            place = BINS * (exponent + math.log10(lead))
            if low <= place <= high and (lead == 1 or high - low < 2.4 * BINS):
                yield _rule(x(place), 22, x(place), foot)
                yield _text(x(place), foot + 17, f"{lead * 10.0**exponent:g}", "middle")
        yield _text(WIDTH - 2, foot + 17, "ms", "end")
        for n, (load, found) in enumerate(zip(loads, bins, strict=True), 1):
            base = 22 + ROW * n
            numbers = range(min(found), max(found) + 1)
            y = _linear(0, max(found.values()), base, base - ROW + 8)
            outline = _steps(
                [x(k) for k in (*numbers, numbers[-1] + 1)], [y(found[k]) for k in numbers]
            )
            yield _path(outline, "a-soft", base) + _path(outline, "line a-line")
            yield _rule(LEFT, base, right, base, "axis")
            yield _text(LEFT - 10, base - 4, _row_name(load), "end")
            p50 = load.value(lambda p: p.itl.p50) or None
            p99 = max(load.each(lambda p: p.itl.percentiles["p99"]), default=None)
            yield _text(WIDTH - 62, base - 4, number(p50), "end strong")
            yield _text(WIDTH - 2, base - 4, number(p99), "end strong")

    note = "ITL by token, all runs of a load together; p99 is of the worst run."
    return _figure("Time between tokens", note, foot + 24, parts())


def _bins(load: Load) -> Counter[int]:
    """Return tokens by the number of their bin, but for bins with less than one in 10,000."""
    found: Counter[int] = Counter()
    for run in load.runs:
        for bound, count in run.point.itl_histogram:
            found[round(BINS * math.log10(bound))] += count
    few = found.total() / 10_000
    return Counter({n: count for n, count in found.items() if count > few}) or Counter({0: 1})


def timeline(load: Load) -> str:
    """Draw the first run of a load: tokens/s, requests in flight and waiting, power."""
    run = load.runs[0]
    point, pieces, right = run.point, run.point.timeline, WIDTH - 14
    end_s = pieces[-1].at_s + (pieces[1].at_s if len(pieces) > 1 else 0.1)
    x = _linear(0, end_s, LEFT, right)
    edges = [*(piece.at_s for piece in pieces), end_s]
    waiting = _steps(edges, [piece.waiting for piece in pieces])
    strips = {
        "tokens/s": _steps(edges, [piece.tokens_s for piece in pieces]),
        "in flight": _steps(edges, [piece.in_flight for piece in pieces]),
        "watts": [(s, w) for s, w in run.series.get("power_w", ()) if 0 <= s <= end_s],
    }
    shown = {name: line for name, line in strips.items() if line}
    foot = 20 + len(shown) * (STRIP + 18)

    def strip(name: str, line: Sequence[Place], base: float) -> Iterator[str]:
        top = _ticks(max(value for _, value in line))[-1]
        y = _linear(0, top, base, base - STRIP)

        def placed(values: Sequence[Place]) -> list[Place]:
            return [(x(s), y(value)) for s, value in values]

        if name == "tokens/s":
            yield _path(placed(line), "a-soft", base)
        if name == "in flight":
            yield _path(placed(waiting), "c", base) + _text(LEFT - 8, base - 4, "waiting", "end")
        else:
            yield _text(LEFT - 8, base + 2, "0", "end")
        yield _path(placed(line), f"line {'b' if name == 'in flight' else 'a'}-line")
        yield _rule(LEFT, base, right, base, "axis")
        yield _text(LEFT - 8, base - STRIP + 9, f"{top:,g}", "end")
        yield _text(LEFT - 8, base - STRIP + 26, name, "end strong")

    def parts() -> Iterator[str]:
        begin, end = x(point.begin_s), x(point.begin_s + point.window_s)
        yield _box(begin, 18, end - begin, foot - 24, "band")
        middle = min(max((begin + end) / 2, LEFT + 44), right - 44)
        yield _text(middle, 12, "steady window", "middle")
        for n, (name, line) in enumerate(shown.items(), 1):
            yield from strip(name, line, 14 + n * (STRIP + 18))
        for tick in _ticks(end_s):
            if tick <= end_s:
                yield _text(x(tick), foot + 12, f"{tick:g}{'' if tick else ' s'}", "middle")

    title = f"{load.name}, run {run.repeat + 1} of {len(load.all_runs)}"
    note = f"{number(point.tokens_s)} tokens/s in the window, {point.concurrency:.1f} in flight."
    return _figure(title, note, foot + 18, parts())
