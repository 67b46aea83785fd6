"""Lays a load test out for a terminal: while it runs, and what it measured. Words, no verdicts."""

import contextlib
import functools
import multiprocessing
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import IO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from bench import ceiling, results
from bench.loadtest import Now, Watch
from bench.results import Change, Measurement, Summary
from bench.telemetry import DEFERRED
from stack.gpu import Reading


@contextlib.contextmanager
def live() -> Iterator[Watch]:
    """Yield a callback that shows on standard error how a load test goes.

    A process of its own draws the table: that takes far longer than to send what is in it.
    Where there is no terminal, each run gets a line instead.
    """
    if not sys.stderr.isatty():
        yield functools.partial(_say, set(), sys.stderr)
        return
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_draw, args=(ours, theirs), daemon=True)
    process.start()
    theirs.close()

    def tell(now: Now) -> None:
        with contextlib.suppress(OSError):
            if select.select([], [ours], [], 0)[1]:  # a stopped terminal must not stop the test
                ours.send(now)

    try:
        yield tell
    finally:
        ours.close()
        process.join()


def _say(said: set[str], stream: IO[str], now: Now) -> None:
    name = _name(now)
    if name not in said:
        said.add(name)
        stream.write(f"{name}\n")
        stream.flush()


def _name(now: Now) -> str:
    if not now.snapshot:
        return now.stage
    return f"run {now.step}{f' of {now.steps}' if now.steps else ''}: {now.stage}"


def _draw(ours: Connection, theirs: Connection) -> None:
    ours.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before: Now | None = None
    console = Console(stderr=True)
    with (
        contextlib.suppress(EOFError, OSError),
        Live(console=console, auto_refresh=False, transient=True) as shown,
    ):
        while True:
            now: Now = theirs.recv()
            shown.update(going(now, before), refresh=True)
            before = now


def going(now: Now, before: Now | None) -> Table:
    """Lay out how a run goes, against half a second before."""
    columns = ("", "time", "streams", "tokens/s", "TTFT", "done", "errors", "waiting", "GPU")
    table = Table(*columns, box=None)
    run = now.snapshot
    if run is None:
        table.add_row(now.stage)
        return table
    last = before.snapshot if before and before.step == now.step else None
    span_s = run.elapsed_s - last.elapsed_s if last else 0
    rate = (run.events - last.events) / span_s if last and span_s > 0 else None
    waiting = now.sample.metrics.get(DEFERRED) if now.sample else None
    table.add_row(
        _name(now),
        f"{run.elapsed_s:.0f} s",
        str(run.streams),
        _figure(rate, ",.0f"),
        f"{_figure(run.ttft_ms, ',.0f')} ms",
        f"{run.finished:,}",
        ", ".join(
            [f"{count} {kind}" for kind, count in run.errors.items()]
            + [f"{run.wrong} wrong"] * bool(run.wrong)
        ),
        _figure(waiting, ".0f"),
        _gpu(now.reading),
    )
    return table


def _gpu(reading: Reading | None) -> str:
    units = {"utilisation_percent": "%", "power_w": "W", "used_mib": "MiB"}
    told = {unit: getattr(reading, name, None) for name, unit in units.items()}
    return ", ".join(f"{value:,.0f} {unit}" for unit, value in told.items() if value is not None)


def measured(summary: Summary) -> Table:
    """Lay out one row a run, the lightest load first, in 80 columns; the report has the rest."""
    columns = ("load", "tok/s", "TTFT ms", "ITL ms", "good/s", "wait", "engine", "decode", "tok/J")
    table = Table(*columns, "", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.no_wrap = True
    for load, runs in results.by_load(summary.measurements).items():
        for each in runs:
            table.add_row(results.name_of(load), *_row(each, summary))
    return table


def _row(each: Measurement, summary: Summary) -> Iterator[str]:
    point = each.point
    share = ceiling.share(point, each.slots, summary.ceiling)
    yield _figure(point.tokens_s, ",.1f")
    yield _figure(point.ttft.p50, ",.0f")
    yield _figure(point.itl.p50, ",.2f")
    yield _figure(point.goodput_s, ".2f")
    yield _figure(each.span.deferred if each.span else None, ".1f")
    yield _figure(share.whole if share else None, ".0%")
    yield _figure(share.decode if share else None, ".0%")
    yield _figure(each.joules_token and 1 / each.joules_token, ".2f")
    yield ", ".join(
        ["INVALID"] * bool(each.faults)
        + [f"{point.failed} failed"] * bool(point.failed)
        + ([] if point.wrong is None else [f"{point.wrong} wrong"])
    )


def compared(changes: Sequence[Change]) -> Table:
    """Lay out a comparison, one row a figure."""
    columns = ("load", "metric", "new / old", "95 % interval", "")
    table = Table(*columns, box=None, pad_edge=False)
    for each in changes:
        ratio = each.ratio
        interval = f"{ratio.low:.3f} to {ratio.high:.3f}"
        table.add_row(each.load, each.metric, f"{ratio.value:.3f}", interval, each.verdict)
    return table


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
