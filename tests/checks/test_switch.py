"""One server takes another's place, or the other serves on: whatever fails, whenever, one answers.

Between two quants of the tiny architecture, in both runtimes; the second one is only in the
`compose.yaml` of these tests, with what is wrong with it.
"""

import contextlib
import copy
import gc
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import gguf
import httpx
import pytest
import yaml

from bench import answers
from stack import client, config, fit, gpu, host, keys, runtime
from stack import switch as subject
from stack.compose import Docker, NoEngineError
from stack.config import Project, Service
from stack.errors import Code, StackError
from stack.fit import Release
from stack.server import Server
from stack.wait import WaitTimeoutError, wait_until
from tests import workspace
from tests.checks.conftest import IDLE, Broken, Notice, skip_unasked
from tests.checks.test_faults import INTERRUPTED, interrupt
from tests.ledger import Ledger
from tests.unit.fake_nvml import FakeNvml, memory, process
from tests.workspace import Deployment

QUESTIONS = answers.question_set({"repeat": 2, "reverse": 2, "next": 2}, seed=7)
"""The record of both files has every one of these right."""
CRASHES = {"LLAMA_ARG_DEVICE": "CUDA0"}
"""A device that the engine of the CPU does not have: it ends where it should load."""
MUTE = {"file": "mute.gguf"}
"""It loads, is healthy, and computes nothing but NaN."""
TURNS_WRONG = {"LLAMA_ARG_ROPE_FREQ_BASE": "10000"}
"""It answers fluently, and wrong."""
DEGRADES = {"LLAMA_ARG_CACHE_TYPE_K": "q4_0", "LLAMA_ARG_CACHE_TYPE_V": "q4_0"}
"""Short answers are right all the same; the log-probabilities tell."""
PHASES = ("check", "drain", "stop", "start", "prove")
ROUNDS = 20
PATIENCE_S = 60
"""Until a switch has come to a phase."""


class Pair(Deployment):
    """A deployment of `tiny` and `exact`."""

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.project.state / "switch.json").read_text())
        return found

    def switch(self, to: str, *options: str, **env: str) -> host.Result:
        return self.invoke("switch", "--to", to, *options, **env)

    def alive(self) -> list[Server]:
        return [server for _, server in runtime.alive(self.project)]

    def serving(self) -> Server:
        """Return the one server that there is, which answers right."""
        (server,) = self.alive()
        replies = answers.ask(server, QUESTIONS, clients=4)
        assert all(reply.right for reply in replies)
        return server

    def ensure(self, quant: str = "tiny") -> Server:
        """Return the server of a quant, alone; start it where it is not."""
        self.define()
        alive = self.alive()
        if [server.service.quant for server in alive] == [quant]:
            return alive[0]
        self.invoke("down")
        done = self.invoke("up", self.flag, "--quant", quant)
        assert done.status == 0, done
        return self.serving()

    def define(self, *, file: str = "tiny-f16.gguf", **environment: str) -> None:
        """Define `exact`, right, or with what is wrong with it."""
        document = yaml.safe_load((workspace.ROOT / "compose.yaml").read_text())
        path = f"/app/models/${{GLM_EXACT_FILE:-{file}}}"
        document["services"]["glm-tiny"]["environment"]["LLAMA_ARG_N_PARALLEL"] = "${GLM_SLOTS:-4}"
        document["x-models"]["exact"] = document["x-models"]["tiny"] | {"path": path}
        service = copy.deepcopy(document["services"]["glm-tiny"])
        service["ports"][0]["published"] = "${GLM_EXACT_PORT-11349}"
        service["environment"] |= {
            "LLAMA_ARG_MODEL": path,
            "LLAMA_ARG_ALIAS": "glm-4.7-flash-exact",
            **environment,
        }
        document["services"]["glm-exact"] = service
        host.write_atomic(
            self.folder / "compose.yaml", yaml.safe_dump(document, width=1000, sort_keys=False)
        )


def assert_refused(done: host.Result, code: Code, *words: str) -> None:
    """Check for one line of cause, one of remedy, after the phases, and no traceback."""
    assert done.status == code, done
    *phases, cause, remedy = done.stderr.strip().splitlines()
    assert all(re.fullmatch(r"\w+ +[\d.]+ s", line) for line in phases), done.stderr
    assert all(word in cause + remedy for word in words), done.stderr


@pytest.fixture(scope="module", params=["--docker", "--native"], ids=["docker", "native"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    skip_unasked(request, request.param)
    folder = tmp_path_factory.mktemp("pair")
    models = folder / "models"
    models.mkdir()
    for name in ("tiny.gguf", "tiny-f16.gguf"):
        shutil.copy(workspace.ROOT / "models" / name, models)
    mute = gguf.GGUFReader(shutil.copy(models / "tiny-f16.gguf", models / MUTE["file"]), "r+")
    (norm,) = (tensor for tensor in mute.tensors if tensor.name == "output_norm.weight")
    norm.data[:] = float("nan")
    ports = {f"GLM_{quant}_PORT": str(workspace.free_port()) for quant in ("TINY", "EXACT")}
    pair = Pair(workspace.make(folder, GLM_MODELS=str(models), **ports), request.param)
    (folder / "compose.yaml").unlink()
    pair.define()
    pair.require_engine()
    yield pair
    pair.define()
    for quant in ("tiny", "exact"):
        runtime.down(pair.project.service(quant), runtime.present(pair.project))


class Asking:
    """A client that asks one address, again and again, while the block lasts."""

    def __init__(self, server: Server) -> None:
        self.server, self.right_at = server, [time.monotonic()]
        self.wrong: list[answers.Reply] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._over.is_set():
            try:
                self._over.wait(0.05)  # as people and agents do
                (reply,) = answers.ask(self.server, QUESTIONS[:1])
            except (StackError, OSError):
                continue
            self.right_at.append(time.monotonic())
            self.wrong += [] if reply.right else [reply]

    @property
    def gap_s(self) -> float:
        return max(b - a for a, b in zip(self.right_at, self.right_at[1:], strict=False))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_a_client_of_the_same_port_sees_nothing_but_the_gap(pair: Pair) -> None:
    port = pair.ensure("tiny").port

    with Asking(pair.serving()) as asking:
        done = pair.switch("exact", "--same-port")
        server = pair.serving()

    assert done.status == 0, done
    assert (server.service.quant, server.port) == ("exact", port)
    assert asking.wrong == []
    assert asking.gap_s == pytest.approx(pair.record["gap_s"], abs=1)


def test_back_again_each_keeps_its_port(pair: Pair) -> None:
    pair.ensure("exact")

    assert pair.switch("tiny").status == 0
    assert pair.serving().port == pair.service.port


def test_a_second_identical_switch_changes_nothing(pair: Pair) -> None:
    before = pair.ensure("tiny")

    done = pair.switch("tiny")

    assert done.status == 0
    assert "was up already" in done.stdout
    assert pair.serving().processes == before.processes


class Answer(threading.Thread):
    """A long answer, read until it ends or is cut off."""

    def __init__(self, server: Server, tokens: int) -> None:
        super().__init__()
        self.server, self.tokens = server, tokens
        self.lines: list[str] = []
        self.start()
        wait_until(lambda: self.lines or None, timeout_s=10, what="no answer")

    def run(self) -> None:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": self.tokens}
        body |= {"stream": True, "ignore_eos": True}
        with (
            contextlib.suppress(httpx.HTTPError),
            client.session(self.server, timeout_s=60) as session,
            session.stream("POST", "/v1/chat/completions", json=body) as answer,
        ):
            for line in answer.iter_lines():
                self.lines.append(line)

    def whole(self) -> bool:
        self.join()
        return "data: [DONE]" in self.lines


def test_a_running_answer_is_waited_for(pair: Pair) -> None:
    answer = Answer(pair.ensure("tiny"), 4000)

    done = pair.switch("exact", "--json")

    assert done.status == 0, done
    assert answer.whole()
    told = json.loads(done.stdout)[0]["switch"]
    assert told["cut"] == 0
    assert told["seconds"]["drain"] > 0.05  # or it had ended before


def test_an_answer_that_outlasts_the_budget_is_cut_and_told(pair: Pair) -> None:
    answer = Answer(pair.ensure("tiny"), 8000)

    done = pair.switch("exact", "--drain", "0")

    assert done.status == 0, done
    assert not answer.whole()
    assert "cut off  1 requests" in done.stdout
    assert pair.serving().service.quant == "exact"


def shorten(pair: Pair) -> None:
    os.truncate(models(pair) / "tiny-f16.gguf", 10**6)


def models(pair: Pair) -> Path:
    return pair.project.service("tiny").models_folder


def remove(pair: Pair) -> None:
    (models(pair) / "tiny-f16.gguf").unlink()


def lose_the_key(pair: Pair) -> None:
    pair.service.key_file.write_text("")


@contextlib.contextmanager
def broken(pair: Pair, make: Callable[[Pair], None]) -> Iterator[None]:
    """Break something, and mend it again."""
    key = keys.read(pair.service)
    make(pair)
    try:
        yield
    finally:
        shutil.copy(workspace.ROOT / "models" / "tiny-f16.gguf", models(pair))
        pair.service.key_file.write_text(key + "\n")


@pytest.mark.parametrize(
    ("quant", "make", "code"),
    [
        ("nine", lambda _: None, Code.USAGE),
        ("exact", shorten, Code.INTEGRITY),
        ("exact", remove, Code.LOAD),
        ("exact", lose_the_key, Code.USAGE),
        ("q4", lambda _: None, Code.HOST),
    ],
    ids=["unknown", "truncated", "missing", "key", "no-gpu"],
)
@pytest.mark.row(
    "S1",
    "switch to what cannot start: unknown, truncated, missing, no key, no GPU",
    "refused before the stop; the old one serves on",
)
def test_what_cannot_start_leaves_the_old_one_alone(
    pair: Pair, quant: str, make: Callable[[Pair], None], code: Code
) -> None:
    if quant == "q4" and gpu.gpus():
        pytest.skip("this machine has a GPU")
    before = pair.ensure("tiny")
    with broken(pair, make):
        done = pair.switch(quant)

    assert_refused(done, code)
    assert pair.serving().processes == before.processes


@pytest.mark.row(
    "S1", "switch to a port that is taken", "refused before the stop; the old one serves on"
)
def test_a_taken_port_leaves_the_old_one_alone(pair: Pair) -> None:
    before = pair.ensure("tiny")
    port = pair.project.service("exact").port or 0
    with socket.create_server(("127.0.0.1", port)):
        done = pair.switch("exact")

    assert_refused(done, Code.PORT, f"pid {os.getpid()}")
    assert pair.serving().processes == before.processes
    assert pair.record["outcome"] == "unchanged"


@pytest.mark.parametrize(
    ("flaw", "told"),
    [
        (CRASHES, "invalid device"),
        (MUTE, "generates 32 of 32 tokens"),
        (TURNS_WRONG, "answers wrong: "),
        (DEGRADES, "nats from what the training code computed"),
    ],
    ids=["crashes", "says-nothing", "answers-wrong", "degrades"],
)
@pytest.mark.row(
    "S2",
    "switch to what crashes as it loads, generates nothing, or answers wrong",
    "60; the old one is back and answers right",
)
def test_what_fails_later_brings_the_old_one_back(
    pair: Pair, flaw: dict[str, str], told: str
) -> None:
    pair.ensure("tiny")
    pair.define(**flaw)

    done = pair.switch("exact", "--same-port")

    assert_refused(done, Code.RESTORED, told, "glm-tiny", "serves again")
    assert pair.serving().service.quant == "tiny"
    assert pair.record["outcome"] == "restored"
    assert (pair.project.state / "glm-exact.failed.log").stat().st_size > 0


@pytest.mark.row(
    "S3",
    "neither the new one nor the old one comes up",
    "61, said so; nothing runs, the port is free",
)
def test_when_neither_comes_up_nothing_is_left_and_it_is_said(pair: Pair) -> None:
    port = pair.ensure("tiny").port or 0
    pair.define(**CRASHES)
    (models(pair) / "tiny.gguf").rename(models(pair) / "gone.gguf")

    done = pair.switch("exact")
    (models(pair) / "gone.gguf").rename(models(pair) / "tiny.gguf")

    assert_refused(done, Code.DARK, "Nothing serves")
    assert not any(runtime.servers_of(s, runtime.present(pair.project)) for s in services(pair))
    assert host.port_conflict("127.0.0.1", port) is None
    assert pair.record["outcome"] == "dark"


FREED = Release("GPU-0", 28_000, 140_000)


@pytest.mark.row(
    "S5",
    "GPU memory that another process keeps, as a driver that stands in tells",
    "the new one is not started; 60, with the holder's pid; the old one is back",
)
def test_memory_that_is_not_released_brings_the_old_one_back(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real servers: only the driver's figures are made up, since tiny holds nothing of a GPU."""
    pair.ensure("tiny")
    keeps = {"nvmlDeviceGetComputeRunningProcesses": [process(os.getpid(), 28_000 << 20)]}
    FakeNvml({"nvmlDeviceGetMemoryInfo": memory(28_600), **keeps}).install(monkeypatch)
    monkeypatch.setattr(fit, "release", lambda _: FREED)
    monkeypatch.setattr(fit, "wait_released", partial(fit.wait_released, timeout_s=1))

    with pytest.raises(StackError, match="not released") as caught:
        subject.switch(pair.project, "exact")

    assert caught.value.code == Code.RESTORED
    assert f"(pid {os.getpid()})" in caught.value.cause
    assert "start" not in pair.record["seconds"]
    assert pair.serving().service.quant == "tiny"


def services(pair: Pair) -> list[Service]:
    return list(pair.project.services.values())


@pytest.mark.row("S4", "two switches at once", "one wins, the other exits 3")
def test_of_two_switches_at_once_one_wins(pair: Pair) -> None:
    pair.ensure("tiny")
    with pair.start("switch", "--to", "exact") as one, pair.start("switch", "--to", "exact") as two:
        for each in (one, two):
            each.communicate(timeout=60)

    assert sorted((one.returncode, two.returncode)) == [0, Code.BUSY]
    assert pair.serving().service.quant == "exact"


def other(pair: Pair) -> tuple[str, str]:
    """Return the quant that runs, alone, and the other one."""
    pair.define()
    quants = [server.service.quant for server in pair.alive()]
    now = quants[0] if len(quants) == 1 else pair.ensure("tiny").service.quant
    return now, "exact" if now == "tiny" else "tiny"


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        *((phase, signal.SIGINT) for phase in PHASES),
        ("start", signal.SIGTERM),
        ("start", signal.SIGHUP),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else value,
)
@pytest.mark.row(
    "S4", "SIGINT, SIGTERM, SIGHUP, in each phase", "one of the two serves and answers right"
)
def test_interrupted_in_each_phase_one_of_the_two_answers(
    pair: Pair, phase: str, number: signal.Signals
) -> None:
    old, new = other(pair)
    process = pair.start("switch", "--to", new)

    done = interrupt(process, when=lambda: at(pair, process.pid, phase), number=number)

    assert "Traceback" not in done.stderr
    expected = {0: new, **dict.fromkeys(INTERRUPTED, old)}
    assert pair.serving().service.quant == expected[done.status], done


def at(pair: Pair, pid: int, phase: str) -> bool:
    """Return whether the switch of this very process is in a phase."""
    lock = pair.project.state / "lock"
    with contextlib.suppress(OSError, ValueError):
        here = pair.record["outcome"] == "under way" and pair.record["phase"] == phase
        return here and f"pid {pid}" in lock.read_text()
    return False


def test_interrupted_while_the_old_one_comes_back_it_comes_back(pair: Pair) -> None:
    pair.ensure("tiny")
    pair.define(**CRASHES)
    process = pair.start("switch", "--to", "exact")

    done = interrupt(process, when=lambda: at(pair, process.pid, "restore"))

    assert done.status == Code.RESTORED, done
    assert pair.serving().service.quant == "tiny"


@pytest.mark.row(
    "S4", "kill -9 while the new one starts", "the next command says how far it came, and goes on"
)
def test_after_a_killed_switch_the_next_command_knows_how_far_it_came(pair: Pair) -> None:
    old, new = other(pair)
    with pair.start("switch", "--to", new) as process:
        wait_until(
            lambda: at(pair, process.pid, "start") or None,
            timeout_s=PATIENCE_S,
            interval_s=0.002,
            what="no start",
        )
        process.kill()
    with contextlib.suppress(WaitTimeoutError):  # what was being stopped may still end
        wait_until(lambda: None if pair.alive() else True, timeout_s=2, what="something runs")

    done = pair.switch(new)

    if done.status:
        assert_refused(done, Code.USAGE, "was killed in its phase")
    assert pair.ensure(new)
    assert old not in [server.service.quant for server in pair.alive()]


@pytest.mark.parametrize("text", ["", "null"])
@pytest.mark.row("S6", "corrupt state file", "moved aside, and said")
def test_a_corrupt_record_is_moved_aside(pair: Pair, text: str) -> None:
    pair.invoke("down")
    record = pair.project.state / "switch.json"
    record.write_text(text)

    done = pair.switch("exact")

    assert done.status == Code.USAGE
    assert "no record of ours; moved to switch.corrupt" in done.stderr
    assert record.with_suffix(".corrupt").read_text() == text
    assert not record.exists()


def remove_by_hand(pair: Pair, server: Server) -> None:
    """Remove a server's container, or kill its process."""
    if isinstance(pair.runtime, Docker):
        container = pair.runtime.container(server.service)
        assert container
        container.remove(force=True)
    else:
        os.kill(server.processes[0].pid, signal.SIGKILL)
        wait_until(server.ended, timeout_s=10, what="still runs")


@pytest.mark.row("S6", "the server was removed by hand", "refused, with what to do")
def test_what_was_removed_by_hand_is_no_server_to_replace(pair: Pair) -> None:
    server = pair.ensure("tiny")
    remove_by_hand(pair, server)

    assert_refused(pair.switch("exact"), Code.USAGE, "invoke up --quant exact")
    assert pair.ensure("exact")


@pytest.mark.row("S6", "the old one is removed by hand in the drain", "the new one serves")
def test_what_is_removed_by_hand_meanwhile_is_replaced_all_the_same(pair: Pair) -> None:
    server = pair.ensure("tiny")
    answer = Answer(server, 8000)
    with pair.start("switch", "--to", "exact") as process:
        wait_until(
            lambda: at(pair, process.pid, "drain") or None, timeout_s=PATIENCE_S, what="no drain"
        )
        remove_by_hand(pair, server)
        _, err = process.communicate(timeout=60)
    answer.join()

    assert process.returncode == 0, err
    assert pair.serving().service.quant == "exact"


@pytest.mark.row("C4", "a variable is exported that contradicts .env", ".env wins, with a warning")
def test_env_file_wins_over_an_exported_variable(pair: Pair) -> None:
    pair.ensure("tiny")
    pair.set(GLM_EXACT_FILE="tiny-f16.gguf")

    done = pair.switch("exact", GLM_EXACT_FILE="tiny.gguf")

    assert done.status == 0, done
    assert "GLM_EXACT_FILE is exported, but .env wins" in done.stderr
    assert client.props(pair.serving())["model_path"].endswith("tiny-f16.gguf")


def test_a_server_whose_settings_changed_since_could_not_come_back(pair: Pair) -> None:
    before = pair.ensure("tiny")
    document = yaml.safe_load((pair.folder / "compose.yaml").read_text())
    document["services"]["glm-tiny"]["environment"]["LLAMA_ARG_N_PARALLEL"] = "2"
    (pair.folder / "compose.yaml").write_text(yaml.safe_dump(document, width=1000))

    done = pair.switch("exact")

    assert_refused(done, Code.USAGE, "slots 4, not 2")
    assert pair.ensure("tiny").processes == before.processes


def test_from_one_runtime_to_the_other_and_back(pair: Pair) -> None:
    if pair.flag == "--docker":
        pytest.skip("native begins")
    try:
        runtime.choose(pair.project, want="docker")
    except NoEngineError as error:
        pytest.skip(error.cause)
    port = pair.ensure("tiny").port

    for there in ("docker", "native"):
        done = pair.switch("tiny", f"--{there}")
        assert done.status == 0, done
        server = pair.serving()
        assert (server.runtime, server.port) == (there, port)


def test_native_and_docker_side_by_side(pair: Pair) -> None:
    if pair.flag == "--docker":
        pytest.skip("native begins")
    pair.ensure("tiny")
    beside = pair.invoke("up", "--docker", "--quant", "exact")
    if beside.status == Code.HOST:
        pytest.skip("no Docker engine")

    both = {server.runtime: server for server in pair.alive()}
    assert {name: server.service.quant for name, server in both.items()} == {
        "native": "tiny",
        "docker": "exact",
    }
    for server in both.values():
        assert all(reply.right for reply in answers.ask(server, QUESTIONS))
    assert_refused(pair.switch("exact"), Code.USAGE, "tiny (native), exact (docker)")
    runtime.down(pair.project.service("exact"), runtime.present(pair.project))


@pytest.mark.row("R2", "SIGTERM when idle", "exit 0")
def test_sigterm_ends_a_server_with_0(pair: Pair) -> None:
    pair.ensure("tiny")
    pair.invoke("down")
    server = pair.start_server()  # a child of ours, where it is native
    client.wait_ready(server)

    if isinstance(pair.runtime, Docker):
        container = pair.runtime.container(server.service)
        assert container
        container.kill("SIGTERM")
        assert container.wait(timeout=10)["StatusCode"] == 0
    else:
        server.processes[0].signal_group(signal.SIGTERM)
        _, status = os.waitpid(server.processes[0].pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0


def test_many_switches_under_load_leave_nothing_behind(pair: Pair, ledger: Ledger) -> None:
    server = pair.ensure("tiny")
    expected = "no wrong answer; no container, process, port or file is left"
    with ledger.trying(
        "R3", "restarted again and again under load", expected=expected, target=pair.target
    ) as row:
        row.inputs = ROUNDS
        there_and_back(pair)  # what a first one makes stays: its record, each quant's log
        before = traces(pair)
        with Asking(server) as asking:
            for _ in range(row.inputs // 2):
                there_and_back(pair)

        assert asking.wrong == []
        assert len(asking.right_at) > row.inputs
        assert pair.serving().service.quant == "tiny"
        assert traces(pair) == before
        row.found = "as expected"


def there_and_back(pair: Pair) -> None:
    for quant in ("exact", "tiny"):
        subject.switch(pair.project, quant, same_port=True, drain_s=2)


def traces(pair: Pair) -> dict[str, object]:
    """Return what could be left behind: containers, networks, processes, our open files, files."""
    found: dict[str, object] = {}
    if isinstance(pair.runtime, Docker):
        label: dict[str, Any] = {"label": f"com.docker.compose.project={pair.project.name}"}
        docker = pair.runtime.client
        found["containers"] = len(docker.containers.list(all=True, filters=label))
        found["networks"] = len(docker.networks.list(filters=label))
    key_file = str(pair.service.key_file).encode()
    found["servers"] = sum(key_file in environment(path) for path in Path("/proc").glob("[0-9]*"))
    gc.collect()
    found["open"] = sum(1 for _ in Path("/proc/self/fd").iterdir())
    return found | {"files": sorted(map(str, pair.project.state.rglob("*")))}


def environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def test_old_one_comes_back_with_what_was_chosen_for_it_and_its_file(pair: Pair) -> None:
    pair.ensure("tiny")
    pair.invoke("down")
    other = config.changed(pair.project, GLM_TINY_FILE="tiny-f16.gguf")
    chosen = other.service("tiny").choosing({"GLM_SLOTS": "3"})
    where = runtime.choose(other, want=pair.runtime.name)
    runtime.launch(where, chosen, key=keys.read(chosen))
    pair.define(**CRASHES)

    done = pair.switch("exact")

    assert_refused(done, Code.RESTORED)
    says = client.props(pair.serving())
    assert says["total_slots"] == 3
    assert says["model_path"].endswith("/tiny-f16.gguf")


# --- What is broken in the program, each of which a check above must notice.

BROKEN: dict[str, tuple[Callable[..., None], dict[str, object], tuple[str, str], str]] = {
    "a switch that waits for no answer": (
        test_a_running_answer_is_waited_for,
        {},
        ("timeout_s=budget_s", "timeout_s=0"),
        r"whole\(\)|False",
    ),
    "a switch that brings nothing back": (
        test_what_fails_later_brings_the_old_one_back,
        {"flaw": CRASHES, "told": "invalid device"},
        ("_, record.gap_s = _launch(old, stopped)", "record.gap_s = 0.0"),
        "not enough values",
    ),
    "a switch that forgets what was chosen": (
        test_old_one_comes_back_with_what_was_chosen_for_it_and_its_file,
        {},
        (".choosing(service.chosen)", ".choosing({})"),
        "",
    ),
}


@pytest.mark.parametrize("pair", ["--native"], indirect=True)
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_switch_is_noticed(pair: Pair, notice: Notice, broken: str) -> None:
    check, given, (old, new), says = BROKEN[broken]
    with workspace.changed(pair.folder, "stack/switch.py", old, new):
        notice(check, broken, says=says, **given)


def leaving_a_file(project: Project, *_: object, **__: object) -> None:
    (project.state / f"left-{time.monotonic()}").touch()


UNLIKE: dict[Callable[..., None], Broken] = {
    **dict.fromkeys(
        (
            test_a_client_of_the_same_port_sees_nothing_but_the_gap,
            test_back_again_each_keeps_its_port,
            test_a_second_identical_switch_changes_nothing,
            test_an_answer_that_outlasts_the_budget_is_cut_and_told,
            test_what_cannot_start_leaves_the_old_one_alone,
            test_a_taken_port_leaves_the_old_one_alone,
            test_when_neither_comes_up_nothing_is_left_and_it_is_said,
            test_of_two_switches_at_once_one_wins,
            test_interrupted_in_each_phase_one_of_the_two_answers,
            test_interrupted_while_the_old_one_comes_back_it_comes_back,
            test_after_a_killed_switch_the_next_command_knows_how_far_it_came,
            test_what_was_removed_by_hand_is_no_server_to_replace,
            test_what_is_removed_by_hand_meanwhile_is_replaced_all_the_same,
            test_env_file_wins_over_an_exported_variable,
            test_a_server_whose_settings_changed_since_could_not_come_back,
            test_from_one_runtime_to_the_other_and_back,
            test_native_and_docker_side_by_side,
            test_a_corrupt_record_is_moved_aside,
        ),
        (IDLE[0], IDLE[1] | {"patch": {f"{__name__}.PATIENCE_S": 1}}),
    ),
    test_memory_that_is_not_released_brings_the_old_one_back: (
        "memory that is free at once",
        {"patch": {f"{__name__}.FREED": Release("GPU-0", 28_000, 0)}},
    ),
    test_sigterm_ends_a_server_with_0: (
        "SIGKILL for SIGTERM",
        {"patch": {"signal.SIGTERM": signal.SIGKILL}},
    ),
    test_many_switches_under_load_leave_nothing_behind: (
        "a switch that leaves a file",
        {"patch": {"stack.switch.switch": leaving_a_file, f"{__name__}.ROUNDS": 2}},
    ),
}
"""Where the program does nothing, it finds what these start from."""
FROM = {test_back_again_each_keeps_its_port: "exact"}


@pytest.mark.parametrize("pair", ["--native"], indirect=True)
@pytest.mark.parametrize("check", UNLIKE, ids=lambda check: check.__name__)
def test_what_is_unlike_is_noticed(pair: Pair, notice: Notice, check: Callable[..., None]) -> None:
    broken, how = UNLIKE[check]
    (pair.project.state / "switch.json").unlink(missing_ok=True)  # which one check makes corrupt
    pair.ensure(FROM.get(check, "tiny"))

    notice(check, broken, **how)
