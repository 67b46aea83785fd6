"""How long our own commands take when there is nothing to do: `nox -s bench`.

Times hold for the machine they ran on; the verdicts are the reader's. Each command is a process.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from stack import config, host, runtime
from stack.compose import NoEngineError
from tests import workspace

ROUNDS = 5


def command(folder: Path, *arguments: str) -> Callable[[], None]:
    def call() -> None:
        done = host.run([sys.executable, "-m", *arguments], cwd=folder)
        assert done.status == 0, done

    return call


@pytest.fixture(scope="module", params=["docker", "native"])
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A deployment that is built, with its runtime in the folder's name."""
    folder = workspace.make(
        tmp_path_factory.mktemp(request.param), GLM_TINY_PORT=str(workspace.free_port())
    )
    project = config.load(folder)
    service = project.service("tiny")
    try:
        chosen = runtime.choose(project, want=request.param)
    except NoEngineError as error:
        pytest.skip(error.cause)
    runtime.build(chosen, project, service)
    yield folder
    chosen.stop(service)


def flag(folder: Path) -> str:
    return "--docker" if "docker" in folder.name else "--native"


@pytest.mark.parametrize("tool", ["invoke", "nox"])
def test_list(benchmark: BenchmarkFixture, tool: str) -> None:
    benchmark.pedantic(command(workspace.ROOT, tool, "--list"), rounds=ROUNDS)


def test_second_build(benchmark: BenchmarkFixture, folder: Path) -> None:
    benchmark.pedantic(command(folder, "invoke", "build", flag(folder)), rounds=ROUNDS)


def test_up(benchmark: BenchmarkFixture, folder: Path) -> None:
    """From nothing running to the first tokens."""
    down = command(folder, "invoke", "down")
    up = command(folder, "invoke", "up", flag(folder))
    benchmark.pedantic(up, setup=down, rounds=ROUNDS)


def test_up_when_it_is_up(benchmark: BenchmarkFixture, folder: Path) -> None:
    command(folder, "invoke", "up", flag(folder))()

    benchmark.pedantic(command(folder, "invoke", "up", flag(folder)), rounds=ROUNDS)


def test_engine_alone(benchmark: BenchmarkFixture, folder: Path) -> None:
    """The engine's own share of an `up`: from exec to the end of its load, natively."""
    if flag(folder) == "--docker":
        pytest.skip("the engine is the same in a container")
    project = config.load(folder)
    service = project.service("tiny")
    chosen = runtime.native(project)

    def load() -> None:
        with runtime.serving(chosen, project, service):
            pass

    benchmark.pedantic(load, rounds=ROUNDS)
