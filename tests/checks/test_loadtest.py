"""The load test can be believed: it agrees with the server, with the engine, and says when not."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bench import ceiling, generator, loadtest, records, results
from bench.generator import Load
from bench.loadtest import Plan
from bench.prompts import Spread
from bench.results import Measurement, Summary
from bench.telemetry import PREDICTED, PROMPT, counters
from stack import config, gpu, host, runtime
from stack.config import Project, Service
from stack.errors import Code, StackError
from stack.server import Server
from stack.wait import wait_until
from tests import workspace
from tests.checks.conftest import Target

FEW, MANY = 1, 12
PLAN = Plan(clients=(FEW, MANY), duration_s=4, warmup_s=1, repeats=2)
LONG = replace(PLAN, clients=(2,), duration_s=60, repeats=1)


@dataclass(frozen=True)
class Test:
    """A load test, and where its results are."""

    summary: Summary
    folder: Path

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
) -> Test:
    folder = request.config.option.evidence or tmp_path_factory.mktemp("results")
    if target.runtime == "attached":
        server = request.getfixturevalue("server")
        summary = loadtest.measure(server, PLAN, root=workspace.ROOT, folder=folder)
    else:
        engine = request.getfixturevalue("engine")
        summary = loadtest.own(engine, project, service, PLAN, folder=folder)
    return Test(loadtest.finish(summary, PLAN, folder).summary, folder)


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


def test_every_run_is_valid(measured: Test) -> None:
    assert [each.faults for each in measured.summary.measurements] == [()] * 4


def test_it_passes(measured: Test) -> None:
    said = loadtest.conclude(measured.summary, PLAN)

    assert (said.verdict, said.code) == ("PASS", 0), said


def test_no_more_than_the_slots_are_processed(measured: Test) -> None:
    most = [m.span.processing_most for m in measured.summary.measurements if m.span]

    assert max(filter(None, most)) == measured.at(MANY).slots


def test_clients_beyond_the_slots_wait(measured: Test) -> None:
    run = measured.at(MANY)
    assert run.span
    assert run.slots

    assert run.span.deferred == pytest.approx(MANY - run.slots, abs=1)


def test_one_client_never_waits(measured: Test) -> None:
    span = measured.at(FEW).span

    assert span
    assert span.deferred_most == 0


@pytest.mark.parametrize("clients", [FEW, MANY])
def test_served_is_below_the_engines_ceiling_but_not_far(measured: Test, clients: int) -> None:
    if not measured.summary.ceiling:
        pytest.skip("an attached server's engine is out of reach")
    run = measured.at(clients)
    share = ceiling.share(run.point, run.slots, measured.summary.ceiling)

    assert share
    assert share.decode
    assert 0.05 < share.whole < 1.1
    assert 0.05 < share.decode < 1.2


def test_server_and_client_use_the_cpu(measured: Test, target: Target) -> None:
    if target.runtime == "attached":
        pytest.skip("an attached server's processes are out of reach")
    span = measured.at(MANY).span

    assert span
    assert span.server_cores
    assert span.client_cores
    assert 0 < span.client_cores < span.server_cores


def test_energy_is_told_where_there_is_a_gpu(measured: Test, service: Service) -> None:
    if not service.gpus or not any(each.energy_j for each in gpu.gpus()):
        pytest.skip(f"{service.name} uses no GPU that counts its energy")

    assert measured.at(FEW).joules_token


def test_results_come_back_as_they_were_written(measured: Test) -> None:
    read = results.read(measured.folder / "summary.json")
    kept = [len(list(records.read(path))) for path in measured.folder.glob("*.jsonl")]

    assert len(read.measurements) == len(kept) == 4
    assert read.provenance == measured.summary.provenance
    assert min(kept) >= measured.at(FEW).point.requests
    assert "<svg" in (measured.folder / "report.html").read_text()


def test_the_same_is_no_worse(measured: Test) -> None:
    changes = results.compare(measured.summary, measured.summary)

    assert changes
    assert "worse" not in {each.verdict for each in changes}


def test_gate_fails_against_a_baseline_that_was_faster(measured: Test) -> None:
    faster = tuple(
        replace(each, point=replace(each.point, tokens_s=10 * each.point.tokens_s))
        for each in measured.summary.measurements
    )
    baseline = replace(measured.summary, measurements=faster)

    said = loadtest.conclude(measured.summary, PLAN, results.compare(measured.summary, baseline))

    assert (said.verdict, said.code) == ("FAIL", Code.MISSED)
    assert "output tokens/s" in said.reason


def test_target_that_nothing_meets_is_missed(measured: Test) -> None:
    slo = loadtest.Slo(ttft_ms=0.001, tpot_ms=0.001)
    none_good = tuple(
        replace(each, point=replace(each.point, good=0)) for each in measured.summary.measurements
    )
    summary = replace(measured.summary, measurements=none_good)

    said = loadtest.conclude(summary, replace(PLAN, slo=slo))

    assert (said.verdict, said.code) == ("FAIL", Code.MISSED)


def test_tokens_are_the_servers_own_count_exactly(running: Server) -> None:
    load = Load(clients=3, requests=12, duration_s=60, prompt=Spread(64, 96), output=Spread(16, 64))
    before = counters(running)

    run = generator.run(running, load)

    after = counters(running)
    assert [each.error for each in run.records] == [None] * 12
    seen = sum(read.tokens for each in run.records for read in each.reads)
    assert seen == sum(each.output_tokens or 0 for each in run.records)
    assert after[PREDICTED] - before[PREDICTED] == seen
    prompts = sum((each.prompt_tokens or 0) - (each.cached_tokens or 0) for each in run.records)
    assert after[PROMPT] - before[PROMPT] == prompts


def test_server_killed_mid_run_is_told_with_its_time(
    running: Server, target: Target, tmp_path: Path
) -> None:
    if target.runtime == "attached":
        pytest.skip("an attached server is not ours to kill")
    pid = running.processes[0].pid
    killer = threading.Timer(3, os.kill, (pid, signal.SIGKILL))
    killer.start()
    start = time.monotonic()

    summary = loadtest.measure(running, LONG, root=workspace.ROOT, folder=tmp_path)

    said = loadtest.finish(summary, LONG, tmp_path).said
    assert (said.verdict, said.code) == ("FAIL", Code.VERIFY)
    assert " s into the run with 2 clients" in said.reason
    assert summary.measurements[0].point.first_error_s == pytest.approx(3, abs=1.5)
    assert time.monotonic() - start < LONG.duration_s / 2
    assert results.read(tmp_path / "summary.json").interrupted == summary.interrupted
    assert any(not each.error for each in records.read(next(tmp_path.glob("*.jsonl"))))


def test_wrong_key_is_refused_before_the_start(running: Server, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="refuses the key") as caught:
        loadtest.measure(
            replace(running, key="wrong"), PLAN, root=workspace.ROOT, folder=tmp_path / "x"
        )

    assert caught.value.code == Code.VERIFY


def invoke(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "invoke", "bench", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("where", ["--docker", "--native"])
def test_interrupt_leaves_a_summary_and_no_child(
    request: pytest.FixtureRequest, tmp_path: Path, where: str
) -> None:
    option = request.config.option
    if option.attach or (option.runtime and where != f"--{option.runtime}"):
        pytest.skip("not the runtime that was asked for")
    folder = workspace.make(tmp_path, GLM_TINY_PORT=str(workspace.free_port()))
    out = folder / "out"
    service = config.load(folder).service("tiny")
    arguments = ("--clients=2", "--duration=60", "--no-ceiling", f"--out={out}", where)
    with invoke(folder, *arguments) as process:
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
    assert summary.measurements[0].point.requests_s > 0
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
