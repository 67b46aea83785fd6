"""What the watch decides, on an engine that says what a test tells it; no server is restarted."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import docker
from stack import config, gpu, host, runtime, watch
from stack.errors import Code, StackError
from stack.server import Server
from stack.watch import Limits, Watch
from tests import workspace
from tests.scripted_engine import ScriptedEngine


class Scene:
    """One server in one runtime, as the watch sees it; `restarted` counts what it did."""

    def __init__(self, folder: Path, engine: ScriptedEngine, patch: pytest.MonkeyPatch) -> None:
        self.project = config.load(workspace.make(folder))
        self.service = self.project.service("tiny")
        self.server: Server | None = Server("native", self.service, engine.url, key="")
        self.restarted, self.fails = 0, False
        where = SimpleNamespace(name="native", find=lambda *_, **__: self.server, stop=self._stop)
        patch.setattr(runtime, "present", lambda _: [where])
        patch.setattr(runtime, "up", self._up)
        self._kept = self.server

    def _stop(self, _: object) -> None:
        self.server = None

    def _up(self, *_: object, choose: bool, answers: object) -> Any:
        assert choose
        assert answers is None
        self.restarted += 1
        if self.fails:
            raise StackError("It ended while it loaded.", "See its log.", Code.LOAD)
        self.server = self._kept
        return SimpleNamespace(ready_s=1.0)

    def look(self, *, later_s: float = 0, **limits: Any) -> list[str]:
        """Look once, as if the last look had been so long ago."""
        for name in ("samples.json", "watch.json"):
            file = self.project.state / name
            kept = json.loads(file.read_text()) if file.exists() else {}
            for each in kept.values():
                each |= {key: each[key] - later_s for key in each if key.endswith("_s")}
                if "restarts" in each:
                    each["restarts"] = [moment - later_s for moment in each["restarts"]]
            host.write_atomic(file, json.dumps(kept))
        found = Watch(self.project, [self.service], Limits(**limits)).look()
        return [event.what for event in found]


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine() as engine:
        yield engine


@pytest.fixture
def scene(tmp_path: Path, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, engine, monkeypatch)


def test_nothing_decoded_for_sixty_seconds_is_enough(scene: Scene, engine: ScriptedEngine) -> None:
    engine.running = 1

    assert scene.look() + scene.look(later_s=55) == []
    assert "stuck: nothing decoded for 6" in scene.look(later_s=5)[0]
    assert scene.restarted == 1


def test_one_batch_in_sixty_seconds_is_work(scene: Scene, engine: ScriptedEngine) -> None:
    engine.running = 4
    said = scene.look()
    for _ in range(3):
        engine.decodes += 1
        said += scene.look(later_s=59)

    assert (said, scene.restarted) == ([], 0)


def test_errors_for_answers_are_borne_for_the_limit(scene: Scene, engine: ScriptedEngine) -> None:
    engine.health = 500

    assert scene.look() + scene.look(later_s=55) == []
    assert "it is unhealthy" in scene.look(later_s=6)[0]


def test_trouble_that_passes_counts_anew(scene: Scene, engine: ScriptedEngine) -> None:
    engine.health = 500
    scene.look()
    engine.health = 200
    scene.look(later_s=55)
    engine.health = 500

    assert scene.look(later_s=55) + scene.look(later_s=55) == []


def test_good_health_with_every_completion_failing_is_found(
    scene: Scene, engine: ScriptedEngine
) -> None:
    log = ["0.1 I ready"]
    server = scene.server
    assert server
    scene.server = scene._kept = replace(server, logs=lambda _: "\n".join(log))  # noqa: SLF001
    scene.look()
    log.append("0.2 E srv    send_error: task id = 7, error: Compute error.")

    said = scene.look(later_s=5)

    assert "every request fails" in said[0]
    assert (engine.completions, scene.restarted) == (1, 1)


def test_failed_request_of_a_server_that_decodes_is_no_reason_to_ask(
    scene: Scene, engine: ScriptedEngine
) -> None:
    log = ["0.1 I ready"]
    server = scene.server
    assert server
    scene.server = replace(server, logs=lambda _: "\n".join(log))
    scene.look()
    log.append("0.2 E srv    send_error: task id = 7, error: Compute error.")
    engine.decodes += 1

    assert scene.look(later_s=5) + scene.look(later_s=5) == []
    assert engine.completions == 0


def test_budget_counts_what_failed_and_what_docker_did(scene: Scene) -> None:
    server = scene.server
    assert server
    scene.look()
    scene.server = replace(server, restarts=2)
    assert scene.look() == ["Docker restarted it after a crash (2 in all)"]
    scene.server = replace(server, restarts=2, ended=lambda: "ended (exit 139)")
    scene.fails = True

    assert "restart 3 of 3" in scene.look()[0]
    (gave_up,) = scene.look()

    assert "its restart failed; gave up after 3 restarts within 15 minutes" in gave_up
    assert Path(gave_up.split()[-1]).exists()
    assert scene.look() == []
    assert scene.restarted == 1


def test_old_restarts_leave_the_budget(scene: Scene) -> None:
    server = scene.server
    assert server
    for _ in range(4):
        scene.look()
        scene.server = replace(server, ended=lambda: "ended")
        scene.look(later_s=301)

    assert scene.restarted == 4


def test_taken_down_after_a_failed_restart_stays_down(scene: Scene) -> None:
    server = scene.server
    assert server
    scene.look()
    scene.server, scene.fails = replace(server, ended=lambda: "ended"), True
    scene.look()
    watch.forget(scene.project, scene.service)

    assert scene.look() == []
    assert scene.restarted == 1


@pytest.mark.parametrize(("wanted", "restarts"), [(False, 0), (True, 1)])
def test_what_somebody_stopped_stays_stopped_unless_it_was_the_watch(
    scene: Scene, *, wanted: bool, restarts: int
) -> None:
    server = scene.server
    assert server
    case = {"tiny native": {"wanted": wanted}}
    host.write_atomic(scene.project.state / "watch.json", json.dumps(case))
    scene.server = replace(server, ended=lambda: "ended", stopped=lambda: True)
    scene.look()
    if scene.server:  # the engine forgets
        scene.server = replace(scene.server, stopped=lambda: False)

    scene.look()

    assert scene.restarted == restarts


def test_what_docker_is_about_to_start_is_left_to_it(scene: Scene) -> None:
    server = scene.server
    assert server
    scene.server = replace(server, ended=lambda: "ended (exit 137)", restarting=True)

    assert scene.look() == []


def test_container_that_goes_away_under_its_eyes_is_no_end(scene: Scene) -> None:
    server = scene.server
    assert server

    def gone(_: int) -> str:
        raise docker.errors.NotFound("No such container")

    scene.server = replace(server, ended=lambda: "ended", logs=gone)

    assert scene.look() == ["unseen: No such container"]


def test_lost_gpu_is_told_and_not_restarted(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    server = scene.server
    assert server
    service = replace(server.service, gpus=("0",))
    scene.server = replace(server, service=service)
    monkeypatch.setattr(gpu, "lost", lambda _: "GPU 0 was lost: this machine has no NVIDIA GPU.")

    (gave_up,) = scene.look()

    assert gave_up.startswith("GPU 0 was lost")
    assert "no restart can mend that" in gave_up
    assert scene.restarted == 0


def test_operation_at_work_is_not_disturbed(scene: Scene) -> None:
    server = scene.server
    assert server
    scene.server = replace(server, ended=lambda: "ended")
    with host.lock(scene.project.state, verb="switch"):
        assert scene.look() == []

    assert "restart 1 of 3" in scene.look()[0]


@pytest.mark.parametrize("text", ["", "[1]", '{"tiny native": {"colour": "red"}}'])
def test_corrupt_record_is_a_new_beginning(scene: Scene, text: str) -> None:
    host.write_atomic(scene.project.state / "watch.json", text)

    assert [e.what for e in Watch(scene.project, [scene.service], Limits()).look()] == []


def test_newest_diagnosis_is_kept_though_the_clock_was_set_back(
    scene: Scene, engine: ScriptedEngine
) -> None:
    folder = scene.project.state / "watch"
    folder.mkdir(parents=True)
    for number in range(30):
        (folder / f"2999010{number // 10}-00000{number % 10}-tiny.txt").touch()

    engine.running = 1
    scene.look()

    assert Path(scene.look(later_s=61)[0].split()[-1]).exists()
    assert len(list(folder.glob("*.txt"))) == 20


def test_full_disk_keeps_no_server_from_being_restarted(
    scene: Scene, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", path)

    engine.running = 1
    scene.look()
    monkeypatch.setattr(host, "write_atomic", full)
    watching = Watch(scene.project, [scene.service], Limits(stuck_s=0))

    assert [event.what for event in watching.look()][1:] == ["serves again after 1.0 s"]
    assert scene.restarted == 1
