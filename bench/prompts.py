"""Prompts of an exact number of tokens, by the server's own tokenizer."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx

from stack.client import session
from stack.errors import Code, StackError
from stack.server import Server

_VOCABULARY = """
a I am as at be by do go he if in is it me my no of on or so to up us we all and any are arm art
ask bad bag bed big bit boy but buy can car cat cup cut day dog able area away baby back ball bank
base bird blue boat body book born both call came apple beach begin black bread bring brown build
chair child clean clear close cloud color animal answer autumn before bottle bridge bright circle
coffee corner cotton doctor dollar another balance because between brother captain central century
certain chapter climate although building business children complete continue distance interest
language mountain
"""
_WORDS = [f" {word}" for word in _VOCABULARY.split()]
_OPENER = "Note:"
_BLOCK = 64


class Spread(NamedTuple):
    """Token counts drawn evenly between two bounds, both included."""

    low: int
    high: int

    def draw(self, chance: random.Random) -> int:
        """Return one."""
        return chance.randint(self.low, self.high)


@dataclass(frozen=True)
class Vocabulary:
    """Words and their cost in tokens: a text of words in any order costs their sum.

    Its texts differ from one `Vocabulary` to the next, or the second of two runs would find the
    first one's prompts in the server's cache.
    """

    words: Sequence[tuple[str, int]]
    overhead: int
    """Tokens of a prompt beyond its words: the chat template, and the opening word."""
    chance: random.Random
    blocks: Sequence[str]
    """Texts of `_BLOCK` tokens, since drawing a long prompt word by word would hold up others."""

    @property
    def least(self) -> int:
        """The shortest prompt there can be."""
        return self.overhead + min(cost for _, cost in self.words)

    def text(self, tokens: int, *, after: str = "") -> str:
        """Return a text that makes a prompt of so many tokens, with the chat template.

        It is new from its first word on, or from `after` on, which comes first and whose tokens
        come on top. Raises ValueError for fewer than `least`.
        """
        return _OPENER + after + self.passage(tokens - self.overhead)

    def passage(self, tokens: int) -> str:
        """Return new words of so many tokens. Raises ValueError for fewer than the least word's."""
        blocks = max(0, tokens // _BLOCK - 1)
        first = _draw(self.words, tokens - blocks * _BLOCK, self.chance)
        return "".join((first, *self.chance.choices(self.blocks, k=blocks)))


def vocabulary(words: Sequence[tuple[str, int]], overhead: int) -> Vocabulary:
    """Make a vocabulary of words, each with a blank before it, and their costs."""
    chance = random.Random()
    blocks = [_draw(words, _BLOCK, chance) for _ in range(256)]
    return Vocabulary(words, overhead, chance, blocks)


def _draw(words: Sequence[tuple[str, int]], tokens: int, chance: random.Random) -> str:
    """Return words of so many tokens together. Raises ValueError where none are so short."""
    least = min(cost for _, cost in words)
    if tokens < least:
        raise ValueError(f"no text has {tokens} tokens: {least} is the least")
    drawn = []
    while tokens:
        word, cost = chance.choice(words)
        if cost != tokens and tokens - cost < least:
            fitting = [pair for pair in words if pair[1] == tokens or tokens - pair[1] >= least]
            word, cost = chance.choice(fitting)
        drawn.append(word)
        tokens -= cost
    return "".join(drawn)


def learn(server: Server) -> Vocabulary:
    """Ask a server what its tokenizer makes of our words, and what its chat template adds.

    Raises:
        StackError: VERIFY where it does not answer, or counts a text otherwise than its words.

    """
    try:
        with session(server) as client:
            text = "".join(_WORDS)
            told = _post(client, "/tokenize", content=text, with_pieces=True)["tokens"]
            words = _costs(piece["piece"] for piece in told)
            found = vocabulary(words, _count(client, _OPENER))
            wanted = found.least + 5 * _BLOCK
            counted = _count(client, found.text(wanted))
        if counted != wanted:
            raise ValueError(f"its tokenizer counts {counted} tokens in a text of {wanted}")
    except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
        raise StackError(
            f"{server.url} is no server to send prompts to: {error or type(error).__name__}.",
            "See `invoke status`; an attached server needs its --key-file.",
            Code.VERIFY,
        ) from error
    return found


def _costs(pieces: Iterable[str]) -> list[tuple[str, int]]:
    """Return each word with the number of pieces it was cut into."""
    words = []
    left = iter(pieces)
    for word in _WORDS:
        text, cost = "", 0
        while len(text) < len(word):
            text, cost = text + next(left), cost + 1
        if text != word:
            raise ValueError(f"its tokenizer joins words: {text!r}")
        words.append((word, cost))
    costs = {cost for _, cost in words}
    if not costs >= set(range(min(costs), 2 * min(costs))):
        raise ValueError("its tokenizer leaves gaps between the lengths of texts")
    return words


def _count(client: httpx.Client, content: str) -> int:
    """Return the tokens of a conversation of one message."""
    messages = [{"role": "user", "content": content}]
    prompt = _post(client, "/apply-template", messages=messages)["prompt"]
    told = _post(client, "/tokenize", content=prompt, add_special=True, parse_special=True)
    return len(told["tokens"])


def _post(client: httpx.Client, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    answer.raise_for_status()
    return answer.json()
