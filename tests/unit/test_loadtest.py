"""A plan is refused where it makes no sense, and a load test's last line says what it should."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import board, ceiling, loadtest
from bench.ceiling import Ceiling, Single, Streams
from bench.generator import Load, Snapshot
from bench.loadtest import INTERRUPTED, Now, Plan
from bench.prompts import Spread
from bench.results import Change
from bench.stats import Interval
from bench.telemetry import Span
from bench.verdict import Slo
from stack import config
from stack.errors import Code, StackError
from tests.unit.hand_made import point, summary
from tests.workspace import ROOT

WORDS = {"clients": "1,4", "rate": "", "prompt": "96-160", "output": "128", "slo": "", "search": ""}
SLO = Slo(ttft_ms=500, tpot_ms=30)
WORSE = Change("4 clients", "output tokens/s", Interval(0.8, 0.7, 0.9), "worse")


def test_plan_of_a_command_line() -> None:
    plan = loadtest.parse(**{**WORDS, "slo": "ttft=400"}, seed=7)

    assert (plan.clients, plan.rates, plan.seed) == ((1, 4), (), 7)
    assert (plan.prompt, plan.output) == (Spread(96, 160), Spread(128, 128))
    assert plan.slo == Slo(ttft_ms=400)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ({"clients": "0"}, "--clients must be above 0, not 0"),
        ({"clients": "4,-1"}, "--clients must be above 0, not -1"),
        ({"clients": "4,,8"}, "no list of numbers"),
        ({"clients": "257"}, "257 clients are too many"),
        ({"rate": "nan"}, "--rate must be above 0"),
        ({"rate": "inf"}, "--rate must be above 0"),
        ({"duration_s": 0}, "--duration must be above 0"),
        ({"repeats": 0}, "--repeat must be above 0"),
        ({"prompt": "0"}, "--prompt must be above 0"),
        ({"output": "9-8"}, "--output 9-8 is empty"),
        ({"output": "1-2-3"}, "no list of numbers"),
        ({"prompts": "hot"}, "Prompts are cold, shared, turns, questions, not hot"),
        ({"rate": "1", "arrivals": "late"}, "Arrivals are closed, .*, not late"),
        ({"turns": 2, "prompts": "cold"}, "Several turns are for"),
        ({"prompt": "8000"}, "8,128 tokens do not fit in a slot's context of 4,096"),
        ({"slo": "soon"}, "no service level objective"),
    ],
)
def test_senseless_plan_is_refused(words: dict[str, Any], cause: str) -> None:
    with pytest.raises(StackError, match=cause) as caught:
        loadtest.parse(**{**WORDS, **words}).check(4096)

    assert caught.value.code == Code.USAGE
    assert "\n" not in caught.value.cause + caught.value.remedy


def test_each_run_has_its_seed_and_its_load() -> None:
    assert Plan(seed=5).load(4, 3) == Load(
        clients=4, seed=8, duration_s=30, warmup_s=3, prompt=Spread(96, 160)
    )
    opened = Plan(rates=(2.5,)).load(2.5, 0)
    assert (opened.arrivals, opened.rate) == ("poisson", 2.5)


def trying(limit: int) -> Iterator[int]:
    """Yield what a search for a limit tries."""
    search = loadtest.boundary(256)
    step = next(search)
    with contextlib.suppress(StopIteration):
        while True:
            yield step
            step = search.send(step <= limit)


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 16, 100, 255, 256, 1000])
def test_boundary_is_found_to_an_eighth(limit: int) -> None:
    tried = list(trying(limit))
    passed = max((step for step in tried if step <= limit), default=0)

    assert min(limit, 256) * 7 / 8 - 1 <= passed <= limit
    assert len(tried) == len(set(tried)) <= 16


def test_valid_and_nothing_failed() -> None:
    said = loadtest.conclude(summary([point()] * 2), Plan())

    assert str(said) == "VALID, PASS: 2 runs: no request failed"
    assert said.code == 0


@pytest.mark.parametrize(
    ("plan", "good", "verdict", "code"),
    [
        (Plan(slo=SLO), 1.0, "PASS", 0),
        (Plan(slo=SLO), 0.5, "FAIL", Code.MISSED),
        (Plan(slo=SLO), 0.95, "UNRESOLVED", 0),
        (Plan(), 0.5, "PASS", 0),
        (Plan(slo=SLO, search="goodput"), 1.0, "PASS", 0),
        (Plan(slo=SLO, search="goodput"), 0.5, "FAIL", Code.MISSED),
    ],
    ids=["met", "missed", "open", "no target", "goodput", "no goodput"],
)
def test_target(plan: Plan, good: float, verdict: str, code: int) -> None:
    one = replace(point(), requests=200, good=round(200 * good))

    said = loadtest.conclude(summary([one]), plan)

    assert (said.verdict, said.code, said.valid) == (verdict, code, True)


def test_failed_requests_fail_a_test_without_a_target() -> None:
    one = replace(point(), failed=3, errors={"busy": 3}, first_error_s=1.0)

    said = loadtest.conclude(summary([one]), Plan())

    assert (said.verdict, said.code) == ("FAIL", Code.VERIFY)
    assert said.reason == "3 requests failed: busy"


@pytest.mark.parametrize(
    ("wrong", "limit", "verdict"),
    [(0, 0.01, "PASS"), (1, 0.01, "PASS"), (9, 0.01, "FAIL"), (9, None, "PASS"), (9, 0.2, "PASS")],
)
def test_wrong_answers_fail_above_the_recorded_rate(
    wrong: int, limit: float | None, verdict: str
) -> None:
    one = replace(point(), requests=100, failed=0, wrong=wrong)

    said = loadtest.conclude(summary([one], wrong_limit=limit), Plan())

    assert said.verdict == verdict
    assert f"{wrong} of 100 answers are wrong" in said.reason or verdict == "PASS"
    assert said.code == (Code.VERIFY if verdict == "FAIL" else 0)


def test_wrong_answers_fail_a_test_that_is_not_valid() -> None:
    one = replace(point(), requests=100, failed=0, wrong=50)
    found = summary([one], wrong_limit=0.01)
    invalid = replace(found.measurements[0], faults=("the client was busy",))

    said = loadtest.conclude(replace(found, measurements=(invalid,)), Plan())

    assert (said.verdict, said.valid) == ("FAIL", False)


def test_what_is_not_valid_is_neither_passed_nor_failed() -> None:
    found = summary([point()])
    wrong = replace(found.measurements[0], faults=("the client was busy", "and more"))

    said = loadtest.conclude(replace(found, measurements=(wrong,)), Plan(slo=SLO), [WORSE])

    assert str(said) == "INVALID, UNRESOLVED: 4 clients: the client was busy (1 of 1 runs)"
    assert said.code == Code.VERIFY


def test_other_processes_are_named_where_a_run_is_not_valid() -> None:
    found = summary([point()])
    wrong = replace(found.measurements[0], faults=("late",), span=Span(other_cores=1.26))

    said = loadtest.conclude(replace(found, measurements=(wrong,)), Plan())

    assert said.reason == "4 clients: late (1 of 1 runs); other processes took up to 1.3 cores"


@pytest.mark.parametrize(
    ("why", "code"),
    [("glm-q4 ended (exit 1) 3.0 s into", Code.VERIFY), ("Ctrl-C, in", INTERRUPTED)],
)
def test_early_end_is_a_failure(why: str, code: int) -> None:
    said = loadtest.conclude(summary([point()], interrupted=why), Plan())

    assert (said.verdict, said.reason, said.code) == ("FAIL", why, code)


@pytest.mark.parametrize(
    ("verdict", "code"), [("worse", Code.MISSED), ("unresolved", 0), ("better", 0), ("same", 0)]
)
def test_baseline_gate(verdict: str, code: int) -> None:
    said = loadtest.conclude(summary([point()]), Plan(), [replace(WORSE, verdict=verdict)])

    expected = {"worse": "FAIL", "unresolved": "UNRESOLVED"}.get(verdict, "PASS")
    assert (said.verdict, said.code) == (expected, code)


def top(streams: int, **rates: float) -> Ceiling:
    nothing = Single(prefill_tokens_s=1, prefill_deviation=0, decode_tokens_s=1, decode_deviation=0)
    each = Streams(streams=streams, prefill_tokens_s=1, **rates)
    return Ceiling(prompt_tokens=1, output_tokens=1, repeats=1, single=nothing, streams=(each,))


def test_share_of_the_ceiling() -> None:
    """Four clients and 20 ms between tokens: 200 tokens/s decoded, fewer over the whole."""
    one = point()
    engine = top(4, decode_tokens_s=400, whole_tokens_s=300)

    found = ceiling.share(one, 4, engine)
    halved = ceiling.share(one, 2, engine)

    assert found
    assert halved
    assert found.whole == pytest.approx(one.tokens_s / 300)
    assert found.decode == pytest.approx(0.5, rel=0.01)
    assert halved.decode == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize("engine", [None, top(8, decode_tokens_s=1, whole_tokens_s=1)])
def test_no_share_without_a_ceiling_at_that_load(engine: Ceiling | None) -> None:
    assert ceiling.share(point(), 4, engine) is None


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StackError, match="Results cannot be written") as caught:
        loadtest.writable(tmp_path / "file" / "x")

    assert caught.value.code == Code.DISK


def test_folder_with_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").touch()

    with pytest.raises(StackError, match="another load test") as caught:
        loadtest.writable(tmp_path)

    assert caught.value.code == Code.USAGE


def test_settings_leave_out_which_loads_are_tried() -> None:
    plan = Plan(clients=(1,))

    assert loadtest.settings(plan) == loadtest.settings(replace(plan, clients=(2,), repeats=9))
    assert loadtest.settings(plan) != loadtest.settings(replace(plan, output=Spread(1, 2)))


def test_key_file_that_is_absent_is_refused(tmp_path: Path) -> None:
    service = config.load(ROOT).service("tiny")

    with pytest.raises(StackError, match="cannot be read") as caught:
        loadtest.attached(service, "http://127.0.0.1:1", tmp_path / "absent")

    assert caught.value.code == Code.USAGE


def test_table_has_a_row_for_each_run_and_fits_in_80_columns() -> None:
    found = summary([replace(point(), tokens_s=123456.7, goodput_s=1234.5)] * 2)
    console = Console(width=80, record=True)
    console.print(board.measured(found))

    lines = console.export_text().splitlines()
    assert len(lines) == 3
    assert "…" not in "".join(lines)


def test_live_table_tells_tokens_a_second_from_two_snapshots() -> None:
    first = Now("4 clients", 2, 9, Snapshot(1.0, 4, 3, 100, {}, 51.0))
    second = Now("4 clients", 2, 9, Snapshot(1.5, 4, 5, 350, {"busy": 2}, 53.0))
    console = Console(width=120, record=True)
    console.print(board.going(second, first))

    text = console.export_text()
    assert "run 2 of 9: 4 clients" in text
    assert " 500 " in text
    assert "2 busy" in text
