"""Questions for the load test: each request asks another one, whose answer is known."""

import json
from dataclasses import dataclass
from functools import cached_property
from random import Random

from bench import answers, questions, sse
from bench.answers import Reply, Score
from bench.prompts import Spread
from bench.questions import Dialogue, Turn
from stack.config import Service

LINE_TOKENS = 8
LONG_TASK = "code of 8"
CODES = 8
LONG_SHARE = 0.5
"""Of the requests, those that look for a code in a text; the others are short."""
_HUNG_UP_TOKENS = 512


@dataclass(frozen=True)
class Quiz:
    """What to ask in a run. A seed and a request's number always make the same question."""

    exactly: bool
    """Whether an answer must be the known one to the letter, or have it in it."""
    tasks: tuple[str, ...]
    """Those that the model has all right by its record; where it has none, all that suit it."""
    limit: float | None
    """The share of wrong answers that the record allows: the upper ends of its 95 % intervals."""
    tokens: int
    """The most of an answer."""
    text: Spread
    """Tokens of the texts with codes in them, about."""
    shared: int = 0
    """Tokens of one such text for all requests, in place of those; 0 for none."""
    seed: int = 0

    @cached_property
    def _common(self) -> Dialogue:
        return self._codes(Random(self.seed), self.shared, CODES)

    def question(self, number: int) -> Dialogue:
        """Return the question of a request."""
        chance = Random(f"{self.seed}/{number}")
        if chance.random() < LONG_SHARE:
            if not self.shared:
                return self._codes(chance, self.text.draw(chance), 1)
            asked = self._common.turns
            text, _, first = asked[0].content.rpartition("\n")
            at = 2 * chance.randrange(len(asked) // 2)
            last = asked[at].content if at else first
            return Dialogue(LONG_TASK, (Turn("user", f"{text}\n{last}"), asked[at + 1]))
        make = questions.TASKS[chance.choice(self.tasks)]
        return questions.draw(make, chance, held_out=True)

    def _codes(self, chance: Random, tokens: int, asked: int) -> Dialogue:
        lines = max(CODES, tokens // LINE_TOKENS)  # no such text was ever trained on: too many
        return questions.codes(chance, count=CODES, lines=lines, questions=asked, task=LONG_TASK)

    def body(self, question: Dialogue, *, hung_up: bool) -> dict[str, object]:
        """Return a request; one that will be hung up on asks for a long answer."""
        body = {**answers.body_of(question), "max_tokens": self.tokens}
        if hung_up:
            body |= {"ignore_eos": True, "max_tokens": _HUNG_UP_TOKENS}
        return body

    def wrong(self, question: Dialogue, answer: sse.Answer) -> str | None:
        """Say what is wrong with an answer, or None where nothing is."""
        reply = Reply(question, said(answer))
        if reply.right if self.exactly else reply.sane:
            return None
        return f"{question.task}: said {_shown(reply.said)}, not {_shown(question.answer)}"


def said(answer: sse.Answer) -> Turn:
    """Return a streamed answer as a turn; a call whose arguments are no JSON has them as text."""
    call = None
    if len(answer.calls) == 1:
        ((name, arguments),) = answer.calls
        try:
            call = name, json.loads(arguments)
        except ValueError:
            call = name, {"": arguments}
    return Turn("assistant", answer.content, answer.reasoning, call)


def _shown(turn: Turn) -> str:
    return repr(turn.call or turn.content)[:200]


def _most_wrong(score: Score) -> float:
    return 1 - score.interval[0]


def of(service: Service, *, text: Spread, shared: int = 0, seed: int = 0) -> Quiz:
    """Return the quiz for a service's model."""
    recorded = answers.recorded(service)
    suit = answers.SHORT if answers.taught(service) else answers.SANE
    short = [task for task in suit if task != LONG_TASK]
    tasks = [task for task in short if task not in recorded or recorded[task].share == 1] or short
    limit = None
    if recorded:
        many = answers.together(recorded[task] for task in tasks)
        limit = LONG_SHARE * _most_wrong(recorded[LONG_TASK])
        limit += (1 - LONG_SHARE) * _most_wrong(many)
    return Quiz(
        exactly=answers.taught(service),
        tasks=tuple(tasks),
        limit=limit,
        tokens=answers.longest(service),
        text=text,
        shared=shared,
        seed=seed,
    )
