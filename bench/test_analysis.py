"""How long it takes to analyse a run, compare two tests and write the report."""

from dataclasses import replace

from pytest_benchmark.fixture import BenchmarkFixture

from bench import analysis, report, results
from bench.verdict import Slo
from tests.unit import hand_made


def test_analysis_of_100_000_tokens(benchmark: BenchmarkFixture) -> None:
    records = [
        record
        for client in range(64)
        for record in hand_made.stream([200, *[20] * 127], until=32_000, client=client)
    ]
    run = hand_made.run(records, ended=32_000, clients=64, warm_ns=2000 * hand_made.MS)

    point = benchmark(analysis.analyse, run, Slo())

    assert point.itl.count > 80_000


def test_comparison_of_seven_loads(benchmark: BenchmarkFixture) -> None:
    point = hand_made.point()
    points = [replace(point, clients=1 << n) for n in range(7) for _ in range(3)]
    summary = hand_made.summary(points)

    changes = benchmark(results.compare, summary, summary)

    assert {each.verdict for each in changes} == {"same"}


def test_report_of_seven_loads(benchmark: BenchmarkFixture) -> None:
    point = hand_made.point()
    summary = hand_made.summary([replace(point, clients=1 << n) for n in range(7)])

    assert benchmark(report.page, summary)
