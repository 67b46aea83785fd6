"""The handle of a server, which hides how it runs."""

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from stack.config import Service
from stack.host import Process


def _no_logs(lines: int) -> str:  # noqa: ARG001
    return ""


def tls(certificate: Path | None) -> ssl.SSLContext:
    """Make a TLS context, in 20 ms, that trusts a certificate of ours alone, or the system's.

    A server of ours is known by its certificate, whatever address it is reached at.
    """
    if certificate is None:
        return ssl.create_default_context()
    context = ssl.create_default_context(cafile=certificate)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.check_hostname = False
    return context


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
    certificate: Path | None = None
    """The one that it shows, with https; None where the system's authorities vouch for it."""
    gateway: bool = False
    """Whether a gateway stands before it."""
    restarts: int = 0
    """How often it was brought back after a crash."""
    restarting: bool = False
    """Ended, and Docker is about to start it again."""
    stopped: Callable[[], bool] = lambda: False
    """Whether somebody ended it with `docker stop`, as far as the engine remembers."""
    image: str = ""
    """What it runs: the image with its id, or the folder of the native build."""

    @property
    def port(self) -> int | None:
        """The port that it is reached at."""
        return urlsplit(self.url).port
