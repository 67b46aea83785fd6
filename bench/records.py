"""What the load generator saw of each request, before any judgement.

Every time is nanoseconds of `time.perf_counter_ns`, whatever clock it was taken on.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1


class Read(NamedTuple):
    """One read from the socket that bore tokens."""

    at_ns: int
    tokens: int
    """How many it brought."""
    events: int
    """In how many events; more than one share one stamp."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One request, from the time it was due to its end.

    `error` is None for an answer that is whole, else a class of failure (see
    `bench.generator.ERRORS`); what arrived before the failure is kept.
    """

    client: int
    """The stream it went over, counted from 0."""
    number: int
    """Its place in the run, counted from 0."""
    scheduled_ns: int
    sent_ns: int
    """When the last byte of the request was handed to the socket."""
    headers_ns: int | None = None
    answer_ns: int | None = None
    """When the first token came that is no reasoning."""
    end_ns: int = 0
    """When the stream ended or failed."""
    reads: tuple[Read, ...] = ()
    exact: bool = False
    """Whether tokens were counted by the server (`timings_per_token`), not one an event."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    """The server's own count (`usage.completion_tokens`)."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """The server's own, of the last chunk."""
    finish: str | None = None
    error: str | None = None
    detail: str = ""
    """Of the failure, or of the wrong answer."""
    wrong: bool | None = None
    """Whether an answer that is whole is not the known one; None where none is known."""
    reconnected: bool = False
    """Sent again, once, since the server had closed the idle connection."""
    kernel: bool = False
    """Whether the stamps of `reads` are the kernel's."""
    cut: bool = False
    """Still under way when the run ended, or hung up on: neither a success nor a failure."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the generator at one point: a number of clients, or a rate."""

    arrivals: str
    """`closed` (each client sends when its last answer ended), `constant`, `poisson` or `ramp`."""
    clients: int
    """Streams at once (closed), or the most there may be."""
    rate: float | None
    """Requests a second that were due; None in a closed loop."""
    seed: int
    begun_ns: int
    warm_ns: int
    """When the warm-up, which is not drained, ended."""
    ended_ns: int
    """When nothing more was sent; what was then under way is cut."""
    records: tuple[Record, ...]
    cpu_s: float
    """CPU time of the generator's processes between begin and end."""
    lags_ns: tuple[int, ...] = ()
    """How much later than asked the event loop came back, sampled all along."""


def write(records: Iterable[Record], path: Path) -> None:
    """Write one JSON object a line."""
    with path.open("w") as file:
        file.writelines(json.dumps(asdict(record)) + "\n" for record in records)


def read(path: Path) -> Iterator[Record]:
    """Read what `write` wrote."""
    for line in path.read_text().splitlines():
        yield parse(json.loads(line))


def parse(value: Mapping[str, Any]) -> Record:
    """Turn one JSON object back into a Record."""
    return Record(**{**value, "reads": tuple(Read(*each) for each in value["reads"])})
