"""Tunes: measures a few candidates for how a quant is served, and keeps the best as a profile.

The candidates are what `invoke up` chooses for the most clients, that with one setting changed at a
time, and that with all changes that were better alone. Each serves every number of clients for a
short time; the better half does so for twice as long, and so on (successive halving), while the
budget lasts. What is chosen untuned stays among them, to be compared with.
`bench.candidates` has the objective.
"""

import contextlib
import datetime as dt
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench import analysis, candidates, ceiling, generator, loadtest, results
from bench.candidates import KEPT, UNTUNED, Run, Trial
from bench.ceiling import Ceiling
from bench.loadtest import Plan
from bench.prompts import Spread
from bench.verdict import Slo
from stack import config, fit, gguf_header, gpu, runtime, switch, tuned
from stack.config import Project, Service, Settings
from stack.errors import Code, StackError
from stack.gguf_header import Header
from stack.host import Interrupts
from stack.runtime import Progress, Runtime, Up
from stack.server import Server
from stack.tuned import Subject

_log = logging.getLogger(__name__)
FIRST_S = (2, 10)
"""Bounds of the seconds of each load in the first round: a sixtieth of the budget."""
FIRST_SHARE, SHARE = 0.55, 0.8
"""Of the budget, for the first round and for all: the rest is for the ceiling and cold starts."""
ROUNDS = 3
COLDER = 0.9
"""Direct I/O must start in so much of the time."""
_OWN = (Code.VRAM, Code.LOAD, Code.STALLED, Code.ON_CPU, Code.VERIFY, Code.USAGE)
"""What is a candidate's own failure; another ends the tune."""
_WARMUP_S = 1
_LEAST_LOAD_S, _RELEASE_S = 10, 10
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "": 1}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "chat": {"prompts": "turns", "turns": 4, "prompt": Spread(64, 192), "output": Spread(64, 128)},
    "agent": {
        "prompts": "turns",
        "turns": 6,
        "prompt": Spread(1000, 1600),
        "output": Spread(64, 192),
    },
    "mixed": {"prompts": "cold", "prompt": Spread(32, 2048), "output": Spread(16, 256)},
}
"""Of traffic: short turns of a conversation; long ones, whose cached prefix grows to 10,000 tokens;
single requests of any length. Shorter ones in proportion where a slot cannot hold that."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What to tune for."""

    clients: tuple[int, ...]
    budget_s: float
    """From the first start on: building, making the model and waiting for requests come before."""
    shape: str = "chat"
    slo: Slo | None = None


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a tune found, as its profile has it."""

    subject: Subject
    clients: tuple[int, ...]
    shape: str
    slo: str
    at: str
    runtime: str
    settings: Settings
    winner: str
    gain: float | None
    """Its score over that of what is chosen untuned; None where that failed."""
    ceiling: Ceiling | None
    no_ceiling: str
    """Why there is none."""
    of_engine: Mapping[str, float]
    """What the winner's slots decode, of `llama-batched-bench` with as many streams, by clients."""
    starts: Mapping[str, float]
    """Seconds until it was ready, from a cold file, by load mode."""
    left_out: tuple[str, ...]
    """Candidates that the budget did not reach."""
    scores: Mapping[str, float]
    trials: tuple[Trial, ...]


def parse(*, clients: str, budget: str, shape: str, slo: str) -> Ask:
    """Make sense of a command line's words. Raises StackError USAGE."""
    plan = loadtest.parse(
        clients=clients, rate="", prompt="1", output="1", slo=slo, search="", duration_s=1
    )
    plan.check(context=2)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", budget)
    budget_s = float(match[1]) * _UNITS_S[match[2]] if match else 0
    wrong = {
        f"--budget {budget} is no time": not 0 < budget_s < math.inf,
        f"--shape {shape} is not known": shape not in SHAPES,
    }
    for cause, holds in wrong.items():
        if holds:
            example = f"Give --budget 20m or 90s, and --shape {', '.join(SHAPES)}."
            raise StackError(f"{cause}.", example, Code.USAGE)
    levels = tuple(sorted(set(plan.clients)))
    return Ask(clients=levels, budget_s=budget_s, shape=shape, slo=plan.slo)


def shaped(ask: Ask, service: Service) -> Plan:
    """Return the load of a shape, in the length that each client has room for twice."""
    whole = Plan(
        clients=ask.clients, warmup_s=_WARMUP_S, repeats=1, slo=ask.slo, **SHAPES[ask.shape]
    )
    room = min(service.context, service.cells // max(ask.clients)) // 2
    part = min(1, room / ((whole.prompt.high + whole.output.high) * whole.turns))
    prompt, output = (
        Spread(*(max(1, int(part * bound)) for bound in spread))
        for spread in (whole.prompt, whole.output)
    )
    return replace(whole, prompt=prompt, output=output)


def tune(
    project: Project,
    quant: str,
    ask: Ask,
    *,
    want: str,
    stand_in: bool = False,
    replace_running: bool = False,
    progress: Progress = runtime.silent,
) -> tuple[Tuned, Path]:
    """Tune a quant in the runtime `want`; return what was found, and the profile with it.

    Its servers listen on loopback, on a port that the platform chooses, so that nobody's requests
    come to them. What was measured is kept at once, and a later call goes on from it.

    Raises:
        StackError: BUSY where something runs that may not be replaced; the first candidate's where
            none could be measured; as `switch.set_aside`; by what is missing to start.
        KeyboardInterrupt: nothing is left loaded; what was measured is kept.

    """
    own = config.changed(
        project,
        **{f"GLM_{quant.upper()}_PORT": "", "GLM_BIND": "127.0.0.1", "GLM_GATEWAY": "0"},
        GLM_CLIENTS=str(max(ask.clients)),
    )
    service, where = own.service(quant), runtime.choose(own, want=want, progress=progress)
    _require_quiet(project, service, replace_running=replace_running)
    gpu.require(service, chosen="GLM_GPU" in own.settings)
    header = runtime.ensure_model(own, service, stand_in=stand_in, progress=progress)
    runtime.ensure_engine(where, own, service, progress=progress)
    note = partial(_log.warning, "Please wait: what is loaded is being stopped.")
    with Interrupts(note) as interrupts, switch.set_aside(project, interrupts):
        try:
            found = _Session(where, own, service, header, ask).run()
        except KeyboardInterrupt:
            _log.info("What was measured is kept; the same command goes on from there.")
            raise
        finally:  # once more, for an interrupt that came between
            where.stop(service)
    path = tuned.own_folder(project) / _file_name(found)
    results.save(asdict(found), path, indent=1)
    return found, path


def _require_quiet(project: Project, service: Service, *, replace_running: bool) -> None:
    ours = runtime.alive(project)
    if ours and not replace_running:
        raise StackError(
            f"{ours[0][1].service.name} ({ours[0][0].name}) serves, and would be disturbed.",
            "With --replace it is stopped for that time, and comes back.",
            Code.BUSY,
        )
    for device in gpu.of(service):
        if device.pids and not ours:
            raise StackError(
                f"GPU {device.index} is in use.{fit.held(device)}",
                "Stop that first: each would slow the other down.",
                Code.BUSY,
            )


def _file_name(found: Tuned) -> str:
    words = f"{found.subject.quant} {found.subject.card} {max(found.clients)} clients".lower()
    return "-".join(re.findall(r"[a-z0-9]+", words)) + ".json"


@dataclass
class _Session:
    where: Runtime
    project: Project
    service: Service
    header: Header
    ask: Ask
    trials: list[Trial] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    subject: Subject = field(init=False)
    plan: Plan = field(init=False)
    file: Path = field(init=False)

    def __post_init__(self) -> None:
        """Take up the evidence of an earlier call."""
        self.subject = tuned.subject(self.project, self.service)
        self.plan = shaped(self.ask, self.served({}))
        key = [asdict(self.subject), self.where.name, asdict(replace(self.plan, duration_s=0))]
        key += [{var: self.project.settings.get(var) for var in self.knobs}]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        self.file = self.project.state / "tune" / f"{self.service.quant}-{digest}.json"
        try:
            raw = json.loads(self.file.read_text())
            self.trials = [results.parse(Trial, each) for each in raw]
            _log.info("Going on from %d trials in %s.", len(raw), self.file)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as error:
            aside = self.file.with_suffix(".corrupt")
            self.file.replace(aside)
            _log.warning("%s is no evidence of ours (%s); moved to %s.", self.file, error, aside)

    @property
    def knobs(self) -> dict[str, str]:
        """The variables of `.env` that a profile keeps, and their names in the engine."""
        return {var: name for var, name in self.service.settable.items() if name in KEPT}

    def left_s(self, share: float = 1) -> float:
        """Return the seconds that are left of the budget, or of a share of it."""
        return self.began + share * self.ask.budget_s - time.monotonic()

    def served(self, changes: Settings) -> Service:
        """Return the service as chosen with changes pinned. Raises StackError VRAM or USAGE."""
        varied = self.service.choosing(changes)
        held = replace(self.project, settings={**self.project.settings, **changes})
        chosen = fit.choose(held, varied, self.header, profiled=False)
        return chosen.service if chosen else varied

    def run(self) -> Tuned:
        """Halve the candidates until one is left beside what is chosen, or the budget is spent."""
        tried = candidates.candidates(self.served({}), max(self.ask.clients), self.project.settings)
        first_s = min(max(self.ask.budget_s / 60, FIRST_S[0]), FIRST_S[1])
        for name, changes in tried.items():
            few = len(self.scores()) < 2
            self.known(name, changes, 0, first_s, SHARE if few else FIRST_SHARE)
        tried |= (joined := candidates.joined(tried, self.scores()))
        for name, changes in joined.items():
            self.known(name, changes, 0, first_s, SHARE)
        alive = list(self.scores())
        for number in range(1, ROUNDS):
            alive = alive[: max(1, len(alive) // 2)]
            alive += [UNTUNED] if UNTUNED in self.scores() and UNTUNED not in alive else []
            longer_s = first_s * 2**number
            if alive == [UNTUNED] or not all(
                self.known(n, tried[n], number, longer_s, SHARE) for n in alive
            ):
                break
            alive = [name for name in self.scores() if name in alive]
        return self.conclude(tried)

    def known(
        self, name: str, changes: Settings, number: int, seconds: float, share: float
    ) -> bool:
        """Measure a candidate unless that is known; return whether it is now.

        Not where it would take more than is left of a share of the budget; the first one at all is
        measured whatever it takes.
        """
        same = [t for t in self.trials if t.candidate == name]
        if any(t.failed or t.round >= number for t in same):
            return True
        if self.trials and self.left_s(share) < self.cost_s(seconds):
            return False
        _log.info("%s: %g s a load, %.0f s of the budget left", name, seconds, self.left_s())
        trial = self.trial(name, changes, number, seconds)
        if trial.failed and self.left_s() < 0 and self.trials:
            return False  # the budget may have cut it short
        self.trials.append(trial)
        results.save([asdict(each) for each in self.trials], self.file, indent=1)
        rates = ", ".join(f"{run.clients}: {run.tokens_s:.0f} tokens/s" for run in trial.runs)
        _log.info("  %s", trial.failed or rates)
        return True

    def trial(self, name: str, changes: Settings, number: int, seconds: float) -> Trial:
        """Start a candidate, measure it, and stop it."""
        began = time.monotonic()
        ready_s, failed, context = None, "", 0
        serves: Settings = {}
        runs: tuple[Run, ...] = ()
        try:
            service = self.served(changes)
            serves = {var: service.environment[engine] for var, engine in self.knobs.items()}
            context = service.context
            with self.serving(service) as up:
                ready_s = up.ready_s
                runs = self.measure(up.server, seconds)
            failed = next((run.failed for run in runs if run.failed), "")
        except StackError as error:
            if error.code not in _OWN:
                raise
            failed = error.cause
        return Trial(
            candidate=name,
            settings=changes,
            round=number,
            duration_s=seconds,
            seconds=time.monotonic() - began,
            context=context,
            ready_s=ready_s,
            serves=serves,
            runs=runs,
            failed=failed,
        )

    @contextlib.contextmanager
    def serving(self, service: Service) -> Iterator[Up]:
        """Serve a candidate, which must load in the time that is left; see its memory freed."""
        load_s = min(service.model.load_s, max(self.left_s(), _LEAST_LOAD_S))
        service = replace(service, model=replace(service.model, load_s=load_s))
        up, freed = runtime.up(self.where, self.project, service), None
        try:
            freed = fit.release(up.server)
            yield up
        finally:
            self.where.stop(service)
            if freed:
                with contextlib.suppress(StackError):  # the next one is planned in what is free
                    fit.wait_released(freed, timeout_s=_RELEASE_S)

    def measure(self, server: Server, seconds: float) -> tuple[Run, ...]:
        """Send each number of clients to a server. Raises StackError LOAD where it ends."""
        plan, runs = replace(self.plan, duration_s=seconds), []
        plan.check(server.service.context)
        for clients in plan.clients:
            seen = generator.run(
                server, plan.load(clients, 0), watch=lambda _: server.ended() is not None
            )
            if how := loadtest.lost(server):
                cause = (
                    f"{how} {loadtest.failed_s(seen):.1f} s into the run with {clients} clients."
                )
                raise StackError(cause, "See its log.", Code.LOAD)
            runs.append(Run.of(analysis.analyse(seen, plan.slo or Slo())))
        return tuple(runs)

    def scores(self) -> dict[str, float]:
        """Return the scores so far."""
        return candidates.scores(self.trials, self.ask.clients, slo=self.ask.slo is not None)

    def cost_s(self, seconds: float) -> float:
        """Return what a trial with loads of so many seconds will take, from those before."""
        count = len(self.ask.clients)
        others = [each.seconds - count * each.duration_s for each in self.trials if each.runs]
        return count * seconds + (median(others) if others else 0)

    def conclude(self, tried: Mapping[str, Settings]) -> Tuned:
        """Name the winner, and measure the engine and cold starts with it as far as time is left.

        Raises:
            StackError: LOAD, where no candidate could be measured.

        """
        found = self.scores()
        if not found:
            causes = "; ".join(f"{trial.candidate}: {trial.failed}" for trial in self.trials)
            raise StackError(
                f"No candidate could be measured: {causes}", f"See {self.file}.", Code.LOAD
            )
        slo = self.ask.slo is not None
        name, gain = candidates.winner(self.trials, self.ask.clients, slo=slo)
        last = [trial for trial in self.trials if trial.candidate == name][-1]
        service = self.service.choosing(last.serves)
        top, no_ceiling = self.top(service)
        starts = self.starts(service)
        settings = dict(last.serves)
        if starts.get("dio", math.inf) < COLDER * starts.get("auto", 0):
            settings[_variable(service, "LLAMA_ARG_LOAD_MODE")] = "dio"
        return Tuned(
            subject=self.subject,
            clients=self.ask.clients,
            shape=self.ask.shape,
            slo=str(self.ask.slo or ""),
            at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            runtime=self.where.name,
            settings=settings,
            winner=name,
            gain=gain,
            ceiling=top,
            no_ceiling=no_ceiling,
            of_engine=_of_engine(last, service, top),
            starts=starts,
            left_out=tuple(n for n in tried if n not in {t.candidate for t in self.trials}),
            scores=found,
            trials=tuple(self.trials),
        )

    def top(self, service: Service) -> tuple[Ceiling | None, str]:
        """Measure the engine alone, once; or say why not."""
        if self.left_s() < self.cost_s(0):
            return None, "The budget was spent."
        prompt, output = sum(self.plan.prompt) / 2, sum(self.plan.output) / 2
        turns = self.plan.turns  # each reads all before it
        try:
            return ceiling.measure(
                self.where,
                service,
                streams=self.ask.clients,
                prompt_tokens=round((turns + 1) / 2 * prompt + (turns - 1) / 2 * output),
                output_tokens=round(output),
                repeats=1,
                limit_s=self.left_s() / 2,
            ), ""
        except StackError as error:
            return None, error.cause

    def starts(self, service: Service) -> dict[str, float]:
        """Return how long a start takes in each load mode, with nothing of the file in memory."""
        variable = _variable(service, "LLAMA_ARG_LOAD_MODE")
        if not variable or variable in self.project.settings:
            return {}
        found = {}
        for mode in ("auto", "dio"):
            if self.left_s() < self.cost_s(0):
                break
            _forget(service.model_file)
            with (
                contextlib.suppress(StackError),
                self.serving(service.choosing({variable: mode})) as up,
            ):
                found[mode] = round(up.ready_s, 2)
        return found


def _variable(service: Service, engine: str) -> str:
    return next((var for var, name in service.settable.items() if name == engine), "")


def _forget(model: Path) -> None:
    """Let the system drop a model's file from its cache; the pages that nobody maps go."""
    for path in gguf_header.parts(model):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _of_engine(last: Trial, service: Service, top: Ceiling | None) -> dict[str, float]:
    found = {}
    for run in last.runs:
        engine = top.at(run.clients) if top else None
        if engine and run.decode_tokens_s:
            found[str(run.clients)] = engine.decode_share(service.slots, run.decode_tokens_s)
    return found
