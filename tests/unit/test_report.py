"""The report, looked at by a browser where there is one."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from bench import report, stats
from bench.ceiling import Ceiling, Single, Streams
from bench.results import Measurement, Summary
from bench.telemetry import Span
from stack import host
from tests.unit import hand_made
from tests.unit.hand_made import MS, analysed, stream

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
WIDTHS = (1280, 768, 390)
LOOK = (Path(__file__).parent / "look.js").read_text()


@cache
def sweep() -> Summary:
    """Return a test of one to 64 clients on four slots, two runs each."""
    measurements = []
    for repeat in range(2):
        for clients in (1, 4, 16, 64):
            busy = min(4, clients)
            wait, itl = 900 * (clients // 4 - 1) if clients > 4 else 0, 5 + 2 * busy + repeat / 10
            records = [
                replace(r, headers_ns=r.sent_ns + int(max(1, wait) * MS), timings=told(10 * busy))
                for n in range(clients)
                for r in stream([max(1, wait) + 10 * busy, *[itl] * 40], until=20_000, client=n)
            ]
            point = analysed(records, ended=20_000, clients=clients, warm_ns=3000 * MS)
            measurements.append(
                Measurement(
                    point=point,
                    repeat=repeat,
                    faults=(),
                    calibration=hand_made.CALIBRATION,
                    slots=4,
                    span=Span(power_w=311.0, vram_mib=29_000, deferred=clients - busy),
                    joules_token=1.25,
                    series={"power_w": tuple((n / 10, 300.0 + n % 7) for n in range(200))},
                )
            )
    rates = {1: 150, 4: 420, 16: 800, 64: 1400}
    return replace(
        hand_made.summary([]),
        measurements=tuple(measurements),
        verdict="VALID, FAIL: 16 clients: 0.0 % of 4 requests had their TTFT",
        ceiling=Ceiling(
            prompt_tokens=48,
            output_tokens=41,
            repeats=3,
            single=Single(
                prefill_tokens_s=900, prefill_deviation=1, decode_tokens_s=150, decode_deviation=1
            ),
            streams=tuple(
                Streams(streams=n, prefill_tokens_s=900, decode_tokens_s=r, whole_tokens_s=r)
                for n, r in rates.items()
            ),
        ),
    )


def told(prompt_ms: float) -> dict[str, float]:
    return {"prompt_ms": prompt_ms, "predicted_ms": 1}


def one(**changes: Any) -> Summary:
    """Return a test of one run, without a ceiling, telemetry, or a split TTFT."""
    return hand_made.summary([hand_made.point(**changes)])


def open_loop() -> Summary:
    point = hand_made.point(arrivals="poisson", clients=256)
    rates = (0.5, 4, 11, 12)
    return hand_made.summary([replace(point, rate=r, tokens_s=41 * min(r, 10)) for r in rates])


class Tags(HTMLParser):
    """Notes what is opened and not closed, and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[tag] += tag != "meta"
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.open[tag] -= 1


SUMMARIES: dict[str, Callable[[], Summary]] = {
    "sweep": sweep,
    "one run": one,
    "open loop": open_loop,
    "nothing": lambda: hand_made.summary([]),
    "no window": lambda: one(window_s=0, tokens_s=0),
}
every = pytest.mark.parametrize("make", SUMMARIES.values(), ids=SUMMARIES)


@every
def test_page_closes_what_it_opens_and_says_no_nonsense(make: Any) -> None:
    page = report.page(make())

    assert +Tags(page).open == Counter()
    assert not re.search(r"\b(nan|None|Interval)\b|\binf\b", page)


@every
def test_page_loads_nothing_from_anywhere(make: Any) -> None:
    page = report.page(make())

    assert not [each for each in Tags(page).attributes if each[1] in ("src", "href", "style")]
    assert not re.search(r"<script|<link|url\(|@import|https?://", page)


def test_every_figure_has_a_name() -> None:
    tags = Tags(report.page(sweep()))

    labels = [value for tag, name, value in tags.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels[:4] == [
        *("Throughput", "Latency against throughput"),
        *("Time to the first token", "Time between tokens"),
    ]
    assert labels[4:] == [f"{n} client{'s' * (n > 1)}, run 1 of 2" for n in (1, 4, 16, 64)]


def rows(page: str) -> dict[str, list[str]]:
    """Return the cells of each row of the table, without their tags."""
    found = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', page)
    return {
        name: [re.sub("<.*?>", "", cell) for cell in re.findall("<td>(.*?)</td>", cells)]
        for name, cells in found
    }


def test_table_gives_the_ratio_to_the_ceiling_at_every_load() -> None:
    summary = sweep()
    mean = fmean(m.point.tokens_s for m in summary.measurements if m.point.clients == 1)

    cells = rows(report.page(summary))["of the engine\N{RIGHT SINGLE QUOTATION MARK}s ceiling"]

    assert cells[0] == f"{100 * mean / 150:.0f} %"
    assert len(cells) == 4


def test_table_gives_intervals_over_the_repeats() -> None:
    (cell, *_) = rows(report.page(sweep()))["ITL p50"]

    assert cell == "7.05 \N{PLUS-MINUS SIGN} 0.64"


def test_runs_that_are_not_valid_count_for_nothing_but_their_number() -> None:
    point = hand_made.point()
    summary = hand_made.summary([point, replace(point, tokens_s=7), point])
    good, bad, other = summary.measurements
    measurements = (good, replace(bad, faults=("throttled",)), other)

    cells = rows(report.page(replace(summary, measurements=measurements)))

    assert cells["output tokens/s"] == [f"{point.tokens_s:.0f} \N{PLUS-MINUS SIGN} 0"]
    assert cells["valid runs"] == ["2 of 3"]


def test_blank_percentile_is_no_zero() -> None:
    point = analysed(stream([200, *[20] * 40], until=3000), ended=3000)

    cells = rows(report.page(hand_made.summary([point, hand_made.point()])))

    assert cells["TTFT p50"] == ["\N{EN DASH}", "200"]
    assert "TTFT p99" not in cells


def test_failures_are_infinite_beside_the_percentile() -> None:
    point = hand_made.point()
    ttft = stats.spread([200.0] * 700, failures=20)

    cells = rows(report.page(hand_made.summary([replace(point, ttft=ttft)])))["TTFT p99"]

    assert cells == ["200 \N{INFINITY}"]


def test_page_leads_with_the_verdict() -> None:
    page = report.page(sweep())

    assert '<h1><span class="VALID">VALID</span>, <span class="FAIL">FAIL</span></h1>' in page
    assert "16 clients: 0.0 % of 4 requests had their TTFT" in page


@pytest.mark.parametrize("stand_in", [True, False])
def test_stand_in_is_called_one(stand_in: bool) -> None:
    provenance = replace(hand_made.PROVENANCE, stand_in=stand_in)

    page = report.page(replace(one(), provenance=provenance))

    assert ("A stand-in was measured" in page) == stand_in


def test_random_weights_of_another_shape_stand_in_for_nothing() -> None:
    provenance = replace(hand_made.PROVENANCE, model="glm-tiny-random.gguf")

    page = report.page(replace(one(), provenance=provenance))

    assert "Random weights:" in page
    assert "stand-in" not in page


def test_reasons_against_a_run_are_shown_and_counted() -> None:
    summary = hand_made.summary([hand_made.point()] * 2)
    bad = tuple(
        replace(each, faults=(f"the client was busy {81 + n} % of the time",))
        for n, each in enumerate(summary.measurements)
    )

    page = report.page(replace(summary, measurements=bad))

    assert '<span class="INVALID">INVALID</span>' in page
    assert "<li>the client was busy 81 % of the time <small>(2 of 2 runs)</small></li>" in page


def test_early_end_is_said() -> None:
    assert "glm-tiny exited (137)" in report.page(
        replace(one(), interrupted="glm-tiny exited (137)")
    )


def test_names_are_escaped() -> None:
    provenance = replace(hand_made.PROVENANCE, model="<b>&.gguf")

    assert "<b>&.gguf" not in report.page(replace(one(), provenance=provenance))


def seen(folder: Path, *pages: str, scheme: str = "light") -> dict[str, Any]:
    """Return what a browser makes of each page at each width; fail on anything it complains of."""
    frames = "".join(
        f'<iframe srcdoc="{escape(page)}" style="border:0;width:{width}px;height:900px"></iframe>'
        for page in pages
        for width in WIDTHS
    )
    (folder / "look.html").write_text(
        f"<!doctype html><meta charset=utf-8><body>{frames}<script>{LOOK}</script>"
    )
    result = host.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"),
            *(f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr"),
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            *("--window-size=1400,900", "--dump-dom", f"file://{folder / 'look.html'}"),
        ],
        timeout_s=60,
    )
    assert "CONSOLE" not in result.stderr
    (told,) = re.findall("&lt;&lt;&lt;(.*)&gt;&gt;&gt;", result.stdout, re.DOTALL)
    found: dict[str, Any] = json.loads(unescape(told))
    return found


@needs_chromium
def test_browser_shows_every_word_whole_apart_and_readable(tmp_path: Path) -> None:
    found = seen(tmp_path, *(report.page(make()) for make in SUMMARIES.values()))

    frames = [f"{name} at {width} px" for name in SUMMARIES for width in WIDTHS]
    assert dict(zip(frames, found["faults"], strict=True)) == {frame: [] for frame in frames}
    assert found["figures"][:3] == [8, 8, 8]
    assert "Why to believe it" in found["rendered"][0]


@needs_chromium
def test_browser_that_prefers_dark_shows_it_readable_too(tmp_path: Path) -> None:
    found = seen(tmp_path, report.page(sweep()), scheme="dark")

    assert (found["dark"], found["faults"]) == (True, [[], [], []])


@needs_chromium
def test_look_finds_what_it_looks_for(tmp_path: Path) -> None:
    page = report.page(one()).replace("tokens/s</text>", "tokens/s that nobody can fit</text>")
    page = page.replace("--soft: #62666e", "--soft: #bbbbbb")

    faults = str(seen(tmp_path, page)["faults"])

    assert all(fault in faults for fault in ("text outside its figure: tokens/s that", "faint: "))


@needs_chromium
def test_page_that_loads_something_is_complained_of(tmp_path: Path) -> None:
    page = report.page(one()).replace("<main>", '<main><img src="data:image/png;base64,">')

    with pytest.raises(AssertionError, match="CONSOLE"):
        seen(tmp_path, page)
