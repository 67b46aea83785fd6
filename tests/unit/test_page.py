from bench import page


def test_page_of_the_docs_is_the_one_that_the_evidence_makes() -> None:
    assert page.PAGE.read_text() == page.page()
