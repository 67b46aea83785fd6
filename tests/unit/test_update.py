"""When a candidate counts as slow, and what is stopped for one that finds no room."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stack import config, runtime, update
from stack.errors import Code, StackError
from stack.server import Server
from stack.update import _Place, _race, _Transaction
from tests import workspace


def server(name: str) -> Any:
    return SimpleNamespace(url=name)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """What each server's answers are measured at, the last one from then on."""
    script: dict[str, list[float]] = {"old": [1000], "new": [1000]}

    def rate(server: Server) -> float:
        left = script[server.url]
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(update, "_rate", rate)
    return script


def test_busy_machine_is_no_slow_engine(rates: dict[str, list[float]]) -> None:
    rates["new"] = [*[400.0] * 30, 950]

    assert _race(server("new"), server("old"), 900) == (950, 1000)


def test_slow_engine_stays_slow(
    rates: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "_PATIENCE_S", 0.1)
    rates["new"] = [899]

    assert _race(server("new"), server("old"), 0) == (899, 1000)


def test_engine_with_nothing_before_it_is_only_measured(rates: dict[str, list[float]]) -> None:
    rates["new"] = [*[10.0] * 3, 20, 10]

    assert _race(server("new"), None, 0) == (20, 0)


@dataclass
class Card:
    """A GPU with room for one server; what was done with it, in order."""

    done: list[str] = field(default_factory=list)
    served: bool = True
    good: bool = True

    def stop(self, _: object) -> None:
        self.done.append("stop")
        self.served = False

    @contextmanager
    def serving(self, *_: object) -> Iterator[Any]:
        if self.served:
            raise StackError("glm-q4 does not fit.", "Stop another.", Code.VRAM)
        if not self.good:
            raise StackError("glm-q4 ended while it loaded.", "See the log.", Code.LOAD)
        self.done.append("prove")
        yield SimpleNamespace(server=server("new"), ready_s=1.0)

    def up(self, *_: object, choose: bool, answers: object = None) -> None:
        assert choose
        assert answers is None
        self.done.append("up")
        self.served = True


class NoQuestions:
    def prove(self, _: Server) -> None:
        pass

    def ask(self, _: Server) -> None:
        return None

    def worse(self, _found: object, _before: object) -> list[str]:
        return []


@pytest.fixture
def move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rates: dict[str, list[float]]
) -> tuple[_Transaction, _Place, Card]:
    assert rates
    project = config.load(workspace.make(tmp_path))
    card = Card()
    where: Any = SimpleNamespace(name="docker", stop=card.stop)
    place = _Place(where, project.service("q4"), server("old"))
    for name in ("serving", "up"):
        monkeypatch.setattr(runtime, name, getattr(card, name))
    monkeypatch.setattr(runtime, "choose", lambda *_, **__: where)
    monkeypatch.setattr(update, "_running", lambda _: [place])
    entry = update.Entry("c0ffee", 1, "c0ffee")
    return _Transaction(project, entry, NoQuestions(), runtime.silent), place, card


def test_candidate_without_room_is_proved_in_the_gap(
    move: tuple[_Transaction, _Place, Card],
) -> None:
    transaction, place, card = move
    with transaction:
        proof = transaction.prove(transaction.project, place)

    assert card.done == ["stop", "prove"]
    assert (proof.tokens_s, proof.baseline_tokens_s) == (1000, 1000)
    assert transaction.stopped == [place]


def test_candidate_that_fails_in_the_gap_gives_it_back(
    move: tuple[_Transaction, _Place, Card],
) -> None:
    transaction, place, card = move
    card.good = False

    with (
        pytest.raises(StackError, match="The engine before it serves again") as caught,
        transaction,
    ):
        transaction.prove(transaction.project, place)

    assert caught.value.code == Code.RESTORED
    assert card.done == ["stop", "stop", "up"]
