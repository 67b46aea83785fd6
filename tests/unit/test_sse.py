"""The parser of streamed answers: what is a token, and what is none."""

import bisect
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import sse
from bench.records import Read
from tests.unit.scripted import DONE, ROLE, delta, event, usage

END = delta("stop") + usage(2) + DONE


def parse(*pieces: bytes) -> sse.Answer:
    """Parse pieces that come at 1, 2, 3 ... ns."""
    return sse.parse(enumerate(pieces, 1))


def test_first_chunk_with_the_role_alone_is_no_token() -> None:
    assert parse(ROLE, delta(content="a"), END).reads == (Read(2, 1, 1),)


def test_comments_are_no_tokens() -> None:
    assert parse(b": ping\n\n", delta(content="a"), b":\n\n", END).reads == (Read(2, 1, 1),)


def test_chunk_of_usage_alone_is_no_token() -> None:
    answer = parse(delta(content="a"), delta("stop"), usage(1, prompt=9, cached=4))

    assert answer.reads == (Read(1, 1, 1),)
    assert (answer.output_tokens, answer.prompt_tokens, answer.cached_tokens) == (1, 9, 4)


@pytest.mark.parametrize("bears", [{"content": ""}, {"content": None}, {"tool_calls": []}, {}])
def test_empty_delta_is_no_token(bears: dict[str, Any]) -> None:
    assert parse(delta(**bears), delta(content="a"), END).reads == (Read(2, 1, 1),)


@pytest.mark.parametrize(
    "bears",
    [{"content": "a"}, {"reasoning_content": "a"}, {"tool_calls": [{"index": 0}]}],
    ids=lambda bears: next(iter(bears)),
)
def test_content_reasoning_and_tool_calls_are_tokens(bears: dict[str, Any]) -> None:
    assert parse(delta(**bears), END).reads == (Read(1, 1, 1),)


def test_answer_begins_after_the_reasoning() -> None:
    thought, said = delta(reasoning_content="hm"), delta(content="a")

    answer = parse(ROLE, thought, thought, said, said, END)

    assert answer.answer_ns == 4
    assert (answer.reasoning, answer.content) == ("hmhm", "aa")


def test_tool_call_is_an_answer() -> None:
    answer = parse(delta(reasoning_content="hm"), delta(tool_calls=[{"index": 0}]), END)

    assert answer.answer_ns == 2


def test_events_of_one_read_share_its_stamp() -> None:
    assert parse(ROLE + delta(content="a") * 3, END).reads == (Read(1, 3, 3),)


def test_event_counts_for_the_read_that_ended_it() -> None:
    data = delta(content="é")
    middle = data.index("é".encode()) + 1  # inside a character

    assert parse(data[:middle], data[middle:-1], data[-1:], END).reads == (Read(3, 1, 1),)


@pytest.mark.parametrize(
    "data",
    [
        delta(content="a").replace(b"\n", b"\r\n"),
        delta(content="a").replace(b"data: ", b"data:"),
        b"event: message\nid: 7\n" + delta(content="a"),
        delta(content="a").replace(b'"choices"', b'\ndata: "choices"'),
    ],
    ids=["CRLF", "no blank", "other fields", "several data lines"],
)
def test_forms_that_the_standard_allows(data: bytes) -> None:
    answer = parse(data, END)

    assert (answer.reads, answer.content) == ((Read(1, 1, 1),), "a")


def test_server_says_how_many_tokens_a_chunk_has() -> None:
    made = [delta(content="a", timings={"predicted_n": n}) for n in (1, 4, 6)]

    answer = parse(*made, END)

    assert answer.exact
    assert [read.tokens for read in answer.reads] == [1, 3, 2]


def test_token_that_shows_nothing_comes_with_the_count() -> None:
    events = [ROLE, delta(content="a", timings={"predicted_n": 2}), delta("stop")]
    told = event({"choices": [], "usage": {"completion_tokens": 3}, "timings": {"predicted_n": 3}})

    assert parse(*events, told).reads == (Read(2, 2, 1), Read(4, 1, 1))


def test_count_that_says_nothing_new_is_no_event() -> None:
    counted = delta(content="a", timings={"predicted_n": 2})
    told = event({"choices": [], "usage": {"completion_tokens": 2}, "timings": {"predicted_n": 2}})

    assert parse(counted + delta("stop") + told).reads == (Read(1, 2, 1),)


def test_count_before_the_first_token_is_none() -> None:
    early = delta(role="assistant", timings={"predicted_n": 1})

    assert parse(early, delta(content="a", timings={"predicted_n": 2}), END).reads == (
        Read(2, 2, 1),
    )


def test_pieces_of_one_token_are_one_token() -> None:
    call: dict[str, Any] = {"tool_calls": [{"index": 0}]}
    made = [delta(timings={"predicted_n": n}, **call) for n in (1, 2, 2, 3)]

    assert [read.at_ns for read in parse(*made, END).reads] == [1, 2, 4]


def test_without_the_servers_count_each_event_is_a_token() -> None:
    counted = delta(content="a", timings={"predicted_n": 5})

    answer = parse(counted, delta(content="b"), END)

    assert not answer.exact
    assert [read.tokens for read in answer.reads] == [1, 1]


def test_timings_are_those_of_the_last_chunk() -> None:
    first, last = ({"predicted_n": n, "prompt_ms": 10.0 * n} for n in (1, 2))

    answer = parse(delta(content="a", timings=first), delta("stop", timings=last), usage(2))

    assert answer.timings == last


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((delta(content="a"), delta("stop"), usage(1)), None),
        ((delta(content="a"), usage(1), DONE), "partial"),
        ((delta(content="a"), delta("stop"), DONE), "partial"),
        ((delta(content="a"),), "partial"),
        ((ROLE, delta("stop"), usage(0), DONE), "empty"),
        ((), "empty"),
        ((ROLE, event({"error": {"message": "no"}})), "event"),
        ((delta(content="a"), event({"error": {"message": "no"}}), END), "event"),
        ((delta(content="a"), b"data: {\n\n", END), "broken"),
        ((delta(content="a"), b"data: 5\n\n", END), "broken"),
        ((delta(content="a"), event({"choices": [{}]}), END), "broken"),
    ],
    ids=[
        *("whole without [DONE]", "no finish", "no usage", "neither", "no token", "nothing"),
        *("error first", "error in the middle", "no JSON", "no object", "no delta"),
    ],
)
def test_whole_answer_or_which_failure(pieces: Sequence[bytes], error: str | None) -> None:
    assert parse(*pieces).error == error


def test_error_says_what_the_server_said() -> None:
    assert "context size" in parse(event({"error": {"message": "context size"}})).detail


def test_nothing_counts_after_the_end() -> None:
    assert parse(delta(content="a"), END, delta(content="b")).content == "a"


EVENTS = st.lists(
    st.one_of(
        st.builds(lambda text: delta(content=text), st.text()),
        st.builds(lambda text: delta(reasoning_content=text), st.text()),
        st.builds(lambda n: delta(content="a", timings={"predicted_n": n}), st.integers(1, 99)),
        st.builds(lambda text: f": {text}\n\n".encode(), st.text("ping é")),
        st.sampled_from([ROLE, END, delta("stop"), usage(3), b"data: {\n\n", event({"error": 1})]),
    )
)


def split(body: bytes, cuts: Sequence[int]) -> list[bytes]:
    places = sorted({cut % (len(body) + 1) for cut in cuts} | {0, len(body)})
    return [body[begin:end] for begin, end in itertools.pairwise(places)]


CUTS = st.lists(st.integers(min_value=0))


@settings(deadline=None)
@given(EVENTS, CUTS, st.booleans())
def test_any_split_gives_the_same_answer(events: list[bytes], cuts: list[int], crlf: bool) -> None:
    body = b"".join(events)
    body = body.replace(b"\n", b"\r\n") if crlf else body

    assert sse.parse((7, piece) for piece in split(body, cuts)) == sse.parse([(7, body)])


@settings(deadline=None)
@given(st.integers(1, 20), CUTS)
def test_any_split_stamps_an_event_with_its_last_byte(tokens: int, cuts: list[int]) -> None:
    token = delta(content="é")
    pieces = split(token * tokens, cuts)
    ends = list(itertools.accumulate(map(len, pieces)))
    whole = (bisect.bisect_left(ends, len(token) * number) for number in range(1, tokens + 1))

    reads = sse.parse(enumerate(pieces)).reads

    assert {read.at_ns: read.events for read in reads} == Counter(whole)
