import errno
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from stack import config, gguf_header, models
from stack.errors import Code, StackError
from tests import workspace
from tests.unit.conftest import NAME, TINY


def weights(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}


def test_plan_and_header_have_the_size_of_the_file(tiny: Path) -> None:
    planned, header = models.plan(TINY, name=NAME), gguf_header.read(tiny)
    assert planned.size_bytes == header.size_bytes == tiny.stat().st_size


def test_a_file_carries_the_name_it_was_given(tiny: Path) -> None:
    assert gguf_header.read(tiny).name == NAME


@pytest.mark.parametrize(
    ("recipe", "published_bytes", "tolerance"),
    [("full-q4_k", 17.51e9, 0.03), ("full-q8_0", 35.11e9, 0.06)],
)
def test_a_stand_in_is_nearly_as_large_as_the_published_file(
    recipe: str, published_bytes: float, tolerance: float
) -> None:
    assert models.plan(recipe).size_bytes == pytest.approx(published_bytes, rel=tolerance)


def test_a_stand_in_has_the_published_tensors() -> None:
    tensors = models.plan("full-q4_k").tensors
    assert len(tensors) == 844
    assert sum(prod(tensor.dims) for tensor in tensors) == 29_943_393_920


@pytest.mark.parametrize(("seed", "equal"), [(0, True), (1, False)])
def test_the_seed_decides_the_bytes(tiny: Path, path: Path, seed: int, *, equal: bool) -> None:
    models.write_random(path, recipe=TINY, name=NAME, seed=seed)
    assert (path.read_bytes() == tiny.read_bytes()) == equal


def test_experts_and_layers_differ(tiny: Path) -> None:
    tensors = weights(tiny)
    experts = [*tensors["blk.1.ffn_up_exps.weight"], *tensors["blk.2.ffn_up_exps.weight"]]
    assert len(np.unique(experts, axis=0)) == 16


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K"])
def test_weights_keep_the_scale_of_a_signal(
    path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    shape = replace(models.SHAPES["tiny"], q_lora=256, nope=256, expert_ff=512)
    recipe = models.Recipe(shape, 0, models.FLOATS | {"*": quant})
    monkeypatch.setitem(models.RECIPES, quant, recipe)
    models.write_random(path, recipe=quant, name=NAME)
    down = weights(path)["blk.1.ffn_down_exps.weight"]
    assert down.std() == pytest.approx(512**-0.5, rel=0.02)
    assert down.mean() == pytest.approx(0, abs=0.02 * 512**-0.5)


def test_an_unknown_recipe_names_the_known(path: Path) -> None:
    with pytest.raises(StackError, match="tiny-q8_0, full-q4_k, full-q8_0") as caught:
        models.write_random(path, recipe="q2", name=NAME)
    assert caught.value.code == Code.USAGE


def leave_free(monkeypatch: pytest.MonkeyPatch, folder: Path, spare_bytes: int) -> None:
    needed_bytes = models.plan(TINY, name=NAME).size_bytes + models.MARGIN_BYTES
    usage = {folder: SimpleNamespace(free=needed_bytes + spare_bytes)}
    monkeypatch.setattr(shutil, "disk_usage", usage.__getitem__)


def test_a_file_that_leaves_a_gibibyte_free_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_free(monkeypatch, path.parent, 0)
    models.write_random(path, recipe=TINY, name=NAME)


def test_a_file_that_leaves_less_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_free(monkeypatch, path.parent, -1)
    with pytest.raises(StackError, match=r"needs 1\.08 GB, 1\.08 GB are free") as caught:
        models.write_random(path, recipe=TINY, name=NAME)
    assert caught.value.code == Code.DISK


@pytest.mark.parametrize(
    ("cut", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "disk full"), StackError)],
    ids=["ctrl-c", "disk-full"],
)
def test_a_write_cut_short_leaves_only_the_old_file(
    path: Path, cut: BaseException, raised: type[BaseException]
) -> None:
    def stop(done_bytes: int, size_bytes: int) -> None:
        if done_bytes > size_bytes // 2:
            raise cut

    path.write_text("old")
    with pytest.raises(raised):
        models.write_random(path, recipe=TINY, name=NAME, progress=stop)
    assert [entry.read_text() for entry in path.parent.iterdir()] == ["old"]


def test_what_a_killed_write_left_is_replaced(path: Path) -> None:
    path.with_name(f".{path.name}.part").write_bytes(b"half")
    models.write_random(path, recipe=TINY, name=NAME)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("quant", config.load(workspace.ROOT).services)
def test_random_weights_have_the_header_that_is_asked_for(quant: str) -> None:
    model = config.load(workspace.ROOT).service(quant).model
    header = gguf_header.parse(models.plan(model.random).header)

    gguf_header.require(Path(quant), header, model.header)
