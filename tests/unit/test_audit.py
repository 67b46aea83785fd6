"""Exceptions end, and have a reason. What is known comes from outside, in the checks."""

import datetime as dt
from pathlib import Path

import pytest

from tests import audit
from tests.audit import Excepted, Weakness

TODAY = dt.date(2026, 11, 25)
FOUND = Weakness("CVE-1", "left-pad", "1.0")


def excepted(days: int, *, package: str = "left-pad") -> Excepted:
    until = TODAY + dt.timedelta(days=days)
    return Excepted("CVE-1", package, until, "we call it with no string")


@pytest.mark.parametrize(
    ("exceptions", "says"),
    [
        ([], "left-pad 1.0: CVE-1"),
        ([excepted(-1)], "ended on 2026-11-24"),
        ([excepted(91)], "beyond 90 days"),
        ([excepted(5, package="right-pad")], "left-pad 1.0: CVE-1"),
    ],
    ids=["none", "ended", "endless", "another's"],
)
def test_weakness_is_told(exceptions: list[Excepted], says: str) -> None:
    (told,) = audit.judge([FOUND], exceptions, today=TODAY)

    assert says in told


@pytest.mark.parametrize("days", [0, 90])
def test_excepted_weakness_is_tolerated(days: int) -> None:
    assert audit.judge([FOUND], [excepted(days)], today=TODAY) == []


def test_exception_without_a_reason_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "advisories.yaml"
    file.write_text("- {id: CVE-1, package: left-pad, until: 2026-12-01, reason: later}\n")

    with pytest.raises(ValueError, match="needs a reason"):
        audit.exceptions(file)
