import itertools

import pytest

from stack import wait
from stack.wait import StalledError, WaitTimeoutError, wait_until


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(wait, "time", clock)
    return clock


def test_returns_what_was_awaited(clock: Clock) -> None:
    answers = iter([None, None, "there"])

    assert wait_until(lambda: next(answers), timeout_s=9, what="x", interval_s=1) == "there"
    assert clock.now == 2


def test_gives_up_at_the_limit_and_says_on_what(clock: Clock) -> None:
    with pytest.raises(WaitTimeoutError, match="glm-q8 not ready: not within 5 s"):
        wait_until(lambda: None, timeout_s=5, what="glm-q8 not ready", interval_s=1)

    assert clock.now == 5


def test_stalls_before_the_limit_when_nothing_moves(clock: Clock) -> None:
    with pytest.raises(StalledError, match="nothing moved for 3 s"):
        wait_until(
            lambda: None, timeout_s=60, what="x", interval_s=1, activity=lambda: 7, stall_s=3
        )

    assert clock.now == 3


def test_slow_but_moving_is_not_a_stall(clock: Clock) -> None:
    moves = itertools.count()

    with pytest.raises(WaitTimeoutError, match="not within"):
        wait_until(
            lambda: None,
            timeout_s=60,
            what="x",
            interval_s=1,
            activity=lambda: next(moves) // 2,
            stall_s=3,
        )

    assert clock.now == 60


def test_failure_of_the_condition_ends_the_wait_at_once(clock: Clock) -> None:
    def crashed() -> None:
        raise ValueError("exited (1)")

    with pytest.raises(ValueError, match=r"exited \(1\)"):
        wait_until(crashed, timeout_s=60, what="x")

    assert clock.now == 0
