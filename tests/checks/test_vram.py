"""The memory that a server takes of its GPU is the planned one, and comes back."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from bench import vram
from bench.vram import Together, Vram
from stack import config, gpu, runtime
from stack.config import Project, Service
from stack.runtime import Runtime
from tests import workspace
from tests.checks.conftest import Notice

TOLERANCE = 0.05
FLOOR_TOKENS_S = 30
"""Slower than any GPU that holds the model, faster than its CPU."""


@pytest.fixture(scope="session")
def measured(
    runnable: Service, engine: Runtime, project: Project, request: pytest.FixtureRequest
) -> Vram:
    """The target's memory from before its start to after its end."""
    if not runnable.gpus:
        pytest.skip(f"{runnable.name} uses no GPU")
    found = vram.measure(engine, project, runnable)
    keep(request, project, runnable, runtime=engine.name, **asdict(found))
    return found


def keep(
    request: pytest.FixtureRequest, project: Project, service: Service, **figures: object
) -> None:
    """Write what was measured to the folder of --evidence, with what it was measured on."""
    folder = request.config.option.evidence
    if not folder:
        return
    (device,) = gpu.require(service)
    record = {
        "schema": 1,
        "gpu": device.name,
        "gpu_total_mib": device.total_mib,
        "driver": device.driver,
        "cuda_driver": device.cuda,
        "engine_build": f"b{project.engine.build} {project.engine.commit}",
        **figures,
    }
    name = f"vram-{figures['quant']}-{device.name.replace(' ', '-').lower()}.json"
    (folder / name).write_text(json.dumps(record, indent=1) + "\n")


def test_plan_from_the_header_is_within_5_percent(measured: Vram) -> None:
    assert measured.planned_mib == pytest.approx(measured.loaded_mib, rel=TOLERANCE)


def test_engines_own_figures_explain_all_but_5_percent(measured: Vram) -> None:
    assert 0 <= measured.unexplained_mib <= TOLERANCE * measured.loaded_mib


def test_peak_is_within_the_budget(measured: Vram, service: Service) -> None:
    assert measured.peak_mib <= (service.model.vram_mib or 0)


def test_largest_prompt_was_read_whole(measured: Vram) -> None:
    assert measured.prefill_tokens == measured.context - vram.PREFILL_LEFT


def test_all_layers_are_on_the_gpu(measured: Vram) -> None:
    assert measured.engine["layers"] == measured.engine["layers_total"] > 0


def test_decodes_like_a_gpu(measured: Vram) -> None:
    assert measured.decode_tokens_s > FLOOR_TOKENS_S


def test_memory_comes_back(measured: Vram) -> None:
    assert measured.released_mib <= vram.RELEASED_MIB
    assert measured.released_s <= vram.RELEASE_LIMIT_S


def test_quants_together_take_the_sum_of_their_plans(
    engine: Runtime, project: Project, service: Service, request: pytest.FixtureRequest
) -> None:
    """Once for each runtime, with the last of the quants that can run here."""
    services = [each for each in project.services.values() if each.gpus and here(each)]
    if len(services) < 2 or service != services[-1]:
        pytest.skip("it is no second quant on this GPU")

    found = vram.together(engine, project, services)

    quants = "-".join(found.planned)
    keep(request, project, service, quant=quants, runtime=engine.name, **asdict(found))
    assert sum(found.planned.values()) == pytest.approx(found.loaded_mib, rel=TOLERANCE)


def here(service: Service) -> bool:
    return service.model_file.exists()


# --- What is wrong in a record of a real run, each of which a check above must notice.

_RESULTS = workspace.ROOT / "bench" / "results"
_READ = json.loads((_RESULTS / "vram-q4-nvidia-h200.json").read_text())
RECORDED = {each.name: _READ[each.name] for each in fields(Vram)}
WRONG: dict[Callable[..., None], tuple[str, dict[str, Any], str]] = {
    test_plan_from_the_header_is_within_5_percent: (
        "a plan of no cache",
        {"planned": {**RECORDED["planned"], "cache_mib": 0}},
        "== 27868 ±",
    ),
    test_engines_own_figures_explain_all_but_5_percent: (
        "an engine that forgot its cache",
        {"engine": {**RECORDED["engine"], "cache_mib": 0}},
        "<= ",
    ),
    test_peak_is_within_the_budget: ("a peak of 30 GiB", {"load_peak_mib": 30720}, "30720 <= "),
    test_largest_prompt_was_read_whole: ("half a prompt", {"prefill_tokens": 101344}, "101344 =="),
    test_all_layers_are_on_the_gpu: (
        "a layer on the CPU",
        {"engine": {**RECORDED["engine"], "layers": 47}},
        "47 == 48",
    ),
    test_decodes_like_a_gpu: ("3 tokens/s", {"decode_tokens_s": 3}, "3 > 30"),
    test_memory_comes_back: ("1 GiB kept", {"released_mib": 1024}, "1024 <= 256"),
}


@pytest.mark.parametrize("check", WRONG, ids=lambda check: check.__name__)
def test_wrong_figures_are_noticed(notice: Notice, check: Callable[..., None]) -> None:
    broken, figures, says = WRONG[check]
    measured = Vram(**{**RECORDED, **figures})
    service = config.load(workspace.ROOT).service("q4")

    notice(check, f"a record with {broken}", says=says, measured=measured, service=service)


def test_more_than_the_sum_is_noticed(notice: Notice, tmp_path: Path) -> None:
    project = config.load(workspace.make(tmp_path))
    services = [each for each in project.services.values() if each.gpus]
    together = json.loads((_RESULTS / "vram-q4-q8-nvidia-h200.json").read_text())
    found = Together(**{each.name: together[each.name] for each in fields(Together)})
    more = replace(found, loaded_mib=2 * found.loaded_mib)

    notice(
        test_quants_together_take_the_sum_of_their_plans,
        "a record with twice the memory",
        says="==",
        patch={f"{__name__}.here": lambda _: True, "bench.vram.together": lambda *_: more},
        engine=runtime.native(project),
        project=project,
        service=services[-1],
    )
