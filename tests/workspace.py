"""A deployment of the tests' own: this tree's files by link, with its own name, state and .env."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from stack import config, host, keys, runtime
from stack.compose import NoEngineError
from stack.config import Project, Service
from stack.runtime import Runtime
from stack.server import Server

Started = subprocess.Popen[str]
ROOT = Path(__file__).parent.parent
PROGRAM = (sys.executable, "-m", "invoke")
_LINKED = (
    "bench",
    "compose.gateway.yaml",
    "compose.yaml",
    "docker",
    "pyproject.toml",
    "stack",
    "tasks.py",
    "uv.lock",
    "verbs",
    ".cache",
)


def make(folder: Path, **settings: str) -> Path:
    """Fill a folder so that `invoke` runs there and disturbs nobody; return it.

    The engine and the model files are the tree's own. `settings` go to .env.
    """
    (ROOT / ".cache").mkdir(exist_ok=True)
    for name in _LINKED:
        (folder / name).symlink_to(ROOT / name)
    defaults = {"GLM_NAME": f"glm-test-{secrets.token_hex(4)}", "GLM_MODELS": ROOT / "models"}
    lines = [f"{name}={value}\n" for name, value in (defaults | settings).items()]
    (folder / ".env").write_text("".join(lines))
    return folder


def change(folder: Path, path: str, old: str, new: str) -> None:
    """Change the text of a file in such a folder; the tree's own stays as it is."""
    top = folder / Path(path).parts[0]
    if top.is_symlink():
        own = top.resolve()
        top.unlink()
        if own.is_dir():
            shutil.copytree(own, top, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(own, top)
    text = (folder / path).read_text()
    assert old in text, f"{path} has no {old!r}"
    (folder / path).write_text(text.replace(old, new))


@contextmanager
def changed(folder: Path, path: str, old: str, new: str) -> Iterator[None]:
    """Change a file in a linked folder of such a folder while the context lasts."""
    top = folder / Path(path).parts[0]
    own = top.readlink()
    change(folder, path, old, new)
    try:
        yield
    finally:
        shutil.rmtree(top)
        top.symlink_to(own)


def invoke(
    folder: Path,
    *arguments: str,
    by: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    session: bool = False,
) -> Started:
    """Start an `invoke` in such a folder, through a program `by` if one is named.

    `env` is this process's own if it is None; `session` gives it a session of its own.
    """
    return subprocess.Popen(
        [*by, *PROGRAM, *arguments],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=session,
    )


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Deployment:
    """A folder where `invoke` runs, with the flag that chooses its runtime, if one is meant."""

    folder: Path
    flag: str

    limit_s: ClassVar[int] = 300

    @property
    def target(self) -> str:
        """Its name among what is checked."""
        return f"{self.flag.removeprefix('--')}-tiny"

    def start(self, *arguments: str, **env: str) -> Started:
        """Start an `invoke` with variables added to the environment."""
        return invoke(self.folder, *arguments, env={**os.environ, **env})

    def invoke(self, *arguments: str, **env: str) -> host.Result:
        """Run an `invoke` to its end."""
        with self.start(*arguments, **env) as process:
            out, err = process.communicate(timeout=self.limit_s)
            return host.Result(process.returncode, out, err)

    def up(self, **env: str) -> host.Result:
        """Serve tiny by the command line."""
        return self.invoke("up", self.flag, **env)

    @property
    def project(self) -> Project:
        """As its files say now."""
        return config.load(self.folder)

    @property
    def service(self) -> Service:
        """The tiny one."""
        return self.project.service("tiny")

    @property
    def runtime(self) -> Runtime:
        """The one that the flag names."""
        return runtime.choose(self.project, want=self.flag.removeprefix("--"))

    def require_engine(self) -> Runtime:
        """Return its runtime, with tiny's engine built; skip the test where it is not here."""
        try:
            chosen = self.runtime
        except NoEngineError as error:
            pytest.skip(error.cause)
        runtime.ensure_engine(chosen, self.project, self.service)
        return chosen

    @property
    def server(self) -> Server:
        """The server of tiny, which must run."""
        return runtime.running(self.project, "tiny")

    def set(self, **settings: object) -> None:
        """Change settings in .env."""
        env = self.folder / ".env"
        kept = [line for line in env.read_text().splitlines() if line.split("=")[0] not in settings]
        env.write_text("\n".join([*kept, *(f"{k}={v}" for k, v in settings.items())]) + "\n")

    def serve(self) -> Server:
        """Serve tiny without the command line."""
        return runtime.up(self.runtime, self.project, self.service).server

    def start_server(self) -> Server:
        """Start tiny's server without the command line, and do not wait for it."""
        key = keys.require(self.service, first_start=True)
        return self.runtime.start(self.service, key=key)

    def nothing_runs(self) -> bool:
        """Return whether nothing is left of tiny's servers."""
        return not runtime.servers_of(self.service, runtime.present(self.project))
