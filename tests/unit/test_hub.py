import email.utils
import time
from collections.abc import Callable

import httpx2
import pytest

from stack import hub
from stack.errors import Code, StackError


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def fails(failure: StackError, counts: list[int]) -> Callable[[], None]:
    """Return an attempt that fails with each count reached, then succeeds."""

    def attempt() -> None:
        if len(counts) > 1:
            counts.pop(0)
            raise failure

    return attempt


def answer(status: int, **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.Response(status, headers=named)


def test_attempts_that_get_nowhere_end(slept: list[float]) -> None:
    with pytest.raises(StackError, match="broke"):
        hub.patiently(fails(hub.passing("it broke"), [1] * 99), lambda: 1)
    assert slept == [1, 2, 4, 8]


def test_attempts_that_get_further_go_on(slept: list[float]) -> None:
    counts = list(range(50))
    hub.patiently(fails(hub.passing("it broke"), counts), lambda: counts[0])
    assert slept == [1.0] * 49


def test_hub_that_was_never_reached_is_not_tried_again(slept: list[float]) -> None:
    with pytest.raises(StackError, match="refused"):
        hub.patiently(fails(hub.passing("refused", unreachable=True), [0, 0]), lambda: 0)
    assert not slept


@pytest.mark.parametrize("status", [401, 403, 404, 410, 451])
def test_refusal_is_final(slept: list[float], status: int) -> None:
    error = hub.refused("a file", answer(status))
    with pytest.raises(StackError, match=str(status)) as caught:
        hub.patiently(fails(error, [0, 0]), lambda: 0)
    assert caught.value.code == Code.DOWNLOAD
    assert not slept


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_hub_in_trouble_is_waited_for_as_it_asks(slept: list[float], status: int) -> None:
    hub.patiently(fails(hub.refused("a file", answer(status, Retry_After="7")), [0, 0]), lambda: 0)
    assert slept == [7]


def test_rate_limit_of_the_hub_is_kept(slept: list[float]) -> None:
    error = hub.refused("a file", answer(429, RateLimit='"resolvers";r=0;t=55'))
    hub.patiently(fails(error, [0, 0]), lambda: 0)
    assert slept == [55]


def test_hub_that_asks_for_too_long_a_wait_is_not_waited_for(slept: list[float]) -> None:
    error = hub.refused("a file", answer(429, Retry_After="301"))
    with pytest.raises(StackError, match="asks to wait 301 s") as caught:
        hub.patiently(fails(error, [0, 0]), lambda: 0)
    assert "HF_TOKEN" in str(caught.value)
    assert not slept


def test_retry_after_may_be_a_date_or_nonsense() -> None:
    soon = email.utils.format_datetime(email.utils.localtime().replace(microsecond=0))

    assert hub.retry_after_s(soon) == 0
    assert hub.retry_after_s("soon") is None
    assert hub.retry_after_s("") is None


@pytest.mark.parametrize(
    ("headers", "extent"),
    [
        ({"Content_Range": "bytes 5-9/10", "Content_Length": "5"}, (5, 10)),
        ({"Content_Range": "bytes 5-9/*"}, (5, None)),
        ({"Content_Length": "10"}, (0, 10)),
        ({}, (0, None)),
    ],
)
def test_extent_of_an_answer(headers: dict[str, str], extent: tuple[int, int | None]) -> None:
    assert hub.extent(answer(206, **headers)) == extent
