"""The handle of a server, which hides how it runs."""

from collections.abc import Callable
from dataclasses import dataclass, field

from stack.config import Service
from stack.host import Process


def _no_logs(lines: int) -> str:  # noqa: ARG001
    return ""


@dataclass(frozen=True)
class Server:
    """A started server: in Docker, native, or somebody else's (attached)."""

    runtime: str
    service: Service
    """What it was asked to be."""
    url: str
    """Without a path: `http://127.0.0.1:11348`."""
    key: str = field(repr=False)
    processes: tuple[Process, ...] = ()
    """The server's own processes, as the host sees them; empty where it cannot."""
    logs: Callable[[int], str] = _no_logs
    """Returns the last so many lines of its output."""
    ended: Callable[[], str | None] = lambda: None
    """Says how it ended, or None while it runs."""
    restarts: int = 0
    """How often it was brought back after a crash."""
    image: str = ""
    """What it runs: the image with its id, or the folder of the native build."""
