"""The engine's benchmarks are read strictly: what is not a figure is an error, never zero."""

import json

import pytest

from bench import ceiling
from stack import config
from stack.errors import Code, StackError
from tests.workspace import ROOT


def row(pl: int, t_pp: float, t_tg: float) -> str:
    return json.dumps({"pp": 100, "tg": 50, "pl": pl, "t_pp": t_pp, "t_tg": t_tg})


def test_rates_are_medians_of_the_repeats_at_each_number_of_streams() -> None:
    lines = [row(4, 1, 2), row(1, 0.5, 1), row(1, 0.5, 9), row(1, 0.25, 1), ""]

    one, four = ceiling.parse_batched("\n".join(lines))

    assert (one.streams, one.prefill_tokens_s, one.decode_tokens_s) == (1, 200, 50)
    assert one.whole_tokens_s == pytest.approx(50 / 1.5)
    assert (four.prefill_tokens_s, four.decode_tokens_s) == (400, 100)
    assert four.whole_tokens_s == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    "stdout",
    [row(1, 1, 0), '{"pl": 1}', row(1, 1, 1) + "\nerror", "[1]"],
    ids=["no time", "no figures", "words between", "a list"],
)
def test_what_is_no_figure_is_refused(stdout: str) -> None:
    with pytest.raises(StackError, match=r"llama-batched-bench gave no figures") as caught:
        ceiling.parse_batched(stdout)

    assert caught.value.code == Code.VERIFY


def test_nothing_fitted() -> None:
    assert ceiling.parse_batched("\n") == ()


PREFILL = {"n_prompt": 128, "n_gen": 0, "avg_ts": 8325.8, "stddev_ts": 17.3}
DECODE = {"n_prompt": 0, "n_gen": 64, "avg_ts": 3799.1, "stddev_ts": 124.3}


def test_single_stream_is_prefill_then_decode() -> None:
    found = ceiling.parse_single(json.dumps([PREFILL, DECODE]))

    assert (found.prefill_tokens_s, found.prefill_deviation) == (8325.8, 17.3)
    assert (found.decode_tokens_s, found.decode_deviation) == (3799.1, 124.3)


@pytest.mark.parametrize("tests", [[DECODE, PREFILL], [PREFILL], []])
def test_other_tests_than_asked_are_refused(tests: list[dict[str, float]]) -> None:
    with pytest.raises(StackError, match="llama-bench gave no figures"):
        ceiling.parse_single(json.dumps(tests))


def test_settings_become_options_of_the_benchmark_that_reads_no_environment() -> None:
    environment = {**config.load(ROOT).service("q4").environment, "LLAMA_ARG_UBATCH": "2048"}

    options = list(ceiling.options(environment))

    pairs = dict(zip(options[::2], options[1::2], strict=True))
    assert pairs["--ubatch-size"] == "2048"
    assert (pairs["--device"], pairs["--n-gpu-layers"]) == ("CUDA0", "99")
    assert pairs["--model"].startswith("/app/models/")
