import json
from hashlib import sha256
from random import Random

import gguf
import numpy as np
import pytest

from bench import answers, questions
from bench.answers import Reply, Score
from bench.questions import TASKS, Dialogue, Turn
from stack import gguf_header, models
from tests.workspace import ROOT

FOLDER = ROOT / "models"
RECORD = json.loads((FOLDER / "tiny.json").read_text())
FILES = {"tiny.gguf": 12_000_000, "tiny-f16.gguf": 24_000_000}


@pytest.mark.parametrize("task", TASKS)
def test_equal_seeds_give_equal_questions(task: str) -> None:
    assert answers.question_set({task: 3}, seed=5) == answers.question_set({task: 3}, seed=5)


@pytest.mark.parametrize("task", TASKS)
def test_asked_questions_are_held_out_of_the_training(task: str) -> None:
    learned = {
        asked_text(questions.draw(TASKS[task], Random(at), held_out=False)) for at in range(9)
    }

    assert not learned & set(map(asked_text, answers.question_set({task: 9}, seed=5)))


def asked_text(made: Dialogue) -> str:
    return "\n".join(turn.content for turn in made.turns if turn.role == "user")


def test_sums_are_right() -> None:
    made = [questions.add(Random(at)) for at in range(50)]
    numbers = [[int(n) for n in made_.turns[0].content.translate(DIGITS).split()] for made_ in made]

    assert [each.answer.content for each in made] == [str(sum(pair)) for pair in numbers]


DIGITS = {code: " " for code in range(128) if not chr(code).isdecimal()}


def test_each_code_stands_once_in_its_text() -> None:
    made = questions.codes_32(Random(0))

    assert made.turns[0].content.count(f"is {made.answer.content}.\n") == 1


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (Turn("assistant", "42"), True),
        (Turn("assistant", "42 "), False),
        (Turn("assistant", "42", "hm"), False),
        (Turn("assistant", "42", call=("add", {})), False),
    ],
    ids=["equal", "blank", "thought", "call"],
)
def test_only_the_expected_turn_is_right(said: Turn, right: bool) -> None:
    asked = Dialogue("add", (Turn("user", "40 + 2 ="), Turn("assistant", "42")))

    assert Reply(asked, said).right == right


def test_interval_is_wilsons() -> None:
    assert Score(8, 10).interval == pytest.approx((0.4902, 0.9433), abs=1e-4)


@pytest.mark.parametrize(
    ("found", "recorded", "strictly", "worse"),
    [
        (Score(10, 10), Score(100, 100), True, False),
        (Score(9, 10), Score(100, 100), True, True),
        (Score(9, 10), Score(95, 100), True, False),
        (Score(5, 10), Score(95, 100), True, True),
        (Score(20, 24), Score(24, 24), False, False),
        (Score(19, 24), Score(24, 24), False, True),
    ],
)
def test_worse_than_recorded(found: Score, recorded: Score, strictly: bool, worse: bool) -> None:
    told = answers.regressed({"add": found}, {"add": recorded}, strictly=strictly)

    assert told == ["add"] * worse


def test_every_word_is_asked_for() -> None:
    asked = " ".join(each.answer.content for each in answers.every_word())

    assert sorted(asked.split()) == sorted(questions.WORDS)


@pytest.mark.parametrize("file", FILES)
def test_recorded_answers_are_those_of_this_file(file: str) -> None:
    assert json.loads(answers.RECORD.read_text())[file]["sha256"] == RECORD["sha256"][file]


@pytest.mark.parametrize("file", FILES)
def test_model_is_the_recorded_one_and_small(file: str) -> None:
    data = (FOLDER / file).read_bytes()

    assert sha256(data).hexdigest() == RECORD["sha256"][file]
    assert len(data) == gguf_header.read(FOLDER / file).size_bytes <= FILES[file]


def test_the_smaller_file_is_made_of_the_larger() -> None:
    larger, smaller = (gguf.GGUFReader(FOLDER / f).tensors for f in ("tiny-f16.gguf", "tiny.gguf"))

    for half, byte in zip(larger, smaller, strict=True):
        values = half.data.astype(np.float32)
        made = values if byte.tensor_type == 0 else gguf.quantize(values, byte.tensor_type)
        assert np.array_equal(made, byte.data), byte.name


def test_model_has_the_template_that_is_written() -> None:
    assert gguf_header.read(FOLDER / "tiny.gguf").keys["tokenizer.chat_template"] == models.TEMPLATE
