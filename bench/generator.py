"""Sends requests to a server at a set concurrency or rate, and records what comes back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from bench.prompts import Spread
from bench.records import Run
from stack.server import Server

ERRORS = {
    "refused": "nothing listened",
    "connect": "no connection, for another reason",
    "unauthorized": "HTTP 401 or 403",
    "busy": "HTTP 429",
    "unavailable": "HTTP 503",
    "http": "another HTTP status than 200",
    "stalled": "no byte came for `stall_s`",
    "timeout": "the answer took longer than `limit_s`",
    "broken": "the connection or the protocol broke before the answer's end",
    "event": "the server reported an error in the stream",
    "partial": "no finish reason or no usage",
    "empty": "200 without a token",
}
"""The classes of failure, and what each means. `Record.detail` has the particulars."""


_LENGTHS = Spread(96, 160)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to send. Equal lengths make clients move in lock-step; spread them."""

    arrivals: str = "closed"
    """`closed`, `constant`, `poisson` or `ramp` (a rate that grows evenly from 0 to `rate`)."""
    clients: int = 1
    """Streams at once (closed), or the most there may be."""
    rate: float | None = None
    """Requests a second; None in a closed loop."""
    duration_s: float = 10
    """How long it is measured, after the warm-up."""
    warmup_s: float = 2
    """Load of the same kind before that, never drained."""
    requests: int | None = None
    """Send no more than so many, and wait for them; None sends until the time is up."""
    prompts: str = "cold"
    """`cold` (each differs from its first token), `shared` (a common prefix of `shared` tokens)
    or `turns` (each client goes on with its conversation, `turns` times)."""
    prompt: Spread = _LENGTHS
    """Tokens of a prompt, chat template included; of what each turn adds, with `turns`."""
    shared: int = 0
    turns: int = 1
    output: Spread = _LENGTHS
    """Tokens asked for (`max_tokens`)."""
    ignore_eos: bool = True
    timings_per_token: bool = True
    """Let the server say with each event how many tokens it has made."""
    seed: int = 0
    stall_s: float = 60
    limit_s: float = 600


class Snapshot(NamedTuple):
    """How a run goes, while it runs."""

    elapsed_s: float
    streams: int
    """Requests in flight."""
    finished: int
    """Requests that succeeded."""
    events: int
    """Reads so far: about as many as tokens; the records have the exact numbers."""
    errors: Mapping[str, int]
    """By class."""
    ttft_ms: float | None
    """Of the answer that ended last."""


Watch = Callable[[Snapshot], None]


class Interrupted(KeyboardInterrupt):  # it is none: Ctrl-C must stop who ignores it
    """Ctrl-C came; `run` is what there was until then."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run


def run(server: Server, load: Load, *, watch: Watch | None = None) -> Run:
    """Send a load to a server; what is under way at the end is cut.

    `watch` receives a Snapshot about twice a second, in the thread that sends: it must be quick.

    Raises:
        StackError: USAGE for a load that makes no sense, HOST where the limit of open files is
            too low, VERIFY where the server does not answer before the start.
        Interrupted: on Ctrl-C.

    """
    raise NotImplementedError
