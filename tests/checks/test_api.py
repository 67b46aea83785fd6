"""The server answers as `docs/openapi.yaml` says, to what that allows and to what it does not.

Schemathesis makes the requests of the description, from a fixed seed: the same in each run.
"""

import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import pytest
import requests
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from schemathesis import Case, GenerationMode, Response, checks

from stack import client
from stack.server import Server
from stack.wait import wait_until
from tests import hostile
from tests.checks.conftest import Notice, Target
from tests.checks.test_network import PROTECTED
from tests.ledger import Ledger
from tests.workspace import ROOT

DESCRIPTION = ROOT / "docs" / "openapi.yaml"
EXAMPLES = 60
"""Of each route, of each kind."""
LIMIT_S = 30
IDLE_S = 5
ALLOWED, OTHER = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
ROUTES = {
    "/health": "",
    "/v1/models": "",
    "/props": "",
    "/metrics": "",
    "/v1/chat/completions": "200 400 401 500",
    "/v1/completions": "200 400 401 500",
    "/tokenize": "200 401 500",
    "/apply-template": "200 400 401 500",
}
"""What comes of requests that the description does not allow, where it could forbid any."""
KNOWN = {
    r"^\[json\.exception\.parse_error": hostile.PARSE,
    r"^(Failed to parse (tools|messages|tool call)|\[json\.exception\.type_error)": hostile.TYPES,
}
"""What the engine says with 500, and what is known of that."""
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
schemathesis.deserializer("text/plain")(lambda _, response: response.text)
ALLOWED_CHECKS = [*CHECKS, checks.positive_data_acceptance, checks.ignored_auth]


def test_every_route_described_is_tried_and_none_but_health_is_open() -> None:
    paths = yaml.safe_load(DESCRIPTION.read_text())["paths"]

    assert set(paths) == set(ROUTES)
    assert {path for path, how in paths.items() if how.get("get", {}).get("security") == []} == {
        "/health"
    }
    assert set(ROUTES) - {"/health"} <= set(PROTECTED)


def described() -> dict[str, Any]:
    """Return the description, with requests that are soon answered."""
    raw: dict[str, Any] = yaml.safe_load(DESCRIPTION.read_text())
    schemas = raw["components"]["schemas"]
    schemas["Sampling"] |= {"required": ["max_tokens"]}
    schemas["Sampling"]["properties"]["max_tokens"]["maximum"] = 8
    arguments = schemas["ToolCall"]["properties"]["function"]["properties"]["arguments"]
    arguments["pattern"] = r'^\{("[a-z]{1,8}": [1-9][0-9]{0,7})?\}$'  # its text is JSON
    return raw


def reason(response: Response) -> str:
    """Return what is known of a server's own error, which nothing else may be."""
    message = response.json()["error"]["message"]
    known = [why for said, why in KNOWN.items() if re.search(said, message)]
    assert known, f"an unknown {response.status_code}: {message[:200]}"
    return known[0]


def try_route(
    server: Server, raw: dict[str, Any], path: str, mode: GenerationMode
) -> tuple[list[int], set[str]]:
    """Send a route's requests; return the statuses, and what is known of its own errors.

    Raises AssertionError, or a FailureGroup of Schemathesis', at the first that is not answered as
    described.
    """
    schema = schemathesis.openapi.from_dict(raw)
    schema.config.update(base_url=server.url)
    statuses, why = [], set()
    session = requests.Session()
    session.trust_env = False
    headers = {"Authorization": f"Bearer {server.key}"}

    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(schema[path]["get" if not ROUTES[path] else "post"].as_strategy(generation_mode=mode))
    def send(case: Case[Any]) -> None:
        body: Any = case.body
        if mode is ALLOWED and isinstance(body, dict) and "messages" in body:
            assume(body["messages"][-1]["role"] != "assistant")
        response = case.call(session=session, headers=headers, timeout=LIMIT_S)
        statuses.append(response.status_code)
        if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            why.add(reason(response))
        case.validate_response(
            response,
            ALLOWED_CHECKS if mode is ALLOWED else CHECKS,
            transport_kwargs={"session": session},
            headers=headers,
        )

    with session:
        send()
    return statuses, why


def unharmed(server: Server) -> None:
    """Hold that the server lives, has no request left, and generates."""
    assert server.ended() is None
    wait_until(
        lambda: client.requests(server) == 0 or None, timeout_s=IDLE_S, what="a slot is still busy"
    )
    assert client.complete(server, "Hello", tokens=4).tokens == 4


@pytest.mark.parametrize("path", ROUTES)
def test_what_the_description_allows_is_answered_as_it_says(
    server: Server, target: Target, ledger: Ledger, path: str
) -> None:
    expected = "answered as docs/openapi.yaml says; without the key 401"
    with ledger.trying("R9", f"{path}: as described", expected=expected, target=target) as row:
        statuses, _ = try_route(server, described(), path, ALLOWED)
        unharmed(server)
        row.inputs, row.found = len(statuses), "as expected"


@pytest.mark.parametrize("path", [path for path, found in ROUTES.items() if found])
def test_what_it_does_not_allow_harms_nobody(
    server: Server, target: Target, ledger: Ledger, path: str
) -> None:
    expected = "refused with 4xx, or answered, as docs/openapi.yaml says; server lives"
    with ledger.trying("R9", f"{path}: not as described", expected=expected, target=target) as row:
        statuses, why = try_route(server, described(), path, OTHER)
        unharmed(server)
        row.inputs, row.why = len(statuses), "; ".join(sorted(why))
        row.found = " ".join(map(str, sorted(set(statuses))))
        assert row.found == ROUTES[path], "other statuses than recorded here"


def put(raw: dict[str, Any], where: str, value: object) -> None:
    """Set a field of the description, or take it out where the value is None."""
    *path, last = where.split("|")
    for name in path:
        raw = raw[int(name) if name.isdecimal() and isinstance(raw, list) else name]
    if value is None:
        del raw[last]
    else:
        raw[last] = value


@dataclass(frozen=True)
class Flaw:
    """What is wrong in a description: a field, its value (None: it is left out), what is said."""

    name: str
    path: str
    where: str
    value: object
    says: str
    mode: GenerationMode = ALLOWED


FLAWS = (
    Flaw(
        "a field of another type",
        "/props",
        "components|schemas|Props|properties|total_slots",
        {"type": "string"},
        'is not of type "string"',
    ),
    Flaw(
        "a field that never comes",
        "/apply-template",
        "components|schemas|Prompt|required",
        ["prompt", "tokens"],
        '"tokens" is a required property',
    ),
    Flaw(
        "another text of the counters",
        "/metrics",
        "paths|/metrics|get|responses|200|content|text/plain|schema|pattern",
        "^tokens ",
        "does not match",
    ),
    Flaw(
        "other events of a stream",
        "/v1/chat/completions",
        "components|schemas|ChatChunk|allOf|1|properties|object",
        {"const": "chat.chunk"},
        "SSE event violates schema",
    ),
    Flaw(
        "another last event of a stream",
        "/v1/completions",
        "paths|/v1/completions|post|responses|200|content|text/event-stream|schema|contains",
        {"properties": {"data": {"const": "[END]"}}},
        "SSE stream violates schema",
    ),
    Flaw(
        "no word of a refusal",
        "/v1/chat/completions",
        "paths|/v1/chat/completions|post|responses|400",
        None,
        "Undocumented status code",
        mode=OTHER,
    ),
    Flaw(
        "another content type",
        "/health",
        "paths|/health|get|responses|200|content",
        {"text/html": {}},
        "Undocumented Content-Type",
    ),
    Flaw(
        "a key for what needs none",
        "/health",
        "paths|/health|get|security",
        [{"key": []}],
        "(?i)authentication",
    ),
    Flaw(
        "a request that is refused",
        "/v1/completions",
        "components|schemas|Sampling|properties|n",
        {"type": "integer", "minimum": 5, "maximum": 9},
        "Valid data should have been accepted",
    ),
)


@pytest.mark.parametrize("flaw", FLAWS, ids=lambda flaw: flaw.name)
def test_wrong_description_is_noticed(
    server: Server, target: Target, ledger: Ledger, flaw: Flaw
) -> None:
    if target.runtime == "docker":
        pytest.skip("shown on one runtime's server")
    raw = described()
    put(raw, flaw.where, flaw.value)
    check = (
        test_what_the_description_allows_is_answered_as_it_says
        if flaw.mode is ALLOWED
        else test_what_it_does_not_allow_harms_nobody
    )
    with ledger.catching(check, f"the description has {flaw.name}", says=flaw.says):
        try_route(server, raw, flaw.path, flaw.mode)


def test_unknown_error_of_the_server_is_noticed(
    server: Server, target: Target, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target.runtime == "docker":
        pytest.skip("shown on one runtime's server")
    monkeypatch.setattr("tests.checks.test_api.KNOWN", {})
    with ledger.catching(
        test_what_it_does_not_allow_harms_nobody, "no error is known", says="an unknown 500"
    ):
        try_route(server, described(), "/tokenize", OTHER)


def test_route_that_is_not_tried_is_noticed(
    notice: Notice, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target.runtime == "docker":
        pytest.skip("shown once")
    monkeypatch.delitem(ROUTES, "/props")

    notice(
        test_every_route_described_is_tried_and_none_but_health_is_open,
        "a route that is not tried",
        says="/props",
    )
