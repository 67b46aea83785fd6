"""Prints a table of what the last runs of each check found: python -m tests.summary FOLDER."""

import re
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET

from rich.console import Console
from rich.table import Table

OUTCOMES = ("passed", "failed", "skipped")


def outcome(case: ET.Element) -> str:
    """Return how a test case of a JUnit file ended."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def group(case: ET.Element) -> str:
    """Return the target of a case, `docker-tiny` of `test_x[docker-tiny-…]`, or nothing."""
    found = re.search(r"\[((docker|native|attached)-\w+)", case.get("name", ""))
    return found[1] if found else ""


def reason(case: ET.Element) -> str:
    """Return why a case was skipped."""
    skipped = case.find("skipped")
    text = skipped.get("message", "") if skipped is not None else ""
    return text.removeprefix("Skipped: ")


def main(folder: Path) -> None:
    """Print one row a check and target, with the reasons of its skips."""
    table = Table("check", "target", *OUTCOMES, "skipped because")
    total: Counter[str] = Counter()
    for file in sorted(folder.glob("*.xml"), key=lambda file: file.stat().st_mtime):
        cases = ET.parse(file).findall(".//testcase")  # noqa: S314  # pytest wrote it
        for target in dict.fromkeys(map(group, cases)):
            of_target = [case for case in cases if group(case) == target]
            counts = Counter(map(outcome, of_target))
            total += counts
            reasons = dict.fromkeys(filter(None, map(reason, of_target)))
            numbers = (str(counts[name] or "") for name in OUTCOMES)
            table.add_row(file.stem, target, *numbers, "; ".join(reasons))
    Console(width=160 if not sys.stdout.isatty() else None).print(table)
    print(", ".join(f"{total[name]} {name}" for name in OUTCOMES))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
