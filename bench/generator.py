"""Sends requests to a server at a set concurrency or rate, and records what comes back."""

import asyncio
import contextlib
import gc
import itertools
import json
import math
import os
import random
import resource
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench import prompts, quiz, sse
from bench.prompts import Spread, Vocabulary
from bench.questions import Dialogue
from bench.quiz import Quiz
from bench.records import Record, Run
from bench.transport import Clock, Connection, Endpoint, Exchange, stamping
from stack.errors import Code, StackError
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

ARRIVALS = ("closed", "constant", "poisson", "ramp")
PROMPTS = ("cold", "shared", "turns", "questions")
PAUSE_S = 0.5
"""How long a client of a closed loop holds back after a failure: it must not flood a server."""
TICK_S = 0.01
"""How often the event loop's lag is sampled."""
WATCH_TICKS = 50
LONGEST_WARMUP_S = 120
HUNG_UP_PIECES = 3
"""After how many reads a client hangs up that is told to: well inside an answer."""
_LENGTHS = Spread(96, 160)
_OTHER_FILES = 256
_SLICE = 64
_OK = 200
_STATUSES: Mapping[int | None, str] = {
    401: "unauthorized",
    403: "unauthorized",
    429: "busy",
    503: "unavailable",
}


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
    """Load of the same kind before that, never drained; 0 for none. In a closed loop it lasts until
    each client has had an answer, or those that came when nobody waited would be measured."""
    requests: int | None = None
    """Send no more than so many, and wait for them; None sends until the time is up."""
    prompts: str = "cold"
    """`cold` (new words from the first on), `shared` (a common prefix of `shared` tokens),
    `turns` (each client goes on with its conversation, `turns` times), or `questions` (another one
    each time, with a known answer, which is checked; about half of them on texts)."""
    prompt: Spread = _LENGTHS
    """Tokens of a prompt, chat template included; of what each turn adds, with `turns`; of the
    texts, with `questions`."""
    shared: int = 0
    """Tokens of the common prefix, counted in those of the prompt; of the only text, with
    `questions`."""
    turns: int = 1
    output: Spread = _LENGTHS
    """Tokens asked for (`max_tokens`)."""
    ignore_eos: bool = True
    timings_per_token: bool = True
    """Let the server say with each event how many tokens it has made."""
    hang_up: int = 0
    """Ask every so-manieth time for a long answer, and hang up on it; 0 for never."""
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
    wrong: int = 0
    """Answers that were whole, and not the known ones."""


Watch = Callable[[Snapshot], bool | None]
Tap = Callable[[Record, Exchange], None]


class Interrupted(KeyboardInterrupt):  # it is none: Ctrl-C must stop who ignores it
    """Ctrl-C came; `run` is what there was until then."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run


def run(server: Server, load: Load, *, watch: Watch | None = None) -> Run:
    """Send a load to a server; what is under way at the end is cut.

    `watch` receives a Snapshot about twice a second, in the thread that sends: it must be quick.
    The run ends when it returns True.

    Raises:
        StackError: USAGE for a load that makes no sense, HOST where the limit of open files is
            too low, VERIFY where the server does not answer before the start.
        Interrupted: on Ctrl-C.

    """
    check(load)
    with stamping():
        vocabulary = prompts.learn(server)
        asking = None
        if load.prompts == "questions":
            asking = quiz.of(server.service, text=load.prompt, shared=load.shared, seed=load.seed)
        elif load.prompt.low - load.shared < vocabulary.least:
            raise _senseless(f"A prompt has {vocabulary.least} tokens of its own at the least.")
        return drive(
            server.url,
            server.key,
            load,
            vocabulary,
            watch=watch,
            certificate=server.certificate,
            quiz=asking,
        )


def drive(
    url: str,
    key: str,
    load: Load,
    vocabulary: Vocabulary,
    *,
    watch: Watch | None = None,
    tap: Tap | None = None,
    certificate: Path | None = None,
    quiz: Quiz | None = None,
) -> Run:
    """Send a load to a URL with prompts of a vocabulary at hand; `tap` sees each raw exchange.

    With a quiz, its questions are sent instead, and the answers checked.

    Raises as `run`, but never VERIFY.
    """
    _allow_files(load.clients)
    endpoint = Endpoint(url, certificate)
    driver = _Driver(endpoint, key, load, vocabulary, watch=watch, tap=tap, quiz=quiz)
    # A collection would hold the event loop up, and what a run makes is kept anyway.
    gc.disable()
    try:
        with _precedence():
            asyncio.run(driver.run())
    except KeyboardInterrupt:
        raise Interrupted(driver.result()) from None
    finally:
        gc.enable()
    return driver.result()


@contextlib.contextmanager
def _precedence() -> Iterator[None]:
    """Run this thread before others, where the system lets us.

    It is awake for microseconds at a time; but where a busy machine lets it wait for longer than a
    token takes, the kernel joins what came, and one stamp is left of two.
    """
    before = None
    with contextlib.suppress(AttributeError, OSError):  # not Linux; no right to
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield
    finally:
        if before:
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, *before)


def check(load: Load) -> None:
    """Refuse a load that makes no sense.

    Raises:
        StackError: USAGE.

    """
    open_loop = load.arrivals != "closed"
    wrong = {
        f"Arrivals are {', '.join(ARRIVALS)}, not {load.arrivals}": load.arrivals not in ARRIVALS,
        f"Prompts are {', '.join(PROMPTS)}, not {load.prompts}": load.prompts not in PROMPTS,
        f"{load.clients} clients send nothing": load.clients < 1,
        "An open loop needs a rate above 0": open_loop and not (load.rate and load.rate > 0),
        "A closed loop has no rate": not open_loop and load.rate is not None,
        "A run takes some time": load.duration_s <= 0 or load.warmup_s < 0,
        f"{load.requests} requests are none": load.requests is not None and load.requests < 1,
        "Lengths go from 1 up": not 1 <= load.prompt.low <= load.prompt.high
        or not 1 <= load.output.low <= load.output.high,
        "A prefix is for `shared` prompts, which need one": load.prompts != "questions"
        and (load.prompts == "shared") != (load.shared > 0),
        "Hanging up is for `questions`": load.hang_up > 0 and load.prompts != "questions",
        "Several turns are for `turns` prompts, which need them": (load.prompts == "turns")
        != (load.turns > 1),
    }
    for cause, holds in wrong.items():
        if holds:
            raise _senseless(f"{cause}.")


def _senseless(cause: str) -> StackError:
    return StackError(cause, "Change the load.", Code.USAGE)


def _allow_files(clients: int) -> None:
    """Raise the soft limit of open files where that many streams need it."""
    needed = clients + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise StackError(
                f"{clients} clients need {needed} open files, and this process may have {hard}.",
                "Ask for fewer clients, or raise the hard limit (`ulimit -Hn`).",
                Code.HOST,
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def schedule(load: Load) -> Iterator[float]:
    """Yield when the requests of an open loop are due, in seconds after the start."""
    rate, whole_s = load.rate or 0, load.warmup_s + load.duration_s
    chance = random.Random(load.seed)
    due_s = 0.0
    for number in itertools.count():
        if load.arrivals == "poisson":
            due_s += chance.expovariate(rate)
        elif load.arrivals == "ramp":  # number = rate · due² / (2 · whole)
            due_s = math.sqrt(2 * number * whole_s / rate)
        else:
            due_s = number / rate
        if due_s >= whole_s:
            return
        yield due_s


class _Stream:
    """One connection and one conversation."""

    def __init__(self, client: int) -> None:
        self.client = client
        self.connection: Connection | None = None
        self._messages: list[dict[str, str]] = []
        self._turn = 0

    def say(self, text: str, *, turns: int) -> list[dict[str, str]]:
        """Return the conversation with a new message; a new one after so many turns."""
        if self._turn % turns == 0:
            self._messages = []
        self._turn += 1
        self._messages.append({"role": "user", "content": text})
        return self._messages

    def hear(self, answer: sse.Answer) -> None:
        """Go on from an answer: with its reasoning, or the server's cache would be lost."""
        if answer.error:
            self._turn = 0
            return
        message = {"role": "assistant", "content": answer.content}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        self._messages.append(message)


@dataclass(slots=True, eq=False)
class _Request:
    """A request on its way to a Record."""

    number: int
    scheduled_ns: int
    client: int = -1
    exchange: Exchange = field(default_factory=Exchange)
    answer: sse.Answer | None = None
    reconnected: bool = False
    cut: bool = False
    question: Dialogue | None = None


class _Driver:
    """One run."""

    def __init__(
        self,
        endpoint: Endpoint,
        key: str,
        load: Load,
        vocabulary: Vocabulary,
        *,
        watch: Watch | None,
        tap: Tap | None,
        quiz: Quiz | None,
    ) -> None:
        self.load = load
        self.vocabulary = vocabulary
        self.quiz = quiz
        self.watch = watch
        self.tap = tap
        self.endpoint = endpoint
        self.clock = Clock()
        self.head = (
            f"POST {self.endpoint.path}/v1/chat/completions HTTP/1.1\r\n"
            f"Host: {self.endpoint.authority}\r\n"
            "Accept: text/event-stream\r\n"
            "Content-Type: application/json\r\n"
            + (f"Authorization: Bearer {key}\r\n" if key else "")
            + "Content-Length: "
        )
        self.prefix = vocabulary.passage(load.shared) if load.shared else ""
        self.number = 0
        self.records: list[Record] = []
        self.waiting: deque[_Request] = deque()
        """Due, while every stream is busy."""
        self.ended: asyncio.Queue[_Request | None] = asyncio.Queue()
        self.in_flight: set[_Request] = set()
        self.errors: Counter[str] = Counter()
        self.finished = self.events = self.wrong = 0
        self.ttft_ms: float | None = None
        self.lags_ns: list[int] = []
        self.cold = load.clients if load.arrivals == "closed" and load.warmup_s else 0
        """How many clients have had no answer yet, while the warm-up waits for that."""
        self.limit = asyncio.Timeout(None)
        self.begun_ns = self.warm_ns = self.ended_ns = self.cpu_ns = 0

    def result(self) -> Run:
        """Return what there is."""
        return Run(
            arrivals=self.load.arrivals,
            clients=self.load.clients,
            rate=self.load.rate,
            seed=self.load.seed,
            begun_ns=self.begun_ns,
            warm_ns=self.warm_ns,
            ended_ns=self.ended_ns,
            records=tuple(sorted(self.records, key=lambda record: record.number)),
            cpu_s=self.cpu_ns / 1e9,
            lags_ns=tuple(self.lags_ns),
        )

    async def run(self) -> None:
        """Send the load; on cancellation too, leave no task and no request unrecorded."""
        streams = [_Stream(client) for client in range(self.load.clients)]
        with contextlib.suppress(OSError):  # which the first request will meet again, and record
            await self._connect(streams[0])  # looks the address up for all
            await asyncio.gather(*map(self._connect, streams[1:]), return_exceptions=True)
        self.cpu_ns = -time.process_time_ns()
        self.begun_ns = time.perf_counter_ns()
        digesting = asyncio.create_task(self._digest())
        try:
            with contextlib.suppress(TimeoutError):
                async with self.limit, asyncio.TaskGroup() as group:
                    self._warm_after(LONGEST_WARMUP_S if self.cold else self.load.warmup_s)
                    sampling = asyncio.create_task(self._sample())
                    if self.load.arrivals == "closed":
                        for stream in streams:
                            group.create_task(self._closed(stream))
                    else:
                        await self._open(streams, group)
        finally:
            self.ended_ns = min(self.ended_ns, time.perf_counter_ns())
            if self.ended_ns < self.warm_ns:  # stopped before: the shorter warm-up was over
                self.warm_ns = self.begun_ns + round(self.load.warmup_s * 1e9)
            sampling.cancel()
            for stream in streams:
                if stream.connection:
                    stream.connection.close()
            for request in self.waiting:
                request.cut, request.exchange.end_ns = True, self.ended_ns
                self.ended.put_nowait(request)
            self.ended.put_nowait(None)
            await digesting
            self.cpu_ns += time.process_time_ns()
            with contextlib.suppress(asyncio.CancelledError):
                await sampling

    def _warm_after(self, warmup_s: float) -> None:
        """Let the warm-up end so long after the begin, and the run after the measured time."""
        self.warm_ns = self.begun_ns + round(warmup_s * 1e9)
        self.ended_ns = self.warm_ns + round(self.load.duration_s * 1e9)
        left_s = (self.ended_ns - time.perf_counter_ns()) / 1e9
        self.limit.reschedule(asyncio.get_running_loop().time() + left_s)

    async def _closed(self, stream: _Stream) -> None:
        """Send the next request when the last one ended."""
        due_ns = self.begun_ns
        while request := self._next(due_ns):
            await self._send(stream, request)
            if self.cold and request.scheduled_ns == self.begun_ns:
                self.cold -= 1
                if not self.cold:
                    past_s = (time.perf_counter_ns() - self.begun_ns) / 1e9
                    self._warm_after(max(past_s, self.load.warmup_s))
            failed = request.exchange.error or request.exchange.status != _OK
            if failed and self._more():
                await asyncio.sleep(PAUSE_S)
            due_ns = time.perf_counter_ns()

    async def _open(self, streams: list[_Stream], group: asyncio.TaskGroup) -> None:
        """Send each request when it is due, or as soon after that as a stream is free."""
        idle = streams[::-1]

        async def serve(stream: _Stream, request: _Request) -> None:
            await self._send(stream, request)
            while self.waiting:
                await self._send(stream, self.waiting.popleft())
            idle.append(stream)  # the one used last goes first, while its connection is warm

        for due_s in schedule(self.load):
            due_ns = self.begun_ns + round(due_s * 1e9)
            await asyncio.sleep((due_ns - time.perf_counter_ns()) / 1e9)
            request = self._next(due_ns)
            if request is None:
                return
            if idle:
                group.create_task(serve(idle.pop(), request))
            else:
                self.waiting.append(request)

    def _next(self, due_ns: int) -> _Request | None:
        """Return the next request, if there is to be one."""
        if not self._more():
            return None
        self.number += 1
        return _Request(self.number - 1, due_ns)

    def _more(self) -> bool:
        return self.load.requests is None or self.number < self.load.requests

    async def _send(self, stream: _Stream, request: _Request) -> None:
        """Send a request over a stream; whatever becomes of it is recorded."""
        request.client = stream.client
        body = self._body(stream, request)
        self.in_flight.add(request)
        try:
            await self._carry(stream, body, request)
            request.cut = len(request.exchange.pieces) == request.exchange.pieces_most
            if self.load.prompts == "turns":
                request.answer = await _parse(request.exchange)
                stream.hear(request.answer)
        except asyncio.CancelledError:
            request.cut = True
            raise
        finally:
            request.exchange.end_ns = request.exchange.end_ns or time.perf_counter_ns()
            self.in_flight.remove(request)
            self.events += len(request.exchange.pieces)
            self.ended.put_nowait(request)

    async def _carry(self, stream: _Stream, body: bytes, request: _Request) -> None:
        """Send it, on a connection that is there already if the server still has that."""
        while True:
            try:
                connection = await self._connect(stream)
            except OSError as error:
                refused = isinstance(error, ConnectionRefusedError)
                request.exchange.error = "refused" if refused else "connect", str(error)
                return
            await connection.carry(
                body, request.exchange, stall_s=self.load.stall_s, limit_s=self.load.limit_s
            )
            failure = request.exchange.error
            lost = failure and failure[0] == "broken" and request.exchange.headers_ns is None
            if not lost or connection.used == 1:
                return
            # The server closed an idle connection just then, which is its right.
            request.exchange = Exchange(pieces_most=request.exchange.pieces_most)
            request.reconnected = True

    async def _connect(self, stream: _Stream) -> Connection:
        """Return the stream's connection, a new one where needed. Raises OSError."""
        if stream.connection and stream.connection.fresh:
            return stream.connection
        if stream.connection:
            stream.connection.close()
        stream.connection = await Connection.to(self.endpoint, self.clock)
        return stream.connection

    def _body(self, stream: _Stream, request: _Request) -> bytes:
        """Return the bytes of a request; the seed and its number fix its lengths."""
        load, chance = self.load, random.Random(f"{self.load.seed}/{request.number}")
        if self.quiz:
            hung_up = load.hang_up > 0 and request.number % load.hang_up == load.hang_up - 1
            request.exchange.pieces_most = HUNG_UP_PIECES if hung_up else None
            request.question = self.quiz.question(request.number)
            asked = self.quiz.body(request.question, hung_up=hung_up)
        else:
            text = self.vocabulary.text(load.prompt.draw(chance) - load.shared, after=self.prefix)
            asked = {
                "messages": stream.say(text, turns=load.turns),
                "max_tokens": load.output.draw(chance),
                "ignore_eos": load.ignore_eos,
            }
        body = json.dumps(
            {
                **asked,
                "timings_per_token": load.timings_per_token,
                "stream": True,
                "stream_options": {"include_usage": True},
                "seed": chance.getrandbits(31),
            }
        )
        return f"{self.head}{len(body)}\r\n\r\n{body}".encode()

    async def _sample(self) -> None:
        """Watch the event loop, the clock and the progress; bring the end forward if told to."""
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        for tick in itertools.count(1):
            due_s = begun_s + tick * TICK_S
            await asyncio.sleep(due_s - loop.time())
            self.lags_ns.append(round((loop.time() - due_s) * 1e9))
            self.clock.sample()
            if self.watch and tick % WATCH_TICKS == 0:
                stop = True  # where it fails, too
                try:
                    stop = bool(self.watch(self._snapshot()))
                finally:
                    if stop:
                        with contextlib.suppress(RuntimeError):  # it is ending just now
                            self.limit.reschedule(loop.time())

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            elapsed_s=(time.perf_counter_ns() - self.begun_ns) / 1e9,
            streams=len(self.in_flight),
            finished=self.finished,
            events=self.events + sum(len(each.exchange.pieces) for each in self.in_flight),
            errors=dict(self.errors),
            ttft_ms=self.ttft_ms,
            wrong=self.wrong,
        )

    async def _digest(self) -> None:
        """Make records of what ended, a little at a time, so that nothing waits for it long."""
        while request := await self.ended.get():
            answer = request.answer or await _parse(request.exchange)
            record = _record(request, answer, self.quiz)
            self.records.append(record)
            self.wrong += record.wrong or 0
            if record.error:
                self.errors[record.error] += 1
            elif not record.cut:
                self.finished += 1
                self.ttft_ms = (record.reads[0].at_ns - record.sent_ns) / 1e6
            if self.tap:
                self.tap(record, request.exchange)
            await asyncio.sleep(0)


async def _parse(exchange: Exchange) -> sse.Answer:
    """Parse a body in slices of less than a millisecond."""
    parser = sse.Parser()
    for number, (at_ns, piece) in enumerate(exchange.pieces, 1):
        parser.feed(at_ns, piece)
        if number % _SLICE == 0:
            await asyncio.sleep(0)
    return parser.answer()


def _record(request: _Request, answer: sse.Answer, quiz: Quiz | None) -> Record:
    exchange, wrong = request.exchange, None
    error, detail = (None, "") if request.cut else _failure(exchange, answer)
    if quiz and request.question and not request.cut and error is None:
        detail = quiz.wrong(request.question, answer) or ""
        wrong = bool(detail)
    return Record(
        client=request.client,
        number=request.number,
        scheduled_ns=request.scheduled_ns,
        sent_ns=exchange.sent_ns or exchange.end_ns,
        headers_ns=exchange.headers_ns,
        answer_ns=answer.answer_ns,
        end_ns=exchange.end_ns,
        reads=answer.reads,
        exact=answer.exact,
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        output_tokens=answer.output_tokens,
        timings=answer.timings,
        finish=answer.finish,
        error=error,
        detail=detail,
        wrong=wrong,
        reconnected=request.reconnected,
        kernel=exchange.kernel and bool(answer.reads),
        cut=request.cut,
    )


def _failure(exchange: Exchange, answer: sse.Answer) -> tuple[str | None, str]:
    """Return the class of a failure and its particulars; None and nothing for a whole answer."""
    if exchange.error and answer.error != "event":
        return exchange.error
    if exchange.status != _OK:
        body = b"".join(piece for _, piece in exchange.pieces)[:300].decode(errors="replace")
        return _STATUSES.get(exchange.status, "http"), f"HTTP {exchange.status}: {body}"
    return answer.error, answer.detail
