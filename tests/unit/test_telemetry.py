"""What is summed up of samples: what was not told stays unknown, and is never zero."""

import time
from collections.abc import Sequence
from dataclasses import replace

import httpx
import pytest

from bench.telemetry import Sample, Span, Telemetry, energy
from stack import client, config
from stack.gpu import Reading
from stack.server import Server
from tests.workspace import ROOT

NOTHING = Reading(
    time_s=0,
    total_mib=None,
    free_mib=None,
    used_mib=None,
    utilisation_percent=None,
    sm_mhz=None,
    memory_mhz=None,
    power_w=None,
    energy_j=None,
    temperature_c=None,
    throttle=None,
)
S = 10**9


def read(time_s: float, **told: object) -> Reading:
    return replace(NOTHING, time_s=time_s, **told)  # type: ignore[arg-type]


@pytest.fixture
def telemetry() -> Telemetry:
    """One that is never started."""
    service = config.load(ROOT).service("tiny")
    return Telemetry(Server(runtime="", service=service, url="http://127.0.0.1:1", key=""))


COUNTED = [read(t, energy_j=1000 + 200 * t, power_w=1.0) for t in range(5)]
POWER = [read(t, power_w=w) for t, w in enumerate((100, 200, 200, 100, 100))]


@pytest.mark.parametrize(
    ("readings", "joules"),
    [(COUNTED, 500), (POWER, 437.5), ([NOTHING] * 5, None), (POWER[:3], None), ([], None)],
    ids=["counter", "power", "neither", "ends before", "no GPU"],
)
def test_energy_is_the_counters_or_powers_integral(
    readings: Sequence[Reading], joules: float | None
) -> None:
    assert energy(readings, 0.5, 3) == (joules and pytest.approx(joules))


def test_span_of_nothing_knows_nothing(telemetry: Telemetry) -> None:
    telemetry.samples = [Sample(S, {}, None, None, None, None)] * 3
    telemetry.readings = [replace(NOTHING, time_s=1)] * 3

    assert telemetry.span(0, 2 * S) == Span()


def test_span_takes_only_what_is_inside(telemetry: Telemetry) -> None:
    told = ({"requests_deferred": n, "requests_processing": 4} for n in (9, 0, 3, 9))
    telemetry.samples = [
        Sample(i * S, metrics, i * 0.5, 100 + i, i * 0.25, 50, i * 1.0)
        for i, metrics in enumerate(told)
    ]
    telemetry.readings = [read(i, used_mib=600 + i, sm_mhz=1000 - i) for i in range(4)]

    span = telemetry.span(S, 2 * S)

    assert (span.deferred, span.deferred_most, span.processing_most) == (1.5, 3, 4)
    assert (span.server_cores, span.client_cores, span.other_cores) == (0.5, 0.25, 0.25)
    assert (span.server_mib, span.client_mib) == (102, 50)
    assert (span.vram_mib, span.sm_mhz, span.sm_lowest_mhz) == (602, 998.5, 998)


def test_a_moment_of_a_power_limit_is_no_throttled_run(telemetry: Telemetry) -> None:
    cap, heat = "sw power cap", "sw thermal slowdown"
    reasons = [(cap, heat), (heat,), (heat,), *[()] * 37]
    telemetry.readings = [read(i, throttle=why) for i, why in enumerate(reasons)]

    span = telemetry.span(0, 40 * S)

    assert span.throttled == {cap: 1 / 40, heat: 3 / 40}
    assert span.throttle_reasons == (heat,)


def test_series_count_from_the_begin(telemetry: Telemetry) -> None:
    telemetry.samples = [Sample(7 * S, {"requests_deferred": 2}, None, None, None, None)]
    telemetry.readings = [read(4.5, power_w=300.0), read(6, power_w=301.0), read(9, power_w=1.0)]

    assert telemetry.series(5 * S, 8 * S) == {"power_w": ((1, 301),), "deferred": ((2, 2),)}


def test_generator_and_driver_are_read_by_one_clock() -> None:
    clocks = {time.get_clock_info(name).implementation for name in ("monotonic", "perf_counter")}

    assert len(clocks) == 1


def test_metrics_are_read_without_labels_and_words() -> None:
    text = '# TYPE x counter\nllamacpp:a_total 1.5e+06\nllamacpp:per_pos_total{position="0"} 3\n'
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=text))

    with httpx.Client(transport=transport, base_url="http://server") as session:
        assert client.metrics(session) == {"a_total": 1.5e6, 'per_pos_total{position="0"}': 3}


def test_server_without_metrics_has_none() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(501))

    with httpx.Client(transport=transport, base_url="http://server") as session:
        assert client.metrics(session) == {}


def test_silent_server_gives_samples_without_figures(telemetry: Telemetry) -> None:
    with telemetry:
        pass

    assert [each.metrics for each in telemetry.samples] == [{}, {}]
    assert telemetry.samples[0].client_mib
    assert telemetry.cores is not None
