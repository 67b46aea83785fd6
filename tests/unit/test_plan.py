from dataclasses import replace
from functools import cache

import pytest

from stack import config, gguf_header, models, plan
from stack.config import Service
from stack.errors import Code, StackError
from stack.gguf_header import Header
from tests.workspace import ROOT

FULL = 202752
PRIVATE = {"KV_UNIFIED": "0"}
EIGHT = PRIVATE | {"CTX_SIZE": f"{8 * FULL}", "N_PARALLEL": "8"}
Q4, Q8 = "full-q4_k", "full-q8_0"

# Process VRAM by NVML on one H200, CUDA 13.0: recipe, the file's GB where it was an older mix,
# settings, MiB. RUNTIME_MIB is from the first two; an older file's embedding is taken as today's.
MEASURED = {
    "q4": (Q4, 0, {}, 27_868),
    "q8": (Q8, 0, {}, 44_282),
    "older-q4": (Q4, 18.85, {}, 29_153),
    "older-q4-q8_0-cache": (Q4, 18.85, {"CACHE_TYPE_K": "q8_0"}, 24_475),
    "older-q4-16-slots": (Q4, 18.85, {"N_PARALLEL": "16"}, 29_073),
    "older-q4-64-slots": (Q4, 18.85, {"N_PARALLEL": "64"}, 29_485),
    "older-q8": (Q8, 33.2, {}, 42_687),
    "four-private": (Q4, 18.85, PRIVATE | {"CTX_SIZE": f"{4 * FULL}"}, 60_565),
    "eight-private": (Q4, 18.85, EIGHT, 102_441),
}

# MiB of compute buffer that the engine (llama_context with no_alloc, on the CPU) plans where, as in
# the server, outputs are as many as slots.
PLANNED = [
    ({}, 280.0),
    ({"UBATCH": "128"}, 70.0),
    ({"UBATCH": "2048"}, 1120.0),
    ({"CTX_SIZE": "8192"}, 90.0),
    ({"CTX_SIZE": "8192", "N_PARALLEL": "256"}, 169.4),  # the logits: estimated without the norms
    ({"CACHE_TYPE_K": "f32"}, 693.6),
    (PRIVATE | {"N_PARALLEL": "64"}, 85.3),
    (PRIVATE | {"CTX_SIZE": f"{4 * FULL}"}, 280.0),
    (PRIVATE | {"CTX_SIZE": f"{4 * FULL}", "CACHE_TYPE_K": "f32"}, 1955.9),
]


@cache
def header(recipe: str = Q4, file_gb: float = 0) -> Header:
    made = gguf_header.parse(models.plan(recipe).header)
    embedding = made.tensors["token_embd.weight"]
    older = {"token_embd.weight": embedding, "output.weight": int(file_gb * 1e9) - embedding}
    return replace(made, tensors=older) if file_gb else made


def service(**settings: str) -> Service:
    defaults = {"GLM_CONTEXT": f"{FULL}", "GLM_SLOTS": "4", "GLM_GPU": "0"}
    found = config.load(ROOT, overrides=defaults).service("q4")
    changed = {f"LLAMA_ARG_{name}": value for name, value in settings.items()}
    return replace(found, environment={**found.environment, **changed})


@pytest.mark.parametrize(("recipe", "file_gb", "settings", "mib"), MEASURED.values(), ids=MEASURED)
def test_plan_from_the_header_is_what_was_measured(
    recipe: str, file_gb: float, settings: dict[str, str], mib: int
) -> None:
    total_mib = plan.ledger(service(**settings), header(recipe, file_gb)).total_mib
    assert total_mib == pytest.approx(mib, rel=0.015)


@pytest.mark.parametrize(("settings", "mib"), PLANNED)
def test_compute_buffer_is_what_the_engine_plans(settings: dict[str, str], mib: float) -> None:
    compute_mib = plan.ledger(service(**settings), header()).compute_mib
    assert compute_mib == pytest.approx(mib, abs=18)


@pytest.mark.parametrize(
    ("settings", "cells"),
    [({}, FULL), ({"CTX_SIZE": "1025"}, 1280), (PRIVATE | {"CTX_SIZE": "1025"}, 4 * 512)],
)
def test_a_token_of_the_cache_is_54144_bytes(settings: dict[str, str], cells: int) -> None:
    cache_mib = plan.ledger(service(**settings), header()).cache_mib
    assert cache_mib == pytest.approx(cells * 54_144 / plan.MIB, abs=1)


def test_a_tied_embedding_is_on_the_gpu() -> None:
    tied = replace(header(), tensors={"token_embd.weight": 7 * plan.MIB})
    assert plan.ledger(service(), tied).weights_mib == 7


@pytest.mark.parametrize(("settings", "step"), [({}, 256), (PRIVATE, 1024)])
def test_no_larger_context_leaves_a_gibibyte(settings: dict[str, str], step: int) -> None:
    largest = plan.largest_context(service(**settings), header(), 25_000, 4)
    asked = [service(CTX_SIZE=f"{context}", **settings) for context in (largest, largest + step)]
    fitting, next_one = [plan.ledger(each, header()).total_mib for each in asked]
    assert fitting <= 25_000 - 1024 < next_one


@pytest.mark.parametrize(("settings", "largest"), [({}, FULL), (PRIVATE, 8 * FULL)])
def test_no_slot_gets_more_than_the_models_context(settings: dict[str, str], largest: int) -> None:
    assert plan.largest_context(service(**settings), header(), 1 << 20, 8) == largest


@pytest.mark.parametrize(("free_mib", "remedy"), [(20_000, "=33536 fits"), (17_000, "No context")])
def test_what_does_not_fit_is_refused_with_what_does(free_mib: int, remedy: str) -> None:
    with pytest.raises(StackError, match=f"{free_mib:,} MiB are free on GPU 0") as caught:
        plan.fits(plan.ledger(service(), header()), free_mib)
    assert remedy in caught.value.remedy
    assert caught.value.code == Code.VRAM


def test_what_just_fits_is_not_refused() -> None:
    ledger = plan.ledger(service(), header())
    plan.fits(ledger, ledger.total_mib)


@pytest.mark.parametrize("context", [-1, 0, FULL + 1])
def test_a_context_that_no_slot_can_have_is_refused(context: int) -> None:
    with pytest.raises(StackError, match=f"{context:,} tokens") as caught:
        plan.check_context(service(CTX_SIZE=f"{context}"), header())
    assert caught.value.code == Code.USAGE


@pytest.mark.parametrize("settings", [{"CTX_SIZE": "1"}, {}, EIGHT])
def test_a_context_within_the_models_is_taken(settings: dict[str, str]) -> None:
    plan.check_context(service(**settings), header())


@pytest.mark.parametrize(("kind", "cause"), [("q3_k", "type 'q3_k'"), ("f16", "no key deepseek2.")])
def test_a_cache_or_a_model_without_a_known_plan_is_refused(kind: str, cause: str) -> None:
    with pytest.raises(StackError, match=cause) as caught:
        plan.ledger(service(CACHE_TYPE_K=kind), replace(header(), keys={}))
    assert caught.value.code == Code.USAGE


def test_the_capacity_card_shows_the_largest_contexts() -> None:
    rows = {row.slots: row.context for row in plan.capacity(header(), [24])}
    private = plan.largest_context(service(**PRIVATE), header(), int(24e9) >> 20, 2)
    assert rows[0] == plan.largest_context(service(), header(), int(24e9) >> 20, 4)
    assert rows[2] == private // 2
