"""Cutting the calls of a server into steps."""

import struct
from pathlib import Path

import pytest

from bench import timeline
from bench.timeline import Call

SAMPLER = "_Z19common_sampler_initPK11llama_modelR22common_params_sampling"
SAMPLE = "common_sampler_sample"
GRAPH = ("cudaGraphLaunch", 1.5, 1.6)


def trace(path: Path, names: list[str], records: list[tuple[int, int, int, int]]) -> Path:
    head = "".join(f"{name}\n" for name in names).encode().ljust(4096, b"\0")
    path.write_bytes(head + b"".join(struct.pack("<QIIQ", *each) for each in records) + bytes(24))
    return path


def step(at_ms: float, *calls: tuple[str, float, float]) -> list[Call]:
    fixed = (("llama_process", 0.0, 2.0), ("ggml_backend_sched_graph_compute_async", 1.0, 2.0))
    return [
        Call(name, round((at_ms + begun) * 1e6), round((at_ms + ended) * 1e6), 0)
        for name, begun, ended in (*fixed, *calls)
    ]


def samples(count: int) -> list[tuple[str, float, float]]:
    return [(SAMPLE, 5 + 0.5 * n, 5.25 + 0.5 * n) for n in range(count)]


def test_calls_are_read_in_the_order_of_their_beginnings(tmp_path: Path) -> None:
    path = trace(tmp_path / "t", ["llama_process", SAMPLER], [(20, 5, 1, 7), (10, 30, 0, 0)])

    assert timeline.calls(path) == [
        Call("llama_process", 10, 40, 0),
        Call("common_sampler_init", 20, 25, 7),
    ]


def test_parts_add_up_to_the_step() -> None:
    wait = ("llama_synchronize", 2, 5)
    found = [
        *step(0, wait, GRAPH, *samples(2)),
        *step(10, wait, GRAPH, *samples(2)),
        *step(20, *samples(2)),
        *step(30),
    ]

    first, second = timeline.steps(found, 2)

    assert first == second
    assert (first.streams, first.launches, first.replayed, first.begins) == (2, 1, True, False)
    assert first.whole == 10
    assert first.parts == pytest.approx(
        {"prepare": 1, "gpu": 4, "sample": 0.5, "rest": 4.5, "text": 0, "state": 0, "begin": 0}
    )


def test_step_after_a_new_sampler_is_one_in_which_a_request_begins() -> None:
    found = [
        *step(0, *samples(1), ("common_sampler_init", 7, 8)),
        *step(10, *samples(1)),
        *step(20, *samples(1)),
        *step(30),
    ]

    row = timeline.summary(timeline.steps(found, 1), 1)

    assert (row.decode.steps, row.begin.steps, row.other.steps) == (1, 1, 0)
    assert row.decode.parts_ms["begin"] == 1


def test_only_steps_between_the_first_and_last_full_one_count() -> None:
    counts = (1, 2, 1, 2, 1)
    found = [call for n, count in enumerate(counts) for call in step(10 * n, *samples(count))]

    assert [each.streams for each in timeline.steps([*found, *step(50)], 2)] == [2, 1]
    assert timeline.steps(found, 3) == []
