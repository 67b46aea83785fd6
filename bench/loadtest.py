"""The load test: ceiling, server, runs in random order, telemetry, and what they add up to.

What was measured is on disk after every run, so that whatever ends the test early leaves it.
"""

import contextlib
import datetime as dt
import math
import platform
import random
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bench import (
    analysis,
    calibration,
    ceiling,
    generator,
    quiz,
    records,
    report,
    results,
    stats,
    verdict,
)
from bench.analysis import Point
from bench.calibration import Calibration
from bench.ceiling import Ceiling
from bench.generator import Interrupted, Load, Snapshot
from bench.prompts import Spread
from bench.records import Run
from bench.results import Change, Measurement, Provenance, Summary
from bench.telemetry import PREDICTED, Sample, Telemetry, counters
from bench.verdict import Slo, Verdict
from stack import client, fit, gpu, host, keys, runtime
from stack.config import Project, Service
from stack.errors import Code, StackError
from stack.gpu import Reading
from stack.runtime import Progress, Runtime
from stack.server import Server

T = TypeVar("T")

MOST_CLIENTS = 256
BUSY_CORES = 0.2
"""What else may run without being mentioned where a run is not valid."""
BEYOND = 4
"""A sweep goes on to so many times the knee, since one slow run may look like one."""
LENGTHS = Spread(96, 160)
_CALIBRATION_MS = 1500
_CALIBRATION_TOKENS = (32, 512)
CTRL_C = "Ctrl-C"
INTERRUPTED = 130
_IN_FILE_NAMES = str.maketrans(" /", "--")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure. Lengths are tokens, times seconds."""

    clients: tuple[int, ...] = (1, 2, 4, 8, 16)
    rates: tuple[float, ...] = ()
    """Requests a second, in place of clients."""
    arrivals: str = "poisson"
    """How they come at a rate: `poisson`, `constant` or `ramp`."""
    search: str = ""
    """`knee` doubles the clients until more of them bring little, `goodput` looks for the most of
    them, or the highest multiple of the first rate, that meets the SLO; else the loads given."""
    duration_s: float = 30
    warmup_s: float = 3
    repeats: int = 3
    prompts: str = "cold"
    prompt: Spread = LENGTHS
    output: Spread = LENGTHS
    shared: int = 0
    turns: int = 1
    hang_up: int = 0
    """Hang up on every so-manieth answer."""
    ignore_eos: bool = True
    """Not of questions, whose answers end."""
    seed: int = 0
    slo: Slo | None = None
    """The target of each load; None where there is none (goodput is then of the default one)."""
    ceiling: bool = True

    def load(self, level: float, number: int) -> Load:
        """Return run `number` at a level: so many clients, or that rate."""
        closed = not self.rates
        return Load(
            arrivals="closed" if closed else self.arrivals,
            clients=int(level) if closed else MOST_CLIENTS,
            rate=None if closed else level,
            duration_s=self.duration_s,
            warmup_s=self.warmup_s,
            prompts=self.prompts,
            prompt=self.prompt,
            output=self.output,
            shared=self.shared,
            turns=self.turns,
            hang_up=self.hang_up,
            ignore_eos=self.ignore_eos and self.prompts != "questions",
            seed=self.seed + number,
        )

    def check(self, context: int) -> None:
        """Refuse what cannot be measured in a slot of so many tokens. Raises StackError USAGE."""
        longest = (self.prompt.high + self.output.high) * self.turns
        numbers = {
            "clients": min(self.clients, default=0),
            "rate": min(self.rates, default=1),
            "duration": self.duration_s,
            "repeat": self.repeats,
            "prompt": min(self.prompt),
            "output": min(self.output),
        }
        for name, value in numbers.items():
            if not 0 < value < math.inf:
                raise _refused(f"--{name} must be above 0, not {value:g}", f"--{name} 1")
        if not self.rates and max(self.clients) > MOST_CLIENTS:
            raise _refused(f"{max(self.clients)} clients are too many", f"up to {MOST_CLIENTS}")
        for name, spread in (("prompt", self.prompt), ("output", self.output)):
            if spread.low > spread.high:
                raise _refused(f"--{name} {spread.low}-{spread.high} is empty", f"--{name} 96-160")
        if longest > context:
            raise _refused(
                f"Requests of {longest:,} tokens do not fit in a slot's context of {context:,}",
                "shorter --prompt and --output",
            )
        for level in self.rates or self.clients:  # now, not once the model is loaded
            generator.check(self.load(level, 0))


def parse(
    *, clients: str, rate: str, prompt: str, output: str, slo: str, search: str, **others: Any
) -> Plan:
    """Make a plan of a command line's words. Raises StackError USAGE."""
    return Plan(
        clients=tuple(_numbers("clients", clients, int, "1,4,16")),
        rates=tuple(_numbers("rate", rate, float, "0.5,1,2")) if rate else (),
        prompt=_spread("prompt", prompt),
        output=_spread("output", output),
        slo=Slo.parse(slo) if slo else None,
        search=search,
        **others,
    )


def _numbers(option: str, text: str, kind: Callable[[str], T], example: str) -> list[T]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        cause = f"--{option} {text} is no list of numbers"
        raise _refused(cause, f"--{option} {example}") from None


def _spread(option: str, text: str) -> Spread:
    low, *high = _numbers(option, text.replace("-", ",", 1), int, "96-160")
    return Spread(low, *(high or [low]))


def _refused(cause: str, example: str) -> StackError:
    return StackError(f"{cause}.", f"Give {example}, say.", Code.USAGE)


class Now(NamedTuple):
    """How a load test goes, while it runs."""

    stage: str
    step: int
    steps: int
    """0 where the number is not known."""
    snapshot: Snapshot | None = None
    sample: Sample | None = None
    reading: Reading | None = None


Watch = Callable[[Now], None]


def progress(watch: Watch) -> Progress:
    """Tell a watch of what is made before the test can begin, in tenths."""
    return lambda what, done, total: watch(Now(f"{what}: {10 * done // total}0 %", 0, 0))


@dataclass(frozen=True)
class Judgement:
    """The load test's last line: can it be believed, is the target met, why, and the exit code."""

    verdict: Verdict
    reason: str
    code: int = 0
    valid: bool = True

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{'VALID' if self.valid else 'INVALID'}, {self.verdict}: {self.reason}"


def own(
    chosen: Runtime,
    project: Project,
    service: Service,
    plan: Plan,
    *,
    folder: Path,
    stand_in: bool = False,
    progress: Progress = runtime.silent,
    watch: Watch = lambda _: None,
) -> Summary:
    """Measure the ceiling, serve a quant, measure that, and stop it again.

    A server of it that is up already is measured and left up, without a ceiling: it holds the
    memory that the ceiling needs.

    Raises:
        StackError: as `runtime.up` and `measure`.

    """
    writable(folder)
    chosen.check()
    key = keys.require(service, first_start="GLM_KEY_FILE" not in project.settings)
    found = chosen.find(service, key=key)
    serves = found is not None and found.ended() is None
    if not serves:
        gpu.require(service, chosen="GLM_GPU" in project.settings)
        header = runtime.ensure_model(project, service, stand_in=stand_in, progress=progress)
        choice = fit.choose(project, service, header)
        service = choice.service if choice else service
    plan.check(service.context)
    top = None
    like = plan.prompts != "questions"  # its lengths are not those of the plan
    if plan.ceiling and like and not serves:
        watch(Now("ceiling", 0, 0))
        runtime.ensure_engine(chosen, project, service, progress=progress)
        top = _ceiling(chosen, service, plan)
    watch(Now("start", 0, 0))
    up = runtime.up(chosen, project, service, stand_in=stand_in, progress=progress)
    try:
        return measure(up.server, plan, root=project.root, folder=folder, top=top, watch=watch)
    finally:
        if not up.was_up:
            chosen.stop(service)


def _ceiling(chosen: Runtime, service: Service, plan: Plan) -> Ceiling:
    doubled = (1 << n for n in range(MOST_CLIENTS.bit_length()))
    levels = (1, service.slots) if plan.rates else doubled if plan.search else plan.clients
    return ceiling.measure(
        chosen,
        service,
        streams=tuple(levels),
        prompt_tokens=round(sum(plan.prompt) / 2),
        output_tokens=round(sum(plan.output) / 2),
    )


def attached(service: Service, url: str, key_file: Path | None = None) -> Server:
    """Return the handle of somebody else's server; its key is the service's if no file is named.

    Raises:
        StackError: VERIFY, where it does not answer or has not loaded yet; USAGE without a key.

    """
    try:
        key = key_file.read_text().strip() if key_file else keys.read(service)
    except OSError as error:
        raise _refused(f"{key_file} cannot be read: {error.strerror}", "--key-file FILE") from error
    server = Server(runtime="attached", service=service, url=url.rstrip("/"), key=key)
    if (state := client.health(server)) != "ready":
        raise StackError(
            f"The server at {url} is not ready: {state}.",
            "Start it, or wait until it has loaded, and try again.",
            Code.VERIFY,
        )
    return server


def measure(
    server: Server,
    plan: Plan,
    *,
    root: Path,
    folder: Path,
    top: Ceiling | None = None,
    watch: Watch = lambda _: None,
) -> Summary:
    """Run a plan against a server; write records and summary to a folder after every run.

    A server that ends, or Ctrl-C, ends the test early: the summary says so in `interrupted`.

    Raises:
        StackError: USAGE for a plan that makes no sense, DISK where the folder cannot be written,
            VERIFY where the server does not answer from the start on.

    """
    writable(folder)
    says = client.props(server)
    plan.check(says["default_generation_settings"]["n_ctx"])
    session = _Session(
        server, plan, folder, top, watch, provenance(server, says, root), says["total_slots"]
    )
    try:
        with Telemetry(server, uuid=session.uuid) as session.telemetry:
            for level, repeat in session.runs():
                session.one(level, repeat)
    except (KeyboardInterrupt, _LostError) as stop:
        session.interrupted = str(stop) or f"{CTRL_C}, before the next run"
    except StackError as error:
        if not session.measurements:
            raise
        session.interrupted = error.cause
    return session.summary


@dataclass(frozen=True)
class Finished:
    """A load test that is judged, with its comparison to the baseline."""

    summary: Summary
    said: Judgement
    changes: tuple[Change, ...] = ()


def finish(
    summary: Summary, plan: Plan, folder: Path, *, baseline: Summary | None = None
) -> Finished:
    """Judge a load test, and write summary and report with the verdict in them.

    Raises:
        StackError: USAGE where the baseline is of another machine, model or load; what was
            measured is written all the same.

    """
    try:
        changes = results.compare(summary, baseline) if baseline else ()
        said = conclude(summary, plan, changes)
    except StackError as error:
        _write(replace(summary, verdict=error.cause), folder)
        raise
    done = replace(summary, verdict=str(said))
    _write(done, folder)
    return Finished(done, said, changes)


def _write(summary: Summary, folder: Path) -> None:
    path = folder / "summary.json"
    results.write(summary, path)
    # Of what was written, to its digits: whoever makes the report again gets the same.
    (folder / "report.html").write_text(report.page(results.read(path)))


class _LostError(Exception):
    """The server ended; the text says how and when."""


LEAST_BYTES = 2**20
"""What the records of a short run take."""


def writable(folder: Path) -> None:
    """Make a folder for results.

    Raises:
        StackError: DISK where nothing can be written to it, USAGE where it has results already.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(LEAST_BYTES))
    except OSError as error:
        raise StackError(
            f"Results cannot be written to {folder}: {error.strerror}.",
            "Name another folder with --out.",
            Code.DISK,
        ) from error
    if (folder / "summary.json").exists():
        cause = f"{folder} holds the results of another load test."
        raise StackError(cause, "Name another folder with --out.", Code.USAGE)


@dataclass
class _Session:
    server: Server
    plan: Plan
    folder: Path
    top: Ceiling | None
    watch: Watch
    provenance: Provenance
    slots: int
    interrupted: str | None = None
    telemetry: Telemetry = field(init=False)
    measurements: list[Measurement] = field(default_factory=list)
    at: str = field(default_factory=lambda: dt.datetime.now(dt.UTC).isoformat(timespec="seconds"))
    steps: int = 0
    _calibrations: dict[float, Calibration] = field(default_factory=dict)

    @property
    def uuid(self) -> str | None:
        """The GPU whose readings belong to the server, where we know it."""
        service = self.server.service
        known = self.server.runtime != "attached" and service.gpus
        return gpu.require(service)[0].uuid if known else None

    @property
    def wrong_limit(self) -> float | None:
        """The share of wrong answers that the model's record allows."""
        if self.plan.prompts != "questions":
            return None
        return quiz.of(self.server.service, text=self.plan.prompt).limit

    @property
    def summary(self) -> Summary:
        return Summary(
            at=self.at,
            provenance=self.provenance,
            settings=settings(self.plan),
            slo=self.plan.slo or Slo(),
            measurements=tuple(self.measurements),
            ceiling=self.top,
            wrong_limit=self.wrong_limit,
            interrupted=self.interrupted,
        )

    def runs(self) -> Iterator[tuple[float, int]]:
        """Yield level and repeat, in random order but for what a search has to try in turn."""
        plan = self.plan
        levels: Sequence[float] = plan.rates or plan.clients
        tried: list[float] = []
        if plan.search == "knee":
            for level in self.to_the_knee():
                tried.append(level)
                yield level, 0
        elif plan.search == "goodput":
            yield from self.to_the_limit()
            return
        jobs = [(level, n) for level in tried or levels for n in range(plan.repeats)]
        jobs = [job for job in jobs if job[1] or job[0] not in tried]
        self.steps = len(self.measurements) + len(jobs)
        random.Random(plan.seed).shuffle(jobs)  # an order, no secret
        yield from jobs

    def to_the_knee(self) -> Iterator[float]:
        """Yield 1, 2, 4 and so on clients until the knee is well behind."""
        level = 1
        while level <= MOST_CLIENTS:
            yield level
            points = {m.point.clients: m.point for m in self.measurements}
            known = ((n, p.tokens_s, p.e2e.mean) for n, p in points.items())
            bend = verdict.knee([(n, rate, mean) for n, rate, mean in known if mean])
            if points[level].failed or (bend and level >= BEYOND * bend):
                return
            level *= 2

    def to_the_limit(self) -> Iterator[tuple[float, int]]:
        """Yield levels, more often where it is open, around the highest that meets the SLO."""
        unit = self.plan.rates[0] if self.plan.rates else 1
        slo = self.plan.slo or Slo()
        search = boundary(MOST_CLIENTS)
        step = next(search)
        while True:
            points: list[Point] = []
            outcome: Verdict = "UNRESOLVED"
            while outcome == "UNRESOLVED" and len(points) < self.plan.repeats:
                yield step * unit, len(points)
                points.append(self.measurements[-1].point)
                outcome = verdict.judge(points, slo).verdict
            try:
                step = search.send(outcome == "PASS")
            except StopIteration:
                return

    def one(self, level: float, repeat: int) -> None:
        """Measure one run, and keep it."""
        load = self.plan.load(level, len(self.measurements))
        before = counters(self.server)
        try:
            run = generator.run(self.server, load, watch=partial(self.tell, load))
        except Interrupted as stop:
            self.interrupted = f"{CTRL_C}, in the run with {label(load)}"
            self.keep(stop.run, repeat, level, tokens=None)
            raise KeyboardInterrupt(self.interrupted) from None
        if how := lost(self.server):
            self.interrupted = f"{how} {failed_s(run):.1f} s into the run with {label(load)}"
            self.keep(run, repeat, level, tokens=None)
            raise _LostError(self.interrupted)
        after = counters(self.server)
        known = before.keys() & after.keys() & {PREDICTED}
        tokens = round(after[PREDICTED] - before[PREDICTED]) if known else None
        self.keep(run, repeat, level, tokens=tokens)

    def tell(self, load: Load, snapshot: Snapshot) -> bool:
        """Pass on how it goes; return whether the server is lost, and the run with it."""
        sample, reading = self.telemetry.latest
        step = len(self.measurements) + 1
        self.watch(Now(label(load), step, self.steps, snapshot, sample, reading))
        return self.server.ended() is not None

    def keep(self, run: Run, repeat: int, level: float, *, tokens: int | None) -> None:
        """Analyse a run, and write it with all before it."""
        slo = self.plan.slo or Slo()
        point = analysis.analyse(run, slo, server_tokens=tokens)
        begin_ns = run.begun_ns + round(point.begin_s * 1e9)
        end_ns = begin_ns + round(point.window_s * 1e9)
        self.telemetry.update(end_ns)
        span = self.telemetry.span(begin_ns, end_ns)
        calibrated = self.calibrated(level, point)
        made = point.tokens_s * point.window_s
        self.measurements.append(
            Measurement(
                point=point,
                repeat=repeat,
                faults=verdict.faults(point, calibrated, throttled=span.throttle_reasons),
                calibration=calibrated,
                slots=self.slots,
                span=span,
                joules_token=span.energy_j / made if span.energy_j and made else None,
                series=self.telemetry.series(run.begun_ns, run.ended_ns),
            )
        )
        name = f"{results.name_of(results.load_of(point))} {repeat}".translate(_IN_FILE_NAMES)
        records.write(run.records, self.folder / f"{name}.jsonl")
        results.write(self.summary, self.folder / "summary.json")

    def calibrated(self, level: float, point: Point) -> Calibration | None:
        """Calibrate the client once a level, with as many streams and events as it had there."""
        itl_ms = point.itl.p50
        if level not in self._calibrations and itl_ms and not self.interrupted:
            streams = max(1, min(math.ceil(point.concurrency), self.slots))
            low, high = _CALIBRATION_TOKENS
            tokens = min(max(low, round(_CALIBRATION_MS / itl_ms)), high)
            self._calibrations[level] = calibration.calibrate(streams, itl_ms=itl_ms, tokens=tokens)
        return self._calibrations.get(level)


def label(load: Load) -> str:
    """Say a load in two words."""
    return results.name_of((load.arrivals, load.clients, load.rate))


def lost(server: Server) -> str | None:
    """Say how a server was lost, or None while it answers."""
    name = server.service.name
    if how := server.ended():
        return f"{name} {how}"
    state = client.health(server)
    return None if state == "ready" else f"{name} is {state}, and failed"


def failed_s(run: Run) -> float:
    """Return when the first request of a run failed, in seconds after its begin."""
    failures = (record.end_ns for record in run.records if record.error)
    return (min(failures, default=run.ended_ns) - run.begun_ns) / 1e9


def settings(plan: Plan) -> dict[str, Any]:
    """Return what makes two load tests comparable; which loads they try is not in it."""
    shape = asdict(plan)
    for name in ("clients", "rates", "search", "repeats", "slo", "ceiling"):
        del shape[name]
    if not plan.hang_up:  # as in what was measured before there was such a thing
        del shape["hang_up"]
    return shape


def provenance(server: Server, says: Mapping[str, Any], root: Path) -> Provenance:
    """Return what is measured, and on what, as far as it is known."""
    service, own_machine = server.service, server.runtime != "attached"
    device = gpu.require(service)[0] if own_machine and service.gpus else None
    model = Path(says["model_path"]).name
    here = host.processor()
    return Provenance(
        host=here if own_machine else f"unknown; client: {here}",
        gpu=device.name if device else None,
        driver=device.driver if device else None,
        engine=says["build_info"],
        model=model,
        stand_in="stand-in" in model or "random" in model,
        runtime=server.runtime,
        server=service.environment if own_machine else {},
        client="asyncio, bench.transport",
        python=platform.python_version(),
        commit=_commit(root),
    )


def _commit(root: Path) -> str | None:
    with contextlib.suppress(StackError):
        done = host.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root)
        return done.stdout.strip() or None
    return None


def conclude(summary: Summary, plan: Plan, changes: Sequence[Change] = ()) -> Judgement:
    """Judge a load test: whether it ended, is right, is valid, and then meets its targets.

    Answers are wrong at any speed: too many of them are a FAIL of a test that is not valid, too.
    Those are no change for the worse against a baseline, and the plan's SLO: at each load that was
    asked for, or at any in a search for goodput. Without an SLO no request may fail.
    """
    runs = summary.measurements
    invalid = [each for each in runs if each.faults]
    valid = bool(runs) and not invalid
    if summary.interrupted:
        code = INTERRUPTED if summary.interrupted.startswith(CTRL_C) else Code.VERIFY
        return Judgement("FAIL", summary.interrupted, code, valid=valid)
    if wrong := _wrong(summary):
        return Judgement("FAIL", wrong, Code.VERIFY, valid=valid)
    if invalid:
        first = invalid[0]
        where = f"{_name(first)}: {first.faults[0]} ({len(invalid)} of {len(runs)} runs)"
        spans = (each.span for each in invalid)
        others = max((span.other_cores or 0 for span in spans if span), default=0)
        also = f"; other processes took up to {others:.1f} cores" if others > BUSY_CORES else ""
        return Judgement("UNRESOLVED", where + also, Code.VERIFY, valid=False)
    if worse := [each for each in changes if each.verdict == "worse"]:
        told = f"{worse[0].load}: {worse[0].metric} is {worse[0].ratio.value:.3f} of the baseline's"
        return Judgement("FAIL", f"{told} ({len(worse)} are worse)", Code.MISSED)
    return _against_target(summary, plan, changes)


def _wrong(summary: Summary) -> str | None:
    """Say at which load more answers are wrong than the model's record allows."""
    for load, runs in results.by_load(summary.measurements).items():
        points = [each.point for each in runs]
        wrong = sum(point.wrong or 0 for point in points)
        count = sum(point.requests - point.failed for point in points)
        share = stats.wilson(wrong, count)
        if summary.wrong_limit is not None and share.low > summary.wrong_limit:
            return (
                f"{results.name_of(load)}: {wrong} of {count:,} answers are wrong "
                f"({share.low:.2%} or more; by its record {summary.wrong_limit:.2%} may be)"
            )
    return None


def _against_target(summary: Summary, plan: Plan, changes: Sequence[Change]) -> Judgement:
    slo = plan.slo or Slo()
    loads = results.by_load(summary.measurements)
    told = {
        results.name_of(load): verdict.judge([each.point for each in runs], slo)
        for load, runs in loads.items()
    }
    if plan.search == "goodput":
        met = [name for name, each in told.items() if each.verdict == "PASS"]
        if met:
            return Judgement("PASS", f"{met[-1]} is the most with {slo}")
        return Judgement("FAIL", next(iter(told.values())).reason, Code.MISSED)
    failed = sum(each.point.failed for each in summary.measurements)
    if plan.slo is None and failed:
        kinds = ", ".join({kind for each in summary.measurements for kind in each.point.errors})
        return Judgement("FAIL", f"{failed} requests failed: {kinds}", Code.VERIFY)
    for wanted, code in (("FAIL", Code.MISSED), ("UNRESOLVED", 0)):
        for name, each in told.items():
            if plan.slo and each.verdict == wanted:
                return Judgement(each.verdict, f"{name}: {each.reason}", code)
    if open_ := [each for each in changes if each.verdict == "unresolved"]:
        reason = f"{open_[0].load}: {open_[0].metric} is not resolved ({len(open_)} are not)"
        return Judgement("UNRESOLVED", f"{reason}; more repeats would tell")
    aim = str(slo) if plan.slo else "no request failed" + (", nothing is worse" if changes else "")
    known = [each.point.wrong for each in summary.measurements if each.point.wrong is not None]
    if known:
        aim += f", {sum(known)} answers were wrong"
    return Judgement("PASS", f"{len(summary.measurements)} runs: {aim}")


def _name(each: Measurement) -> str:
    return results.name_of(results.load_of(each.point))


def boundary(most: int) -> Generator[int, bool, None]:
    """Look for the highest whole number that passes, by doubling and halving.

    A generator: yields what to try, is sent whether it passed, and ends once the gap is an eighth.
    """
    low, high, step = 0, 0, 1
    while True:
        passed = yield step
        low, high = (step, high) if passed else (low, step)
        if not high:
            if low >= most:
                return
            step = min(2 * low, most)
        elif high - low <= max(1, low // 8):
            return
        else:
            step = (low + high) // 2
