"""A host beyond this one's networks, for what must not be reached, and what must be from there.

It is a network namespace with an HTTP server, linked to this host alone; like a host on the
internet it knows no way back to a container's own address.
"""

import contextlib
import os
import random
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from stack import host
from stack.wait import wait_until

PORT = 80
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
    """Its name, its address, and this host's address on the link to it."""

    name: str
    address: str
    here: str

    def fetch(self, url: str, *, key: str) -> str:
        """Ask for a URL from there; return the status, or nothing where it is not reached."""
        argv = ["ip", "netns", "exec", self.name, sys.executable, "-c", _FETCH, url]
        return host.run(argv, env={**os.environ, "KEY": key}).stdout.strip()


@contextlib.contextmanager
def outside() -> Iterator[Outside]:
    """Make the host, and remove it; skip where this user may not."""
    name = f"glm{secrets.token_hex(3)}"
    block = 4 * random.randrange(64)
    here, there = f"198.51.100.{block + 1}", f"198.51.100.{block + 2}"
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
        for step in steps:
            done = host.run(step.split())
            assert done.status == 0, done
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
                yield Outside(name, there, here)
            finally:
                process.kill()
    finally:
        host.run(["ip", "netns", "delete", name])
