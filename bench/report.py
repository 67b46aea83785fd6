"""Makes one HTML page of a summary, with nothing to load from anywhere."""

from bench.results import Summary


def page(summary: Summary) -> str:
    """Return the page."""
    raise NotImplementedError
