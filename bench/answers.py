"""Asks a server questions with known answers, from many clients at once, and counts the right ones.

A wrong answer is one thing, a slow or refused one another: what is refused is raised.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from random import Random
from typing import Any

import httpx

from bench.questions import TASKS, WORDS, Dialogue, Turn, draw
from bench.stats import wilson
from stack import client
from stack.config import Service
from stack.errors import Code, StackError
from stack.host import write_atomic
from stack.server import Server

LIMIT_S = 300
ANSWER_TOKENS = 96
THINKING_TOKENS = 2048
RECORD = Path(__file__).resolve().parent.parent / "models" / "answers.json"
SHORT = ("repeat", "reverse", "add", "next", "project", "think", "unknown", "turns", "tool")
SANE = ("repeat", "reverse", "add", "next", "code of 8", "tool")
"""What any sane model answers, if in other words."""
LEAST = 0.9
"""The least share of right answers, over all tasks, that makes a record."""
RARE = 0.025
"""How often a task may seem worse than its record by chance."""


@dataclass(frozen=True)
class Reply:
    """What a server said to a question."""

    question: Dialogue
    said: Turn

    @property
    def right(self) -> bool:
        """Whether text, thought and tool call are exactly the expected."""
        return self.said == self.question.answer

    @property
    def sane(self) -> bool:
        """Whether the expected is in it, whatever else a more talkative model says."""
        expected, key = self.question.answer, self.question.key or self.question.answer.content
        return key.lower() in self.said.content.lower() and expected.call == self.said.call


@dataclass(frozen=True)
class Score:
    """How many answers of a task were right."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Of those asked."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval of the share that is right."""
        found = wilson(self.right, self.asked)
        return found.low, found.high


def question_set(counts: Mapping[str, int], *, seed: int) -> list[Dialogue]:
    """Draw so many held-out questions of each task, mixed; equal arguments give equal ones."""
    drawn = [
        draw(TASKS[task], rng, held_out=True)
        for task, count in counts.items()
        for rng in [Random(f"{seed} {task}")]
        for _ in range(count)
    ]
    Random(seed).shuffle(drawn)
    return drawn


def every_word() -> list[Dialogue]:
    """Ask for each word once, so that none can be lost unseen."""
    parts = (" ".join(WORDS[at : at + 12]) for at in range(0, len(WORDS), 12))
    return [
        Dialogue("repeat", (Turn("user", f"Repeat: {part}"), Turn("assistant", part)))
        for part in parts
    ]


def taught(service: Service) -> bool:
    """Whether a service's model was trained on these questions, or is somebody else's."""
    return not service.model.repository


def random_weights(service: Service) -> bool:
    """Whether a service's model is of random weights, by its name: it knows nothing."""
    return any(word in service.model.path.name for word in ("stand-in", "random"))


def longest(service: Service) -> int:
    """Return how many tokens an answer may have, thoughts included."""
    return ANSWER_TOKENS if taught(service) else THINKING_TOKENS


def short_set(service: Service, *, each: int, seed: int) -> list[Dialogue]:
    """Draw questions that suit a service's model and take no long time."""
    return question_set(dict.fromkeys(SHORT if taught(service) else SANE, each), seed=seed)


def record_set(service: Service) -> list[Dialogue]:
    """Draw as many questions as make a record."""
    if taught(service):
        long = {"code of 8": 200, "code of 32": 6, "code, full": 2}
        return question_set(dict.fromkeys(SHORT, 100) | long, seed=0)
    return question_set(dict.fromkeys(SANE, 20) | {"code of 32": 5}, seed=0)


def regressed(
    found: Mapping[str, Score], recorded: Mapping[str, Score], *, strictly: bool = True
) -> list[str]:
    """Return the tasks that are worse than their record, by Fisher's exact test (1922), one-sided.

    What the record has all right must be all right, where it is taken strictly.
    """
    return [
        task
        for task, score in found.items()
        if (strictly and recorded[task].share == 1 and score.share < 1)
        or _chance(score, recorded[task]) < RARE
    ]


def _chance(found: Score, record: Score) -> float:
    """Return how often so few right answers come by chance where nothing has changed."""
    wrong = found.asked - found.right + record.asked - record.right
    right = found.right + record.right
    ways = (math.comb(right, k) * math.comb(wrong, found.asked - k) for k in range(found.right + 1))
    return sum(ways) / math.comb(right + wrong, found.asked)


def recorded(service: Service) -> dict[str, Score]:
    """Return the record of a service's model file by task; nothing where it has none."""
    known = _records().get(service.model.path.name, {"answers": {}})
    return {task: Score(*map(int, each.split("/"))) for task, each in known["answers"].items()}


def record(server: Server, asked: Sequence[Dialogue]) -> dict[str, Score]:
    """Ask a server questions, and keep how many it answers right as its model's record.

    Raises:
        StackError: VERIFY where so few are right that something must be wrong.

    """
    service = server.service
    found = scores(ask(server, asked), exactly=taught(service))
    whole = together(found.values())
    if whole.share < LEAST:
        raise StackError(
            f"{service.name} answers {whole.right} of {whole.asked} right: too few for a record.",
            "Look at its answers first: `invoke ask`.",
            Code.VERIFY,
        )
    with service.model_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    told = {task: f"{each.right}/{each.asked}" for task, each in found.items()}
    known = {**_records(), service.model.path.name: {"answers": told, "sha256": digest}}
    write_atomic(RECORD, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return found


def _records() -> dict[str, Any]:
    known: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return known


def together(found: Iterable[Score]) -> Score:
    """Add scores up."""
    each = [*found]
    return Score(sum(one.right for one in each), sum(one.asked for one in each))


def scores(replies: Iterable[Reply], *, exactly: bool = True) -> dict[str, Score]:
    """Count right answers by task, or sane ones."""
    found: dict[str, Score] = {}
    for reply in replies:
        before = found.get(reply.question.task, Score(0, 0))
        right = reply.right if exactly else reply.sane
        found[reply.question.task] = Score(before.right + right, before.asked + 1)
    return found


def ask(
    server: Server,
    questions: Sequence[Dialogue],
    *,
    clients: int = 1,
    cancel_every: int = 0,
    body: Mapping[str, object] | None = None,
) -> list[Reply]:
    """Ask every question once, ``clients`` at a time, greedily; return the replies in that order.

    Before every ``cancel_every``-th question its client begins a long answer, and hangs up on it.
    ``body`` adds to each request, or changes it.

    Raises:
        StackError: VERIFY when the server refuses, or gives no whole answer.

    """
    # Others may think before each answer, which these questions do not need.
    brief = {} if taught(server.service) else {"chat_template_kwargs": {"enable_thinking": False}}
    body = {"max_tokens": longest(server.service), **brief, **(body or {})}
    free: SimpleQueue[httpx.Client] = SimpleQueue()  # httpx's pool is slow with many streams

    def one(at: int, question: Dialogue) -> Reply:
        session = free.get()
        try:
            if cancel_every and at % cancel_every == 0:
                _hang_up(session, questions[at - 1])
            return Reply(question, _said(server, session, {**body_of(question), **body}))
        finally:
            free.put(session)

    with ExitStack() as stack, ThreadPoolExecutor(clients) as pool:
        for _ in range(clients):
            free.put(stack.enter_context(client.session(server, timeout_s=LIMIT_S)))
        return list(pool.map(one, range(len(questions)), questions))


def body_of(question: Dialogue) -> dict[str, object]:
    """Return the request that asks a question greedily."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": _schema(parameters)}}
        for name, parameters in question.tools.items()
    ]
    return {
        "messages": [_message(turn) for turn in question.turns[:-1]],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        **({"tools": tools} if tools else {}),
    }


def _schema(parameters: Iterable[str]) -> dict[str, object]:
    return {"type": "object", "properties": {name: {"type": "string"} for name in parameters}}


def _message(turn: Turn) -> dict[str, object]:
    message: dict[str, object] = {"role": turn.role, "content": turn.content}
    if turn.thought:
        message["reasoning_content"] = turn.thought
    if turn.call:
        name, arguments = turn.call
        function = {"name": name, "arguments": json.dumps(arguments)}
        message["tool_calls"] = [{"id": "0", "type": "function", "function": function}]
    if turn.role == "tool":
        message["tool_call_id"] = "0"
    return message


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _hang_up(session: httpx.Client, question: Dialogue) -> None:
    """Begin a long answer as a stream, and end the connection at its first token."""
    body = body_of(question) | {"stream": True, "ignore_eos": True, "max_tokens": 512}
    with session.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines(), None)


def _said(server: Server, session: httpx.Client, body: Mapping[str, object]) -> Turn:
    try:
        answer = session.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        message: Mapping[str, Any] = answer.json()["choices"][0]["message"]
        calls = [
            (call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in message.get("tool_calls") or ()
        ]
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise StackError(
            f"{server.service.name} gave no whole answer: {_line(error)}.",
            f"See `invoke logs --quant {server.service.quant}`.",
            Code.VERIFY,
        ) from error
    content, thought = message.get("content") or "", message.get("reasoning_content") or ""
    return Turn("assistant", content, thought, calls[0] if len(calls) == 1 else None)
