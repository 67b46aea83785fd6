from pathlib import Path

import pytest

from bench import page, report, results

LOAD_TESTS = sorted((page.ROOT / "bench" / "results").glob("loadtest-*"))


def test_page_of_the_docs_is_the_one_that_the_evidence_makes() -> None:
    assert page.PAGE.read_text() == page.page()


def test_table_of_load_tests_is_the_one_that_the_summaries_make() -> None:
    assert page.LOAD_PAGE.read_text() == page.load_page()
    assert page.SETTINGS_PAGE.read_text() == page.settings_page()


@pytest.mark.parametrize("folder", LOAD_TESTS, ids=lambda folder: folder.name)
def test_published_report_is_the_one_that_its_summary_makes(folder: Path) -> None:
    summary = results.read(folder / "summary.json")

    assert (folder / "report.html").read_text() == report.page(summary)
