"""`invoke watch` brings back real servers that crash or hang, and leaves alone what only works."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from bench import answers
from stack import client, config, host
from stack.compose import Docker
from stack.errors import StackError
from stack.server import Server
from stack.status import Looks
from stack.wait import wait_until
from tests import clients, workspace
from tests.checks.conftest import Notice, skip_unasked
from tests.daemon import Daemon
from tests.ledger import Ledger
from tests.workspace import Started

LIMIT_S = 3
PATIENCE_S = 90
INSIDE = "/app/models"
ALIAS = "      LLAMA_ARG_ALIAS: glm-4.7-flash-tiny\n"


@dataclass(frozen=True)
class Watched(workspace.Deployment):
    """A deployment of tiny whose server obeys tests/engine_faults.c, and what its watch said."""

    said: list[str] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """The server's own process; a container's init takes a moment to start it."""
        found = wait_until(lambda: self.server.processes or None, timeout_s=5, what="no process")
        return found[0].pid

    @contextlib.contextmanager
    def fault(self, name: str) -> Iterator[Path]:
        """Bring a fault about while the context lasts."""
        flag = self.folder / "models" / name
        flag.touch()
        try:
            yield flag
        finally:
            flag.unlink(missing_ok=True)

    def until(self, words: str) -> str:
        """Wait until the watch says something; return that line."""
        return wait_until(
            lambda: next((line for line in self.said if words in line), None),
            timeout_s=PATIENCE_S,
            what=f"{words!r} not among {self.said}",
        )

    def start(self, *arguments: str, **env: str) -> Started:
        """Start a command that sees the clock as the server does."""
        models = self.folder / "models"
        faults = {"LD_PRELOAD": f"{models / 'faults.so'}", "GLM_FAULTS": f"{models}"}
        return super().start(*arguments, **faults, **env)

    def answers(self) -> bool:
        return client.complete(self.server, "hello", tokens=4).tokens == 4

    def stays(self, seconds: float, pid: int) -> bool:
        """Return whether the server was left alone for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.said or self.pid != pid:
                return False
            time.sleep(0.1)
        return True


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The faults, compiled against the pinned engine's own header."""
    target = tmp_path_factory.mktemp("faults") / "faults.so"
    project = config.load(workspace.ROOT)
    source = project.cache / "engine" / project.engine.commit[:12]
    if not source.exists():
        pytest.skip("the engine's source is not here; a build fetches it")
    argv: list[str | Path] = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", target]
    folders = [f"-I{source / folder}" for folder in ("include", "ggml/include")]
    try:
        done = host.run([*argv, *folders, workspace.ROOT / "tests" / "engine_faults.c"])
    except StackError as error:
        pytest.skip(error.cause)
    assert done.status == 0, done.stderr
    return target


@pytest.fixture(params=["docker", "native"])
def watched(request: pytest.FixtureRequest, tmp_path: Path, faults: Path) -> Iterator[Watched]:
    skip_unasked(request, request.param)
    port = str(workspace.free_port())
    folder = workspace.make(tmp_path, GLM_TINY_PORT=port, GLM_MODELS=str(tmp_path / "models"))
    (folder / "models").mkdir()
    os.link(workspace.ROOT / "models" / "tiny.gguf", folder / "models" / "tiny.gguf")
    (folder / "models" / "faults.so").write_bytes(faults.read_bytes())
    added = f"      LD_PRELOAD: {INSIDE}/faults.so\n      GLM_FAULTS: {INSIDE}\n"
    workspace.change(folder, "compose.yaml", ALIAS, ALIAS + added)
    watched = Watched(folder, f"--{request.param}")
    chosen = watched.require_engine()
    yield watched
    chosen.stop(watched.service)


# The runtime makes no difference to what these check.
NATIVE = pytest.mark.parametrize("watched", ["native"], indirect=True)


@contextlib.contextmanager
def watching(watched: Watched, *, limit_s: float = LIMIT_S) -> Iterator[Started]:
    """Run `invoke watch` while the context lasts; it must end as asked, and say no error."""
    limits = (f"--limit={limit_s}", "--interval=0.2")
    with watched.start("watch", *limits) as process:
        reader = threading.Thread(
            target=lambda: watched.said.extend(iter(process.stdout.readline, "")),  # type: ignore[union-attr]
        )
        reader.start()
        lock = watched.project.state / "watch" / "lock"
        wait_until(lambda: lock.exists() or None, timeout_s=PATIENCE_S, what="no watch")
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE_S)
            finally:  # whoever waits for it next has no limit
                process.kill()
            reader.join()
            said = process.stderr.read() if process.stderr else ""
    assert "Traceback" not in said, said


def test_killed_server_is_back(watched: Watched) -> None:
    watched.serve()
    with watching(watched):
        wait_until(
            lambda: (watched.project.state / "watch.json").exists() or None,
            timeout_s=PATIENCE_S,
            what="no look",
        )
        pid = watched.pid
        os.kill(pid, signal.SIGKILL)

        by_docker = isinstance(watched.runtime, Docker)
        watched.until("Docker restarted it" if by_docker else "serves again")

        client.wait_ready(watched.server)
        assert watched.answers()
        assert watched.pid != pid


@pytest.mark.row(
    "R4", "frozen by SIGSTOP for longer than the limit", "one restart, then it answers"
)
def test_frozen_server_is_restarted_after_the_limit(watched: Watched) -> None:
    watched.serve()
    with watching(watched):
        os.kill(watched.pid, signal.SIGSTOP)

        assert "not answering" in watched.until("restart 1 of 3")
        watched.until("serves again")

    assert watched.answers()


@pytest.mark.row("R4", "frozen by SIGSTOP, and let go before the limit", "left alone, and answers")
def test_frozen_server_that_goes_on_before_the_limit_is_left_alone(watched: Watched) -> None:
    watched.serve()
    pid = watched.pid
    with watching(watched, limit_s=6):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(3)
        os.kill(pid, signal.SIGCONT)

        assert watched.stays(5, pid), watched.said
    assert watched.answers()


@pytest.mark.row("L7", "a load that is slow, for longer than the limit", "never ended")
def test_load_that_moves_is_never_ended(watched: Watched) -> None:
    with watched.fault("slow") as flag:
        server = watched.start_server()
        pid = watched.pid
        with watching(watched, limit_s=1):
            assert watched.stays(6, pid), watched.said
            flag.unlink()
            client.wait_ready(server)
            assert watched.stays(1, pid), watched.said


@NATIVE
@pytest.mark.row("L7", "a load that stalls", "restarted after the limit, by its silence")
def test_load_that_stalls_is_restarted(watched: Watched) -> None:
    with watched.fault("stall") as flag:
        watched.start_server()
        with watching(watched, limit_s=1):
            assert "nothing moves while it is loading" in watched.until("restart 1 of 3")
            flag.unlink()
            watched.until("serves again")
    assert watched.answers()


def crowd(server: Server, *, tokens: int) -> list[threading.Thread]:
    """Fill four slots and a queue."""

    def ask() -> None:
        with contextlib.suppress(StackError):
            client.complete(server, "hello", tokens=tokens)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.row("R5", "all slots busy and a queue, for longer than the limit", "left alone")
def test_busy_server_is_left_alone(watched: Watched) -> None:
    watched.serve()
    pid = watched.pid
    with watching(watched, limit_s=2):
        threads = crowd(watched.server, tokens=100_000)

        assert watched.stays(6, pid), watched.said
        state = Looks(watched.project).state(watched.server)
    watched.runtime.stop(watched.service)
    for thread in threads:
        thread.join()
    assert (state.state, state.running, state.waiting) == ("busy", 4, 2)


@NATIVE
@pytest.mark.row(
    "R5", "health 200, and nothing is decoded", "restarted after the limit, then it answers"
)
def test_server_that_decodes_nothing_is_restarted_though_its_health_is_good(
    watched: Watched,
) -> None:
    watched.serve()
    with watched.fault("hang") as flag, watching(watched):
        threads = crowd(watched.server, tokens=8)

        assert "stuck" in watched.until("restart 1 of 3")
        flag.unlink()
        watched.until("serves again")
        for thread in threads:
            thread.join()
    assert watched.answers()


@NATIVE
@pytest.mark.row(
    "R5", "health 200, and every completion fails", "restarted after the limit, then it answers"
)
def test_server_that_fails_every_request_is_restarted_though_its_health_is_good(
    watched: Watched,
) -> None:
    watched.serve()
    with watched.fault("fail") as flag, watching(watched):
        wait_until(
            lambda: (watched.project.state / "watch.json").exists() or None,
            timeout_s=PATIENCE_S,
            what="no look",
        )
        with pytest.raises(StackError, match="does not generate"):
            client.complete(watched.server, "hello")
        assert client.health(watched.server) == "ready"

        assert "every request fails" in watched.until("restart 1 of 3")
        flag.unlink()
        watched.until("serves again")
    assert watched.answers()


def bad_requests(server: Server) -> None:
    """Ask for what a client may not: broken JSON, and a prompt over the context."""
    with client.session(server, timeout_s=30) as session:
        for _ in range(3):
            assert session.post("/completion", content=b"{").is_error
            assert session.post("/completion", json={"prompt": [5] * 9000}).is_error


@NATIVE
def test_mistakes_of_clients_cost_no_cached_prompt(watched: Watched) -> None:
    watched.serve()
    pid, prompt = watched.pid, {"prompt": list(range(5, 500)), "n_predict": 1}
    with watching(watched, limit_s=2), client.session(watched.server, timeout_s=30) as session:
        session.post("/completion", json=prompt)
        decodes = client.metrics(session)["n_decode_total"]
        bad_requests(watched.server)

        assert watched.stays(4, pid), watched.said
        assert client.metrics(session)["n_decode_total"] == decodes  # nothing was generated
        again = session.post("/completion", json=prompt).json()
    assert again["timings"]["cache_n"] > 490, again["timings"]


@pytest.mark.row(
    "S8", "it crashes at every request", "no more than 3 restarts, then a written diagnosis"
)
def test_spent_budget_ends_in_a_diagnosis(watched: Watched) -> None:
    watched.serve()
    with watched.fault("crash"), watching(watched):
        with pytest.raises(StackError):
            client.complete(watched.server, "hello")

        line = watched.until("gave up")
        told = Path(line.split()[-1]).read_text()
        count = sum("restart 3 of 3" in each for each in watched.said)
        by_docker = sum("by Docker" in each or "Docker restarted" in each for each in watched.said)
        time.sleep(2)

    assert count or by_docker
    assert "Trouble:" in told
    assert "gave up" not in "".join(watched.said[watched.said.index(line) + 1 :])
    kept = json.loads((watched.project.state / "watch.json").read_text())
    assert [case["gave_up"] for case in kept.values() if case["gave_up"]] == [line.split()[-1]]
    watched.serve()  # and the next start, the fault gone, serves
    assert watched.answers()


@NATIVE
def test_restart_that_answers_wrong_is_none(watched: Watched) -> None:
    watched.serve()
    file = watched.folder / "compose.yaml"
    right = file.read_text()
    file.write_text(right.replace(ALIAS, f'{ALIAS}      LLAMA_ARG_ROPE_FREQ_BASE: "10000"\n'))
    with watching(watched):
        os.kill(watched.pid, signal.SIGKILL)
        assert "glm-tiny answers wrong: " in watched.until("the restart failed")

    file.write_text(right)
    with watching(watched):
        watched.until("serves again")
    assert watched.answers()


@pytest.mark.parametrize("end", ["SIGTERM", "docker stop"])
def test_end_in_good_order(watched: Watched, end: str) -> None:
    """A stray SIGTERM is no wish of an operator; `docker stop` is."""
    watched.serve()
    if end == "SIGTERM":
        with watching(watched):
            os.kill(watched.pid, signal.SIGTERM)
            watched.until("serves again")
        assert watched.answers()
        return
    if not isinstance(watched.runtime, Docker):
        pytest.skip("only Docker knows who stopped it")
    stop(watched)
    with watching(watched):
        time.sleep(4)
    assert watched.said == []


@NATIVE
def test_restart_that_was_interrupted_is_taken_up_again(watched: Watched) -> None:
    watched.serve()
    pid = watched.pid
    with watching(watched) as process:
        os.kill(pid, signal.SIGKILL)
        watched.until("restart 1 of 3")
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
    with watching(watched):
        watched.until("serves again")
    assert watched.answers()


@NATIVE
def test_look_on_a_timer(watched: Watched) -> None:
    watched.serve()
    with workspace.invoke(watched.folder, "watch", "--once") as process:
        out, err = process.communicate(timeout=PATIENCE_S)

    assert (process.returncode, out, err) == (0, "", "")


@NATIVE
def test_second_watch_is_refused(watched: Watched) -> None:
    with watching(watched), workspace.invoke(watched.folder, "watch", "--once") as process:
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3, err


CLOCK = pytest.mark.parametrize("day", ["tomorrow", "yesterday"])


@pytest.mark.parametrize(
    ("watched", "day"), [("docker", "tomorrow"), ("native", "yesterday")], indirect=["watched"]
)
def test_clock_that_is_set_while_it_serves(watched: Watched, ledger: Ledger, day: str) -> None:
    expected = "streams are whole, rates and uptime go on, nothing is restarted; keys change"
    target = f"{watched.runtime.name}-tiny"
    with ledger.trying("-", f"clock set to {day}", expected=expected, target=target) as row:
        watched.up()
        server, pid, row.inputs = watched.server, watched.pid, 4
        with clients.asking(server, ["hello"] * row.inputs, tokens=800) as (asking, ends):
            begun = lambda: all(each.begun for each in asking) or None  # noqa: E731
            wait_until(begun, timeout_s=PATIENCE_S, what="no stream")
            with watched.fault(day), watching(watched):
                assert ends() == ["whole"] * row.inputs
                assert watched.stays(2 * LIMIT_S, pid), watched.said
                (state,) = (
                    s for s in json.loads(watched.invoke("status", "--json").stdout) if s["url"]
                )
                assert state["state"] == "ready"
                assert 0 < state["up_s"] < 600
                assert 0 < client.complete(server, "hello", tokens=64).decode_tokens_s < 1e5
        with watched.fault(day):
            assert watched.invoke("key", "--rotate").status == 0
            assert client.complete(replace(watched.server, key=server.key), "hello").tokens
            assert watched.invoke("key", "--retire").status == 0
            assert watched.answers()
        row.found = "as expected"


@CLOCK
def test_clock_that_is_set_between_two_faults(watched: Watched, ledger: Ledger, day: str) -> None:
    expected = "the budget goes on; what `docker stop` ended stays down"
    target = f"{watched.runtime.name}-tiny"
    case = f"clock set to {day}, then a fault"
    with ledger.trying("-", case, expected=expected, target=target) as row:
        row.inputs = 1
        watched.up()
        if isinstance(watched.runtime, Docker):
            stop(watched)
            with watched.fault(day), watching(watched):
                time.sleep(4)
            assert watched.said == []
        else:
            with watching(watched):
                os.kill(watched.pid, signal.SIGKILL)
                watched.until("serves again")
                with watched.fault(day):
                    os.kill(watched.pid, signal.SIGKILL)
                    watched.until("restart 2 of 3")
        row.found = "as expected"


def stop(watched: Watched) -> None:
    """Stop a container as an operator may."""
    assert isinstance(watched.runtime, Docker)
    container = watched.runtime.container(watched.service)
    assert container
    container.stop()


QUESTIONS = answers.question_set({"repeat": 2, "reverse": 2, "next": 2}, seed=7)


@pytest.mark.parametrize("watched", ["docker"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
def test_docker_engine_that_restarts(
    own_engine: Daemon, watched: Watched, ledger: Ledger, number: signal.Signals
) -> None:
    expected = (
        "what served serves again, by the watch, and answers right; what was stopped does not"
    )
    case = f"Docker's engine gets {number.name}, and comes back"
    with ledger.trying("S7", case, expected=expected, target="docker-tiny") as row:
        row.inputs = 2
        watched.up()
        with watching(watched):
            time.sleep(1)
            own_engine.end(number)
            own_engine.start()
            watched.until("serves again")
            replies = answers.ask(watched.server, QUESTIONS, clients=4)
            assert all(reply.right for reply in replies)

            stop(watched)
            wait_until(lambda: seen_to_be_stopped(watched), timeout_s=PATIENCE_S, what="not seen")
            said = len(watched.said)
            own_engine.end(number)
            own_engine.start()
            time.sleep(2 * LIMIT_S)
            assert "restart" not in "".join(watched.said[said:])
        row.found = "as expected"


def seen_to_be_stopped(watched: Watched) -> bool | None:
    kept = json.loads((watched.project.state / "watch.json").read_text())
    return kept.get("tiny docker", {}).get("stopped") or None


# --- What is broken in the program, each of which a check above must notice.

WATCH = "stack/watch.py"
NEVER_ACTS = (WATCH, ">= trouble.limit_s", "< 0")
ALWAYS_ACTS = (WATCH, '("ready", "busy")', "()")
BROKEN: dict[Callable[..., None], tuple[str, tuple[str, str, str], str]] = {
    **dict.fromkeys(
        (
            test_killed_server_is_back,
            test_frozen_server_is_restarted_after_the_limit,
            test_load_that_stalls_is_restarted,
            test_server_that_decodes_nothing_is_restarted_though_its_health_is_good,
            test_server_that_fails_every_request_is_restarted_though_its_health_is_good,
            test_end_in_good_order,
            test_clock_that_is_set_between_two_faults,
        ),
        ("a watch that never acts", NEVER_ACTS, "not among"),
    ),
    **dict.fromkeys(
        (
            test_frozen_server_that_goes_on_before_the_limit_is_left_alone,
            test_busy_server_is_left_alone,
            test_mistakes_of_clients_cost_no_cached_prompt,
            test_look_on_a_timer,
        ),
        ("a watch that takes work for trouble", ALWAYS_ACTS, "restart 1 of 3"),
    ),
    test_clock_that_is_set_while_it_serves: (
        "a watch that takes work for trouble",
        ALWAYS_ACTS,
        "'cut' != 'whole'",
    ),
    test_load_that_moves_is_never_ended: (
        "a watch that sees nothing move",
        (WATCH, "            if moved:", "            if False:"),
        "restart 1 of 3",
    ),
    test_spent_budget_ends_in_a_diagnosis: (
        "a watch that never gives up",
        (WATCH, "spent = len(case.restarts) >= self.limits.budget", "spent = False"),
        "'gave up' not among",
    ),
    test_restart_that_answers_wrong_is_none: (
        "a watch that asks nothing of a restart",
        (WATCH, ", answers=self._answers)", ")"),
        "'the restart failed' not among",
    ),
    test_restart_that_was_interrupted_is_taken_up_again: (
        "a watch that forgets its restart",
        (WATCH, "case.wanted = True", "case.wanted = False"),
        "'serves again' not among",
    ),
    test_second_watch_is_refused: (
        "a lock that nobody holds",
        ("stack/host.py", "fcntl.flock(", "(lambda *_: None)("),
        "0 == 3",
    ),
}


@NATIVE
@pytest.mark.parametrize("check", BROKEN, ids=lambda check: check.__name__)
def test_broken_watch_is_noticed(
    watched: Watched, notice: Notice, check: Callable[..., None]
) -> None:
    broken, change, says = BROKEN[check]
    workspace.change(watched.folder, *change)

    notice(check, broken, says=says, patch={f"{__name__}.PATIENCE_S": 6})
    with contextlib.suppress(StackError):
        os.kill(watched.pid, signal.SIGCONT)


@pytest.mark.parametrize("watched", ["docker"], indirect=True)
def test_watch_that_leaves_down_what_docker_ended_is_noticed(
    own_engine: Daemon, watched: Watched, notice: Notice
) -> None:
    workspace.change(watched.folder, *NEVER_ACTS)

    notice(
        test_docker_engine_that_restarts,
        "a watch that never acts",
        says="'serves again' not among",
        patch={f"{__name__}.PATIENCE_S": 15},
        own_engine=own_engine,
    )
