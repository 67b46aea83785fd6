import dataclasses
from pathlib import Path

import pytest

from stack import config
from stack.config import Project
from stack.errors import Code, StackError
from stack.native import Native
from tests import workspace


@pytest.fixture
def project(tmp_path: Path) -> Project:
    folder = workspace.make(tmp_path)
    (folder / ".cache").unlink()
    return config.load(folder)


def mark_built(project: Project, quant: str) -> None:
    """Leave what a build leaves: the programs are not looked at."""
    service = project.service(quant)
    done = Path(Native(project).program(service, "x")).parent.parent / "done"
    done.parent.mkdir(parents=True)
    done.write_text(f"{project.engine.commit} {service.build_args.get('CUDA_ARCH', '')}\n")


@pytest.mark.parametrize("quant", ["tiny", "q4"])
def test_finished_build_is_built(project: Project, quant: str) -> None:
    mark_built(project, quant)

    assert Native(project).built(project.service(quant))


def test_build_for_another_gpu_is_not_built(project: Project) -> None:
    mark_built(project, "q4")
    other = config.load(project.root, given={"GLM_CUDA_ARCH": "90a-real"})

    assert not Native(other).built(other.service("q4"))


def test_build_of_another_engine_is_not_built(project: Project) -> None:
    mark_built(project, "tiny")
    moved = dataclasses.replace(project, engine=dataclasses.replace(project.engine, commit="0ther"))

    assert not Native(moved).built(moved.service("tiny"))


def test_build_with_other_patches_is_not_built(project: Project) -> None:
    mark_built(project, "tiny")
    engine = dataclasses.replace(project.engine, patches="0ther")

    moved = dataclasses.replace(project, engine=engine)
    assert not Native(moved).built(moved.service("tiny"))


def test_patch_that_does_not_apply_is_named(project: Project, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()

    with pytest.raises(StackError, match=r"1-slots.*\.patch does not apply") as caught:
        Native(project).build(project.service("tiny"), source=source)

    assert caught.value.code == Code.BUILD


def test_broken_record_is_moved_aside(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    record = project.state / "native" / "glm-tiny.json"
    record.parent.mkdir(parents=True)
    record.write_text("{not json")

    assert Native(project).find(project.service("tiny"), key="") is None
    assert "moved to glm-tiny.corrupt" in caplog.text
