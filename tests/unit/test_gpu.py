import threading
import time
from collections.abc import Callable
from dataclasses import astuple, replace
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from stack import config, gpu
from stack.config import Service
from stack.errors import Code, StackError
from stack.wait import wait_until
from tests.unit.fake_nvml import LOST, NO_DRIVER, UNKNOWN, UNSUPPORTED, FakeNvml, memory, process
from tests.workspace import ROOT

Install = Callable[..., FakeNvml]
MEMORY = "nvmlDeviceGetMemoryInfo"
MIG = "nvmlDeviceGetMigMode"
MODE = "nvmlDeviceGetComputeMode"
PROCESSES = "nvmlDeviceGetComputeRunningProcesses"
THROTTLE = "nvmlDeviceGetCurrentClocksEventReasons"
OLD = {"nvmlSystemGetDriverVersion": "570.86.15"}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    return lambda *gpus, **machine: FakeNvml(*gpus, **machine).install(monkeypatch)


@pytest.fixture(scope="module")
def service() -> Service:
    return replace(config.load(ROOT).service("q4"), gpus=("GPU-0",))


def test_every_figure_is_told_in_its_unit(install: Install) -> None:
    install({PROCESSES: [process(7, 1)]})

    _, *figures = astuple(gpu.gpus()[0])

    assert figures[:10] == [143771, 143171, 600, 0, 345, 3201, 76.5, 1234.5, 31, ()]
    assert figures[10:14] == [0, "GPU-0", "NVIDIA H200", "90a-real"]
    assert figures[14:] == ["580.159.04", "13.2", None, (7,)]


@pytest.mark.parametrize("answer", [UNSUPPORTED, 2**32 - 1], ids=["unsupported", "sentinel"])
@pytest.mark.parametrize(
    ("call", "field"),
    [
        (MEMORY, "used_mib"),
        ("nvmlDeviceGetUtilizationRates", "utilisation_percent"),
        ("nvmlDeviceGetClockInfo", "sm_mhz"),
        ("nvmlDeviceGetPowerUsage", "power_w"),
        ("nvmlDeviceGetTotalEnergyConsumption", "energy_j"),
        (THROTTLE, "throttle"),
        (MODE, "mode"),
    ],
)
def test_figure_that_nvml_lacks_is_none(
    install: Install, call: str, field: str, answer: object
) -> None:
    install({call: answer})

    assert getattr(gpu.gpus()[0], field) is None


@pytest.mark.parametrize(("major", "name"), [(8, "89-real"), (9, "99a-real"), (12, "129a-real")])
def test_architecture_is_native_code_alone(install: Install, major: int, name: str) -> None:
    install({"nvmlDeviceGetCudaComputeCapability": (major, 9)})

    assert gpu.architectures() == name


def test_only_limits_of_performance_count_as_throttling(install: Install) -> None:
    install({THROTTLE: pynvml.nvmlClocksEventReasonAll})

    words = "sw power cap, hw slowdown, sw thermal slowdown, hw thermal slowdown, hw power brake"
    assert gpu.gpus()[0].throttle == tuple(words.split(", "))


def test_lost_gpu_hides_no_other(install: Install) -> None:
    nvml = install({MEMORY: LOST}, {})

    assert [each.uuid for each in gpu.gpus()] == ["GPU-1"]
    assert nvml.opened == 0


@pytest.mark.parametrize(
    ("answer", "words"), [(LOST, "does not answer (GPU is lost)"), (memory(1), "None")]
)
def test_only_a_lost_gpu_is_said_to_be_lost(install: Install, answer: Any, words: str) -> None:
    install({MEMORY: answer})

    assert words in str(gpu.lost("0"))


def test_processes_are_charged_with_what_exactly_they_hold(install: Install) -> None:
    install({PROCESSES: [process(7, 3 << 19), process(8, 3 << 19), process(9, 1 << 40)]})

    assert gpu.used_by([7, 8, 1], "GPU-0") == 3


@pytest.mark.parametrize(
    "answer",
    [[process(7, None)], [process(7, 0)], [process(8, 1 << 20)], UNSUPPORTED],
    ids=["wsl", "zero", "foreign", "unsupported"],
)
def test_hidden_use_is_none(install: Install, answer: object) -> None:
    install({PROCESSES: answer})

    assert gpu.used_by([7], "GPU-0") is None


@pytest.mark.parametrize(
    ("machine", "cause"),
    [
        (FakeNvml(nvmlInit=NO_DRIVER), r"needs GPU GPU-0; .* no NVIDIA GPU .*Library Not Found"),
        (FakeNvml(), "needs GPU GPU-0; this machine has no NVIDIA GPU"),
        (FakeNvml({"nvmlDeviceGetUUID": "GPU-7"}), r"0 NVIDIA H200 GPU-7 \(143,171 MiB free\)"),
        (FakeNvml({MEMORY: LOST}), r"has 0, which does not answer \(GPU is lost\)"),
        (FakeNvml({}, {}), "needs a choice of GPU; .* 0 .* GPU-0 .*, 1 .* GPU-1"),
        (FakeNvml({MODE: 2}), "GPU-0 is in prohibited mode"),
        (FakeNvml({MODE: 3, PROCESSES: [process(7, 1)]}), "exclusive-process .* by process 7"),
        (FakeNvml({MIG: [1, 1]}), "GPU-0 is in MIG mode"),
        (FakeNvml({}, **OLD), r"driver 570\.86\.15 < 580 required by CUDA 13\.0"),
    ],
    ids=["driver", "gpu", "wrong", "lost", "choice", "prohibited", "exclusive", "mig", "old"],
)
def test_unfit_gpu_is_refused_with_what_is_there(
    monkeypatch: pytest.MonkeyPatch, service: Service, machine: FakeNvml, cause: str
) -> None:
    machine.install(monkeypatch)

    with pytest.raises(StackError, match=cause) as caught:
        gpu.require(service, chosen=False, toolkit="13.0")

    assert caught.value.code == Code.HOST


@pytest.mark.parametrize("wanted", ["1", "GPU-1"])
def test_chosen_gpu_is_returned(install: Install, service: Service, wanted: str) -> None:
    install({MODE: 2}, {MODE: 3}, **OLD)

    (found,) = gpu.require(replace(service, gpus=(wanted,)), toolkit="12.8")

    assert found.uuid == "GPU-1"


def test_service_without_gpu_asks_nothing(install: Install, service: Service) -> None:
    install(nvmlInit=AssertionError())

    assert gpu.require(replace(service, gpus=()), chosen=False) == ()


def in_turn(*answers: Any) -> Callable[[], Any]:
    """Answer with each, then with the last for ever."""
    coming = chain(answers, repeat(answers[-1]))

    def answer() -> Any:
        if isinstance(value := next(coming), Exception):
            raise value
        return value

    return answer


def wait_for(sampler: gpu.Sampler, number: int) -> None:
    what = f"there are not {number} readings"
    wait_until(lambda: len(sampler.readings) >= number or None, timeout_s=5, what=what)


def test_peak_is_exact_to_one_sample(install: Install) -> None:
    nvml = install({MEMORY: in_turn(*map(memory, (600, 29153, 601)))})

    with gpu.Sampler("GPU-0", hertz=1000) as sampler:
        wait_for(sampler, 3)

    assert (sampler.peak_mib, nvml.opened) == (29153, 0)


def test_readings_enclose_the_block_and_may_have_no_peak(install: Install) -> None:
    install({MEMORY: UNSUPPORTED})

    with gpu.Sampler("GPU-0") as sampler:
        now_s = time.monotonic()

    assert sampler.start_s <= now_s <= sampler.end_s
    assert sampler.peak_mib is None


@pytest.mark.parametrize("error", [LOST, UNKNOWN], ids=["lost", "unknown"])
@pytest.mark.parametrize("before", [[], [memory(600)]], ids=["at once", "mid-way"])
def test_loss_is_raised(install: Install, before: list[Any], error: Exception) -> None:
    install({MEMORY: in_turn(*before, error)})

    with pytest.raises(StackError, match=f"GPU-0 was lost: {error}"), gpu.Sampler("GPU-0"):
        pass


def test_interrupt_is_not_replaced_by_a_loss(install: Install) -> None:
    install({MEMORY: in_turn(memory(600), LOST)})

    with pytest.raises(KeyboardInterrupt), gpu.Sampler("GPU-0"):
        raise KeyboardInterrupt


def test_silent_driver_is_given_up(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_PATIENCE_S", 0.05)
    released = threading.Event()
    install({MEMORY: lambda: released.wait(5) and memory(600)})

    with pytest.raises(StackError, match="does not answer"), gpu.Sampler("GPU-0"):
        pass

    released.set()


class Clock(threading.Event):
    """Stands still but for what a wait or a reading costs."""

    now_s = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.now_s += timeout or 0
        return self.is_set()

    def read(self, cost_s: float) -> Any:
        self.now_s += cost_s
        return memory(600)


def test_slow_readings_do_not_shift_the_schedule(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, cost_s = Clock(), in_turn(0, 0.25, 1.25, 0)
    install({MEMORY: lambda: clock.read(cost_s())})
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    sampler = gpu.Sampler("GPU-0", hertz=2)
    monkeypatch.setattr(sampler, "_ending", clock)

    with sampler:
        wait_for(sampler, 5)

    assert [each.time_s for each in sampler.readings[:5]] == [0, 0.5, 1, 2.5, 3]


@pytest.mark.parametrize(("cuda", "driver"), [("13.3.1", 580), ("12.8", 525)])
def test_toolkit_names_its_driver(cuda: str, driver: int) -> None:
    assert gpu.driver_for(cuda) == driver
