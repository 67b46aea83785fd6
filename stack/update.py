"""Moves the deployment to another engine once that is proved, and back; Docker and native together.

The record says which engine is current and which was before. Docker's images are kept by name:
`<image>` is current, `<image>-previous` the one before, `<image>-candidate` one in the making.
"""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Self

from stack import client, config, engine, gpu, host, runtime
from stack.compose import Docker
from stack.config import Engine, Project, Service
from stack.errors import Code, StackError
from stack.runtime import Answers, Progress, Runtime, silent
from stack.server import Server

_log = logging.getLogger(__name__)
LEAST_SHARE = 0.9
_CANDIDATE, _PREVIOUS = "-candidate", "-previous"
_TOKENS = 128
_LEAST_ROUNDS = 8
_PATIENCE_S = 30


@dataclass(frozen=True)
class Proof:
    """What was measured of an engine in a runtime, one client, best of several answers."""

    ready_s: float
    tokens_s: float
    baseline_tokens_s: float | None
    """The engine before it, minutes earlier."""


@dataclass(frozen=True)
class Entry:
    """An engine of the record; `images` are ids by name, `proofs` by runtime and quant."""

    commit: str
    build: int
    origin: str
    images: Mapping[str, str] = field(default_factory=dict)
    proofs: Mapping[str, Proof] = field(default_factory=dict)


@dataclass(frozen=True)
class Moved:
    """What became current, what it was before, and how long servers were away."""

    current: Entry
    previous: Entry | None
    gap_s: float = 0
    served: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Place:
    """Where an engine is in use: a runtime, and a service of a backend, with its server if up."""

    runtime: Runtime
    service: Service
    server: Server | None

    @property
    def name(self) -> str:
        return f"{self.runtime.name}-{self.service.quant}"


def update(
    project: Project, wanted: str, *, answers: Answers, progress: Progress = silent
) -> Moved:
    """Build the engine `wanted` beside the current one, prove it, and only then make it current.

    Raises:
        StackError: BUILD; VERIFY where it answers worse than the current one, or than the model's
            record where that is not built; MISSED where it is slower; RESTORED or DARK where it
            failed after the old one was stopped. Before that all stays as it was.

    """
    if "GLM_ENGINE_SOURCE" in project.settings:
        raise StackError(
            "GLM_ENGINE_SOURCE fixes the engine's source.", "Take it out of .env.", Code.USAGE
        )
    before, pin = _current(project), config.pinned(project.root)
    if wanted == pin.commit:  # has sources of its own, also where its git is out of reach
        found = pin
    else:
        found = engine.fetch(project, wanted, progress=partial(progress, "source"))
    if found.commit == project.engine.commit:
        return Moved(before, _read(project)[1])
    beside, places = _beside(project, found, _CANDIDATE), _places(project)
    with _Transaction(project, before, answers, progress) as move, _cleaned(beside):
        for place in places:
            where, service = _in(beside, place, progress), _of(beside, place)
            runtime.build(where, beside, service, progress=progress)
        proofs = {each.name: move.prove(beside, each) for each in places}
        entry = Entry(found.commit, found.build, wanted, _images(beside, places), proofs)
        return move.to(entry)


def rollback(project: Project, *, answers: Answers, progress: Progress = silent) -> Moved:
    """Make the engine before the current one current again, proved.

    Raises:
        StackError: USAGE where there is none, BUILD where it is not there any more; VERIFY where it
            answers worse than the model's record; else as `update`.

    """
    before, previous = _current(project), _read(project)[1]
    if previous is None:
        raise StackError(
            "There is no earlier engine to go back to.",
            "Name one: `invoke update --to`.",
            Code.USAGE,
        )
    beside, places = (
        _beside(project, Engine("", previous.commit, previous.build), _PREVIOUS),
        _places(project),
    )
    for place in places:
        if not _in(beside, place, progress).built(_of(beside, place)):
            raise StackError(
                f"The earlier engine {previous.commit[:12]} is not there any more.",
                f"Make it again: `invoke update --to {previous.origin}`.",
                Code.BUILD,
            )
    with _Transaction(project, before, answers, progress) as move:
        for place in places:
            if place.server is None:
                with (
                    _cleaned(beside),
                    runtime.serving(_in(beside, place, progress), beside, _of(beside, place)) as up,
                ):
                    answers.prove(up.server)
        return move.to(replace(previous, images=_images(beside, places)))


class _Transaction:
    """Takes over from the current engine; left by an error, all is as it was and serves again."""

    def __init__(
        self, project: Project, before: Entry, answers: Answers, progress: Progress
    ) -> None:
        self.project = project
        self.before = before
        self.answers = answers
        self.progress = progress
        self.stopped: list[_Place] = []
        self.stopped_at = 0.0
        self.record = _text(project)
        self.pointed: Entry | None = None
        self.interrupts = host.Interrupts(lambda: _log.info("Restoring the engine before it."))

    def __enter__(self) -> Self:
        self.interrupts.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        try:
            self.interrupts.shield()
            if error is not None and (self.stopped or self.pointed):
                self._restore(error)
        finally:
            self.interrupts.__exit__()

    def _restore(self, error: BaseException) -> None:
        cause = error.cause if isinstance(error, StackError) else str(error) or "Interrupted."
        try:
            if self.pointed:
                _name_images(self.project, self.before)
                _write_text(self.project, self.record)
            for place in self.stopped:
                place.runtime.stop(place.service)
                runtime.up(place.runtime, self.project, place.service, choose=True)
        except StackError as worse:
            raise StackError(
                f"{cause} The engine before it does not serve either: {worse.cause}",
                worse.remedy,
                Code.DARK,
            ) from error
        if self.stopped and isinstance(error, StackError):
            raise StackError(
                f"{cause} The engine before it serves again.",
                error.remedy,
                Code.RESTORED,
            ) from error

    def stop(self) -> None:
        """Stop all that runs, once."""
        if self.stopped:
            return
        self.stopped_at = time.monotonic()
        for place in _running(self.project):
            self.stopped.append(place)  # before the stop, which may be interrupted
            place.runtime.stop(place.service)

    def prove(self, beside: Project, place: _Place) -> Proof:
        """Prove a candidate beside what runs, or in its gap where the GPU has room for one."""
        before = None
        with self._baseline(place) as server:
            if server:
                before = (self.answers.ask(server), _fastest(server))
            try:
                return self._prove(beside, place, before, server)
            except StackError as error:
                if error.code != Code.VRAM or self.stopped:
                    raise
                _log.info("%s Proving it in the gap.", error.cause)
        self.stop()
        return self._prove(beside, place, before, None)

    @contextlib.contextmanager
    def _baseline(self, place: _Place) -> Iterator[Server | None]:
        """Yield a server of the current engine: the one that runs, or one of our own."""
        if place.server:
            yield place.server
            return
        own = _beside(self.project, self.project.engine, "")
        chosen = _in(own, place, self.progress)
        if not chosen.built(_of(own, place)):
            yield None
            return
        with _cleaned(own), runtime.serving(chosen, own, _of(own, place)) as up:
            yield up.server

    def _prove(
        self,
        beside: Project,
        place: _Place,
        before: tuple[Any, float] | None,
        server: Server | None,
    ) -> Proof:
        """Hold a candidate against the engine before it, whose server is up if one is given."""
        chosen = _in(beside, place, self.progress)
        with runtime.serving(chosen, beside, _of(beside, place)) as up:
            if not before:
                self.answers.prove(up.server)
            elif worse := self.answers.worse(self.answers.ask(up.server), before[0]):
                raise StackError(
                    f"{place.name}: the candidate answers wrong: {'; '.join(worse)}.",
                    "The engine is as it was. Name another.",
                    Code.VERIFY,
                )
            new, old = _race(up.server, server, before[1] if before else 0)
            if new < LEAST_SHARE * old:
                raise StackError(
                    f"{place.name}: the candidate gives {new:.0f} tokens/s, "
                    f"the engine before it {old:.0f}.",
                    "The engine is as it was. Name another.",
                    Code.MISSED,
                )
            return Proof(round(up.ready_s, 2), round(new, 1), round(old, 1) or None)

    def to(self, entry: Entry) -> Moved:
        """Make a proved engine current, and serve with it what was served."""
        self.stop()
        self.pointed = entry
        _name_images(self.project, entry)
        after = _of_engine(self.project, Engine("", entry.commit, entry.build))
        _write(self.project, entry, self.before)
        for place in self.stopped:
            where, service = _in(after, place, self.progress), _of(after, place)
            runtime.up(where, after, service, choose=True, answers=self.answers)
        gap_s = time.monotonic() - self.stopped_at if self.stopped else 0
        _keep_previous(self.project, self.before)
        return Moved(entry, self.before, gap_s, tuple(each.name for each in self.stopped))


def _rate(server: Server) -> float:
    return client.complete(server, "Hello", tokens=_TOKENS).decode_tokens_s


def _fastest(server: Server) -> float:
    """Return the best rate of a few answers: what disturbs one makes it only slower."""
    return max(_rate(server) for _ in range(_LEAST_ROUNDS))


def _race(new: Server, old: Server | None, old_best: float) -> tuple[float, float]:
    """Return the best rates of two servers that answer in turns, so that both have bad moments.

    One that seems slow has longer to show that only the machine was busy.
    """
    new_best, start, rounds = 0.0, time.monotonic(), 0
    while rounds < _LEAST_ROUNDS or (
        new_best < LEAST_SHARE * old_best and time.monotonic() - start < _PATIENCE_S
    ):
        new_best = max(new_best, _rate(new))
        old_best = max(old_best, _rate(old)) if old else old_best
        rounds += 1
    return new_best, old_best


def _places(project: Project) -> list[_Place]:
    """Return where the engine is built and can be proved, one service for each backend.

    Where it is nowhere, it is where `up` would put the default service.
    """
    found: dict[tuple[str, str], _Place] = {}
    for each in _running(project):
        found.setdefault((each.runtime.name, each.service.backend), each)
    for where in runtime.present(project):
        for service in project.services.values():
            if where.built(service) and _provable(service):
                found.setdefault((where.name, service.backend), _Place(where, service, None))
    default = project.service(project.default)
    return [*found.values()] or [_Place(runtime.choose(project), default, None)]


def _provable(service: Service) -> bool:
    try:
        gpu.require(service)
    except StackError as error:
        _log.info("%s is not moved: %s", service.name, error.cause)
        return False
    return service.model_file.exists()


def _running(project: Project) -> list[_Place]:
    return [
        _Place(where, project.service(server.service.quant), server)
        for where, server in runtime.alive(project)
    ]


def _of_engine(project: Project, found: Engine, **settings: str) -> Project:
    """Return the project with another engine."""
    moved = dict(zip(config.ENGINE, (found.commit, str(found.build)), strict=True))
    return config.load(project.root, overrides={**project.settings, **moved, **settings})


def _beside(project: Project, found: Engine, tag: str) -> Project:
    """Return the project with another engine, beside itself: own name, ports, state and images."""
    ports = {f"GLM_{quant.upper()}_PORT": "" for quant in project.services}
    names = {"GLM_NAME": f"{project.name}{_CANDIDATE}", "GLM_ENGINE_TAG": tag}
    other = _of_engine(project, found, GLM_BIND="127.0.0.1", **names, **ports)
    return replace(other, state_folder=f"{project.state_folder}/candidate")


def _in(project: Project, place: _Place, progress: Progress) -> Runtime:
    return runtime.choose(project, want=place.runtime.name, progress=progress)


def _of(project: Project, place: _Place) -> Service:
    return project.service(place.service.quant)


@contextlib.contextmanager
def _cleaned(beside: Project) -> Iterator[None]:
    """Leave nothing of a candidate but what is in the cache."""
    try:
        yield
    finally:
        shutil.rmtree(beside.state, ignore_errors=True)
        for docker in _dockers(beside):
            for name in {each.image for each in beside.services.values()}:
                if name.endswith(_CANDIDATE):
                    docker.drop_image(name)


def _dockers(project: Project) -> list[Docker]:
    return [each for each in runtime.present(project) if isinstance(each, Docker)]


def _images(project: Project, places: list[_Place]) -> dict[str, str]:
    """Return the ids of a project's images, by the names that they have when current."""
    ids = {}
    for place in places:
        if isinstance(place.runtime, Docker):
            name = place.service.image
            ids[name] = place.runtime.image_id(_of(project, place).image) or ""
    return ids


def _name_images(project: Project, entry: Entry) -> None:
    for docker in _dockers(project):
        for name, image in entry.images.items():
            docker.name_image(image, name)


def _keep_previous(project: Project, entry: Entry) -> None:
    """Keep an engine's images by name, instead of those before it."""
    for docker in _dockers(project):
        for name, image in entry.images.items():
            before = docker.image_id(name + _PREVIOUS)
            docker.name_image(image, name + _PREVIOUS)
            if before and before != image:
                docker.drop_image(before)


def _current(project: Project) -> Entry:
    """Return the current engine, of the record or as compose.yaml pins it."""
    recorded = _read(project)[0]
    images = _images(
        project, [each for each in _places(project) if each.runtime.built(each.service)]
    )
    if recorded and recorded.commit == project.engine.commit:
        return replace(recorded, images=images)
    return Entry(project.engine.commit, project.engine.build, project.engine.commit, images)


def _text(project: Project) -> str | None:
    path = project.root / config.ENGINE_RECORD
    return path.read_text() if path.exists() else None


def _write_text(project: Project, text: str | None) -> None:
    path = project.root / config.ENGINE_RECORD
    if text is None:
        path.unlink(missing_ok=True)
    else:
        host.write_atomic(path, text)


def _read(project: Project) -> tuple[Entry | None, Entry | None]:
    """Return current and previous engine of the record, which was checked on loading."""
    record = json.loads(_text(project) or "{}")
    current, previous = (_entry(record.get(name)) for name in ("current", "previous"))
    return current, previous


def _entry(raw: Any) -> Entry | None:
    if not raw:
        return None
    proofs = {name: Proof(**proof) for name, proof in raw["proofs"].items()}
    return Entry(**{**raw, "proofs": proofs})


def _write(project: Project, current: Entry, previous: Entry) -> None:
    pin = config.pinned(project.root)
    record = {"pin": pin.commit, "current": asdict(current), "previous": asdict(previous)}
    _write_text(project, json.dumps(record, indent=1) + "\n")
