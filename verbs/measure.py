"""Load test, and compare load tests."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from invoke.context import Context
from invoke.exceptions import Exit

from verbs.terminal import ROOT, dump, read_project, select, task

if TYPE_CHECKING:
    from bench.loadtest import Finished


@task
def bench(
    _: Context,
    quant: list[str],
    clients: str = "1,2,4,8,16",
    rate: str = "",
    arrivals: str = "poisson",
    duration: float = 30.0,
    warmup: float = 3.0,
    repeat: int = 3,
    prompts: str = "cold",
    prompt: str = "96-160",
    output: str = "96-160",
    shared: int = 0,
    turns: int = 1,
    hang_up: int = 0,
    sweep: bool = False,
    goodput: bool = False,
    slo: str = "",
    seed: int = 0,
    baseline: str = "",
    out: str = "",
    ceiling: bool = True,
    native: bool = False,
    docker: bool = False,
    stand_in: bool = False,
    context: str = "",
    slots: str = "",
    attach: str = "",
    key_file: str = "",
    json: bool = False,
) -> None:
    """Load test a quant: throughput and latency, and how near the engine's own they are."""
    from bench import board, loadtest, results
    from stack import host, runtime
    from stack.errors import Code, StackError

    if native + docker + bool(attach) > 1 or sweep + goodput > 1:
        cause = "--native, --docker and --attach exclude one another, as do --sweep and --goodput."
        raise StackError(cause, "Give one.", Code.USAGE)
    plan = loadtest.parse(
        clients=clients,
        rate=rate,
        arrivals=arrivals,
        search="knee" if sweep else "goodput" if goodput else "",
        duration_s=duration,
        warmup_s=warmup,
        repeats=repeat,
        prompts=prompts,
        prompt=prompt,
        output=output,
        shared=shared,
        turns=turns,
        hang_up=hang_up,
        slo=slo,
        seed=seed,
        ceiling=ceiling,
    )
    old = results.read(Path(baseline)) if baseline else None
    project = read_project(stand_in=stand_in, GLM_CONTEXT=context, GLM_SLOTS=slots)
    service = select(project, quant)[0]
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{service.quant}"
    folder = Path(out) if out else project.state / "loadtest" / name
    with host.lock(project.state, verb="bench"), board.live() as watch:
        if attach:
            server = loadtest.attached(service, attach, Path(key_file) if key_file else None)
            summary = loadtest.measure(server, plan, root=ROOT, folder=folder, watch=watch)
        else:
            show = loadtest.progress(watch)
            want = "native" if native else "docker" if docker else None
            chosen = runtime.choose(project, want=want, progress=show)
            summary = loadtest.own(
                chosen,
                project,
                service,
                plan,
                folder=folder,
                stand_in=stand_in,
                progress=show,
                watch=watch,
            )
    done = loadtest.finish(summary, plan, folder, baseline=old)
    _tell_bench(done, folder, as_json=json)


def _tell_bench(done: "Finished", folder: Path, *, as_json: bool) -> None:
    from rich.console import Console

    from bench import board

    if as_json:
        told = {**asdict(done.said), "changes": list(map(asdict, done.changes)), "in": str(folder)}
        print(dump([told]))
    else:
        console = Console()
        console.print(board.measured(done.summary))
        if done.changes:
            console.print(board.compared(done.changes))
        print("TTFT and ITL are medians; engine and decode are served / the engine's own.")
        print(f"Report and records are in {folder}.\n{done.said}")
    if done.said.code:
        raise Exit(code=done.said.code)


@task
def compare(_: Context, a: str, b: str, json: bool = False) -> None:
    """Compare the summary.json of a load test, A, with an earlier one of the same machine, B."""
    from rich.console import Console

    from bench import board, results
    from stack.errors import Code, StackError

    changes = results.compare(results.read(Path(a)), results.read(Path(b)))
    if json:
        print(dump([asdict(each) for each in changes]))
    else:
        Console().print(board.compared(changes))
    if worse := [each for each in changes if each.verdict == "worse"]:
        cause = f"{len(worse)} of {len(changes)} figures are worse than in {b}."
        raise StackError(cause, "See the rows above.", Code.MISSED)
