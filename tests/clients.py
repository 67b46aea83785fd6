"""Clients that count on nothing: long answers, cut or whole, and clients that leave."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from stack import client
from stack.server import Server
from stack.wait import wait_until

CHAT = "/v1/chat/completions"
LIMIT_S = 120


@dataclass
class Client:
    """One that asks for a long answer, and how it went.

    `end` is `whole` (the tokens asked for, a reason, [DONE]), `error` (the server said one), `cut`
    (the connection broke), or `forged` (it ended as whole ones do, and was not).
    """

    tokens: int
    limit_s: float = LIMIT_S
    """Without a word, after which it goes."""
    begun: bool = False
    end: str = ""
    times: list[float] = field(default_factory=list)

    def ask(self, server: Server, prompt: str) -> "Client":
        """Ask, and listen to the end."""
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            with (
                client.session(server, timeout_s=self.limit_s) as session,
                session.stream("POST", CHAT, json=body) as answer,
            ):
                self.end = self.listen(answer)
        except httpx.HTTPError:
            self.end = "cut"
        return self

    def listen(self, answer: httpx.Response) -> str:
        """Read an answer to its end; return how that was."""
        if answer.is_error:
            return "error"
        used, finish = 0, None
        for line in answer.iter_lines():
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:"):
                continue
            if data == "[DONE]":
                return "whole" if finish and used == self.tokens else "forged"
            event = json.loads(data)
            if "error" in event:
                return "error"
            for choice in event["choices"]:
                finish = choice["finish_reason"] or finish
                self.begun |= bool(choice["delta"].get("content"))
            used = (event.get("usage") or {}).get("completion_tokens", used)
            self.times.append(time.monotonic())
        return "forged" if finish else "cut"


@contextmanager
def asking(
    server: Server, prompts: Sequence[str], *, tokens: int
) -> Iterator[tuple[list[Client], Callable[[], list[str]]]]:
    """Let clients ask at once; yield them, and a call that waits for how each ended, sorted."""
    clients = [Client(tokens) for _ in prompts]
    with ThreadPoolExecutor(len(clients)) as pool:
        pending: list[Future[Client]] = [
            pool.submit(each.ask, server, prompt)
            for each, prompt in zip(clients, prompts, strict=True)
        ]
        yield clients, lambda: sorted(future.result().end for future in pending)


def under_way(server: Server) -> int:
    """Return how many requests are in slots, or wait for one."""
    with client.session(server) as session:
        now = client.metrics(session)
    return int(now["requests_processing"] + now["requests_deferred"])


def wait_idle(server: Server, *, limit_s: float) -> float:
    """Wait until no slot works; return how long that took. Raises WaitTimeoutError."""
    start = time.monotonic()
    wait_until(
        lambda: None if under_way(server) else True, timeout_s=limit_s, what="slots still work"
    )
    return time.monotonic() - start


@contextmanager
def leaving(
    server: Server, prompt: str, *, count: int, after_first: bool, at_once: int = 8
) -> Iterator[Callable[[], int]]:
    """Let so many clients ask for a long answer, and hang up: at its first token, or before.

    Yields a call that waits for them and returns how many were served until they left.
    """
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 1000,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
    }

    def one(_: int) -> bool:
        """Return whether it was served: not refused, not cut."""
        limit_s = LIMIT_S if after_first else 0.3
        try:
            with (
                client.session(server, timeout_s=limit_s) as session,
                session.stream("POST", CHAT, json=body) as answer,
            ):
                return next(answer.iter_lines(), None) is not None
        except httpx.ReadTimeout:
            return not after_first
        except httpx.HTTPError:
            return False

    with ThreadPoolExecutor(at_once) as pool:
        done = [pool.submit(one, number) for number in range(count)]
        yield lambda: sum(future.result() for future in done)
