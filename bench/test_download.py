"""What locking and verifying cost a download: `nox -s bench`, on loopback, with a 4 GB file.

In each group both sides do the same work in one run, and the table shows how often the slower takes
the faster's time. The goals: `download` within 1.15 of the `hf` program alone, `models --verify`
within 1.11 of `sha256sum`. The hub sends with sendfile, at several times either's rate.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from stack import host, models
from tests.hub import REPOSITORY, Hub

FILE = "tiny.gguf"
SIZE_BYTES = 4_000_000_000
ROUNDS = 3


@dataclass(frozen=True)
class Side:
    """A deployment, and a hub with a file of `SIZE_BYTES`."""

    folder: Path
    hub: Hub

    @property
    def models(self) -> Path:
        return self.folder / "models"

    def run(self, *argv: str | Path) -> Callable[[], None]:
        def call() -> None:
            done = host.run(argv, cwd=self.folder, env=self.hub.environment(self.folder))
            assert done.status == 0, done

        return call

    def invoke(self, *arguments: str) -> Callable[[], None]:
        return self.run(sys.executable, "-m", "invoke", *arguments)

    def empty(self) -> None:
        """Remove what was downloaded, and let the disk end what it writes."""
        shutil.rmtree(self.models)
        self.models.mkdir()
        os.sync()


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    folder = tmp_path_factory.mktemp("download")
    models.write_random(folder / "file", recipe="tiny-q8_0", name="GLM-4.7-Flash tiny")
    os.truncate(folder / "file", SIZE_BYTES)
    with Hub(folder) as hub:
        hub.publish({FILE: "file"})
        (folder / "deployment").mkdir()
        yield Side(hub.deployment(folder / "deployment"), hub)
    shutil.rmtree(folder)


@pytest.mark.benchmark(group="download")
def test_hf_program(benchmark: BenchmarkFixture, side: Side) -> None:
    hf = Path(sys.executable).with_name("hf")
    download = side.run(hf, "download", REPOSITORY, FILE, "--local-dir", side.models)
    benchmark.pedantic(download, setup=side.empty, rounds=ROUNDS)


@pytest.mark.benchmark(group="download")
def test_download(benchmark: BenchmarkFixture, side: Side) -> None:
    benchmark.pedantic(side.invoke("download", "--quant", "tiny"), setup=side.empty, rounds=ROUNDS)


@pytest.mark.benchmark(group="verify")
def test_sha256sum(benchmark: BenchmarkFixture, side: Side) -> None:
    benchmark.pedantic(side.run("sha256sum", side.models / FILE), rounds=ROUNDS)


@pytest.mark.benchmark(group="verify")
def test_verify(benchmark: BenchmarkFixture, side: Side) -> None:
    benchmark.pedantic(side.invoke("models", "--verify"), rounds=ROUNDS)
