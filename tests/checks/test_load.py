"""The server that came up is the one that is configured, and it works."""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import answers
from bench.answers import Score
from stack import client, config, gpu, keys, runtime
from stack.compose import NoEngineError
from stack.config import Service
from stack.runtime import Runtime
from stack.server import Server
from tests import workspace
from tests.checks.conftest import Notice
from tests.proxy import dropper, proxied

TRIES = 5
"""The best of them counts, since this machine may have other things to do."""
FIRST_TOKEN_MS = 50
TOKENS_S = 200
OPEN = ("Hello", "The code of", "Monday tiger maple", "the 7 + a")
"""Nobody taught what follows: many tokens are likely, and small errors of arithmetic show."""


def test_serves_the_configured_model(server: Server) -> None:
    (served,) = client.models(server)["data"]

    assert served["id"] == server.service.alias


def test_serves_the_configured_file(server: Server) -> None:
    path = client.props(server)["model_path"]

    assert path.rpartition("/")[2] == server.service.model.path.name


def test_has_the_configured_context_in_each_slot(server: Server) -> None:
    context = client.props(server)["default_generation_settings"]["n_ctx"]

    assert context == server.service.context


def test_has_the_configured_slots(server: Server) -> None:
    assert client.props(server)["total_slots"] == server.service.slots


def test_same_seed_gives_same_text(server: Server) -> None:
    first, second = (
        client.complete(server, "Once upon a time", tokens=32, seed=7, temperature=1)
        for _ in range(2)
    )

    assert first.tokens == 32
    assert first.text == second.text


def test_another_seed_gives_another_text(server: Server) -> None:
    first, second = (
        client.complete(server, "Once upon a time", tokens=32, seed=seed, temperature=1)
        for seed in (7, 8)
    )

    assert first.text != second.text


def test_runs_on_the_intended_device(server: Server) -> None:
    if not server.processes:
        pytest.skip("an attached server's processes are out of reach")
    on_gpu = {pid for each in gpu.gpus() for pid in each.pids}

    holds = any(process.pid in on_gpu for process in server.processes)
    assert holds == bool(server.service.gpus)


def test_fixed_questions_are_answered_right(server: Server, recorded: Mapping[str, Score]) -> None:
    asked = answers.short_set(server.service, each=4, seed=2)

    replies = answers.ask(server, asked, clients=server.service.slots)

    found = answers.scores(replies, exactly=answers.taught(server.service))
    assert answers.regressed(found, recorded) == []


def greedy(server: Server) -> list[str]:
    """Return what a server says, greedily, to questions and to openings that nobody taught."""
    asked = answers.short_set(server.service, each=2, seed=3)
    opened = [client.complete(server, text, tokens=24).text for text in OPEN]
    return [*opened, *(str(reply.said) for reply in answers.ask(server, asked))]


def own_texts(chosen: Runtime, service: Service, folder: Path, *, starts: int = 1) -> list[str]:
    """Return the texts of each start of a deployment of our own of the same service."""
    folder.mkdir()
    project = config.load(
        workspace.make(folder), overrides={f"GLM_{service.quant.upper()}_PORT": ""}
    )
    again = project.service(service.quant)
    keys.make(again)
    here = runtime.choose(project, want=chosen.name)
    found: list[str] = []
    for _ in range(starts):
        with runtime.serving(here, project, again) as up:
            found += greedy(up.server)
    return found


def test_same_answers_after_a_restart(
    server: Server, engine: Runtime, runnable: Service, tmp_path: Path
) -> None:
    before = greedy(server)

    assert own_texts(engine, runnable, tmp_path / "own", starts=2) == before + before


def test_native_says_what_docker_says(
    server: Server, runnable: Service, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if server.runtime != "native" or request.config.option.runtime:
        pytest.skip("compared once, where both runtimes are checked")
    project = config.load(workspace.ROOT)
    try:
        docker = runtime.choose(project, want="docker")
    except NoEngineError as error:
        pytest.skip(error.cause)

    assert own_texts(docker, runnable, tmp_path / "docker") == greedy(server)


def test_one_client_is_served_fast(server: Server, tell: Callable[[str], None]) -> None:
    """As its client measures it: from the request to the first piece, and over all tokens."""
    if server.service.gpus or not answers.taught(server.service):
        pytest.skip("the target is that of the tiny model on two CPU cores")
    waits, rates = [], []
    for at in range(TRIES):
        begun = time.perf_counter()
        next(client.stream(server, f"What is {10 + at} + {20 + at}?", tokens=8))
        waits.append(1000 * (time.perf_counter() - begun))
        begun = time.perf_counter()
        done = client.complete(server, f"Repeat: {at}", tokens=256)
        rates.append(done.tokens / (time.perf_counter() - begun))

    tell(
        f"{server.runtime}: first token after {min(waits):.1f} ms ({max(waits):.1f} at the worst), "
        f"{max(rates):.0f} tokens/s ({min(rates):.0f}), one client, best of {TRIES}"
    )
    assert min(waits) <= FIRST_TOKEN_MS
    assert max(rates) >= TOKENS_S


# --- What is broken, each of which a check above must notice.


@pytest.fixture(scope="module")
def another(
    engine: Runtime, runnable: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of other settings than the service that it is taken for."""
    if runnable.quant != "tiny":
        pytest.skip("shown with the tiny model")
    settings = {"GLM_TINY_FILE": "tiny-f16.gguf", "GLM_TINY_SLOTS": "2"}
    folder = workspace.make(tmp_path_factory.mktemp("another"), **settings)
    workspace.change(folder, "compose.yaml", "ALIAS: glm-4.7-flash-tiny", "ALIAS: other")
    workspace.change(folder, "compose.yaml", 'CTX_SIZE: "8192"', 'CTX_SIZE: "4096"')
    project = config.load(folder, overrides={"GLM_TINY_PORT": ""})
    service = project.service("tiny")
    keys.make(service)
    with runtime.serving(runtime.choose(project, want=engine.name), project, service) as up:
        yield replace(up.server, service=replace(runnable, gpus=("0",)))


SETTINGS: dict[Callable[[Server], None], tuple[str, str]] = {
    test_serves_the_configured_model: ("another name", "'other' == 'glm-4.7-flash-tiny'"),
    test_serves_the_configured_file: ("another file", "'tiny-f16.gguf' == 'tiny.gguf'"),
    test_has_the_configured_context_in_each_slot: ("half the context", "4096 == 8192"),
    test_has_the_configured_slots: ("half the slots", "2 == 4"),
    test_runs_on_the_intended_device: ("the CPU for a GPU", "False == True"),
}


@pytest.mark.parametrize("check", SETTINGS, ids=lambda check: check.__name__)
def test_other_settings_are_noticed(
    another: Server, notice: Notice, check: Callable[[Server], None]
) -> None:
    broken, says = SETTINGS[check]

    notice(check, f"a server with {broken}", says=says, server=another)


def seeds(*each: int) -> Callable[[bytes], bytes]:
    """Make requests ask for these seeds in turn, whatever they say."""
    turn = itertools.cycle(each)
    return lambda body: json.dumps({**json.loads(body), "seed": next(turn)}).encode()


def late(body: bytes) -> bytes:
    time.sleep(2 * FIRST_TOKEN_MS / 1000)
    return body


PROXIES: dict[Callable[..., None], tuple[str, dict[str, Any], str]] = {
    test_same_seed_gives_same_text: ("another seed each time", {"asked": seeds(1, 2)}, "assert '"),
    test_another_seed_gives_another_text: ("one seed for all", {"asked": seeds(1)}, "assert '"),
    test_fixed_questions_are_answered_right: (
        "every tenth word left out",
        {"change": dropper(10)},
        r"== \[\]",
    ),
    test_same_answers_after_a_restart: (
        "answers of before with words left out",
        {"change": dropper(10)},
        "At index",
    ),
    test_native_says_what_docker_says: (
        "native answers with words left out",
        {"change": dropper(10)},
        "At index",
    ),
    test_one_client_is_served_fast: ("a delay before each request", {"asked": late}, "<= 50"),
}


@pytest.mark.parametrize("check", PROXIES, ids=lambda check: check.__name__)
@pytest.mark.usefixtures("natively")
def test_what_a_proxy_breaks_is_noticed(
    server: Server, notice: Notice, check: Callable[..., None]
) -> None:
    broken, changes, says = PROXIES[check]

    with proxied(server, **changes) as proxy:
        notice(check, f"a proxy: {broken}", says=says, server=proxy, tell=str)
