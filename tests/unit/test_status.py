import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from stack import config, models
from stack.config import Project
from stack.host import Process
from stack.server import Server
from stack.status import Looks, State
from tests import workspace
from tests.scripted_engine import ScriptedEngine
from tests.unit.fake_nvml import FakeNvml, memory, process
from verbs.look import WIDTH, screen, span

CROWD = {"running": 4, "waiting": 2}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return config.load(workspace.make(tmp_path))


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine() as engine:
        yield engine


@pytest.fixture
def server(project: Project, engine: ScriptedEngine) -> Server:
    return Server("native", project.service("tiny"), engine.url, key="")


def seen(project: Project, *, ago_s: float) -> Looks:
    """Return the looks of a new command, as if the last one had been so long ago."""
    file = project.state / "samples.json"
    kept = json.loads(file.read_text())
    for each in kept.values():
        each["time_s"] -= ago_s
        each["still_s"] -= ago_s
    file.write_text(json.dumps(kept))
    return Looks(project)


@pytest.mark.parametrize(
    ("says", "word"),
    [
        ({}, "ready"),
        ({"running": 1}, "busy"),
        ({"waiting": 1}, "busy"),
        ({"health": 503}, "loading"),
        ({"health": 500}, "unhealthy"),
        ({"props": {}}, "unhealthy"),
    ],
    ids=str,
)
def test_state_in_a_word(
    project: Project, server: Server, engine: ScriptedEngine, says: dict[str, int], word: str
) -> None:
    vars(engine).update(says)

    assert Looks(project).state(server).state == word


def test_what_nothing_listens_for_is_starting(project: Project, server: Server) -> None:
    nowhere = replace(server, url=f"http://127.0.0.1:{workspace.free_port()}")

    assert Looks(project).state(nowhere).state == "starting"


@pytest.mark.parametrize(("restarts", "word"), [(0, "ended"), (3, "crashed 4 times")])
def test_end_is_told_with_its_reason(
    project: Project, server: Server, restarts: int, word: str
) -> None:
    dead = replace(server, restarts=restarts, ended=lambda: "ended (exit 137)")

    state = Looks(project).state(dead)

    assert (state.state, state.detail) == (word, "ended (exit 137). Its log is empty.")


def test_requests_of_which_nothing_is_decoded_for_a_minute_are_stuck(
    project: Project, server: Server, engine: ScriptedEngine
) -> None:
    vars(engine).update(CROWD)
    assert Looks(project).state(server).state == "busy"

    assert seen(project, ago_s=50).state(server).state == "busy"
    stuck = seen(project, ago_s=10).state(server)

    assert stuck.state == "stuck"
    assert stuck.detail.startswith("nothing decoded for 6")


def test_one_batch_in_a_minute_is_not_stuck(
    project: Project, server: Server, engine: ScriptedEngine
) -> None:
    vars(engine).update(CROWD)
    Looks(project).state(server)
    engine.decodes += 1

    assert seen(project, ago_s=3600).state(server).state == "busy"


def test_silence_without_requests_is_not_stuck(
    project: Project, server: Server, engine: ScriptedEngine
) -> None:
    Looks(project).state(server)
    vars(engine).update(CROWD)

    assert seen(project, ago_s=3600).state(server).state == "busy"


def test_what_was_seen_of_an_earlier_server_does_not_count(
    project: Project, server: Server, engine: ScriptedEngine
) -> None:
    vars(engine).update(CROWD)
    Looks(project).state(server)

    with ScriptedEngine() as other:
        vars(other).update(CROWD)
        again = seen(project, ago_s=3600).state(replace(server, url=other.url))

    assert again.state == "busy"


@pytest.mark.parametrize("text", ["", "[1]", '{"tiny native": 1}', '{"tiny native": {"a": 1}}'])
def test_corrupt_memory_is_a_first_look(
    project: Project, server: Server, engine: ScriptedEngine, text: str
) -> None:
    project.state.mkdir()
    (project.state / "samples.json").write_text(text)
    vars(engine).update(CROWD)

    assert Looks(project).state(server).state == "busy"


def test_speed_is_batches_times_requests(
    project: Project, server: Server, engine: ScriptedEngine
) -> None:
    vars(engine).update(CROWD)
    Looks(project).state(server)
    engine.decodes += 100

    tokens_s = seen(project, ago_s=5).state(server).tokens_s

    assert tokens_s == pytest.approx(80, rel=0.2)


def test_metrics_that_fail_beside_a_good_health_are_told(
    project: Project, server: Server, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "series", lambda: "llamacpp:n_decode_total none\n")

    state = Looks(project).state(server)

    assert state.state == "unhealthy"
    assert "/metrics" in state.detail


GPU = {"nvmlDeviceGetMemoryInfo": memory(30_000)}
PLANNED = 27_869
PROCESSES = "nvmlDeviceGetComputeRunningProcesses"


@pytest.fixture(scope="module")
def full() -> models.Plan:
    return models.plan("full-q4_k")


@pytest.fixture
def stand_in(project: Project, server: Server, engine: ScriptedEngine, full: models.Plan) -> Server:
    """A server of Q4's stand-in: its header, and a size that takes no disk."""
    folder = project.root / "stand-ins"
    folder.mkdir()
    there = {"GLM_MODELS": str(folder)}
    overrides = config.stand_ins(project) | there
    service = config.load(project.root, overrides=overrides).service("q4")
    with service.model_file.open("wb") as file:
        file.write(full.header)
        file.truncate(full.size_bytes)
    engine.props["model_path"] = str(service.model.path)
    return replace(server, service=service, processes=(Process(1, 0),))


@pytest.mark.parametrize(
    ("nvml", "said"),
    [
        (
            FakeNvml(GPU | {PROCESSES: [process(1, 29_000 << 20)]}),
            ("ready", "stand-in", 29_000, PLANNED),
        ),
        (
            FakeNvml(GPU | {PROCESSES: [process(9, 1 << 30)]}),
            ("on the CPU", "stand-in", None, PLANNED),
        ),
        (
            FakeNvml({"nvmlDeviceGetMemoryInfo": memory(600)}),
            ("on the CPU", "stand-in", None, PLANNED),
        ),
        (FakeNvml(), ("GPU lost", "", None, None)),
    ],
    ids=["on-it", "foreign-process", "too-little-memory", "gone"],
)
def test_model_is_where_the_driver_says(
    project: Project,
    stand_in: Server,
    monkeypatch: pytest.MonkeyPatch,
    nvml: FakeNvml,
    said: tuple[str, str, int | None, int | None],
) -> None:
    nvml.install(monkeypatch)

    state = Looks(project).state(stand_in)

    assert (state.state, state.trust, state.vram_mib, state.vram_plan_mib) == said


def test_screen_fits_and_says_everything(capsys: pytest.CaptureFixture[str]) -> None:
    serving = State(
        quant="tiny",
        runtime="docker",
        state="busy",
        model="tiny.gguf",
        trust="own",
        url="http://127.0.0.1:11348",
        context=8192,
        slots=4,
        running=4,
        waiting=12,
        tokens_s=1234.5,
        vram_mib=29_001,
        vram_plan_mib=29_272,
        up_s=100_000,
        restarts=2,
        engine="b11312-0c1e57098bba43ac29e6e3b677cdceebdd22334f",
        image="glm-server:cpu 986c1e924123",
    )
    failed = State(quant="q4", runtime="native", state="crashed 4 times", detail="ended (exit 137)")

    Console(width=WIDTH).print(screen((serving, failed)))

    shown = capsys.readouterr().out
    for words in ("busy", "4/4", "12", "1,234", "29,001/29,272", "0c1e57098bba", "own", "137"):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= WIDTH


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, ""), (0, "0 s"), (59, "59 s"), (3600, "1 h"), (90_061, "1 d 1 h"), (61, "1 min 1 s")],
)
def test_time_in_its_two_largest_units(seconds: float | None, words: str) -> None:
    assert span(seconds) == words
