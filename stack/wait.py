"""Waiting on a condition, and failing on its opposite."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class WaitTimeoutError(Exception):
    """The time limit passed. `elapsed_s` is the limit, the text says what was awaited."""


class StalledError(WaitTimeoutError):
    """Nothing moved for the stall limit, though the time limit had not passed."""


def wait_until(
    ready: Callable[[], T | None],
    *,
    timeout_s: float,
    what: str,
    interval_s: float = 0.02,
    activity: Callable[[], object] | None = None,
    stall_s: float = float("inf"),
) -> T:
    """Poll `ready` until it returns something other than None, and return that.

    `ready` raises to fail at once. `activity` returns any value that changes while progress is
    made; a slow load that still moves is never given up before `timeout_s`.

    Raises:
        StalledError: `activity` returned the same value for `stall_s` seconds.
        WaitTimeoutError: `timeout_s` seconds passed.

    """
    start = moved = time.monotonic()
    last: object = None
    while (value := ready()) is None:
        now = time.monotonic()
        current = activity() if activity else now
        if current != last:
            last, moved = current, now
        if now - moved >= stall_s:
            raise StalledError(f"{what}: nothing moved for {stall_s:g} s")
        if now - start >= timeout_s:
            raise WaitTimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(interval_s)
    return value
