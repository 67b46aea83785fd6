"""The gateway keeps each of its promises, on real sockets, and each check of one can fail.

It stands before the tiny model's server where the server matters, and before a server of the
test's own where each byte does.
"""

import contextlib
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from bench import gateway as bench
from bench import generator
from bench.generator import Load
from bench.prompts import Spread
from stack import config, host, rotation, runtime
from stack.compose import Docker, NoEngineError
from stack.config import Project
from stack.server import Server
from stack.wait import wait_until
from tests import workspace
from tests.checks.conftest import IDLE, Broken, Notice
from tests.ledger import Ledger

QUEUE = 4
SLOTS = 4
PLACES = SLOTS + QUEUE
BODY_LIMIT = 32 << 20
BODY_S = 3
"""What a body may take before a server of the test's own; the real limit is tried below."""
CERTIFICATE = workspace.ROOT / "tests" / "unit" / "loopback.pem"
KEY = "the-first-key"
OTHER_KEY = "the-second-key"


@pytest.fixture(scope="session")
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A deployment of our own with a gateway, whose port the platform chooses."""
    option = request.config.option
    if option.attach or option.runtime == "native":
        pytest.skip("the gateway stands before Docker's servers alone")
    if option.quant and "tiny" not in option.quant:
        pytest.skip("the gateway is checked before tiny; it is the same before every quant")
    folder = workspace.make(tmp_path_factory.mktemp("gateway"), **SETTINGS)
    return config.load(folder, overrides={"GLM_TINY_PORT": ""})


SETTINGS = {
    "GLM_GATEWAY": "1",
    "GLM_QUEUE": str(QUEUE),
    "GLM_RATE": "1000000",
    "GLM_HOSTS": "'hordak hordak.lan'",
}


@pytest.fixture(scope="session")
def docker(project: Project) -> Docker:
    docker = Docker(project)
    try:
        docker.check()
    except NoEngineError as error:
        pytest.skip(error.cause)
    runtime.ensure_engine(docker, project, project.service("tiny"))
    return docker


@pytest.fixture(scope="session")
def server(docker: Docker, project: Project) -> Iterator[Server]:
    """The tiny model's server behind its gateway."""
    with runtime.serving(docker, project, project.service("tiny")) as up:
        yield up.server


@pytest.fixture
def many_files() -> None:
    """Let this process have as many connections open as the tests need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))


@dataclass
class Answer:
    """What came back on one connection: `whole` if it ended as HTTP says."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False

    @property
    def message(self) -> str:
        told: str = json.loads(self.body)["error"]["message"]
        return told


def connect(url: str, *, timeout_s: float = 60) -> socket.socket:
    where = urlsplit(url)
    return socket.create_connection((where.hostname, where.port), timeout=timeout_s)


def head(
    target: str = "POST /v1/chat/completions",
    *,
    key: str = KEY,
    host_name: str = "localhost",
    **fields: object,
) -> bytes:
    """Return a request's head; fields are headers, with _ for -."""
    lines = [f"{target} HTTP/1.1", f"Host: {host_name}", f"Authorization: Bearer {key}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def chat(*, tokens: int, key: str = KEY, host_name: str = "localhost", **more: object) -> bytes:
    """Return a request for a stream of exactly so many tokens."""
    body = {
        "messages": [{"role": "user", "content": "Count."}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }
    text = json.dumps(body).encode()
    return head(key=key, host_name=host_name, Content_Length=len(text)) + text


def read(sock: socket.socket) -> Answer:
    """Read one answer to its end, or to wherever the connection breaks."""
    answer = Answer()
    with sock.makefile("rb") as file, contextlib.suppress(ConnectionError):
        line = file.readline()
        if not line:
            return answer
        answer.status = int(line.split()[1])
        while (line := file.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            answer.headers[name.lower()] = value.strip()
        if "transfer-encoding" in answer.headers:
            while size := int(file.readline() or b"-1", 16):
                if size < 0:
                    return answer
                answer.body += file.read(size)
                file.readline()
            answer.whole = file.readline() == b"\r\n"
        else:
            length = int(answer.headers["content-length"])
            answer.body = file.read(length)
            answer.whole = len(answer.body) == length
    return answer


def ask(url: str, request: bytes, *, timeout_s: float = 60) -> Answer:
    with connect(url, timeout_s=timeout_s) as sock:
        sock.sendall(request)
        return read(sock)


def ask_at_once(url: str, requests: list[bytes]) -> list[Answer]:
    """Open all connections, send all requests, then read every answer."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(url)) for _ in requests]
        for sock, request in zip(socks, requests, strict=True):
            sock.sendall(request)
        return [read(sock) for sock in socks]


class Upstream:
    """A server of the test's own: answers each request by a function, and keeps what came."""

    def __init__(self, address: str, answer: Callable[[socket.socket], None]) -> None:
        self.heads: list[str] = []
        self.closed = threading.Event()
        """Set when a client hung up during an answer."""
        self._answer = answer
        self._listener = socket.create_server((address, 0), backlog=512)
        self.where = f"{address}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(ConnectionError):
            data = b""
            while b"\r\n\r\n" not in data:
                more = sock.recv(65536)
                if not more:
                    return
                data += more
            text, _, body = data.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", text)
            left = int(length[1]) - len(body) if length else 0
            while left > 0 and (more := sock.recv(65536)):
                left -= len(more)
            self.heads.append(text.decode())
            try:
                self._answer(sock)
            except OSError:
                self.closed.set()

    def close(self) -> None:
        self._listener.close()


def reply(sock: socket.socket, body: bytes = b"{}") -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"Keep-Alive: timeout=5, max=100\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def wait_hang_up(sock: socket.socket) -> None:
    """Wait until the other side closes, and say so."""
    if sock.recv(1) == b"":
        raise ConnectionResetError


@dataclass
class Fronted:
    """A gateway before a server of ours."""

    url: str
    upstream: Upstream


Front = Callable[..., contextlib.AbstractContextManager[Fronted]]


@pytest.fixture(scope="session")
def front(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Front:
    """Make gateways before servers of the test's own."""
    docker.check()

    @contextlib.contextmanager
    def make(
        answer: Callable[[socket.socket], None] = reply,
        *,
        without: str = "",
        rate: int = 10**6,
    ) -> Iterator[Fronted]:
        text = bench.CONFIGURATION.read_text()
        kept = [
            line for line in text.splitlines(keepends=True) if not without or without not in line
        ]
        assert bool(without) == (len(kept) < len(text.splitlines())), without
        altered = tmp_path_factory.mktemp("front") / "haproxy.cfg"
        altered.write_text("".join(kept).replace("body time 20s", f"body time {BODY_S}s"))
        settings = {"GLM_QUEUE": str(QUEUE), "GLM_RATE": str(rate), "GLM_HOSTS": "hordak"}
        upstream = Upstream(bench.bridge(), answer)
        try:
            with bench.gateway(
                upstream.where, settings, keys=(KEY, OTHER_KEY), configuration=altered
            ) as running:
                yield Fronted(running.url, upstream)
        finally:
            upstream.close()

    return make


# Promises about single requests. Each is a function of a fronted gateway, so that the same one
# is seen to fail where the rule that keeps the promise is taken out.


def refuses_foreign_hosts(fronted: Fronted) -> None:
    port = urlsplit(fronted.url).port
    for name in ("evil.example", f"evil.example:{port}", "hordak.evil.example", "127.0.0.1.nip.io"):
        assert ask(fronted.url, head("GET /v1/models", host_name=name)).status == 421, name


def refuses_other_keys(fronted: Fronted) -> None:
    """Before the body: none is sent here."""
    for key in ("", "wrong", KEY[:-1], f"{KEY}x", "x" * 9000):
        answer = ask(fronted.url, head(key=key, Content_Length=1000))
        assert (answer.status, len(answer.body) < 200) == (401, True), key
    bare = head(key="", X_Api_Key="wrong").replace(b"Authorization: Bearer \r\n", b"")
    assert ask(fronted.url, bare).status == 401
    assert fronted.upstream.heads == []


def refuses_a_large_head(fronted: Fronted) -> None:
    assert ask(fronted.url, head("GET /health", X="x" * 17000)).status == 400
    assert fronted.upstream.heads == []


def refuses_a_large_body(fronted: Fronted) -> None:
    """As soon as its length is told: 64 KiB of it were sent."""
    begun = time.monotonic()
    request = head(Content_Length=BODY_LIMIT + 1) + b"x" * 65536
    answer = ask(fronted.url, request, timeout_s=5)
    assert (answer.status, "32 MB" in answer.message) == (413, True)
    assert time.monotonic() - begun < 2


def refuses_a_body_of_unknown_length(fronted: Fronted) -> None:
    request = head(Transfer_Encoding="chunked") + chunk(b"{}") + b"0\r\n\r\n"
    assert ask(fronted.url, request).status == 411


def refuses_a_slow_body(fronted: Fronted) -> None:
    """The server never hears of it; a place in the queue is not taken either."""
    answer = ask(fronted.url, head(Content_Length=100) + b"x" * 99, timeout_s=2 * BODY_S)
    assert (answer.status, answer.whole) == (408, True)
    assert fronted.upstream.heads == []


def limits_the_rate_of_a_key(fronted: Fronted) -> None:
    """GLM_RATE is 5 here. The other key goes on."""
    answers = [ask(fronted.url, head("GET /props")) for _ in range(7)]
    assert [answer.status for answer in answers] == [200] * 5 + [429] * 2
    assert int(answers[-1].headers["retry-after"]) > 0
    assert ask(fronted.url, head("GET /props", key=OTHER_KEY)).status == 200


def drops_what_only_a_proxy_may_say(fronted: Fronted) -> None:
    fields = {"X_Forwarded_For": "10.0.0.1", "X_Forwarded_Host": "evil", "X_Real_IP": "10.0.0.1"}
    assert ask(fronted.url, head("GET /props", **fields, Forwarded="for=10.0.0.1")).status == 200
    assert "forwarded" not in fronted.upstream.heads[-1].lower()
    assert "real-ip" not in fronted.upstream.heads[-1].lower()


def limits_what_is_in_flight(fronted: Fronted) -> None:
    """The server holds each request for two seconds, so all are there at the same time."""
    answers = ask_at_once(fronted.url, [head(Content_Length=2) + b"{}"] * 8 * SLOTS)
    assert Counter(answer.status for answer in answers) == {200: PLACES, 429: 8 * SLOTS - PLACES}
    assert all(int(a.headers["retry-after"]) > 0 for a in answers if a.status == 429)
    assert ask(fronted.url, head(Content_Length=2) + b"{}").status == 200


def hold(sock: socket.socket) -> None:
    time.sleep(2)
    reply(sock)


def limits_what_only_looks(fronted: Fronted) -> None:
    """So that /metrics and /health are answered while all slots are busy, and take none."""
    answers = ask_at_once(fronted.url, [head("GET /metrics")] * 40)
    assert Counter(answer.status for answer in answers) == {200: 32, 429: 8}


PROMISES: dict[Callable[[Fronted], None], tuple[str, Callable[[socket.socket], None], int]] = {
    refuses_foreign_hosts: ("deny_status 421", reply, 10**6),
    refuses_other_keys: ("deny_status 401", reply, 10**6),
    refuses_a_large_head: ("16 KiB at the most", reply, 10**6),
    refuses_a_large_body: ("deny_status 413", reply, 10**6),
    refuses_a_body_of_unknown_length: ("deny_status 411", reply, 10**6),
    refuses_a_slow_body: ("wait-for-body", reply, 10**6),
    limits_the_rate_of_a_key: ("within a minute", reply, 5),
    drops_what_only_a_proxy_may_say: ("del-header", reply, 10**6),
    limits_what_is_in_flight: ("the queue is full", hold, 10**6),
    limits_what_only_looks: ("the queue is full", hold, 10**6),
}
"""Each with the rule of haproxy.cfg that keeps it, the server's answer, and a rate."""


@pytest.mark.unnoticed("each promise is seen to fail by its own name")
@pytest.mark.parametrize("promise", PROMISES, ids=lambda each: each.__name__)
def test_gateway(front: Front, ledger: Ledger, promise: Callable[[Fronted], None]) -> None:
    _, answer, rate = PROMISES[promise]
    name = promise.__name__.replace("_", " ")
    with (
        ledger.trying("", f"it {name}", expected="as it says", target="docker") as row,
        front(answer, rate=rate) as fronted,
    ):
        row.inputs = 1
        promise(fronted)
        row.found = "as expected"


@pytest.mark.parametrize("promise", PROMISES, ids=lambda each: each.__name__)
def test_check_fails_without_the_rule(
    front: Front, ledger: Ledger, promise: Callable[[Fronted], None]
) -> None:
    rule, answer, rate = PROMISES[promise]
    with (
        front(answer, rate=rate, without=rule) as fronted,
        ledger.catching(promise, f"haproxy.cfg without: {rule}", says="assert|timed out|reset"),
    ):
        promise(fronted)


@pytest.mark.parametrize(
    "name",
    ["localhost", "LOCALHOST:80", "127.0.0.1", "10.1.2.3:11346", "[::1]:11346", "Hordak.lan"],
)
def test_own_host_names_and_addresses_pass(server: Server, name: str) -> None:
    asked = head("GET /v1/models", key=server.key, host_name=name)

    assert ask(server.url, asked).status == 200


def test_request_that_is_read_two_ways_is_refused(server: Server) -> None:
    twice = head(key=server.key, Content_Length=4).replace(
        b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n"
    )

    assert ask(server.url, twice + b"{}{}").status == 400


ENDS = {"\n": 200, "\n ": 200, "\0": 400, "\r": 400}
LINE = "a lone line feed ends a header's line here (RFC 9112, 2.2), and the key before it is right"


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_key_with_a_line_break_is_the_key_or_no_request(
    front: Front, ledger: Ledger, end: str
) -> None:
    case, expected = f"with the gateway: key with {end!r} after it", "401 in few words"
    with ledger.trying("R9", case, expected=expected, target="docker") as row, front() as fronted:
        right, wrong = (
            ask(fronted.url, head("GET /props", key=key + end)) for key in (KEY, "wrong")
        )
        row.inputs, row.found = 2, f"{right.status}; with a wrong key {wrong.status}"
        row.why = LINE if right.status == 200 else "it is no HTTP"
        assert right.status == ENDS[end]
        assert wrong.status in (400, 401)
        assert len(fronted.upstream.heads) == (right.status == 200)


def test_server_is_reached_through_its_gateway_alone(server: Server, docker: Docker) -> None:
    service = server.service
    container = docker.container(service)
    assert container
    settings = container.attrs["NetworkSettings"]
    (own,) = settings["Networks"].values()
    straight = f"exec 3<>/dev/tcp/{own['IPAddress']}/{service.target_port}"
    around = docker.sibling(service, "timeout", "5", "bash", "-c", straight)
    through = f"exec 3<>/dev/tcp/{service.name}/{service.target_port}"

    assert not any(settings["Ports"].values())
    assert docker.client.networks.get(own["NetworkID"]).attrs["Internal"]
    assert around.status != 0
    assert docker.sibling(service, "timeout", "5", "bash", "-c", through).status == 0
    assert {each.address for each in host.listeners(urlsplit(server.url).port or 0)} == {
        service.bind
    }


def test_container_has_no_rights(server: Server, docker: Docker) -> None:
    container = docker.gateway(server.service)
    assert container
    pid = container.attrs["State"]["Pid"]
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    root = next(
        line.split()
        for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()
        if " / " in line
    )

    assert set(status["Uid"].split()) == {str(server.service.uid)}
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert root[3].split(",")[0] == "ro"


def test_image_holds_one_program(server: Server, docker: Docker) -> None:
    container = docker.gateway(server.service)
    assert container
    archive = b"".join(container.export())  # type: ignore[arg-type]  # bytes, not text
    with tarfile.open(fileobj=BytesIO(archive)) as image:
        # Docker's own mount points are empty.
        files = [each for each in image if each.isfile() and each.size]
    programs = {each.name for each in files if each.mode & 0o111 and ".so" not in each.name}

    assert programs == {"usr/sbin/haproxy"}
    assert not [each.name for each in files if each.mode & 0o6000]


def test_stream_is_the_servers_to_the_byte_and_each_event_comes_at_once(front: Front) -> None:
    """The server sends an event only when the client has the last one: nothing can be held back."""
    events = [f"data: {number} é\r\n\n".encode() * (1 + number % 3) for number in range(50)]
    arrived = threading.Semaphore(0)

    def answer(sock: socket.socket) -> None:
        sock.sendall(STREAM)
        for event in events:
            sock.sendall(chunk(event))
            assert arrived.acquire(timeout=10)
        sock.sendall(b"0\r\n\r\n")

    with front(answer) as fronted, connect(fronted.url, timeout_s=10) as sock:
        sock.sendall(head(Content_Length=2) + b"{}")
        received = b""
        for number in range(len(events)):
            while payload(received) != b"".join(events[: number + 1]):
                more = sock.recv(65536)
                assert more, payload(received)
                received += more
            arrived.release()
        received += rest(sock, until=b"\r\n0\r\n\r\n", after=received)

    assert payload(received) == b"".join(events)
    assert received.endswith(b"\r\n0\r\n\r\n")
    assert b"keep-alive: timeout=60\r\n" in received.lower()


def payload(received: bytes) -> bytes:
    """Return what the chunks of an answer hold, so far as they are there."""
    _, _, left = received.partition(b"\r\n\r\n")
    whole = b""
    while left:
        size, _, left = left.partition(b"\r\n")
        whole += left[: int(size or b"0", 16)]
        left = left[int(size or b"0", 16) + 2 :]
    return whole


def test_client_that_hangs_up_is_hung_up_on_the_server(front: Front) -> None:
    with front(wait_hang_up) as fronted:
        with connect(fronted.url) as sock:
            sock.sendall(head(Content_Length=2) + b"{}")
            wait_until(lambda: fronted.upstream.heads or None, timeout_s=5, what="not there")
        assert fronted.upstream.closed.wait(5)


def test_request_that_fails_is_not_sent_twice(front: Front) -> None:
    with front(socket.socket.close) as fronted:
        answer = ask(fronted.url, head(Content_Length=2) + b"{}")
        heads = fronted.upstream.heads

    assert (answer.status, len(heads)) == (502, 1)


def test_body_larger_than_the_buffer_arrives_whole(front: Front) -> None:
    with front() as fronted:
        answer = ask(fronted.url, head(Content_Length=BODY_LIMIT) + b"x" * BODY_LIMIT)

    assert answer.status == 200


@pytest.mark.row(
    "R14",
    "with the gateway: 8 clients a slot",
    "whole answers, or 429 with Retry-After",
    inputs=8 * SLOTS,
)
def test_more_than_it_takes_is_told_to_wait_and_the_rest_is_unharmed(server: Server) -> None:
    tokens = 200
    answers = ask_at_once(server.url, [chat(tokens=tokens, key=server.key)] * 8 * SLOTS)
    whole = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status != 200]

    assert len(whole) >= PLACES
    assert all(a.whole and f'"completion_tokens":{tokens}'.encode() in a.body for a in whole)
    assert refused
    assert {a.status for a in refused} == {429}
    assert all(int(a.headers["retry-after"]) > 0 and a.whole for a in refused)


@pytest.mark.usefixtures("many_files")
@pytest.mark.row(
    "R13",
    "with the gateway: 2,000 connections at once",
    "200, 429 or 503, none reset; then it answers",
    inputs=2000,
)
def test_flood_of_connections_is_answered(server: Server, docker: Docker) -> None:
    """All open before the first sends, and none is reset."""
    count = 2000
    container = docker.gateway(server.service)
    assert container
    answers = ask_at_once(server.url, [chat(tokens=1, key=server.key)] * count)
    container.reload()

    counted = Counter(answer.status for answer in answers)
    assert set(counted) <= {200, 429, 503}, counted
    assert all(answer.whole for answer in answers)
    assert container.attrs["RestartCount"] == 0
    assert ask(server.url, chat(tokens=1, key=server.key)).status == 200


@pytest.mark.usefixtures("docker")
def test_tls_with_a_certificate_of_ones_own(tmp_path: Path) -> None:
    """The whole way: the server is started, asked and load tested with nothing but the setting."""
    certificate = tmp_path / "certificate.pem"
    shutil.copy(CERTIFICATE, certificate)
    folder = tmp_path / "deployment"
    folder.mkdir()
    workspace.make(folder, **SETTINGS, GLM_TLS_FILE=str(certificate))
    project = config.load(folder, overrides={"GLM_TINY_PORT": ""})
    service = project.service("tiny")
    os.chown(certificate, service.uid, service.uid)
    with runtime.serving(Docker(project), project, service) as up:
        url = up.server.url
        length = Spread(16, 16)
        load = Load(clients=2, requests=4, warmup_s=0, prompt=Spread(40, 40), output=length)
        records = generator.run(up.server, load).records
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.get(f"{url}/health", trust_env=False)
        plain = ask(url, head("GET /health"))

    assert url.startswith("https://")
    assert up.first.tokens == 32
    assert [record.error for record in records] == [None] * 4
    assert plain.status in {0, 400}


@pytest.mark.usefixtures("docker")
def test_key_is_changed_in_the_gateway_too(tmp_path: Path) -> None:
    project = config.load(workspace.make(tmp_path, **SETTINGS), overrides={"GLM_TINY_PORT": ""})
    service = project.service("tiny")
    with runtime.serving(Docker(project), project, service) as up:
        old = up.server.key
        (server,) = rotation.rotate(project, service)
        both = [ask(server.url, chat(tokens=1, key=key)).status for key in (old, server.key)]
        _, (server,) = rotation.retire(project, service)
        one = [ask(server.url, chat(tokens=1, key=key)).status for key in (old, server.key)]

    assert (both, one) == ([200, 200], [401, 200])


def test_setting_that_changes_while_it_runs_is_told_and_undone(
    docker: Docker, tmp_path: Path
) -> None:
    """Nobody takes a server for protected that is not, and `down` finds what the setting hides."""
    docker.check()
    folder = workspace.make(tmp_path, GLM_TINY_PORT=str(workspace.free_port()))

    def invoke(*arguments: str, gateway: int) -> str:
        env = {**os.environ, "GLM_GATEWAY": str(gateway)}
        with workspace.invoke(folder, *arguments, env=env) as process:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            return out + err

    up = ("up", "--docker", "--quant", "tiny")
    assert "gateway" not in invoke(*up, gateway=0)
    assert "It has no gateway" in invoke(*up, gateway=1)
    invoke("down", gateway=1)
    assert "gateway" not in invoke(*up, gateway=1)
    assert "It has a gateway" in invoke(*up, gateway=0)
    assert "ready" in invoke("status", gateway=0)
    invoke("down", gateway=0)
    name = config.load(folder).name
    ours = f"com.docker.compose.project={name}"
    assert docker.client.containers.list(all=True, filters={"label": ours}) == []
    assert docker.client.networks.list(filters={"label": ours}) == []


def test_server_that_dies_leaves_an_error_and_no_forged_end(server: Server, docker: Docker) -> None:
    container = docker.container(server.service)
    assert container
    (inner,) = host.children(container.attrs["State"]["Pid"])
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(server.url)) for _ in range(SLOTS)]
        for sock in socks:
            sock.sendall(chat(tokens=1500, key=server.key))
            assert b" 200 " in sock.recv(13, socket.MSG_WAITALL)
        os.kill(inner, signal.SIGKILL)
        rests = [rest(sock) for sock in socks]

    # One may have been quick enough to be whole; none may only look so.
    ended = [each for each in rests if b"[DONE]" in each or each.endswith(b"\r\n0\r\n\r\n")]
    assert len(ended) < SLOTS
    assert all(b'"completion_tokens":1500' in each for each in ended)
    wait_until(
        lambda: ask(server.url, chat(tokens=1, key=server.key)).status == 200 or None,
        timeout_s=60,
        what="the restarted server does not answer",
    )


def rest(sock: socket.socket, *, until: bytes = b"\0", after: bytes = b"") -> bytes:
    """Read what is left, to an end mark, the close or the reset; `after` was read before."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while not (after + received).endswith(until) and (data := sock.recv(65536)):
            received += data
    return received


def test_absent_server_is_said_to_be_absent(server: Server, docker: Docker) -> None:
    docker.compose("stop", server.service.name)
    answer = ask(server.url, chat(tokens=1, key=server.key), timeout_s=8)
    docker.compose("start", server.service.name)

    assert (answer.status, answer.whole) == (503, True)
    assert "no server" in answer.message
    assert int(answer.headers["retry-after"]) > 0
    wait_until(
        lambda: ask(server.url, chat(tokens=1, key=server.key)).status == 200 or None,
        timeout_s=60,
        what="the server is not found again",
    )


class Slow:
    """Clients that send a byte a second: a header, or a body. They note when each was ended."""

    def __init__(self, url: str, key: str, *, each: int) -> None:
        self.begun = time.monotonic()
        self.ends: dict[str, list[tuple[int, float]]] = {"header": [], "body": []}
        """The status and the seconds after which it came."""
        self._open: dict[socket.socket, str] = {}
        for what, opening in {
            "header": b"POST /completion HTTP/1.1\r\nHost: localhost\r\nX: ",
            "body": head(key=key, Content_Length=10000) + b"{",
        }.items():
            for _ in range(each):
                sock = connect(url)
                sock.sendall(opening)
                self._open[sock] = what
        self._thread = threading.Thread(target=self._drip)
        self._thread.start()

    def _drip(self) -> None:
        while self._open:
            time.sleep(1)
            ready, _, _ = select.select(self._open, [], [], 0)
            for sock in ready:
                answer = read(sock)
                self.ends[self._open.pop(sock)].append(
                    (answer.status, time.monotonic() - self.begun)
                )
                sock.close()
            for sock in self._open:
                with contextlib.suppress(ConnectionError):
                    sock.sendall(b"x")

    def wait(self) -> None:
        self._thread.join()


def first_token_s(server: Server) -> float:
    """Ask for two tokens as a client with nothing else to do; return how long the first took."""
    begun = time.monotonic()
    with connect(server.url) as sock:
        sock.sendall(chat(tokens=2, key=server.key, cache_prompt=False))
        received = b""
        while b"data: " not in received:
            more = sock.recv(65536)
            assert more, received
            received += more
        took_s = time.monotonic() - begun
        rest(sock, until=b"\r\n0\r\n\r\n", after=received)
    return took_s


def p95(samples: list[float]) -> float:
    return sorted(samples)[-(-95 * len(samples) // 100) - 1]


def silent(sock: socket.socket) -> None:
    """Be busy with a long prompt."""
    time.sleep(35)
    reply(sock)


def endless(sock: socket.socket) -> None:
    """Stream until the client is gone."""
    sock.sendall(STREAM)
    while True:
        sock.sendall(chunk(b"x" * 65536))


@pytest.mark.usefixtures("many_files")
@pytest.mark.row(
    "R12",
    "with the gateway: 200 slow heads, 200 slow bodies, 200 that never read",
    "ended after 10, 20 and 30 s; another client waits less than twice as long",
    inputs=600,
)
def test_slow_clients_are_ended_and_slow_nobody_down(server: Server, front: Front) -> None:
    """200 slow headers, 200 slow bodies, 200 that never read what they asked for.

    Beside them one that waits for a slow server, as it may.
    """
    quiet = [first_token_s(server) for _ in range(150)]
    with front(endless) as fronted, front(silent) as busy, contextlib.ExitStack() as stack:
        patient = stack.enter_context(connect(busy.url))
        patient.sendall(head(Content_Length=2) + b"{}")
        deaf = stack.enter_context(connect(fronted.url))
        deaf.sendall(head(Content_Length=2) + b"{}")
        for _ in range(200):
            stack.enter_context(connect(server.url)).sendall(chat(tokens=16, key=server.key))
        slow = Slow(server.url, server.key, each=200)
        time.sleep(2)  # until those that never read have been answered
        during = [first_token_s(server) for _ in range(150)]
        assert time.monotonic() - slow.begun < 20, "the machine is too slow to tell"
        slow.wait()
        assert fronted.upstream.closed.wait(60)
        deaf_s = time.monotonic() - slow.begun
        waited_for = read(patient)
    after = [first_token_s(server) for _ in range(150)]

    assert_ended_and_harmless(slow.ends, quiet=quiet, during=during, after=after, deaf_s=deaf_s)
    assert waited_for.status == 200


def assert_ended_and_harmless(
    ends: dict[str, list[tuple[int, float]]],
    *,
    quiet: list[float],
    during: list[float],
    after: list[float],
    deaf_s: float,
) -> None:
    assert p95(during) < 2 * max(p95(quiet), p95(after))
    for what, least_s in {"header": 10, "body": 20}.items():
        assert {status for status, _ in ends[what]} == {408}
        assert len(ends[what]) == 200
        assert least_s - 2 < min(s for _, s in ends[what])
        assert max(s for _, s in ends[what]) < least_s + 8
    assert 28 < deaf_s < 50


ENDED: dict[str, Any] = {
    "ends": {"header": [(408, 10.5)] * 200, "body": [(408, 20.5)] * 200},
    "quiet": [1.0],
    "during": [1.9],
    "after": [1.0],
    "deaf_s": 31,
}
SLOW: dict[str, dict[str, Any]] = {
    "others that wait": {"during": [2.1]},
    "bodies that are never ended": {"ends": {**ENDED["ends"], "body": []}},
    "heads that are ended late": {"ends": {**ENDED["ends"], "header": [(408, 19)] * 200}},
    "deaf ones that are not ended": {"deaf_s": 60},
}


@pytest.mark.parametrize("broken", SLOW)
def test_slow_clients_that_harm_are_noticed(ledger: Ledger, broken: str) -> None:
    assert_ended_and_harmless(**ENDED)
    check = test_slow_clients_are_ended_and_slow_nobody_down
    with ledger.catching(check, f"figures with {broken}", says="assert"):
        assert_ended_and_harmless(**(ENDED | SLOW[broken]))


def test_it_adds_less_than_a_millisecond_to_a_stream(
    docker: Docker, tell: Callable[[str], None]
) -> None:
    """Where a core is free, which on a busy machine takes precedence over what keeps it busy."""
    docker.check()
    direct, through, first = bench.measure(rounds=1, duration_s=2)
    tell(bench.table([way for way in (direct, through, first) if way]))
    if first is None:
        pytest.skip("the system gives no process precedence here, so busy cores would be measured")

    assert bench.adds_too_much(direct, first) is None


@pytest.mark.usefixtures("docker")
def test_measurement_finds_a_gateway_that_holds_events_back(tmp_path: Path, ledger: Ledger) -> None:
    slow = tmp_path / "haproxy.cfg"
    limit = "    filter bwlim-out slow default-limit 8k default-period 1s\n"
    limit += "    http-response set-bandwidth-limit slow\n"
    text = bench.CONFIGURATION.read_text()
    slow.write_text(text.replace("backend server\n", f"backend server\n{limit}"))

    direct, through, _ = bench.measure(
        streams=2, rounds=1, duration_s=1, precedence=False, configuration=slow
    )

    check = test_it_adds_less_than_a_millisecond_to_a_stream
    with ledger.catching(check, "a gateway with a limit of bandwidth", says="is None"):
        assert bench.adds_too_much(direct, through) is None


@pytest.fixture(scope="module")
def bare(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without a gateway."""
    folder = workspace.make(tmp_path_factory.mktemp("bare"))
    project = config.load(folder, overrides={"GLM_TINY_PORT": ""})
    docker.check()
    with runtime.serving(Docker(project), project, project.service("tiny")) as up:
        yield up.server


def test_server_without_a_gateway_is_noticed(bare: Server, notice: Notice) -> None:
    broken = "a server with no gateway"
    docker = Docker(config.load(bare.service.key_file.parent.parent))
    given = {"server": bare, "docker": docker}
    notice(test_server_is_reached_through_its_gateway_alone, broken, **given)
    notice(test_more_than_it_takes_is_told_to_wait_and_the_rest_is_unharmed, broken, **given)


def another_event(sock: socket.socket) -> None:
    sock.sendall(STREAM + chunk(b"data: other\n\n") + b"0\r\n\r\n")
    sock.close()


MAKE = workspace.make


def without_tls(folder: Path, **settings: str) -> Path:
    settings.pop("GLM_TLS_FILE")
    return MAKE(folder, **settings)


def keep_both(project: Project, _: object) -> tuple[int, tuple[Server, ...]]:
    return 0, (runtime.running(project, "tiny"),)


def forged(*_: object, **__: object) -> bytes:
    return b"data: [DONE]"


def deaf(_: socket.socket) -> None:
    """Outlast the check, and never look at the connection."""
    time.sleep(7)


OTHER_CONTAINER: dict[str, Any] = {"patch": {"stack.compose.Docker.gateway": Docker.container}}
ROOT_PROCESS = SimpleNamespace(attrs={"State": {"Pid": os.getpid()}})
UNLIKE: dict[Callable[..., None], Broken] = {
    test_own_host_names_and_addresses_pass: ("a foreign name", {"name": "evil.example"}),
    test_request_that_is_read_two_ways_is_refused: (
        "one that is answered",
        {"patch": {f"{__name__}.ask": lambda *_: Answer(status=200)}},
    ),
    test_key_with_a_line_break_is_the_key_or_no_request: (
        "one that lets in all",
        {"patch": {f"{__name__}.ask": lambda *_: Answer(status=200)}},
    ),
    test_container_has_no_rights: (
        "a process of root's",
        {"patch": {"stack.compose.Docker.gateway": lambda *_: ROOT_PROCESS}},
    ),
    test_image_holds_one_program: ("the server's own image", OTHER_CONTAINER),
    test_stream_is_the_servers_to_the_byte_and_each_event_comes_at_once: (
        "another stream than the server's",
        {"answer": another_event, "says": "timed out"},
    ),
    test_client_that_hangs_up_is_hung_up_on_the_server: (
        "a server that never hears of it",
        {"answer": deaf},
    ),
    test_request_that_fails_is_not_sent_twice: ("a request that succeeds", {"answer": reply}),
    test_body_larger_than_the_buffer_arrives_whole: (
        "a server that hangs up",
        {"answer": socket.socket.close},
    ),
    test_flood_of_connections_is_answered: (
        "connections that are reset",
        {"patch": {f"{__name__}.ask_at_once": lambda *_: [Answer()]}},
    ),
    test_tls_with_a_certificate_of_ones_own: (
        "a gateway with no certificate",
        {"patch": {"tests.workspace.make": without_tls}},
    ),
    test_key_is_changed_in_the_gateway_too: (
        "a key that is not retired",
        {"patch": {"stack.rotation.retire": keep_both}},
    ),
    test_setting_that_changes_while_it_runs_is_told_and_undone: IDLE,
    test_server_that_dies_leaves_an_error_and_no_forged_end: (
        "a server that is said to have ended well",
        {"patch": {"os.kill": lambda *_: None, f"{__name__}.rest": forged}},
    ),
    test_absent_server_is_said_to_be_absent: (
        "a server that is there",
        {"patch": {"stack.compose.Docker.compose": lambda *_: None}},
    ),
}


@pytest.mark.parametrize("check", UNLIKE, ids=lambda check: check.__name__)
@pytest.mark.usefixtures("server")
def test_what_is_unlike_is_noticed(
    front: Front, notice: Notice, check: Callable[..., None]
) -> None:
    broken, how = UNLIKE[check]

    def otherwise(*_: object) -> contextlib.AbstractContextManager[Fronted]:
        return front(how["answer"])

    notice(check, broken, front=otherwise if "answer" in how else front, **how)
