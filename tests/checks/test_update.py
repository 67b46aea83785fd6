"""An engine is moved only once it is proved, and back; whatever fails leaves the one that serves.

The candidates are the pinned engine's source with a change. Docker compiles them; natively, where
no compiler cache knows another folder, their CMake takes the pinned engine's own programs.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest

from stack import client, config, engine, host, runtime
from stack.compose import Docker, NoEngineError
from stack.config import Project
from stack.errors import Code
from stack.wait import wait_until
from tests import workspace
from tests.checks.conftest import CRASHES, IDLE, Notice

SAMPLED = "                id = common_sampler_sample(slot.smpl.get(), slot.ctx_tgt, tok_idx);\n"
SERVER = Path("tools") / "server" / "server-context.cpp"
TAKEN = """if(DEFINED ENV{GLM_TEST_PROGRAMS})
  project(taken NONE)
  file(COPY $ENV{GLM_TEST_PROGRAMS}/ DESTINATION ${CMAKE_BINARY_DIR}/bin)
  foreach(name llama-server llama-bench llama-batched-bench llama-fit-params)
    add_custom_target(${name})
  endforeach()
  return()
endif()
"""


@dataclass(frozen=True)
class Deployment(workspace.Deployment):
    """A folder with its own images and cache, of which the pinned engine is a link."""

    sources: Path
    pinned: Project

    limit_s = 900

    def start(self, *arguments: str, **env: str) -> workspace.Started:
        program = runtime.native(self.pinned).program(self.pinned.service("tiny"), "x")
        return super().start(*arguments, GLM_TEST_PROGRAMS=str(Path(program).parent), **env)

    def source(self, name: str, *, sampled: str = SAMPLED) -> str:
        """Make the engine's source with a change: in what follows the sampling of a token."""
        tree = self.sources / name
        if tree.exists():
            return str(tree)
        shutil.copytree(engine.source(self.pinned), tree, copy_function=os.symlink)
        replace(tree / "LICENSE", "MIT License", f"MIT License ({name})")
        replace(tree / SERVER, SAMPLED, sampled)
        top = tree / "CMakeLists.txt"
        replace(top, "cmake_minimum_required", f"{TAKEN}cmake_minimum_required")
        return str(tree)

    def state(self) -> tuple[object, ...]:
        """Return all that an update that fails must leave as it is."""
        record = self.folder / config.ENGINE_RECORD
        docker = Docker(self.project)
        image = self.project.service("tiny").image
        return (
            record.read_text() if record.exists() else None,
            docker.image_id(image),
            docker.image_id(f"{image}-previous"),
            docker.image_id(f"{image}-candidate"),
            [
                c.name
                for c in docker.client.containers.list()
                if str(c.name).startswith(self.project.name)
            ],
        )


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.unlink()
    path.write_text(text.replace(old, new, 1))


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Deployment]:
    if request.config.option.attach:
        pytest.skip("an attached server's engine is out of reach")
    folder = workspace.make(
        tmp_path_factory.mktemp("update"), GLM_TINY_PORT=str(workspace.free_port())
    )
    pinned = config.load(folder)
    tiny = pinned.service("tiny")
    docker, native = Docker(pinned), runtime.native(pinned)
    try:
        docker.check()
    except NoEngineError as error:
        pytest.skip(error.cause)
    for each in (docker, native):
        runtime.ensure_engine(each, pinned, tiny)
    shared = folder / ".cache"
    target = shared.resolve() / "engine"
    shared.unlink()
    (shared / "engine").mkdir(parents=True)
    built = Path(native.program(tiny, "llama-server")).parent.parent
    for name in (pinned.engine.commit[:12], built.name):
        (shared / "engine" / name).symlink_to(target / name)
    workspace.change(folder, "compose.yaml", "image: glm-server:", f"image: {pinned.name}:")
    docker.name_image(tiny.image, f"{pinned.name}:cpu")
    made = Deployment(folder, "--docker", tmp_path_factory.mktemp("sources"), pinned)
    assert made.invoke("up", "--docker").status == 0
    yield made
    made.invoke("down")
    for image in docker.client.images.list():
        for tag in image.tags:
            if tag.startswith(pinned.name):
                docker.drop_image(tag)


def assert_refused(done: host.Result, code: Code, *words: str) -> None:
    assert done.status == code, done
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_nothing_to_go_back_to(deployment: Deployment) -> None:
    assert_refused(deployment.invoke("rollback"), Code.USAGE, "no earlier engine")


@pytest.mark.parametrize("wanted", ["no-such-ref", "./nowhere"])
def test_engine_that_cannot_be_had(deployment: Deployment, wanted: str) -> None:
    before = deployment.state()

    done = deployment.invoke("update", "--to", wanted)

    assert done.status in {Code.USAGE, Code.BUILD}, done
    assert deployment.state() == before


@pytest.mark.row("S10", "update to an engine that does not compile", "30; the old one serves on")
def test_engine_that_does_not_compile(deployment: Deployment) -> None:
    before, server = deployment.state(), deployment.server
    source = deployment.source("broken")
    replace(Path(source) / "ggml" / "src" / "ggml.c", "#define", "#error on purpose\n#define")

    done = deployment.invoke("update", "--to", source)

    assert_refused(done, Code.BUILD)
    assert deployment.state() == before
    assert server.ended() is None


@pytest.mark.row("S10", "update to an engine that answers wrong", "50; the old one serves on")
def test_engine_that_answers_wrong(deployment: Deployment) -> None:
    before, server = deployment.state(), deployment.server
    with client.session(server) as session:
        seven, eight = (
            session.post("/tokenize", json={"content": digit}).json()["tokens"][-1]
            for digit in "78"
        )
    wrong = f"{SAMPLED}                if (id == {seven}) id = {eight};\n"

    done = deployment.invoke("update", "--to", deployment.source("wrong", sampled=wrong))

    assert_refused(done, Code.VERIFY, "answers wrong: ", "right")
    assert deployment.state() == before
    assert server.ended() is None


@pytest.mark.row("S10", "update to a slower engine", "51, with both rates; the old one serves on")
def test_engine_that_is_slow(deployment: Deployment) -> None:
    before, server = deployment.state(), deployment.server
    slow = f"{SAMPLED}                usleep(1000);\n"
    source = deployment.source("slow", sampled=slow)
    replace(Path(source) / SERVER, "#include", "#include <unistd.h>\n#include")

    done = deployment.invoke("update", "--to", source)

    assert_refused(done, Code.MISSED, "tokens/s")
    assert deployment.state() == before
    assert server.ended() is None


def test_moved_and_back(deployment: Deployment) -> None:
    """Docker serves and moves; the native engine moves with it."""
    before = deployment.state()
    source = deployment.source("good")

    done = deployment.invoke("update", "--to", source)

    assert done.status == 0, done
    assert "docker-tiny: served again after" in done.stdout
    assert "native-tiny: loaded in" in done.stdout
    moved = deployment.project
    assert moved.engine.commit.startswith("folder")
    assert runtime.native(moved).built(moved.service("tiny"))
    assert moved.engine.commit in client.props(deployment.server)["build_info"]
    state = deployment.state()
    built = Docker(moved).provenance_file(moved.service("tiny")).read_text()
    assert json.loads(built)["subject"][0]["digest"]["sha256"] in str(state[1])
    assert state[1:4] == (state[1], before[1], None)
    assert state[1] != before[1]
    assert state[4] == before[4]
    again = deployment.invoke("update", "--to", source)
    assert again.status == 0, again
    assert deployment.state() == state
    report = json.loads((deployment.folder / config.ENGINE_RECORD).read_text())
    assert report["current"]["proofs"].keys() == {"docker-tiny", "native-tiny"}

    back = deployment.invoke("rollback")

    assert back.status == 0, back
    assert deployment.project.engine == deployment.pinned.engine
    assert deployment.pinned.engine.commit in client.props(deployment.server)["build_info"]
    assert deployment.state()[1:4] == (before[1], state[1], None)
    forth = deployment.invoke("rollback")
    assert forth.status == 0, forth
    assert deployment.project.engine == moved.engine
    assert deployment.invoke("rollback").status == 0


@pytest.mark.parametrize("moment", ["stopped", "pointed"])
def test_interrupted_in_the_take_over(deployment: Deployment, moment: str) -> None:
    """Back to the engine before, which serves again."""
    before = deployment.state()
    docker, image = Docker(deployment.project), deployment.project.service("tiny").image
    served = deployment.server
    process = deployment.start("rollback")

    def reached() -> bool | None:
        done = process.poll() is not None
        stopped = served.ended() is not None
        return (
            done
            or (stopped if moment == "stopped" else docker.image_id(image) != before[1])
            or None
        )

    with process:
        wait_until(reached, timeout_s=60, what=moment, interval_s=0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)

    assert process.returncode != 0, (out, err)
    assert "Traceback" not in err
    assert deployment.state() == before
    client.complete(deployment.server, "Hello")


SERVES_NOTHING = 'ENTRYPOINT ["/app/confine", "/app/nothing"]'
ANSWERS_WRONG = "ENV LLAMA_ARG_ROPE_FREQ_BASE=10000"


@contextmanager
def broken(docker: Docker, name: str, line: str = SERVES_NOTHING) -> Iterator[None]:
    """Put an image with the same labels and a fault in the place of another."""
    kept = docker.image_id(name)
    lines = f"FROM {kept}\n{line}\n"
    docker.client.images.build(fileobj=BytesIO(lines.encode()), tag=name, rm=True, forcerm=True)
    try:
        yield
    finally:
        assert kept
        docker.name_image(kept, name)


@pytest.mark.parametrize(
    ("fault", "told"), [(SERVES_NOTHING, ""), (ANSWERS_WRONG, "glm-tiny answers wrong: ")]
)
def test_engine_that_fails_after_the_take_over(
    deployment: Deployment, fault: str, told: str
) -> None:
    docker, image = Docker(deployment.project), deployment.project.service("tiny").image
    before = deployment.state()

    with broken(docker, f"{image}-previous", fault):
        done = deployment.invoke("rollback")

    assert_refused(done, Code.RESTORED, told, "The engine before it serves again")
    assert deployment.state() == before
    client.complete(deployment.server, "Hello")


def test_neither_engine_serves(deployment: Deployment) -> None:
    docker, image = Docker(deployment.project), deployment.project.service("tiny").image

    with broken(docker, f"{image}-previous"), broken(docker, image):
        done = deployment.invoke("rollback")

    assert_refused(done, Code.DARK, "does not serve either")
    assert deployment.invoke("up", "--docker").status == 0


def test_pinned_engine_by_its_commit(deployment: Deployment) -> None:
    """It has a source also where its git is out of reach."""
    done = deployment.invoke("update", "--to", deployment.pinned.engine.commit)

    assert done.status == 0, done
    assert deployment.project.engine == deployment.pinned.engine


def test_earlier_engine_that_is_gone(deployment: Deployment) -> None:
    docker, image = Docker(deployment.project), deployment.project.service("tiny").image
    before = deployment.state()
    docker.name_image(f"{image}-previous", f"{image}-kept")
    docker.drop_image(f"{image}-previous")

    done = deployment.invoke("rollback")

    docker.name_image(f"{image}-kept", f"{image}-previous")
    docker.drop_image(f"{image}-kept")
    assert_refused(done, Code.BUILD, "not there any more", "invoke update --to")
    assert deployment.state() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pin": 1}', '{"current": {"commit": "x"}}'])
def test_corrupt_record_is_told(deployment: Deployment, text: str) -> None:
    record = deployment.folder / config.ENGINE_RECORD
    kept = record.read_text()
    record.write_text(text)
    try:
        assert_refused(deployment.invoke("status"), Code.USAGE, "engine.json")
    finally:
        record.write_text(kept)


def test_record_that_nobody_checks_is_noticed(deployment: Deployment, notice: Notice) -> None:
    old, new = "(OSError, ValueError, KeyError, TypeError)", "ZeroDivisionError"
    with workspace.changed(deployment.folder, "stack/config.py", old, new):
        notice(
            test_corrupt_record_is_told,
            "a record that nobody checks",
            says="Traceback",
            text="[]",
        )


def test_update_that_asks_nothing_is_noticed(deployment: Deployment, notice: Notice) -> None:
    worse = "elif worse := self.answers.worse(self.answers.ask(up.server), before[0]):"
    with workspace.changed(deployment.folder, "stack/update.py", worse, "elif worse := []:"):
        workspace.change(deployment.folder, "stack/update.py", ", answers=self.answers)", ")")
        notice(
            test_engine_that_answers_wrong,
            "an update that asks a candidate nothing",
            says="status=0",
        )
    assert deployment.invoke("rollback").status == 0


UNLIKE = {
    **dict.fromkeys(
        (
            test_nothing_to_go_back_to,
            test_engine_that_cannot_be_had,
            test_engine_that_does_not_compile,
            test_engine_that_is_slow,
            test_moved_and_back,
            test_interrupted_in_the_take_over,
            test_engine_that_fails_after_the_take_over,
            test_neither_engine_serves,
            test_earlier_engine_that_is_gone,
        ),
        IDLE,
    ),
    test_pinned_engine_by_its_commit: CRASHES,
}


@pytest.mark.parametrize("check", UNLIKE, ids=lambda check: check.__name__)
@pytest.mark.usefixtures("deployment")
def test_what_is_unlike_is_noticed(notice: Notice, check: Callable[..., None]) -> None:
    broken, how = UNLIKE[check]

    notice(check, broken, **how)
