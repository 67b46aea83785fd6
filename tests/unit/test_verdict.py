from dataclasses import replace
from typing import Any

import pytest

from bench import verdict
from bench.stats import Spread, spread
from bench.verdict import Slo
from stack.errors import Code, StackError
from tests.unit import hand_made
from tests.unit.hand_made import CALIBRATION

VALID = hand_made.point()


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft=500,tpot=30", Slo(500, 30, 0.95)),
        (" tpot = 12.5 ", Slo(500, 12.5, 0.95)),
        ("ttft=2000,tpot=100,share=0.99", Slo(2000, 100, 0.99)),
    ],
)
def test_slo_is_read(text: str, slo: Slo) -> None:
    assert Slo.parse(text) == slo


@pytest.mark.parametrize(
    "text",
    [
        *("", "500", "ttft", "ttft=", "ttft=fast", "ttft=500;tpot=30", "e2e=3", "ttft=1=2"),
        *("ttft=0", "tpot=-1", "ttft=nan", "ttft=inf", "share=1", "share=0", "ttft=1,ttft=2"),
    ],
)
def test_slo_that_cannot_be_parsed_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(StackError, match="--slo ttft=500,tpot=30") as raised:
        Slo.parse(text)

    assert raised.value.code == Code.USAGE


@pytest.mark.parametrize(
    ("successes", "count", "expected"),
    [
        *((73, 73, "PASS"), (72, 72, "UNRESOLVED"), (0, 0, "UNRESOLVED")),
        *((900, 1000, "FAIL"), (947, 1000, "UNRESOLVED"), (965, 1000, "PASS"), (0, 2, "FAIL")),
    ],
)
def test_share_is_decided_by_its_interval(successes: int, count: int, expected: str) -> None:
    assert verdict.decide(successes, count, 0.95) == expected


@pytest.mark.parametrize("truth", [0.90, 0.99])
def test_decision_is_wrong_at_most_5_times_in_100(truth: float) -> None:
    rng = hand_made.rng(7)
    wrong = "PASS" if truth < 0.95 else "FAIL"

    def decide() -> str:
        return verdict.decide(sum(rng.random() < truth for _ in range(200)), 200, 0.95)

    assert sum(decide() == wrong for _ in range(500)) <= 25


def test_valid_run_has_no_fault() -> None:
    assert verdict.faults(VALID, CALIBRATION) == ()


def constant(value: float) -> Spread:
    return spread([value] * 1000)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"window_s": 0}, "no steady window: never 4 in flight"),
        ({"client_cpu": 0.81}, "the client was busy 81 %"),
        ({"coalesced": 0.06}, "6 % of the reads held several events"),
        ({"lag_p99": 5.1}, "event loop came back 5.1 ms late"),
        ({"lag_p99": 2.1, "kernel": 0}, "event loop came back 2.1 ms late"),
        ({"client_queue": constant(21)}, "requests were sent 21.0 ms after they were due"),
        ({"concurrency": 3.7}, "only 3.7 of 4 clients were in flight"),
        ({"little": 0.03}, "latencies leave out 3.0 % of the time in flight"),
        ({"usage_error": -0.03}, "tokens seen differ by -3.0 % from the server's usage"),
        ({"metrics_error": 0.03}, "tokens seen differ by +3.0 % from the server's /metrics"),
        ({"requests": 10}, "too few samples: 10 requests ended in 20.0 s, a median needs 11"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_run_is_invalid_when_it_says_so_itself(changes: dict[str, Any], reason: str) -> None:
    (fault,) = verdict.faults(replace(VALID, **changes), CALIBRATION)

    assert reason in fault


@pytest.mark.parametrize(
    "changes",
    [
        *({"client_cpu": 0.79}, {"coalesced": 0.05}, {"lag_p99": 2.9}, {"usage_error": 0.02}),
        *({"lag_p99": 1.9, "kernel": 0}, {"little": -0.019}, {"requests": 11}),
        {"client_queue": constant(19)},
    ],
    ids="-".join,
)
def test_run_within_every_limit_is_valid(changes: dict[str, Any]) -> None:
    assert verdict.faults(replace(VALID, **changes), CALIBRATION) == ()


def test_run_with_more_than_a_tenth_of_itl_as_error_is_invalid() -> None:
    (fault,) = verdict.faults(VALID, replace(CALIBRATION, receive_p99_ms=2.1))

    assert fault == "the client's error is 2.10 ms, the time between tokens 20.00 ms"


def test_run_with_a_client_that_failed_its_calibration_is_invalid() -> None:
    calibration = replace(CALIBRATION, reason="the client errs by 9 ms in TTFT (p99)")

    assert verdict.faults(VALID, calibration) == (calibration.reason,)


def test_run_that_was_not_calibrated_is_invalid() -> None:
    assert verdict.faults(VALID, None) == ("the client was not calibrated",)


def test_run_on_a_throttled_gpu_is_invalid() -> None:
    (fault,) = verdict.faults(VALID, CALIBRATION, throttled=["sw power cap"])

    assert fault == "the GPU was slowed down by sw power cap"


def test_overload_is_the_server_s_failure_and_no_fault_of_the_client() -> None:
    behind = replace(
        VALID, rate=10.0, due=200, backlog=(0, 100), client_queue=constant(900), concurrency=4
    )

    assert verdict.faults(behind, CALIBRATION) == ()
    assert verdict.judge([behind], Slo()).verdict == "FAIL"


@pytest.mark.parametrize("changes", [{"window_s": 0}, {"concurrency": 2}, {"requests": 9}])
def test_failures_of_the_server_do_not_make_the_client_invalid(changes: dict[str, Any]) -> None:
    failing = replace(VALID, failed=9, errors={"busy": 9}, first_error_s=3, **changes)

    assert verdict.faults(failing, CALIBRATION) == ()


def test_repeats_are_judged_together() -> None:
    assert verdict.judge([replace(VALID, requests=40, good=40)], Slo()).verdict == "UNRESOLVED"
    assert verdict.judge([replace(VALID, requests=40, good=40)] * 2, Slo()).verdict == "PASS"


def test_verdict_says_why() -> None:
    outcome = verdict.judge([replace(VALID, requests=1000, good=900)], Slo())

    assert outcome.reason == (
        "90.0 % of 1,000 requests had TTFT within 500 ms and TPOT within 30 ms"
        " (88.0 % to 91.7 %); 95 % should"
    )


def test_verdict_says_what_failed_and_when() -> None:
    died = replace(
        VALID, requests=100, good=60, failed=40, errors={"refused": 40}, first_error_s=12.34
    )

    outcome = verdict.judge([died], Slo())

    assert outcome.verdict == "FAIL"
    assert outcome.reason.endswith("; 40 failed (refused), the first 12.3 s into its run")


def test_nothing_ended_is_unresolved() -> None:
    outcome = verdict.judge([replace(VALID, requests=0, good=0)], Slo())

    assert (outcome.verdict, outcome.reason) == ("UNRESOLVED", "no request ended")


def test_knee_is_where_throughput_for_its_latency_is_highest() -> None:
    # A server of four slots, 100 ms a request: above four clients they only wait.
    sweep = [(n, min(n, 4) * 10, max(1, n / 4) * 0.1) for n in (1, 2, 4, 8, 16)]

    assert verdict.knee(sweep) == 4


def test_knee_that_was_not_reached_is_unknown() -> None:
    assert verdict.knee([(n, n * 10, 0.1) for n in (1, 2, 4)]) is None


def test_nothing_has_no_knee() -> None:
    assert verdict.knee([]) is None
