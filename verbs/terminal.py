"""What every task shares: its options and errors, the lock, progress bars."""

import contextlib
import errno
import functools
import inspect
import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.exceptions import Exit
from invoke.tasks import task as invoke_task

if TYPE_CHECKING:
    from stack.config import Project, Service
    from stack.runtime import Progress, Runtime

ROOT = Path(__file__).parent.parent
INTERRUPTED = 130
PIPE_CLOSED = 141
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
BARRED = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
BRIEF_S = 2
DRAWN_S = 0.1
MANY = 1_000_000
HELP = {
    "a": "a summary.json of a load test, the new one",
    "arch": "CUDA architectures to compile for, as CMake names them: 120a-real;90a-real, or host",
    "arrivals": "how requests come at a --rate: poisson, constant or ramp",
    "attach": "the URL of a server that runs already, instead of one of our own",
    "b": "the one that it is compared with",
    "baseline": "a summary.json that nothing may be worse than",
    "budget": "restarts within 15 minutes, before it gives up; of tune, the time for it: 20m, 90s",
    "ceiling": "do not measure what the engine does without a server",
    "clients": "how many at once: up chooses for them, bench and tune send as they would (1,4,16)",
    "context": "tokens of context, in place of GLM_CONTEXT",
    "docker": "insist on Docker",
    "host": "the name or address at which agents reach the server, asked there",
    "hang-up": "with questions: hang up on every so-manieth answer",
    "in-container": "with the Python of a container, as `docker compose run --rm models` does",
    "drain": "seconds that running requests get to end",
    "duration": "seconds of each run, after its warm-up",
    "follow": "keep showing new lines until Ctrl-C",
    "from": "the quant to replace, where several run",
    "goodput": "look for the most clients, or multiples of --rate, that meet the SLO",
    "interval": "seconds between looks",
    "json": "print JSON",
    "limit": "seconds without progress, or without an answer, before a restart",
    "key-file": "the attached server's key",
    "message": "the question",
    "native": "run the engine as a plain process",
    "once": "look once, for a timer; exit 1 where it gave up",
    "out": "a folder for records, summary and report",
    "output": "tokens of an answer, or from-to",
    "prompt": "tokens of a prompt, or from-to",
    "prompts": "cold, shared (a common prefix of --shared tokens), turns (of a conversation), or "
    "questions, whose answers are checked (on texts of --prompt tokens; one text with --shared)",
    "prune": "list, then remove, partial files and files fetched here that are not locked",
    "quant": "a quant of compose.yaml, the default one if none is given; may be repeated",
    "rate": "requests a second, in place of --clients: 0.5,1,2",
    "replace": "stop what runs for that time, and bring it back",
    "repeat": "runs of each load, in random order",
    "retire": "leave only the newest key valid, and restart what runs",
    "rotate": "put a new key before the old ones, which stay valid, and restart what runs",
    "same-port": "serve on the port of the one that goes, so that no client need change",
    "seed": "of lengths, arrivals and the order of runs",
    "shared": "tokens of the common prefix",
    "shape": "of traffic: chat, agent (long contexts that grow, their beginning cached) or mixed",
    "slo": "the target: ttft=500,tpot=30 (ms), and share=0.95",
    "slots": "requests at the same time, in place of GLM_SLOTS",
    "stand-in": "use random weights of the model's full shape, made here, instead of its file",
    "sweep": "double the clients from 1 until the knee is behind",
    "to": "the quant to serve; with update, a folder with llama.cpp, a release of its PyPI archive "
    "(0.3.36), or a ref of its git",
    "tokens": "the most tokens to answer with",
    "turns": "turns of a conversation",
    "update": "move the lock to the newest commit of the repository",
    "verify": "hash every locked file",
    "warmup": "seconds of load before each run counts",
    "watch": "show it anew every two seconds, until Ctrl-C",
    "write": "a file of OpenCode's configuration to merge it into",
    "with-model": "a quant of which to make an image that holds its model too",
    "yes": "remove it",
}


def task(function: Callable[..., None]) -> Any:
    """Make a task: options described by HELP, errors and Ctrl-C turned into an exit code."""
    signature = inspect.signature(function)
    names = signature.parameters

    @functools.wraps(function)
    def body(*args: Any, **kwargs: Any) -> None:
        from stack.errors import Code, StackError

        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        for name in ("stack", "bench"):
            logging.getLogger(name).setLevel(logging.INFO)
        if isinstance(sys.stdout, io.TextIOWrapper):  # models say what not every terminal can show
            sys.stdout.reconfigure(errors="replace")
        try:
            function(*args, **{name: given(function, names[name], kwargs[name]) for name in kwargs})
        except StackError as error:
            raise Exit(str(error), error.code) from None
        except BrokenPipeError:  # whoever read us, as `head` does, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise Exit(code=PIPE_CLOSED) from None
        except OSError as error:
            what = error.filename or "A file"
            if error.errno in FULL:
                said = f"{what} cannot be written: {error.strerror}.\n"
                raise Exit(said + "Free some space, or mend the file system.", Code.DISK) from None
            if error.errno in BARRED and error.filename:
                said = f"{what} cannot be used: {error.strerror}.\n"
                said += f"Mend its owner or mode; this is user {os.getuid()}."
                raise Exit(said, Code.HOST) from None
            raise
        except KeyboardInterrupt:
            raise Exit("Interrupted; what was begun is undone.", INTERRUPTED) from None

    # Invoke would read a number itself, and end in a traceback where it is none.
    read_here = [
        each.replace(default=str(each.default)) if type(each.default) in (int, float) else each
        for each in names.values()
    ]
    body.__signature__ = signature.replace(parameters=read_here)  # type: ignore[attr-defined]
    options = {spelt(name) for name in names}
    return invoke_task(
        body,
        help={option: text for option, text in HELP.items() if option in options},
        iterable=["quant"] if "quant" in names else [],
        positional=[name for name in ("message", "a", "b") if name in names],
        auto_shortflags=False,
    )


def spelt(name: str) -> str:
    """Return a parameter's name as the command line has it."""
    return name.strip("_").replace("_", "-")


def given(task: Callable[..., None], parameter: inspect.Parameter, value: Any) -> Any:
    """Return what a command line gave for a parameter of a task, numbers read from text.

    Raises:
        StackError: USAGE, for none where one is needed, and for what is no number from 0 on.

    """
    from stack.errors import Code, StackError

    option, kind = f"--{spelt(parameter.name)}", type(parameter.default)
    remedy = f"`invoke --help {task.__name__}` describes it."
    if value is None:
        raise StackError(f"{option} is missing.", remedy, Code.USAGE)
    if kind not in (int, float):
        return value
    with contextlib.suppress(ValueError):
        number = kind(value)
        if 0 <= number < math.inf:
            return number
    word = "whole number" if kind is int else "number"
    raise StackError(f"{option} must be a {word} from 0 on, not {value!r}.", remedy, Code.USAGE)


@dataclass(frozen=True)
class Acting:
    """What an acting task works with while it holds the project's lock."""

    project: "Project"
    runtime: "Runtime"
    progress: "Progress"


@contextlib.contextmanager
def acting(
    verb: str,
    *,
    native: bool = False,
    docker: bool = False,
    stand_in: bool = False,
    **settings: str,
) -> Iterator[Acting]:
    """Hold the lock of the project, with a runtime for `verb` and bars, while the context lasts."""
    from stack import host, runtime

    want = wanted(native=native, docker=docker)
    project = read_project(stand_in=stand_in, **settings)
    with host.lock(project.state, verb=verb), bars() as progress:
        yield Acting(project, runtime.choose(project, want=want, progress=progress), progress)


def wanted(*, native: bool, docker: bool) -> str | None:
    """Return the runtime that was asked for. Raises StackError USAGE for both."""
    from stack.errors import Code, StackError

    if native and docker:
        raise StackError("--native and --docker exclude each other.", "Give one.", Code.USAGE)
    return "native" if native else "docker" if docker else None


@contextlib.contextmanager
def bars() -> "Iterator[Progress]":
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


def read_project(*, stand_in: bool = False, **settings: str) -> "Project":
    """Read the project; settings of the command line, unless empty, win over .env."""
    from stack import config

    given = {name: value for name, value in settings.items() if value}
    project = config.load(ROOT, given=given)
    if stand_in:
        return config.load(ROOT, given=given, overrides=config.stand_ins(project))
    return project


def select(project: "Project", quant: list[str]) -> "list[Service]":
    """Return the services of the quants named, or the default one."""
    return [project.service(name) for name in dict.fromkeys(quant or [project.default])]


def dump(values: list[dict[str, Any]]) -> str:
    """Write values as JSON for programs; what is no finite number, which JSON lacks, is null."""
    plain = json.loads(json.dumps(values, default=str), parse_constant=lambda _: None)
    return json.dumps(plain, indent=1)
