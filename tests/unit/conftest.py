"""A model file for the tests of what writes and what reads one."""

from pathlib import Path

import pytest

from stack import models

TINY = "tiny-q8_0"
NAME = "tiny (random weights)"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    models.write_random(path, recipe=TINY, name=NAME)
    return path
