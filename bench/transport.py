"""HTTP/1.1 over one connection a stream, with the kernel's own stamp of every read.

Linux stamps each segment as it arrives (`SO_TIMESTAMPNS`), so a busy event loop delays no stamp;
a read that held several segments has the stamp of the last. Elsewhere the stamp is taken when the
loop comes to read.
"""

import asyncio
import contextlib
import re
import socket
import ssl
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from stack.server import tls

SO_TIMESTAMPNS: Final = 35 if sys.platform == "linux" and sys.maxsize > 2**32 else None
"""Linux's number, which Python has no name for; with it a stamp is two 64-bit words."""
_TIMESPEC = struct.Struct("qq")
_ANCILLARY = socket.CMSG_SPACE(_TIMESPEC.size)
_BUFFER = bytearray(1 << 18)
"""Shared: what a read leaves is copied, so that no stream holds a buffer of its own."""
_VIEW = memoryview(_BUFFER)
_CONNECT_S = 5
_GRANTED = re.compile(r"(timeout|max)=(\d+)")
_KEEP_ALIVE = {"timeout": 5, "max": 100}
"""What llama-server grants, where it does not say."""


class Clock:
    """Turns the kernel's stamps, in CLOCK_REALTIME, into `time.perf_counter_ns`."""

    def __init__(self) -> None:
        self._took_ns, self._offset_ns = _compare()
        self.sample()

    def sample(self) -> None:
        """Compare the two clocks anew: better than before, or after somebody set the one."""
        took_ns, offset_ns = min(_compare() for _ in range(3))
        moved_ns = abs(offset_ns - self._offset_ns)
        if took_ns <= self._took_ns or moved_ns > took_ns + self._took_ns:
            self._took_ns, self._offset_ns = took_ns, offset_ns

    def receive(self, sock: socket.socket) -> tuple[bytes, int, bool]:
        """Read what is there; return it, its stamp, and whether that is the kernel's."""
        size, ancillary, _, _ = sock.recvmsg_into([_BUFFER], _ANCILLARY)
        now_ns = time.perf_counter_ns()
        data = bytes(_VIEW[:size])
        if ancillary:
            seconds, ns = _TIMESPEC.unpack(ancillary[0][2])
            at_ns = seconds * 10**9 + ns + self._offset_ns
            if at_ns <= now_ns:
                return data, at_ns, True
            self.sample()  # the clock was set forward
        return data, now_ns, False


def _compare() -> tuple[int, int]:
    """Return how long the comparison took, and perf_counter less CLOCK_REALTIME, in ns."""
    before = time.perf_counter_ns()
    real = time.time_ns()
    after = time.perf_counter_ns()
    return after - before, (before + after) // 2 - real


def prepare(sock: socket.socket) -> None:
    """Make a socket fit for `Clock.receive`, and send at once."""
    sock.settimeout(0)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if SO_TIMESTAMPNS:
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)


@contextlib.contextmanager
def stamping() -> Iterator[None]:
    """Keep the kernel stamping: it begins some time after the first socket asks for it."""
    with socket.socket(type=socket.SOCK_DGRAM) as asking:
        if SO_TIMESTAMPNS:
            asking.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        yield


@dataclass(slots=True)
class Exchange:
    """One request and what came back, filled as it comes."""

    sent_ns: int | None = None
    """When the last byte of the request was handed to the socket."""
    headers_ns: int | None = None
    """When the status line came."""
    status: int | None = None
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    """The body as it was read, each piece with its stamp."""
    kernel: bool = True
    end_ns: int = 0
    error: tuple[str, str] | None = None
    """A class of `bench.generator.ERRORS`, and the particulars."""
    pieces_most: int | None = None
    """Hang up after so many; None reads to the end."""


class Endpoint:
    """Where a server listens. Its address is looked up once, and its one TLS context made once."""

    def __init__(self, url: str, certificate: Path | None = None) -> None:
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.authority = parts.netloc.rpartition("@")[2]
        self.path = parts.path.rstrip("/")
        self.tls = tls(certificate) if parts.scheme == "https" else None
        self._addresses: list[tuple[int, Any]] = []

    async def connect(self) -> socket.socket:
        """Return a connected socket. Raises OSError."""
        loop = asyncio.get_running_loop()
        if not self._addresses:
            found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            self._addresses = [(family, address) for family, _, _, _, address in found]
        for family, address in self._addresses:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                prepare(sock)
                async with asyncio.timeout(_CONNECT_S):
                    await loop.sock_connect(sock, address)
            except OSError as failure:
                sock.close()
                error = failure
            except BaseException:
                sock.close()
                raise
            else:
                self._addresses = [(family, address)]
                return sock
        raise error


class Response:
    """Takes an HTTP/1.1 response apart, however it was split."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.done = False
        """Whether it is whole."""
        self._rest = b""
        self._left: int | None = 0
        """Bytes of the body, or of its chunk, to come; None until the server closes."""
        self._chunked = False
        self._trailer = False

    def feed(self, data: bytes) -> bytes:
        """Take what came; return the part of the body in it. Raises ValueError."""
        if self.status is None:
            head, blank, data = (self._rest + data).partition(b"\r\n\r\n")
            if not blank:
                self._rest = head
                return b""
            self._rest = b""
            self._begin(head.decode("latin-1"))
        if self._chunked:
            return self._unchunk(data)
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
            self.done = self._left == 0
        return data

    def _begin(self, head: str) -> None:
        line, *lines = head.split("\r\n")
        protocol, status, *_ = line.split(" ", 2)
        if not protocol.startswith("HTTP/1."):
            raise ValueError(line)
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        if not self._chunked:
            length = self.headers.get("content-length")
            self._left = None if length is None else int(length)
            self.done = self._left == 0
        self.status = int(status)

    def _unchunk(self, data: bytes) -> bytes:
        data = self._rest + data
        body, at = [], 0
        while not self.done:
            if self._left:
                body.append(data[at : at + self._left])
                at += len(body[-1])
                self._left -= len(body[-1])
            end = data.find(b"\r\n", at)
            if end < 0:
                break
            line, at = data[at:end], end + 2
            if self._trailer:
                self.done = not line
            elif line:  # the blank one ends the chunk before
                self._left = int(line.partition(b";")[0], 16)
                self._trailer = self._left == 0
        self._rest = data[at:]
        return b"".join(body)

    def close(self) -> None:
        """Take note that the server closed, which ends a body of no stated length."""
        self.done |= self.status is not None and self._left is None


class _Tls:
    """TLS by hand: the stamps are those of the bytes beneath."""

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)

    async def shake(self, sock: socket.socket) -> None:
        """Shake hands. Raises OSError."""
        loop = asyncio.get_running_loop()
        done = False
        while not done:
            with contextlib.suppress(ssl.SSLWantReadError):
                self._object.do_handshake()
                done = True
            await loop.sock_sendall(sock, self._outgoing.read())
            if not done:
                data = await loop.sock_recv(sock, len(_BUFFER))
                if not data:
                    raise ConnectionResetError("the server closed during the TLS handshake")
                self._incoming.write(data)

    def encrypt(self, data: bytes) -> bytes:
        self._object.write(data)
        return self._outgoing.read()

    def decrypt(self, data: bytes) -> bytes:
        self._incoming.write(data)
        parts = []
        with contextlib.suppress(ssl.SSLWantReadError):
            while part := self._object.read(len(_BUFFER)):
                parts.append(part)
        return b"".join(parts)


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


class Connection:
    """One connection, which carries one exchange at a time and is kept alive between them."""

    def __init__(self, sock: socket.socket, clock: Clock, tls: _Tls | None = None) -> None:
        self._sock = sock
        self._clock = clock
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._exchange: Exchange | None = None
        self._response = Response()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._moved_ns = time.perf_counter_ns()
        self._granted = dict(_KEEP_ALIVE)
        self.used = 0
        self.open = True
        self._loop.add_reader(sock, self._readable)

    @classmethod
    async def to(cls, endpoint: Endpoint, clock: Clock) -> "Connection":
        """Connect. Raises OSError."""
        sock = await endpoint.connect()
        try:
            tls = None
            if endpoint.tls:
                tls = _Tls(endpoint.tls, endpoint.host)
                async with asyncio.timeout(_CONNECT_S):
                    await tls.shake(sock)
            return cls(sock, clock, tls)
        except BaseException:
            sock.close()
            raise

    @property
    def fresh(self) -> bool:
        """Whether the server keeps it still: it closes idle ones, and after so many requests.

        A second early, since a request under way would meet the close.
        """
        idle_s = (time.perf_counter_ns() - self._moved_ns) / 1e9
        many = self.used >= self._granted["max"]
        return self.open and not many and idle_s < self._granted["timeout"] - 1

    async def carry(
        self, request: bytes, exchange: Exchange, *, stall_s: float, limit_s: float
    ) -> None:
        """Send a request, and fill `exchange` until the answer's end or its failure."""
        self._exchange, self._response = exchange, Response()
        self._ended = self._loop.create_future()
        self._moved_ns = time.perf_counter_ns()
        watch = self._loop.call_later(stall_s, self._look, exchange, stall_s)
        try:
            async with asyncio.timeout(limit_s):
                wire = self._tls.encrypt(request) if self._tls else request
                exchange.sent_ns = await self._hand(wire)
                await self._ended
        except TimeoutError:
            self._fail("timeout", f"no end within {limit_s:g} s")
        except OSError as error:
            self._fail("broken", str(error))
        finally:
            watch.cancel()
            self._exchange = None
            self.used += 1
            exchange.end_ns = exchange.end_ns or time.perf_counter_ns()
            exchange.status, headers = self._response.status, self._response.headers
            if not self._response.done or headers.get("connection", "").lower() == "close":
                self.close()
            for name, value in _GRANTED.findall(headers.get("keep-alive", "")):
                self._granted[name] = int(value)

    async def _hand(self, data: bytes) -> int:
        """Hand all to the socket; return when the last of it was. Raises OSError.

        Stamped before the call, not after: on one machine the call wakes the server, which may
        take this very core before the call returns.
        """
        left = memoryview(data)
        while True:
            at_ns = time.perf_counter_ns()
            with contextlib.suppress(BlockingIOError):
                left = left[self._sock.send(left) :]
            if not left:
                return at_ns
            writable = self._loop.create_future()
            self._loop.add_writer(self._sock, _wake, writable)
            try:
                await writable
            finally:
                self._loop.remove_writer(self._sock)

    def _look(self, exchange: Exchange, stall_s: float) -> None:
        """Fail the exchange if nothing came for so long, else look again when that may be."""
        if exchange is not self._exchange:
            return
        left_s = stall_s - (time.perf_counter_ns() - self._moved_ns) / 1e9
        if left_s > 0:
            self._loop.call_later(left_s, self._look, exchange, stall_s)
        else:
            self._fail("stalled", f"nothing came for {stall_s:g} s")

    def _readable(self) -> None:
        exchange, response = self._exchange, self._response
        try:
            data, at_ns, kernel = self._clock.receive(self._sock)
            self._moved_ns = at_ns
            if not data or exchange is None:
                self._closed()
                return
            exchange.kernel &= kernel
            exchange.headers_ns = exchange.headers_ns or at_ns
            piece = response.feed(self._tls.decrypt(data) if self._tls else data)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, ValueError) as error:
            self._fail("broken", str(error))
            return
        if piece:
            exchange.pieces.append((at_ns, piece))
        if response.done or len(exchange.pieces) == exchange.pieces_most:
            self._end(at_ns)

    def _closed(self) -> None:
        self._response.close()
        if self._response.done:
            self._end(self._moved_ns)
        else:
            self._fail("broken", "the server closed the connection before the answer's end")
        self.close()

    def _fail(self, kind: str, detail: str) -> None:
        if self._exchange:
            self._exchange.error = self._exchange.error or (kind, detail)
        self._end(time.perf_counter_ns())

    def _end(self, at_ns: int) -> None:
        if self._exchange:
            self._exchange.end_ns = at_ns
        _wake(self._ended)

    def close(self) -> None:
        """Close it; twice does no harm."""
        if self.open:
            self.open = False
            self._loop.remove_reader(self._sock)
            self._sock.close()
