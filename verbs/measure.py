"""Load test, and compare load tests."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from invoke.context import Context
from invoke.exceptions import Exit

from verbs.terminal import ROOT, acting, dump, read_project, select, task

if TYPE_CHECKING:
    from bench.loadtest import Finished
    from bench.tune import Tuned


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
def tune(
    _: Context,
    quant: list[str],
    clients: str = "",
    budget: str = "20m",
    shape: str = "chat",
    slo: str = "",
    replace: bool = False,
    native: bool = False,
    docker: bool = False,
    stand_in: bool = False,
    json: bool = False,
) -> None:
    """Measure which settings serve so many clients best here; `up` then takes them."""
    from bench import tune as tuning

    with acting("tune", native=native, docker=docker, stand_in=stand_in) as act:
        project = act.project
        clients = clients or f"1,{project.clients}"
        ask = tuning.parse(clients=clients, budget=budget, shape=shape, slo=slo)
        found, path = tuning.tune(
            project,
            select(project, quant)[0].quant,
            ask,
            want=act.runtime.name,
            stand_in=stand_in,
            replace_running=replace,
            progress=act.progress,
        )
    if json:
        print(dump([{**asdict(found), "profile": str(path)}]))
    else:
        _tell_tuned(found, path)


def _tell_tuned(found: "Tuned", path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = {trial.candidate: trial for trial in found.trials}
    best = rows[found.winner]
    counts = [f"{n} client{'s' * (n > 1)}" for n in found.clients]
    table = Table(
        "candidate", *counts, "score", "tokens each", "ready s", "", box=None, pad_edge=False
    )
    for name in [*found.scores, *(name for name in rows if name not in found.scores)]:
        trial = rows[name]
        score = f"{found.scores[name]:,.0f}" if name in found.scores else ""
        rates = {run.clients: f"{run.tokens_s:,.0f}" for run in trial.runs}
        context = f"{trial.context:,}" if trial.context else ""
        ready = "" if trial.ready_s is None else f"{trial.ready_s:.1f}"
        above = found.scores.get(name, 0) > found.scores[found.winner]
        word = "best" if name == found.winner else "too little, or not each time" if above else ""
        table.add_row(
            name,
            *(rates.get(n, "") for n in found.clients),
            score,
            context,
            ready,
            trial.failed or word,
        )
    Console().print(table)
    print("Output tokens a second in each candidate's longest run; the score is of all its runs.")
    if found.left_out:
        print(f"Not reached within the budget: {', '.join(found.left_out)}.")
    if found.ceiling:
        shares = (f"{100 * part:.0f} % at {n}" for n, part in found.of_engine.items())
        print(f"The best decodes, of what the engine does without a server: {', '.join(shares)}.")
    else:
        print(f"The engine was not measured without a server: {found.no_ceiling}")
    if found.slo:
        met = (f"{run.good} of {run.requests} answers at {run.clients}" for run in best.runs)
        print(f"{found.slo}: met by {', '.join(met)}.")
    if found.starts:
        took = ", ".join(f"{mode} {seconds:.1f} s" for mode, seconds in found.starts.items())
        taken = next((value for value in found.settings.values() if value in found.starts), "auto")
        print(f"Ready from a cold file: {took}; the profile has {taken}.")
    gain = "" if found.gain is None else f", {found.gain:.2f} x what is chosen untuned"
    print(f"Best: {found.winner}{gain}.")
    if sum(trial.candidate == found.winner for trial in found.trials) == 1:
        print("It was measured once: a longer --budget, which goes on from here, would make sure.")
    print(f"{path}; `invoke up --clients {max(found.clients)}` takes it.")


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
