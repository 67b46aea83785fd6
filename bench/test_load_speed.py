"""What the load generator costs by itself: `nox -s bench`, and `scripts/bench-against COMMIT`."""

import json
import sys
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import calibration, sse, stats
from stack import host
from tests import workspace
from tests.unit import hand_made

EVENTS = 2000
STREAMS = 64


def chunk(number: int, delta: dict[str, str], **more: Any) -> bytes:
    choice = {"finish_reason": None, "index": 0, "delta": delta}
    body = {
        "choices": [choice],
        "created": 1764000000,
        "id": "chatcmpl-3Zk6mUlYtgGz3nJvUuUIpR5mQy4c9dXa",
        "model": "glm-4.7-flash-q4",
        "system_fingerprint": "b11312-0c1e57098",
        "object": "chat.completion.chunk",
        "timings": {"prompt_n": 128, "prompt_ms": 21.5, "predicted_n": number},
        **more,
    }
    return b"data: " + json.dumps(body).encode() + b"\n\n"


@pytest.fixture(scope="module")
def body() -> list[tuple[int, bytes]]:
    """An answer as it comes: one event a read."""
    pieces = [chunk(n, {"content": " word"}) for n in range(1, EVENTS + 1)]
    usage = {"completion_tokens": EVENTS, "prompt_tokens": 128}
    pieces += [chunk(EVENTS, {}, usage=usage), b"data: [DONE]\n\n"]
    return list(enumerate(pieces))


def test_parse(benchmark: BenchmarkFixture, body: list[tuple[int, bytes]]) -> None:
    answer = benchmark(sse.parse, body)

    assert sum(read.tokens for read in answer.reads) == EVENTS
    assert benchmark.stats
    benchmark.extra_info["us_an_event"] = benchmark.stats["min"] / EVENTS * 1e6


def test_spread(benchmark: BenchmarkFixture) -> None:
    chance = hand_made.rng(1)
    samples = [chance.random() for _ in range(100_000)]

    assert benchmark(stats.spread, samples).count == len(samples)


def test_generator(benchmark: BenchmarkFixture) -> None:
    """CPU an event, in `extra_info`: the time is that of the server, and says nothing."""
    found = benchmark.pedantic(
        calibration.calibrate, (STREAMS,), {"itl_ms": 20, "tokens": 128}, rounds=1
    )

    benchmark.extra_info["cpu_us_an_event"] = found.cpu_us
    benchmark.extra_info["receive_p99_ms"] = found.receive_p99_ms


def test_start(benchmark: BenchmarkFixture) -> None:
    """From the command to the first look at what it is asked to do, which it refuses."""

    def refused() -> None:
        argv = [sys.executable, "-m", "invoke", "bench", "--clients=none"]
        assert host.run(argv, cwd=workspace.ROOT).status == 2

    benchmark.pedantic(refused, rounds=5)
