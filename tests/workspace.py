"""A deployment of the tests' own: this tree's files by link, with its own name, state and .env."""

import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

Started = subprocess.Popen[str]
ROOT = Path(__file__).parent.parent
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
        [*by, sys.executable, "-m", "invoke", *arguments],
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
