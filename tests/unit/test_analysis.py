"""What a run says, against runs whose truth is arithmetic."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from bench import analysis
from bench.records import Record
from bench.verdict import Slo
from tests.unit import hand_made
from tests.unit.hand_made import MS, analysed, failure, record, run, stream

PATTERN = [250, 400, 100, 400, 100]


def test_pattern_of_gaps_is_found_in_every_latency() -> None:
    point = analysed(stream(PATTERN, until=20_000), ended=20_000)

    assert (point.ttft.p50, point.icl.mean, point.tpot.p50, point.e2e.p50) == (250, 250, 250, 1250)


def test_gaps_are_divided_among_the_tokens_of_their_read() -> None:
    answers = [record([100, 30, 80], at=180 * n + 1, tokens=[2, 1, 4]) for n in range(20)]

    point = analysed([replace(r, scheduled_ns=r.sent_ns) for r in answers], ended=4000)

    assert (point.itl.count, point.itl.mean, point.icl.mean) == pytest.approx((100, 22, 55))


def test_read_without_a_token_leaves_its_time_to_the_next() -> None:
    point = analysed([record([10, 7, 8], tokens=[1, 0, 1])], ended=100)

    assert (point.icl.count, point.itl.count, point.itl.mean) == (2, 1, 15)


@pytest.mark.parametrize(("tokens", "usage"), [([3], 3), ([2, 0], 2), ([1], 1)])
def test_tpot_of_an_answer_in_one_read_is_undefined(tokens: list[int], usage: int) -> None:
    answer = record([50] * len(tokens), tokens=tokens, output_tokens=usage)

    assert analysis.tpot_ms(answer) is None


def test_tpot_counts_as_the_server_does() -> None:
    assert analysis.tpot_ms(record([50, 20, 20], output_tokens=5)) == 10


def test_steady_window_is_from_the_last_client_s_begin_to_the_first_one_s_end() -> None:
    answers = [record([1], at=100 * n, client=n, end_ns=(9000 + 50 * n) * MS) for n in range(10)]

    inside = analysis.window(run(answers, ended=10_000, clients=10))

    assert (inside.begin_ns, inside.end_ns) == (900 * MS, 9000 * MS)


def test_steady_window_allows_one_client_in_twenty_to_be_away() -> None:
    answers = [record([1], client=n, end_ns=9000 * MS) for n in range(20)]
    answers[0] = replace(answers[0], end_ns=4000 * MS)

    assert analysis.window(run(answers, ended=9000, clients=20)).end_ns == 9000 * MS


def test_steady_window_begins_after_the_warm_up() -> None:
    answers = stream(PATTERN, until=20_000)

    assert analysis.window(run(answers, ended=20_000, warm_ns=3000 * MS)).begin_ns == 3000 * MS


@pytest.mark.parametrize(("pause", "begin"), [(20, 0), (1000, 5000)])
def test_steady_window_spans_turnarounds_but_no_hole(pause: int, begin: int) -> None:
    answers = [record([1], end_ns=4000 * MS)]
    answers += [record([1], at=at, end_ns=(at + 5000) * MS) for at in (4000 + pause, 9000 + pause)]

    inside = analysis.window(run(answers, ended=14_000 + pause))

    assert (inside.begin_ns, inside.end_ns) == (begin * MS, (14_000 + pause) * MS)


def test_run_that_never_fills_has_an_empty_window_and_no_figures() -> None:
    point = analysed(stream(PATTERN, until=5000), ended=5000, clients=2)

    assert (point.window_s, point.tokens_s, point.itl.mean, point.requests) == (0, 0, None, 0)


def test_run_without_an_answer_says_nothing_instead_of_failing() -> None:
    point = analysed([], ended=1000)

    assert (point.tokens_s, point.exact, point.cached, point.wait_ratio) == (0, None, None, None)


def test_throughput_of_streams_that_decode_throughout_is_streams_over_itl() -> None:
    answers = [record([20] * 1000, at=7 * n, client=n) for n in range(8)]

    point = analysed(answers, ended=15_003, clients=8, warm_ns=1009 * MS)

    assert point.tokens_s == pytest.approx(8 * 1000 / 20, rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_throughput_is_never_above_streams_over_itl(seed: int) -> None:
    rng = hand_made.rng(seed)
    answers = [
        answer
        for client in range(4)
        for answer in stream(
            [rng.uniform(20, 60), *[20] * 30], until=3000, client=client, at=rng.uniform(0, 20)
        )
    ]

    point = analysed(answers, ended=3000, clients=4, warm_ns=rng.randrange(20, 2900) * MS)

    assert 0 < point.tokens_s <= 4 * 1000 / 20 * (1 + 1e-9)


def test_throughput_is_what_was_made_over_a_window_of_whole_answers() -> None:
    point = analysed(stream([200, *[20] * 40], until=20_000), ended=20_000)

    assert point.tokens_s == pytest.approx(41 / 1.0, rel=1e-9)


def test_requests_are_counted_by_their_ends_inside_the_window() -> None:
    point = analysed(stream(PATTERN, until=20_000), ended=20_000, warm_ns=1000 * MS)

    assert (point.requests, point.requests_s) == pytest.approx((16, 16 / 19))


def test_little_s_law_holds_where_latency_hides_nothing() -> None:
    assert hand_made.point().little == 0


def test_little_s_law_shows_what_latency_hides() -> None:
    answers = [record(PATTERN, at=1500 * n, tail=250) for n in range(20)]

    assert analysed(answers, ended=30_000).little == pytest.approx(250 / 1500)


def test_concurrency_is_the_time_in_flight() -> None:
    answers = [record([960], at=1000 * n) for n in range(10)]

    assert analysed(answers, ended=9960).concurrency == pytest.approx(9600 / 9960)


@pytest.fixture
def mixed() -> list[Record]:
    """Twelve answers in turn: seven good, two slow to begin, two slow to go on, one failed."""
    gaps = [[100, 20]] * 7 + [[501, 20]] * 2 + [[100, 31]] * 2
    answers = [record(each, at=1000 * n) for n, each in enumerate(gaps)]
    return [*answers, failure(at=11_000), record([100, 20], at=12_000, cut=True)]


def test_goodput_counts_answers_within_both_limits_and_leaves_out_the_cut(
    mixed: list[Record],
) -> None:
    point = analysed(mixed, ended=12_500, rate=1.0, arrivals="constant")

    assert (point.good, point.requests, point.failed, point.cut) == (7, 12, 1, 1)


def test_goodput_is_by_the_second(mixed: list[Record]) -> None:
    point = analysed(mixed, ended=12_500, rate=1.0, arrivals="constant")

    assert point.goodput_s == 7 / 12.5


def test_answer_in_one_read_is_judged_by_its_ttft_alone() -> None:
    assert analysis.meets(record([100], tokens=[5]), Slo())


def test_open_loop_is_judged_from_when_the_request_was_due() -> None:
    late = record([100, 20], at=1000, scheduled_ns=500 * MS)

    assert (analysis.meets(late, Slo()), analysis.meets(late, Slo(), scheduled=True)) == (1, 0)


@pytest.mark.parametrize(("rate", "good"), [(None, 1), (1.0, 0)], ids=["closed", "open"])
def test_goodput_of_an_open_loop_counts_the_wait_before_sending(
    rate: float | None, good: int
) -> None:
    late = record([100, 20], at=1000, scheduled_ns=500 * MS)

    assert analysed([late], ended=1120, rate=rate).good == good


def test_failures_are_named_and_timed() -> None:
    answers = [failure("busy", at=300), failure("busy", at=400), failure("refused", at=500)]

    point = analysed(answers, ended=1000, rate=1.0)

    assert (point.errors, point.first_error_s) == ({"busy": 2, "refused": 1}, 0.31)


def test_failure_that_ends_the_steady_state_is_counted() -> None:
    answers = [record([100, 20] * 5, at=600 * n) for n in range(10)]
    later = [failure(at=6010), *(record([100, 20], at=7000 + 120 * n) for n in range(5))]

    point = analysed([failure(at=10), *answers, *later], ended=7600, warm_ns=100 * MS)

    assert (point.failed, point.requests) == (1, 11)


def test_every_failure_of_a_server_that_only_fails_is_counted() -> None:
    point = analysed([failure(at=510 * n) for n in range(10)], ended=5100)

    assert (point.requests, point.failed, point.good) == (10, 10, 0)


def test_failures_are_infinite_in_the_tails() -> None:
    answers = [record([100, 20], at=200 * n) for n in range(11)]
    failed = [failure(at=2300 + 20 * n) for n in range(12)]

    point = analysed([*answers, *failed], ended=3000, rate=1.0)

    assert (point.ttft.p50, point.ttft.tail["p50"], point.tpot.tail["p50"]) == (
        100,
        math.inf,
        math.inf,
    )


def test_ttft_of_a_cut_request_counts_since_it_was_seen() -> None:
    assert analysed([record([100, 20], cut=True)], ended=110).ttft.mean == 100


def test_frozen_server_shows_in_the_ttft_from_schedule_and_not_in_that_from_sending() -> None:
    # One stream, 10 requests a second; at 5 s the server freezes for 1 s and then catches up.
    free, answers = 0.0, []
    for n in range(700):
        sent = max(free, 100 * n)
        gaps = [1020 if 5000 <= sent < 5100 else 20, 20]
        free = sent + sum(gaps)
        answers.append(record(gaps, at=sent, scheduled_ns=100 * n * MS))

    point = analysed(answers, ended=70_000, rate=10.0, arrivals="constant")

    assert point.ttft.percentiles["p99"] == 20
    assert (point.ttft_scheduled.percentiles["p99"] or 0) > 500


def split() -> Record:
    return record([300, 20], headers_ns=100 * MS, timings={"prompt_ms": 199, "predicted_ms": 19})


def test_ttft_is_split_into_queue_and_prefill_by_the_headers() -> None:
    point = analysed([split()], ended=1000)

    assert (point.queue.mean, point.prefill.mean) == (100, 200)


def test_residuals_are_what_the_server_s_timings_leave_over() -> None:
    point = analysed([split()], ended=1000)

    assert (point.prefill_residual.mean, point.decode_residual.mean) == (1, 1)


@pytest.mark.parametrize("headers_ms", [0, 300], ids=["at once", "with the first token"])
def test_headers_that_do_not_mark_the_slot_s_begin_split_nothing(headers_ms: int) -> None:
    point = analysed([replace(split(), headers_ns=headers_ms * MS)], ended=1000)

    assert (point.queue.mean, point.prefill.mean, point.prefill_residual.mean) == (None,) * 3


def test_server_without_timings_splits_nothing() -> None:
    assert analysed([replace(split(), timings={})], ended=1000).queue.mean is None


def test_first_answer_token_may_come_after_reasoning() -> None:
    assert analysed([record([100] * 5, answer_ns=400 * MS)], ended=1000).ttfa.mean == 400


def test_tokens_seen_are_held_against_usage() -> None:
    point = analysed([record([10] * 90, output_tokens=100)], ended=1000)

    assert point.usage_error == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("told", "error"),
    [(100, 0.05), (105, 0), (121, 0), (130, -9 / 130)],
    ids=["fewer", "all", "some for the cut one", "more"],
)
def test_tokens_seen_are_held_against_the_server_s_total(told: int, error: float) -> None:
    answers = [
        record([10] * 90, output_tokens=100),
        record([10] * 5, at=901, cut=True, output_tokens=None),
        record([], at=950, cut=True, client=-1, output_tokens=None),
    ]

    point = analysis.analyse(run(answers, ended=1000), Slo(), server_tokens=told)

    assert point.metrics_error == pytest.approx(error)


def test_share_of_exact_tokens() -> None:
    answers = [record([10] * 30), record([10] * 10, at=300, exact=False)]

    assert analysed(answers, ended=400).exact == 0.75


def test_share_of_cached_prompt_tokens() -> None:
    answers = [
        record([10], prompt_tokens=300, cached_tokens=200),
        record([10], at=10, prompt_tokens=100),
    ]

    point = analysed(answers, ended=100)

    assert (point.cached, point.prompt_tokens_s) == pytest.approx((0.5, 200 / 0.02))


def test_fairness_counts_a_client_that_got_nothing() -> None:
    answers = [
        record([10] * 50),
        record([500], client=1, tokens=[50]),
        failure(client=2, lasts=500),
    ]
    starved = record([], client=3, end_ns=500 * MS, cut=True, output_tokens=None)

    point = analysed([*answers, starved], ended=500, clients=4)

    assert (point.fairness, point.wait_ratio) == pytest.approx((0.5, 50))


def test_stalls_are_gaps_above_five_medians() -> None:
    assert analysed([record([10] * 91 + [51] * 10)], ended=2000).stalls == pytest.approx(0.1)


def test_gap_of_exactly_five_medians_is_no_stall() -> None:
    assert analysed([record([10] * 91 + [50] * 10)], ended=2000).stalls == 0


def test_share_of_reads_that_held_several_events() -> None:
    answer = record([10, 10, 10, 10])
    reads = (*answer.reads[:3], answer.reads[3]._replace(events=2, tokens=2))

    assert analysed([replace(answer, reads=reads)], ended=100).coalesced == 0.25


def test_client_is_busy_by_its_cpu_time_over_the_run() -> None:
    assert analysed([], ended=2000, cpu_s=1.5).client_cpu == 0.75


def test_lag_is_the_99th_percentile_inside_the_window() -> None:
    lags = [1000 * MS] * 100 + [n * MS for n in range(1, 101)] + [1000 * MS]

    point = analysed(
        stream(PATTERN, until=2000), ended=2000, warm_ns=1000 * MS, lags_ns=tuple(lags)
    )

    assert point.lag_p99 == 99


def test_request_that_never_got_a_stream_has_no_place_among_those_sent_late() -> None:
    sent = record([10, 10], at=100, scheduled_ns=99 * MS)
    unsent = record([], at=200, scheduled_ns=0, client=-1, cut=True, output_tokens=None)

    assert analysed([sent, unsent], ended=200, rate=1.0).client_queue.mean == 1


def test_backlog_that_grows_is_overload() -> None:
    answers = [record([10] * 2, at=10 * n, scheduled_ns=5 * n * MS, tail=0) for n in range(1000)]

    assert analysed(answers, ended=5000, rate=200.0, arrivals="constant").overloaded


@pytest.mark.parametrize(("end", "overloaded"), [(10, False), (12, True)])
def test_few_arrivals_that_bunch_are_no_overload(end: int, overloaded: bool) -> None:
    point = replace(hand_made.point(), rate=1.0, due=40, backlog=(2, end))

    assert point.overloaded == overloaded


def test_backlog_of_poisson_arrivals_is_no_overload() -> None:
    rng, at, answers = hand_made.rng(1), 0.0, []
    for _ in range(2000):
        at += rng.expovariate(1 / 5)
        answers.append(record([50, 50], at=at))

    assert not analysed(answers, ended=at - 5, rate=200.0, arrivals="poisson").overloaded


def test_histogram_holds_every_token_in_bins_of_one_width() -> None:
    rng = hand_made.rng(1)
    point = analysed([record([rng.lognormvariate(3, 1) for _ in range(500)])], ended=100_000)

    bounds = [bound for bound, _ in point.itl_histogram]
    assert sum(count for _, count in point.itl_histogram) == point.itl.count
    assert {round(b / a, 9) for a, b in pairwise(bounds)} == {round(10**0.025, 9)}


def test_time_line_adds_up_to_tokens_and_time_in_flight() -> None:
    answers = [r for n in range(4) for r in stream(PATTERN, until=20_000, client=n)]
    point = analysed(answers, ended=20_000, clients=4)

    width_s = point.timeline[1].at_s
    assert sum(piece.tokens_s for piece in point.timeline) * width_s == pytest.approx(
        sum(len(r.reads) for r in answers)
    )
    assert sum(piece.in_flight for piece in point.timeline) * width_s == pytest.approx(80)


def test_time_line_shows_who_waits_for_a_first_token() -> None:
    point = analysed([record([500, 500])], ended=1000)

    assert [round(piece.waiting, 6) for piece in point.timeline] == [1] * 5 + [0] * 5


def test_tokens_of_a_second_of_time_are_those_stamped_in_it() -> None:
    answer = record([100, 100], tokens=[1, 9])

    assert [piece.tokens_s for piece in analysed([answer], ended=300).timeline] == [0, 10, 90]
