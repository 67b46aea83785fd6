"""Parses a streamed chat completion, after the fact: stamped pieces of its body in, tokens out."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.records import Read

_decode = json.JSONDecoder().decode
"""A sixth faster than `json.loads` on bytes, which guesses their encoding first."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one body held. The fields that `Record` has too mean the same there."""

    reads: tuple[Read, ...]
    exact: bool
    answer_ns: int | None
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    timings: Mapping[str, float]
    finish: str | None
    error: str | None
    """`event`, `broken`, `empty` or `partial`, in this order where several hold."""
    detail: str
    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]
    """Tool calls: a name, and the JSON of the arguments."""


class _Event(NamedTuple):
    """An event that bore tokens, or told how many there are."""

    at_ns: int
    made: int | None
    """`timings.predicted_n`."""
    bears: bool


class Parser:
    """Takes a body piece by piece, however it was split.

    An event counts for the piece that ended it. Server-sent events are UTF-8 lines, and no byte
    within a character is a line break, so bytes are cut before they are decoded.
    """

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []
        self._done = False
        self._events: list[_Event] = []
        self._answer_ns: int | None = None
        self._usage: Mapping[str, Any] = {}
        self._timings: Mapping[str, float] = {}
        self._finish: str | None = None
        self._error: tuple[str, str] | None = None
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[list[str], list[str]]] = {}

    def feed(self, at_ns: int, piece: bytes) -> None:
        """Take the next piece of the body and the time it came."""
        *lines, self._line = (self._line + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:])
            elif line in (b"", b"\r") and self._data:
                data, self._data = b"\n".join(self._data), []
                self._event(at_ns, data)

    def _event(self, at_ns: int, data: bytes) -> None:
        if self._done or self._error:
            return
        if data.strip() == b"[DONE]":
            self._done = True
            return
        try:
            self._chunk(at_ns, _decode(data.decode()))
        except (ValueError, TypeError, AttributeError, LookupError):
            self._error = "broken", f"no chunk of an answer: {data[:200].decode(errors='replace')}"

    def _chunk(self, at_ns: int, chunk: Mapping[str, Any]) -> None:
        if "error" in chunk:
            self._error = "event", json.dumps(chunk["error"])
            return
        self._usage = chunk.get("usage") or self._usage
        timings = chunk.get("timings")
        self._timings = timings or self._timings
        bears = False
        for choice in chunk["choices"]:
            self._finish = choice.get("finish_reason") or self._finish
            delta = choice["delta"]
            content, reasoning = delta.get("content"), delta.get("reasoning_content")
            answers = bool(content or delta.get("tool_calls"))
            for call in delta.get("tool_calls") or ():
                name, arguments = self._calls.setdefault(call.get("index", 0), ([], []))
                part = call.get("function", {})
                name.append(part.get("name") or "")
                arguments.append(part.get("arguments") or "")
            if answers or reasoning:
                bears = True
                self._content.append(content or "")
                self._reasoning.append(reasoning or "")
            if answers and self._answer_ns is None:
                self._answer_ns = at_ns
        # Once the answer has begun, the server's count tells of tokens that show nothing, too: an
        # end of turn, the first bytes of a character.
        made = (timings or {}).get("predicted_n")
        if bears or (self._events and made is not None):
            self._events.append(_Event(at_ns, made, bears))

    def answer(self) -> Answer:
        """Return what came so far."""
        exact = bool(self._events) and all(event.made is not None for event in self._events)
        reads = _reads(self._events, exact=exact)
        error = self._error
        if not error and not reads:
            error = "empty", "no token came"
        if not error and not (self._finish and self._usage):
            error = "partial", f"no {'usage' if self._finish else 'finish reason'} came"
        details = self._usage.get("prompt_tokens_details") or {}
        return Answer(
            reads=tuple(reads),
            exact=exact,
            answer_ns=self._answer_ns,
            prompt_tokens=self._usage.get("prompt_tokens"),
            cached_tokens=details.get("cached_tokens"),
            output_tokens=self._usage.get("completion_tokens"),
            timings=self._timings,
            finish=self._finish,
            error=error[0] if error else None,
            detail=error[1] if error else "",
            content="".join(self._content),
            reasoning="".join(self._reasoning),
            calls=tuple(("".join(name), "".join(text)) for name, text in self._calls.values()),
        )


def parse(pieces: Iterable[tuple[int, bytes]]) -> Answer:
    """Parse a whole body."""
    parser = Parser()
    for at_ns, piece in pieces:
        parser.feed(at_ns, piece)
    return parser.answer()


def _reads(events: Iterable[_Event], *, exact: bool) -> list[Read]:
    """Join the events of each read; one with no new token is none that bore tokens.

    A server may spread a token over several events: the parts of a tool call.
    """
    reads: list[Read] = []
    before = 0
    for event in events:
        if exact and event.made is not None:
            tokens, before = max(0, event.made - before), max(event.made, before)
        else:
            tokens = int(event.bears)
        counts = int(event.bears or tokens > 0)
        if reads and reads[-1].at_ns == event.at_ns:
            last = reads.pop()
            reads.append(Read(event.at_ns, last.tokens + tokens, last.events + counts))
        elif tokens:
            reads.append(Read(event.at_ns, tokens, 1))
    return reads
