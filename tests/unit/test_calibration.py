"""The generator against the server of known timing: its error is told, and a bad client caught."""

import re
import time
from collections.abc import Iterator

import pytest

from bench import calibration, generator, prompts, reference, transport
from bench.calibration import Calibration, calibrate
from bench.generator import Load, drive
from bench.prompts import Spread
from bench.records import Record
from bench.transport import Connection, Exchange
from stack import config
from stack.errors import Code, StackError
from stack.server import Server
from tests import workspace


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with reference.serving(ttft_ms=60, itl_ms=10) as url:
        yield url


@pytest.fixture(scope="module")
def server(url: str) -> Server:
    service = config.load(workspace.ROOT).service("tiny")
    return Server(runtime="attached", service=service, url=url, key="")


def test_answers_keep_the_pace_and_share_one_grid(url: str) -> None:
    sent: dict[int, list[int]] = {}

    def tap(record: Record, exchange: Exchange) -> None:
        body = b"".join(piece for _, piece in exchange.pieces)
        stamps = re.findall(rb'"(?:sent|received)_ns":"(\d+)"', body)
        sent[record.number] = list(map(int, stamps))

    shape = Load(clients=3, requests=3, warmup_s=0, duration_s=5, output=Spread(20, 20))
    drive(url, "", shape, prompts.vocabulary([(" word", 1)], 0), tap=tap)

    for _, received, *tokens in sent.values():
        assert tokens[0] - received >= 60e6
        assert (tokens[-1] - tokens[0]) / 19e6 == pytest.approx(10, abs=0.5)
    apart_ms = [(max(at) - min(at)) / 1e6 for at in zip(*sent.values(), strict=True)]
    assert min(apart_ms[2:]) < 1  # of one step of the grid, even where others wait for the core


@pytest.mark.parametrize("tokens", [2, 63, 64, 65, 129, 5000])
def test_prompt_has_the_tokens_that_were_asked_for(server: Server, tokens: int) -> None:
    shape = Load(requests=1, warmup_s=0, prompt=Spread(tokens, tokens), output=Spread(1, 1))

    (record,) = generator.run(server, shape).records

    assert record.prompt_tokens == tokens


def test_prompt_shorter_than_its_template_is_refused(server: Server) -> None:
    with pytest.raises(StackError, match="at the least") as refused:
        generator.run(server, Load(prompt=Spread(1, 9)))

    assert refused.value.code is Code.USAGE


@pytest.mark.parametrize("absent", ["http://127.0.0.1:1", "http://server.invalid"])
def test_server_without_a_tokenizer_is_refused(server: Server, absent: str) -> None:
    with pytest.raises(StackError, match="no server to send prompts to") as refused:
        generator.run(Server("attached", server.service, url=absent, key=""), Load())

    assert refused.value.code is Code.VERIFY


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Calibration:
    monkeypatch.setattr(calibration, "WARMUP_S", 0.1)
    return calibrate(2, itl_ms=20, tokens=12)


def test_error_of_the_client_is_measured(measured: Calibration) -> None:
    assert measured.events >= 40
    assert measured.kernel is bool(transport.SO_TIMESTAMPNS)
    assert 0 < measured.receive_p50_ms < 5
    assert measured.receive_p50_ms <= measured.receive_p99_ms
    assert measured.cpu_us > 0


@pytest.fixture
def sleepy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold the event loop up for 5 ms at each read."""
    read = Connection._readable  # noqa: SLF001

    def late(connection: Connection) -> None:
        time.sleep(0.005)
        read(connection)

    monkeypatch.setattr(Connection, "_readable", late)


@pytest.mark.usefixtures("sleepy")
def test_event_loop_that_sleeps_makes_it_invalid(measured: Calibration) -> None:
    assert measured.reason


@pytest.fixture
def no_kernel_stamps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SO_TIMESTAMPNS", None)


@pytest.mark.usefixtures("no_kernel_stamps", "sleepy")
def test_stamps_of_a_loop_that_sleeps_are_found_late(measured: Calibration) -> None:
    assert not measured.kernel
    assert measured.receive_p50_ms > 4
    assert "stamps tokens" in (measured.reason or "")
