"""Talks to a llama-server over HTTP."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx

from stack.errors import Code, StackError
from stack.host import Process
from stack.server import Server, tls
from stack.wait import StalledError, WaitTimeoutError, wait_until

_tls = cache(tls)
STALL_LIMIT_S = 120
_GENERATE_LIMIT_S = 120
_TELL_LIMIT_S = 3


@dataclass(frozen=True)
class Completion:
    """One finished answer. Rates are the server's own, in tokens a second."""

    text: str
    prompt_tokens: int
    tokens: int
    prefill_tokens_s: float
    decode_tokens_s: float
    finish: str


def session(server: Server, *, timeout_s: float = 10, key: str | None = None) -> httpx.Client:
    """Return a client bound to a server, with its key or another.

    It ignores proxy settings: a proxy does not know this machine's loopback.
    """
    key = server.key if key is None else key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(
        base_url=server.url,
        headers=headers,
        timeout=timeout_s,
        trust_env=False,
        verify=_tls(server.certificate),
    )


def health(server: Server, *, timeout_s: float = 3) -> str:
    """Return `ready`, `loading`, `unhealthy`, `starting` (nothing listens) or `not answering`."""
    try:
        with session(server, timeout_s=timeout_s) as client:
            status = client.get("/health").status_code
    except httpx.ConnectError:
        return "starting"
    except httpx.HTTPError:
        return "not answering"
    return {200: "ready", 503: "loading"}.get(status, "unhealthy")


def wait_ready(server: Server, *, stall_s: float = STALL_LIMIT_S) -> None:
    """Wait until the model is loaded, no longer than its `load_s`.

    Raises:
        StackError: LOAD when the server ends or the time is up, STALLED when it stops moving;
            both with the last lines of its log.

    """

    def ready() -> bool | None:
        word = health(server)  # first: the one that answers may have been brought back meanwhile
        if how := server.ended():
            raise StackError(
                f"{server.service.name} {how} while it loaded. {evidence(server)}",
                _see_log(server),
                Code.LOAD,
            )
        return True if word == "ready" else None

    def activity() -> tuple[object, ...]:
        return (*map(Process.activity, server.processes), server.logs(5))

    try:
        wait_until(
            ready,
            timeout_s=server.service.model.load_s,
            what=f"{server.service.name} not ready",
            activity=activity,
            stall_s=stall_s,
        )
    except WaitTimeoutError as error:
        raise StackError(
            f"{error}. {evidence(server)}",
            _see_log(server),
            Code.STALLED if isinstance(error, StalledError) else Code.LOAD,
        ) from error


def _see_log(server: Server) -> str:
    return f"See `invoke logs --quant {server.service.quant}`."


def evidence(server: Server) -> str:
    """Return the lines of a server's log that say most about a failure, as one line."""
    lines = [line.strip() for line in server.logs(200).splitlines() if line.strip()]
    telling = [line for line in lines if " E " in line or "error" in line.lower()]
    return "Log: " + " / ".join((telling or lines)[-3:]) if lines else "Its log is empty."


def complete(
    server: Server,
    prompt: str | list[int],
    *,
    tokens: int = 16,
    seed: int = 0,
    temperature: float = 0,
    limit_s: float = _GENERATE_LIMIT_S,
) -> Completion:
    """Ask for exactly `tokens` tokens after `prompt` (text or token ids), past any end of turn.

    Raises:
        StackError: VERIFY when the server fails to give them.

    """
    body = {
        "prompt": prompt,
        "n_predict": tokens,
        "seed": seed,
        "temperature": temperature,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    try:
        with session(server, timeout_s=limit_s) as client:
            answer = client.post("/completion", json=body)
        answer.raise_for_status()
        return _completion(answer.json()["content"], answer.json()["timings"], "length")
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise StackError(
            f"{server.service.name} is up but does not generate: {_line(error)}.",
            _see_log(server),
            Code.VERIFY,
        ) from error


def stream(server: Server, message: str, *, tokens: int) -> Iterator[str | Completion]:
    """Ask a question; yield the answer's pieces as they come, then the Completion.

    Raises:
        StackError: VERIFY when the server refuses, or the stream ends before the answer does.

    """
    body = {
        "messages": [{"role": "user", "content": message}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    pieces: list[str] = []
    timings: Mapping[str, Any] = {}
    finish = ""
    try:
        with (
            session(server, timeout_s=_GENERATE_LIMIT_S) as client,
            client.stream("POST", "/v1/chat/completions", json=body) as answer,
        ):
            if answer.is_error:
                answer.read()
                raise _refused(server, f"HTTP {answer.status_code}: {answer.text.strip()[:300]}")
            for event in _events(answer.iter_lines()):
                if "error" in event:
                    raise _refused(server, str(event["error"]))
                timings = event.get("timings", timings)
                for choice in event["choices"]:
                    finish = choice.get("finish_reason") or finish
                    delta = choice.get("delta", {})
                    piece = delta.get("reasoning_content") or delta.get("content")
                    if piece:
                        pieces.append(piece)
                        yield piece
    except httpx.HTTPError as error:
        raise _refused(server, _line(error)) from error
    if not finish or not timings:
        raise _refused(server, "the stream ended before the answer did")
    yield _completion("".join(pieces), timings, finish)


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Parse server-sent events; comments (pings) and the closing [DONE] are none."""
    for line in lines:
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)


def _completion(text: str, timings: Mapping[str, Any], finish: str) -> Completion:
    return Completion(
        text=text,
        prompt_tokens=timings["prompt_n"],
        tokens=timings["predicted_n"],
        prefill_tokens_s=timings["prompt_per_second"],
        decode_tokens_s=timings["predicted_per_second"],
        finish=finish,
    )


def _line(error: Exception) -> str:
    """Return an error's first line: httpx adds where to read on."""
    return str(error).partition("\n")[0] or type(error).__name__


def _refused(server: Server, why: str) -> StackError:
    return StackError(
        f"{server.service.name} gave no whole answer: {why.rstrip('.')}.",
        f"See `invoke status` and `invoke logs --quant {server.service.quant}`.",
        Code.VERIFY,
    )


def props(server: Server) -> Mapping[str, Any]:
    """Return what the server says of itself: model path, slots, context a slot, build.

    Raises:
        StackError: VERIFY when it does not answer.

    """
    return _get(server, "/props")


def metrics(session: httpx.Client) -> dict[str, float]:
    """Return the plain series of `/metrics`, without their prefix; nothing where it has none.

    From a million on the server rounds to six digits. Raises httpx.HTTPError, ValueError.
    """
    answer = session.get("/metrics")
    if answer.is_error:
        return {}
    lines = (line.split() for line in answer.text.splitlines() if line.startswith("llamacpp:"))
    return {name.removeprefix("llamacpp:"): float(value) for name, value in lines}


def requests(server: Server) -> int | None:
    """Return how many requests a server works on or has waiting; None where it does not tell."""
    try:
        with session(server, timeout_s=_TELL_LIMIT_S) as client:
            told = metrics(client)
        return int(told["requests_processing"] + told["requests_deferred"])
    except (httpx.HTTPError, KeyError, ValueError):
        return None


def models(server: Server) -> Mapping[str, Any]:
    """Return the server's list of models (one).

    Raises:
        StackError: VERIFY when it does not answer.

    """
    return _get(server, "/v1/models")


def _get(server: Server, path: str) -> Mapping[str, Any]:
    try:
        with session(server) as client:
            answer = client.get(path)
        if answer.status_code in (401, 403):
            raise StackError(
                f"{server.url} refuses the key ({answer.status_code}).",
                "Give the server's own key, an attached server's with --key-file.",
                Code.VERIFY,
            )
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise _refused(server, _line(error)) from error
    found: Mapping[str, Any] = answer.json()
    return found
