"""What the machine of the checks cannot show: a GPU whose memory does not come back."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stack import config, fit, runtime, switch
from stack.config import Service
from stack.errors import Code, StackError
from stack.host import Interrupts
from tests.unit.fake_nvml import FakeNvml, memory, process
from tests.workspace import ROOT

FREED = fit.Release("GPU-0", mib=28_000, free_mib=140_000)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The services that were started, on a GPU of which this process keeps 28,000 MiB."""
    held = {
        "nvmlDeviceGetMemoryInfo": memory(28_600),
        "nvmlDeviceGetComputeRunningProcesses": [process(os.getpid(), 28_000 << 20)],
    }
    FakeNvml(held).install(monkeypatch)
    monkeypatch.setattr(fit, "wait_released", partial(fit.wait_released, timeout_s=0.1))
    started: list[str] = []

    def launch(where: Any, service: Service, **_: object) -> Any:
        started.append(service.name)
        if service.name in where.failing:
            raise StackError(f"{service.name} does not fit.", "Free some memory.", Code.LOAD)
        return SimpleNamespace(ready_s=1.0)

    monkeypatch.setattr(runtime, "launch", launch)
    return started


def exchange(folder: Path, *, old_fails: bool) -> StackError:
    project = replace(config.load(ROOT), root=folder)
    where: Any = SimpleNamespace(
        name="native",
        project=project,
        stop=lambda _: True,
        failing=["glm-q4"] if old_fails else [],
    )
    old, new = (switch.Side(where, project.service(quant), "") for quant in ("q4", "q8"))
    record = switch.Record(folder / "switch.json", str(old), str(new), "now")
    with pytest.raises(StackError) as caught:
        switch.exchange(old, new, FREED, record, Interrupts(lambda: None))
    return caught.value


def test_memory_that_does_not_come_back_keeps_the_new_one_from_starting(
    started: list[str], tmp_path: Path
) -> None:
    error = exchange(tmp_path, old_fails=False)

    assert started == ["glm-q4"]
    assert error.code == Code.RESTORED
    assert f"(pid {os.getpid()}) 28,000 MiB" in error.cause


def test_and_where_the_old_one_does_not_fit_either_nothing_serves(
    started: list[str], tmp_path: Path
) -> None:
    error = exchange(tmp_path, old_fails=True)

    assert started == ["glm-q4"]
    assert error.code == Code.DARK
    assert "glm-q4 does not fit" in error.cause
