"""Which profile holds for what is to be served, and what comes of one that does not."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from stack import config, fit, gguf_header, models, tuned
from stack.config import Project, Service
from stack.gguf_header import Header
from stack.tuned import Profile, Subject
from tests import workspace
from tests.unit.fake_nvml import FakeNvml, memory

HERE = Subject("q4", "Card", "b1 abc, patches p", "q4.gguf, SHA-256 1")
SETTINGS = {"GLM_SLOTS": "8", "GLM_SHARED_CACHE": "1", "GLM_CONTEXT": "65536"}


def profile(subject: Subject = HERE, **changed: Any) -> Profile:
    path = Path("profiles/a.json")
    return replace(Profile(path, subject, 4, "2026-01-01T00:00:00", SETTINGS), **changed)


@pytest.mark.parametrize(
    ("found", "pinned", "said"),
    [
        (profile(), {}, None),
        (profile(), {"GLM_SLOTS": "8", "GLM_GPU": "1"}, None),
        (profile(replace(HERE, card="Other")), {}, "of another card (Other)"),
        (profile(replace(HERE, engine="b2")), {}, "of another engine (b2)"),
        (profile(replace(HERE, model="x.gguf")), {}, "of another model (x.gguf)"),
        (profile(clients=16), {}, "for up to 16, not 4, clients"),
        (profile(), {"GLM_SLOTS": "2"}, "with GLM_SLOTS=8, and 2 is set"),
        (profile(settings={"GLM_COLOUR": "red"}), {}, "not usable: GLM_COLOUR is no setting"),
        (profile(settings={"GLM_SLOTS": "many"}), {}, "not usable: GLM_SLOTS must be a whole"),
        (profile(replace(HERE, quant="q8")), {}, ""),
    ],
    ids=[
        *("same", "other pin", "card", "engine", "model", "clients"),
        *("pin", "unknown setting", "bad value", "other quant"),
    ],
)
def test_a_profile_holds_only_for_what_it_was_measured_on(
    found: Profile, pinned: Mapping[str, str], said: str | None
) -> None:
    service = config.load(workspace.ROOT).service("q4")

    got = tuned.select([found], HERE, clients=4, service=service, pinned=pinned)

    assert (got.profile is found) == (said is None)
    if said is not None:
        assert said in got.said
        assert bool(got.said) == bool(said)


def test_the_first_that_holds_is_taken() -> None:
    service = config.load(workspace.ROOT).service("q4")
    other, first, second = profile(replace(HERE, card="Other")), profile(), profile(at="2025")

    got = tuned.select([other, first, second], HERE, clients=4, service=service, pinned={})

    assert (got.profile, got.said) == (first, "")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    models_folder, root = tmp_path / "files", tmp_path / "root"
    models_folder.mkdir()
    root.mkdir()
    folder = workspace.make(root, GLM_MODELS=str(models_folder), GLM_GPU="GPU-0")
    return config.load(folder, overrides={"GLM_Q4_FILE": "q4.stand-in.gguf"})


@pytest.fixture
def q4(project: Project) -> tuple[Service, Header]:
    service = project.service("q4")
    return service, gguf_header.parse(models.plan(service.model.random).header)


def keep(project: Project, folder: Path, name: str, **changed: object) -> Path:
    subject = asdict(tuned.subject(project, project.service("q4")))
    made = {"subject": subject, "clients": [1, 4], "at": "2026-01-01T00:00:00"}
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    path.write_text(json.dumps({**made, "settings": SETTINGS} | changed))
    return path


def install(monkeypatch: pytest.MonkeyPatch, used_mib: int) -> None:
    FakeNvml({"nvmlDeviceGetMemoryInfo": memory(used_mib)}).install(monkeypatch)


def test_up_takes_a_profile_and_names_it(
    monkeypatch: pytest.MonkeyPatch, project: Project, q4: tuple[Service, Header]
) -> None:
    install(monkeypatch, 600)
    keep(project, project.root / "profiles", "shared.json")
    keep(project, tuned.own_folder(project), "older.json", at="2025", settings={"GLM_SLOTS": "3"})
    keep(project, tuned.own_folder(project), "own.json", settings=SETTINGS | {"GLM_SLOTS": "9"})

    chosen = fit.choose(project, *q4)

    assert chosen
    assert chosen.service.slots == 9, "our own newest comes first"
    assert chosen.service.cells == 65536
    assert str(chosen).endswith("as tuned on 2026-01-01 (.state/profiles/own.json)")


def test_one_that_no_longer_fits_is_planned_again(
    monkeypatch: pytest.MonkeyPatch, project: Project, q4: tuple[Service, Header]
) -> None:
    install(monkeypatch, 143771 - 24_000)
    keep(
        project, project.root / "profiles", "a.json", settings=SETTINGS | {"GLM_CONTEXT": "202752"}
    )

    chosen = fit.choose(project, *q4)

    assert chosen
    assert chosen.service.slots == 4
    assert (chosen.total_mib or 0) < 24_000
    assert "planned again, since profiles/a.json does not fit now: glm-q4 needs" in str(chosen)


def test_what_is_set_in_env_wins(
    monkeypatch: pytest.MonkeyPatch, project: Project, q4: tuple[Service, Header]
) -> None:
    install(monkeypatch, 600)
    keep(project, project.root / "profiles", "a.json")
    pinned = config.changed(project, GLM_SLOTS="2")

    chosen = fit.choose(pinned, pinned.service("q4"), q4[1])

    assert chosen
    assert chosen.service.slots == 2
    assert "a.json is with GLM_SLOTS=8, and 2 is set" in str(chosen)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"subject": 1}'])
def test_a_broken_profile_is_passed_over(
    project: Project, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = keep(project, project.root / "profiles", "a.json")
    path.write_text(text)

    assert tuned.profiles(project) == ()
    assert "is no profile" in caplog.text


def test_profiles_of_the_tree_are_whole(caplog: pytest.LogCaptureFixture) -> None:
    tuned.profiles(config.load(workspace.ROOT))

    assert not caplog.text
