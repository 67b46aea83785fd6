import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import host
from stack.errors import Code, StackError
from stack.wait import wait_until
from tests.workspace import ROOT


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


LOCK_FOLDERS = (Path("/run/lock"), Path("/tmp"))  # noqa: S108
HOLD = "from stack import host\nwith host.machine_lock({name!r}, what='load'): print('has it')"


@pytest.fixture
def lock_name() -> Iterator[str]:
    name = f"test-{secrets.token_hex(4)}"
    yield name
    for folder in LOCK_FOLDERS:
        (folder / f"glm-{name}.lock").unlink(missing_ok=True)


@pytest.mark.parametrize("become", [[], ["setpriv", "--reuid=12345", "--clear-groups"]])
def test_machine_lock_is_one_for_every_process_and_user(lock_name: str, become: list[str]) -> None:
    if become and os.getuid():
        pytest.skip("only root can become another user")
    if host.run([*become, "test", "-r", ROOT / "stack" / "host.py"]).status:
        pytest.skip("another user cannot read this folder")
    contender = [*become, sys.executable, "-c", HOLD.format(name=lock_name)]
    with host.machine_lock(lock_name, what="load"):
        refused = host.run(contender, cwd=ROOT)
    taken = host.run(contender, cwd=ROOT)

    assert f"Another load is at work: invoke in {Path.cwd()}, pid {os.getpid()}." in refused.stderr
    assert taken.stdout == "has it\n"


def test_machine_lock_follows_no_link(lock_name: str, tmp_path: Path) -> None:
    with host.machine_lock(lock_name, what="load"):
        pass
    paths = [folder / f"glm-{lock_name}.lock" for folder in LOCK_FOLDERS]
    (path,) = (path for path in paths if path.exists())
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.unlink()
    path.symlink_to(victim)

    with pytest.raises(StackError, match="cannot be opened"), host.machine_lock(lock_name, what=""):
        pass

    assert victim.read_text() == "precious"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_interrupt_raises_and_the_rest_are_noted(number: signal.Signals) -> None:
    noted: list[bool] = []
    former = signal.getsignal(number)

    with host.Interrupts(lambda: noted.append(True)):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert not noted
        os.kill(os.getpid(), number)

    assert noted
    assert signal.getsignal(number) == former


def test_shielded_block_is_not_interrupted() -> None:
    noted: list[bool] = []

    with host.Interrupts(lambda: noted.append(True)) as interrupts:
        interrupts.shield()
        os.kill(os.getpid(), signal.SIGINT)

    assert noted
