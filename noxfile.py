"""Verify this tree and what it serves.

nox                         everything that this machine can check, then a table of it
nox -s load                 one check, on every quant and runtime that this machine can run
nox -s load -- --native     narrowed to a runtime (--native, --docker) or a quant (--quant q8)
nox -s network -- --attach http://host:11346 --key-file FILE    a server that runs already
"""

import os
from pathlib import Path
from xml.etree import ElementTree as ET

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2026.10"
# One environment, that of uv.lock: `uv run` brings it up to date before each command.
nox.options.default_venv_backend = "none"

RESULTS = Path(".state") / "checks"


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and import rules, and the Dockerfiles."""
    _run(session, "ruff", "check")
    _run(session, "ruff", "format", "--check")
    dockerfiles = map(str, sorted(Path("docker").glob("*Dockerfile")))
    _run(session, "hadolint", "--config=docker/hadolint.yaml", *dockerfiles)


@nox.session
def types(session: nox.Session) -> None:
    """Check types."""
    _run(session, "mypy")


@nox.session
def unit(session: nox.Session) -> None:
    """Test the library without daemon, GPU or network."""
    _pytest(session, "tests/unit")


@nox.session
def build(session: nox.Session) -> None:
    """Check that the engine built is the pinned one, whole, and knows its settings."""
    _pytest(session, "tests/checks/test_build.py", *session.posargs)


@nox.session
def load(session: nox.Session) -> None:
    """Check that the configured model loads, with its context and slots, and generates."""
    _pytest(session, "tests/checks/test_load.py", *session.posargs)


@nox.session
def answers(session: nox.Session) -> None:
    """Ask questions with known answers, of one client and of many, and count the right ones."""
    _pytest(session, "tests/checks/test_answers.py", *session.posargs)


@nox.session
def network(session: nox.Session) -> None:
    """Check who reaches the server, from where, and with which key."""
    _pytest(session, "tests/checks/test_network.py", *session.posargs)


@nox.session
def hardening(session: nox.Session) -> None:
    """Read back what the running container may do, and see insecure twins of it be caught."""
    _pytest(session, "tests/checks/test_hardening.py", *session.posargs)


@nox.session
def gateway(session: nox.Session) -> None:
    """Check what the gateway lets through, to the byte, and what it keeps from the server."""
    _pytest(session, "tests/checks/test_gateway.py", *session.posargs)


@nox.session
def audit(session: nox.Session) -> None:
    """Ask PyPI and Debian for known weaknesses of what we ship and use."""
    _pytest(session, "tests/checks/test_audit.py", *session.posargs)


@nox.session
def vram(session: nox.Session) -> None:
    """Measure GPU memory from start to stop, and hold it against plan and budget."""
    _pytest(session, "tests/checks/test_vram.py", *session.posargs)


@nox.session
def models(session: nox.Session) -> None:
    """Check that downloads survive what hubs, networks and disks do, and only whole ones serve."""
    _pytest(session, "tests/checks/test_models.py", *session.posargs)


@nox.session
def loadtest(session: nox.Session) -> None:
    """Load test each quant: valid, cross-checked with the server, held against the engine."""
    _pytest(session, "tests/checks/test_loadtest.py", *session.posargs)


@nox.session
def tune(session: nox.Session) -> None:
    """Tune a quant: candidates that crash, an interruption, what serves, and what `up` takes."""
    _pytest(session, "tests/checks/test_tune.py", *session.posargs)


@nox.session(default=False)
def loadtest_peers(session: nox.Session) -> None:
    """Compare our load generator with established ones, each against servers of known timing."""
    _run(session, "python", "-m", "bench.peers", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Check that bad input and faults end in one line, the right code, and nothing left over."""
    _pytest(session, "tests/checks/test_faults.py", *session.posargs)


@nox.session
def client(session: nox.Session) -> None:
    """Check that OpenCode works with what we print for it; that reports tell no secret."""
    _pytest(session, "tests/checks/test_client.py", *session.posargs)


@nox.session
def requests(session: nox.Session) -> None:
    """Check that hostile requests, and too many or too long ones, harm nobody else."""
    _pytest(session, "tests/checks/test_requests.py", *session.posargs)


@nox.session
def api(session: nox.Session) -> None:
    """Check that the server answers as docs/openapi.yaml says, whatever it is sent."""
    _pytest(session, "tests/checks/test_api.py", *session.posargs)


@nox.session
def update(session: nox.Session) -> None:
    """Check that an engine is moved only once proved, and back; a bad one changes nothing."""
    _pytest(session, "tests/checks/test_update.py", *session.posargs)


@nox.session
def watch(session: nox.Session) -> None:
    """Check that what crashes or hangs is restarted, within a budget, and what works is left."""
    _pytest(session, "tests/checks/test_watch.py", *session.posargs)


@nox.session
def switch(session: nox.Session) -> None:
    """Check that one server takes another's place, or the other serves on, whatever fails."""
    _pytest(session, "tests/checks/test_switch.py", *session.posargs)


@nox.session
def crashes(session: nox.Session) -> None:
    """Check that servers and clients that vanish leave nobody in the dark, and nothing behind."""
    _pytest(session, "tests/checks/test_crashes.py", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Check that a server under mixed load keeps memory, speed, files and threads (--minutes)."""
    _pytest(session, "tests/checks/test_soak.py", *session.posargs)


@nox.session
def summary(session: nox.Session) -> None:
    """Show what passed, and what was skipped and why."""
    _run(session, "python", "-m", "tests.summary", str(RESULTS))


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure how long the commands take when there is nothing to do."""
    _run(session, "pytest", "bench", "--benchmark-columns=min,median,max,rounds", *session.posargs)


def _run(session: nox.Session, *command: str) -> None:
    session.run("uv", "run", "--frozen", *command, external=True)


def _pytest(session: nox.Session, path: str, *arguments: str) -> None:
    """Run pytest; a session in which nothing passed, since all was skipped, is skipped itself."""
    results = RESULTS / f"{session.name}.xml"
    results.unlink(missing_ok=True)
    command = ("pytest", path, f"--junit-xml={results}", *arguments)
    try:
        _run(session, *command)
    except CommandFailed:
        if "CI" not in os.environ:
            raise
        # Most checks have limits of time, and CI's machines are shared. What fails twice fails.
        session.warn(f"{session.name} failed; all of it once more.")
        _run(session, *command)
    cases = ET.parse(results).findall(".//testcase")  # noqa: S314  # pytest wrote it
    if all(case.find("skipped") is not None for case in cases):
        session.skip(f"nothing here can run on this machine ({len(cases)} skipped)")
