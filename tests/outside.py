"""A host beyond this one's networks, for what must not be reached, and what must be from there.

It is a network namespace with an HTTP server, linked to this host alone; like a host on the
internet it knows no way back to a container's own address. The link can be cut, or made narrow.
"""

import contextlib
import ctypes
import os
import random
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from stack import host
from stack.wait import wait_until

T = TypeVar("T")
PORT = 80
_CLONE_NEWNET = 0x40000000
_FETCH = """
import os, sys, urllib.error, urllib.request
request = urllib.request.Request(sys.argv[1])
request.add_header("Authorization", "Bearer " + os.environ["KEY"])
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    print(opener.open(request, timeout=5).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


@dataclass(frozen=True)
class Outside:
    """Its name, its address, and this host's addresses on the link to it."""

    name: str
    address: str
    here: str
    here6: str
    """Empty where the kernel has no IPv6."""

    def begin(self, function: Callable[[], T]) -> Future[T]:
        """Call a function there, in a thread: what it connects to, it connects to from there."""

        def entered() -> T:
            with Path("/run/netns", self.name).open() as space:
                if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            return function()

        pool = ThreadPoolExecutor(1)
        try:
            return pool.submit(entered)
        finally:
            pool.shutdown(wait=False)

    def cut(self, *, down: bool = True) -> None:
        """Take the link down, or up again, on the far side."""
        _do(f"ip -n {self.name} link set {self.name}b {'down' if down else 'up'}")

    def narrow(self, mtu: int) -> None:
        """Let packets to there be no larger; the far side does not know."""
        _do(f"ip link set {self.name}a mtu {mtu}")

    def fetch(self, url: str, *, key: str) -> str:
        """Ask for a URL from there; return the status, or nothing where it is not reached."""
        argv = ["ip", "netns", "exec", self.name, sys.executable, "-c", _FETCH, url]
        return host.run(argv, env={**os.environ, "KEY": key}).stdout.strip()


def _do(command: str) -> None:
    done = host.run(command.split())
    assert done.status == 0, done


@contextlib.contextmanager
def outside() -> Iterator[Outside]:
    """Make the host, and remove it; skip where this user may not."""
    name = f"glm{secrets.token_hex(3)}"
    block = 4 * random.randrange(64)
    here, there = f"198.51.100.{block + 1}", f"198.51.100.{block + 2}"
    here6, there6 = (f"fd77::{block + 1:x}", f"fd77::{block + 2:x}")
    six = (
        f"ip address add {here6}/126 dev {name}a nodad",
        f"ip -n {name} address add {there6}/126 dev {name}b nodad",
    )
    has_six = Path("/proc/net/if_inet6").exists()
    steps = (
        f"ip link add {name}a type veth peer name {name}b netns {name}",
        f"ip address add {here}/30 dev {name}a",
        f"ip link set {name}a up",
        f"ip -n {name} address add {there}/30 dev {name}b",
        f"ip -n {name} link set {name}b up",
    )
    if host.run(["ip", "netns", "add", name]).status:
        pytest.skip("this user may not make a network namespace")
    try:
        for step in (*steps, *(six if has_six else ())):
            _do(step)
        serve = [sys.executable, "-m", "http.server", str(PORT), "--bind", there]
        with (
            tempfile.TemporaryDirectory() as folder,
            subprocess.Popen(
                ["ip", "netns", "exec", name, *serve],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
            ) as process,
        ):
            try:
                wait_until(
                    lambda: host.answers(there, PORT) or None, timeout_s=30, what="no host outside"
                )
                yield Outside(name, there, here, here6 if has_six else "")
            finally:
                process.kill()
    finally:
        host.run(["ip", "netns", "delete", name])
