"""What the gateway adds to a stream, against a server of known timing: `python -m bench.gateway`.

The same load goes straight to that server and through the gateway, in turn, in one run. Each event
says when it was sent, so what is compared is the way alone: no pause of the server counts. The
gateway is there twice: as it always runs, and before all other processes, as the load generator
runs, which tells what it costs where a core is free. The table goes to docs/gateway.md.
"""

import contextlib
import datetime as dt
import itertools
import json
import math
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench import prompts, reference
from bench.calibration import Truth, compare
from bench.generator import Load, drive
from bench.prompts import Spread
from bench.records import Record
from bench.transport import Exchange, stamping
from stack import config, host
from stack.compose import Docker
from stack.config import Settings
from stack.errors import Code, StackError
from stack.wait import wait_until

ROOT = Path(__file__).parent.parent
CONFIGURATION = ROOT / "docker" / "haproxy.cfg"
PAGE = ROOT / "docs" / "gateway.md"
KEY = "the-only-key"
STREAMS = 64
ITL_MS = 20
TTFT_MS = 100
ROUNDS = 5
LIMIT_MS = 1
"""What it may add to TTFT (p50) and to jitter (p99)."""
_START_S = 10
_CGROUP = Path("/sys/fs/cgroup/cpu/cgroup.procs")
"""The first version's root group; its others have no share of real time."""
_BEGIN, _END = "<!-- measured -->\n", "<!-- end -->\n"


_EXTRA = """
services:
  gateway-tiny:
    depends_on: !reset []
    environment: {{SERVER: {server}}}
    volumes:
      - {{type: bind, source: {configuration}, target: /etc/haproxy.cfg, read_only: true}}
"""


@dataclass(frozen=True)
class Gateway:
    """A gateway that runs."""

    url: str
    """As it is published."""
    straight: str
    """At its container's own address, without Docker's proxy before it."""
    pid: int


@contextlib.contextmanager
def gateway(
    where: str,
    settings: Settings | None = None,
    *,
    configuration: Path = CONFIGURATION,
    keys: Sequence[str] = (KEY,),
) -> Iterator[Gateway]:
    """Run a gateway of its own before any server: `address:port`, as a container reaches it.

    Raises:
        StackError: HOST where there is no Docker, BUILD, or LOAD where it does not start.

    """
    with tempfile.TemporaryDirectory(prefix="glm-gateway-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        overrides = {
            "GLM_GATEWAY": "1",
            "GLM_NAME": f"glm-gateway-{secrets.token_hex(4)}",
            "GLM_KEY_FILE": str(folder / "api-key"),
            "GLM_RATE": "1000000",
            "GLM_TINY_PORT": "",
            **(settings or {}),
        }
        project = config.load(ROOT, overrides=overrides)
        service = project.service("tiny")
        text, owner = "\n".join([*keys, ""]), service.uid if os.getuid() == 0 else None
        host.write_atomic(service.key_file, text, mode=0o600, owner=owner)
        extra = folder / "extra.yaml"
        extra.write_text(
            _EXTRA.format(server=json.dumps(where), configuration=json.dumps(str(configuration)))
        )
        docker = Docker(project, extra=[extra])
        try:
            container = docker.start_gateway(service)
            networks = container.attrs["NetworkSettings"]
            (port,) = networks["Ports"][f"{service.target_port}/tcp"]
            address = networks["Networks"][f"{project.name}_default"]["IPAddress"]
            wait_until(
                lambda: host.answers(address, service.target_port) or None,
                timeout_s=_START_S,
                what="the gateway does not listen",
            )
            yield Gateway(
                url=f"http://127.0.0.1:{port['HostPort']}",
                straight=f"http://{address}:{service.target_port}",
                pid=container.attrs["State"]["Pid"],
            )
        finally:
            docker.stop(service)


@dataclass(frozen=True)
class Way:
    """How requests and events came along one way. Milliseconds."""

    name: str
    requests: int
    ttft: Sequence[float]
    """TTFT as the client had it less the server's own: both directions, and what lies between."""
    delays: Sequence[float]
    """Of each event."""
    jitter: Sequence[float]
    """How far each event's delay is from that of the one before."""

    @classmethod
    def of(cls, name: str, truths: Sequence[Truth]) -> "Way":
        """Sort what the requests of one way tell."""
        pairs = (pair for truth in truths for pair in itertools.pairwise(truth.receive_ns))
        return cls(
            name=name,
            requests=len(truths),
            ttft=sorted(truth.ttft_ns / 1e6 for truth in truths),
            delays=sorted(each / 1e6 for truth in truths for each in truth.receive_ns),
            jitter=sorted(abs(after - before) / 1e6 for before, after in pairs),
        )


def rank(ordered: Sequence[float], percent: int) -> float:
    """Return a percentile by nearest rank."""
    return ordered[math.ceil(percent * len(ordered) / 100) - 1]


def adds_too_much(direct: Way, through: Way) -> str | None:
    """Say what a gateway adds beyond the limit, or None."""
    for what, percent, before, after in (
        ("TTFT", 50, direct.ttft, through.ttft),
        ("jitter", 99, direct.jitter, through.jitter),
    ):
        added = rank(after, percent) - rank(before, percent)
        if added >= LIMIT_MS:
            return f"it adds {added:.2f} ms to {what} (p{percent}), more than {LIMIT_MS} ms"
    return None


def take_precedence(pid: int) -> bool:
    """Let a process run before others, as the load generator does; tell whether that worked."""
    with contextlib.suppress(OSError, AttributeError):
        if _CGROUP.exists():
            _CGROUP.write_text(str(pid))
        os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(1))
        return True
    return False


def bridge() -> str:
    """Return the host's address on Docker's own bridge, which every container reaches."""
    networks = Docker(config.load(ROOT)).client.networks
    address: str = networks.get("bridge").attrs["IPAM"]["Config"][0]["Gateway"]
    return address


def measure(
    *,
    streams: int = STREAMS,
    rounds: int = ROUNDS,
    duration_s: float = 4,
    precedence: bool = True,
    configuration: Path = CONFIGURATION,
) -> tuple[Way, Way, Way | None]:
    """Measure the ways direct, through a gateway, and through one that takes precedence.

    The last is None where the system gives none, or none is asked for. Raises StackError as
    `gateway`; VERIFY where a request fails.
    """
    settings = {"GLM_QUEUE": "1000"}
    load = Load(clients=streams, warmup_s=1, duration_s=duration_s, output=Spread(48, 80))
    with (
        stamping(),
        reference.serving(ttft_ms=TTFT_MS, itl_ms=ITL_MS, host=bridge()) as direct,
        gateway(urlsplit(direct).netloc, settings, configuration=configuration) as plain,
        gateway(urlsplit(direct).netloc, settings, configuration=configuration) as first,
    ):
        ways = {"direct": (direct, ""), "through the gateway": (plain.straight, KEY)}
        if precedence and take_precedence(first.pid):
            ways["through one with a core to itself"] = (first.straight, KEY)
        truths: dict[str, list[Truth]] = {name: [] for name in ways}
        for _, (name, (url, key)) in itertools.product(range(rounds), ways.items()):
            truths[name] += _run(url, key, load)
        direct_way, through, *rest = (Way.of(name, each) for name, each in truths.items())
        return direct_way, through, rest[0] if rest else None


def _run(url: str, key: str, load: Load) -> list[Truth]:
    words = prompts.vocabulary([(" word", 1)], 0)
    truths: list[Truth] = []

    def tap(record: Record, exchange: Exchange) -> None:
        if record.reads:
            truths.append(compare(record, exchange))

    for record in drive(url, key, load, words, tap=tap).records:
        if record.error:
            raise StackError(
                f"A request to {url} failed: {record.error} {record.detail}",
                "See what else runs here.",
                Code.VERIFY,
            )
    return truths


def table(ways: Sequence[Way]) -> str:
    """Write the ways as a table."""
    lines = [
        "| Way | Requests | TTFT p50 | p95 | p99 | event's delay p50 | p99 | jitter p50 | p99 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for way in ways:
        figures = [
            *(rank(way.ttft, percent) for percent in (50, 95, 99)),
            *(rank(each, percent) for each in (way.delays, way.jitter) for percent in (50, 99)),
        ]
        told = " | ".join(f"{figure:.2f}" for figure in figures)
        lines.append(f"| {way.name} | {way.requests} | {told} |")
    return "\n".join(lines)


def write() -> None:
    """Measure, and put the table into the page. Raises as `measure`."""
    load = os.getloadavg()[0]
    ways = [way for way in measure() if way]
    said = (
        f"`python -m bench.gateway`, {dt.datetime.now(dt.UTC).date()}, {os.cpu_count()} cores with "
        f"a load average of {load:.1f} before it began; {STREAMS} streams, an event every "
        f"{ITL_MS} ms; {ROUNDS} runs a way, in turn; milliseconds:\n\n"
    )
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    PAGE.write_text(f"{before}{_BEGIN}{said}{table(ways)}\n{_END}{after}")


if __name__ == "__main__":
    write()
