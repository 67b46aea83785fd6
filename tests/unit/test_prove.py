"""What a server that loaded must still show before it counts as up."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from stack import client, config, gpu, runtime
from stack.config import Service
from stack.engine_log import Allocation
from stack.errors import Code, StackError
from stack.server import Server
from tests.workspace import ROOT

NOTHING = Allocation(0, 0, 0, 0, 0)
TINY = config.load(ROOT).service("tiny")
PROPS = {
    "model_path": "/app/models/tiny.gguf",
    "default_generation_settings": {"n_ctx": 8192},
    "total_slots": 4,
    "build_info": "b11312",
}
TIMINGS = {
    "prompt_n": 1,
    "predicted_n": 32,
    "prompt_per_second": 1.0,
    "predicted_per_second": 1.0,
}
ANSWER = {"content": "uv run", "timings": TIMINGS}


@contextmanager
def saying(answer: dict[str, Any], props: dict[str, Any]) -> Iterator[str]:
    """Yield the URL of a server that is always healthy, and says just this."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.say(props if self.path == "/props" else {})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.say(answer)

        def say(self, what: object) -> None:
            body = json.dumps(what).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as stub:
        thread = Thread(target=stub.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{stub.server_port}"
        finally:
            stub.shutdown()
            thread.join()


def prove(
    answer: dict[str, Any] = ANSWER, service: Service = TINY, **props: Any
) -> client.Completion:
    with saying(answer, PROPS | props) as url:
        return runtime.prove(Server("native", service, url, key=""), NOTHING)


def test_a_server_that_is_as_configured_and_generates() -> None:
    assert prove().text == "uv run"


def test_a_context_that_the_engine_rounds_up() -> None:
    environment = {**TINY.environment, "LLAMA_ARG_CTX_SIZE": "8100"}

    assert prove(service=replace(TINY, environment=environment))


@pytest.mark.parametrize(
    ("props", "words"),
    [
        ({"model_path": "/app/models/other.gguf"}, r"model other.gguf, not tiny.gguf"),
        ({"default_generation_settings": {"n_ctx": 2048}}, "context 2048, not 8192"),
        ({"total_slots": 1}, "slots 1, not 4"),
    ],
)
def test_a_server_that_is_not_as_configured(props: dict[str, Any], words: str) -> None:
    with pytest.raises(StackError, match=words) as caught:
        prove(**props)

    assert caught.value.code == Code.VERIFY


@pytest.mark.parametrize(
    "answer",
    [
        {"error": "out of memory"},
        ANSWER | {"content": " \n"},
        ANSWER | {"content": "!" * 32},
        ANSWER | {"timings": TIMINGS | {"predicted_n": 0}},
    ],
    ids=["error", "blank", "not a number", "too few"],
)
def test_a_server_that_generates_nothing(answer: dict[str, Any]) -> None:
    with pytest.raises(StackError, match="generate") as caught:
        prove(answer)

    assert caught.value.code == Code.VERIFY


def test_a_gpu_server_that_loaded_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "lost", lambda _: None)  # there is one, whatever this machine has

    with pytest.raises(StackError, match="not on the GPU: 0 of 0") as caught:
        prove(service=replace(TINY, gpus=("0",)))

    assert caught.value.code == Code.ON_CPU
