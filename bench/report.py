"""Makes one HTML page of a summary, with nothing to load from anywhere and no script."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from bench import figures, loads, stats
from bench.analysis import Point
from bench.figures import NONE, digits, number, percent, words
from bench.loads import Load
from bench.results import Measurement, Provenance, Summary
from bench.stats import Spread

CSS = Path(__file__).with_name("report.css")
REASONS = 6
"""Kinds of reasons against the runs that are shown."""


def page(summary: Summary) -> str:
    """Return the page."""
    found = loads.of(summary)
    knee = loads.knee(found)
    parts = (
        _head(summary),
        _tiles(summary, found, knee),
        _figures([load for load in found if load.tokens.value], knee),
        _table(summary, found),
        _provenance(summary),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>Load test of {words(summary.provenance.model)}</title>\n"
        f"<style>\n{CSS.read_text()}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(parts)}\n</main>\n</body>\n</html>\n"
    )


def _head(summary: Summary) -> str:
    origin = summary.provenance
    faults = [fault for run in summary.measurements for fault in run.faults]
    validity = "VALID" if summary.measurements and not faults else "INVALID"
    line = summary.verdict or f"{validity}: {summary.interrupted or 'no verdict was given'}"
    said, _, reason = line.partition(": ")
    title = ", ".join(f'<span class="{word}">{word}</span>' for word in said.split(", "))
    when = summary.at[:16].replace("T", " ")
    what = words(f"Load test of {origin.model} on {origin.gpu or origin.host}, {when} UTC")
    parts = [
        f'<p class="eyebrow">{what}</p><h1>{title}</h1><p class="reason">{words(reason)}</p>',
        _random_weights(origin),
    ]
    if summary.interrupted and summary.interrupted not in line:
        parts.append(f'<p class="notice">It ended early: {words(summary.interrupted)}.</p>')
    if faults:
        kinds = [re.sub(r"[\d.]+", "", fault) for fault in faults]
        first = dict(reversed(list(zip(kinds, faults, strict=True))))
        items = "".join(
            f"<li>{words(first[kind])} <small>({count} of {len(summary.measurements)} runs)</small>"
            "</li>"
            for kind, count in Counter(kinds).most_common(REASONS)
        )
        parts.append(f'<div class="notice">Why runs are not valid, say:<ul>{items}</ul></div>')
    return f"<header>{''.join(parts)}</header>"


def _random_weights(origin: Provenance) -> str:
    if not origin.stand_in:
        return ""
    text = (
        "<strong>Random weights:</strong> its answers are noise, and its speed says nothing of "
        "the real model's."
    )
    if "stand-in" in origin.model:
        text = (
            "<strong>A stand-in was measured:</strong> random weights of the model's shape. Its "
            "speed and memory are the real file's; its answers are noise."
        )
    return f'<p class="notice">{text}</p>'.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")


def _tiles(summary: Summary, found: Sequence[Load], knee: Load | None) -> str:
    if not found:
        return ""
    best = max(found, key=lambda load: load.tokens.value)
    chosen = knee or best
    tiles = []
    if chosen.ratio is not None:
        others = [load for load in (found[0], found[-1]) if load.ratio and load is not chosen]
        also = "; ".join(f"{percent(load.ratio)} at {load.name}" for load in others)
        note = f"of the engine's own rate at {chosen.name}" + (f" ({also})" if also else "")
        tiles.append((percent(chosen.ratio), "", note))
    tiles.append((number(best.tokens.value), "tokens/s", f"output, the most, at {best.name}"))
    if ttft_ms := chosen.value(lambda p: p.ttft.mean):
        itl = number(chosen.value(lambda p: p.itl.mean))
        note = f"to the first token, then {itl} ms each; means at {chosen.name}"
        tiles.append((number(ttft_ms), "ms", note))
    passed = [load for load in found if load.verdict == "PASS"]
    big, _, unit = passed[-1].name.partition(" ") if passed else ("none", "", "")
    tiles.append((big, unit, f"{'is the most' if passed else 'of the loads'} with {summary.slo}"))
    cells = "".join(
        f"<div><b>{big} <small>{unit}</small></b><span>{words(note)}</span></div>"
        for big, unit, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _figures(known: Sequence[Load], knee: Load | None) -> str:
    if not known:
        return ""
    main = [figures.first_token(known), figures.between_tokens(known)]
    if len(known) > 1:
        main = [figures.throughput(known), figures.latency(known, knee), *main]
    return (
        f'<section class="figures">{"".join(main)}</section><section><h2>While it ran</h2>'
        f'<div class="figures">{"".join(map(figures.timeline, known))}</div></section>'
    )


Figure = Callable[[Point], float | None]
Cell = Callable[[Load], str]


def _mean(value: Figure) -> Cell:
    """Say a mean over the runs, with half its 95 % interval where there is one."""

    def cell(load: Load) -> str:
        found = load.mean(value)
        if found is None:
            return NONE
        half = f"{found.high - found.value:,.{digits(found.value)}f}"
        some = f" <small>\N{PLUS-MINUS SIGN} {half}</small>" if half != "inf" else ""
        return number(found.value) + some

    return cell


def _worst(value: Figure, say: Callable[[float | None], str] = number) -> Cell:
    """Say the figure of the run in which it is furthest from 0: tails are never averaged."""
    return lambda load: say(max(load.each(value), key=abs, default=None))


def _least(value: Figure, say: Callable[[float | None], str] = number) -> Cell:
    return lambda load: say(min(load.each(value), default=None))


def _p99(of: Callable[[Point], Spread]) -> Cell:
    """Say the worst run's p99, and that with failures as infinite where it differs."""

    def cell(load: Load) -> str:
        plain = max(load.each(lambda p: of(p).percentiles["p99"]), default=None)
        failed = max(load.each(lambda p: of(p).tail["p99"]), default=None)
        return number(plain) + (f" <small>{number(failed)}</small>" if failed != plain else "")

    return cell


def _of_run(value: Callable[[Measurement], float | None]) -> Cell:
    """Say a mean of what was measured around the runs."""

    def cell(load: Load) -> str:
        found = [each for run in load.runs if (each := value(run)) is not None]
        return number(fmean(found)) if found else NONE

    return cell


def _attained(load: Load) -> str:
    count, good = load.total(lambda p: p.requests), load.total(lambda p: p.good)
    share = stats.wilson(good, count)
    between = f"{100 * share.low:.0f}\N{EN DASH}{100 * share.high:.0f}"
    return f"{percent(share.value)} <small>{between}</small>" if count else NONE


def _failed(load: Load) -> str:
    return f"{load.total(lambda p: p.failed)} <small>of {load.total(lambda p: p.requests)}</small>"


def _wrong(load: Load) -> str:
    known = load.each(lambda p: p.wrong)
    answered = load.total(lambda p: p.requests - p.failed)
    return f"{sum(known):g} <small>of {answered}</small>" if known else NONE


def _judged(load: Load) -> str:
    return f'<span class="{load.verdict}">{load.verdict}</span>'


def _valid(load: Load) -> str:
    return f"{sum(not run.faults for run in load.all_runs)} <small>of {len(load.all_runs)}</small>"


def _error(load: Load) -> str:
    errors = [run.calibration.receive_p99_ms for run in load.runs if run.calibration]
    itl = load.mean(lambda p: p.itl.mean)
    if not errors or not itl:
        return NONE
    return f"{number(max(errors))} <small>{percent(max(errors) / itl.value)}</small>"


ROWS: Mapping[str, Mapping[str, Cell]] = {
    "Throughput": {
        "output tokens/s": _mean(lambda p: p.tokens_s),
        "of the engine's ceiling": lambda load: percent(load.ratio),
        "decode alone, of the ceiling's": lambda load: percent(load.decode_ratio),
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
        "stalls, of all gaps": _worst(lambda p: p.stalls, percent),
    },
    "Target": {
        "requests within it": _attained,
        "goodput/s": _mean(lambda p: p.goodput_s),
        "failed": _failed,
        "wrong answers": _wrong,
        "verdict": _judged,
    },
    "Server": {
        "slots": lambda load: str(load.runs[0].slots or NONE),
        "requests deferred": _of_run(lambda run: run.span.deferred if run.span else None),
        "cached prompt tokens": _worst(lambda p: p.cached, percent),
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
        "client CPU": _worst(lambda p: p.client_cpu, percent),
        "kernel stamps": _least(lambda p: p.kernel, percent),
        "reads that share a stamp": _worst(lambda p: p.coalesced, percent),
        "event loop late p99, ms": _worst(lambda p: p.lag_p99),
        "sent late, ms": _worst(lambda p: p.client_queue.mean),
        "tokens counted by the server": _least(lambda p: p.exact, percent),
        "tokens against usage": _worst(lambda p: p.usage_error, percent),
        "tokens against /metrics": _worst(lambda p: p.metrics_error, percent),
        "Little's law": _worst(lambda p: p.little, percent),
        "prefill less the server's, ms": _worst(lambda p: p.prefill_residual.mean),
        "decode less the server's, ms": _worst(lambda p: p.decode_residual.mean),
    },
}
"""What the table says, by heading; a row that is blank at every load is left out."""


def _table(summary: Summary, found: Sequence[Load]) -> str:
    if not found:
        return ""
    body = ""
    for heading, rows in ROWS.items():
        body += f'<tr class="group"><th colspan="{len(found) + 1}">{heading}</th></tr>'
        for name, cell in rows.items():
            cells = [cell(load) for load in found]
            if set(cells) != {NONE}:
                told = "".join(f"<td>{each}</td>" for each in cells)
                body += f'<tr><th scope="row">{words(name)}</th>{told}</tr>'
    note = (
        f"The target is {percent(summary.slo.share)} of the requests with {summary.slo}, and is "
        "shown with its 95 % interval. \N{PLUS-MINUS SIGN} is half the 95 % interval over the "
        "runs; p99 is of the worst run, then with failures as infinite, where there were some."
    )
    names = "".join(f'<th scope="col">{load.name}</th>' for load in found)
    return (
        f'<section><h2>Every load</h2><p class="soft">{words(note)}</p><div class="wide">'
        f'<table aria-label="Every load"><thead><tr><td></td>{names}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _provenance(summary: Summary) -> str:
    origin = summary.provenance
    pairs = {
        "model": origin.model + (", random weights" if origin.stand_in else ""),
        "GPU": f"{origin.gpu}, driver {origin.driver}" if origin.gpu else "none",
        "host": origin.host,
        "engine": origin.engine,
        "runtime": origin.runtime,
        "client": f"{origin.client}, Python {origin.python}",
        "commit": origin.commit or "unknown",
        "measured": summary.at,
        "load": ", ".join(f"{name} {_plain(value)}" for name, value in summary.settings.items()),
        "server": ", ".join(
            f"{name.removeprefix('LLAMA_ARG_').lower()} {value}"
            for name, value in sorted(origin.server.items())
        )
        or "its settings are not known",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{words(value)}</dd>" for name, value in pairs.items())
    return (
        f"<section><h2>What was measured, and with what</h2><dl>{rows}</dl></section>"
        "<footer>TTFT: from the last byte of the request to the first token. ITL: gap between "
        "reads over their tokens. TPOT: first to last token over the tokens after the first read. "
        "E2E: to the last token. Throughput counts tokens stamped inside the steady window, never "
        "whole requests. A blank percentile has fewer samples than MLPerf asks for.</footer>"
    )


def _plain(value: object) -> str:
    return "\N{EN DASH}".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
