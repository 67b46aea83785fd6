"""Bad input and faults end in two lines, the right exit code, and nothing left over.

Each test drives the command line in a deployment of its own, with real processes and containers.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stack import client, engine, fit, host, keys, runtime, status
from stack.compose import Docker
from stack.engine_log import Allocation, allocation
from stack.errors import Code, StackError
from stack.wait import wait_until
from tests import clients, workspace
from tests.checks.conftest import CRASHES, IDLE, Broken, Notice, skip_unasked
from tests.daemon import Daemon
from tests.ledger import Ledger
from tests.workspace import Deployment, Started

# Python itself may end by the signal once more; a shell says 130 for both.
INTERRUPTED = (130, -signal.SIGINT)


@pytest.fixture(params=["--docker", "--native"], ids=["docker-tiny", "native-tiny"])
def deployment(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Deployment]:
    skip_unasked(request, request.param)
    folder = workspace.make(tmp_path, GLM_TINY_PORT=str(workspace.free_port()))
    deployment = Deployment(folder, request.param)
    deployment.require_engine()
    yield deployment
    deployment.runtime.stop(deployment.service)


def assert_refused(done: host.Result, code: Code, *words: str) -> None:
    """Check for one line of cause, one of remedy, and no traceback."""
    assert done.status == code, done
    assert len(done.stderr.strip().splitlines()) == 2, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("quant", ["q9", "", "../../x", "--foo"])
@pytest.mark.row(
    "C1", "an unknown quant, nothing, a path, an option", "exit 2, with those that there are"
)
def test_unknown_quant(deployment: Deployment, quant: str) -> None:
    done = deployment.invoke("up", deployment.flag, f"--quant={quant}")

    assert_refused(done, Code.USAGE, "q4, q8, tiny")


@pytest.mark.parametrize(
    "line",
    ["GLM_GPU=", "GLM_GPU=0\nGLM_GPU=1", "GLM_COLOUR=red"],
    ids=["blank", "twice", "unknown"],
)
@pytest.mark.row(
    "C2", "a setting that is blank, given twice or unknown", "exit 2, with file and line"
)
def test_bad_setting(deployment: Deployment, line: str) -> None:
    env = deployment.folder / ".env"
    number = len(env.read_text().splitlines()) + len(line.splitlines())
    env.write_text(env.read_text() + line)

    done = deployment.up()

    env.write_text("")
    assert_refused(done, Code.USAGE, f".env, line {number}: ")


@pytest.mark.row("H1", "no Docker engine", "exit 10, said so")
def test_no_docker_engine(deployment: Deployment) -> None:
    done = deployment.invoke("up", "--docker", DOCKER_HOST="unix:///nonexistent")

    assert_refused(done, Code.HOST, "No Docker engine answers")


@contextlib.contextmanager
def deaf(folder: Path) -> Iterator[str]:
    """Yield the address of a Docker engine that hangs."""
    path = folder / "docker.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield f"unix://{path}"


@pytest.mark.row("H1", "a Docker engine that hangs", "exit 10, within 10 s")
def test_hanging_docker_engine(deployment: Deployment) -> None:
    with deaf(deployment.folder) as address:
        start = time.monotonic()
        done = deployment.invoke("up", DOCKER_HOST=address)

    assert_refused(done, Code.HOST, "hangs")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("deployment", ["--native"], indirect=True)
def test_native_server_can_be_stopped_while_docker_hangs(deployment: Deployment) -> None:
    assert deployment.up().status == 0
    with deaf(deployment.folder) as address:
        done = deployment.invoke("down", DOCKER_HOST=address)

    assert (done.status, done.stdout.splitlines()[:1]) == (0, ["glm-tiny (native) is stopped."])
    assert "hangs" in done.stderr
    assert deployment.nothing_runs()


@pytest.mark.parametrize("deployment", ["--docker"], indirect=True)
def test_deployment_of_the_same_name_is_left_alone(deployment: Deployment, tmp_path: Path) -> None:
    assert deployment.up().status == 0
    folder = tmp_path / "other"
    folder.mkdir()
    other = Deployment(workspace.make(folder, GLM_NAME=deployment.project.name), "--docker")

    assert_refused(other.invoke("down"), Code.USAGE, str(deployment.folder), "GLM_NAME")
    assert client.complete(deployment.server, "hello", tokens=4).tokens == 4


def test_port_taken_by_our_own_server_of_the_other_runtime(deployment: Deployment) -> None:
    assert deployment.up().status == 0
    (other,) = {"--docker", "--native"} - {deployment.flag}
    if other == "--docker":
        Deployment(deployment.folder, other).require_engine()

    done = deployment.invoke("up", other)

    assert_refused(done, Code.PORT, "of glm-tiny", f"invoke switch --to tiny {other}")


def test_log_of_a_start_that_failed_is_shown(deployment: Deployment) -> None:
    workspace.change(
        deployment.folder, "compose.yaml", "LLAMA_ARG_DEVICE: none", "LLAMA_ARG_DEVICE: X"
    )
    assert_refused(deployment.up(), Code.LOAD, "invoke logs --quant tiny")

    done = deployment.invoke("logs", "--quant", "tiny")

    assert "invalid device: X" in done.stdout
    assert "glm-tiny.failed.log" in done.stderr


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
@pytest.mark.row(
    "C7", "the port is taken, by IPv4 or IPv6", "exit 13, with the holder; nothing runs"
)
def test_port_taken(deployment: Deployment, family: socket.AddressFamily, address: str) -> None:
    with socket.socket(family) as taken:
        taken.bind((address, deployment.service.port or 0))
        taken.listen()
        done = deployment.up()

    assert_refused(done, Code.PORT, address, f"pid {os.getpid()}")
    assert deployment.nothing_runs()


def shorten(path: Path) -> None:
    shutil.copy(workspace.ROOT / "models" / path.name, path)
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: path.mkdir(), Code.LOAD),
        (lambda path: path.touch(), Code.INTEGRITY),
        (lambda path: path.write_text("<html>404</html>"), Code.INTEGRITY),
        (shorten, Code.INTEGRITY),
    ],
    ids=["directory", "empty", "not-gguf", "truncated"],
)
@pytest.mark.row(
    "L4",
    "the model is a folder, empty, a web page, cut short",
    "exit 40 or 21, with its name; nothing runs",
)
def test_broken_model(deployment: Deployment, make: Callable[[Path], None], code: Code) -> None:
    folder = deployment.folder / "broken"
    folder.mkdir()
    make(folder / deployment.service.model.path.name)
    deployment.set(GLM_MODELS=folder)

    assert_refused(deployment.up(), code, deployment.service.model.path.name)
    assert deployment.nothing_runs()


@pytest.mark.parametrize("content", [b"", b"key\r\n", b"key \n"], ids=["empty", "crlf", "blank"])
@pytest.mark.row("C9", "a key file that is empty, or with blanks", "exit 2; nothing runs")
def test_unusable_key(deployment: Deployment, content: bytes) -> None:
    keys.make(deployment.service).write_bytes(content)

    assert_refused(deployment.up(), Code.USAGE, "api-key")
    assert deployment.nothing_runs()
    deployment.service.key_file.unlink()


@pytest.mark.row("C9", "a key file of another user's", "exit 2, with the command that mends it")
def test_key_that_the_server_cannot_read(deployment: Deployment) -> None:
    os.chown(keys.make(deployment.service), 12345, 12345)

    assert_refused(deployment.up(), Code.USAGE, f"chown {deployment.service.uid}")


def test_configured_key_that_is_missing(deployment: Deployment) -> None:
    deployment.set(GLM_KEY_FILE=deployment.folder / "nowhere")

    assert_refused(deployment.up(), Code.USAGE, "invoke key")


@pytest.mark.row("C10", "published with no key", "exit 2")
def test_publishing_without_a_key(deployment: Deployment) -> None:
    deployment.set(GLM_BIND="0.0.0.0")  # noqa: S104

    assert_refused(deployment.up(), Code.USAGE, "0.0.0.0", "invoke key")  # noqa: S104


@contextlib.contextmanager
def small(folder: Path, size: str) -> Iterator[None]:
    """Put a small file system in a folder's place while the context lasts."""
    folder.mkdir()
    if host.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).status:
        pytest.skip("this user may not mount a small file system")
    try:
        yield
    finally:
        host.run(["umount", "--lazy", folder])


@pytest.mark.row("D9", "no room for a model", "exit 11; nothing is left")
def test_disk_too_small_for_a_stand_in(deployment: Deployment) -> None:
    folder = deployment.folder / "small"
    with small(folder, "64m"):
        deployment.set(GLM_MODELS=folder)
        done = deployment.invoke("model", "--quant", "q4", "--stand-in")
        left = list(folder.iterdir())

    assert_refused(done, Code.DISK, "GB")
    assert left == []


def fill(folder: Path) -> None:
    """Leave no byte in a small file system."""
    with contextlib.suppress(OSError), (folder / "filler").open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def files(folder: Path) -> dict[str, bytes]:
    """Return what is in a folder's files; logs, samples and what is held now come and go."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".log", "") and path.name != "samples.json"
    }


@contextlib.contextmanager
def stopping(deployment: Deployment) -> Iterator[None]:
    try:
        yield
    finally:
        deployment.runtime.stop(deployment.service)


SAID_WITH_NO_ROOM = {
    ("up", "{flag}"): 0,
    ("status",): 0,
    ("watch", "--once"): 0,
    ("key", "--rotate"): Code.DISK,
    ("report",): Code.DISK,
    ("opencode", "--write", ".state/opencode.json"): Code.DISK,
    ("bench", "--attach={url}", "--out=.state/bench"): Code.DISK,
    ("down",): 0,
}


def test_full_disk_under_logs_and_records(deployment: Deployment, ledger: Ledger) -> None:
    expected = "it serves on; commands work without a record, or exit 11 with nothing half-written"
    with (
        small(deployment.project.state, "4m"),
        stopping(deployment),  # before its record is gone
        ledger.trying(
            "D9",
            "no room for logs and records",
            expected=expected,
            target=deployment.target,
        ) as row,
    ):
        assert deployment.up().status == 0
        server = runtime.running(deployment.project, "tiny")
        fill(deployment.project.state)
        before = files(deployment.project.state)
        for arguments, status_ in SAID_WITH_NO_ROOM.items():
            row.inputs += 1
            named = {"flag": deployment.flag, "url": server.url}
            done = deployment.invoke(*(each.format(**named) for each in arguments))
            assert done.status == status_, (arguments, done)
            if done.status:
                assert_refused(done, Code.DISK)
            if arguments != ("down",):
                assert client.complete(server, "hello", tokens=64).tokens == 64
                assert files(deployment.project.state) == before, arguments
        row.found = "as expected"


def test_down_when_nothing_runs(deployment: Deployment) -> None:
    assert deployment.invoke("down").status == 0


def test_up_twice(deployment: Deployment) -> None:
    assert deployment.up().status == 0
    again = deployment.up()

    assert again.status == 0
    assert "was up already" in again.stdout


def test_answer_ends_its_line_and_speed_is_told_apart(deployment: Deployment) -> None:
    assert deployment.up().status == 0
    done = deployment.invoke("ask", "What is 12 + 30?")

    assert done.stdout[-1:] == "\n"
    assert re.fullmatch(r"\d+ tokens at [\d.]+ tokens/s\n", done.stderr)


@pytest.mark.row("D10", "another operation holds the lock", "exit 3, with its name and pid")
def test_up_while_another_operation_is_at_work(deployment: Deployment) -> None:
    with host.lock(deployment.project.state, verb="switch"):
        done = deployment.up()

    assert_refused(done, Code.BUSY, f"invoke switch, pid {os.getpid()}")


@pytest.mark.row("L8", "kill -9 while it loads", "40, said so; the next start serves")
def test_killed_while_it_loads(deployment: Deployment) -> None:
    server = deployment.start_server()
    os.kill(server.processes[0].pid, signal.SIGKILL)

    with pytest.raises(StackError, match="while it loaded") as caught:
        client.wait_ready(server)

    assert caught.value.code == Code.LOAD
    assert deployment.up().status == 0


@pytest.mark.row("L7", "SIGSTOP while it loads", "41, by its silence")
def test_stalled_load_is_given_up_by_its_silence(deployment: Deployment) -> None:
    server = deployment.start_server()
    os.kill(server.processes[0].pid, signal.SIGSTOP)

    with pytest.raises(StackError, match="nothing moved") as caught:
        client.wait_ready(server, stall_s=1)

    assert caught.value.code == Code.STALLED
    os.kill(server.processes[0].pid, signal.SIGCONT)


@pytest.mark.row("H3", "a GPU is asked for, and the CPU serves", "42")
def test_loaded_but_not_on_the_gpu(deployment: Deployment) -> None:
    """The tiny model serves from the CPU: what a GPU service must never be taken for."""
    server = deployment.start_server()
    client.wait_ready(server)

    with pytest.raises(StackError, match="loaded but not on the GPU: 0 of") as caught:
        fit.check_offload(server, allocation(server.logs(2000)))

    assert caught.value.code == Code.ON_CPU


@pytest.mark.row(
    "R1", "kill -9 while one client streams", "an error; status tells of it; the next start serves"
)
def test_killed_while_it_streams(deployment: Deployment) -> None:
    deployment.up()
    server = runtime.running(deployment.project, "tiny")
    with clients.asking(server, ["hello"], tokens=2000) as ((asking,), ends):
        wait_until(lambda: asking.begun or None, timeout_s=60, what="no stream")
        os.kill(server.processes[0].pid, signal.SIGKILL)

        assert set(ends()) <= {"cut", "error"}
    wait_until(lambda: truth(deployment), timeout_s=30, what="status does not tell of the crash")
    assert deployment.up().status == 0


def truth(deployment: Deployment) -> bool | None:
    """Return True once status tells of the crash: a native server ended, Docker restarted it."""
    looks = status.Looks(deployment.project).all()
    (state,) = (state for state in looks if state.quant == "tiny")
    told = state.state == "ended" or (state.state == "ready" and state.restarts > 0)
    return told or None


def locked_by(deployment: Deployment, pid: int) -> None:
    """Wait until an operation of ours is at work."""
    lock = deployment.project.state / "lock"
    wait_until(
        lambda: (lock.exists() and f"pid {pid}" in lock.read_text()) or None,
        timeout_s=10,
        what="the operation has not begun",
    )


def interrupt(
    process: Started, *, when: Callable[[], object], number: signal.Signals = signal.SIGINT
) -> host.Result:
    """Press Ctrl-C on a process once `when` is true, or signal it; return how it ended."""
    with process:
        wait_until(
            lambda: True if when() or process.poll() is not None else None,
            timeout_s=120,
            interval_s=0.002,
            what="the moment to interrupt",
        )
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        return host.Result(process.returncode, out, err)


@pytest.mark.parametrize("delay_s", [0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.1, 1.5])
@pytest.mark.row(
    "L9", "Ctrl-C at eight moments of a start", "nothing runs, or it is up; the next start serves"
)
def test_interrupted_up_leaves_nothing(deployment: Deployment, delay_s: float) -> None:
    with deployment.start("up", deployment.flag) as process:
        locked_by(deployment, process.pid)
        moment = time.monotonic() + delay_s
        done = interrupt(process, when=lambda: time.monotonic() > moment)

    assert "Traceback" not in done.stderr
    assert deployment.nothing_runs() == ("is up" not in done.stdout), done
    assert deployment.up().status == 0


def test_interrupted_stand_in_leaves_nothing(deployment: Deployment) -> None:
    models = deployment.folder / "new"
    models.mkdir()
    deployment.set(GLM_MODELS=models)
    process = deployment.start("model", "--quant", "q4", "--stand-in")

    done = interrupt(process, when=lambda: any(f.stat().st_size > 1e8 for f in models.iterdir()))

    assert done.status in INTERRUPTED, done
    assert list(models.iterdir()) == []


@pytest.mark.row("B5", "Ctrl-C in a build", "the old engine stays; nothing builds on")
def test_interrupted_build_leaves_the_old_engine(deployment: Deployment) -> None:
    deployment.set(GLM_ENGINE_SOURCE=engine.source(deployment.project))
    build = f":-{deployment.project.engine.build}}}"
    other = str(10**6 + secrets.randbelow(10**6))  # one that no cache has
    workspace.change(deployment.folder, "compose.yaml", build, f":-{other}}}")
    (deployment.folder / ".cache").unlink()
    before = image_id(deployment)
    process = deployment.start("build", deployment.flag)

    done = interrupt(process, when=lambda: builds(deployment, other))

    assert done.status in INTERRUPTED, done
    wait_until(
        lambda: None if builds(deployment, other) else True, timeout_s=10, what="still building"
    )
    assert image_id(deployment) == before
    assert deployment.flag == "--docker" or not deployment.runtime.built(deployment.service)


def image_id(deployment: Deployment) -> str | None:
    chosen = deployment.runtime
    if not isinstance(chosen, Docker):
        return None
    image = chosen.client.images.get(deployment.service.image)
    return image.id


def builds(deployment: Deployment, number: str) -> bool:
    """Return whether a CMake of this very build runs, in a container or not."""
    mark = {"--docker": f"LLAMA_BUILD_NUMBER={number}", "--native": f"--build\0{deployment.folder}"}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark[deployment.flag].encode() in path.read_bytes():
                return True
    return False


@pytest.mark.parametrize("delay_s", [0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7])
@pytest.mark.row(
    "D10",
    "kill -9 at seven moments of a start",
    "the next start takes over; the port is free in the end",
)
def test_killed_up_leaves_a_lock_and_a_server_that_the_next_one_takes_over(
    deployment: Deployment, delay_s: float
) -> None:
    with deployment.start("up", deployment.flag) as process:
        locked_by(deployment, process.pid)
        time.sleep(delay_s)
        process.kill()

    assert deployment.up().status == 0
    assert deployment.invoke("down").status == 0
    assert not host.port_conflict("127.0.0.1", deployment.service.port or 0)


@pytest.mark.parametrize("own_engine", ["100m"], indirect=True)
@pytest.mark.parametrize("deployment", ["--docker"], indirect=True)
def test_full_disk_under_dockers_data(
    own_engine: Daemon, deployment: Deployment, ledger: Ledger
) -> None:
    expected = "it serves on; it can be stopped; no start but with exit 11; then, with room, one"
    with ledger.trying(
        "D9", "no room for Docker's data", expected=expected, target=deployment.target
    ) as row:
        assert deployment.up().status == 0
        data = own_engine.folder / "data"
        fill(data)
        for row.inputs in range(1, 51):
            assert client.complete(deployment.server, "hello", tokens=64).tokens == 64
        assert deployment.invoke("status").status == 0
        assert deployment.invoke("down").status == 0
        fill(data)
        assert_refused(deployment.up(), Code.DISK, "no space left on device")
        assert deployment.nothing_runs()
        (data / "filler").unlink()
        assert deployment.up().status == 0
        row.found = "as expected"


LOG_BYTES = 10**6
SAID_BYTES = 8 * LOG_BYTES
REQUEST_BYTES = 2500
"""A request leaves more than this in the log."""


def test_log_of_a_server_that_says_much_is_bounded(deployment: Deployment, ledger: Ledger) -> None:
    expected = "three files of its bound, and what comes within a second; its end is there"
    target = deployment.target
    with ledger.trying("S9", "log of 8 times its bound", expected=expected, target=target) as row:
        size = f"max-size: {LOG_BYTES // 10**6}m"
        workspace.change(deployment.folder, "compose.yaml", "max-size: 10m", size)
        assert deployment.up().status == 0
        server = runtime.running(deployment.project, "tiny")
        parts, most, start = logs(deployment), 0, time.monotonic()
        with client.session(server) as session:
            while row.inputs < SAID_BYTES / REQUEST_BYTES:
                for _ in range(100):
                    session.post("/completion", json={"prompt": "hi", "n_predict": 1})
                row.inputs += 100
                most = max(most, sum(path.stat().st_size for path in parts.glob("*.log*")))
        each_s = SAID_BYTES / (time.monotonic() - start)
        assert LOG_BYTES < most < 3 * (LOG_BYTES + each_s), f"{most:,}"
        end = "stop processing"  # Docker's log comes a little later
        wait_until(lambda: end in server.logs(20), timeout_s=5, what="the log has no end")
        row.found = "as expected"


def logs(deployment: Deployment) -> Path:
    """Return the folder of a server's log, where no other is."""
    if isinstance(deployment.runtime, Docker):
        container = deployment.runtime.container(deployment.service)
        assert container
        return Path(container.attrs["LogPath"]).parent
    return deployment.project.state / "native"


# --- What is broken in the program, each of which a check above must notice.

BROKEN: dict[str, tuple[Callable[..., None], dict[str, object], tuple[str, str, str], str]] = {
    "errors that nobody catches": (
        test_configured_key_that_is_missing,
        {},
        ("verbs/terminal.py", "except StackError as", "except ZeroDivisionError as"),
        "Traceback",
    ),
    "errors that are told twice": (
        test_publishing_without_a_key,
        {},
        ("verbs/terminal.py", "Exit(str(error), ", 'Exit(f"{error}\\n{error}", '),
        "4 == 2",
    ),
    "a blind eye to taken ports": (
        test_port_taken,
        {"family": socket.AF_INET, "address": "127.0.0.1"},
        ("stack/runtime.py", "holder := port_conflict(", "holder := (lambda *_: None)("),
        "status=4",
    ),
    "a lock that nobody holds": (
        test_up_while_another_operation_is_at_work,
        {},
        ("stack/host.py", '_held(file, f"invoke {verb}", "operation")', "contextlib.nullcontext()"),
        "status=0",
    ),
    "an answer without its end": (
        test_answer_ends_its_line_and_speed_is_told_apart,
        {},
        ("verbs/serve.py", "print(flush=True)", "pass"),
        r"'.' == '\\n'",
    ),
    "a log that nobody bounds": (
        test_log_of_a_server_that_says_much_is_bounded,
        {},
        ("stack/bounded_log.py", "log.stat().st_size < most_bytes", "True"),
        r"\d,\d{3},\d{3}",
    ),
    "a full disk that nobody tells of": (
        test_full_disk_under_logs_and_records,
        {},
        ("verbs/terminal.py", "error.errno in FULL", "False"),
        "status=1,",
    ),
}


@pytest.mark.parametrize("deployment", ["--native"], indirect=True)
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_program_is_noticed(deployment: Deployment, notice: Notice, broken: str) -> None:
    check, given, (path, old, new), says = BROKEN[broken]
    workspace.change(deployment.folder, path, old, new)

    notice(check, broken, says=says, **given)


NOT_THERE = {"says": "is not running"}
UNLIKE: dict[Callable[..., None], Broken] = {
    **dict.fromkeys(
        (
            test_unknown_quant,
            test_bad_setting,
            test_no_docker_engine,
            test_hanging_docker_engine,
            test_native_server_can_be_stopped_while_docker_hangs,
            test_deployment_of_the_same_name_is_left_alone,
            test_port_taken_by_our_own_server_of_the_other_runtime,
            test_log_of_a_start_that_failed_is_shown,
            test_broken_model,
            test_unusable_key,
            test_key_that_the_server_cannot_read,
            test_disk_too_small_for_a_stand_in,
            test_up_twice,
            test_interrupted_up_leaves_nothing,
            test_interrupted_stand_in_leaves_nothing,
            test_interrupted_build_leaves_the_old_engine,
            test_killed_up_leaves_a_lock_and_a_server_that_the_next_one_takes_over,
        ),
        IDLE,
    ),
    test_killed_while_it_streams: (IDLE[0], IDLE[1] | NOT_THERE),
    test_down_when_nothing_runs: CRASHES,
    test_killed_while_it_loads: CRASHES,
    test_stalled_load_is_given_up_by_its_silence: (
        "a signal that nobody sends",
        {"patch": {"os.kill": lambda *_: None}},
    ),
    test_loaded_but_not_on_the_gpu: (
        "an engine that says that all is on the GPU",
        {"patch": {f"{__name__}.allocation": lambda _: Allocation(1e6, 1, 1, 9, 9)}},
    ),
}


@pytest.mark.parametrize("deployment", ["--native"], indirect=True)
@pytest.mark.parametrize("check", UNLIKE, ids=lambda check: check.__name__)
@pytest.mark.usefixtures("deployment")
def test_what_is_unlike_is_noticed(notice: Notice, check: Callable[..., None]) -> None:
    broken, how = UNLIKE[check]

    notice(check, broken, **how)


@pytest.mark.parametrize("deployment", ["--docker"], indirect=True)
@pytest.mark.parametrize("own_engine", ["100m"], indirect=True)
@pytest.mark.usefixtures("own_engine", "deployment")
def test_start_that_does_nothing_on_a_full_disk_is_noticed(notice: Notice) -> None:
    notice(test_full_disk_under_dockers_data, IDLE[0], **IDLE[1], **NOT_THERE)
