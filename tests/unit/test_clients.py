import json

import httpx
import pytest

from tests.clients import Client


def event(**said: object) -> str:
    return f"data: {json.dumps({'choices': [], **said})}\n\n"


TOKEN = event(choices=[{"delta": {"content": "x"}, "finish_reason": None}])
FINISH = event(choices=[{"delta": {}, "finish_reason": "length"}])
DONE = "data: [DONE]\n\n"


def used(tokens: int) -> str:
    return event(usage={"completion_tokens": tokens})


@pytest.mark.parametrize(
    ("body", "end"),
    [
        (TOKEN + FINISH + used(2) + DONE, "whole"),
        (TOKEN + FINISH + used(1) + DONE, "forged"),
        (TOKEN + used(2) + DONE, "forged"),
        (TOKEN + FINISH, "forged"),
        (TOKEN + event(error="gone"), "error"),
        (TOKEN, "cut"),
        ("", "cut"),
    ],
    ids=["whole", "too-few", "no-reason", "no-done", "error", "cut", "empty"],
)
def test_end_that_is_none_is_told_from_a_whole_answer(body: str, end: str) -> None:
    assert Client(tokens=2).listen(httpx.Response(200, text=body)) == end
