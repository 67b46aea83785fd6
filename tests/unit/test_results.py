import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench import results
from bench.analysis import Point
from bench.ceiling import Ceiling, Single, Streams
from bench.results import Change, Summary
from bench.stats import Spread, spread
from bench.telemetry import Span
from stack.errors import Code, StackError
from tests.unit import hand_made

POINT = hand_made.point()
NOISE = 0.01
"""Of a run's median, between runs."""


@pytest.fixture
def whole() -> Summary:
    """Return a summary in which every optional part is there."""
    streams = Streams(streams=4, prefill_tokens_s=5000, decode_tokens_s=250, whole_tokens_s=240)
    made = hand_made.summary([POINT, replace(POINT, ttft=spread([1.0] * 20, failures=20))])
    measured = replace(
        made.measurements[0],
        span=Span(power_w=300.5, throttled={"sw power cap": 0.25}),
        joules_token=1.5,
        series={"power_w": ((0.0, 299.0), (0.1, 301.25))},
    )
    return replace(
        made,
        measurements=(measured, made.measurements[1]),
        interrupted="Ctrl-C",
        ceiling=Ceiling(
            prompt_tokens=48,
            output_tokens=41,
            repeats=3,
            single=Single(
                prefill_tokens_s=900, prefill_deviation=1, decode_tokens_s=70, decode_deviation=0.5
            ),
            streams=(streams,),
        ),
    )


def test_summary_is_read_as_it_was_written(whole: Summary, tmp_path: Path) -> None:
    results.write(whole, tmp_path / "one.json")
    again = results.read(tmp_path / "one.json")
    results.write(again, tmp_path / "two.json")

    assert again.measurements[1].point.ttft.tail["p50"] == 1
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


def test_infinite_tail_survives_strict_json(tmp_path: Path) -> None:
    point = replace(POINT, ttft=spread([1.0] * 10, failures=20))
    results.write(hand_made.summary([point]), tmp_path / "x.json")

    json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert results.read(tmp_path / "x.json").measurements[0].point.ttft.tail["p50"] == math.inf


def test_summary_keeps_every_field_of_a_point(tmp_path: Path) -> None:
    results.write(hand_made.summary([POINT]), tmp_path / "x.json")
    (again,) = results.read(tmp_path / "x.json").measurements

    assert asdict(again.point).keys() == asdict(POINT).keys()


def _changed(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"schema": 0}, "has schema 0, this version writes and reads 2"),
        ({"extra": 1}, r"other fields: \['extra'\]"),
        ({"at": 5}, "5 is no str"),
        ({"slo": {"ttft_ms": 1}}, "Slo has other fields"),
        ({"measurements": [None]}, "Measurement has other fields"),
    ],
)
def test_file_that_is_no_summary_is_refused(
    tmp_path: Path, changes: dict[str, Any], cause: str
) -> None:
    path = tmp_path / "x.json"
    results.write(hand_made.summary([POINT]), path)
    _changed(path, **changes)

    with pytest.raises(StackError, match=cause) as raised:
        results.read(path)
    assert raised.value.code == Code.USAGE


def test_summary_from_before_answers_were_checked_is_read(tmp_path: Path) -> None:
    made = hand_made.summary([POINT])
    results.write(made, tmp_path / "new.json")
    old = json.loads((tmp_path / "new.json").read_text()) | {"schema": 1}
    del old["wrong_limit"]
    for each in old["measurements"]:
        del each["point"]["wrong"]
    (tmp_path / "old.json").write_text(json.dumps(old))

    read = results.read(tmp_path / "old.json")

    assert read == results.read(tmp_path / "new.json")
    assert {each.verdict for each in results.compare(read, read)} == {"unresolved"}


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", "null"])
def test_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)

    with pytest.raises(StackError, match="is no summary of a load test") as raised:
        results.read(tmp_path / "x.json")
    assert raised.value.code == Code.USAGE


def test_absent_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="could not be read") as raised:
        results.read(tmp_path / "x.json")
    assert raised.value.code == Code.USAGE


def test_unwritable_output_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StackError, match="could not be written") as raised:
        results.write(hand_made.summary([POINT]), tmp_path / "file" / "x.json")
    assert raised.value.code == Code.DISK
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def scaled(values: Spread, factor: float) -> Spread:
    found = {name: each and each * factor for name, each in values.percentiles.items()}
    return replace(values, percentiles=found)


def measured(seed: int, *, slower: float = 1) -> Summary:
    """Return three repeats of a server, each with its run's noise, and so much slower."""
    rng = hand_made.rng(seed)

    def repeat() -> Point:
        factor = slower * rng.lognormvariate(0, NOISE)
        times: dict[str, Any] = {
            name: scaled(getattr(POINT, name), factor) for name in ("ttft", "itl", "tpot", "e2e")
        }
        return replace(POINT, tokens_s=POINT.tokens_s / factor, **times)

    return hand_made.summary([repeat() for _ in range(3)])


def worse(new: Summary, old: Summary) -> list[Change]:
    return [each for each in results.compare(new, old) if each.verdict == "worse"]


def test_comparison_of_a_server_with_itself_passes_95_times_in_100() -> None:
    failed = [seed for seed in range(500) if worse(measured(seed), measured(seed + 1000))]

    assert len(failed) <= 25


def test_slowdown_of_a_tenth_is_caught_95_times_in_100() -> None:
    caught = [
        seed for seed in range(500) if worse(measured(seed, slower=1.1), measured(seed + 1000))
    ]

    assert len(caught) >= 475


def test_slowdown_shows_in_every_metric_by_its_ratio() -> None:
    slow = replace(POINT, tokens_s=POINT.tokens_s / 2, ttft=scaled(POINT.ttft, 2))

    changes = results.compare(hand_made.summary([slow] * 2), hand_made.summary([POINT] * 2))

    found = {each.metric: (round(each.ratio.value, 9), each.verdict) for each in changes}
    assert found == {
        "output tokens/s": (0.5, "worse"),
        "TTFT p50": (2, "worse"),
        "ITL p50": (1, "same"),
        "ITL p99": (1, "same"),
        "TPOT p50": (1, "same"),
        "E2E p50": (1, "same"),
    }


def test_faster_is_better() -> None:
    fast = replace(POINT, tokens_s=POINT.tokens_s * 2)

    first, *_ = results.compare(hand_made.summary([fast] * 2), hand_made.summary([POINT] * 2))

    assert first.verdict == "better"


def test_one_repeat_resolves_nothing() -> None:
    slow = replace(POINT, tokens_s=1)

    changes = results.compare(hand_made.summary([slow]), hand_made.summary([POINT] * 3))

    assert {each.verdict for each in changes} == {"unresolved"}


def test_run_that_is_not_valid_resolves_nothing() -> None:
    slow = hand_made.summary([replace(POINT, tokens_s=1)] * 3)
    invalid = tuple(replace(each, faults=("throttled",)) for each in slow.measurements)

    changes = results.compare(replace(slow, measurements=invalid), hand_made.summary([POINT] * 3))

    assert {each.verdict for each in changes} == {"unresolved"}


def test_load_that_is_missing_resolves_nothing() -> None:
    other = replace(POINT, clients=8)

    changes = results.compare(hand_made.summary([other] * 3), hand_made.summary([POINT] * 3))

    assert {(each.load, each.verdict) for each in changes} == {("4 clients", "unresolved")}


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"provenance": replace(hand_made.PROVENANCE, host="Other CPU")}, "host is Other CPU"),
        ({"provenance": replace(hand_made.PROVENANCE, gpu=None)}, "gpu is None"),
        ({"provenance": replace(hand_made.PROVENANCE, model="other.gguf")}, "model is other.gguf"),
        ({"settings": {"prompt": [1, 1]}}, "output is None"),
    ],
    ids=["host", "gpu", "model", "settings"],
)
def test_baseline_of_something_else_is_refused(changes: dict[str, Any], cause: str) -> None:
    baseline = hand_made.summary([POINT])

    with pytest.raises(StackError, match=cause) as raised:
        results.compare(replace(baseline, **changes), baseline)
    assert raised.value.code == Code.USAGE


@pytest.mark.parametrize("name", ["driver", "engine", "runtime", "commit"])
def test_baseline_of_another_build_is_what_a_baseline_is_for(name: str) -> None:
    baseline = hand_made.summary([POINT] * 2)
    changes: dict[str, Any] = {name: "other"}
    new = replace(baseline, provenance=replace(hand_made.PROVENANCE, **changes))

    assert {each.verdict for each in results.compare(new, baseline)} == {"same"}


def test_baseline_from_a_file_compares_as_the_one_in_memory(tmp_path: Path) -> None:
    baseline = hand_made.summary([POINT] * 2, settings={"prompt": (32, 64), "rate": 1 / 3})
    results.write(baseline, tmp_path / "x.json")

    assert {e.verdict for e in results.compare(baseline, results.read(tmp_path / "x.json"))} == {
        "same"
    }
