"""A server of known timing, which speaks as llama-server does, to judge what a client measures.

    python -m bench.reference --port 8099 --ttft-ms 200 --itl-ms 20

All streams get their tokens on one grid, as continuous batching gives them. Each event says when it
was sent (`sent_ns`), the first when its request had come (`received_ns`), by
`time.perf_counter_ns`, which on Linux the processes of one machine share.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.transport import Clock, prepare
from stack.errors import Code, StackError
from stack.host import Process, listening_port, spawn
from stack.wait import wait_until

MODEL = "known-timing"
_ROOT = Path(__file__).parent.parent
_START_S = 20
_ORPHAN_TICKS = 50
_IDENTITY = (
    '"created":1700000000,"id":"chatcmpl-00000000000000000000000000000000",'
    '"model":"known-timing","system_fingerprint":"b0-0000000000000000000000000000000000000000",'
    '"object":"chat.completion.chunk"'
)
_SENT = '"sent_ns":"%019d"'
_TIMINGS = (
    ',"timings":{"cache_n":0,"prompt_n":%6d,"prompt_ms":%10.3f,"predicted_n":%6d,'
    '"predicted_ms":%12.3f}'
)
"""Fixed widths, so that the length of a chunk is known before its numbers are."""
_STREAM = (
    b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\nKeep-Alive: timeout=5, max=100\r\n\r\n"
)
_FACTS: Mapping[str, Any] = {
    "/health": {"status": "ok"},
    "/v1/models": {"object": "list", "data": [{"id": MODEL, "object": "model"}]},
    "/props": {
        "model_path": f"/{MODEL}.gguf",
        "total_slots": 1024,
        "default_generation_settings": {"n_ctx": 1 << 20},
        "build_info": "built-in",
    },
}


def _chunk(event: bytes) -> bytes:
    """Frame an event as one chunk of a body."""
    return b"%x\r\ndata: %b\n\n\r\n" % (len(event) + 8, event)


def _template(delta: str, *more: str) -> bytes:
    """Return a framed event whose numbers are to be filled in."""
    choice = f'{{"finish_reason":null,"index":0,"delta":{delta}}}'
    event = f'{{"choices":[{choice}],{_IDENTITY},{"".join(more)}}}'.encode()
    filled = event % tuple(0 for _ in re.findall(rb"%[\d.]+[df]", event))
    return b"%x\r\ndata: " % (len(filled) + 8) + event + b"\n\n\r\n"


_ROLE = _template('{"role":"assistant","content":null}', _SENT, ',"received_ns":"%019d"')
_TOKEN = _template('{"content":" word"}', _SENT)
_TIMED_TOKEN = _template('{"content":" word"}', _SENT, _TIMINGS)


@dataclass(slots=True, eq=False)
class Stream:
    """One answer on its way."""

    sock: socket.socket
    received_ns: int
    prompt: int
    tokens: int
    timed: bool
    usage: bool
    sent_ns: list[int] = field(default_factory=list)
    """When each of its tokens was sent."""

    @property
    def made(self) -> int:
        return len(self.sent_ns)

    def begin(self) -> None:
        """Send the headers and the role."""
        self.sock.send(_STREAM)
        self.sock.send(_ROLE % (time.perf_counter_ns(), self.received_ns))

    def step(self) -> bool:
        """Send the next token; return whether it was the last."""
        now_ns = time.perf_counter_ns()
        self.sent_ns.append(now_ns)
        if self.timed:
            self.sock.send(_TIMED_TOKEN % (now_ns, *self._timings(now_ns)))
        else:
            self.sock.send(_TOKEN % now_ns)
        if self.made < self.tokens:
            return False
        self.sock.send(self._tail(now_ns))
        return True

    def _timings(self, now_ns: int) -> tuple[int, float, int, float]:
        first_ns = self.sent_ns[0]
        prompt_ms, predicted_ms = (first_ns - self.received_ns) / 1e6, (now_ns - first_ns) / 1e6
        return self.prompt, prompt_ms, self.made, predicted_ms

    def _tail(self, now_ns: int) -> bytes:
        usage = {"completion_tokens": self.made, "prompt_tokens": self.prompt}
        usage["total_tokens"] = self.made + self.prompt
        told = f'"usage":{json.dumps(usage)}' + _TIMINGS % self._timings(now_ns)
        finish = '{"finish_reason":"length","index":0,"delta":{}}'
        events = [f'{{"choices":[{finish}],{_IDENTITY}}}', f'{{"choices":[],{_IDENTITY},{told}}}']
        last = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        chosen = events if self.usage else events[:1]
        return b"".join(_chunk(event.encode()) for event in chosen) + last


class Reference:
    """The server: its connections, the streams on them, and what it did."""

    def __init__(self, *, ttft_ms: float, itl_ms: float) -> None:
        self._clock = Clock()
        self._ttft_ns = round(ttft_ms * 1e6)
        self._itl_s = itl_ms / 1e3
        self._received: dict[socket.socket, bytes] = {}
        """What came of the next request on each connection."""
        self._streams: dict[socket.socket, Stream] = {}
        self._done: list[Stream] = []

    async def serve(self, listener: socket.socket) -> None:
        """Accept connections and keep the grid, for as long as the parent process lives."""
        loop = asyncio.get_running_loop()
        loop.add_reader(listener, self._accept, listener)
        parent, begun_s = os.getppid(), loop.time()
        for tick in itertools.count(1):
            await asyncio.sleep(begun_s + tick * self._itl_s - loop.time())
            begun_ns = time.perf_counter_ns() - self._ttft_ns
            for stream in list(self._streams.values()):
                if stream.made or stream.received_ns <= begun_ns:
                    self._step(stream)
            if tick % _ORPHAN_TICKS == 0:
                self._clock.sample()
                if os.getppid() != parent:
                    return

    def _step(self, stream: Stream) -> None:
        try:
            if stream.step():
                self._done.append(self._streams.pop(stream.sock))
        except OSError:  # gone, or so slow that its buffer is full
            self._close(stream.sock)

    def _accept(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        prepare(sock)
        self._received[sock] = b""
        asyncio.get_running_loop().add_reader(sock, self._read, sock)

    def _close(self, sock: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(sock)
        sock.close()
        self._received.pop(sock, None)
        self._streams.pop(sock, None)

    def _read(self, sock: socket.socket) -> None:
        try:
            data, at_ns, _ = self._clock.receive(sock)
            if not data:
                self._close(sock)
                return
            self._received[sock] += data
            head, blank, body = self._received[sock].partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: *(\d+)", head)
            if blank and len(body) >= (int(length[1]) if length else 0):
                self._received[sock] = b""
                _, path, _ = head.decode().split(" ", 2)
                self._answer(sock, path, json.loads(body or b"{}"), at_ns)
        except (OSError, ValueError):
            self._close(sock)

    def _answer(self, sock: socket.socket, path: str, body: Mapping[str, Any], at_ns: int) -> None:
        if path == "/v1/chat/completions":
            stream = Stream(
                sock=sock,
                received_ns=at_ns,
                prompt=len(_words(_prompt(body))),
                tokens=body.get("max_tokens") or body.get("max_completion_tokens") or 16,
                timed=body.get("timings_per_token", False),
                usage=(body.get("stream_options") or {}).get("include_usage", False),
            )
            stream.begin()
            self._streams[sock] = stream
        elif path == "/tokenize":
            words = [{"id": 0, "piece": word} for word in _words(body["content"])]
            _reply(sock, {"tokens": words if body.get("with_pieces") else [0] * len(words)})
        elif path == "/apply-template":
            _reply(sock, {"prompt": _prompt(body)})
        elif path == "/truth":
            _reply(sock, [(stream.received_ns, stream.sent_ns) for stream in self._done])
        elif path == "/metrics":
            _reply(sock, self._metrics())
        else:
            _reply(sock, _FACTS.get(path))

    def _metrics(self) -> str:
        streams = [*self._done, *self._streams.values()]
        values = {
            "prompt_tokens_total": sum(stream.prompt for stream in streams if stream.made),
            "tokens_predicted_total": sum(stream.made for stream in streams),
            "requests_processing": len(self._streams),
            "requests_deferred": 0,
        }
        return "".join(f"llamacpp:{name} {value}\n" for name, value in values.items())


def _prompt(body: Mapping[str, Any]) -> str:
    return " ".join(str(message["content"]) for message in body["messages"])


def _words(text: str) -> list[str]:
    """Cut a text into its tokens: words, with the blank before each."""
    return re.findall(r"\s*\S+", text)


def _reply(sock: socket.socket, value: object) -> None:
    body = (value if isinstance(value, str) else json.dumps(value)).encode()
    status = b"404 Not Found" if value is None else b"200 OK"
    head = b"HTTP/1.1 %b\r\nServer: llama.cpp\r\nContent-Length: %d\r\n\r\n"
    sock.settimeout(5)  # only a load's own answers must hold up nobody
    sock.sendall(head % (status, len(body)) + body)
    sock.settimeout(0)


@contextlib.contextmanager
def serving(*, ttft_ms: float = 200, itl_ms: float = 20, host: str = "127.0.0.1") -> Iterator[str]:
    """Serve in a process of its own, on an address of this machine; give its URL.

    Raises:
        StackError: HOST where it does not start.

    """
    argv = [sys.executable, "-m", "bench.reference"]
    argv += ["--host", host, "--ttft-ms", str(ttft_ms), "--itl-ms", str(itl_ms)]
    with tempfile.TemporaryDirectory() as name:
        pid_file, log = Path(name, "pid"), Path(name, "log")
        spawn(argv, env={**os.environ, "PYTHONPATH": str(_ROOT)}, log=log, pid_file=pid_file)
        process = wait_until(lambda: Process.read(pid_file), timeout_s=_START_S, what="no pid")
        try:
            yield wait_until(
                lambda: _url(host, process, log), timeout_s=_START_S, what="not listening"
            )
        finally:
            process.signal_group(signal.SIGKILL)  # it has nothing to put in order
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, 0)


def _url(host: str, process: Process, log: Path) -> str | None:
    if not process.alive():
        raise StackError(
            f"The built-in server ended: {log.read_text().strip()[-300:]}",
            "It needs free loopback ports; try again.",
            Code.HOST,
        )
    port = listening_port(process.pid)
    return f"http://{host}:{port}" if port else None


def main() -> None:
    """Serve until ended, by a signal or with the parent process."""
    parser = argparse.ArgumentParser(description="Serve tokens at a known pace.")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0: one that is free")
    parser.add_argument("--ttft-ms", type=float, default=200, help="to the first token, at least")
    parser.add_argument("--itl-ms", type=float, default=20, help="between tokens: the grid")
    options = parser.parse_args()
    with socket.create_server((options.host, options.port), backlog=1024) as listener:
        listener.settimeout(0)
        reference = Reference(ttft_ms=options.ttft_ms, itl_ms=options.itl_ms)
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(reference.serve(listener))


if __name__ == "__main__":
    main()
