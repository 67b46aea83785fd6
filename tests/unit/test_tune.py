"""What is tried for a service, which is the best of it, and what of a command line is refused."""

from dataclasses import replace

import pytest

from bench import candidates, tune
from bench.candidates import UNTUNED, Run, Trial
from stack import config
from stack.errors import Code, StackError
from tests.workspace import ROOT


@pytest.mark.parametrize(
    ("quant", "clients", "pinned", "names"),
    [
        (
            *("q4", 4, {}),
            ["slots 8", "GPU sampling 1", "shared cache 0", "micro-batch 2048", "HTTP threads 16"],
        ),
        (
            *("q4", 16, {"GLM_SLOTS": "4", "GLM_UBATCH": "512"}),
            ["GPU sampling 1", "shared cache 0", "HTTP threads 64"],
        ),
        ("tiny", 2, {}, ["slots 2", "shared cache 0", "micro-batch 2048", "threads 2"]),
    ],
    ids=["q4", "pinned", "tiny"],
)
def test_one_setting_at_a_time_is_tried_of_those_that_are_free(
    quant: str,
    clients: int,
    pinned: dict[str, str],
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(candidates.os, "cpu_count", lambda: 2)
    service = config.load(ROOT).service(quant)

    found = candidates.candidates(service, clients, pinned)

    assert [*found] == [UNTUNED, *names]
    assert all(len(changes) == 1 for name, changes in found.items() if name != UNTUNED)


def run(clients: int, tokens_s: float, *, window_s: float = 2, good: int = 10) -> Run:
    return Run(
        clients=clients,
        tokens_s=tokens_s,
        window_s=window_s,
        ttft_ms=None,
        itl_ms=None,
        requests=10,
        good=good,
        decode_tokens_s=None,
        failed="",
        client_cpu=0,
    )


def trial(name: str, *runs: Run, failed: str = "") -> Trial:
    return Trial(
        candidate=name,
        settings={},
        round=0,
        duration_s=2,
        seconds=9,
        context=4096,
        ready_s=1,
        serves={},
        runs=runs,
        failed=failed,
    )


def test_score_is_the_geometric_mean_over_clients_of_all_runs_as_long_as_each_was() -> None:
    trials = [
        trial(UNTUNED, run(1, 100), run(4, 100)),
        trial("a", run(1, 50), run(4, 400)),
        trial("a", run(1, 100, window_s=6), run(4, 400, window_s=6)),
        trial("crashed", run(1, 900), failed="it ended"),
    ]

    found = candidates.scores(trials, (1, 4), slo=False)

    assert found == pytest.approx({"a": (87.5 * 400) ** 0.5, UNTUNED: 100})


def test_with_an_slo_only_what_meets_it_counts() -> None:
    trials = [trial(UNTUNED, run(4, 100)), trial("late", run(4, 180, good=5))]

    assert [*candidates.scores(trials, (4,), slo=True)] == [UNTUNED, "late"]
    assert [*candidates.scores(trials, (4,), slo=False)] == ["late", UNTUNED]


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ({"a": (101.9,), UNTUNED: (100,)}, (UNTUNED, 1.0)),
        ({"a": (103,), UNTUNED: (100,)}, ("a", 1.03)),
        ({"a": (150, 90), UNTUNED: (100, 100)}, (UNTUNED, 1.0)),
        ({"a": (150, 110), UNTUNED: (100, 100), "b": (110,)}, ("a", 1.3)),
        ({"a": (150, 90), UNTUNED: (100, 100), "b": (110,)}, ("b", 1.1)),
        ({"a": (50,)}, ("a", None)),
    ],
    ids=["no gain", "gain", "only once", "twice", "the next", "nothing to compare with"],
)
def test_what_is_chosen_stays_unless_another_is_better(
    rates: dict[str, tuple[float, ...]], best: tuple[str, float | None]
) -> None:
    trials = [
        replace(trial(name, run(4, rate)), round=number)
        for name, each in rates.items()
        for number, rate in enumerate(each)
    ]

    name, gain = candidates.winner(trials, (4,), slo=False)

    assert (name, gain and round(gain, 4)) == best


@pytest.mark.parametrize(
    ("scores", "joined"),
    [
        ({"a": 110, "b": 105, UNTUNED: 100, "c": 90}, {"a + b": {"A": "1", "B": "1"}}),
        ({"a": 110, "a2": 105, UNTUNED: 100}, {}),
        ({"a": 110, UNTUNED: 100, "b": 101}, {}),
        ({"a": 110, "b": 105}, {}),
        ({"a": 0, "b": 0, UNTUNED: 0}, {}),
    ],
    ids=["two", "same setting", "one", "nothing to compare with", "nothing at all"],
)
def test_changes_that_are_better_alone_are_tried_together(
    scores: dict[str, float], joined: dict[str, dict[str, str]]
) -> None:
    tried = {UNTUNED: {}, "a": {"A": "1"}, "a2": {"A": "2"}, "b": {"B": "1"}, "c": {"C": "1"}}

    assert candidates.joined(tried, scores) == joined


@pytest.mark.parametrize("shape", tune.SHAPES)
@pytest.mark.parametrize("quant", ["q4", "tiny"])
@pytest.mark.parametrize("clients", [1, 16, 64])
def test_every_shape_fits_twice_in_what_a_client_has(shape: str, quant: str, clients: int) -> None:
    service = config.load(ROOT).service(quant)
    ask = tune.parse(clients=f"1,{clients}", budget="1m", shape=shape, slo="")

    plan = tune.shaped(ask, service)

    longest = (plan.prompt.high + plan.output.high) * plan.turns
    assert 2 * longest * clients <= service.cells
    plan.check(service.context)


@pytest.mark.parametrize(
    ("budget", "seconds"), [("90", 90), ("90s", 90), ("20m", 1200), ("1.5h", 5400)]
)
def test_budget(budget: str, seconds: float) -> None:
    assert tune.parse(clients="4,1,4", budget=budget, shape="chat", slo="").budget_s == seconds


@pytest.mark.parametrize(
    "wrong",
    [
        {"clients": "0"},
        {"clients": "-1"},
        {"clients": "1,many"},
        {"clients": "257"},
        {"budget": "soon"},
        {"budget": "0m"},
        {"budget": "-5s"},
        {"budget": "5d"},
        {"shape": "odd"},
        {"slo": "fast"},
    ],
    ids=lambda wrong: " ".join(*wrong.items()),
)
def test_senseless_words_are_refused(wrong: dict[str, str]) -> None:
    words = {"clients": "1,4", "budget": "1m", "shape": "chat", "slo": ""}

    with pytest.raises(StackError) as caught:
        tune.parse(**{**words, **wrong})

    assert caught.value.code == Code.USAGE
