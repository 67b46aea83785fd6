"""The generator's connections: stamps, the end of an answer, how long they last."""

import asyncio
import contextlib
import itertools
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import transport
from bench.transport import Clock, Connection, Endpoint, Exchange, Response
from tests.unit.scripted import END, HEADERS, End, Script, Scripted, chunk, refusal, whole

LOOPBACK = Path(__file__).parent / "loopback.pem"
REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"
linux = pytest.mark.skipif(not transport.SO_TIMESTAMPNS, reason="only Linux stamps segments")


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give a connected pair of TCP sockets; the first is prepared."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as ours,
        listener.accept()[0] as theirs,
    ):
        transport.prepare(ours)
        time.sleep(0.05)  # the kernel turns its stamps on a little later than asked
        yield ours, theirs


@linux
def test_stamp_is_of_the_arrival_not_of_the_reading() -> None:
    clock = Clock()
    with pair() as (ours, theirs):
        sent_ns = time.perf_counter_ns()
        theirs.send(b"a")
        time.sleep(0.1)
        data, at_ns, kernel = clock.receive(ours)

    assert (data, kernel) == (b"a", True)
    assert 0 <= at_ns - sent_ns < 50e6


def test_without_the_kernels_stamp_it_is_of_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SO_TIMESTAMPNS", None)
    clock = Clock()
    with pair() as (ours, theirs):
        theirs.send(b"a")
        time.sleep(0.1)
        read_ns = time.perf_counter_ns()
        _, at_ns, kernel = clock.receive(ours)

    assert not kernel
    assert at_ns >= read_ns


@linux
@pytest.mark.parametrize("step_s", [-3600, 3600])
def test_stamps_survive_a_clock_that_is_set(monkeypatch: pytest.MonkeyPatch, step_s: int) -> None:
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - step_s * 10**9)
    clock = Clock()
    monkeypatch.setattr(time, "time_ns", real)  # set by `step_s` since
    with pair() as (ours, theirs):
        clock.sample()
        sent_ns = time.perf_counter_ns()
        theirs.send(b"a")
        _, at_ns, kernel = clock.receive(ours)

    assert kernel
    assert abs(at_ns - sent_ns) < 50e6


@linux
def test_stamp_from_the_future_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 3600 * 10**9)
    clock = Clock()
    monkeypatch.setattr(time, "time_ns", real)
    with pair() as (ours, theirs):
        theirs.send(b"a")
        _, at_ns, kernel = clock.receive(ours)

    assert not kernel
    assert at_ns <= time.perf_counter_ns()


def exchange(*scripts: Script, tls: bool = False, **limits: float) -> tuple[Exchange, Scripted]:
    """Carry one request over a new connection to a scripted server."""
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(LOOPBACK)

    async def carry(url: str) -> Exchange:
        connection = await Connection.to(Endpoint(url), Clock())
        done = Exchange()
        await connection.carry(REQUEST, done, **({"stall_s": 9.0, "limit_s": 9.0} | limits))
        connection.close()
        return done

    with Scripted(*scripts, tls=context) as server:
        return asyncio.run(carry(server.url)), server


def test_headers_and_each_piece_have_stamps_of_their_own() -> None:
    done, server = exchange([HEADERS, 0.1, chunk(b"a"), 0.2, chunk(b"b"), END])

    assert [piece for _, piece in done.pieces] == [b"a", b"b"]
    stamps = [done.headers_ns or 0, *(at_ns for at_ns, _ in done.pieces)]
    late_ms = [(at - sent) / 1e6 for at, sent in zip(stamps, server.sent_ns, strict=False)]
    assert all(-0.1 < late < 5 for late in late_ms), late_ms


def test_request_is_sent_before_anything_comes() -> None:
    done, _ = exchange([whole(1)])

    assert done.sent_ns
    assert done.headers_ns
    assert done.sent_ns < done.headers_ns <= done.end_ns


def test_stamps_are_those_beneath_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(LOOPBACK))

    done, server = exchange([HEADERS, 0.1, chunk(b"a"), END], tls=True)

    assert (done.error, [piece for _, piece in done.pieces]) == (None, [b"a"])
    assert abs(done.pieces[0][0] - server.sent_ns[1]) < 5e6


def test_stranger_to_tls_is_an_error() -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        exchange([whole(1)], tls=True)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ([HEADERS, chunk(b"a"), End.CLOSE], "broken"),
        ([HEADERS, chunk(b"a"), End.RESET], "broken"),
        ([End.CLOSE], "broken"),
        ([b"HELLO\r\n\r\n", End.CLOSE], "broken"),
        ([HEADERS, b"zz\r\n"], "broken"),
        ([HEADERS, chunk(b"a"), 0.2], "stalled"),
        ([HEADERS, *[chunk(b"a"), 0.05] * 8], "timeout"),
    ],
    ids=["closed", "reset", "no answer", "no HTTP", "no chunk", "stalled", "slow"],
)
def test_exchange_that_fails_keeps_its_reason(script: Script, error: str) -> None:
    done, _ = exchange(script, stall_s=0.1, limit_s=0.3)

    assert done.error
    assert done.error[0] == error


def test_request_larger_than_the_buffers_is_sent_when_its_last_byte_is() -> None:
    body = b"{" + b" " * 20_000_000 + b"}"
    request = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    async def carry(url: str) -> tuple[int, Exchange]:
        connection = await Connection.to(Endpoint(url), Clock())
        begun_ns, done = time.perf_counter_ns(), Exchange()
        asyncio.get_running_loop().call_later(0.2, server.awake.set)
        await connection.carry(request, done, stall_s=9, limit_s=9)
        connection.close()
        return begun_ns, done

    with Scripted([whole(1)]) as server:
        server.awake.clear()
        begun_ns, done = asyncio.run(carry(server.url))

    assert not done.error
    assert (done.sent_ns or 0) - begun_ns > 0.15e9


@contextlib.asynccontextmanager
async def used(script: Script) -> AsyncIterator[Connection]:
    """Give a connection that has carried one exchange."""
    with Scripted(script) as server:
        connection = await Connection.to(Endpoint(server.url), Clock())
        await connection.carry(REQUEST, Exchange(), stall_s=9, limit_s=9)
        yield connection
        connection.close()


def grants(text: bytes) -> bytes:
    return whole(1).replace(b"timeout=5, max=100", text)


@pytest.mark.parametrize(
    ("script", "fresh"),
    [
        ([whole(1)], True),
        ([grants(b"timeout=5, max=1")], False),
        ([grants(b"timeout=1, max=100")], False),
        ([whole(1).replace(b"Keep-Alive: timeout", b"Connection: close\r\nX: ")], False),
        ([whole(1), End.CLOSE], False),
        ([refusal(503)], True),
    ],
    ids=["kept", "last request", "idle too long", "said so", "closed", "after a refusal"],
)
def test_connection_is_fresh_while_the_server_keeps_it(script: Script, fresh: bool) -> None:
    async def look() -> bool:
        async with used(script) as connection:
            await asyncio.sleep(0.05)
            return connection.fresh

    assert asyncio.run(look()) is fresh


BODY = b"data: {}\n\n0\r\n\r\n"
LONG = BODY + b"a" * 300
STATUS = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("wire", "body"),
    [
        (HEADERS + chunk(BODY) + chunk(LONG) + END, BODY + LONG),
        (HEADERS + b"3;x=y\r\nabc\r\n0\r\nX: y\r\n\r\n", b"abc"),
        (STATUS + b"content-length: 14\r\n\r\n" + BODY[:14], BODY[:14]),
        (STATUS + b"Content-Length: 0\r\n\r\n", b""),
        (STATUS + b"\r\n" + BODY, BODY),
    ],
    ids=["chunked", "extension and trailer", "length", "no body", "until close"],
)
@settings(deadline=None)
@given(cuts=st.lists(st.integers(min_value=0)))
def test_any_split_of_a_response_gives_its_body(wire: bytes, body: bytes, cuts: list[int]) -> None:
    places = sorted({cut % (len(wire) + 1) for cut in cuts} | {0, len(wire)})
    response = Response()

    found = b"".join(response.feed(wire[a:b]) for a, b in itertools.pairwise(places))
    response.close()

    assert (found, response.done, response.status) == (body, True, 200)
