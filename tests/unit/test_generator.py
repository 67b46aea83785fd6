"""The load generator against real sockets: arrivals, failures, what is recorded, how it ends."""

import itertools
import os
import resource
import signal
import statistics
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import generator, prompts, quiz
from bench.generator import Interrupted, Load, Snapshot, Watch, drive
from bench.prompts import Spread
from bench.records import Record, Run
from stack import config
from stack.errors import Code, StackError
from tests import workspace
from tests.unit.scripted import (
    DONE,
    END,
    HEADERS,
    ROLE,
    End,
    Script,
    Scripted,
    Step,
    chunk,
    delta,
    event,
    refusal,
    usage,
    whole,
)

WORDS = prompts.vocabulary([(" word", 1), (" another", 2)], 3)
SLOW: Script = [HEADERS + chunk(ROLE) + chunk(delta(content="a")), 0.1, chunk(delta(content="a"))]
SLOW_ANSWER: Script = [*SLOW, chunk(delta("stop")) + chunk(usage(2)) + chunk(DONE) + END]
"""Two tokens, 0.1 s apart."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pause a fifth as long as a user's run, and watch five times as often."""
    monkeypatch.setattr(generator, "PAUSE_S", 0.1)
    monkeypatch.setattr(generator, "WATCH_TICKS", 10)


def send(server: Scripted, *, watch: Watch | None = None, **shape: Any) -> Run:
    """Send a load, without a warm-up."""
    load = Load(**{"warmup_s": 0, "duration_s": 5, **shape})
    return drive(server.url, "secret", load, WORDS, watch=watch)


def one(*script: Step, **shape: Any) -> Record:
    """Send one request to a server with one script; return its record."""
    with Scripted(script) as server:
        (record,) = send(server, requests=1, **shape).records
    return record


def gaps_ms(stamps_ns: Iterable[int]) -> list[float]:
    return [(b - a) / 1e6 for a, b in itertools.pairwise(stamps_ns)]


def test_gaps_between_tokens_are_the_servers() -> None:
    gaps_s = (0.25, 0.4, 0.1, 0.4, 0.1)
    tokens = [step for gap_s in gaps_s for step in (gap_s, chunk(delta(content="a")))]

    with Scripted([HEADERS + chunk(ROLE), *tokens, chunk(delta("stop") + usage(5)), END]) as server:
        (record,) = send(server, requests=1).records

    true_ns = server.sent_ns[1:6]
    seen_ns = [read.at_ns for read in record.reads]
    assert gaps_ms(seen_ns) == [pytest.approx(gap, rel=0.02, abs=5) for gap in gaps_ms(true_ns)]
    assert seen_ns[0] == pytest.approx(true_ns[0], abs=5e6)
    # How soon the server comes to read is the machine's affair; it cannot be before the sending.
    assert record.sent_ns <= server.sent_ns[0] <= record.sent_ns + 1e8


def test_whole_answer_has_all_that_the_server_told() -> None:
    thought, said = delta(reasoning_content="hm"), delta(content="a", timings={"predicted_n": 2})
    events = [ROLE, thought, said, delta("length"), usage(2, prompt=9, cached=4), DONE]

    record = one(HEADERS, *map(chunk, events), END)

    assert (record.error, record.finish, record.output_tokens) == (None, "length", 2)
    assert (record.prompt_tokens, record.cached_tokens) == (9, 4)
    assert sum(read.events for read in record.reads) == 2
    assert record.sent_ns <= (record.headers_ns or 0) <= record.reads[0].at_ns <= record.end_ns


def test_warm_up_waits_for_an_answer_to_each_client() -> None:
    with Scripted([0.3, whole(1)]) as server:
        run = send(server, clients=2, warmup_s=0.05, duration_s=0.5)

    firsts = {record.client: record.end_ns for record in reversed(run.records)}
    assert (run.warm_ns - max(firsts.values())) / 1e6 == pytest.approx(0, abs=20)
    assert (run.ended_ns - run.warm_ns) / 1e6 == pytest.approx(500, abs=20)


def test_warm_up_of_a_run_that_ends_in_it_is_the_short_one() -> None:
    with Scripted([0.3, whole(1)]) as server:
        run = send(server, requests=1, clients=2, warmup_s=0.05)

    assert run.warm_ns - run.begun_ns == 50_000_000


TOKEN = chunk(ROLE) + chunk(delta(content="a"))
FAILURES: dict[str, Script] = {
    "unauthorized": [refusal(401)],
    "busy": [refusal(429)],
    "unavailable": [refusal(503, b'{"error":{"message":"Loading model"}}')],
    "http": [refusal(400)],
    "stalled": [HEADERS, TOKEN, 1.0],
    "timeout": [HEADERS, TOKEN, 0.3, TOKEN, 0.3, TOKEN, 0.3, TOKEN, 0.3],
    "broken": [HEADERS, TOKEN, End.RESET],
    "event": [HEADERS, TOKEN, chunk(event({"error": {"message": "no"}})), END],
    "partial": [HEADERS, TOKEN, chunk(delta("stop")), END],
    "empty": [HEADERS, chunk(ROLE), chunk(delta("stop")), chunk(usage(0)), END],
}


@pytest.mark.parametrize(("error", "script"), FAILURES.items(), ids=FAILURES)
def test_failure_has_its_class_and_keeps_what_came(error: str, script: Script) -> None:
    record = one(*script, stall_s=0.6, limit_s=0.8)

    assert record.error == error
    assert record.detail
    assert bool(record.reads) is (TOKEN in script)


def test_every_class_of_failure_is_explained() -> None:
    assert generator.ERRORS.keys() == {*FAILURES, "refused", "connect"}


def test_failure_says_what_the_server_said() -> None:
    assert "Loading model" in one(*FAILURES["unavailable"]).detail


def test_servers_own_error_counts_more_than_the_close_after_it() -> None:
    assert one(HEADERS, chunk(event({"error": {"message": "no"}})), End.CLOSE).error == "event"


def test_server_that_is_absent_is_not_flooded() -> None:
    port = workspace.free_port()
    load = Load(clients=2, warmup_s=0, duration_s=0.15)

    run = drive(f"http://127.0.0.1:{port}", "", load, WORDS)

    assert [record.error for record in run.records] == ["refused"] * 4


def test_server_that_cannot_be_found_is_no_connection() -> None:
    load = Load(requests=1, warmup_s=0, duration_s=5)

    (record,) = drive("http://server.invalid:1", "", load, WORDS).records

    assert record.error == "connect"


def test_server_that_dies_leaves_what_came_before() -> None:
    with Scripted(SLOW_ANSWER) as server:
        death = threading.Timer(0.35, server.die)
        death.start()
        run = send(server, clients=4, duration_s=0.7)
        death.join()

    errors = [record.error for record in sorted(run.records, key=lambda record: record.end_ns)]
    assert list(dict.fromkeys(errors)) == [None, "broken", "refused"]
    assert errors.count("broken") <= 4 <= errors.count("refused")


def test_idle_connection_that_the_server_closed_is_made_anew() -> None:
    with Scripted([whole(1)], [End.CLOSE], [whole(1)]) as server:
        run = send(server, requests=2)

    assert [(record.error, record.reconnected) for record in run.records] == [
        (None, False),
        (None, True),
    ]


@pytest.mark.parametrize("scripts", [([End.CLOSE],), ([whole(1)], [End.CLOSE], [End.CLOSE])])
def test_new_connection_that_the_server_closed_is_a_failure(scripts: tuple[Script, ...]) -> None:
    with Scripted(*scripts) as server:
        last = send(server, requests=len(scripts[:2])).records[-1]

    assert last.error == "broken"


def test_connection_is_given_up_before_the_server_closes_it() -> None:
    with Scripted([whole(1).replace(b"max=100", b"max=2")]) as server:
        run = send(server, requests=6)

    assert server.connections == 3
    assert not any(record.reconnected or record.error for record in run.records)


def in_flight(run: Run, at_ns: int) -> int:
    return sum(record.sent_ns <= at_ns < record.end_ns for record in run.records)


def test_closed_loop_keeps_its_clients_busy() -> None:
    with Scripted(SLOW_ANSWER) as server:
        run = send(server, clients=5, duration_s=0.55)

    samples = [in_flight(run, run.begun_ns + ms * 10**6) for ms in range(50, 550, 5)]
    assert max(samples) == 5
    assert statistics.mean(samples) > 4.5


def test_clients_next_request_is_due_when_its_last_answer_ended() -> None:
    with Scripted(SLOW_ANSWER) as server:
        first, second = send(server, requests=2).records

    assert 0 <= second.scheduled_ns - first.end_ns < 20e6


def test_open_loop_keeps_its_schedule_to_the_nanosecond() -> None:
    with Scripted(SLOW_ANSWER) as server:
        run = send(server, arrivals="constant", rate=40, clients=20, duration_s=0.5)

    due = [record.scheduled_ns - run.begun_ns for record in run.records]
    assert due == [25 * 10**6 * number for number in range(20)]
    late_ms = [(record.sent_ns - record.scheduled_ns) / 1e6 for record in run.records]
    assert statistics.median(late_ms) < 5


def test_wait_for_a_free_stream_is_not_hidden() -> None:
    with Scripted(SLOW_ANSWER) as server:
        run = send(server, arrivals="constant", rate=20, clients=1, duration_s=0.6)

    sent = [record for record in run.records if record.client == 0]
    waits_ms = [(record.sent_ns - record.scheduled_ns) / 1e6 for record in sent]
    assert len(run.records) == 12
    assert waits_ms[4] > 4 * 50 - 1  # each takes 100 ms, one is due every 50
    never = [record for record in run.records if record.client < 0]
    assert never
    assert all(record.cut and record.sent_ns == run.ended_ns for record in never)


def test_frozen_server_shows_in_the_scheduled_ttft() -> None:
    with Scripted(SLOW_ANSWER) as server:
        threading.Timer(0.2, server.awake.clear).start()
        threading.Timer(1.2, server.awake.set).start()
        run = send(server, arrivals="constant", rate=50, clients=100, duration_s=1.8)

    ttfts_ms = sorted(
        (record.reads[0].at_ns - record.scheduled_ns) / 1e6
        for record in run.records
        if record.reads
    )
    assert len(ttfts_ms) >= 80
    assert ttfts_ms[int(0.99 * len(ttfts_ms))] == pytest.approx(980, abs=60)


def load(**shape: Any) -> Load:
    return Load(**{"warmup_s": 100, "duration_s": 900, "rate": 10, **shape})


def test_poisson_arrivals_have_exponential_gaps() -> None:
    due_s = list(generator.schedule(load(arrivals="poisson")))

    gaps_s = [b - a for a, b in itertools.pairwise(due_s)]
    assert statistics.mean(gaps_s) == pytest.approx(0.1, rel=0.05)
    assert statistics.stdev(gaps_s) == pytest.approx(0.1, rel=0.05)


def test_seed_fixes_the_arrivals() -> None:
    once, again, other = (
        list(generator.schedule(load(arrivals="poisson", seed=seed))) for seed in (1, 1, 2)
    )

    assert once == again != other


def test_ramp_grows_evenly_to_its_rate() -> None:
    due_s = list(generator.schedule(load(arrivals="ramp")))

    assert sum(due < 500 for due in due_s) == pytest.approx(1250, abs=2)
    assert sum(due > 999 for due in due_s) == pytest.approx(10, abs=1)


def test_what_is_under_way_at_the_end_is_cut() -> None:
    with Scripted([*SLOW, 9.0]) as server:
        run = send(server, clients=3, duration_s=0.3)

    assert [(record.cut, record.error, len(record.reads)) for record in run.records] == [
        (True, None, 2)
    ] * 3
    assert run.ended_ns - run.begun_ns == pytest.approx(0.3e9, abs=1e6)


def test_number_of_requests_is_exact_and_none_is_cut() -> None:
    with Scripted(SLOW_ANSWER) as server:
        run = send(server, clients=3, requests=7)

    assert [(record.number, record.cut) for record in run.records] == [(n, False) for n in range(7)]
    assert run.ended_ns - run.begun_ns < 1e9


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_interrupt_keeps_the_run_and_leaves_nothing_open() -> None:
    before = open_files()

    def interrupt(snapshot: Snapshot) -> None:
        if snapshot.finished:
            signal.raise_signal(signal.SIGINT)

    with Scripted(SLOW_ANSWER) as server, pytest.raises(Interrupted) as caught:
        send(server, clients=2, watch=interrupt)

    run = caught.value.run
    assert [record.cut for record in run.records[-2:]] == [True, True]
    assert len(run.records) > 2
    assert run.ended_ns - run.begun_ns < 2e9
    assert open_files() == before


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="only Linux tells")
def test_precedence_ends_with_the_run() -> None:
    before = os.sched_getscheduler(0)

    one(whole(1))

    assert os.sched_getscheduler(0) == before


def test_watch_sees_the_run_and_may_end_it() -> None:
    seen: list[Snapshot] = []

    def watch(snapshot: Snapshot) -> bool:
        seen.append(snapshot)
        return len(seen) == 3

    with Scripted([refusal(503)], SLOW_ANSWER) as server:
        run = send(server, clients=3, watch=watch)

    last = seen[-1]
    assert run.ended_ns - run.begun_ns == pytest.approx(0.3e9, abs=0.1e9)
    assert (last.streams, last.errors) == (3, {"unavailable": 1})
    whole_ones = sum(not record.cut and not record.error for record in run.records)
    assert last.finished == pytest.approx(whole_ones, abs=3)  # those that ended just then
    assert last.events > last.finished
    assert last.ttft_ms


def test_failing_watch_is_not_swallowed() -> None:
    def watch(_: Snapshot) -> None:
        raise RuntimeError("display")

    with Scripted(SLOW_ANSWER) as server, pytest.raises(RuntimeError, match="display"):
        send(server, watch=watch)


@pytest.fixture
def few_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_files")
def test_limit_of_open_files_is_raised() -> None:
    with Scripted([whole(1)]) as server:
        run = send(server, clients=90, requests=90)  # two sockets each, one of them the server's

    assert {record.error for record in run.records} == {None}


def test_more_clients_than_files_are_refused() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    with pytest.raises(StackError, match="open files") as refused:
        drive("http://127.0.0.1:1", "", Load(clients=hard), WORDS)

    assert refused.value.code is Code.HOST


@pytest.mark.parametrize(
    "shape",
    [
        {"arrivals": "sometimes"},
        {"clients": 0},
        {"clients": -1},
        {"arrivals": "poisson"},
        {"arrivals": "constant", "rate": 0},
        {"rate": 5},
        {"duration_s": 0},
        {"warmup_s": -1},
        {"requests": 0},
        {"prompt": Spread(9, 8)},
        {"output": Spread(0, 8)},
        {"prompts": "warm"},
        {"prompts": "shared"},
        {"shared": 5},
        {"turns": 2},
        {"prompts": "turns"},
        {"prompts": "turns", "turns": 0},
    ],
    ids=str,
)
def test_load_that_makes_no_sense_is_refused(shape: dict[str, Any]) -> None:
    with pytest.raises(StackError) as refused:
        generator.check(Load(**shape))

    assert refused.value.code is Code.USAGE


def texts(server: Scripted) -> list[str]:
    return [request["messages"][-1]["content"] for request in server.requests]


def test_request_asks_for_what_a_measurement_needs() -> None:
    with Scripted([whole(1)]) as server:
        send(server, requests=1, output=Spread(7, 7), ignore_eos=False)

    (request,) = server.requests
    assert request["stream"]
    assert request["stream_options"] == {"include_usage": True}
    assert request["timings_per_token"]
    assert (request["max_tokens"], request["ignore_eos"]) == (7, False)
    assert server.keys == ["Bearer secret"]


def test_seed_fixes_the_lengths_and_no_text_comes_twice() -> None:
    runs = []
    for seed in (1, 1, 2):
        with Scripted([whole(1)]) as server:
            send(server, requests=20, seed=seed)
        runs.append(server)

    once, again, other = ([request["max_tokens"] for request in run.requests] for run in runs)
    assert once == again != other
    assert len({text for run in runs for text in texts(run)}) == 60


def test_shared_prompts_begin_alike_and_go_on_apart() -> None:
    with Scripted([whole(1)]) as server:
        send(server, requests=2, prompts="shared", prompt=Spread(100, 100), shared=60)

    first, second = texts(server)
    common = "".join(
        a for a, b in itertools.takewhile(lambda p: p[0] == p[1], zip(first, second, strict=False))
    )
    assert 30 <= len(common.split()) < len(first.split())


def test_conversation_grows_by_the_servers_own_answers() -> None:
    thought = chunk(delta(reasoning_content="hm"))
    answer = [HEADERS, thought, TOKEN, chunk(delta("stop")), chunk(usage(2)), END]
    with Scripted(answer) as server:
        send(server, requests=5, prompts="turns", turns=3)

    assert [len(request["messages"]) for request in server.requests] == [1, 3, 5, 1, 3]
    said = server.requests[1]["messages"]
    assert said[:1] == server.requests[0]["messages"]
    assert said[1] == {"role": "assistant", "content": "a", "reasoning_content": "hm"}


def test_conversation_begins_anew_after_a_failure() -> None:
    with Scripted([whole(1)], FAILURES["event"], [whole(1)]) as server:
        send(server, requests=4, prompts="turns", turns=9)

    assert [len(request["messages"]) for request in server.requests] == [1, 3, 1, 3]


def send_questions(server: Scripted, **shape: Any) -> Run:
    asking = quiz.of(
        config.load(workspace.ROOT).service("tiny"), text=Spread(64, 64), seed=shape.get("seed", 0)
    )
    load = Load(warmup_s=0, duration_s=5, prompts="questions", ignore_eos=False, **shape)
    return drive(server.url, "", load, WORDS, quiz=replace(asking, tasks=("add",)))


def said(text: str) -> Script:
    events = [ROLE, delta(content=text), delta("stop"), usage(1), DONE]
    return [HEADERS, *map(chunk, events), END]


def test_wrong_answers_are_no_failures_and_are_counted() -> None:
    with Scripted(said("nonsense")) as server:
        (record,) = send_questions(server, requests=1).records

    assert (record.error, record.wrong) == (None, True)
    assert "said 'nonsense', not" in record.detail


def test_each_request_asks_another_question_greedily() -> None:
    with Scripted(said("nonsense")) as server:
        send_questions(server, requests=8, clients=2)

    asked = {str(each["messages"]) for each in server.requests}
    assert len(asked) == 8
    assert {each["temperature"] for each in server.requests} == {0}


def test_hanging_up_is_neither_a_success_nor_a_failure() -> None:
    gone_on: list[Step] = [chunk(delta(content="a")), 0.01] * 400
    scripts: list[Script] = [said("1"), [HEADERS, chunk(ROLE), *gone_on], said("1")]
    with Scripted(*scripts) as server:
        run = send_questions(server, requests=3, hang_up=2)

    assert [(each.cut, each.error, each.wrong) for each in run.records] == [
        (False, None, True),
        (True, None, None),
        (False, None, True),
    ]
    assert run.records[1].end_ns < run.records[2].sent_ns
    assert server.connections == 2
