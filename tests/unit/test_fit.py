"""What a GPU has free now, and will have once another server has stopped."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from stack import config, fit, gguf_header, models, runtime
from stack.config import Service
from stack.errors import Code, StackError
from stack.gguf_header import Header
from stack.host import Process
from stack.server import Server
from tests.unit.fake_nvml import FakeNvml, memory, process
from tests.workspace import ROOT

TOTAL_MIB = 143771
Q4_MIB, Q8_MIB = 28_000, 45_000
"""About what they take at the full context."""
MEMORY = "nvmlDeviceGetMemoryInfo"
PROCESSES = "nvmlDeviceGetComputeRunningProcesses"
SERVER = Process(4321, 1)

Install = Callable[..., FakeNvml]
Pair = tuple[Service, Header]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    def install(used_mib: Any, *held: Any) -> FakeNvml:
        answer = used_mib if callable(used_mib) else memory(used_mib)
        return FakeNvml({MEMORY: answer, PROCESSES: list(held)}).install(monkeypatch)

    return install


@pytest.fixture(scope="module")
def q8() -> Pair:
    service = replace(config.load(ROOT).service("q8"), gpus=("GPU-0",))
    return service, gguf_header.parse(models.plan(service.model.random).header)


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A running server, whose file is a stand-in, all zeros but its header."""
    service = replace(config.load(ROOT).service("q4"), gpus=("GPU-0",))
    head = models.plan(service.model.random)
    folder = tmp_path_factory.mktemp("models")
    file = folder / service.model.path.name
    file.write_bytes(head.header)
    os.truncate(file, gguf_header.parse(head.header).size_bytes)
    mounts = {service.model.path.parent: folder}
    return Server("native", replace(service, mounts=mounts), "", key="", processes=(SERVER,))


def test_what_the_old_one_holds_counts_as_free(install: Install, q4: Server, q8: Pair) -> None:
    install(TOTAL_MIB - 30_000, process(SERVER.pid, Q4_MIB << 20))

    with pytest.raises(StackError, match="30,000 MiB are free") as caught:
        fit.check(*q8)
    fit.check(*q8, freed=fit.release(q4))

    assert caught.value.code == Code.VRAM


def test_what_a_stranger_holds_does_not_and_is_named(
    install: Install, q4: Server, q8: Pair
) -> None:
    install(TOTAL_MIB - 1_000, process(SERVER.pid, Q4_MIB << 20), process(os.getpid(), 50 << 30))

    with pytest.raises(StackError, match=rf"29,000 MiB are free.*\(pid {os.getpid()}\)") as caught:
        fit.check(*q8, freed=fit.release(q4))

    assert caught.value.code == Code.VRAM


def test_memory_that_comes_back_is_awaited(install: Install, q4: Server) -> None:
    used: Iterator[int] = iter([Q4_MIB + 600, Q4_MIB + 600, 20_000, 600])
    install(lambda: memory(next(used, 600)), process(SERVER.pid, Q4_MIB << 20))
    expected = fit.release(q4)

    assert expected
    fit.wait_released(expected)


def test_memory_that_never_comes_back_is_told_with_who_holds_it(
    install: Install, q4: Server
) -> None:
    install(Q4_MIB + 600, process(SERVER.pid, Q4_MIB << 20))
    expected = fit.release(q4)
    install(Q4_MIB + 600, process(os.getpid(), Q4_MIB << 20))

    assert expected
    with pytest.raises(StackError, match=r"28,000 MiB were not released within 0\.2 s") as caught:
        fit.wait_released(expected, timeout_s=0.2)

    assert f"(pid {os.getpid()}) 28,000 MiB" in caught.value.cause
    assert caught.value.code == Code.VRAM


def test_hidden_memory_is_planned(install: Install, q4: Server) -> None:
    install(Q4_MIB + 600, process(SERVER.pid, None))
    expected = fit.release(q4)

    assert expected
    assert expected.mib == pytest.approx(Q4_MIB, rel=0.1)


def test_two_loads_onto_one_gpu_are_refused(install: Install, q8: Pair) -> None:
    install(600)
    service, _ = q8

    with (
        runtime.reserved(service),
        pytest.raises(StackError, match=f"load onto GPU 0 is at work.*pid {os.getpid()}") as caught,
        runtime.reserved(service),
    ):
        pass

    assert caught.value.code == Code.BUSY


def test_settings_are_chosen_from_what_is_free(install: Install, q8: Pair) -> None:
    install(TOTAL_MIB - 100_000)
    project = config.load(ROOT, given={"GLM_CLIENTS": "2", "GLM_UBATCH": "256"})

    service = replace(project.service("q8"), gpus=("GPU-0",))

    chosen = fit.choose(project, service, q8[1])
    less = fit.choose(project, service, q8[1], leave_mib=45_000)

    assert chosen is not None
    assert less is not None
    assert (chosen.service.slots, chosen.service.context, chosen.service.private) == (
        2,
        202752,
        True,
    )
    assert chosen.service.environment["LLAMA_ARG_UBATCH"] == "256"
    assert "2 clients" in str(chosen)
    assert (less.total_mib or 0) <= 55_000 - 1024


def test_nothing_is_chosen_without_a_gpu(q8: Pair) -> None:
    tiny = config.load(ROOT).service("tiny")

    assert fit.choose(config.load(ROOT), tiny, q8[1], profiled=False) is None


def test_what_cannot_be_chosen_names_who_holds_the_gpu(install: Install, q8: Pair) -> None:
    install(TOTAL_MIB - 20_000, process(os.getpid(), 50 << 30))

    with pytest.raises(
        StackError, match=rf"no room for 4 clients.*\(pid {os.getpid()}\)"
    ) as caught:
        fit.choose(config.load(ROOT), *q8)

    assert caught.value.code == Code.VRAM
