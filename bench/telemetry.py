"""What GPU, server and client do while a load runs, on the generator's clock.

A process of its own samples, so that nothing of it runs in the generator's. A figure that NVML,
the server or /proc lacks is None or absent, never 0.
"""

import bisect
import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from statistics import fmean
from typing import NamedTuple, Self

import httpx

from stack import client, gpu
from stack.config import Service
from stack.errors import StackError
from stack.gpu import Reading
from stack.host import Process, busy_s, children
from stack.server import Server
from stack.wait import WaitTimeoutError, wait_until

GPU_HERTZ = 10
HERTZ = 2
PREDICTED = "tokens_predicted_total"
PROMPT = "prompt_tokens_total"
DECODES = "n_decode_total"
PROCESSING = "requests_processing"
DEFERRED = "requests_deferred"
_KEPT = (PREDICTED, PROMPT, DECODES, PROCESSING, DEFERRED)
_THROTTLED = 0.05  # of the readings; one moment of a power limit is not a throttled run
_PATIENCE_S = 30
_IDLE_S = 60


class Sample(NamedTuple):
    """The server's counters and gauges (`/metrics`), and what both sides' processes use."""

    at_ns: int
    metrics: Mapping[str, float]
    server_cpu_s: float | None
    server_mib: float | None
    client_cpu_s: float | None
    client_mib: float | None
    busy_cpu_s: float | None = None
    """Of this machine, all that ran, and what a hypervisor took."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """What was sampled between two moments. `throttled`: reason to share of the readings."""

    energy_j: float | None = None
    power_w: float | None = None
    sm_mhz: float | None = None
    sm_lowest_mhz: float | None = None
    utilisation_percent: float | None = None
    vram_mib: float | None = None
    """The highest."""
    throttled: Mapping[str, float] = field(default_factory=dict)
    deferred: float | None = None
    deferred_most: float | None = None
    processing_most: float | None = None
    server_cores: float | None = None
    """CPU time over time."""
    client_cores: float | None = None
    other_cores: float | None = None
    """What else ran on this machine, where the server's processes are known."""
    server_mib: float | None = None
    """Resident memory, the highest."""
    client_mib: float | None = None

    @property
    def throttle_reasons(self) -> tuple[str, ...]:
        """Those that held for more than 1 in 20 readings."""
        return tuple(why for why, share in self.throttled.items() if share > _THROTTLED)


class Telemetry:
    """Samples from just before its block to just after. `readings` are NVML's of one GPU.

    `failure` says why sampling ended early, if it did; `cores` is what it took itself.
    """

    def __init__(self, server: Server, *, uuid: str | None = None, hertz: float = HERTZ) -> None:
        """Prepare; nothing is started or asked yet. `uuid` names the GPU, if there is one."""
        self.samples: list[Sample] = []
        self.readings: list[Reading] = []
        self.failure: str | None = None
        self.cores: float | None = None
        self._asked = False
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        task = _Task(
            service=server.service,
            url=server.url,
            key=server.key,
            processes=server.processes,
            client=os.getpid(),
            uuid=uuid,
            hertz=hertz,
        )
        self._process = context.Process(target=_serve, args=(theirs, task), daemon=True)
        self._theirs = theirs

    def __enter__(self) -> Self:
        """Wait for the first sample."""
        self._process.start()
        self._theirs.close()
        self.update()
        return self

    def __exit__(self, *_: object) -> None:
        """Take what there is and end the sampler."""
        with contextlib.suppress(OSError):
            self._pipe.send("end")
            while self._pipe.poll(_PATIENCE_S) and self._take():
                pass
        self._pipe.close()
        self._process.join(1)
        self._process.kill()
        self._process.join()

    @property
    def latest(self) -> tuple[Sample | None, Reading | None]:
        """The newest of each that has come; never waits."""
        if self._asked and self._pipe.poll():
            self._take()
        self._ask()
        sample = self.samples[-1] if self.samples else None
        return sample, self.readings[-1] if self.readings else None

    def update(self, until_ns: int = 0) -> None:
        """Wait for the GPU's readings up to a moment, and for the samples up to now."""

        def enough() -> bool | None:
            self._ask()
            if self.failure is None and self._pipe.poll(_PATIENCE_S):
                self._take()
            last_ns = self.readings[-1].time_s * 1e9 if self.readings else math.inf
            return self.failure is not None or last_ns >= until_ns or None

        with contextlib.suppress(WaitTimeoutError):
            for _ in range(2):  # the first answer may be to an earlier question
                wait_until(enough, timeout_s=_PATIENCE_S, what="no readings", interval_s=0.1)

    def span(self, begin_ns: int, end_ns: int) -> Span:
        """Sum up what was sampled between two moments of `perf_counter_ns`."""
        inside = [each for each in self.samples if begin_ns <= each.at_ns <= end_ns]
        begin_s, end_s = begin_ns / 1e9, end_ns / 1e9
        read = [each for each in self.readings if begin_s <= each.time_s <= end_s]
        clocks = _known(each.sm_mhz for each in read)
        told = [each.throttle for each in read if each.throttle is not None]
        reasons = Counter(why for each in told for why in each)
        server, own, busy = (
            _cores(inside, used)
            for used in (lambda s: s.server_cpu_s, lambda s: s.client_cpu_s, lambda s: s.busy_cpu_s)
        )
        deferred = [s.metrics[DEFERRED] for s in inside if DEFERRED in s.metrics]
        return Span(
            energy_j=energy(self.readings, begin_s, end_s),
            power_w=_mean(each.power_w for each in read),
            sm_mhz=_mean(clocks),
            sm_lowest_mhz=min(clocks, default=None),
            utilisation_percent=_mean(each.utilisation_percent for each in read),
            vram_mib=max(_known(each.used_mib for each in read), default=None),
            throttled={why: count / len(told) for why, count in reasons.items()},
            deferred=_mean(deferred),
            deferred_most=max(deferred, default=None),
            processing_most=max(
                (s.metrics[PROCESSING] for s in inside if PROCESSING in s.metrics), default=None
            ),
            server_cores=server,
            client_cores=own,
            other_cores=None
            if busy is None or server is None or own is None
            else max(0.0, busy - server - own),
            server_mib=max(_known(each.server_mib for each in inside), default=None),
            client_mib=max(_known(each.client_mib for each in inside), default=None),
        )

    def series(self, begin_ns: int, end_ns: int) -> dict[str, tuple[tuple[float, float], ...]]:
        """Return what was sampled as (seconds since `begin_ns`, value), by name."""
        points: dict[str, list[tuple[float, float]]] = {}
        for reading in self.readings:
            at_s = reading.time_s - begin_ns / 1e9
            if 0 <= at_s <= (end_ns - begin_ns) / 1e9:
                for name in ("power_w", "sm_mhz", "used_mib", "utilisation_percent"):
                    if (value := getattr(reading, name)) is not None:
                        points.setdefault(name, []).append((at_s, value))
        for sample in self.samples:
            if begin_ns <= sample.at_ns <= end_ns:
                for name, short in ((DEFERRED, "deferred"), (PROCESSING, "processing")):
                    if name in sample.metrics:
                        pair = ((sample.at_ns - begin_ns) / 1e9, sample.metrics[name])
                        points.setdefault(short, []).append(pair)
        return {name: tuple(pairs) for name, pairs in points.items()}

    def _ask(self) -> None:
        if not self._asked:
            with contextlib.suppress(OSError):
                self._pipe.send("more")
                self._asked = True

    def _take(self) -> bool:
        """Receive one answer; return whether more may come."""
        self._asked = False
        try:
            answer: _Answer = self._pipe.recv()
        except (EOFError, OSError):
            self.failure = self.failure or "the sampler ended"
            return False
        self.samples += answer.samples
        self.readings += answer.readings
        self.failure, self.cores = answer.failure, answer.cores
        return not answer.last


def counters(server: Server) -> dict[str, float]:
    """Return `/metrics` once no request is under way or waits; nothing where there are none.

    The server notices a client that has gone at its next token, or ping. It is asked for a minute.
    """
    with client.session(server) as session:

        def idle() -> dict[str, float] | None:
            now = client.metrics(session)
            return None if now.get(PROCESSING) or now.get(DEFERRED) else now

        with contextlib.suppress(WaitTimeoutError, httpx.HTTPError, ValueError):
            return wait_until(idle, timeout_s=_IDLE_S, what="the server is not idle")
    return {}


def energy(readings: Sequence[Reading], begin_s: float, end_s: float) -> float | None:
    """Return the joules between two moments: the driver's counter, else power over time.

    None where NVML tells neither, or the readings do not enclose the span.
    """
    counted = [(r.time_s, r.energy_j) for r in readings if r.energy_j is not None]
    if _enclose(counted, begin_s, end_s):
        return _at(counted, end_s) - _at(counted, begin_s)
    power = [(r.time_s, r.power_w) for r in readings if r.power_w is not None]
    if not _enclose(power, begin_s, end_s):
        return None
    inner = [pair for pair in power if begin_s < pair[0] < end_s]
    line = [(begin_s, _at(power, begin_s)), *inner, (end_s, _at(power, end_s))]
    return sum((t2 - t1) * (w1 + w2) / 2 for (t1, w1), (t2, w2) in itertools.pairwise(line))


def _enclose(line: Sequence[tuple[float, float]], begin: float, end: float) -> bool:
    return len(line) > 1 and line[0][0] <= begin < end <= line[-1][0]


def _at(line: Sequence[tuple[float, float]], x: float) -> float:
    """Return the value of a polyline at `x`, which it encloses."""
    i = min(max(1, bisect.bisect_left(line, (x,))), len(line) - 1)
    (x1, y1), (x2, y2) = line[i - 1], line[i]
    return y1 + (y2 - y1) * (x - x1) / (x2 - x1)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return fmean(known) if known else None


def _cores(samples: Sequence[Sample], cpu_s: Callable[[Sample], float | None]) -> float | None:
    told = [(each.at_ns, used) for each in samples if (used := cpu_s(each)) is not None]
    if len(told) < 2:
        return None
    (begin_ns, first), (end_ns, last) = told[0], told[-1]
    return (last - first) / (end_ns - begin_ns) * 1e9


@dataclass(frozen=True, kw_only=True)
class _Task:
    service: Service
    url: str
    key: str
    processes: tuple[Process, ...]
    client: int
    uuid: str | None
    hertz: float


@dataclass(frozen=True, kw_only=True)
class _Answer:
    samples: list[Sample]
    readings: tuple[Reading, ...]
    failure: str | None
    cores: float | None
    last: bool


def _serve(pipe: Connection, task: _Task) -> None:
    """Sample until told to end, or until the other side is gone; answer when asked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    start, sampler, failure = time.perf_counter(), None, None
    samples: list[Sample] = []
    told = 0

    def answer(*, last: bool) -> _Answer:
        nonlocal told, samples
        readings = sampler.readings[told:] if sampler else ()
        told += len(readings)
        fresh, samples = samples, []
        cores = time.process_time() / (time.perf_counter() - start)
        return _Answer(samples=fresh, readings=readings, failure=failure, cores=cores, last=last)

    server = Server(runtime="", service=task.service, url=task.url, key=task.key)
    with contextlib.suppress(EOFError, OSError), client.session(server, timeout_s=5) as session:
        try:
            with _sampler(task.uuid) as sampler:
                word, number = "", 0
                while word != "end":
                    samples.append(_sample(session, task))
                    number += 1
                    due_s = start + number / task.hertz
                    while word != "end" and pipe.poll(max(0.0, due_s - time.perf_counter())):
                        word = pipe.recv()
                        if word == "more":
                            pipe.send(answer(last=False))
                    number = max(number, int((time.perf_counter() - start) * task.hertz))
                samples.append(_sample(session, task))
        except StackError as error:
            failure = error.cause
        pipe.send(answer(last=True))


def _sampler(uuid: str | None) -> contextlib.AbstractContextManager[gpu.Sampler | None]:
    return gpu.Sampler(uuid, hertz=GPU_HERTZ) if uuid else contextlib.nullcontext()


def _sample(session: httpx.Client, task: _Task) -> Sample:
    told: dict[str, float] = {}
    with contextlib.suppress(httpx.HTTPError, ValueError):
        told = client.metrics(session)
    at_ns = time.perf_counter_ns()
    others = {os.getpid(), *(each.pid for each in task.processes)}  # a native server is our child
    own = {task.client, *children(task.client)} - others
    server_cpu_s, server_mib = _used(task.processes)
    client_cpu_s, client_mib = _used(filter(None, map(Process.of, own)))
    return Sample(
        at_ns=at_ns,
        metrics={name: told[name] for name in _KEPT if name in told},
        server_cpu_s=server_cpu_s,
        server_mib=server_mib,
        client_cpu_s=client_cpu_s,
        client_mib=client_mib,
        busy_cpu_s=busy_s(),
    )


def _used(processes: Iterable[Process]) -> tuple[float | None, float | None]:
    found = [usage for each in processes if (usage := each.usage())]
    if not found:
        return None, None
    return sum(each.cpu_s for each in found), sum(each.resident_mib for each in found)
