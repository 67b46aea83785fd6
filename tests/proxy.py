"""A proxy before a server that does to its answers what a bad one might."""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition, Lock, Thread

import httpx

from bench import answers
from stack import client
from stack.server import Server

_TOKEN = re.compile(rb'"content":"[^"]')


def same(content: bytes) -> bytes:
    """Change nothing."""
    return content


@contextmanager
def proxied(
    server: Server,
    change: Callable[[bytes], bytes] = same,
    *,
    asked: Callable[[bytes], bytes] = same,
    lost: bytes = b"",
    status: int | None = None,
) -> Iterator[Server]:
    """Put a proxy before a server, open to all, that changes the body of each chat answer.

    `asked` changes the body of every request; `lost` is what it answers where the server breaks
    off: nothing, or something made up. With a `status`, every answer has that.
    """

    always = status

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = asked(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            try:
                with client.session(server, timeout_s=answers.LIMIT_S) as session:
                    answer = session.request(self.command, self.path, content=body)
            except httpx.HTTPError:
                self.reply(200, lost)
                return
            chat = self.path.endswith("/chat/completions")
            self.reply(answer.status_code, change(answer.content) if chat else answer.content)

        do_GET = do_POST  # noqa: N815  # its base asks for that name

        def reply(self, status: int, content: bytes) -> None:
            self.send_response(always or status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        Thread(target=proxy.serve_forever, daemon=True).start()
        yield replace(server, url=f"http://127.0.0.1:{proxy.server_port}")
        proxy.shutdown()


def swapper() -> Callable[[bytes], bytes]:
    """Give two clients each other's answers, once, as soon as two wait at the same time."""
    waiting: list[bytes] = []
    changed = Condition()

    def swap(content: bytes) -> bytes:
        with changed:
            waiting.append(content)
            changed.notify_all()
            if len(waiting) > 2 or not changed.wait_for(lambda: len(waiting) > 1, timeout=30):
                return content
            return waiting[1 if content is waiting[0] else 0]

    return swap


def dropper(every: int) -> Callable[[bytes], bytes]:
    """Leave out every so-manieth word of all the answers."""
    lock, seen = Lock(), itertools.count(1)

    def drop(content: bytes) -> bytes:
        answer = json.loads(content)
        message = answer["choices"][0]["message"]
        with lock:
            kept = [word for word in (message["content"] or "").split(" ") if next(seen) % every]
        message["content"] = " ".join(kept)
        return json.dumps(answer).encode()

    return drop


def token_dropper(every: int) -> Callable[[bytes], bytes]:
    """Leave out every so-manieth token of all the streams."""
    lock, seen = Lock(), itertools.count(1)

    def drop(content: bytes) -> bytes:
        with lock:
            events = content.split(b"\n\n")
            kept = [event for event in events if not _TOKEN.search(event) or next(seen) % every]
        return b"\n\n".join(kept)

    return drop
