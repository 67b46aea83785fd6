import json
from dataclasses import replace
from typing import Any

import pytest

from bench import answers, quiz, sse
from bench.prompts import Spread
from bench.questions import Dialogue, Turn
from stack import config
from tests.unit.scripted import DONE, ROLE, delta, usage
from tests.workspace import ROOT

TINY = config.load(ROOT).service("tiny")
MADE = quiz.of(TINY, text=Spread(200, 400), seed=5)
ONE_TEXT = replace(MADE, shared=480)


def asked(made: Dialogue) -> str:
    return made.turns[0].content


def test_number_and_seed_make_the_question() -> None:
    numbers = range(40)
    made = [MADE.question(number) for number in numbers]

    assert made == [MADE.question(number) for number in numbers]
    assert len(set(map(asked, made))) > 38  # "add 5 and 6" may come twice
    assert made != [replace(MADE, seed=6).question(number) for number in numbers]


def test_one_text_is_asked_about_again_and_again() -> None:
    made = [ONE_TEXT.question(number) for number in range(60)]
    on_text = [each for each in made if each.task == quiz.LONG_TASK]

    texts = {asked(each).rpartition("\n")[0] for each in on_text}
    assert len(texts) == 1
    assert len({asked(each) for each in on_text}) == quiz.CODES
    (text,) = texts
    for each in on_text:
        name = asked(each).rpartition(" ")[2].rstrip("?")
        assert f"The code of {name} is {each.answer.content}." in text


def test_what_the_record_has_not_all_right_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {task: answers.Score(100, 100) for task in (*answers.SHORT, quiz.LONG_TASK)}
    known["add"] = answers.Score(99, 100)
    monkeypatch.setattr(answers, "recorded", lambda _: known)

    made = quiz.of(TINY, text=Spread(200, 400))

    assert made.tasks == tuple(task for task in answers.SHORT if task != "add")
    # The upper ends of 0 in 100 (3.7 %) and of 0 in 800 (0.5 %), each half of what is asked.
    assert made.limit == pytest.approx((0.0370 + 0.0048) / 2, abs=1e-4)


def test_no_record_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "recorded", lambda _: {})

    assert quiz.of(TINY, text=Spread(200, 400)).limit is None


def streamed(*deltas: bytes) -> sse.Answer:
    return sse.parse([(0, b"".join((ROLE, *deltas, delta("stop"), usage(2), DONE)))])


def call(*parts: dict[str, Any]) -> bytes:
    return b"".join(delta(tool_calls=[{"index": 0, "function": part}]) for part in parts)


SUM = Dialogue("add", (Turn("user", "40 + 2 ="), Turn("assistant", "42")))
MOVE = Dialogue(
    "tool", (Turn("user", "Move it."), Turn("assistant", call=("move", {"item": "fox"})))
)


@pytest.mark.parametrize(
    ("question", "answer", "wrong"),
    [
        (SUM, [delta(content="4"), delta(content="2")], None),
        (SUM, [delta(content="43")], "add: said '43', not '42'"),
        (SUM, [delta(reasoning_content="hm"), delta(content="42")], "add: said '42', not '42'"),
        (MOVE, [call({"name": "move", "arguments": ""}, {"arguments": '{"item":"fox"}'})], None),
        (MOVE, [call({"name": "move", "arguments": '{"item":"fox"'})], "tool: said"),
        (MOVE, [call({"name": "move", "arguments": '{"item":"owl"}'})], "tool: said"),
        (MOVE, [delta(content="fox")], "tool: said 'fox', not"),
    ],
)
def test_streamed_answer_is_judged(
    question: Dialogue, answer: list[bytes], wrong: str | None
) -> None:
    found = MADE.wrong(question, streamed(*answer))

    assert found is None if wrong is None else (found or "").startswith(wrong)


def test_talkative_answer_is_right_for_a_model_that_was_not_taught() -> None:
    answer = streamed(delta(reasoning_content="hm"), delta(content="It is 42."))

    assert replace(MADE, exactly=False).wrong(SUM, answer) is None


def test_what_is_hung_up_on_would_go_on_for_long() -> None:
    body = json.loads(json.dumps(MADE.body(SUM, hung_up=True)))

    assert body["ignore_eos"] is True
    assert body["max_tokens"] >= 512
