"""A server on a loopback socket that answers each request as a script says, byte by byte."""

import contextlib
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Sequence
from enum import Enum
from typing import Any, Self


class End(Enum):
    CLOSE = "FIN"
    RESET = "RST"


Step = bytes | float | End
Script = Sequence[Step]
"""What to send, seconds to wait before the next, how to end the connection."""


class Scripted:
    """The nth request gets the nth script, those after the last script the last."""

    def __init__(self, *scripts: Script, tls: ssl.SSLContext | None = None) -> None:
        self.scripts = scripts
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.connections = 0
        self.sent_ns: list[int] = []
        """When each piece of the scripts was sent."""
        self.awake = threading.Event()
        self._over = threading.Event()
        self.awake.set()  # cleared, it neither reads nor writes
        self.tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._socks: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    @property
    def url(self) -> str:
        scheme = "https" if self.tls else "http"
        return f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"

    def die(self) -> None:
        """Stop listening and reset what is open, as a crash does."""
        self._over.set()
        # The thread in accept() would keep a socket that is merely closed.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._socks:
            _reset(sock)

    def _start(self, work: Any, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                self._socks.append(sock)
                self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError), self._dress(sock) as wire:
            while self.awake.wait() and (request := _request(wire)):
                key, body = request
                self.keys.append(key)
                number = len(self.requests)
                self.requests.append(json.loads(body))
                self._play(wire, self.scripts[min(number, len(self.scripts) - 1)])

    def _dress(self, sock: socket.socket) -> socket.socket:
        return self.tls.wrap_socket(sock, server_side=True) if self.tls else sock

    def _play(self, sock: socket.socket, script: Script) -> None:
        due_s = time.perf_counter()
        for step in script:
            self.awake.wait()
            if isinstance(step, bytes):
                self.sent_ns.append(time.perf_counter_ns())
                sock.sendall(step)
            elif isinstance(step, float):
                due_s += step
                if self._over.wait(max(0, due_s - time.perf_counter())):
                    raise ConnectionAbortedError
            else:
                if step is End.RESET:
                    _reset(sock)
                raise ConnectionAbortedError

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.awake.set()
        self.die()
        for thread in self._threads:
            thread.join()


def _reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.shutdown(socket.SHUT_RD)
        sock.close()


def _request(sock: socket.socket) -> tuple[str, bytes] | None:
    """Return the key and the body of the next request; None when the client closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = sock.recv(65536)
        if not part:
            return None
        data += part
    head, _, rest = data.partition(b"\r\n\r\n")
    body = bytearray(rest)
    length = re.search(rb"Content-Length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += sock.recv(65536)
    key = re.search(rb"Authorization: (.+?)\r\n", data)
    return key[1].decode() if key else "", bytes(body)


HEADERS = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"Keep-Alive: timeout=5, max=100\r\n\r\n"
)
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(value: object) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def delta(
    finish: str | None = None, timings: dict[str, float] | None = None, **bears: Any
) -> bytes:
    """Return an event with one choice: `content=`, `reasoning_content=`, `tool_calls=`."""
    value: dict[str, Any] = {"choices": [{"index": 0, "delta": bears, "finish_reason": finish}]}
    return event(value | ({"timings": timings} if timings else {}))


def usage(tokens: int, *, prompt: int = 7, cached: int = 0) -> bytes:
    details = {"cached_tokens": cached}
    told = {"completion_tokens": tokens, "prompt_tokens": prompt, "prompt_tokens_details": details}
    return event({"choices": [], "usage": told})


ROLE = delta(role="assistant", content=None)
DONE = b"data: [DONE]\n\n"


def whole(tokens: int) -> bytes:
    """Return a whole answer, to be sent at once."""
    events = [ROLE, *[delta(content="a")] * tokens, delta("stop"), usage(tokens), DONE]
    return HEADERS + b"".join(map(chunk, events)) + END


def refusal(status: int, body: bytes = b'{"error":{}}') -> bytes:
    return b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)
