import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from stack import host
from stack.errors import Code, StackError
from stack.wait import wait_until


def test_run_returns_status_and_both_streams() -> None:
    done = host.run(["sh", "-c", "echo out; echo err >&2; exit 3"])

    assert done == host.Result(3, "out\n", "err\n")


def test_run_hands_over_lines_as_they_come() -> None:
    seen: list[str] = []

    host.run(["sh", "-c", "echo one; echo two >&2"], line=seen.append)

    assert sorted(seen) == ["one", "two"]


def test_missing_program_is_named() -> None:
    with pytest.raises(StackError, match="no-such-program is not installed") as caught:
        host.run(["no-such-program"])

    assert caught.value.code == Code.HOST


def gone(pid: int) -> bool:
    wait_until(lambda: host.Process.of(pid) is None or None, timeout_s=5, what=f"{pid} lives")
    return True


def test_time_limit_ends_the_whole_group(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    with pytest.raises(StackError, match=r"no answer within 0\.5 s"):
        host.run(["sh", "-c", f"sleep 60 & echo $! > {pid_file}; wait"], timeout_s=0.5)

    assert gone(int(pid_file.read_text()))


def test_interrupt_ends_the_whole_group(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def interrupt() -> None:
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        host.run(["sh", "-c", f"trap '' INT; sleep 60 & echo $! > {pid_file}; exec sleep 1"])
    thread.join()

    assert gone(int(pid_file.read_text()))


def test_second_operation_is_told_who_is_first(tmp_path: Path) -> None:
    with (
        host.lock(tmp_path, verb="build"),
        pytest.raises(StackError, match=f"invoke build, pid {os.getpid()}") as caught,
        host.lock(tmp_path, verb="up"),
    ):
        pass

    assert caught.value.code == Code.BUSY


def test_lock_is_free_after_its_holder_failed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), host.lock(tmp_path, verb="up"):
        raise ZeroDivisionError

    with host.lock(tmp_path, verb="up"):
        pass


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "record"
    host.write_atomic(path, "old")

    with pytest.raises(UnicodeEncodeError):
        host.write_atomic(path, "new \ud800")

    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("theirs", "family"),
    [
        ("127.0.0.1", socket.AF_INET),
        ("0.0.0.0", socket.AF_INET),  # noqa: S104
        ("::1", socket.AF_INET6),
        ("::", socket.AF_INET6),
    ],
)
def test_port_taken_in_either_family_is_seen_with_its_holder(
    theirs: str, family: socket.AddressFamily
) -> None:
    with socket.socket(family) as taken:
        taken.bind((theirs, 0))
        taken.listen()
        found = host.port_conflict("127.0.0.1", taken.getsockname()[1])

    assert found
    assert found.address == theirs
    assert f"(pid {os.getpid()})" in found.holder


def test_port_on_another_address_is_no_conflict() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        assert host.port_conflict("192.0.2.1", taken.getsockname()[1]) is None


def test_own_listening_port_is_found() -> None:
    with socket.socket() as ours:
        ours.bind(("127.0.0.1", 0))
        ours.listen()

        assert host.listening_port(os.getpid()) == ours.getsockname()[1]


def test_process_is_known_by_its_start_not_its_pid_alone() -> None:
    me = host.Process.of(os.getpid())

    assert me
    assert me.alive()
    assert not host.Process(me.pid, me.started + 1).alive()


def test_spawned_program_is_known_by_the_file_it_writes(tmp_path: Path) -> None:
    pid_file, log = tmp_path / "pid", tmp_path / "log"

    host.spawn(["sleep", "60"], env=dict(os.environ), log=log, pid_file=pid_file)

    process = wait_until(lambda: host.Process.read(pid_file), timeout_s=5, what="no pid file")
    assert process.alive()
    process.signal_group(signal.SIGKILL)
    assert gone(process.pid)
    assert log.read_text() == ""


@pytest.mark.parametrize("text", ["", "12", "12 (sh) S 1 2", "x (sh) S"])
def test_pid_file_in_the_writing_is_no_process_yet(tmp_path: Path, text: str) -> None:
    (tmp_path / "pid").write_text(text)

    assert host.Process.read(tmp_path / "pid") is None
