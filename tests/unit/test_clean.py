"""Only a folder with our marker is removed."""

from pathlib import Path

import pytest

from stack import clean, host
from stack.errors import Code, StackError


def test_folder_of_ours_is_removed_and_what_it_links_to_is_not(tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    (other / "deep" / "file").touch()
    folder = tmp_path / "ours"
    host.own_folder(folder)
    (folder / "link").symlink_to(other)
    (folder / "sub").mkdir()
    (folder / "sub" / "link").symlink_to(other)

    clean.remove(folder)

    assert not folder.exists()
    assert (other / "deep" / "file").exists()


def test_interrupted_removal_can_be_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    host.own_folder(folder)
    (folder / "file").touch()
    (folder / "file").unlink()  # as far as the first one came

    clean.remove(folder)

    assert not folder.exists()


def test_folder_that_was_somebody_elses_is_not_marked(tmp_path: Path) -> None:
    (tmp_path / "theirs").touch()
    host.own_folder(tmp_path)

    with pytest.raises(StackError, match="somebody else's") as caught:
        clean.remove(tmp_path)

    assert caught.value.code == Code.USAGE
    assert (tmp_path / "theirs").exists()


def test_link_is_refused(tmp_path: Path) -> None:
    host.own_folder(tmp_path / "ours")
    link = tmp_path / "link"
    link.symlink_to("ours")

    with pytest.raises(StackError, match="is a link to ours"):
        clean.remove(link)

    assert (tmp_path / "ours").exists()


@pytest.mark.parametrize("path", ["/", "/proc"])
def test_root_of_a_file_system_is_refused(path: str) -> None:
    with pytest.raises(StackError, match="root of a file system"):
        clean.remove(Path(path))
