from dataclasses import dataclass
from functools import cache

import pytest

from stack import choice, config, gguf_header, models
from stack.config import Settings
from stack.errors import Code, StackError
from stack.gguf_header import Header
from tests.workspace import ROOT

FULL = 202752
GB = 1e9 / (1 << 20)


@cache
def header(quant: str) -> Header:
    recipe = config.load(ROOT).service(quant).model.random
    return gguf_header.parse(models.plan(recipe).header)


def choose(
    quant: str, card_gb: float, clients: int, pinned: Settings | None = None
) -> choice.Choice:
    pinned = pinned or {}

    free_mib = int(card_gb * GB)
    service = config.load(ROOT, overrides=pinned).service(quant)
    return choice.choose(service, header(quant), free_mib=free_mib, clients=clients, pinned=pinned)


@dataclass(frozen=True)
class Case:
    """What is chosen for a card, in GB that are free, and clients."""

    quant: str
    card_gb: float
    clients: int
    cache: str
    context: int


# On cards of 24 to 141 GB: `docs/memory.md` has what fits at most.
CASES = [
    Case("q4", 97.8, 1, "private", FULL),
    Case("q4", 97.8, 4, "private", FULL),
    Case("q4", 97.8, 8, "private", 174_080),
    Case("q4", 97.8, 16, "private", 87_808),
    Case("q4", 97.8, 64, "private", 21_760),
    Case("q8", 97.8, 4, "private", FULL),
    Case("q8", 97.8, 64, "private", 16_896),
    Case("q4", 24, 1, "private", 78_848),
    Case("q4", 24, 4, "shared", 78_848),
    Case("q4", 32, 4, "shared", FULL),
    Case("q4", 48, 4, "private", 128_000),
    Case("q8", 48, 4, "shared", FULL),
    Case("q8", 80, 4, "private", 196_864),
    Case("q4", 141, 16, "private", 140_288),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.quant}-{c.card_gb}-{c.clients}")
def test_choice(case: Case) -> None:
    chosen = choose(case.quant, case.card_gb, case.clients)

    service = chosen.service
    assert (service.private, service.slots) == (case.cache == "private", case.clients)
    assert service.context == pytest.approx(case.context, rel=0.04)
    assert (chosen.total_mib or 0) <= case.card_gb * GB - 1024
    assert service.environment["LLAMA_ARG_UBATCH"] == "2048"
    assert service.environment["LLAMA_ARG_BACKEND_SAMPLING"] == "1"


@pytest.mark.parametrize(
    "pinned",
    [
        {"GLM_SLOTS": "7"},
        {"GLM_CONTEXT": "65536"},
        {"GLM_SHARED_CACHE": "1"},
        {"GLM_UBATCH": "512"},
        {"GLM_GPU_SAMPLING": "0"},
        {"GLM_CONTEXT": "65536", "GLM_SLOTS": "2", "GLM_SHARED_CACHE": "0", "GLM_UBATCH": "256"},
    ],
    ids=" ".join,
)
def test_what_is_pinned_stays(pinned: dict[str, str]) -> None:
    chosen = choose("q4", 97.8, 4, pinned)

    environment = chosen.service.environment
    names = {
        "GLM_SLOTS": "N_PARALLEL",
        "GLM_CONTEXT": "CTX_SIZE",
        "GLM_SHARED_CACHE": "KV_UNIFIED",
        "GLM_UBATCH": "UBATCH",
        "GLM_GPU_SAMPLING": "BACKEND_SAMPLING",
    }
    assert {name: environment[f"LLAMA_ARG_{names[name]}"] for name in pinned} == pinned
    assert not set(pinned) & set(chosen.service.chosen)


def test_too_many_clients_are_refused_with_the_most_that_the_card_holds() -> None:
    with pytest.raises(StackError, match="no room for 80 clients") as caught:
        choose("q4", 32, 80)

    assert caught.value.code == Code.VRAM
    most = int(caught.value.remedy.split()[3].rstrip(","))
    assert choose("q4", 32, most).clients == most
    with pytest.raises(StackError):
        choose("q4", 32, most + 1)


def test_a_model_that_does_not_fit_is_refused_for_one_client_too() -> None:
    with pytest.raises(StackError, match="no room") as caught:
        choose("q8", 32, 1)

    assert caught.value.code == Code.VRAM
    assert "smaller quant" in caught.value.remedy


def test_a_pinned_context_that_does_not_fit_is_refused_with_the_largest() -> None:
    with pytest.raises(StackError, match="needs") as caught:
        choose("q8", 48, 4, {"GLM_CONTEXT": "811008", "GLM_SHARED_CACHE": "0"})

    assert caught.value.code == Code.VRAM
    assert "GLM_CONTEXT=" in caught.value.remedy
