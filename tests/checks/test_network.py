"""The server is reachable where it should be, by whom it should be, and nowhere else."""

import contextlib
import ipaddress
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from bench import answers
from bench.questions import Turn
from stack import client, config, host, keys, runtime
from stack.compose import Docker
from stack.config import Project, Service
from stack.errors import Code, StackError
from stack.runtime import Runtime
from stack.server import Server
from stack.wait import wait_until
from tests import clients, workspace
from tests.checks.conftest import IDLE, Broken, Notice, Target
from tests.ledger import Ledger
from tests.outside import Outside, outside
from tests.proxy import dropper, proxied

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


# Header lines, of which {key} is the right key.
STRANGERS = {
    "a part of it": "Authorization: Bearer {key:.63}",
    "more than it": "Authorization: Bearer {key}0",
    "empty": "Authorization: Bearer ",
    "7,000 long": f"Authorization: Bearer {'a' * 7000}",
    "another scheme": "Authorization: Basic {key}",
    "a cookie": "Cookie: api_key={key}",
    "another's header": "X-Api-Key: wrong",
}


def raw(server: Server, header: str, target: str = "/v1/models") -> tuple[str, bytes]:
    """Send a request as it stands; return the status and the body."""
    where = urlsplit(server.url)
    head = f"GET {target} HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n{header}\r\n\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
        connection.sendall(head.encode())
        connection.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    status, _, rest = reply.partition(b"\r\n")
    return status.split()[1].decode(), rest.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("header", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.row(
    "R17", "a key that is wrong, cut, too long, or elsewhere", "401 in the same few words"
)
def test_strangers_are_told_the_same_in_few_words(server: Server, header: str) -> None:
    told = raw(server, header.format(key=server.key))

    assert told == raw(server, "Accept: */*")
    assert told[0] == "401"
    assert len(told[1]) < 200


@pytest.mark.row("R17", "the key in the address", "401")
def test_key_in_the_address_opens_nothing(server: Server) -> None:
    assert raw(server, "Accept: */*", f"/v1/models?api_key={server.key}")[0] == "401"


STRANGER = "401 in few words, as for any stranger"
NO_REQUEST = "it is no HTTP, so nobody comes to look at the key"


@pytest.mark.parametrize("end", ["\n", "\n ", "\0", "\r"], ids=repr)
def test_key_with_a_line_break_is_no_request(
    server: Server, target: Target, ledger: Ledger, end: str
) -> None:
    case = f"key with {end!r} after it"
    with ledger.trying("R9", case, expected=STRANGER, target=target) as row:
        row.inputs = 1
        status, told = raw(server, f"Authorization: Bearer {server.key}{end}")
        row.found, row.why = status, NO_REQUEST
        assert status == "400"
        assert len(told) < 100


def test_key_longer_than_a_header_may_be_is_no_request(
    server: Server, target: Target, ledger: Ledger
) -> None:
    with ledger.trying("R9", "key of 65,000", expected=STRANGER, target=target) as row:
        row.inputs = 1
        row.found, _ = raw(server, f"Authorization: Bearer {'a' * 65000}")
        row.why = NO_REQUEST
        assert row.found == "400"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/slots"),
        ("POST", "/slots/0?action=save"),
        ("POST", "/props"),
        ("POST", "/models"),
        ("DELETE", "/models"),
        ("POST", "/models/load"),
        ("POST", "/models/unload"),
        ("GET", "/tools"),
        ("POST", "/tools"),
        ("GET", "/cors-proxy?url=http://127.0.0.1/"),
    ],
)
@pytest.mark.row("R19", "slots, props, models, tools, UI", "403, 404 or 501")
def test_unasked_routes_are_off(server: Server, method: str, path: str) -> None:
    with client.session(server) as session:
        answer = session.request(method, path, json={} if method == "POST" else None)

    assert answer.status_code in (403, 404, 501)


FOREIGN = ("http://evil.example", "http://localhost.evil.example", "null")


@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.row("R18", "a page of a foreign origin", "not let in by CORS")
def test_page_of_another_origin_may_not_read_answers(
    server: Server, method: str, origin: str
) -> None:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    with client.session(server) as session:
        answer = session.request(method, "/v1/models", headers=headers)

    assert "Access-Control-Allow-Origin" not in answer.headers


def test_page_of_this_host_may(server: Server) -> None:
    origin = "http://localhost:3000"
    with client.session(server) as session:
        answer = session.get("/v1/models", headers={"Origin": origin})

    assert answer.headers.get("Access-Control-Allow-Origin") == origin


def places(server: Server, project: Project, engine: Runtime) -> Iterator[tuple[str, str]]:
    """Yield what others may see of a running server, by where they see it."""
    yield "its log", server.logs(100_000)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield str(path), path.read_bytes().decode(errors="replace")
    for process in server.processes:
        path = Path(f"/proc/{process.pid}/environ")
        yield str(path), path.read_bytes().decode(errors="replace")
    for path in project.state.rglob("*"):
        if path.is_file() and path != server.service.key_file:
            yield str(path), path.read_bytes().decode(errors="replace")
    if isinstance(engine, Docker) and (container := engine.container(server.service)):
        yield "docker inspect", json.dumps(container.attrs)
        yield "docker history", json.dumps(container.image.history() if container.image else "")


def showing(server: Server, project: Project, engine: Runtime, secret: str) -> list[str]:
    """Return where a secret can be seen by who looks at a running server."""
    return [where for where, text in places(server, project, engine) if secret in text]


def test_key_shows_nowhere(server: Server, project: Project, engine: Runtime) -> None:
    call(server, "/v1/models", key=server.key)
    call(server, "/v1/chat/completions", key=server.key)

    assert showing(server, project, engine, server.key) == []


def test_key_on_a_command_line_is_noticed(server: Server, notice: Notice) -> None:
    key = secrets.token_hex(32)
    with subprocess.Popen(["sh", "-c", "sleep 60; exit", key]) as process:
        try:
            shown, other = "the key on a command line", replace(server, key=key)
            notice(test_key_shows_nowhere, shown, says="/cmdline'\\] ==", server=other)
        finally:
            process.kill()


def opened(server: Server, *given: str) -> list[bool]:
    """Return which of some keys open the server."""
    return [call(server, "/v1/models", key=key).status_code == httpx.codes.OK for key in given]


def test_key_is_changed_while_both_open(runnable: Service, engine: Runtime, tmp_path: Path) -> None:
    port = {f"GLM_{runnable.quant.upper()}_PORT": str(workspace.free_port())}
    folder = workspace.make(tmp_path, **port)
    project = config.load(folder)
    service = project.service(runnable.quant)
    keys.make(service)
    old = keys.read(service)
    with runtime.serving(runtime.choose(project, want=engine.name), project, service) as up:
        keys.rotate(service)
        new = keys.read(service)
        assert opened(up.server, old, new) == [True, False]  # it reads the file at its start alone

        assert cli(folder, "key", "--quant", service.quant, "--rotate").status == 0
        newest = keys.read(service)
        assert opened(up.server, old, new, newest) == [True, True, True]

        assert (
            "no longer open: 2" in cli(folder, "key", "--quant", service.quant, "--retire").stdout
        )
        assert opened(up.server, old, new, newest) == [False, False, True]


def cli(folder: Path, *arguments: str) -> host.Result:
    with workspace.invoke(folder, *arguments) as process:
        out, err = process.communicate(timeout=120)
        return host.Result(process.returncode, out, err)


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


ALONE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""Runs a command where there is no network but its own loopback."""
LIFE = "m='python3 -m invoke' && $m up {flag} && $m ask hello && $m down"
DEAD = "http://127.0.0.1:9"


def live(
    folder: Path, flag: str, *, by: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> host.Result:
    """Start a deployment of the tiny model, ask it, and stop it; return what that said."""
    life = LIFE.format(flag=flag).replace("python3", sys.executable)
    return host.run(
        [*by, "sh", "-c", life], cwd=folder, env={**os.environ, **(env or {})}, timeout_s=120
    )


@pytest.fixture
def own(tmp_path: Path, runnable: Service) -> Path:
    """A folder of the target's runtime, with a port that is free."""
    if runnable.quant != "tiny":
        pytest.skip("shown with the tiny model")
    return workspace.make(tmp_path, GLM_TINY_PORT=str(workspace.free_port()))


def test_serves_where_there_is_no_network(
    own: Path, engine: Runtime, target: Target, ledger: Ledger
) -> None:
    if engine.name != "native":
        pytest.skip("a container's network is cut in nox -s hardening")
    if host.run([*ALONE, "true"]).status:
        pytest.skip("this user may not make a network namespace")
    expected = "it starts, answers and stops as with one"
    with ledger.trying("N1", "no network but loopback", expected=expected, target=target) as row:
        row.inputs = 1
        says = live(own, "--native", by=ALONE)
        assert says.status == 0, says
        row.found = "as expected"


def test_proxy_of_the_environment_is_not_asked_for_loopback(
    own: Path, engine: Runtime, target: Target, ledger: Ledger
) -> None:
    expected = "it starts, answers and stops as without"
    with ledger.trying("N4", "a proxy that is dead", expected=expected, target=target) as row:
        row.inputs = 1
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy")
        says = live(own, f"--{engine.name}", env=dict.fromkeys(names, DEAD))
        assert says.status == 0, says
        row.found = "as expected"


@dataclass(frozen=True)
class Far:
    """A deployment of the target that is published on all of this host's addresses, and a host."""

    there: Outside
    here: Server
    """By way of loopback."""
    server: Server
    """By way of the link to that host."""


@pytest.fixture(scope="module")
def far(
    runnable: Service, engine: Runtime, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Far]:
    folder = workspace.make(tmp_path_factory.mktemp("far"), GLM_BIND="0.0.0.0")  # noqa: S104
    project = config.load(folder, overrides={f"GLM_{runnable.quant.upper()}_PORT": ""})
    service = project.service(runnable.quant)
    keys.make(service)
    chosen = runtime.choose(project, want=engine.name)
    with outside() as there, runtime.serving(chosen, project, service) as up:
        url = f"http://{there.here}:{up.server.port}"
        yield Far(there, up.server, replace(up.server, url=url))


def reached(far: Far, address: str, *, from_there: bool) -> bool:
    """Return whether the port of the published server takes connections on an address."""

    def answers() -> bool:
        return host.answers(address, far.here.port or 0, timeout_s=2)

    return far.there.begin(answers).result() if from_there else answers()


def test_published_server_is_where_it_was_asked_to_be_and_not_on_ipv6(
    far: Far, server: Server, target: Target, ledger: Ledger, tmp_path: Path
) -> None:
    expected = "every address of IPv4 reaches it, none of IPv6; one on loopback, nobody else"
    with ledger.trying("N2", "GLM_BIND=0.0.0.0", expected=expected, target=target) as row:
        six = ["::1", far.there.here6] if far.there.here6 else []
        cells = [(address, False) for address in ("127.0.0.1", far.there.here, *six)]
        cells += [(address, True) for address in (far.there.here, *six[1:])]
        row.inputs = len(cells) + 2
        found = {cell for cell in cells if reached(far, cell[0], from_there=cell[1])}
        assert found == {cell for cell in cells if ":" not in cell[0]}
        assert far.there.begin(lambda: said(far.server)).result() == said(server)
        on_loopback = replace(far, here=server)
        assert not reached(on_loopback, far.there.here, from_there=True)
        with pytest.raises(StackError, match="must be an IPv4 address") as caught:
            config.load(workspace.make(tmp_path), given={"GLM_BIND": "::"})
        assert caught.value.code == Code.USAGE
        row.found = "as expected"


def tokens(server: Server) -> object:
    """Send a megabyte, and get several back."""
    with client.session(server, timeout_s=60) as session:
        return session.post("/tokenize", json={"content": 100_000 * "a megabyte "}).json()


SILENCE_S = 10
"""A stream says something every 2 s at least: a client need not wait longer."""


def ends(far: Far, *, tokens: int, cut: bool = False) -> list[str]:
    """Let four clients of that host ask, cut its link once all are answered, or not."""
    asking = [clients.Client(tokens, SILENCE_S) for _ in range(4)]
    answers = [far.there.begin(partial(each.ask, far.server, "hello")) for each in asking]
    if cut:
        wait_until(lambda: all(e.begun for e in asking) or None, timeout_s=60, what="not begun")
        far.there.cut()
    return [each.result().end for each in answers]


def test_narrow_link_that_the_client_does_not_know(
    far: Far, target: Target, ledger: Ledger
) -> None:
    expected = "requests and answers of megabytes, and streams, come as on loopback"
    with ledger.trying("N3", "MTU of 1280 on the way", expected=expected, target=target) as row:
        far.there.narrow(1280)
        assert far.there.begin(lambda: tokens(far.server)).result() == tokens(far.here)
        assert ends(far, tokens=64) == ["whole"] * 4
        row.inputs = 5
        row.found = "as expected"


def test_network_is_cut_in_mid_stream(far: Far, target: Target, ledger: Ledger) -> None:
    expected = (
        "clients get an error within 10 s, others right answers; slots end with their answers; the "
        "link back, it serves there"
    )
    with ledger.trying("N1", "link cut in mid-stream", expected=expected, target=target) as row:
        assert ends(far, tokens=600, cut=True) == ["cut"] * 4
        row.inputs = 4
        assert said(far.here)
        clients.wait_idle(far.here, limit_s=clients.LIMIT_S)
        far.there.cut(down=False)
        assert far.there.begin(lambda: said(far.server)).result() == said(far.here)
        row.found = "as expected"


# --- What is broken, each of which a check above must notice.


@pytest.fixture(scope="module")
def showing_more(
    engine: Runtime, runnable: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of the tiny model that shows what it can."""
    if engine.name != "native" or runnable.quant != "tiny":
        pytest.skip("shown with the tiny model, natively")
    folder = workspace.make(tmp_path_factory.mktemp("open"))
    slots, origins = 'ENDPOINT_SLOTS: "0"', "CORS_ORIGINS: localhost"
    more = f'{slots.replace("0", "1")}\n  LLAMA_ARG_ENDPOINT_PROPS: "1"'
    workspace.change(folder, "compose.yaml", slots, more)
    workspace.change(folder, "compose.yaml", origins, 'CORS_ORIGINS: "*"')
    project = config.load(folder, overrides={"GLM_TINY_PORT": ""})
    service = project.service("tiny")
    keys.make(service)
    with runtime.serving(runtime.native(project), project, service) as up:
        yield up.server


SHOWS: dict[str, tuple[Callable[..., None], dict[str, str], str]] = {
    "shows its slots": (test_unasked_routes_are_off, {"method": "GET", "path": "/slots"}, "200 in"),
    "takes other settings": (
        test_unasked_routes_are_off,
        {"method": "POST", "path": "/props"},
        "200 in",
    ),
    "answers every page": (
        test_page_of_another_origin_may_not_read_answers,
        {"method": "GET", "origin": FOREIGN[0]},
        "not in",
    ),
}


@pytest.mark.parametrize("wrong", SHOWS)
def test_server_that_shows_more_is_noticed(
    showing_more: Server, notice: Notice, wrong: str
) -> None:
    check, given, says = SHOWS[wrong]

    notice(check, f"a server that {wrong}", says=says, server=showing_more, **given)


PROXIES: dict[str, tuple[Callable[..., None], dict[str, str], int | None, str]] = {
    "no key": (test_nothing_else_opens, {"path": "/v1/models", "key": ""}, None, "200 == "),
    "a wrong key": (test_nothing_else_opens, {"path": "/v1/models", "key": "no"}, None, "200 == "),
    "a key in the address": (test_key_in_the_address_opens_nothing, {}, None, "'200' == '401'"),
    "strangers": (
        test_strangers_are_told_the_same_in_few_words,
        {"header": STRANGERS["empty"]},
        None,
        "'200' == '401'",
    ),
    "a key that is no HTTP": (test_key_with_a_line_break_is_no_request, {}, None, "'200' == "),
    "a huge key": (test_key_longer_than_a_header_may_be_is_no_request, {}, None, "'200' == "),
    "nobody": (test_key_opens, {}, 403, "403 == "),
    "nobody who asks for its health": (test_health_needs_no_key, {}, 403, "403 == "),
    "no page of this host": (test_page_of_this_host_may, {}, None, "None == "),
}


@pytest.mark.parametrize("who", PROXIES)
def test_proxy_that_lets_in_others_is_noticed(server: Server, notice: Notice, who: str) -> None:
    if server.runtime == "docker":
        pytest.skip("the proxy stands before the native server")
    check, given, status, says = PROXIES[who]

    with proxied(server, status=status) as proxy:
        notice(check, f"a proxy that lets in {who}", says=says, server=proxy, **given)


def test_published_server_that_is_none_is_noticed(server: Server, notice: Notice) -> None:
    if server.runtime == "docker":
        pytest.skip("the proxy stands before the native server")
    with proxied(server) as proxy:
        check = test_published_server_refuses_a_wrong_key_there
        notice(check, "a proxy that lets in a wrong key", says="200 == ", published=proxy)
    notice(test_published_server_is_not_on_loopback, "a server on loopback", published=server)


def test_wrong_answer_to_a_sibling_is_noticed(
    server: Server, engine: Runtime, notice: Notice
) -> None:
    if not isinstance(engine, Docker):
        pytest.skip("a native server has no sibling containers")
    other = replace(server, key="wrong")
    notice(test_sibling_container_reaches_it_by_name, "another key", says="401", server=other)
    with proxied(server, dropper(2)) as proxy:
        check = test_sibling_container_gets_the_same_answer
        notice(check, "a proxy that leaves out words", says="==", server=proxy)


UNLIKE: dict[Callable[..., None], Broken] = {
    test_key_is_changed_while_both_open: IDLE,
    test_serves_where_there_is_no_network: (
        "no loopback either",
        {"patch": {f"{__name__}.ALONE": ("unshare", "--net")}},
    ),
    test_narrow_link_that_the_client_does_not_know: (
        "an answer that changes on its way",
        {"patch": {f"{__name__}.tokens": lambda server: server.url}},
    ),
}


@pytest.mark.parametrize("check", UNLIKE, ids=lambda check: check.__name__)
@pytest.mark.usefixtures("natively", "engine")
def test_what_is_unlike_is_noticed(notice: Notice, check: Callable[..., None]) -> None:
    broken, how = UNLIKE[check]

    notice(check, broken, **how)


@pytest.mark.usefixtures("natively", "engine")
def test_proxy_of_the_environment_that_is_asked_is_noticed(own: Path, notice: Notice) -> None:
    workspace.change(own, "stack/client.py", "trust_env=False", "trust_env=True")
    check = test_proxy_of_the_environment_is_not_asked_for_loopback
    notice(check, "a client that asks it", says="status=", own=own)


def test_answers_that_differ_by_address_are_noticed(server: Server, notice: Notice) -> None:
    if server.runtime == "docker":
        pytest.skip("the proxy stands before the native server")
    check = test_published_server_says_there_what_one_on_loopback_says
    with proxied(server, dropper(3)) as proxy:
        notice(check, "a proxy that leaves out words", says="At index", server=proxy)


def test_another_address_is_noticed(published: Server, server: Server, notice: Notice) -> None:
    """A server published on the host's address, taken for one of loopback alone."""
    address = published.service.bind
    loopback = {"server": server, "port": published.port, "address": address}

    notice(
        test_loopback_server_refuses_the_hosts_address,
        "a server on the host's address",
        says="not True",
        **loopback,
    )
    notice(
        test_listens_on_the_asked_address_alone,
        "a server on the host's address",
        says=address,
        **loopback,
    )


def test_listener_on_ipv6_is_noticed(
    far: Far, server: Server, target: Target, ledger: Ledger, tmp_path: Path
) -> None:
    if not far.there.here6:
        pytest.skip("this kernel has no IPv6")
    check = test_published_server_is_where_it_was_asked_to_be_and_not_on_ipv6
    where = ("::1", far.here.port or 0)
    with (
        socket.create_server(where, family=socket.AF_INET6),
        ledger.catching(check, "somebody listens on ::1", says="::1"),
    ):
        check(far, server, target, Ledger("negative"), tmp_path)


def test_link_that_is_not_cut_is_noticed(
    far: Far, target: Target, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Outside, "cut", lambda *_, **__: None)
    check = test_network_is_cut_in_mid_stream
    with ledger.catching(check, "the link is not cut", says="whole"):
        check(far, target, Ledger("negative"))
