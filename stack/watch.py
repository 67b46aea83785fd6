"""Keeps a deployment alive from the host: restarts what crashed or hangs, within a budget.

Docker itself restarts a server that crashed, three times in a container's life (compose.yaml). It
leaves one that hangs, that ended with status 0, or that lost its GPU: those are this module's, and
every native server. What Docker did counts in the budget, too.

No generation is asked of a server that works, since each takes a slot, moves the idle slots' cached
prompts to the host's memory, and loses those that are too large for it. Requests that fail show in
the engine's log; where they do and nothing was decoded meanwhile, one token is asked for.
"""

import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stack import client, host, keys, runtime
from stack.config import Project, Service
from stack.errors import Code, StackError
from stack.runtime import Answers, Runtime
from stack.server import Server
from stack.status import STUCK_S, Looks, State

_FAILED = re.compile(r"task id = \d+, error: (?:Compute error|Invalid input batch|got exception)")
_KEPT = 20
_LINES = 200


@dataclass(frozen=True)
class Limits:
    """How long each trouble is borne, in seconds, and how many restarts in how long."""

    stuck_s: float = STUCK_S
    silent_s: float = STUCK_S
    """Without an answer, or with errors for answers."""
    stall_s: float = client.STALL_LIMIT_S
    """Of a load in which nothing moves; one that moves takes as long as it takes."""
    budget: int = 3
    window_s: float = 900


@dataclass(frozen=True)
class Event:
    """Something that was done, or decided."""

    quant: str
    runtime: str
    what: str


@dataclass
class Case:
    """What is known of a server between looks. Times are of `time.monotonic`."""

    trouble: str = ""
    since_s: float = 0
    moves: str = ""
    """What moves while it loads."""
    decodes: float = -1
    failure: str = ""
    """The last failed request of its log."""
    docker: int = 0
    """Restarts by Docker that are counted already."""
    restarts: list[float] = field(default_factory=list)
    stopped: bool = False
    """Somebody ended it with `docker stop`."""
    wanted: bool = False
    """A restart removed it and has not brought it back."""
    gave_up: str = ""
    """The diagnosis, until it serves again."""


@dataclass(frozen=True)
class _Trouble:
    what: str
    limit_s: float = 0
    mendable: bool = True


class Watch:
    """Looks at the servers of some services, in both runtimes, and mends what it may."""

    def __init__(
        self,
        project: Project,
        services: Sequence[Service],
        limits: Limits,
        answers: Answers | None = None,
    ) -> None:
        """Look at nothing yet; what is restarted must answer right, where that can be told."""
        self.project, self.services, self.limits = project, services, limits
        self._answers = answers
        self._folder = project.state / "watch"
        self._looks = Looks(project)
        self._told: dict[tuple[str, str], str] = {}

    def look(self) -> Iterator[Event]:
        """Look once at each server; restart what is due. Yields what was done."""
        cases = read(self.project)
        try:
            runtimes = runtime.present(self.project)
        except StackError as error:  # native servers are watched all the same
            runtimes = [runtime.native(self.project)]
            yield from self._once("all", "Docker", error.cause)
        for service in self.services:
            for where in runtimes:
                case = cases.setdefault(f"{service.quant} {where.name}", Case())
                try:
                    for what in self._look(where, service, case):
                        self._save(cases)  # before the next act, whatever becomes of this process
                        yield Event(service.quant, where.name, what)
                except OSError as error:  # all errors of Docker's SDK: gone between two questions
                    yield from self._once(service.quant, where.name, f"unseen: {error}")
        self._save(cases)

    def _once(self, quant: str, where: str, what: str) -> Iterator[Event]:
        """Tell what lasts only when it begins, or changes."""
        if self._told.get((quant, where)) != what:
            self._told[quant, where] = what
            yield Event(quant, where, what)

    def _save(self, cases: dict[str, Case]) -> None:
        kept = {name: asdict(case) for name, case in cases.items() if case != Case()}
        with contextlib.suppress(OSError):  # with a full disk, too, it mends what it can
            host.write_atomic(_file(self.project), json.dumps(kept, indent=1))

    def _look(self, where: Runtime, service: Service, case: Case) -> Iterator[str]:
        now, server = time.monotonic(), _find(where, service)
        if server is None and not case.wanted:
            vars(case).update(vars(Case()))
            return
        if server:
            yield from self._count(server, case, now)
        trouble = self._trouble(server, case, now) if server else _Trouble("its restart failed")
        if trouble is None or case.trouble != trouble.what or case.since_s > now:
            case.trouble, case.since_s = (trouble.what if trouble else ""), now
        if trouble and not case.gave_up and now - case.since_s >= trouble.limit_s:
            try:
                with host.lock(self.project.state, verb="watch"):
                    yield from self._mend(where, service, case, trouble)
            except StackError as error:
                if error.code != Code.BUSY:  # else an operation is at work on it: look again later
                    raise

    def _count(self, server: Server, case: Case, now: float) -> Iterator[str]:
        """Count what Docker restarted."""
        fresh = server.restarts - case.docker
        if case.decodes >= 0 and fresh > 0:
            case.restarts += [now] * fresh
            yield f"Docker restarted it after a crash ({server.restarts} in all)"
        case.docker = server.restarts

    def _trouble(self, server: Server, case: Case, now: float) -> _Trouble | None:
        """Say what is wrong with a server, if anything that this may mend."""
        ended = server.ended() is not None
        # A restart of ours that was interrupted looks like a `docker stop`, which Docker forgets.
        case.stopped = ended and not case.wanted and (case.stopped or server.stopped())
        if case.stopped or server.restarting:
            return None
        state = self._looks.state(server, stuck_s=self.limits.stuck_s)
        silent = _Trouble(f"it is {state.state}", self.limits.silent_s)
        if state.state in ("starting", "loading"):
            moves = str([*map(host.Process.activity, server.processes), server.logs(5)])
            moved, case.moves = case.moves != moves, moves
            if moved:
                case.since_s = now
            return _Trouble(f"nothing moves while it is {state.state}", self.limits.stall_s)
        if state.state in ("ready", "busy"):
            return self._fails(server, state, case)
        if state.state == "GPU lost":
            return _Trouble(state.detail, mendable=False)
        if state.state in ("not answering", "unhealthy"):
            return silent
        return _Trouble(f"{state.state}: {state.detail}")

    def _fails(self, server: Server, state: State, case: Case) -> _Trouble | None:
        """Find a server that is well by its own account, and fails every request."""
        if case.gave_up:  # somebody brought it back
            vars(case).update(vars(Case(docker=case.docker, restarts=case.restarts)))
        case.wanted = False
        sample = self._looks.samples.get(f"{state.quant} {state.runtime}")
        decodes = sample.decodes if sample else 0
        failed = [line for line in server.logs(_LINES).splitlines() if _FAILED.search(line)]
        failure = failed[-1] if failed else ""
        unmoved, fresh = decodes == case.decodes, failure != case.failure
        case.decodes = decodes
        if not (unmoved and fresh and state.state == "ready"):
            if not unmoved:
                case.failure = failure
            return None
        case.failure = failure
        try:
            client.complete(server, "Hello", tokens=1, limit_s=self.limits.silent_s)
        except StackError as error:
            return _Trouble(f"every request fails: {error.cause}")
        return None

    def _mend(
        self, where: Runtime, service: Service, case: Case, trouble: _Trouble
    ) -> Iterator[str]:
        server, now = _find(where, service), time.monotonic()
        case.restarts = [t for t in case.restarts if 0 <= now - t < self.limits.window_s]
        spent = len(case.restarts) >= self.limits.budget
        if spent or not trouble.mendable:
            why = (
                f"{len(case.restarts)} restarts within {self.limits.window_s / 60:g} minutes"
                if spent
                else "no restart can mend that"
            )
            case.gave_up = self._diagnose(service, server, trouble.what, why)
            yield f"{trouble.what}; gave up after {why}: {case.gave_up}"
            return
        case.restarts.append(now)
        case.wanted = True
        number = f"restart {len(case.restarts)} of {self.limits.budget}"
        told = self._diagnose(service, server, trouble.what, number)
        yield f"{trouble.what}; {number}, evidence in {told}"
        try:
            where.stop(service)
            up = runtime.up(where, self.project, service, choose=True, answers=self._answers)
        except StackError as error:
            case.trouble = ""
            yield f"the restart failed: {error.cause}"
            return
        vars(case).update(vars(Case(restarts=case.restarts)))
        yield f"serves again after {up.ready_s:.1f} s"

    def _diagnose(self, service: Service, server: Server | None, what: str, why: str) -> str:
        """Write down what is known of a trouble before the restart wipes it; say where."""
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        lines = [
            f"{service.name}, {time.strftime('%Y-%m-%d %H:%M:%S %Z')}",
            f"Trouble: {what}",
            f"Decision: {why}",
        ]
        if server:
            lines += [f"Server: {server.runtime}, {server.url}, {server.image}"]
            lines += [f"Ended: {server.ended() or 'no'}; restarts by Docker: {server.restarts}"]
            lines += [f"Process {each.pid}: {each.usage()}" for each in server.processes]
        with contextlib.suppress(StackError, OSError):
            lines += [f"GPU {each}" for each in runtime.gpu.gpus()]
        lines += [
            "Next: `invoke doctor`, then `invoke up`; once it serves, it is watched again.",
            f"Its last {_LINES} lines:",
            server.logs(_LINES) if server else "(it is gone)",
        ]
        path = self._folder / f"{stamp}-{service.quant}.txt"
        # Others' stamps are later than this one's where the clock was set back.
        for old in sorted({*self._folder.glob("*.txt")} - {path})[: 1 - _KEPT]:
            old.unlink()
        try:
            host.write_atomic(path, "\n".join(lines) + "\n", mode=0o600)
        except OSError as error:  # no reason not to mend
            return f"nowhere ({error.strerror})"
        return str(path)


def read(project: Project) -> dict[str, Case]:
    """Read what is known of each server, by quant and runtime; what cannot be read is not known."""
    try:
        kept = json.loads(_file(project).read_text())
        return {name: Case(**case) for name, case in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def forget(project: Project, service: Service) -> None:
    """Forget a service that was taken down on purpose, so that no failed restart brings it back."""
    cases = read(project)
    kept = {name: asdict(c) for name, c in cases.items() if name.split()[0] != service.quant}
    if len(kept) != len(cases):
        try:
            host.write_atomic(_file(project), json.dumps(kept, indent=1))
        except OSError:
            _file(project).unlink()


def _file(project: Project) -> Path:
    return project.state / "watch.json"


def _find(where: Runtime, service: Service) -> Server | None:
    key = ""
    with contextlib.suppress(StackError):
        key = keys.read(service)
    return where.find(service, key=key)
