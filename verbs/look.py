"""Look at what runs."""

import contextlib
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from invoke.context import Context
from invoke.exceptions import Exit

from verbs.terminal import ROOT, dump, read_project, select, task

if TYPE_CHECKING:
    from stack.doctor import Finding
    from stack.status import State

COLOURS = {"ok": "green", "moot": "dim", "doubt": "yellow", "failure": "red"}
EVERY_S = 2
WIDTH = 100
UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@task
def status(_: Context, watch: bool = False, json: bool = False) -> None:
    """Show what each quant is doing: state, requests, speed, GPU memory, model, engine."""
    from rich.console import Console
    from rich.live import Live

    from stack.status import Looks

    project = read_project()
    looks = Looks(project)
    states = looks.all()
    if json:
        print(dump([asdict(each) for each in states]))
    elif watch:
        with contextlib.suppress(KeyboardInterrupt), Live(auto_refresh=False) as shown:
            while True:
                shown.update(screen(looks.all()), refresh=True)
                time.sleep(EVERY_S)
    else:
        Console(width=None if sys.stdout.isatty() else WIDTH).print(screen(states))


@task
def doctor(_: Context, quant: list[str], json: bool = False) -> None:
    """Look for what will keep quants from serving; exit 1 for doubts, 2 for failures."""
    from rich.console import Console

    from stack import doctor as examination

    findings = examination.examine(ROOT, quant)
    if json:
        print(dump([asdict(each) for each in findings]))
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDTH)
        console.print(report(findings))
    if status := examination.status(findings):
        raise Exit(code=status)


@task
def watch(
    _: Context,
    quant: list[str],
    interval: float = 5.0,
    limit: float = 60.0,
    budget: int = 3,
    once: bool = False,
    stand_in: bool = False,
) -> None:
    """Restart servers that crash or hang, within a budget, until Ctrl-C or SIGTERM."""
    import signal

    from bench.judge import Judge
    from stack import host
    from stack.watch import Limits, Watch

    project = read_project(stand_in=stand_in)
    services = select(project, quant or list(project.services))
    limits = Limits(stuck_s=limit, silent_s=limit, stall_s=2 * limit, budget=budget)
    asked: list[int] = []

    def end(number: int, _: object) -> None:
        # Python drops what is raised while it finalises an object: then the loop has to tell.
        asked.append(number)
        sys.unraisablehook = lambda _: None  # nor need anybody read of that
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
    with host.lock(project.state / "watch", verb="watch"):
        watching = Watch(project, services, limits, Judge(project))
        while not asked:
            gave_up = False
            for event in watching.look():
                gave_up |= "gave up" in event.what
                stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                print(f"{stamp} {event.quant} ({event.runtime}): {event.what}", flush=True)
            if once:
                raise Exit(code=int(gave_up))
            time.sleep(interval)
    raise KeyboardInterrupt


def report(findings: "tuple[Finding, ...]") -> Any:
    """Lay findings out: what was found, and below it the command that mends it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for each in findings:
        told = Text(each.evidence)
        if each.remedy:
            told.append(f"\n→ {each.remedy}", style="bold")
        word = {"ok": "ok", "moot": "-"}.get(each.severity, each.severity.upper())
        table.add_row(each.id, Text(word, style=COLOURS[each.severity]), told)
    return table


def screen(states: "tuple[State, ...]") -> Any:
    """Lay states out in 100 columns: what they do, what they serve, what is wrong."""
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    def table(*columns: str) -> Table:
        made = Table(box=None, pad_edge=False)
        for column in columns:
            made.add_column(column, overflow="fold", no_wrap=column not in ("model", "engine"))
        return made

    doing = table(
        *("quant", "runtime", "state", "slots", "queue", "tokens/s", "VRAM MiB", "up", "restarts"),
    )
    serving = table("quant", "URL", "context", "model", "engine")
    wrong = [f"{each.quant}: {each.detail}" for each in states if each.detail]
    for each in states:
        slots = f"{_known(each.running)}/{each.slots}" if each.slots else ""
        vram = f"{_known(each.vram_mib)}/{each.vram_plan_mib:,}" if each.vram_plan_mib else ""
        doing.add_row(
            *(each.quant, each.runtime, each.state, slots),
            *(_known(each.waiting), _known(each.tokens_s), vram),
            *(span(each.up_s), str(each.restarts) if each.runtime else ""),
        )
        if each.model:
            served = (f"{each.context:,}", f"{each.model}, {each.trust}")
            build, _, commit = each.engine.partition("-")
            serving.add_row(
                *(each.quant, each.url, *served, f"{build} {commit[:12]} in {each.image}")
            )
    parts: list[RenderableType] = [doing]
    parts += ["", serving] if serving.rows else []
    return Group(*parts, *(Text(line) for line in ["", *wrong] if wrong))


def _known(figure: float | None) -> str:
    return "" if figure is None else f"{figure:,.0f}"


def span(seconds: float | None) -> str:
    """Write a time in its two largest units: `3 h 5 min`."""
    if seconds is None:
        return ""
    words: list[str] = []
    left = int(seconds)
    for size, unit in UNITS:
        count, left = divmod(left, size)
        if count or (size == 1 and not words):
            words.append(f"{count} {unit}")
    return " ".join(words[:2])
