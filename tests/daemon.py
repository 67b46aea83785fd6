"""A Docker engine of a test's own, which it may end: beside the machine's, and without its rules.

Its containers are reached by way of Docker's own proxy, on loopback.
"""

import contextlib
import os
import random
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import docker
from stack import host
from stack.wait import wait_until

_START_S = 60
# Not --bridge=none, nor --default-address-pool: with either, it would remove the machine's docker0.
_OPTIONS = (
    "--iptables=false",
    "--ip6tables=false",
    "--ip-forward=false",
    "--containerd-namespace=glm-test",
    "--containerd-plugins-namespace=glm-test-plugins",
)


@dataclass
class Daemon:
    """Its folder, its bridge, and its process."""

    folder: Path
    bridge: str
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def host(self) -> str:
        return f"unix://{self.folder / 'sock'}"

    def start(self) -> None:
        paths = {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}
        argv = ["dockerd", f"--host={self.host}", f"--bridge={self.bridge}", *_OPTIONS]
        argv += [f"--{option}={self.folder / name}" for option, name in paths.items()]
        if not shutil.which("dockerd"):
            pytest.skip("dockerd is not here")
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        wait_until(self._answers, timeout_s=_START_S, what=f"no engine; see {self.folder}/log")

    def _answers(self) -> bool | None:
        assert self.process
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        return True if host.run(["docker", "--host", self.host, "info"]).status == 0 else None

    def end(self, number: signal.Signals) -> None:
        """Signal it, and wait for its end."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(_START_S)

    def load(self, image: str) -> None:
        """Give it an image of the machine's own engine."""
        ours, theirs = docker.from_env(), docker.DockerClient(base_url=self.host)
        try:
            theirs.images.load(b"".join(ours.images.get(image).save(named=True)))
        finally:
            ours.close()
            theirs.close()


def _docker0() -> str:
    """Return which interface the bridge of the machine's engine is, if there is one."""
    file = Path("/sys/class/net/docker0/ifindex")
    return file.read_text() if file.exists() else ""


@contextlib.contextmanager
def daemon(image: str, *, size: str = "") -> Iterator[Daemon]:
    """Start an engine with an image of the machine's own, and end it; skip where none can be.

    With a `size` its data lie in a file system that has no more.
    """
    if os.getuid():
        pytest.skip("only root starts a Docker engine")
    # Not in pytest's folder: the path of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="glm", ignore_cleanup_errors=True) as name:
        found = Daemon(Path(name), f"glm{secrets.token_hex(3)}")
        data, before = found.folder / "data", _docker0()
        data.mkdir()
        try:
            for what in (
                "link add {} type bridge",
                f"address add 10.77.{random.randrange(64)}.1/24 dev {{}}",
            ):
                done = host.run(["ip", *what.format(found.bridge).split()])
                assert done.status == 0, done
            if size:
                host.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", data])
            found.start()
            found.load(image)
            yield found
        finally:
            found.end(signal.SIGTERM)
            while host.run(["umount", data]).status == 0:
                pass  # one mount for each time that it was killed, and one of ours
            host.run(["ip", "link", "delete", found.bridge])
            assert _docker0() == before
