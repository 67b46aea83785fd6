"""Servers and clients that vanish leave nobody in the dark, and nothing behind."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bench import answers
from stack import config, keys, runtime
from stack.compose import Docker
from stack.config import Project, Service
from stack.errors import Code, StackError
from stack.host import Process, children
from stack.runtime import Runtime
from stack.server import Server
from stack.status import Looks
from stack.wait import wait_until
from tests import clients, workspace
from tests.checks.conftest import Broken, Notice, Target
from tests.ledger import Ledger
from tests.proxy import dropper, proxied
from tests.vitals import Vitals

CLIENTS = 4
TOKENS = 1500
"""Four answers of these fit into the context that the slots share."""
LONG = 1000 * "a "
GROWTH_MIB = 64
IDLE_S = 5
QUESTIONS = {"repeat": 4, "add": 4, "next": 4}


@dataclass
class Patient:
    """A server of a test's own, which it may end."""

    engine: Runtime
    project: Project
    service: Service
    server: Server

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.server.processes[0].pid, number)

    def again(self) -> Server:
        """Return the server as the next `up` finds or makes it, once its end is known."""
        wait_until(self.server.ended, timeout_s=30, what="its end does not show")
        key = runtime.up(self.engine, self.project, self.service).server.key

        def found() -> Server | None:
            server = self.engine.find(self.service, key=key)
            return server if server and server.processes else None

        self.server = wait_until(found, timeout_s=30, what="its process does not show")
        return self.server


@pytest.fixture
def patient(
    target: Target,
    request: pytest.FixtureRequest,
    project: Project,
    runnable: Service,
) -> Iterator[Patient]:
    if target.runtime == "attached":
        pytest.skip("an attached server is not ours to hurt")
    engine = request.getfixturevalue("engine")
    with runtime.serving(engine, project, runnable) as up:
        yield Patient(engine, project, runnable, up.server)


def answers_right(server: Server) -> bool:
    """Return whether the tiny model's answers are right; of another's, whether they come at all."""
    asked = answers.question_set(QUESTIONS, seed=1)
    replies = answers.ask(server, asked, clients=4)
    return all(reply.right for reply in replies) or bool(server.service.model.repository)


def resident_mib(server: Server) -> float:
    return Vitals.of(server.processes[0]).resident_mib


MOMENTS = ("in prefill", "in mid-stream")


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(patient: Patient, target: Target, ledger: Ledger, moment: str) -> None:
    expected = "every client gets an error, the next answers are right, memory is as before"
    with ledger.trying("R1", f"kill -9 {moment}", expected=expected, target=target) as row:
        before = resident_mib(patient.server)
        ends = struck(patient, moment, signal.SIGKILL)
        row.inputs = len(ends)
        assert set(ends) <= {"cut", "error"}
        again = patient.again()
        assert answers_right(again)
        assert resident_mib(again) - before < GROWTH_MIB
        row.found = "as expected"


def struck(patient: Patient, moment: str, number: signal.Signals) -> list[str]:
    """Send a signal while four clients are served; return how each ended."""
    prompt = LONG if moment == "in prefill" else "hello"
    with clients.asking(patient.server, [prompt] * CLIENTS, tokens=TOKENS) as (asking, ends):
        if moment == "in prefill":
            ready = lambda: clients.under_way(patient.server) or None  # noqa: E731
        else:
            ready = lambda: all(each.begun for each in asking) or None  # noqa: E731
        wait_until(ready, timeout_s=60, what="the clients are not served")
        patient.signal(number)
        return ends()


def test_terminated_in_mid_stream(patient: Patient, target: Target, ledger: Ledger) -> None:
    expected = "each answer is whole or an error; it ends within its grace, not killed"
    with ledger.trying("R2", "SIGTERM in mid-stream", expected=expected, target=target) as row:
        with clients.asking(patient.server, ["hello"] * CLIENTS, tokens=TOKENS) as (asking, ends):
            wait_until(
                lambda: all(each.begun for each in asking) or None, timeout_s=60, what="not begun"
            )
            assert terminate(patient) < patient.service.stop_grace_s
            row.inputs = len(ends())
        assert set(ends()) <= {"whole", "cut", "error"}
        row.found = (
            "as expected; where the engine's own handler hangs, by a second SIGTERM after 8 s"
        )


def test_terminated_while_it_loads(patient: Patient, target: Target, ledger: Ledger) -> None:
    expected = "it ends by itself within its grace"
    with ledger.trying("L9", "SIGTERM while it loads", expected=expected, target=target) as row:
        patient.engine.stop(patient.service)
        patient.server = patient.engine.start(patient.service, key=keys.read(patient.service))
        row.inputs = 1
        assert terminate(patient) < patient.service.stop_grace_s
        row.found = "as expected"


def terminate(patient: Patient) -> float:
    """Stop it as its runtime does; return how long that took: a kill comes after the grace."""
    start = time.monotonic()
    patient.engine.stop(patient.service)
    assert patient.server.ended()
    return time.monotonic() - start


FORGED = b"""data: {"choices": [{"finish_reason": "stop", "delta": {}}]}

data: [DONE]

"""


def test_forged_end_is_noticed(patient: Patient, notice: Notice) -> None:
    with proxied(patient.server, lost=FORGED) as proxy:
        notice(
            test_killed,
            "a proxy that ends what a dead server began",
            says="forged",
            moment="in prefill",
            patient=replace(patient, server=proxy),
        )


@pytest.mark.parametrize("moment", MOMENTS)
def test_200_clients_hang_up(patient: Patient, target: Target, ledger: Ledger, moment: str) -> None:
    expected = "slots idle within 5 s, other clients' answers right"
    with ledger.trying("R11", f"200 hang up {moment}", expected=expected, target=target) as row:
        prompt = LONG if moment == "in prefill" else "hello"
        with clients.leaving(patient.server, prompt, count=200, after_first=prompt != LONG) as left:
            assert answers_right(patient.server)
            row.inputs = left()
        clients.wait_idle(patient.server, limit_s=IDLE_S)
        assert row.inputs == 200
        row.found = "as expected"


def test_out_of_memory_is_named(
    tmp_path: Path, engine: Runtime, target: Target, service: Service, ledger: Ledger
) -> None:
    only_docker(engine, service)
    expected = "exit 40, which names the limit"
    with ledger.trying("L11", "host memory of 32 MiB", expected=expected, target=target) as row:
        workspace.make(tmp_path)
        workspace.change(tmp_path, "compose.yaml", "mem_limit: 4g", "mem_limit: 32m")
        project = config.load(tmp_path, overrides={"GLM_TINY_PORT": ""})
        row.inputs = 1
        with pytest.raises(StackError, match="was killed by its memory limit") as caught:
            runtime.up(Docker(project), project, project.service("tiny"))
        assert caught.value.code == Code.LOAD
        row.found = "as expected"


def only_docker(engine: Runtime, service: Service) -> None:
    if not isinstance(engine, Docker) or service.quant != "tiny":
        pytest.skip("Docker's own way, shown with the tiny model")


def test_restart_storm_ends(patient: Patient, target: Target, ledger: Ledger) -> None:
    only_docker(patient.engine, patient.service)
    expected = "no more than 3 restarts, then it stays down, and status says why"
    with ledger.trying("S8", "killed until it stays down", expected=expected, target=target) as row:
        while brought_back(patient):
            row.inputs += 1
        (told,) = (s for s in Looks(patient.project).all() if s.quant == "tiny")
        assert row.inputs <= 3
        assert told.state.startswith("crashed")
        assert "exit 137" in told.detail
        row.found = "as expected"


def brought_back(patient: Patient) -> bool:
    """Kill the server; return whether Docker brought it back."""
    assert isinstance(patient.engine, Docker)
    container = patient.engine.container(patient.service)
    assert container
    before = container.attrs["RestartCount"]
    (process,) = map(Process.of, children(container.attrs["State"]["Pid"]))
    assert process
    os.kill(process.pid, signal.SIGKILL)

    def settled() -> bool | None:
        container.reload()
        state, count = container.attrs["State"], container.attrs["RestartCount"]
        if state["Status"] == "running" and count > before and children(state["Pid"]):
            return True
        return False if state["Status"] == "exited" else None

    return wait_until(settled, timeout_s=60, what="neither restarted nor ended")


def delete(file: Path) -> None:
    file.unlink()


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.fixture
def copied(tmp_path: Path, request: pytest.FixtureRequest, service: Service) -> Iterator[Patient]:
    """A server of a copy of the tiny model's file."""
    if service.quant != "tiny":
        pytest.skip("shown with the tiny model")
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(service.model_file, models)
    folder = tmp_path / "deployment"
    folder.mkdir()
    workspace.make(folder, GLM_MODELS=str(models))
    project = config.load(folder, overrides={"GLM_TINY_PORT": ""})
    served = project.service("tiny")
    keys.make(served)
    engine = runtime.choose(project, want=request.getfixturevalue("engine").name)
    with runtime.serving(engine, project, served) as up:
        yield Patient(engine, project, served, up.server)


@pytest.mark.parametrize("harm", [delete, halve], ids=["deleted", "cut to half"])
def test_model_file_vanishes_while_it_serves(
    copied: Patient, target: Target, ledger: Ledger, harm: Callable[[Path], None]
) -> None:
    expected = "right answers, or it ends; never wrong ones; the next up names the file"
    case = f"model file {harm.__name__}d while it serves"
    with ledger.trying("L4", case, expected=expected, target=target) as row:
        file = copied.service.model_file
        harm(file)
        row.inputs = 1
        try:
            assert answers_right(copied.server)
            row.found = "right answers"
        except StackError:
            wait_until(copied.server.ended, timeout_s=30, what="it gives no answer, and lives")
            row.found = "it ends"
        copied.engine.stop(copied.service)
        with pytest.raises(StackError, match=file.name):
            runtime.up(copied.engine, copied.project, copied.service)


def test_model_that_answers_wrong_is_noticed(copied: Patient, notice: Notice) -> None:
    with proxied(copied.server, dropper(5)) as proxy:
        notice(
            test_model_file_vanishes_while_it_serves,
            "a proxy that leaves out words",
            says="answers_right|False",
            harm=delete,
            copied=replace(copied, server=proxy),
        )


def test_memory_enough_is_noticed(
    notice: Notice,
    engine: Runtime,
    service: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only_docker(engine, service)
    monkeypatch.setattr(workspace, "change", lambda *_: None)
    try:
        notice(
            test_out_of_memory_is_named,
            "a server with memory enough",
            says="DID NOT RAISE",
        )
    finally:
        Docker(config.load(tmp_path)).compose("down")


UNLIKE: dict[Callable[..., None], Broken] = {
    test_terminated_in_mid_stream: (
        "a stop that ends nothing",
        {"patch": {"stack.native.Native.stop": lambda *_: None}},
    ),
    test_terminated_while_it_loads: (
        "a stop that takes longer than its grace",
        {"patch": {f"{__name__}.terminate": lambda patient: patient.service.stop_grace_s}},
    ),
    test_200_clients_hang_up: (
        "a slot that stays busy",
        {"patch": {"tests.clients.under_way": lambda _: 1, f"{__name__}.IDLE_S": 1}},
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


def test_restarts_without_end_are_noticed(
    engine: Runtime, service: Service, notice: Notice
) -> None:
    only_docker(engine, service)
    more = iter([True] * 4 + [False])
    notice(
        test_restart_storm_ends,
        "a server that is brought back four times",
        says="4 <= 3",
        patch={f"{__name__}.brought_back": lambda _: next(more)},
    )
