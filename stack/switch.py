"""Puts one server in the place of another, so that in the end one of the two serves.

Up to the stop of the old one every failure leaves it as it was; after that every failure brings it
back. `.state/switch.json` is for readers: what serves is asked of the runtimes alone.
"""

import contextlib
import datetime as dt
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from stack import client, config, fit, keys, runtime
from stack.config import Project, Service
from stack.errors import Code, StackError
from stack.fit import Release
from stack.host import Interrupts, write_atomic
from stack.runtime import Answers, Phase, Progress, Runtime, Up, silent
from stack.server import Server
from stack.wait import WaitTimeoutError, wait_until

_log = logging.getLogger(__name__)
DRAIN_S = 30
UNDER_WAY = "under way"
# What runs after the drain is cut off in any case. On a request without a stream the engine would
# hang until it is killed, and each second of that is a gap. Idle, it ends within 0.2 s.
_GRACE_S = 2


@dataclass
class Record:
    """A switch, written as it goes on, so that one that was killed shows how far it came."""

    path: Path
    old: str
    new: str
    began: str
    outcome: str = UNDER_WAY
    """under way, switched, unchanged, restored or dark."""
    phase: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each phase took."""
    cut: int | None = None
    """Requests that the stop cut off; None where the old server did not tell."""
    gap_s: float | None = None
    """From the old server's stop until one was ready again."""
    cause: str = ""

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Time a phase."""
        self.write(phase=phase)
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = round(time.monotonic() - start, 3)
            _log.info("%-8s %6.1f s", phase, self.seconds[phase])

    def write(self, **changes: object) -> None:
        """Change fields and keep the whole; a full disk must not stop a switch half-way."""
        vars(self).update(changes)
        with contextlib.suppress(OSError):
            write_atomic(self.path, json.dumps(asdict(self), indent=1, default=str))


@dataclass(frozen=True)
class Switched:
    """A server that is proved, and how it came; no record where it served already."""

    up: Up
    record: Record | None = None


@dataclass(frozen=True)
class Side:
    """A service, and the runtime of a project that has just its settings."""

    runtime: Runtime
    service: Service
    key: str

    def __str__(self) -> str:
        """Name it for people."""
        return f"{self.service.name} ({self.runtime.name})"


def switch(
    project: Project,
    quant: str,
    *,
    leave: str | None = None,
    want: str | None = None,
    same_port: bool = False,
    stand_in: bool = False,
    drain_s: float = DRAIN_S,
    answers: Answers | None = None,
    progress: Progress = silent,
) -> Switched:
    """Serve a quant in the place of the one that runs, or of `leave` where several do.

    It runs in the runtime `want`, else in the old one's; with `same_port` on the old one's port.
    Requests get `drain_s` to end; the engine takes new ones until it is stopped. With `answers` it
    takes over only if it answers right.

    Raises:
        StackError: by what failed before the stop, and the old server serves on; RESTORED when
            something failed later and it serves again, DARK when nothing serves.
        KeyboardInterrupt: the old server serves on, or again.

    """
    where, server, served = _running(project, quant, leave, want)
    if served:
        return Switched(runtime.up(where, project, project.service(quant), choose=True))
    port = {_setting(quant, "PORT"): str(server.port)} if same_port else {}
    anew = config.changed(project, **port)
    if same_port and anew.service(quant).port != server.port:
        raise StackError(
            f"compose.yaml has no {_setting(quant, 'PORT')} to move {quant} to port {server.port}.",
            "Publish its port as ${" + _setting(quant, "PORT") + "}.",
            Code.USAGE,
        )
    key = keys.require(anew.service(quant), first_start="GLM_KEY_FILE" not in anew.settings)
    new = Side(
        runtime.choose(anew, want=want or where.name, progress=progress), anew.service(quant), key
    )
    old = _as_it_runs(project, where, server)
    began = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    record = Record(_path(project), str(old), str(new), began)
    note = partial(_log.warning, "Please wait: what was begun is being undone.")
    with Interrupts(note) as interrupts:
        try:
            with record.of("check"):
                header = runtime.prepare(
                    new.runtime,
                    anew,
                    new.service,
                    choose=True,
                    stand_in=stand_in,
                    progress=progress,
                    replacing=server,
                )
            with runtime.reserved(new.service, old.service):
                freed = fit.release(server)
                chosen = runtime.settle(anew, new.service, header, choose=True, freed=freed)
                if chosen:
                    new = replace(new, service=chosen.service)
                with record.of("drain"):
                    record.cut = _drain(server, drain_s)
                up = exchange(old, new, freed, record, interrupts, answers=answers)
        except BaseException as error:
            if record.outcome == UNDER_WAY:
                record.write(outcome="unchanged", cause=_cause(error))
            raise
    return Switched(up, record)


def _running(
    project: Project, quant: str, leave: str | None, want: str | None
) -> tuple[Runtime, Server, bool]:
    """Return the server to replace; or the wanted one and True, where it runs alone already.

    Raises:
        StackError: USAGE, where that is not clear.

    """
    alive, name = runtime.alive(project), project.service(quant).quant
    wanted = [
        pair for pair in alive if pair[1].service.quant == name and want in (None, pair[0].name)
    ]
    others = [
        pair for pair in alive if pair not in wanted and leave in (None, pair[1].service.quant)
    ]
    if wanted and not others:
        return (*wanted[0], True)
    if len(others) == 1 and not wanted:
        return (*others[0], False)
    if not others:
        raise StackError(
            f"{f'{leave} is not running' if leave else 'Nothing runs'}."
            f"{_how_the_last_one_ended(project)}",
            f"Start {quant} with `invoke up --quant {quant}`.",
            Code.USAGE,
        )
    names = ", ".join(f"{server.service.quant} ({where.name})" for where, server in alive)
    raise StackError(
        f"{names} are running: which one is to go?",
        f"Name it with --from, or stop it with `invoke down`; {quant} must not run yet.",
        Code.USAGE,
    )


def _how_the_last_one_ended(project: Project) -> str:
    """Tell of a switch that was killed; a file that is no record of one is moved aside."""
    path = _path(project)
    try:
        last = json.loads(path.read_text())
        if last["outcome"] == UNDER_WAY:
            told = f"The last switch, from {last['old']} to {last['new']}, was killed"
            return f" {told} in its phase {last['phase']!r}."
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        aside = path.with_suffix(".corrupt")
        path.replace(aside)
        _log.warning("%s is no record of ours; moved to %s.", path, aside.name)
    return ""


def _path(project: Project) -> Path:
    return project.state / "switch.json"


def _setting(quant: str, what: str) -> str:
    return f"GLM_{quant.upper()}_{what}"


def _as_it_runs(project: Project, where: Runtime, server: Server) -> Side:
    """Return what brings a server back as it runs now.

    Raises:
        StackError: USAGE, where the settings have changed since it was started.

    """
    quant, service = server.service.quant, server.service
    settings = {_setting(quant, "PORT"): str(server.port)}
    try:
        file = Path(client.props(server)["model_path"]).name
    except StackError:  # it loads, or is stuck: no reason not to replace it
        file = ""
    if file and file != project.service(quant).model_file.name:  # a stand-in, or no longer one
        settings |= {_setting(quant, "FILE"): file}
    same = config.changed(project, **settings)
    again = same.service(quant).choosing(service.chosen)
    if file and (other := runtime.differs(replace(server, service=again))):
        raise StackError(
            f"{service.name} was started with {other}; it could not come back as it is.",
            "Set that in .env again, or down and up it first.",
            Code.USAGE,
        )
    return Side(runtime.choose(same, want=where.name), again, server.key)


@contextlib.contextmanager
def set_aside(project: Project, interrupts: Interrupts) -> Iterator[None]:
    """Stop what runs while the context lasts, and then serve it again as it was.

    Raises:
        StackError: USAGE where one could not come back as it is, and it serves on; DARK where one
            did not come back.

    """
    left = [(_as_it_runs(project, *pair), pair[1]) for pair in runtime.alive(project)]
    stopped: list[Side] = []
    try:
        for side, server in left:
            _drain(server, DRAIN_S)
            freed = fit.release(server)
            stopped.append(side)
            _stop(side)
            if freed:
                fit.wait_released(freed)
        yield
    finally:
        interrupts.shield()
        failed = [each for each in map(_bring_back, stopped) if each]
        if failed:
            raise failed[0]


def _bring_back(side: Side) -> StackError | None:
    try:
        with runtime.reserved(side.service):
            runtime.launch(side.runtime, side.service, key=side.key)
    except StackError as error:
        return StackError(f"{side} did not come back: {error.cause}", error.remedy, Code.DARK)
    _log.info("%s serves again.", side)
    return None


def _drain(server: Server, budget_s: float) -> int | None:
    """Wait for a server's requests to end; return how many have not, None if it does not tell."""

    def idle() -> bool | None:
        return True if server.ended() or client.requests(server) == 0 else None

    try:
        wait_until(idle, timeout_s=budget_s, what="requests run")
    except WaitTimeoutError:
        return client.requests(server)
    return 0


def exchange(
    old: Side,
    new: Side,
    freed: Release | None,
    record: Record,
    interrupts: Interrupts,
    *,
    answers: Answers | None = None,
) -> Up:
    """Stop the old server, start and prove the new one; bring the old one back where that fails."""
    stopped = time.monotonic()
    try:
        try:
            with record.of("stop"):
                _stop(old)
            if freed:
                with record.of("release"):
                    fit.wait_released(freed)
            up, record.gap_s = _launch(new, stopped, phase=record.of, answers=answers)
            interrupts.shield()
        except BaseException:
            interrupts.shield()
            raise
    except BaseException as error:  # twice, for an interrupt that comes just before the shield
        try:
            with record.of("restore"):
                for side in (new, old):
                    _stop(side)
                if freed:
                    with contextlib.suppress(StackError):  # it may fit all the same
                        fit.wait_released(freed)
                _, record.gap_s = _launch(old, stopped)
        except Exception as second:  # noqa: BLE001  # whatever it is, nothing serves
            cause = f"{new} did not take over: {_cause(error)} Nor did {old} come back: "
            record.write(outcome="dark", cause=cause + _cause(second))
            raise StackError(
                f"{record.cause} Nothing serves.",
                f"Mend either and `invoke up`; {record.path} has it all, *.failed.log the logs.",
                Code.DARK,
            ) from error
        record.write(outcome="restored", cause=_cause(error))
        if not isinstance(error, Exception):
            raise
        log = runtime.failed_log(new.runtime, new.service)
        back = f"{old} serves again, after {record.gap_s:.1f} s."
        raise StackError(
            f"{new} did not take over: {record.cause} {back}",
            f"Its log is kept in {log}."
            if "start" in record.seconds and log.exists()
            else getattr(error, "remedy", f"See {record.path}."),
            Code.RESTORED,
        ) from error
    record.write(outcome="switched")
    return up


def _stop(side: Side) -> None:
    side.runtime.stop(replace(side.service, stop_grace_s=_GRACE_S))


def _launch(
    side: Side,
    stopped: float,
    *,
    phase: Phase = contextlib.nullcontext,
    answers: Answers | None = None,
) -> tuple[Up, float]:
    """Start and prove one side; return also the seconds from the stop until it was ready."""
    began = time.monotonic()
    up = runtime.launch(side.runtime, side.service, key=side.key, phase=phase, answers=answers)
    return up, round(began + up.ready_s - stopped, 3)


def _cause(error: BaseException) -> str:
    if isinstance(error, StackError):
        return error.cause.rstrip(".") + "."
    return "It was interrupted." if isinstance(error, KeyboardInterrupt) else f"{error!r}."
