"""The server that came up is the one that is configured, and it works."""

import pytest

from stack import client, gpu
from stack.server import Server


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
