"""`invoke tune` measures real servers, keeps what it has, and what it found is what `up` serves."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stack import client, host
from stack.errors import Code
from stack.wait import wait_until
from tests import workspace
from tests.checks.conftest import IDLE, Broken, Notice, skip_unasked
from tests.checks.test_faults import INTERRUPTED, assert_refused
from tests.workspace import Deployment

INSIDE = "/app/models"
CRASHING = {"micro-batch 2048": "ended", "shared cache 0": "ended"}
"""What tests/candidate_faults.c does, and the word that tells of it."""
LOAD = ("--clients=2", "--budget=45s")


@dataclass(frozen=True)
class Tuning(Deployment):
    """A deployment whose candidates are tuned; two of them crash."""

    def tune(self, *arguments: str) -> host.Result:
        return self.invoke("tune", self.flag, *arguments)

    @property
    def evidence(self) -> list[dict[str, Any]]:
        """The trials that are kept, of all tunes."""
        files = sorted((self.project.state / "tune").glob("*.json"), key=os.path.getmtime)
        return [trial for file in files for trial in json.loads(file.read_text())]

    def profile(self, clients: int) -> dict[str, Any]:
        (path,) = (self.project.state / "profiles").glob(f"tiny-*-{clients}-clients.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("faults") / "faults.so"
    source = workspace.ROOT / "tests" / "candidate_faults.c"
    done = host.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", target, source])
    assert done.status == 0, done.stderr
    return target


@pytest.fixture(scope="module", params=["--docker", "--native"])
def tuning(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, faults: Path
) -> Iterator[Tuning]:
    skip_unasked(request, request.param)
    root = tmp_path_factory.mktemp("tuning")
    models = root / "models"
    models.mkdir()
    os.link(workspace.ROOT / "models" / "tiny.gguf", models / "tiny.gguf")
    (models / "faults.so").write_bytes(faults.read_bytes())
    port = str(workspace.free_port())
    settings = {"GLM_MODELS": str(models), "GLM_TINY_THREADS": "1"}  # so that fewer are tried
    folder = workspace.make(root, GLM_TINY_PORT=port, **settings)
    alias = "      LLAMA_ARG_ALIAS: glm-4.7-flash-tiny\n"
    preloaded = f"{alias}      LD_PRELOAD: {INSIDE}/faults.so\n"
    workspace.change(folder, "compose.yaml", alias, preloaded)
    tuning = Tuning(folder, request.param)
    chosen = tuning.require_engine()
    yield tuning
    chosen.stop(tuning.service)


def interrupt(tuning: Tuning, *arguments: str) -> str:
    """Begin a tune, interrupt it in a trial after the first one; return what it said."""
    before = len(tuning.evidence)
    with tuning.start("tune", tuning.flag, *arguments) as process:
        wait_until(
            lambda: len(tuning.evidence) > before or process.poll() is not None or None,
            timeout_s=60,
            what="no trial",
        )
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode in INTERRUPTED, err
    assert "goes on from there" in err
    return err


@pytest.fixture(scope="module")
def interrupted(tuning: Tuning) -> list[dict[str, Any]]:
    """What is kept of a tune that was interrupted in its second trial."""
    interrupt(tuning, *LOAD)
    assert tuning.nothing_runs()
    return tuning.evidence


@pytest.fixture(scope="module")
def tuned(tuning: Tuning, interrupted: list[dict[str, Any]]) -> host.Result:
    """The same tune to its end."""
    assert interrupted
    return tuning.tune(*LOAD)


def test_an_interrupted_tune_goes_on(
    tuning: Tuning, interrupted: list[dict[str, Any]], tuned: host.Result
) -> None:
    assert tuned.status == 0, tuned.stderr
    assert "Going on from" in tuned.stderr
    kept = tuning.evidence
    assert kept[: len(interrupted)] == interrupted
    assert len(kept) > len(interrupted)
    assert tuning.profile(2)["trials"] == kept
    assert tuning.nothing_runs()


def test_candidates_that_crash_are_kept_with_the_reason(tuning: Tuning, tuned: host.Result) -> None:
    failed = {each["candidate"]: each["failed"] for each in tuning.evidence if each["failed"]}

    assert failed.keys() == CRASHING.keys(), tuned.stderr
    assert all(word in failed[name] for name, word in CRASHING.items())
    found = tuning.profile(2)
    assert found["winner"] not in failed
    assert set(found["scores"]).isdisjoint(failed)
    assert all(each["runs"][0]["tokens_s"] > 0 for each in found["trials"] if not each["failed"])


def test_up_serves_as_tuned_and_says_so(tuning: Tuning, tuned: host.Result) -> None:
    assert tuned.status == 0
    path = next((tuning.project.state / "profiles").glob("*-2-clients.json"))
    profile = tuning.profile(2)
    profile["settings"]["GLM_TINY_SLOTS"] = "3"  # which nothing else would choose
    path.write_text(json.dumps(profile))

    done = tuning.invoke("up", tuning.flag, "--clients=2")

    assert f"as tuned on {profile['at'][:10]} (.state/profiles/{path.name})" in done.stdout
    assert client.props(tuning.server)["total_slots"] == 3


def test_what_serves_is_not_disturbed_unless_asked_to_and_comes_back(tuning: Tuning) -> None:
    tuning.invoke("up", tuning.flag)
    before = tuning.server
    says = client.props(before)

    refused = tuning.tune("--clients=1", "--budget=1s")

    assert_refused(refused, Code.BUSY, "serves", "--replace")
    assert tuning.server.processes == before.processes

    done = tuning.tune("--clients=1", "--budget=1s", "--replace")

    after = tuning.server
    assert done.status == 0, done.stderr
    assert "serves again" in done.stderr
    assert after.processes != before.processes
    assert (after.url, client.props(after)["total_slots"]) == (before.url, says["total_slots"])
    assert client.complete(after, "hello", tokens=4).tokens == 4


def test_what_serves_comes_back_from_an_interrupted_tune(tuning: Tuning) -> None:
    tuning.invoke("up", tuning.flag)
    before = tuning.server

    said = interrupt(tuning, "--clients=3", "--budget=45s", "--replace")

    after = tuning.server
    assert "serves again" in said
    assert after.processes != before.processes
    assert client.complete(after, "hello", tokens=4).tokens == 4
    tuning.invoke("down")


def test_a_profile_of_another_engine_is_passed_over(tuning: Tuning, tuned: host.Result) -> None:
    assert tuned.status == 0
    path = next((tuning.project.state / "profiles").glob("*-2-clients.json"))
    profile = tuning.profile(2)
    profile["subject"]["engine"] = "b1 another"
    path.write_text(json.dumps(profile))
    tuning.invoke("down")

    done = tuning.invoke("up", tuning.flag, "--clients=2")

    assert "is of another engine (b1 another)" in done.stdout
    assert client.props(tuning.server)["total_slots"] == 4
    tuning.invoke("down")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--clients=0"], "must be above 0"),
        (["--clients=-4"], "must be above 0"),
        (["--clients=many"], "no list of numbers"),
        (["--budget=soon"], "--budget 20m"),
        (["--shape=odd"], "chat, agent, mixed"),
        (["--slo=fast"], "--slo ttft=500"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused(tuning: Tuning, arguments: list[str], words: str) -> None:
    assert_refused(tuning.tune(*arguments), Code.USAGE, words)


@pytest.mark.parametrize("tuning", ["--native"], indirect=True)
@pytest.mark.usefixtures("tuned")  # while nothing serves
def test_tune_that_disturbs_what_serves_is_noticed(tuning: Tuning, notice: Notice) -> None:
    guard = "if ours and not replace_running:"
    with workspace.changed(tuning.folder, "bench/tune.py", guard, "if False:"):
        notice(
            test_what_serves_is_not_disturbed_unless_asked_to_and_comes_back,
            "a tune that replaces what serves unasked",
            says="status=0",
        )


@pytest.mark.parametrize("tuning", ["--native"], indirect=True)
def test_profile_that_is_taken_for_another_engine_is_noticed(
    tuning: Tuning, notice: Notice
) -> None:
    differs = "if theirs != ours[name]:"
    with workspace.changed(tuning.folder, "stack/tuned.py", differs, "if False:"):
        notice(
            test_a_profile_of_another_engine_is_passed_over,
            "an `up` that takes any profile",
            says="is of another engine",
        )


NO_TUNE: dict[str, Any] = {"tuned": host.Result(0, "", "")}
UNLIKE: dict[Callable[..., None], Broken] = {
    test_an_interrupted_tune_goes_on: ("a tune that did nothing", NO_TUNE),
    test_candidates_that_crash_are_kept_with_the_reason: (
        "no candidate that crashes",
        {**NO_TUNE, "patch": {f"{__name__}.CRASHING": {}}},
    ),
    test_up_serves_as_tuned_and_says_so: IDLE,
    test_what_serves_comes_back_from_an_interrupted_tune: IDLE,
    test_bad_input_is_refused: IDLE,
}


@pytest.mark.parametrize("tuning", ["--native"], indirect=True)
@pytest.mark.parametrize("check", UNLIKE, ids=lambda check: check.__name__)
def test_what_is_unlike_is_noticed(
    tuning: Tuning, tuned: host.Result, notice: Notice, check: Callable[..., None]
) -> None:
    assert tuned.status == 0
    broken, how = UNLIKE[check]
    tuning.invoke("up", tuning.flag)

    notice(check, broken, **how)
