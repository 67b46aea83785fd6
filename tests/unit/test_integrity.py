import json
import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from stack import config, integrity
from stack.config import Service
from stack.errors import Code, StackError
from stack.integrity import Locked
from tests import workspace

BYTES = b"GGUF and weights"
ENTRY = Locked(
    file="GLM-4.7-Flash-UD-Q4_K_XL.gguf",
    repository="unsloth/GLM-4.7-Flash-GGUF",
    revision="0" * 40,
    size=len(BYTES),
    sha256=sha256(BYTES).hexdigest(),
    first_seen="2026-01-21T00:00:00+00:00",
)


@pytest.fixture
def service(tmp_path: Path) -> Service:
    models = tmp_path / "models"
    models.mkdir()
    return config.load(workspace.make(tmp_path, GLM_MODELS=str(models))).service("q4")


@pytest.fixture
def file(service: Service) -> Path:
    """A file as the lock has it, never hashed here."""
    integrity.write_lock(service.models_folder, [ENTRY])
    service.model_file.write_bytes(BYTES)
    return service.model_file


class Heard:
    """What progress was heard of, each report once."""

    def __init__(self) -> None:
        self.of: list[str] = []

    def hear(self, what: str, _done: int, _total: int) -> None:
        self.of.append(what)


@pytest.fixture
def heard() -> Heard:
    return Heard()


def state(service: Service) -> str:
    (copy,) = integrity.copies(service)
    return copy.state


def test_lock_is_read_as_it_was_written(tmp_path: Path) -> None:
    other = replace(ENTRY, file="other.gguf")
    integrity.write_lock(tmp_path, [other])
    integrity.write_lock(tmp_path, [ENTRY])

    assert integrity.read_lock(tmp_path) == {ENTRY.file: ENTRY, other.file: other}


def test_checked_in_lock_can_be_read() -> None:
    entries = integrity.read_lock(workspace.ROOT / "models")

    assert all(len(entry.revision) == 40 for entry in entries.values())


@pytest.mark.parametrize("text", ["", "<<<<<<< HEAD", '[{"file": "a"}]', "[1]"])
def test_lock_that_cannot_be_read_locks_everything(service: Service, text: str) -> None:
    (service.models_folder / integrity.LOCK).write_text(text)

    with pytest.raises(StackError, match=r"models\.lock cannot be read") as caught:
        integrity.require_verified(service)
    assert caught.value.code == Code.USAGE


@pytest.mark.usefixtures("file")
def test_locked_file_is_hashed_once(service: Service, heard: Heard) -> None:
    assert state(service) == "unverified"
    integrity.require_verified(service, heard.hear)
    integrity.require_verified(service, heard.hear)
    assert heard.of == [f"hash of {ENTRY.file}"]
    assert state(service) == "verified"


@pytest.mark.parametrize(
    "touch",
    [
        lambda path: os.utime(path, ns=(0, 0)),
        lambda path: (
            path.with_name("new").write_bytes(BYTES) and path.with_name("new").rename(path)
        ),
    ],
    ids=["mtime", "inode"],
)
def test_file_that_changed_is_hashed_again(service: Service, file: Path, touch: object) -> None:
    integrity.require_verified(service)
    assert callable(touch)
    touch(file)
    assert state(service) == "unverified"
    integrity.require_verified(service)
    assert state(service) == "verified"


def test_flipped_bit_is_refused_and_never_noted(service: Service, file: Path) -> None:
    file.write_bytes(BYTES[:-1] + bytes([BYTES[-1] ^ 1]))

    with pytest.raises(StackError, match=f"expected is {ENTRY.sha256}") as caught:
        integrity.require_verified(service)
    assert caught.value.code == Code.INTEGRITY
    assert "download --quant q4" in caught.value.remedy
    assert state(service) == "unverified"


def test_file_of_another_size_is_refused_unread(service: Service, file: Path, heard: Heard) -> None:
    file.write_bytes(BYTES[:-1])

    with pytest.raises(StackError, match="15 bytes, expected are 16"):
        integrity.require_verified(service, heard.hear)
    assert not heard.of


def test_file_that_is_not_locked_is_refused(service: Service) -> None:
    service.model_file.write_bytes(BYTES)

    with pytest.raises(StackError, match=r"not in models\.lock") as caught:
        integrity.require_verified(service)
    assert caught.value.code == Code.INTEGRITY


def test_entry_of_another_repository_does_not_count(service: Service, file: Path) -> None:
    integrity.write_lock(file.parent, [replace(ENTRY, repository="somebody/else")])

    with pytest.raises(StackError, match=r"not in models\.lock"):
        integrity.require_verified(service)


def test_missing_file_says_how_to_get_it(service: Service) -> None:
    with pytest.raises(StackError, match="needs") as caught:
        integrity.require_verified(service)
    assert caught.value.code == Code.LOAD
    assert "--stand-in" in caught.value.remedy


def test_random_weights_need_no_lock(service: Service) -> None:
    model = replace(service.model, path=service.model.path.with_suffix(integrity.STAND_IN))

    integrity.require_verified(replace(service, model=model))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": {"size": 1}}'])
def test_notes_that_cannot_be_read_are_none(service: Service, file: Path, text: str) -> None:
    integrity.require_verified(service)
    (file.parent / integrity.OWN_FOLDER / "verified.json").write_text(text)

    assert state(service) == "unverified"
    integrity.require_verified(service)
    assert state(service) == "verified"


def test_parts_of_a_split_model_are_verified_each_and_share_a_revision(service: Service) -> None:
    names = [f"model-0000{number}-of-00002.gguf" for number in (1, 2)]
    entries = [replace(ENTRY, file=name) for name in names]
    model = replace(service.model, path=service.model.path.with_name(names[0]))
    split = replace(service, model=model)
    integrity.write_lock(split.models_folder, entries)
    (split.models_folder / names[0]).write_bytes(BYTES)

    with pytest.raises(StackError, match=f"needs {names[1]}"):
        integrity.require_verified(split)
    (split.models_folder / names[1]).write_bytes(BYTES)
    integrity.require_verified(split)
    assert integrity.is_verified(split)
    integrity.write_lock(split.models_folder, [replace(entries[1], revision="1" * 40)])
    with pytest.raises(StackError, match="different revisions"):
        integrity.require_verified(split)


def test_file_outside_the_folder_of_models_is_refused(service: Service) -> None:
    model = replace(service.model, path=service.model.path.parent / "../x.gguf")

    with pytest.raises(StackError, match="GLM_Q4_FILE"):
        integrity.copies(replace(service, model=model))


def test_listing_hashes_only_when_asked(service: Service, file: Path, heard: Heard) -> None:
    (file.parent / "mine.gguf").write_bytes(BYTES)
    (file.parent / "full.stand-in.gguf").write_bytes(BYTES)

    def states(verify: integrity.Progress | None = None) -> list[tuple[str, str]]:
        return [(each.file, each.state) for each in integrity.listing([service], verify=verify)]

    others = [("full.stand-in.gguf", "stand-in"), ("mine.gguf", "unused")]
    assert states() == [(ENTRY.file, "unverified"), *others]
    assert not heard.of
    assert states(heard.hear) == [(ENTRY.file, "verified"), *others]
    assert heard.of == [f"hash of {ENTRY.file}"]


def test_half_written_files_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    own = tmp_path / integrity.OWN_FOLDER
    own.mkdir()
    (own / ".verified.json.ab12").touch()
    (tmp_path / ".models.lock.ab12").touch()

    with integrity.exclusive(tmp_path, verb="test"):
        assert [path.name for path in tmp_path.rglob("*")] == [own.name, "lock"]


def test_leftovers_are_what_was_made_here_and_is_of_no_use(service: Service, file: Path) -> None:
    folder = file.parent
    integrity.require_verified(service)
    (folder / "mine.gguf").write_bytes(BYTES)
    part = folder / integrity.OWN_FOLDER / "x.part"
    part.touch()
    (folder / integrity.OWN_FOLDER / "link.part").symlink_to(folder / "mine.gguf")
    assert integrity.leftovers(folder) == (part,)

    (folder / integrity.LOCK).write_text("[]")
    assert integrity.leftovers(folder) == (part, file)
    file.with_name("new").write_bytes(BYTES)
    file.with_name("new").rename(file)
    assert integrity.leftovers(folder) == (part,)


def test_notes_cannot_point_out_of_the_folder(service: Service, tmp_path: Path, file: Path) -> None:
    integrity.require_verified(service)
    outside = tmp_path / "outside.gguf"
    file.rename(outside)
    notes = file.parent / integrity.OWN_FOLDER / "verified.json"
    notes.write_text(json.dumps({"../outside.gguf": json.loads(notes.read_text())[ENTRY.file]}))

    assert integrity.leftovers(file.parent) == ()
