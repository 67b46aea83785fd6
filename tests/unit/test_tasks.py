import time

import pytest

from verbs.terminal import Shown


@pytest.fixture
def shown() -> Shown:
    """What was heard of ten seconds ago, a tenth done."""
    return Shown(begun=time.monotonic() - 10, before=1_000_000_000)


def test_steps_are_shown_as_a_share(shown: Shown) -> None:
    assert shown.amount(5, 10) == "50 %"
    assert shown.left(5, 10) == ""


def test_bytes_are_shown_with_rate_and_total(shown: Shown) -> None:
    assert shown.amount(3_000_000_000, 10_000_000_000) == "30 %, 3.00 of 10.00 GB, 200 MB/s"


def test_bytes_are_shown_with_the_time_left(shown: Shown) -> None:
    assert shown.left(3_000_000_000, 21_000_000_000) == ", 1:30 left"


def test_what_began_anew_promises_no_time(shown: Shown) -> None:
    assert shown.left(0, 21_000_000_000) == ""
