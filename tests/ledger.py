"""Keeps what the checks tried, and what came of it: `docs/faults.md` is made of nothing else.

A run writes its rows below `.state`; with `--record` they replace its former ones in the record.
`python -m tests.ledger` makes the page of the record again.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from stack.wait import WaitTimeoutError
from tests.workspace import ROOT

RECORD = ROOT / "bench" / "results" / "faults.json"
PAGE = ROOT / "docs" / "faults.md"
HEAD = """\
# Faults and hostile inputs

Made by the checks themselves (`nox -s {sessions} -- --record`) from what they tried on servers of
the tiny model, engine {engine}. *Row* is the fault's number in our list of faults, if it has one;
*inputs* counts what was sent or done, over all targets. A check fails when what it finds differs
from what stands here, for the worse or for the better.

Outcomes of hostile requests: HTTP statuses; `died`, the server did; `cut`, the connection alone
did; `slow`, no answer after 5 s of the server's CPU time; `stuck`, nobody else was answered
meanwhile; `heavy`, it took over 2 GiB. Nothing of this kind is open to who has no key.
"""
OWN = {
    "hardening": "What the running container may do, read back from it",
    "gateway": "What the gateway keeps from the server",
}
"""Sessions with a table of their own."""
NOTICE = """\
Each check is run on something that is broken on purpose, and must fail for that reason: a server of
other settings, a container with one more right, a proxy that changes what is asked or answered, a
copy of the program with one line changed, a program that does nothing and says that all is well, a
fault that does not happen, a record with one figure changed.
"""
VERDICTS = (AssertionError, WaitTimeoutError, pytest.fail.Exception)
SAID = 160
"""Characters that are kept of what a check said."""


@dataclass
class Row:
    """One case on one target. `why` says, where the outcome is not the expected, what is known."""

    session: str
    row: str
    case: str
    expected: str
    target: str
    found: str = ""
    inputs: int = 0
    why: str = ""
    failed: bool = False


@dataclass(frozen=True, order=True)
class Caught:
    """What was broken on purpose, and what the check that must notice said."""

    session: str
    check: str
    broken: str
    said: str = field(compare=False)


@dataclass
class Ledger:
    """The rows of a session, and what its checks caught."""

    session: str
    rows: list[Row] = field(default_factory=list)
    caught: set[Caught] = field(default_factory=set)

    @contextmanager
    def trying(self, row: str, case: str, *, expected: str, target: object) -> Iterator[Row]:
        """Enter a case; its body fills in what was found, and fails by raising."""
        entry = Row(self.session, row, case, expected, str(target))
        self.rows.append(entry)
        try:
            yield entry
        except pytest.skip.Exception:
            self.rows.remove(entry)
            raise
        except BaseException as error:
            entry.failed = True
            entry.found = entry.found or str(error).strip().partition("\n")[0]
            raise

    @contextmanager
    def catching(self, check: Callable[..., object], broken: str, *, says: str) -> Iterator[None]:
        """Run a check, in the body, on what is broken: it must fail, and its words match `says`.

        Where no words are told, it must fail by an assertion, or by waiting in vain.
        """
        name = check.__name__.removeprefix("test_")
        try:
            yield
        except (Exception, BaseExceptionGroup, pytest.fail.Exception) as error:
            said = told(error)
            if not re.search(says, said) or not (says or isinstance(error, VERDICTS)):
                raise
            line = next(each for each in said.splitlines() if re.search(says, each))
            line = re.sub(r"/[\w/]*/pytest-\d+/[^/\s]+/", "", line.strip().removeprefix("assert "))
            self.caught.add(Caught(self.session, name, broken, line[:SAID]))
        else:
            raise AssertionError(f"{name} does not notice: {broken}")

    def write(self, folder: Path) -> None:
        """Write the rows of this run."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [asdict(each) for each in self.rows]
        (folder / f"{self.session}.cases.json").write_text(json.dumps(rows, indent=1) + "\n")

    def record(self, engine: str) -> None:
        """Put the rows in the place of the cases' former ones, and make the page anew.

        Raises ValueError where one failed: that is no record of what holds.
        """
        if failed := [each.case for each in self.rows if each.failed]:
            raise ValueError(f"not recorded, since these failed: {', '.join(failed)}")
        new = {(each.session, each.case, each.target) for each in self.rows}
        kept = [each for each in read() if (each.session, each.case, each.target) not in new]
        record = {
            "engine": engine,
            "rows": [asdict(each) for each in sorted([*kept, *self.rows], key=_order)],
            "caught": [asdict(each) for each in sorted(self.caught | set(read_caught()))],
        }
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        PAGE.write_text(page())


def told(error: BaseException) -> str:
    """Return all the words of an error, or of a group of them."""
    if isinstance(error, BaseExceptionGroup):
        return "\n".join(map(told, error.exceptions))
    return str(error) or type(error).__name__


def _order(row: Row) -> tuple[str, str, int, str, str]:
    return row.session, row.row[:1], int(row.row[1:] or 0), row.case, row.target


def read() -> list[Row]:
    """Return the recorded rows."""
    if not RECORD.exists():
        return []
    return [Row(**each) for each in json.loads(RECORD.read_text())["rows"]]


def read_caught() -> list[Caught]:
    """Return what is recorded of broken things that were caught."""
    if not RECORD.exists():
        return []
    return [Caught(**each) for each in json.loads(RECORD.read_text()).get("caught", [])]


def page() -> str:
    """Return `docs/faults.md`: what does not hold first."""
    rows = read()
    off = [each for each in rows if each.why]
    sessions = " ".join(dict.fromkeys(each.session for each in rows))
    engine = json.loads(RECORD.read_text())["engine"]
    holds = [each for each in rows if not each.why]
    parts = [
        HEAD.format(sessions=sessions, engine=engine),
        "## What does not hold\n",
        _table(off, why=True),
        "\n## What holds\n",
        _table([each for each in holds if each.session not in OWN], why=False),
    ]
    for session, title in OWN.items():
        if own := [each for each in holds if each.session == session]:
            parts += [f"\n## {title}\n", _table(own, why=False)]
    parts += [
        "\n## What the checks notice\n",
        NOTICE,
        _lines(
            ["Session", "Check", "Broken", "It says"],
            (
                [each.session, _sentence(each.check), each.broken, each.said]
                for each in read_caught()
            ),
        ),
    ]
    return "\n".join(parts) + "\n"


def _sentence(name: str) -> str:
    return name.replace("_", " ")


def _table(rows: Iterable[Row], *, why: bool) -> str:
    rows = list(rows)
    numbered = any(each.row for each in rows)
    head = ["Row"] * numbered + ["Case", "Expected", "Found", "Inputs"] + ["What is known"] * why
    lines = []
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for each in rows:
        cases.setdefault((each.row, each.case, each.expected), []).append(each)
    for (row, case, expected), same in cases.items():
        found = {each.found for each in same}
        told = [f"{each.target}: {each.found}" for each in same]
        inputs = f"{sum(each.inputs for each in same):,}"
        cells = [case, expected, found.pop() if len(found) == 1 else "; ".join(told), inputs]
        known = ["; ".join(dict.fromkeys(each.why for each in same))]
        lines.append([row] * numbered + cells + known * why)
    return _lines(head, lines)


def _lines(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
        for cells in (head, ["---"] * len(head), *rows)
    )


if __name__ == "__main__":
    PAGE.write_text(page())
