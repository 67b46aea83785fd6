"""Whatever a client sends or does, the server lives on, and the next one is answered right.

What the pinned engine does not hold is recorded by name, in `tests/hostile.py` or here.
"""

import os
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bench import generator
from bench.prompts import Spread
from bench.records import Run
from stack import client, config, runtime
from stack.compose import Docker
from stack.config import Project, Service
from stack.errors import StackError
from stack.host import Process
from stack.runtime import Runtime
from stack.server import Server
from stack.wait import WaitTimeoutError, wait_until
from tests import hostile, workspace
from tests.checks.conftest import Notice, Target
from tests.hostile import Hostile
from tests.ledger import Ledger
from tests.vitals import Vitals

CPU_S = 5
"""What a server may spend on a hostile request: a busy machine takes no more of that."""
WALL_S = 120
TICK_S = 0.05
CRASH_S = 3
"""How long a crash may take to show after the connection broke."""
HEAVY_MIB = 2048
"""More than this for one request is too much."""
SWOLLEN_MIB = 256
NARROW = 1024
OVER = "exceed_context_size_error"
SHARED = (
    "where the cache that slots share runs out, the engine ends every request in it "
    "(llama.cpp#23652); private caches (`LLAMA_ARG_KV_UNIFIED=0`) do not run out"
)


@dataclass
class Ward:
    """A server that is hurt on purpose, and made anew where it did not get over it."""

    engine: Runtime
    project: Project
    service: Service
    server: Server | None = None

    def well(self) -> Server:
        """Return a server that lives, answers, and has not grown."""
        if self.server is None:
            self.server = runtime.up(self.engine, self.project, self.service).server
        return self.server

    def end(self) -> None:
        """Kill it: one that hangs would take its whole grace, and one that Docker just restarts."""
        if isinstance(self.engine, Docker):
            if container := self.engine.container(self.service):
                container.remove(force=True)
            self.engine.compose("down")
        else:
            for process in self.server.processes if self.server else ():
                process.signal_group(signal.SIGKILL)
            self.engine.stop(self.service)
        self.server = None

    def outcome(self, case: Hostile, body: bytes) -> set[str]:
        """Send a hostile body; return what came of it, and of the server."""
        server = self.well()
        (process,) = server.processes
        before = Vitals.of(process)
        forget_peak(process)
        found = {status(server, case.path, body)}
        if found == {"cut"}:
            with suppress(WaitTimeoutError):
                wait_until(gone(process), timeout_s=CRASH_S, what=f"{process.pid} still lives")
        if not process.alive():
            self.end()
            return {"died"}
        after = Vitals.of(process)
        if after.peak_mib - before.resident_mib > HEAVY_MIB:
            found.add("heavy")
        if not answers_others(server):
            found.add("stuck")
        if (
            "slow" in found
            or "stuck" in found
            or after.peak_mib > before.resident_mib + SWOLLEN_MIB
        ):
            self.end()
        return found


def gone(process: Process) -> Callable[[], bool | None]:
    return lambda: None if process.alive() else True


def forget_peak(process: Process) -> None:
    """Let the kernel count the peak of memory from here on, where we may ask it to."""
    with suppress(PermissionError):
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def answers_others(server: Server) -> bool:
    """Return whether another client is answered soon."""
    try:
        return client.complete(server, "Hello", tokens=4, limit_s=CPU_S).tokens == 4
    except StackError:
        return False


def status(server: Server, path: str, body: bytes) -> str:
    """Post a body; return the answer's status, `slow`, or `cut`."""
    (process,) = server.processes
    parts = urlsplit(server.url)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {server.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    begun, spent = time.monotonic(), cpu_s(process)
    with closing(socket.create_connection((parts.hostname, parts.port), WALL_S)) as sock:
        with suppress(ConnectionError):  # it may refuse before it has read all
            sock.sendall(head.encode() + body)
        sock.settimeout(TICK_S)
        answer = b""
        while b"\r\n" not in answer:
            try:
                piece = sock.recv(4096)
            except TimeoutError:
                if cpu_s(process) - spent > CPU_S or time.monotonic() - begun > WALL_S:
                    return "slow"
                continue
            except ConnectionError:
                piece = b""
            if not piece:
                return "cut"
            answer += piece
    return answer.split()[1].decode()


def cpu_s(process: Process) -> float:
    usage = process.usage()
    return usage.cpu_s if usage else 0


@pytest.fixture(scope="module")
def ward(
    request: pytest.FixtureRequest, target: Target, project: Project, runnable: Service
) -> Iterator[Ward]:
    if target.runtime == "attached":
        pytest.skip("an attached server is not ours to hurt")
    ward = Ward(request.getfixturevalue("engine"), project, runnable)
    yield ward
    ward.end()


@pytest.mark.parametrize("case", hostile.CASES, ids=lambda case: case.name)
def test_hostile_request(ward: Ward, target: Target, ledger: Ledger, case: Hostile) -> None:
    with ledger.trying(case.row, case.name, expected=case.wanted, target=target) as row:
        found: set[str] = set()
        for body in case.bodies():
            found |= ward.outcome(case, body)
            row.inputs += 1
        row.found, row.why = " ".join(sorted(found)), case.why
        assert row.found == case.found, "another outcome than recorded in tests/hostile.py"


def case(name: str) -> Hostile:
    return next(each for each in hostile.CASES if each.name == name)


def test_other_outcome_is_noticed(ward: Ward, notice: Notice) -> None:
    other = replace(case("NUL between brackets"), found="400", why="")

    notice(
        test_hostile_request,
        "a record of 400 for what is answered 500",
        says="another outcome",
        case=other,
        ward=ward,
    )


def test_server_that_dies_is_noticed(ward: Ward, notice: Notice) -> None:
    """Killed while it reads a harmless body."""
    harmless = case("body of 99 MB in an unknown field")
    (process,) = ward.well().processes
    with suppress(ProcessLookupError), ThreadPoolExecutor(1) as pool:
        pool.submit(kill_at_work, process)
        notice(
            test_hostile_request,
            "a server that is killed meanwhile",
            says="another outcome",
            case=harmless,
            ward=ward,
        )


def kill_at_work(process: Process) -> None:
    """Kill a server once it spends time on a request."""
    begun = cpu_s(process)
    wait_until(
        lambda: cpu_s(process) > begun + 0.05 or None,
        timeout_s=WALL_S,
        interval_s=0.002,
        what="no work",
    )
    os.kill(process.pid, signal.SIGKILL)


LENGTHS = ("the context exactly", "one token less", "one token more", "ten times the context")


@pytest.fixture(scope="module")
def narrow(
    request: pytest.FixtureRequest,
    target: Target,
    service: Service,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """A server of the tiny model with a context that is soon full."""
    if target.runtime == "attached" or service.quant != "tiny":
        pytest.skip("shown with the tiny model")
    folder = workspace.make(tmp_path_factory.mktemp("narrow"))
    workspace.change(folder, "compose.yaml", 'CTX_SIZE: "8192"', f'CTX_SIZE: "{NARROW}"')
    project = config.load(folder, overrides={"GLM_TINY_PORT": ""})
    engine = runtime.choose(project, want=request.getfixturevalue("engine").name)
    with runtime.serving(engine, project, project.service("tiny")) as up:
        assert up.server.service.context == NARROW
        yield up.server


@pytest.mark.parametrize("length", LENGTHS)
def test_prompt_as_long_as(narrow: Server, target: Target, ledger: Ledger, length: str) -> None:
    tokens = dict(zip(LENGTHS, (NARROW, NARROW - 1, NARROW + 1, 10 * NARROW), strict=True))
    fits = length == "one token less"
    expected = "one token, then `length`" if fits else "400 with the two counts, in 5 s"
    with ledger.trying("R6", f"prompt of {length}", expected=expected, target=target) as row:
        row.inputs = 1
        body = {"prompt": [1] * tokens[length], "n_predict": 10, "ignore_eos": True}
        with client.session(narrow, timeout_s=WALL_S) as session:
            answer = session.post(hostile.RAW, json=body)
        told = answer.json()
        if fits:
            assert (answer.status_code, told["stop_type"]) == (200, "limit")
        else:
            assert (answer.status_code, told["error"]["type"]) == (400, OVER)
            assert str(tokens[length]) in told["error"]["message"]
        assert answers_others(narrow)
        row.found = "as expected"


def test_many_more_clients_than_slots_are_all_served_in_turn(
    ward: Ward, target: Target, ledger: Ledger
) -> None:
    expected = "every one gets its whole answer; the longest wait is within 3 times the median"
    server = ward.well()
    many = 8 * server.service.slots
    load = generator.Load(clients=many, duration_s=8, warmup_s=2, output=Spread(24, 32))
    with ledger.trying("R14", "8 clients a slot", expected=expected, target=target) as row:
        records = [each for each in generator.run(server, load).records if not each.cut]
        row.inputs = len(records)
        assert [each.detail for each in records if each.error] == []
        later = [each for each in records if each.number >= many]  # the first wave never waits
        waits = [each.answer_ns - each.sent_ns for each in later if each.answer_ns]
        assert len(waits) == len(later) > 0
        assert max(waits) < 3 * statistics.median(waits)
        row.found = "as expected"


def test_shared_cache_that_runs_out(narrow: Server, target: Target, ledger: Ledger) -> None:
    """Each prompt fits alone; with their answers they do not fit together."""
    expected = "the newest alone fails, with a clear error"
    share = NARROW * 6 // 10
    with ledger.trying(
        "R15", "4 prompts of 60 % of the context", expected=expected, target=target
    ) as row:
        prompts = [[1 + number] * share for number in range(4)]

        def post(prompt: list[int]) -> int:
            body = {"prompt": prompt, "n_predict": 4, "ignore_eos": True, "cache_prompt": False}
            with client.session(narrow, timeout_s=WALL_S) as session:
                return session.post(hostile.RAW, json=body).status_code

        with ThreadPoolExecutor(len(prompts)) as pool:
            statuses = sorted(pool.map(post, prompts))
        row.inputs = len(prompts)
        row.found, row.why = "several fail with 500", SHARED
        assert statuses.count(500) > 1
        assert set(statuses) <= {200, 500}
        assert answers_others(narrow)


def test_other_context_is_noticed(
    narrow: Server, notice: Notice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.checks.test_requests.NARROW", NARROW // 2)

    notice(
        test_prompt_as_long_as,
        "a server of twice the context",
        says="200, 400|stop_type|error",
        length="one token more",
        narrow=narrow,
    )


def one_waits(server: Server, load: generator.Load) -> Run:
    """Run a load, and let its last client wait a minute."""
    run = generator_run(server, load)
    last = max((each for each in run.records if not each.cut), key=lambda each: each.number)
    waited = replace(last, answer_ns=last.sent_ns + 60 * 10**9)
    return replace(run, records=tuple(waited if each is last else each for each in run.records))


generator_run = generator.run


@pytest.mark.usefixtures("ward")
def test_client_that_waits_longer_is_noticed(notice: Notice) -> None:
    notice(
        test_many_more_clients_than_slots_are_all_served_in_turn,
        "a client that waits a minute",
        says=" < ",
        patch={"bench.generator.run": one_waits},
    )


def test_cache_that_suffices_is_noticed(narrow: Server, notice: Notice) -> None:
    notice(
        test_shared_cache_that_runs_out,
        "prompts that fit together",
        says="> 1",
        narrow=narrow,
        patch={f"{__name__}.NARROW": NARROW // 8},
    )
