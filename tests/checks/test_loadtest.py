"""The load test can be believed: it agrees with the server, with the engine, and says when not."""

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import ceiling, generator, loadtest, prefill, quiz, records, results, stats, timeline
from bench.analysis import Point
from bench.generator import Load
from bench.loadtest import Now, Plan
from bench.prompts import Spread
from bench.results import Measurement, Summary
from bench.telemetry import PREDICTED, PROMPT, Span, counters
from bench.verdict import Slo
from stack import config, gpu, host, keys, runtime
from stack.config import Project, Service
from stack.errors import Code, StackError
from stack.server import Server
from stack.wait import wait_until
from tests import workspace
from tests.checks.conftest import IDLE, Broken, Notice, Target, skip_unasked
from tests.ledger import Ledger
from tests.proxy import proxied, swapper, token_dropper
from tests.workspace import Started

FEW, MANY = 1, 12
# Prompts of some length: with short ones the tiny model gives a token every 0.6 ms, and a tenth of
# that is less than two processes on two cores can be held to.
PLAN = Plan(
    clients=(FEW, MANY),
    prompt=Spread(224, 288),
    output=Spread(48, 80),
    duration_s=5,
    warmup_s=1,
    repeats=1,
)
QUIZ = Load(prompts="questions", ignore_eos=False, duration_s=300, warmup_s=0)
QUESTIONS = {
    "alone": replace(QUIZ, requests=12, clients=1, prompt=Spread(200, 400)),
    "many": replace(QUIZ, requests=40, clients=12, prompt=Spread(200, 400)),
    "hanging up": replace(QUIZ, requests=24, clients=12, prompt=Spread(200, 400), hang_up=4),
    "one text": replace(QUIZ, requests=24, clients=6, prompt=Spread(480, 480), shared=480),
    "context full": replace(QUIZ, requests=6, clients=4, prompt=Spread(1700, 1750)),
}
"""What is asked of the server: four texts of the last kind fill a context of 8,192 tokens."""
ATTEMPTS = 2
"""What else runs on a machine makes a run INVALID; that is no fault of what is tested."""
KILLED_S = 3
LONG = replace(PLAN, clients=(2,), duration_s=60)


@dataclass(frozen=True)
class Measured:
    """A load test, and where its results are."""

    summary: Summary
    folder: Path

    @property
    def valid(self) -> Summary:
        """The summary as if every run were valid and had been repeated with the same result."""
        runs = tuple(replace(each, faults=()) for each in self.summary.measurements)
        return replace(self.summary, measurements=2 * runs)

    def at(self, clients: int) -> Measurement:
        """Return the first run with so many clients."""
        return next(m for m in self.summary.measurements if m.point.clients == clients)


@pytest.fixture(scope="session")
def measured(
    request: pytest.FixtureRequest,
    project: Project,
    service: Service,
    target: Target,
    tmp_path_factory: pytest.TempPathFactory,
) -> Measured:
    option = request.config.option

    def measure(folder: Path) -> Summary:
        if target.runtime == "attached":
            server = request.getfixturevalue("server")
            return loadtest.measure(server, PLAN, root=workspace.ROOT, folder=folder)
        engine = request.getfixturevalue("engine")
        return loadtest.own(engine, project, service, PLAN, folder=folder)

    for attempt in range(ATTEMPTS):
        folder = tmp_path_factory.mktemp("results")
        if option.evidence:
            folder = option.evidence / f"loadtest-{target}-{attempt}"
        summary = loadtest.finish(measure(folder), PLAN, folder).summary
        if not any(each.faults for each in summary.measurements):
            break
    return Measured(summary, folder)


@pytest.fixture
def running(
    request: pytest.FixtureRequest, project: Project, service: Service, target: Target
) -> Iterator[Server]:
    """A server for one test, which may kill it."""
    if target.runtime == "attached":
        yield request.getfixturevalue("server")
        return
    with runtime.serving(request.getfixturevalue("engine"), project, service) as up:
        yield up.server


@pytest.fixture(scope="session")
def answering(
    request: pytest.FixtureRequest, target: Target, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server for the questions, of a deployment of its own."""
    if target.runtime == "attached":
        yield request.getfixturevalue("server")
        return
    quant = request.getfixturevalue("runnable").quant
    folder = workspace.make(tmp_path_factory.mktemp("answering"))
    project = config.load(folder, overrides={f"GLM_{quant.upper()}_PORT": ""})
    service = project.service(quant)
    keys.make(service)
    chosen = runtime.choose(project, want=request.getfixturevalue("engine").name)
    with runtime.serving(chosen, project, service) as up:
        yield up.server


def quiet(measured: Measured) -> None:
    """Skip what a machine that is busy with other things cannot show."""
    spans = (each.span for each in measured.summary.measurements if each.faults)
    others = [span.other_cores for span in spans if span and span.other_cores]
    if max(others, default=0) > loadtest.BUSY_CORES:
        pytest.skip(f"other processes took up to {max(others):.1f} cores meanwhile")


def test_every_run_is_valid(measured: Measured) -> None:
    quiet(measured)
    assert [each.faults for each in measured.summary.measurements] == [()] * 2


def test_it_passes(measured: Measured) -> None:
    quiet(measured)
    said = loadtest.conclude(measured.summary, PLAN)

    assert (said.verdict, said.code) == ("PASS", 0), said


def test_no_more_than_the_slots_are_processed(measured: Measured) -> None:
    most = [m.span.processing_most for m in measured.summary.measurements if m.span]

    assert max(filter(None, most)) == measured.at(MANY).slots


def test_clients_beyond_the_slots_wait(measured: Measured) -> None:
    run = measured.at(MANY)
    assert run.span
    assert run.slots

    assert run.span.deferred == pytest.approx(MANY - run.slots, abs=2)


def test_one_client_never_waits(measured: Measured) -> None:
    span = measured.at(FEW).span

    assert span
    assert span.deferred_most == 0


@pytest.mark.parametrize("clients", [FEW, MANY])
def test_served_is_below_the_engines_ceiling_but_not_far(measured: Measured, clients: int) -> None:
    if not measured.summary.ceiling:
        pytest.skip("an attached server's engine is out of reach")
    run = measured.at(clients)
    share = ceiling.share(run.point, run.slots, measured.summary.ceiling)

    assert share
    assert share.decode
    # Above 1 only where others took more of the machine from the engine than from the server.
    assert 0.05 < share.whole < 1.5
    assert 0.05 < share.decode < 1.5


def test_server_and_client_use_the_cpu(measured: Measured, target: Target) -> None:
    if target.runtime == "attached":
        pytest.skip("an attached server's processes are out of reach")
    span = measured.at(MANY).span

    assert span
    assert span.server_cores
    assert span.client_cores
    assert 0 < span.client_cores < span.server_cores


def test_energy_is_told_where_there_is_a_gpu(measured: Measured, service: Service) -> None:
    if not service.gpus or not any(each.energy_j for each in gpu.gpus()):
        pytest.skip(f"{service.name} uses no GPU that counts its energy")

    assert measured.at(FEW).joules_token


def test_results_come_back_as_they_were_written(measured: Measured) -> None:
    read = results.read(measured.folder / "summary.json")
    kept = [len(list(records.read(path))) for path in measured.folder.glob("*.jsonl")]

    assert len(read.measurements) == len(kept) == 2
    assert read.provenance == measured.summary.provenance
    assert min(kept) >= measured.at(FEW).point.requests
    assert "<svg" in (measured.folder / "report.html").read_text()


def test_the_same_is_no_worse(measured: Measured) -> None:
    changes = results.compare(measured.valid, measured.valid)

    assert {each.verdict for each in changes} == {"same"}


def changed(summary: Summary, change: Callable[[Point], Point]) -> Summary:
    """Return a summary with other points."""
    runs = (replace(each, point=change(each.point)) for each in summary.measurements)
    return replace(summary, measurements=tuple(runs))


def test_gate_fails_against_a_baseline_that_was_faster(measured: Measured) -> None:
    baseline = changed(measured.valid, lambda point: replace(point, tokens_s=10 * point.tokens_s))

    said = loadtest.conclude(measured.valid, PLAN, results.compare(measured.valid, baseline))

    assert (said.verdict, said.code) == ("FAIL", Code.MISSED)
    assert "output tokens/s" in said.reason


def test_target_that_nothing_meets_is_missed(measured: Measured) -> None:
    summary = changed(measured.valid, lambda point: replace(point, good=0))

    said = loadtest.conclude(summary, replace(PLAN, slo=Slo()))

    assert (said.verdict, said.code) == ("FAIL", Code.MISSED)


def test_tokens_are_the_servers_own_count_exactly(answering: Server) -> None:
    load = Load(clients=3, requests=12, duration_s=60, prompt=Spread(64, 96), output=Spread(16, 64))
    before = counters(answering)

    run = generator.run(answering, load)

    after = counters(answering)
    assert [each.error for each in run.records] == [None] * 12
    seen = sum(read.tokens for each in run.records for read in each.reads)
    assert seen == sum(each.output_tokens or 0 for each in run.records)
    assert after[PREDICTED] - before[PREDICTED] == seen
    prompts = sum((each.prompt_tokens or 0) - (each.cached_tokens or 0) for each in run.records)
    assert after[PROMPT] - before[PROMPT] == prompts


@pytest.mark.parametrize("name", QUESTIONS)
def test_answers_under_load_are_right(
    answering: Server, tell: Callable[[str], None], name: str
) -> None:
    load = QUESTIONS[name]

    asked = generator.run(answering, load).records

    answered = [each for each in asked if not each.cut]
    wrong = sum(map(bool, (each.wrong for each in answered)))
    tell(
        f"{answering.runtime}, {name}, {load.clients} clients: {wrong} of {len(answered)} answers "
        f"are wrong, {len(asked) - len(answered)} were hung up on"
    )
    limit = quiz.of(answering.service, text=load.prompt).limit
    assert [each.error for each in answered] == [None] * len(answered)
    assert len(asked) == load.requests
    assert limit is not None
    assert stats.wilson(wrong, len(answered)).low <= limit


@pytest.mark.parametrize(
    "damage", [swapper, lambda: token_dropper(25)], ids=["swaps-answers", "drops-tokens"]
)
def test_wrong_answers_under_load_are_counted(
    answering: Server,
    target: Target,
    ledger: Ledger,
    request: pytest.FixtureRequest,
    damage: Callable[[], Callable[[bytes], bytes]],
) -> None:
    if target.runtime == "docker":
        pytest.skip("the proxy stands before one runtime's server")
    with proxied(answering, damage()) as proxy:
        run = generator.run(proxy, QUESTIONS["many"])

    broken = f"a proxy that {request.node.callspec.id.removeprefix(f'{target}-')}"
    with ledger.catching(test_answers_under_load_are_right, broken, says=r"== \[\]"):
        assert [each.wrong for each in run.records if each.wrong] == []
    assert not any(each.error for each in run.records)


FAULT = {"faults": ("it broke",), "span": Span()}  # on a machine that has nothing else to do
WRONG: dict[Callable[..., None], tuple[str, dict[str, Any], str]] = {
    test_every_run_is_valid: ("a run with a fault", FAULT, "it broke"),
    test_no_more_than_the_slots_are_processed: ("a slot less", {"slots": 3}, r"4(.0)? == 3"),
    test_clients_beyond_the_slots_wait: ("slots for all", {"slots": MANY}, "± 2"),
    test_it_passes: ("a run with a fault", FAULT, "it broke"),
    test_one_client_never_waits: ("one that waits", {"span": Span(deferred_most=1)}, "1 == 0"),
    test_server_and_client_use_the_cpu: (
        "a client that takes more than the server",
        {"span": Span(server_cores=1, client_cores=2)},
        "2 < 1",
    ),
    test_energy_is_told_where_there_is_a_gpu: ("no energy", {"joules_token": None}, "None"),
}


@pytest.mark.parametrize("check", WRONG, ids=lambda check: check.__name__)
def test_wrong_figures_are_noticed(
    measured: Measured, notice: Notice, check: Callable[..., None]
) -> None:
    broken, figures, says = WRONG[check]
    runs = tuple(replace(each, **figures) for each in measured.summary.measurements)
    wrong = replace(measured, summary=replace(measured.summary, measurements=runs))

    with_gpu = {"stack.gpu.gpus": lambda: [SimpleNamespace(energy_j=1, pids=())]}
    q4 = config.load(workspace.ROOT).service("q4")
    notice(check, f"figures with {broken}", says=says, patch=with_gpu, measured=wrong, service=q4)


def test_server_killed_mid_run_is_told_with_its_time(
    running: Server, target: Target, tmp_path: Path
) -> None:
    if target.runtime == "attached":
        pytest.skip("an attached server is not ours to kill")

    def kill(now: Now) -> None:
        if now.snapshot and now.snapshot.elapsed_s > KILLED_S:
            with contextlib.suppress(ProcessLookupError):  # told again before it is noticed
                os.kill(running.processes[0].pid, signal.SIGKILL)

    start = time.monotonic()

    summary = loadtest.measure(running, LONG, root=workspace.ROOT, folder=tmp_path, watch=kill)

    said = loadtest.finish(summary, LONG, tmp_path).said
    assert (said.verdict, said.code) == ("FAIL", Code.VERIFY)
    told = re.search(r"ended.* ([\d.]+) s into the run with 2 clients", said.reason)
    assert told, said.reason
    assert float(told[1]) == pytest.approx(KILLED_S, abs=1)
    assert time.monotonic() - start < LONG.duration_s / 2
    assert results.read(tmp_path / "summary.json").interrupted == summary.interrupted
    assert any(not each.error for each in records.read(next(tmp_path.glob("*.jsonl"))))


def test_wrong_key_is_refused_before_the_start(answering: Server, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="refuses the key") as caught:
        loadtest.measure(
            replace(answering, key="wrong"), PLAN, root=workspace.ROOT, folder=tmp_path / "x"
        )

    assert caught.value.code == Code.VERIFY


def invoke(folder: Path, *arguments: str) -> Started:
    return workspace.invoke(folder, "bench", *arguments, session=True)


@pytest.mark.parametrize("where", ["--docker", "--native"])
def test_interrupt_leaves_a_summary_and_no_child(
    request: pytest.FixtureRequest, tmp_path: Path, where: str
) -> None:
    skip_unasked(request, where)
    folder = workspace.make(tmp_path, GLM_TINY_PORT=str(workspace.free_port()))
    out = folder / "out"
    service = config.load(folder).service("tiny")
    load = ("--clients=2", "--warmup=1", "--duration=60", "--no-ceiling")
    with invoke(folder, *load, f"--out={out}", where) as process:
        wait_until(
            lambda: in_flight(service) or process.poll() is not None or None,
            timeout_s=60,
            what="no run",
        )
        time.sleep(3)  # of the run
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)

    if "No Docker engine answers" in err:
        pytest.skip("no Docker engine answers")
    assert process.returncode == loadtest.INTERRUPTED, err
    summary = results.read(out / "summary.json")
    assert summary.interrupted
    assert summary.measurements[0].point.requests > 0
    assert not host.listeners(service.port or 0)
    assert not [path for path in Path("/proc").glob("[0-9]*/cwd") if link(path) == str(folder)]


def in_flight(service: Service) -> bool | None:
    """Return whether anybody is connected to a service's port, as its clients are in a run."""
    table = Path("/proc/net/tcp").read_text().splitlines()[1:]
    to = f":{service.port or 0:04X}"
    rows = [line.split() for line in table]
    return sum(row[2].endswith(to) and row[3] == "01" for row in rows) >= 2 or None


def link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--clients=0"], Code.USAGE, "--clients must be above 0"),
        (["--clients=1,-4"], Code.USAGE, "--clients must be above 0"),
        (["--clients=many"], Code.USAGE, "no list of numbers"),
        (["--clients=1000000"], Code.USAGE, "too many"),
        (["--rate=0"], Code.USAGE, "--rate must be above 0"),
        (["--slo=fast"], Code.USAGE, "--slo ttft=500"),
        (["--prompt=9000"], Code.USAGE, "context of 8,192"),
        (["--prompt=90-80"], Code.USAGE, "is empty"),
        (["--baseline=compose.yaml"], Code.USAGE, "no summary"),
        (["--baseline=absent.json"], Code.USAGE, "could not be read"),
        (["--out=/proc/x"], Code.DISK, "--out"),
        (["--attach=http://127.0.0.1:1", "--key-file=.env"], Code.VERIFY, "not ready: starting"),
        (["--attach=http://127.0.0.1:1", "--key-file=absent"], Code.USAGE, "cannot be read"),
        (["--native", "--docker"], Code.USAGE, "exclude"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_two_lines(
    tmp_path: Path, arguments: list[str], code: Code, word: str
) -> None:
    folder = workspace.make(tmp_path, GLM_TINY_PORT=str(workspace.free_port()))
    runs = [] if "--docker" in arguments or "--attach" in arguments[0] else ["--native"]

    with invoke(folder, "--quant=tiny", *runs, *arguments) as process:
        out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (code, ""), err
    assert len(err.strip().splitlines()) == 2
    assert word in err


def test_time_line_of_steps_accounts_for_the_whole_step(tmp_path: Path, target: Target) -> None:
    if target != Target("native", "tiny") or not shutil.which("cc"):
        pytest.skip("is tried natively, with tiny, where there is a C compiler")
    folder = workspace.make(tmp_path, GLM_TINY_SLOTS="2", GLM_TINY_SHARED_CACHE="0")
    project = config.load(folder, overrides={"GLM_TINY_PORT": "", "GLM_CLIENTS": "2"})
    traces = tmp_path / "traces"
    traces.mkdir()

    row = timeline.measure(project, target.quant, seconds=3, folder=traces)

    assert row.decode.steps > 100
    assert row.begin.steps > 2
    assert row.launches == 1  # prompts beside streams, and streams beside free slots, in one batch
    assert row.begin.whole_ms > row.decode.whole_ms > row.decode.parts_ms["gpu"] > 0
    for kind in (row.decode, row.begin, row.other):
        assert sum(kind.parts_ms.values()) == pytest.approx(kind.whole_ms, abs=0.01)


def test_prompt_is_read_faster_when_its_beginning_is_cached(running: Server) -> None:
    (reading,) = prefill.read(running, [1500])

    assert reading.cached_ms < 0.5 * reading.cold_ms
    assert reading.longest_gap_ms > 2 * reading.gap_ms
    assert 0.5 < reading.stalled <= 1


# --- What is broken otherwise, each of which a check above must notice.


change = changed


def all_good(summary: Summary, _: object) -> Summary:
    return change(summary, lambda point: replace(point, good=point.requests))


def worse(*_: object) -> tuple[SimpleNamespace, ...]:
    return (SimpleNamespace(verdict="worse"),)


measure_steps = timeline.measure


def two_launches(*given: Any, **more: Any) -> timeline.Row:
    return replace(measure_steps(*given, **more), launches=2)


SOON = replace(PLAN, clients=(2,), duration_s=2, warmup_s=0.5)
UNLIKE: dict[Callable[..., None], Broken] = {
    test_the_same_is_no_worse: (
        "a comparison that finds a loss",
        {"patch": {"bench.results.compare": worse}},
    ),
    test_gate_fails_against_a_baseline_that_was_faster: (
        "a comparison that finds nothing",
        {"patch": {"bench.results.compare": lambda *_: ()}},
    ),
    test_target_that_nothing_meets_is_missed: (
        "answers that all meet it",
        {"patch": {f"{__name__}.changed": all_good}},
    ),
    test_server_killed_mid_run_is_told_with_its_time: (
        "a server that nobody kills",
        {"patch": {"os.kill": lambda *_: None, f"{__name__}.LONG": SOON}},
    ),
    test_interrupt_leaves_a_summary_and_no_child: (
        IDLE[0],
        IDLE[1] | {"where": "--native", "says": "No such process"},
    ),
    test_bad_input_is_refused_in_two_lines: IDLE,
    test_time_line_of_steps_accounts_for_the_whole_step: (
        "two launches for one",
        {"patch": {"bench.timeline.measure": two_launches}},
    ),
}


@pytest.mark.parametrize("check", UNLIKE, ids=lambda check: check.__name__)
def test_what_is_unlike_is_noticed(
    target: Target, notice: Notice, check: Callable[..., None]
) -> None:
    if target != Target("native", "tiny"):
        pytest.skip("shown natively, with tiny")
    broken, how = UNLIKE[check]

    notice(check, broken, **how)


def test_results_that_are_not_all_there_are_noticed(
    measured: Measured, notice: Notice, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(measured.folder, tmp_path / "less"))
    next(folder.glob("*.jsonl")).unlink()
    check = test_results_come_back_as_they_were_written
    notice(check, "results without a run", measured=replace(measured, folder=folder))

    if top := measured.summary.ceiling:
        slow = tuple(replace(each, whole_tokens_s=1.0) for each in top.streams)
        less = replace(measured.summary, ceiling=replace(top, streams=slow))
        notice(
            test_served_is_below_the_engines_ceiling_but_not_far,
            "an engine of one token a second",
            says="< 1.5",
            measured=replace(measured, summary=less),
        )


read_prompts = prefill.read


def nothing_cached(*given: Any) -> list[prefill.Reading]:
    return [replace(each, cached_ms=each.cold_ms) for each in read_prompts(*given)]


read_counters = counters


def other_counters(server: Server) -> dict[str, float]:
    return {name: time.monotonic() for name in read_counters(server)}


OWN: dict[Callable[..., None], Broken] = {
    test_tokens_are_the_servers_own_count_exactly: (
        "counters that count something else",
        {"patch": {f"{__name__}.counters": other_counters}},
    ),
    test_prompt_is_read_faster_when_its_beginning_is_cached: (
        "a prompt that is never cached",
        {"patch": {"bench.prefill.read": nothing_cached}},
    ),
    test_wrong_key_is_refused_before_the_start: (
        "a proxy that lets everybody in",
        {"patch": {f"{__name__}.PLAN": SOON}, "says": "DID NOT RAISE"},
    ),
}


@pytest.mark.parametrize("check", OWN, ids=lambda check: check.__name__)
def test_what_a_server_does_otherwise_is_noticed(
    answering: Server, target: Target, notice: Notice, check: Callable[..., None]
) -> None:
    if target.runtime == "docker":
        pytest.skip("the proxy stands before one runtime's server")
    broken, how = OWN[check]
    with proxied(answering) as proxy:
        open_ = check is test_wrong_key_is_refused_before_the_start
        server = proxy if open_ else answering
        notice(check, broken, answering=server, running=server, **how)
