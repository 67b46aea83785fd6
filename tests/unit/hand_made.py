"""Records of a load test whose every figure is known, for the tests of what judges them.

Times are milliseconds here; a run begins at 0.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from bench import analysis
from bench.analysis import Point
from bench.calibration import Calibration
from bench.records import Read, Record, Run
from bench.results import Measurement, Provenance, Summary
from bench.verdict import Slo

MS = 1_000_000
CALIBRATION = Calibration(
    streams=4,
    itl_ms=20,
    events=6400,
    kernel=True,
    receive_p50_ms=0.003,
    receive_p99_ms=0.01,
    ttft_p99_ms=0.5,
    cpu_us=12,
    shared=0.0,
    lag_p99_ms=0.4,
)
PROVENANCE = Provenance(
    host="Some CPU, 8 cores",
    gpu="Some GPU",
    driver="580.1",
    engine="b11312 (0c1e57098)",
    model="model-stand-in.gguf",
    stand_in=True,
    runtime="native",
    server={"LLAMA_ARG_CTX_SIZE": "8192", "LLAMA_ARG_N_PARALLEL": "4"},
    client="own transport, asyncio",
    python="3.11.7",
    commit="abc1234",
)


def rng(seed: int) -> random.Random:
    """Return a source of the same numbers each time."""
    return random.Random(seed)


def record(
    gaps: Sequence[float],
    *,
    at: float = 0,
    tokens: Sequence[int] | None = None,
    tail: float = 0,
    **fields: Any,
) -> Record:
    """Return an answer sent at `at` whose reads come `gaps` after one another."""
    stamps = list(accumulate(gaps, initial=at))[1:]
    counts = tokens or [1] * len(stamps)
    reads = tuple(Read(int(t * MS), n, 1) for t, n in zip(stamps, counts, strict=True))
    whole: dict[str, Any] = {
        "client": 0,
        "number": 0,
        "scheduled_ns": int(at * MS),
        "sent_ns": int(at * MS),
        "answer_ns": reads[0].at_ns if reads else None,
        "end_ns": int((([at, *stamps])[-1] + tail) * MS),
        "reads": reads,
        "exact": True,
        "output_tokens": sum(counts) or None,
        "finish": "length",
        "kernel": True,
    }
    return Record(**(whole | fields))


def failure(error: str = "broken", *, at: float = 0, lasts: float = 10, **fields: Any) -> Record:
    """Return a request that failed without a token."""
    end_ns = int((at + lasts) * MS)
    return record([], at=at, error=error, end_ns=end_ns, finish=None, **fields)


def stream(gaps: Sequence[float], *, until: float, client: int = 0, at: float = 0) -> list[Record]:
    """Return the same answer over and over, each sent as the last ended, until time is up."""
    found: list[Record] = []
    while at < until:
        found.append(record(gaps, at=at, client=client, number=len(found)))
        at += sum(gaps)
    return [cut(each, until) if each.end_ns > until * MS else each for each in found]


def cut(answer: Record, at: float) -> Record:
    """Return what is seen of an answer when a run ends before it."""
    reads = tuple(read for read in answer.reads if read.at_ns <= at * MS)
    return replace(
        answer, reads=reads, end_ns=int(at * MS), cut=True, finish=None, output_tokens=None
    )


def run(records: Iterable[Record], *, ended: float, **fields: Any) -> Run:
    """Return a run of them, closed and with one client if nothing else is said."""
    whole: dict[str, Any] = {
        "arrivals": "closed",
        "clients": 1,
        "rate": None,
        "seed": 0,
        "begun_ns": 0,
        "warm_ns": 0,
        "ended_ns": int(ended * MS),
        "records": tuple(records),
        "cpu_s": 0.1 * ended / 1000,
    }
    return Run(**(whole | fields))


def analysed(records: Iterable[Record], *, ended: float, **fields: Any) -> Point:
    """Return what a run of them says."""
    return analysis.analyse(run(records, ended=ended, **fields), Slo())


def point(**changes: Any) -> Point:
    """Return the valid point of four clients that get a token every 20 ms, 200 ms after asking."""
    records = [r for n in range(4) for r in stream([200, *[20] * 40], until=20_000, client=n)]
    return replace(analysed(records, ended=20_000, clients=4), **changes)


def summary(points: Iterable[Point], **changes: Any) -> Summary:
    """Return the summary of a load test that had these points, all valid."""
    measurements = tuple(
        Measurement(point=each, repeat=n, faults=(), calibration=CALIBRATION, slots=4)
        for n, each in enumerate(points)
    )
    whole: dict[str, Any] = {
        "at": "2026-01-01T00:00:00Z",
        "provenance": PROVENANCE,
        "settings": {"prompt": [32, 64], "output": [41, 41], "seed": 0},
        "slo": Slo(),
        "measurements": measurements,
    }
    return Summary(**(whole | changes))
