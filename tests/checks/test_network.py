"""The server is reachable where it should be, by whom it should be, and nowhere else."""

import ipaddress
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from bench import answers
from bench.questions import Turn
from stack import client, config, host, keys, runtime
from stack.compose import Docker
from stack.config import Service
from stack.runtime import Runtime
from stack.server import Server
from tests import workspace

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
PROMPT = {"prompt": "hi", "n_predict": 1, "max_tokens": 1}
PROTECTED = {
    "/v1/models": None,
    "/models": None,
    "/props": None,
    "/metrics": None,
    "/v1/chat/completions": CHAT,
    "/v1/completions": PROMPT,
    "/completion": PROMPT,
    "/tokenize": {"content": "hi"},
    "/apply-template": CHAT,
}


def call(server: Server, path: str, *, key: str) -> httpx.Response:
    body = PROTECTED.get(path)
    with client.session(server, key=key) as session:
        return session.post(path, json=body) if body else session.get(path)


@pytest.fixture
def port(server: Server) -> int:
    if server.runtime == "attached":
        pytest.skip("an attached server's host is out of reach")
    port = urlsplit(server.url).port
    assert port
    return port


@pytest.mark.parametrize("path", PROTECTED)
def test_key_opens(server: Server, path: str) -> None:
    assert call(server, path, key=server.key).status_code == httpx.codes.OK


@pytest.mark.parametrize("key", ["", "wrong"], ids=["no-key", "wrong-key"])
@pytest.mark.parametrize("path", PROTECTED)
def test_nothing_else_opens(server: Server, path: str, key: str) -> None:
    assert call(server, path, key=key).status_code == httpx.codes.UNAUTHORIZED


def test_health_needs_no_key(server: Server) -> None:
    assert call(server, "/health", key="").status_code == httpx.codes.OK


@pytest.mark.parametrize("path", ["/", "/slots"])
def test_unasked_routes_are_off(server: Server, path: str) -> None:
    assert call(server, path, key=server.key).is_error


def test_listens_on_the_asked_address_alone(server: Server, port: int) -> None:
    assert {each.address for each in host.listeners(port)} == {server.service.bind}


@pytest.mark.parametrize("address", host.addresses())
def test_loopback_server_refuses_the_hosts_address(server: Server, port: int, address: str) -> None:
    if not ipaddress.ip_address(server.service.bind).is_loopback:
        pytest.skip(f"it is published on {server.service.bind} on purpose")

    assert not host.answers(address, port)


# The base image has no HTTP client; bash has sockets. Prints the status line.
GET = r"""
exec 3<>/dev/tcp/$0/$1
printf 'GET /v1/models HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\n\r\n' "$0" "$2" >&3
read -r line <&3
echo "$line"
"""


@pytest.mark.parametrize(("right", "status"), [(True, "200"), (False, "401")], ids=["key", "wrong"])
def test_sibling_container_reaches_it_by_name(
    server: Server, engine: Runtime, right: bool, status: str
) -> None:
    if not isinstance(engine, Docker):
        pytest.skip("a native server has no sibling containers")
    service = server.service
    key = server.key if right else "wrong"

    says = engine.sibling(service, "bash", "-c", GET, service.name, str(service.target_port), key)

    assert says.stdout.split()[1:2] == [status], says


# Prints the answer's body; the question is the last argument.
ASK = r"""
exec 3<>/dev/tcp/$0/$1
printf 'POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n' "$0" >&3
printf 'Authorization: Bearer %s\r\nContent-Type: application/json\r\n' "$2" >&3
printf 'Content-Length: %s\r\n\r\n%s' "${#3}" "$3" >&3
while read -r line <&3 && [ "$line" != $'\r' ]; do :; done
cat <&3
"""


def said(server: Server) -> list[Turn]:
    """Return a server's greedy answers to a few questions."""
    asked = answers.short_set(server.service, each=1, seed=4)
    return [reply.said for reply in answers.ask(server, asked)]


def test_sibling_container_gets_the_same_answer(server: Server, engine: Runtime) -> None:
    if not isinstance(engine, Docker):
        pytest.skip("a native server has no sibling containers")
    service, (question,) = server.service, answers.question_set({"reverse": 1}, seed=4)
    where = (service.name, str(service.target_port), server.key)
    body = {**answers.body_of(question), "max_tokens": answers.longest(service)}

    says = engine.sibling(service, "bash", "-c", ASK, *where, json.dumps(body))

    (here,) = answers.ask(server, [question])
    there = json.loads(says.stdout)["choices"][0]["message"]
    assert there["content"] == here.said.content != ""


@pytest.fixture
def published(runnable: Service, engine: Runtime, tmp_path: Path) -> Iterator[Server]:
    """A second deployment of the target, published on one of the host's own addresses."""
    if not host.addresses():
        pytest.skip("this host has no address beyond loopback")
    folder = workspace.make(tmp_path, GLM_BIND=host.addresses()[0])
    project = config.load(folder, overrides={f"GLM_{runnable.quant.upper()}_PORT": ""})
    service = project.service(runnable.quant)
    keys.make(service)
    chosen = runtime.choose(project, want=engine.name)
    with runtime.serving(chosen, project, service) as up:
        yield up.server


def test_published_server_says_there_what_one_on_loopback_says(
    server: Server, published: Server
) -> None:
    assert said(published) == said(server)


def test_published_server_refuses_a_wrong_key_there(published: Server) -> None:
    assert call(published, "/v1/models", key="wrong").status_code == httpx.codes.UNAUTHORIZED


def test_published_server_is_not_on_loopback(published: Server) -> None:
    port = urlsplit(published.url).port

    assert port
    assert not host.answers("127.0.0.1", port)
