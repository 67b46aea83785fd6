import math

import pytest

from bench import stats
from tests.unit import hand_made


@pytest.mark.parametrize(("name", "floor"), stats.FLOORS.items(), ids=stats.FLOORS)
def test_percentile_needs_two_samples_beyond_it_with_99_percent_confidence(
    name: str, floor: int
) -> None:
    below = int(name[1:]) / 100

    def fewer_than_two(count: int) -> float:
        return below**count + count * (1 - below) * below ** (count - 1)

    assert fewer_than_two(floor) <= 0.01 < fewer_than_two(floor - 1)


@pytest.mark.parametrize(("name", "floor"), stats.FLOORS.items(), ids=stats.FLOORS)
def test_percentile_below_its_floor_is_blank(name: str, floor: int) -> None:
    enough, few = (stats.spread(range(count)).percentiles[name] for count in (floor, floor - 1))

    assert (enough is None, few is None) == (False, True)


def test_percentile_is_the_nearest_rank() -> None:
    spread = stats.spread(range(1, 1001))

    assert list(spread.percentiles.values()) == [500, 900, 950, 990]


def test_failures_are_infinite_in_the_tail_and_absent_from_the_percentiles() -> None:
    spread = stats.spread(range(1, 81), failures=20)

    assert (spread.percentiles["p90"], spread.tail["p50"], spread.tail["p90"]) == (72, 50, math.inf)


def test_failures_count_towards_the_floor_of_the_tail_alone() -> None:
    spread = stats.spread([1.0] * 10, failures=1)

    assert (spread.p50, spread.tail["p50"]) == (None, 1.0)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_the_published_one(
    successes: int, count: int, low: float, high: float
) -> None:
    """Against Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    found = stats.wilson(successes, count)

    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_of_nothing_is_everything() -> None:
    assert (stats.wilson(0, 0).low, stats.wilson(0, 0).high) == (0, 1)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (30, 2.042), (120, 1.980)],
)
def test_student_quantile_is_the_table_s(freedom: int, quantile: float) -> None:
    assert stats.student_t(freedom) == pytest.approx(quantile, abs=5e-4)


def test_mean_of_repeats_has_student_s_interval() -> None:
    found = stats.mean([9, 10, 11])

    assert (found.low, found.high) == pytest.approx((10 - 2.484, 10 + 2.484), abs=1e-3)


def test_one_repeat_proves_nothing() -> None:
    assert stats.mean([5]) == stats.Interval(5, -math.inf, math.inf)


def test_ratio_of_equal_samples_is_one_and_certain() -> None:
    assert stats.ratio([3, 3, 3], [3, 3, 3]) == stats.Interval(1, 1, 1)


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_interval_of_a_ratio_holds_the_truth_95_times_in_100(repeats: int) -> None:
    rng = hand_made.rng(repeats)

    def measure(truth: float) -> list[float]:
        return [truth * rng.lognormvariate(0, 0.03) for _ in range(repeats)]

    found = [stats.ratio(measure(110), measure(100)) for _ in range(2000)]

    assert sum(each.low <= 1.1 <= each.high for each in found) == pytest.approx(1900, abs=30)


@pytest.mark.parametrize(
    ("shares", "index"), [([5, 5, 5, 5], 1), ([7, 0, 0, 0], 0.25), ([1, 3], 0.8), ([], None)]
)
def test_jain_s_index(shares: list[float], index: float | None) -> None:
    assert stats.jain(shares) == index
