"""Operate the deployment: values become words here, a StackError two lines and an exit code."""

import contextlib
import functools
import inspect
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task as invoke_task

if TYPE_CHECKING:
    from bench.loadtest import Finished
    from stack.config import Project, Service
    from stack.fit import Planned
    from stack.hub import Fetched
    from stack.integrity import Listed
    from stack.runtime import Progress, Runtime, State, Up

ROOT = Path(__file__).parent
INTERRUPTED = 130
BRIEF_S = 2
DRAWN_S = 0.1
MANY = 1_000_000
WIDTH = 25
LEDGER = {
    "weights_mib": "weights",
    "cache_mib": "cache",
    "compute_mib": "compute buffer",
    "runtime_mib": "CUDA's own",
    "total_mib": "needed",
}
HELP = {
    "a": "a summary.json of a load test, the new one",
    "arch": "CUDA architectures to compile for, as CMake names them: 120a-real;90a-real, or host",
    "arrivals": "how requests come at a --rate: poisson, constant or ramp",
    "attach": "the URL of a server that runs already, instead of one of our own",
    "b": "the one that it is compared with",
    "baseline": "a summary.json that nothing may be worse than",
    "ceiling": "do not measure what the engine does without a server",
    "clients": "how many at once, each sending when its last answer has ended: 1,4,16,64",
    "context": "tokens of context, in place of GLM_CONTEXT",
    "docker": "insist on Docker",
    "in-container": "with the Python of a container, as `docker compose run --rm models` does",
    "duration": "seconds of each run, after its warm-up",
    "follow": "keep showing new lines until Ctrl-C",
    "goodput": "look for the most clients, or multiples of --rate, that meet the SLO",
    "json": "print JSON",
    "key-file": "the attached server's key",
    "message": "the question",
    "native": "run the engine as a plain process",
    "out": "a folder for records, summary and report",
    "output": "tokens of an answer, or from-to",
    "prompt": "tokens of a prompt, or from-to",
    "prompts": "cold, shared (a common prefix of --shared tokens) or turns (of a conversation)",
    "prune": "list, then remove, partial files and files fetched here that are not locked",
    "quant": "a quant of compose.yaml, the default one if none is given; may be repeated",
    "rate": "requests a second, in place of --clients: 0.5,1,2",
    "repeat": "runs of each load, in random order",
    "seed": "of lengths, arrivals and the order of runs",
    "shared": "tokens of the common prefix",
    "slo": "the target: ttft=500,tpot=30 (ms), and share=0.95",
    "slots": "requests at the same time, in place of GLM_SLOTS",
    "stand-in": "use random weights of the model's full shape, made here, instead of its file",
    "sweep": "double the clients from 1 until the knee is behind",
    "tokens": "the most tokens to answer with",
    "turns": "turns of a conversation",
    "update": "move the lock to the newest commit of the repository",
    "verify": "hash every locked file",
    "warmup": "seconds of load before each run counts",
    "with-model": "a quant of which to make an image that holds its model too",
}


def task(function: Callable[..., None]) -> Any:
    """Make a task: options described by HELP, errors and Ctrl-C turned into an exit code."""

    @functools.wraps(function)
    def body(*args: Any, **kwargs: Any) -> None:
        from stack.errors import StackError

        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("stack").setLevel(logging.INFO)
        try:
            function(*args, **kwargs)
        except StackError as error:
            raise Exit(str(error), error.code) from None
        except KeyboardInterrupt:
            raise Exit("Interrupted; what was begun is undone.", INTERRUPTED) from None

    names = inspect.signature(function).parameters
    options = {name.replace("_", "-") for name in names}
    return invoke_task(
        body,
        help={option: text for option, text in HELP.items() if option in options},
        iterable=["quant"] if "quant" in names else [],
        positional=[name for name in ("message", "a", "b") if name in names],
        auto_shortflags=False,
    )


@dataclass(frozen=True)
class Acting:
    """What an acting task works with while it holds the project's lock."""

    project: "Project"
    runtime: "Runtime"
    progress: "Progress"


@contextlib.contextmanager
def _acting(
    verb: str,
    *,
    native: bool = False,
    docker: bool = False,
    stand_in: bool = False,
    **settings: str,
) -> Iterator[Acting]:
    from stack import host, runtime
    from stack.errors import Code, StackError

    if native and docker:
        raise StackError("--native and --docker exclude each other.", "Give one.", Code.USAGE)
    want = "native" if native else "docker" if docker else None
    project = _project(stand_in=stand_in, **settings)
    with host.lock(project.state, verb=verb), _bars() as progress:
        yield Acting(project, runtime.choose(project, want=want, progress=progress), progress)


@contextlib.contextmanager
def _bars() -> "Iterator[Progress]":
    """Yield a callback that draws a bar on standard error for each thing it hears of.

    Where that is no terminal, what takes over two seconds gets a line at each tenth instead.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        shown: dict[str, Shown] = {}

        @functools.cache
        def bars() -> Progress:
            amount = TextColumn("{task.fields[amount]}")
            columns = ("{task.description}", BarColumn(), amount, TimeRemainingColumn())
            return stack.enter_context(Progress(*columns, console=console))

        def show(what: str, done: int, total: int) -> None:
            now = time.monotonic()
            each = shown.setdefault(what, Shown(now, done))
            if now - each.drawn < DRAWN_S and done < total:
                return
            each.drawn = now
            amount = each.amount(done, total)
            if console.is_terminal:
                if each.row is None:
                    each.row = bars().add_task(what, amount="")
                bars().update(each.row, completed=done, total=total, amount=amount)
            elif (tenth := 10 * done // total) > each.tenth:
                each.tenth = tenth
                if now - each.begun > BRIEF_S:
                    console.print(f"{what}: {amount}{each.left(done, total)}", highlight=False)

        yield show


@dataclass
class Shown:
    """What was shown of a thing in progress; `before` was done when it was first heard of."""

    begun: float
    before: int
    drawn: float = 0
    tenth: int = 0
    row: Any = None

    def _rate(self, done: int) -> float:
        return (done - self.before) / max(time.monotonic() - self.begun, DRAWN_S)

    def amount(self, done: int, total: int) -> str:
        """Say how much is done; a total of millions can only be bytes, which have a rate."""
        percent = f"{100 * done // total} %"
        if total < MANY:
            return percent
        rate = f"{self._rate(done) / 1e6:.0f} MB/s"
        return f"{percent}, {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate}"

    def left(self, done: int, total: int) -> str:
        """Say how long the rest will take, where it is bytes."""
        if total < MANY or done == total or (rate := self._rate(done)) <= 0:
            return ""
        minutes, seconds = divmod(int((total - done) / rate), 60)
        return f", {minutes}:{seconds:02} left"


def _project(*, stand_in: bool = False, **settings: str) -> "Project":
    """Read the project; settings of the command line, unless empty, win over .env."""
    from stack import config

    given = {name: value for name, value in settings.items() if value}
    project = config.load(ROOT, given=given)
    if stand_in:
        return config.load(ROOT, given=given, overrides=config.stand_ins(project))
    return project


def _services(project: "Project", quant: list[str]) -> "list[Service]":
    return [project.service(name) for name in dict.fromkeys(quant or [project.default])]


def _tell_up(up: "Up") -> None:
    from stack import runtime

    state, service = runtime.state(up.server), up.server.service
    served = (state.model, state.context, state.slots)
    if served != (service.model_file.name, service.context, service.slots):
        logging.getLogger("stack").warning("It was started with other settings; down and up again.")
    how = "was up already" if up.was_up else f"is up, loaded in {up.ready_s:.1f} s"
    print(f"{service.name} ({state.runtime}) {how} and generates.")
    print(f"  URL      {state.url}/v1")
    print(f"  key      in {service.key_file}")
    print(f"  model    {service.alias}: {state.model}")
    print(f"  context  {state.context:,} tokens, {state.slots} slots")
    print(
        f"  speed    {up.first.decode_tokens_s:.0f} tokens/s, one client, {up.first.tokens} tokens"
    )
    option = f" --quant {service.quant}"
    print("Next:")
    for command in (f"ask 'hello'{option}", "status", f"down{option}"):
        print(f"  uv run invoke {command}")


def _json(values: list[dict[str, Any]]) -> str:
    return json.dumps(values, indent=1)


def _plain(each: "Planned") -> dict[str, Any]:
    return {
        "quant": each.ledger.service.quant,
        "model": each.file,
        **{name: getattr(each.ledger, name) for name in LEDGER},
        "sources": dict(each.ledger.sources),
        "free_mib": each.free_mib,
        "largest_context": each.largest_context,
    }


def _ledger(planned: "tuple[Planned, ...]") -> Any:
    from rich.table import Table

    columns = ("MiB", *(each.ledger.service.quant for each in planned))
    table = Table(*columns, box=None, pad_edge=False)
    for name, label in LEDGER.items():
        figures = (f"{getattr(each.ledger, name):,}" for each in planned)
        source = planned[0].ledger.sources.get(name, "") if planned else ""
        table.add_row(f"{label}{source and f' ({source})'}", *figures)
    free = ("no GPU" if p.free_mib is None else f"{p.free_mib:,}" for p in planned)
    table.add_row("free now", *free)
    most = (f"{p.largest_context:,}" if p.largest_context else "" for p in planned)
    table.add_row("largest context", *most)
    table.add_row("model", *(each.file for each in planned))
    return table


def _table(states: "tuple[State, ...]") -> Any:
    from rich.table import Table

    columns = ("quant", "runtime", "state", "URL", "context", "slots", "model")
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column != "model")
    for each in states:
        numbers = (f"{each.context:,}", str(each.slots)) if each.context else ("", "")
        where = (each.quant, each.runtime, f"{each.state} {each.detail}".strip(), each.url)
        table.add_row(*where, *numbers, each.model)
    return table


@task
def build(
    _: Context,
    quant: list[str],
    native: bool = False,
    docker: bool = False,
    arch: str = "",
    with_model: str = "",
) -> None:
    """Build the engine, as an image, with its model if asked, or natively."""
    from stack import gpu, runtime

    arch = gpu.architectures() if arch == "host" else arch
    docker = docker or bool(with_model)
    with _acting("build", native=native, docker=docker, GLM_CUDA_ARCH=arch) as act:
        for service in _services(act.project, quant) if quant or not with_model else ():
            runtime.build(act.runtime, act.project, service, progress=act.progress)
            print(f"{service.backend} engine b{act.project.engine.build} is built.")
        if with_model:
            service = act.project.service(with_model)
            command = runtime.include_model(act.project, service, progress=act.progress)
            print(f"{command[-1]} holds {service.model_file.name} and serves without a volume:")
            print(f"  {shlex.join(command)}")


@task
def plan(
    _: Context,
    quant: list[str],
    context: str = "",
    slots: str = "",
    stand_in: bool = False,
    json: bool = False,
) -> None:
    """Show what quants will take of the GPU, against what is free now."""
    from rich.console import Console

    from stack import fit

    project = _project(stand_in=stand_in, GLM_CONTEXT=context, GLM_SLOTS=slots)
    services = [each for each in _services(project, quant or list(project.services)) if each.gpus]
    planned = fit.plans(services)
    if json:
        print(_json([_plain(each) for each in planned]))
    else:
        Console().print(_ledger(planned))
    fit.check_together(planned)


@task
def model(_: Context, quant: list[str], stand_in: bool = False) -> None:
    """Make a model of random weights where its file is missing, and check the file."""
    from stack import runtime

    with _acting("model", native=True, stand_in=stand_in) as act:
        for service in _services(act.project, quant):
            runtime.ensure_model(act.project, service, stand_in=stand_in, progress=act.progress)
            print(f"{service.model_file} is there and whole.")


@task
def download(
    _: Context, quant: list[str], update: bool = False, in_container: bool = False
) -> None:
    """Fetch models from the hub, as locked: resumed, verified, put in place whole."""
    from stack import integrity
    from stack.errors import Code, StackError

    project = _project()
    if not quant:
        known = ", ".join(name for name, each in project.services.items() if each.model.repository)
        raise StackError("No quant is named.", f"Give --quant: {known}.", Code.USAGE)
    services = _services(project, quant)
    if in_container:
        _download_in_container(project, services, update=update)
        return
    if not update and all(map(integrity.is_verified, services)):
        for service in services:
            print(f"{service.model_file} is complete and verified.")
        return
    from stack import hub

    with _bars() as progress, _kept():
        done = hub.download(services, update=update, progress=progress)
    for each in done:
        _tell_fetched(each)


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Exit("Interrupted; the same command goes on from here.", INTERRUPTED) from None


def _download_in_container(project: "Project", services: "list[Service]", *, update: bool) -> None:
    from huggingface_hub import get_token

    from stack import integrity
    from stack.compose import Docker
    from stack.errors import Code, StackError

    arguments = [*(service.quant for service in services), *(["--update"] if update else [])]
    services[0].models_folder.mkdir(parents=True, exist_ok=True)  # or Docker has nothing to mount
    with _kept():
        status = Docker(project).download(*arguments, token=get_token())
    if status:
        raise Exit(code=status)  # it has said why
    for service in services:
        if not integrity.is_verified(service):
            raise StackError(
                f"The container calls it a success, but {service.model_file} is not verified.",
                "Read its words above; or try without --in-container.",
                Code.DOWNLOAD,
            )


def _tell_fetched(each: "Fetched") -> None:
    from rich.console import Console
    from rich.table import Table

    files, gb = each.service.model_file, f"{each.fetched_bytes / 1e9:.2f} GB"
    print(f"{files} is complete and verified; {gb} were fetched.")
    if each.before in ((), each.files):
        print(f"It is locked to revision {each.files[0].revision}.")
        return
    before = {entry.file: asdict(entry) for entry in each.before}
    for entry in each.files:
        table = Table("", "was", "is", box=None, pad_edge=False)
        old = before.get(entry.file, {})
        for name, new in asdict(entry).items():
            if name not in ("file", "repository"):
                table.add_row(f"  {name}", str(old.get(name, ""))[:WIDTH], str(new)[:WIDTH])
        print(f"The lock of {entry.file} moved:")
        Console().print(table)


@task
def models(_: Context, verify: bool = False, prune: bool = False, json: bool = False) -> None:
    """Show the model files: what is here, locked, verified."""
    from rich.console import Console

    from stack import integrity
    from stack.errors import Code, StackError

    project = _project()
    if prune:
        _prune(project)
    with _bars() as progress:
        listed = integrity.listing(project.services.values(), verify=progress if verify else None)
    if json:
        print(_json([asdict(each) for each in listed]))
    else:
        Console().print(_models_table(listed))
    wrong = [each for each in listed if verify and each.state == "mismatch"]
    if wrong:
        raise StackError(
            f"{', '.join(each.file for each in wrong)}: not what models.lock says.",
            f"uv run invoke download --quant {wrong[0].quant}, which replaces it.",
            Code.INTEGRITY,
        )


def _models_table(listed: "tuple[Listed, ...]") -> Any:
    from rich.table import Table

    table = Table("quant", "file", "bytes", "locked to", "state", box=None, pad_edge=False)
    for each in listed:
        size = "" if each.size is None else f"{each.size:,}"
        table.add_row(each.quant, each.file, size, each.revision[:12], each.state)
    return table


def _prune(project: "Project") -> None:
    from stack import host, integrity

    folder, verb = project.service(project.default).models_folder, "models --prune"
    with host.lock(project.state, verb=verb), integrity.exclusive(folder, verb=verb):
        paths = integrity.leftovers(folder)
        for path in paths:
            print(f"{path} ({path.stat().st_size / 1e9:.2f} GB)")
        for path in paths:
            path.unlink()


@task
def key(_: Context, quant: list[str]) -> None:
    """Make the API key where there is none, and say where it is."""
    from stack import keys

    for service in _services(_project(), quant):
        keys.make(service)
        keys.read(service)
        print(service.key_file)


@task
def up(
    _: Context,
    quant: list[str],
    native: bool = False,
    docker: bool = False,
    stand_in: bool = False,
) -> None:
    """Serve quants: make what is missing, start, wait, and see them generate."""
    from stack import runtime

    with _acting("up", native=native, docker=docker, stand_in=stand_in) as act:
        for service in _services(act.project, quant):
            done = runtime.up(
                act.runtime, act.project, service, stand_in=stand_in, progress=act.progress
            )
            try:
                _tell_up(done)
            except KeyboardInterrupt:  # too late to undo it; a second one ends the next quant
                print(f"{service.name} is up.")


@task
def down(_: Context, quant: list[str]) -> None:
    """Stop quants, all of them if none is named."""
    from stack import host, runtime

    project = _project()
    with host.lock(project.state, verb="down"):
        runtimes = runtime.present(project)
        for service in _services(project, quant or list(project.services)):
            for name in runtime.down(service, runtimes):
                print(f"{service.name} ({name}) is stopped.")
    print("Nothing runs." if not quant else "Done.")


@task
def status(_: Context, json: bool = False) -> None:
    """Show what each quant is doing."""
    from rich.console import Console

    from stack import runtime

    states = runtime.states(_project())
    if json:
        print(_json([asdict(each) for each in states]))
    else:
        Console().print(_table(states))


@task
def logs(_: Context, quant: list[str], follow: bool = False) -> None:
    """Show the last lines of the servers' logs."""
    from stack import runtime

    project = _project()
    runtimes = runtime.present(project)
    for service in _services(project, quant or list(project.services)):
        for where, server in runtime.servers_of(service, runtimes):
            if follow:
                with contextlib.suppress(KeyboardInterrupt):  # the way to end it
                    where.follow(service)
            else:
                print(server.logs(200))


@task
def ask(_: Context, message: str, quant: list[str], tokens: int = 256) -> None:
    """Ask a running server a question and stream its answer."""
    from stack import client, runtime

    server = runtime.running(_project(), quant[0] if quant else None)
    for part in client.stream(server, message, tokens=tokens):
        if isinstance(part, str):
            print(part, end="", flush=True)
        else:
            print(f"\n{part.tokens} tokens at {part.decode_tokens_s:.1f} tokens/s", file=sys.stderr)


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
        slo=slo,
        seed=seed,
        ceiling=ceiling,
    )
    old = results.read(Path(baseline)) if baseline else None
    project = _project(stand_in=stand_in, GLM_CONTEXT=context, GLM_SLOTS=slots)
    service = _services(project, quant)[0]
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
        print(_json([told]))
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
        print(_json([asdict(each) for each in changes]))
    else:
        Console().print(board.compared(changes))
    if worse := [each for each in changes if each.verdict == "worse"]:
        cause = f"{len(worse)} of {len(changes)} figures are worse than in {b}."
        raise StackError(cause, "See the rows above.", Code.MISSED)
