"""Turns what one run saw into what it says: a Point. Pure; a million tokens take 1.5 s.

A sample belongs to the window if the stamp that completes it is inside: a gap by its later read,
TTFT by the first token, TPOT and E2E latency by the end. So requests over an edge bias nothing.
"""

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from statistics import fmean, median

from bench.generator import TICK_S
from bench.records import Record, Run
from bench.stats import Spread, jain, spread
from bench.verdict import STEADY, Slo

DIP_NS = 50_000_000
"""A client between two requests is in flight no less; `concurrency` shows what that hides."""
STALL = 5
"""A gap above so many times the median one is a stall."""
BINS = 40
"""Of the histogram, to a factor of ten."""
UNSEEN = 16
"""The most tokens that a server makes for a request after it was cut."""
SLICES = 120
"""The most that a time line has; none is shorter than a tenth of a second."""
_MS = 1e6
_S = 1e9


@dataclass(frozen=True)
class Window:
    """The span that is judged, without its first instant; empty where there was none."""

    begin_ns: int
    end_ns: int

    def __contains__(self, at_ns: int | None) -> bool:
        """Whether a stamp is inside."""
        return at_ns is not None and self.begin_ns < at_ns <= self.end_ns

    def share(self, begin_ns: int, end_ns: int) -> float:
        """Return how many nanoseconds of a span are inside."""
        return max(0, min(end_ns, self.end_ns) - max(begin_ns, self.begin_ns))

    @property
    def length_s(self) -> float:
        """Its length."""
        return (self.end_ns - self.begin_ns) / _S


@dataclass(frozen=True)
class Slice:
    """A piece of the time line, from the run's begin to its end."""

    at_s: float
    """Its begin, since the run's."""
    tokens_s: float
    in_flight: float
    waiting: float
    """Of those in flight, without a first token."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run at one load. Milliseconds, but where the name says seconds; shares are 0 to 1.

    None stands for what could not be known, never 0.
    """

    arrivals: str
    clients: int
    rate: float | None
    seed: int
    begin_s: float
    """The window's begin, since the run's."""
    window_s: float

    due: int
    """Requests that were due inside the window."""
    requests: int
    """Whole answers that ended inside the window, and all failures after the warm-up: a failure may
    be what ended the steady state. Those that were cut are in neither."""
    failed: int
    cut: int
    reconnected: int
    errors: Mapping[str, int]
    """Failures by class, of the whole run."""
    first_error_s: float | None

    client_queue: Spread
    queue: Spread
    """Waiting for a slot; no samples where the headers do not mark its begin."""
    prefill: Spread
    ttft: Spread
    ttft_scheduled: Spread
    ttfa: Spread
    icl: Spread
    itl: Spread
    tpot: Spread
    e2e: Spread
    prefill_residual: Spread
    """Prefill as seen, less the server's `prompt_ms`."""
    decode_residual: Spread
    """First to last token as seen, less the server's `predicted_ms`."""

    tokens_s: float
    """Output tokens; one whose gap crosses an edge of the window counts by its share inside."""
    prompt_tokens_s: float
    """Prompt tokens that were not cached."""
    requests_s: float
    """Whole answers."""
    concurrency: float
    """Mean number in flight."""
    little: float
    """1 - (requests x E2E latency) / time in flight, edges by their share: what latency hides."""
    backlog: tuple[int, int]
    """Requests due but not ended, at the window's begin and at its end."""

    good: int
    """Of `requests`, those within the SLO."""
    goodput_s: float
    wrong: int | None
    """Of `requests`, whole answers that are not the known ones; None where none is known."""

    exact: float | None
    """Share of tokens that the server counted; the rest are one an event."""
    usage_error: float | None
    """Tokens seen against `usage`, of whole answers: relative difference."""
    metrics_error: float | None
    """Tokens seen against the server's own total over the run: relative difference, but for what
    the server may have gone on to make for requests that were cut."""
    cached: float | None
    """Share of prompt tokens from the cache."""

    fairness: float | None
    """Jain's index over the clients' tokens."""
    wait_ratio: float | None
    """The mean TTFT of the worst client over that of the best."""
    stalls: float | None
    """Share of gaps above 5 x their median."""
    coalesced: float | None
    """Share of reads that held more than one event, and so share a stamp."""
    kernel: float | None
    """Share of reads with the kernel's stamp."""
    client_cpu: float
    """Of one core."""
    lag_p99: float | None
    """How late the event loop came back."""

    itl_histogram: tuple[tuple[float, int], ...]
    """(lower bound in ms, tokens); each bin is 10^(1/40) wide, 6 %."""
    timeline: tuple[Slice, ...]

    @property
    def decode_tokens_s(self) -> float | None:
        """Output tokens a second of one stream while it decodes."""
        return 1000 / self.itl.mean if self.itl.mean else None

    @property
    def overloaded(self) -> bool:
        """Whether more came than the server could end: an open loop then has no steady state.

        Beyond a twentieth of what arrived, and beyond what Poisson's chance makes of a backlog.
        """
        begin, end = self.backlog
        chance = 4 * (2 * begin + 1) ** 0.5
        return self.rate is not None and end - begin > max(0.05 * self.due, chance)


def window(run: Run) -> Window:
    """Return the longest span after the warm-up with 0.95 of the clients in flight.

    All of it in an open loop, which has no target.
    """
    whole = Window(run.warm_ns, max(run.warm_ns, run.ended_ns))
    if run.rate is not None:
        return whole
    steps = sorted(chain.from_iterable(((r.sent_ns, 1), (_end(r, run), -1)) for r in run.records))
    spans: list[tuple[int, int]] = []
    in_flight = 0
    for (at, step), (until, _) in pairwise(steps):
        in_flight += step
        begin, end = max(at, whole.begin_ns), min(until, whole.end_ns)
        if in_flight < STEADY * run.clients or begin >= end:
            continue
        if spans and begin - spans[-1][1] <= DIP_NS:
            begin = spans.pop()[0]
        spans.append((begin, end))
    return Window(*max(spans, key=lambda span: span[1] - span[0], default=(run.warm_ns,) * 2))


def _end(record: Record, run: Run) -> int:
    return min(record.end_ns, run.ended_ns) if record.cut else record.end_ns


@dataclass
class _Tokens:
    """What the reads inside a window add up to, in one pass over all of them."""

    icl: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    made: float = 0
    exact: float = 0
    reads: int = 0
    coalesced: int = 0
    kernel: int = 0
    by_client: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))


def _tokens(records: Sequence[Record], inside: Window) -> _Tokens:
    sums, begin, end = _Tokens(), inside.begin_ns, inside.end_ns
    icl, itl = sums.icl, sums.itl
    for record in records:
        last = since = record.sent_ns
        made = 0.0
        first = True
        for at, tokens, events in record.reads:
            if begin < at <= end:
                sums.reads += 1
                sums.kernel += record.kernel
                sums.coalesced += events > 1
                if not first:
                    icl.append((at - last) / _MS)
                    if tokens:
                        itl.extend([(at - since) / _MS / tokens] * tokens)
            if begin <= since and at <= end:
                made += tokens
            elif since < end and begin < at:
                made += tokens * inside.share(since, at) / (at - since)
            last, first = at, False
            if tokens:
                since = at
        sums.made += made
        sums.exact += made * record.exact
        sums.by_client[record.client] += made
    return sums


def _ms(begin_ns: int | None, end_ns: int | None) -> float | None:
    return None if begin_ns is None or end_ns is None else (end_ns - begin_ns) / _MS


def _known(values: Iterator[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _first(record: Record) -> int | None:
    return record.reads[0].at_ns if record.reads else None


def _last(record: Record) -> int:
    return record.reads[-1].at_ns if record.reads else record.end_ns


def ttft_ms(record: Record, *, scheduled: bool = False) -> float | None:
    """Return the time to the first token from the request's sending, or from when it was due."""
    return _ms(record.scheduled_ns if scheduled else record.sent_ns, _first(record))


def tpot_ms(record: Record) -> float | None:
    """Return the time per output token after the first read, as vLLM's benchmark defines it.

    None, not 0, where the first read held all.
    """
    if not record.reads:
        return None
    count = record.output_tokens or sum(read.tokens for read in record.reads)
    later = count - record.reads[0].tokens
    span = record.reads[-1].at_ns - record.reads[0].at_ns
    return span / _MS / later if later > 0 else None


def meets(record: Record, slo: Slo, *, scheduled: bool = False) -> bool:
    """Whether an answer is whole and within both limits; TPOT only where it is defined."""
    ttft, tpot = ttft_ms(record, scheduled=scheduled), tpot_ms(record)
    whole = record.error is None and not record.cut and ttft is not None
    return whole and (ttft or 0) <= slo.ttft_ms and (tpot or 0) <= slo.tpot_ms


def _prefill(record: Record) -> float | None:
    return _ms(record.headers_ns, _first(record))


def _less(value: float | None, timing: float | None) -> float | None:
    return None if value is None or timing is None else value - timing


def _headers_mark_slots(records: Sequence[Record]) -> bool:
    """Whether the headers came as the slot began: only then is prefill the server's own.

    Some builds send them at once, then prefill has the queue in it; some with the first token.
    """
    pairs = [
        (prefill, record.timings["prompt_ms"])
        for record in records
        if (prefill := _prefill(record)) is not None and "prompt_ms" in record.timings
    ]
    limit = max(5, 0.2 * median(told for _, told in pairs)) if pairs else 0
    return bool(pairs) and median(abs(seen - told) for seen, told in pairs) <= limit


def analyse(run: Run, slo: Slo, *, server_tokens: int | None = None) -> Point:
    """Return what a run says.

    `server_tokens` is how many the server says it made meanwhile (`tokens_predicted_total` of
    `/metrics`, difference over the run).
    """
    inside, records, opened = window(run), run.records, run.rate is not None
    whole = [r for r in records if r.end_ns in inside and r.error is None and not r.cut]
    failures = [r for r in records if r.error is not None and not r.cut]
    failed = sum(run.warm_ns < r.end_ns <= run.ended_ns for r in failures)
    begun = [r for r in records if r.error is None and _first(r) in inside]
    split = begun if _headers_mark_slots(begun) else []
    tokens = _tokens(records, inside)
    length_s = inside.length_s

    def a_second(amount: float) -> float:
        return amount / length_s if length_s else 0.0

    held = sum(inside.share(r.sent_ns, _end(r, run)) for r in records)
    told = sum(
        inside.share(r.sent_ns, _end(r, run) if r.cut or r.error else _last(r)) for r in records
    )
    prompts = [r for r in begun if r.prompt_tokens]
    prompted = sum(r.prompt_tokens or 0 for r in prompts)
    cached = sum(r.cached_tokens or 0 for r in prompts)
    good = sum(meets(r, slo, scheduled=opened) for r in whole)
    ticks = (round((at - run.begun_ns) / _S / TICK_S) for at in (inside.begin_ns, inside.end_ns))
    lags = sorted(run.lags_ns[slice(*ticks)])
    icl, itl = sorted(tokens.icl), sorted(tokens.itl)
    stall_ms = STALL * median(icl) if icl else 0
    return Point(
        arrivals=run.arrivals,
        clients=run.clients,
        rate=run.rate,
        seed=run.seed,
        begin_s=(inside.begin_ns - run.begun_ns) / _S,
        window_s=length_s,
        due=sum(r.scheduled_ns in inside for r in records),
        requests=len(whole) + failed,
        failed=failed,
        cut=sum(r.cut for r in records),
        reconnected=sum(r.reconnected for r in records),
        errors=dict(Counter(r.error or "" for r in failures).most_common()),
        first_error_s=min(((r.end_ns - run.begun_ns) / _S for r in failures), default=None),
        client_queue=spread(
            (r.sent_ns - r.scheduled_ns) / _MS
            for r in records
            if r.sent_ns in inside and r.client >= 0  # else it never got a stream
        ),
        queue=spread(_known(_ms(r.sent_ns, r.headers_ns) for r in split), failed),
        prefill=spread(_known(map(_prefill, split)), failed),
        ttft=spread(_known(map(ttft_ms, begun)), failed),
        ttft_scheduled=spread(_known(ttft_ms(r, scheduled=True) for r in begun), failed),
        ttfa=spread(_known(_ms(r.sent_ns, r.answer_ns) for r in begun), failed),
        icl=spread(icl),
        itl=spread(itl),
        tpot=spread(_known(map(tpot_ms, whole)), failed),
        e2e=spread(((_last(r) - r.sent_ns) / _MS for r in whole), failed),
        prefill_residual=spread(
            _known(_less(_prefill(r), r.timings.get("prompt_ms")) for r in split)
        ),
        decode_residual=spread(
            _known(_less(_ms(_first(r), _last(r)), r.timings.get("predicted_ms")) for r in whole)
        ),
        tokens_s=a_second(tokens.made),
        prompt_tokens_s=a_second(prompted - cached),
        requests_s=a_second(len(whole)),
        concurrency=a_second(held / _S),
        little=1 - told / held if held else 0.0,
        backlog=(_backlog(run, inside.begin_ns), _backlog(run, inside.end_ns)),
        good=good,
        goodput_s=a_second(good),
        wrong=sum(map(bool, judged)) if (judged := _known(r.wrong for r in whole)) else None,
        exact=tokens.exact / tokens.made if tokens.made else None,
        usage_error=_usage_error(whole),
        metrics_error=_metrics_error(records, server_tokens),
        cached=cached / prompted if prompted else None,
        fairness=None if opened else jain([tokens.by_client[n] for n in range(run.clients)]),
        wait_ratio=None if opened else _wait_ratio(begun),
        stalls=1 - bisect_right(icl, stall_ms) / len(icl) if icl else None,
        coalesced=tokens.coalesced / tokens.reads if tokens.reads else None,
        kernel=tokens.kernel / tokens.reads if tokens.reads else None,
        client_cpu=run.cpu_s * _S / max(1, run.ended_ns - run.begun_ns),
        lag_p99=lags[-(-99 * len(lags) // 100) - 1] / _MS if lags else None,
        itl_histogram=_histogram(itl),
        timeline=_timeline(run),
    )


def _backlog(run: Run, at_ns: int) -> int:
    return sum(
        r.scheduled_ns <= at_ns and (r.end_ns > at_ns or (r.cut and r.end_ns >= run.ended_ns))
        for r in run.records
    )


def _made(record: Record) -> int:
    return record.output_tokens or sum(read.tokens for read in record.reads)


def _error(seen: int, told: int | None) -> float | None:
    return (seen - told) / told if told else None


def _metrics_error(records: Sequence[Record], told: int | None) -> float | None:
    seen = sum(map(_made, records))
    unseen = UNSEEN * sum(r.cut and r.client >= 0 for r in records)
    return _error(min(max(seen, told), seen + unseen), told) if told else None


def _usage_error(whole: Sequence[Record]) -> float | None:
    counted = [r for r in whole if r.output_tokens]
    seen = sum(read.tokens for r in counted for read in r.reads)
    return _error(seen, sum(r.output_tokens or 0 for r in counted))


def _wait_ratio(begun: Sequence[Record]) -> float | None:
    waits: defaultdict[int, list[float]] = defaultdict(list)
    for record in begun:
        waits[record.client].append(ttft_ms(record) or 0)
    means = [fmean(each) for each in waits.values()]
    best = min(means, default=0)
    return max(means) / best if best else None


def _histogram(ordered: Sequence[float]) -> tuple[tuple[float, int], ...]:
    bins: list[tuple[float, int]] = []
    done = bisect_left(ordered, 1e-9)  # no bin holds 0, which clocks do not measure
    number = -9 * BINS
    while done < len(ordered):
        upper = 10 ** ((number + 1) / BINS)
        until = bisect_left(ordered, upper, done)
        if until > done or bins:
            bins.append((10 ** (number / BINS), until - done))
        done, number = until, number + 1
    return tuple(bins)


def _timeline(run: Run) -> tuple[Slice, ...]:
    length = run.ended_ns - run.begun_ns
    count = max(1, min(SLICES, length // int(_S / 10)))
    width = max(1, -(-length // count))
    tokens, in_flight, waiting = [0.0] * count, [0.0] * count, [0.0] * count

    def spend(line: list[float], begin: int, end: int) -> None:
        for slot in range(max(0, begin // width), min(count, -(-end // width))):
            line[slot] += min(end, (slot + 1) * width) - max(begin, slot * width)

    for record in run.records:
        sent, end = record.sent_ns - run.begun_ns, _end(record, run) - run.begun_ns
        first = _first(record)
        spend(in_flight, sent, end)
        spend(waiting, sent, end if first is None else first - run.begun_ns)
        for at, made, _ in record.reads:
            if run.begun_ns <= at <= run.ended_ns:
                tokens[min(count - 1, (at - run.begun_ns) // width)] += made
    lines = enumerate(zip(tokens, in_flight, waiting, strict=True))
    return tuple(
        Slice(n * width / _S, made * _S / width, flying / width, held / width)
        for n, (made, flying, held) in lines
    )
