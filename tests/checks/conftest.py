"""What the checks run against: each quant of compose.yaml, in each runtime, or an attached server.

They start deployments of their own and leave the user's alone. What this machine cannot run is
skipped by name, with the reason.
"""

import inspect
import io
import signal
import sys
import tarfile
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench import answers
from bench.answers import Score
from stack import client, config, gpu, keys, runtime
from stack.compose import Docker, NoEngineError
from stack.config import Project, Service, load
from stack.errors import StackError
from stack.runtime import Runtime
from stack.server import Server
from tests import workspace
from tests.daemon import Daemon, daemon
from tests.ledger import Ledger

RUNTIMES = ("docker", "native")


@dataclass(frozen=True)
class Target:
    """One quant in one runtime."""

    runtime: str
    quant: str

    def __str__(self) -> str:
        return f"{self.runtime}-{self.quant}"


def pytest_sessionstart() -> None:
    """Undo a shell's ignoring of Ctrl-C for what it runs in the background: children inherit it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("target", "what to check")
    group.addoption("--quant", action="append", help="a quant; may be repeated (all)")
    group.addoption("--backend", help="only the quants of an engine's backend, cpu or cuda")
    group.addoption("--native", dest="runtime", action="store_const", const="native")
    group.addoption("--docker", dest="runtime", action="store_const", const="docker")
    group.addoption("--attach", metavar="URL", help="check a server that runs already")
    group.addoption("--evidence", type=Path, help="a folder for what was measured, as JSON")
    group.addoption("--key-file", type=Path, help="the attached server's key")
    group.addoption("--minutes", type=float, default=0.5, help="of a soak, for each target")
    group.addoption("--record", action="store_true", help="make the record of what is found")


def pytest_configure(config: pytest.Config) -> None:
    row = "row(number, case, expected, inputs=1): enters a check in the ledger of faults"
    config.addinivalue_line("markers", row)
    why = "unnoticed(why): a check that nothing broken is shown to"
    config.addinivalue_line("markers", why)
    try:
        for quant in config.option.quant or ():
            load(workspace.ROOT).service(quant)
    except StackError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function) and item.get_closest_marker("row"):
        item.fixturenames.append("ledger")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Enter a check that has a mark `row` in the ledger, unless it skips itself."""
    mark = pyfuncitem.get_closest_marker("row")
    if not mark:
        return (yield)
    number, case, expected = mark.args
    ledger = pyfuncitem.funcargs["ledger"]
    assert isinstance(ledger, Ledger)
    with ledger.trying(number, case, expected=expected, target=_where(pyfuncitem)) as row:
        row.inputs = mark.kwargs.get("inputs", 1)
        try:
            done = yield
        except pytest.skip.Exception:
            ledger.rows.remove(row)
            raise
        row.found = "as expected"
    return done


def _where(item: pytest.Function) -> str:
    """Return which target a check is run on; Docker's, where it has no choice."""
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    told = [str(value).strip("-") for value in params]
    (where, *_) = [each for each in told if each.startswith(RUNTIMES)] or ["docker"]
    return where if "-" in where else f"{where}-tiny"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" not in metafunc.fixturenames:
        return
    option = metafunc.config.option
    project = config.load(workspace.ROOT)
    quants = option.quant or ([project.default] if option.attach else list(project.services))
    if option.backend:
        quants = [name for name in quants if project.service(name).backend == option.backend]
    runtimes = ["attached"] if option.attach else [option.runtime] if option.runtime else RUNTIMES
    targets = [
        Target(where, project.service(quant).quant) for quant in quants for where in runtimes
    ]
    metafunc.parametrize("target", targets, ids=str, scope="session")


def skip_unasked(request: pytest.FixtureRequest, where: str) -> None:
    """Skip what runs in a runtime, named by a word or its flag, that was not asked for."""
    option = request.config.option
    if option.attach or option.runtime not in {None, where.removeprefix("--")}:
        pytest.skip("not the runtime that was asked for")


@pytest.fixture(scope="session")
def natively(target: Target) -> None:
    """Skip where it is not the native runtime's turn: what is broken is shown once."""
    if target.runtime != "native":
        pytest.skip("shown natively")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A deployment of our own, whose ports the platform chooses."""
    folder = workspace.make(tmp_path_factory.mktemp("deployment"))
    quants = config.load(folder).services
    return config.load(folder, overrides={f"GLM_{quant.upper()}_PORT": "" for quant in quants})


@pytest.fixture(scope="session")
def service(project: Project, target: Target) -> Service:
    """The target's service, whether or not this machine can run it."""
    if target.runtime == "attached":  # configured by the user's own .env
        return config.load(workspace.ROOT).service(target.quant)
    return project.service(target.quant)


@pytest.fixture(scope="session")
def startable(service: Service) -> Service:
    """The target's service, if its engine can start here: its GPU and the driver are there."""
    try:
        gpu.require(service)
    except StackError as error:
        pytest.skip(error.cause)
    return service


@pytest.fixture(scope="session")
def runnable(startable: Service) -> Service:
    """The target's service, if this machine has its GPU and its model."""
    if startable.model.repository and not startable.model_file.exists():
        file = startable.model_file
        pytest.skip(f"{startable.name}: {file.name} is not in {file.parent}")
    return startable


@pytest.fixture(scope="session")
def engine(
    project: Project, target: Target, service: Service, request: pytest.FixtureRequest
) -> Runtime:
    """The target's runtime, with the engine built; an image needs no GPU if it is asked for."""
    if target.runtime == "attached":
        pytest.skip("an attached server's engine is out of reach")
    if target.runtime == "native" or not request.config.option.backend:
        request.getfixturevalue("startable")
    try:
        chosen = runtime.choose(project, want=target.runtime)
    except NoEngineError as error:
        pytest.skip(error.cause)
    runtime.ensure_engine(chosen, project, service)
    return chosen


@pytest.fixture(scope="session")
def bill(engine: Runtime, service: Service) -> str:
    """The bill of materials in the image."""
    if not isinstance(engine, Docker):
        pytest.skip("a native build has no image")
    api = engine.client.containers
    container = api.create(service.image)
    try:
        stream, _ = container.get_archive("/app/sbom.cdx.json")
        with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as archive:
            member = archive.extractfile("sbom.cdx.json")
            assert member
            return member.read().decode()
    finally:
        container.remove()


@pytest.fixture
def own_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """A Docker engine of the test's own, which every command takes for the machine's.

    A parameter is the size of its data's file system.
    """
    project = config.load(workspace.ROOT)
    service = project.service("tiny")
    try:
        chosen = runtime.choose(project, want="docker")
    except NoEngineError as error:
        pytest.skip(error.cause)
    runtime.ensure_engine(chosen, project, service)
    with daemon(service.image, size=getattr(request, "param", "")) as own:
        monkeypatch.setenv("DOCKER_HOST", own.host)
        yield own


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, target: Target, service: Service) -> Iterator[Server]:
    """The target's server, up and generating."""
    option = request.config.option
    if target.runtime == "attached":
        key = option.key_file.read_text().strip() if option.key_file else keys.read(service)
        server = Server(runtime="attached", service=service, url=option.attach.rstrip("/"), key=key)
        client.wait_ready(server)
        yield server
        return
    runnable = request.getfixturevalue("runnable")
    chosen: Runtime = request.getfixturevalue("engine")
    with runtime.serving(chosen, request.getfixturevalue("project"), runnable) as up:
        _SERVERS[:] = [up.server]
        yield up.server


@pytest.fixture(scope="session")
def recorded(server: Server, request: pytest.FixtureRequest) -> Mapping[str, Score]:
    """How many answers of the served model are right by its record; `answers` makes it anew."""
    asks = any(item.path.name == "test_answers.py" for item in request.session.items)
    option = request.config.option
    if option.record and asks and not option.keyword:  # the one session, and the whole of it
        return answers.record(server, answers.record_set(server.service))
    found = answers.recorded(server.service)
    if not found:
        pytest.skip(f"{server.service.model.path.name} has no record of right answers (--record)")
    return found


@pytest.fixture(scope="session")
def tell(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Take lines of what was measured, and print them at the end."""
    lines: list[str] = []
    yield lines.append
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        writer = request.config.get_terminal_writer()
        writer.line()
        for line in lines:
            writer.line(line)


@pytest.fixture(scope="module")
def ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    """Keeps what the module's checks try, and what comes of it."""
    kept = Ledger(request.module.__name__.rpartition("test_")[2])
    yield kept
    kept.write(workspace.ROOT / ".state" / "checks")
    if request.config.option.record:
        pin = config.load(workspace.ROOT).engine
        kept.record(f"b{pin.build} ({pin.commit[:12]})")


Notice = Callable[..., None]
NO_PATCH: Mapping[str, object] = {}
Broken = tuple[str, dict[str, Any]]
"""What is broken, in words, and how: what `notice` takes."""
IDLE: Broken = ("a program that does nothing, and says that all is well", {"program": ""})
CRASHES: Broken = ("a program that crashes", {"program": "1/0"})


@pytest.fixture
def notice(
    request: pytest.FixtureRequest, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> Notice:
    """Run a check on something broken: it must fail, by an assertion or in the words `says`.

    What is not given comes from the check's fixtures, or is the first of its parameters. `program`
    is Python that runs in the place of `invoke`; `patch` puts values in the place of others, by
    their names.
    """

    def run(
        check: Callable[..., None],
        broken: str,
        *,
        says: str = "",
        program: str | None = None,
        patch: Mapping[str, object] = NO_PATCH,
        **given: Any,
    ) -> None:
        known = {"ledger": Ledger("negative"), **first_case(check), **given}
        names = inspect.signature(check).parameters
        values = {n: known[n] if n in known else request.getfixturevalue(n) for n in names}
        with monkeypatch.context() as now, ledger.catching(check, broken, says=says):
            if program is not None:
                now.setattr(workspace, "PROGRAM", (sys.executable, "-c", program))
            for name, value in patch.items():
                now.setattr(name, value)
            check(**values)

    return run


def first_case(check: Callable[..., None]) -> dict[str, Any]:
    """Return the first values that a check is parametrized with."""
    found: dict[str, Any] = {}
    for mark in getattr(check, "pytestmark", ()):
        if mark.name == "parametrize":
            names, (first, *_) = mark.args
            several = not isinstance(names, str)
            cells = getattr(first, "values", first) if several else [first]
            indirect = mark.kwargs.get("indirect", ())
            made = dict(zip(names if several else [names], cells, strict=True))
            found |= {n: v for n, v in made.items() if indirect is not True and n not in indirect}
    return found


_SERVERS: list[Server] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the servers' logs to a failing check."""
    report = yield
    if report.failed:
        report.sections += [(f"log of {each.service.name}", each.logs(50)) for each in _SERVERS]
    return report
