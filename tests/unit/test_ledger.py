import ast
from pathlib import Path

import pytest

from tests import hostile, ledger
from tests.ledger import Ledger

CHECKS = sorted((ledger.ROOT / "tests" / "checks").glob("test_*.py"))


def test_page_of_the_docs_is_the_one_that_the_record_makes() -> None:
    assert ledger.PAGE.read_text() == ledger.page()


@pytest.mark.parametrize("case", hostile.CASES, ids=lambda case: case.name)
def test_what_a_hostile_request_finds_is_in_the_record(case: hostile.Hostile) -> None:
    (found,) = {(row.found, row.why) for row in ledger.read() if row.case == case.name}

    assert found == (case.found, case.why)


def test_record_has_no_hostile_request_that_is_not_sent() -> None:
    sent = {case.name for case in hostile.CASES}

    tried = [row for row in ledger.read() if row.session == "requests"]
    assert {row.case for row in tried if row.row in {"R8", "R9", "R10"}} == sent


@pytest.mark.parametrize("case", hostile.CASES, ids=lambda case: case.name)
def test_unexpected_outcome_has_a_reason(case: hostile.Hostile) -> None:
    assert not case.unexpected or case.why


def test_case_that_raises_is_kept_as_failed_and_never_recorded(tmp_path: Path) -> None:
    kept = Ledger("x")
    with (
        pytest.raises(AssertionError),
        kept.trying("R1", "a case", expected="x", target="y"),
    ):
        raise AssertionError("it broke\nfor some reason")
    kept.write(tmp_path)

    assert (kept.rows[0].failed, kept.rows[0].found) == (True, "it broke")
    assert "it broke" in (tmp_path / "x.cases.json").read_text()
    with pytest.raises(ValueError, match="a case"):
        kept.record("engine")


def test_case_that_is_skipped_is_no_row() -> None:
    kept = Ledger("x")
    with pytest.raises(pytest.skip.Exception), kept.trying("", "a", expected="", target=""):
        pytest.skip("not here")
    assert kept.rows == []


@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_every_session_of_checks_notices_something_broken(path: Path) -> None:
    caught = [each for each in ledger.read_caught() if f"test_{each.session}" == path.stem]

    assert caught
    text = path.read_text()
    assert {each.check for each in caught if each.check not in text} == set()


@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_every_check_was_seen_to_fail_or_says_why_not(path: Path) -> None:
    session = path.stem.removeprefix("test_")
    caught = {f"test_{each.check}" for each in ledger.read_caught() if each.session == session}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            text = ast.unparse(node)
            breaks = "notice(" in text or "catching(" in text
            assert breaks + ("mark.unnoticed(" in text) + (node.name in caught) == 1, node.name


def check() -> None:
    """Stands for one of the checks."""


def test_broken_thing_that_fails_its_check_is_kept_with_what_was_said() -> None:
    kept = Ledger("x")
    with kept.catching(check, "a thing", says="two"):
        raise BaseExceptionGroup("all", [AssertionError("one\ntwo times")])

    assert [(each.check, each.said) for each in kept.caught] == [("check", "two times")]


def test_broken_thing_that_passes_its_check_is_an_error() -> None:
    with (
        pytest.raises(AssertionError, match="check does not notice: a thing"),
        Ledger("x").catching(check, "a thing", says=""),
    ):
        pass


def test_check_that_fails_for_another_reason_has_not_noticed() -> None:
    with pytest.raises(ValueError, match="off"), Ledger("x").catching(check, "a thing", says="on"):
        raise ValueError("off")
