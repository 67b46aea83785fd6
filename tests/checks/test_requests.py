"""Whatever a client sends or does, the server lives on, and the next one is answered right.

What the pinned engine does not hold is recorded by name, in `tests/hostile.py` or here.
"""

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from stack import client, runtime
from stack.compose import Docker
from stack.config import Project, Service
from stack.errors import StackError
from stack.host import Process
from stack.runtime import Runtime
from stack.server import Server
from stack.wait import WaitTimeoutError, wait_until
from tests import hostile
from tests.checks.conftest import Target
from tests.hostile import Hostile
from tests.ledger import Ledger
from tests.vitals import Vitals

CPU_S = 5
"""What a server may spend on a hostile request: a busy machine takes no more of that."""
WALL_S = 60
TICK_S = 0.05
CRASH_S = 3
"""How long a crash may take to show after the connection broke."""
HEAVY_MIB = 2048
"""More than this for one request is too much."""
SWOLLEN_MIB = 256


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
