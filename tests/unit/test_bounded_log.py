import os
import shutil
from pathlib import Path

import pytest

from stack import bounded_log, host
from stack.wait import wait_until

TALKS = "i=0; while [ -e {flag} ]; do i=$((i + 1)); echo $i; sleep 0.001; done"


def parts(log: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in log.parent.iterdir()}


def test_last_parts_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for number in range(5):
        with log.open("a") as writer:
            writer.write(f"{number}\n")
        bounded_log.bound(log, most_bytes=2, files=3)

    assert parts(log) == {"log": "", "log.1": "4\n", "log.2": "3\n"}


def test_log_within_its_bound_is_left(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("0")
    bounded_log.bound(log, most_bytes=2, files=3)

    assert parts(log) == {"log": "0"}


def test_disk_with_no_room_for_a_copy_gets_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy", full)
    log = tmp_path / "log"
    log.write_text("0123")
    bounded_log.bound(log, most_bytes=2, files=3)

    assert parts(log) == {"log": ""}


def test_log_is_bounded_as_long_as_its_writer_lives(tmp_path: Path) -> None:
    flag, log, pid_file = tmp_path / "flag", tmp_path / "log", tmp_path / "pid"
    flag.touch()
    talk = ["sh", "-c", TALKS.format(flag=flag)]
    limits = {"log_bytes": 400, "log_files": 2}
    host.spawn(talk, env=dict(os.environ), log=log, pid_file=pid_file, **limits)

    first = bounded_log.older(log)
    wait_until(lambda: first.exists() or None, timeout_s=10, what="no second part")
    writer = host.Process.read(pid_file)
    assert writer
    (keeper, *_) = host.children(writer.pid)
    flag.unlink()
    wait_until(lambda: None if host.Process.of(keeper) else True, timeout_s=5, what="it stays")
    assert "1\n2\n3\n" in first.read_text()
