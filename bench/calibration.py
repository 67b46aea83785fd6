"""How far the generator itself errs, measured against a server whose timing is known."""

import bisect
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from bench import prompts, reference
from bench.generator import TICK_S, Load, drive
from bench.prompts import Spread
from bench.records import Record, Run
from bench.transport import Exchange, stamping
from stack.errors import Code, StackError

LIMIT = 0.1
"""The part of the time between tokens that the client may err by."""
LATE_MS = 3
"""What is let pass, however short the time between tokens, of the error in TTFT and of the event
loop's lag (p95): an idle machine's timers and scheduler take half of it."""
WARMUP_S = 1
_TTFT_MS = 100
_SENT = re.compile(rb'"sent_ns":"(\d+)"')
_RECEIVED = re.compile(rb'"received_ns":"(\d+)"')


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The generator's own error at so many streams and such a rate of events."""

    streams: int
    itl_ms: float
    events: int
    kernel: bool
    """Whether the stamps were the kernel's."""
    receive_p50_ms: float
    """Stamp of an event less the time at which the server sent it."""
    receive_p99_ms: float
    ttft_p99_ms: float
    """TTFT as recorded less TTFT as the server had it, in absolute value."""
    cpu_us: float
    """The generator's CPU time an event."""
    shared: float
    """The part of the reads that held several events, which share one stamp."""
    lag_p99_ms: float
    """How late the event loop came back."""
    reason: str | None = None
    """Why the generator cannot be trusted here; None where it can."""


class Truth(NamedTuple):
    """How far the records of one request are from what the server says of it."""

    receive_ns: Sequence[int]
    """Of each event."""
    ttft_ns: int


def calibrate(streams: int, *, itl_ms: float, tokens: int = 128) -> Calibration:
    """Run the generator against the built-in server: `streams` at once, `tokens` each.

    Raises:
        StackError: HOST where the built-in server does not start.

    """
    output = Spread(max(1, tokens * 3 // 4), max(1, tokens * 5 // 4))
    answer_s = (_TTFT_MS + tokens * itl_ms) / 1e3
    load = Load(clients=streams, warmup_s=WARMUP_S, duration_s=2 * answer_s, output=output)
    raw: list[tuple[Record, Exchange]] = []
    with stamping(), reference.serving(ttft_ms=_TTFT_MS, itl_ms=itl_ms) as url:
        words = prompts.vocabulary([(" word", 1)], 0)
        run = drive(url, "", load, words, tap=lambda *each: raw.append(each))
    truths = [compare(record, exchange) for record, exchange in raw if record.reads]
    return _judge(run, truths, itl_ms=itl_ms)


def compare(record: Record, exchange: Exchange) -> Truth:
    """Hold the stamps of a request's tokens against the times at which they were sent."""
    body = b"".join(piece for _, piece in exchange.pieces)
    ends = list(itertools.accumulate(len(piece) for _, piece in exchange.pieces))
    # The first event gives the role, and the time at which the request came.
    _, *tokens = [
        (exchange.pieces[bisect.bisect_left(ends, sent.end())][0], int(sent[1]))
        for sent in _SENT.finditer(body)
    ]
    came_ns = int(_RECEIVED.findall(body)[0])
    stamped_ns, sent_ns = tokens[0]
    ttft_ns = (stamped_ns - record.sent_ns) - (sent_ns - came_ns)
    return Truth([at_ns - sent_ns for at_ns, sent_ns in tokens], ttft_ns)


def _judge(run: Run, truths: Sequence[Truth], *, itl_ms: float) -> Calibration:
    receive_ns = sorted(error for truth in truths for error in truth.receive_ns)
    reads = [read for record in run.records for read in record.reads]
    if not receive_ns or not reads:
        raise StackError(
            "Not one token of the built-in server arrived.",
            f"The first request: {run.records[0].detail if run.records else 'none was sent'}.",
            Code.HOST,
        )
    ttft_ns = sorted(abs(truth.ttft_ns) for truth in truths)
    warm = round((run.warm_ns - run.begun_ns) / 1e9 / TICK_S)
    lags_ns = sorted(run.lags_ns[warm:])
    measured = Calibration(
        streams=run.clients,
        itl_ms=itl_ms,
        events=len(receive_ns),
        kernel=all(record.kernel for record in run.records if record.reads),
        receive_p50_ms=_rank(receive_ns, 0.5) / 1e6,
        receive_p99_ms=_rank(receive_ns, 0.99) / 1e6,
        ttft_p99_ms=_rank(ttft_ns, 0.99) / 1e6,
        cpu_us=run.cpu_s * 1e6 / len(receive_ns),
        shared=sum(read.events > 1 for read in reads) / len(reads),
        lag_p99_ms=_rank(lags_ns, 0.99) / 1e6,
    )
    reason = _reason(
        measured, ttft_ms=_rank(ttft_ns, 0.95) / 1e6, lag_ms=_rank(lags_ns, 0.95) / 1e6
    )
    return replace(measured, reason=reason)


def _rank(ordered: Sequence[float], part: float) -> float:
    """Return a percentile by nearest rank: of fewer than 100 samples, p99 is the largest."""
    return ordered[math.ceil(part * len(ordered)) - 1] if ordered else math.inf


def _reason(measured: Calibration, *, ttft_ms: float, lag_ms: float) -> str | None:
    """Judge; of these two there are so few samples that one pause of the machine is their p99."""
    error_ms = LIMIT * measured.itl_ms
    late_ms = max(error_ms, LATE_MS)
    if measured.receive_p99_ms > error_ms:
        return (
            f"the client stamps tokens {measured.receive_p99_ms:.2f} ms late (p99), more than "
            f"{100 * LIMIT:.0f} % of the {measured.itl_ms:.2f} ms between them"
        )
    if ttft_ms > late_ms:
        return f"the client errs by {ttft_ms:.2f} ms in TTFT (p95)"
    if lag_ms > late_ms:
        return f"the client's event loop comes back {lag_ms:.2f} ms late (p95)"
    return None
