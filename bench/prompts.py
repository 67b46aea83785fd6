"""Prompts of an exact number of tokens, by the server's own tokenizer."""

from typing import NamedTuple


class Spread(NamedTuple):
    """Token counts drawn evenly between two bounds, both included."""

    low: int
    high: int
