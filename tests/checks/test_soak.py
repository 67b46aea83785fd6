"""A server under mixed load for long keeps its memory, its speed, its files and its threads.

`--minutes` says for how long: one a target here, 30 in the full run.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from bench import generator
from bench.generator import Load
from bench.prompts import Spread
from bench.records import Record
from stack import client, config, gpu, runtime
from stack.config import Project, Service
from stack.server import Server
from tests import clients, workspace
from tests.checks.conftest import Target
from tests.ledger import Ledger
from tests.vitals import Vitals

GROWTH_MIB = 200
KEPT = 0.98
NOISE = 0.1
"""What a fixed piece of work may vary by within a part: beyond, the machine tells nothing."""
MORE = 8
"""Threads and files: a connection that is just being closed is no leak."""
PARTS = 4
SHORT = Spread(8, 32)  # and the warm-up of a second lasts until each client has had one
LOADS = (
    Load(clients=2, warmup_s=1, prompts="cold", prompt=Spread(64, 512), output=SHORT),
    Load(clients=2, warmup_s=1, prompts="turns", turns=4, prompt=Spread(64, 128), output=SHORT),
    Load(
        clients=4, warmup_s=1, prompts="shared", shared=128, prompt=Spread(192, 256), output=SHORT
    ),
)
WORK_TOKENS = 500
WORK_REPEATS = 3


@dataclass(frozen=True)
class Part:
    """What a part of the soak showed."""

    vitals: Vitals
    work_cpu_s: tuple[float, ...]
    """The server's CPU time for the same work, several times: no other's load is in it."""
    records: tuple[Record, ...]
    gpu_mib: int | None = None
    """What the server holds of its GPUs, or all that is held where they do not tell."""


@pytest.fixture(scope="module")
def parts(
    request: pytest.FixtureRequest, target: Target, project: Project, runnable: Service
) -> Iterator[list[Part]]:
    if target.runtime == "attached":
        pytest.skip("an attached server's process is out of reach")
    each_s = 60 * request.config.option.minutes / PARTS / len(LOADS)
    with runtime.serving(request.getfixturevalue("engine"), project, runnable) as up:
        yield [part(up.server, each_s) for _ in range(PARTS)]


def part(server: Server, each_s: float) -> Part:
    """Send the mixed load once, then do the fixed work on a server that is idle again."""
    runs = [generator.run(server, replace(load, duration_s=each_s)) for load in LOADS]
    clients.wait_idle(server, limit_s=clients.LIMIT_S)
    work = tuple(work_cpu_s(server) for _ in range(WORK_REPEATS))
    records = tuple(each for run in runs for each in run.records if not each.cut)
    return Part(Vitals.of(server.processes[0]), work, records, gpu_mib(server))


def gpu_mib(server: Server) -> int | None:
    pids = {process.pid for process in server.processes}
    devices = gpu.of(server.service) if server.service.gpus else ()
    held = [gpu.used_by(pids, each.uuid) or each.used_mib for each in devices]
    return sum(filter(None, held)) if all(held) and held else None


def work_cpu_s(server: Server) -> float:
    """Return what the same long answer costs the server."""
    (process,) = server.processes
    before = process.usage()
    client.complete(server, "Hello", tokens=WORK_TOKENS)
    after = process.usage()
    assert before
    assert after
    return after.cpu_s - before.cpu_s


def test_every_answer_is_whole(parts: list[Part], target: Target, ledger: Ledger) -> None:
    with ledger.trying(
        "R14", "mixed load for long", expected="no error, no empty answer", target=target
    ) as row:
        records = [each for part in parts for each in part.records]
        row.inputs = len(records)
        assert [each.detail for each in records if each.error] == []
        assert all(each.output_tokens for each in records)
        assert all(part.records for part in parts)
        row.found = "as expected"


def test_memory_is_bounded(
    parts: list[Part], service: Service, target: Target, ledger: Ledger
) -> None:
    limit_mib = int(service.environment["LLAMA_ARG_CACHE_RAM"]) + GROWTH_MIB
    expected = f"no more than the prompt cache's limit and {GROWTH_MIB} MiB"
    with ledger.trying("R16", "memory under load", expected=expected, target=target) as row:
        row.inputs = sum(len(part.records) for part in parts)
        assert parts[-1].vitals.resident_mib - parts[0].vitals.resident_mib < limit_mib
        row.found = "as expected"


def test_gpu_memory_is_flat(parts: list[Part], target: Target, ledger: Ledger) -> None:
    first, last = parts[0].gpu_mib, parts[-1].gpu_mib
    if first is None or last is None:
        pytest.skip("it has no GPU whose memory can be told")
    expected = f"no more than {GROWTH_MIB} MiB more"
    with ledger.trying("R16", "GPU memory under load", expected=expected, target=target) as row:
        row.inputs = sum(len(part.records) for part in parts)
        assert last - first <= GROWTH_MIB
        row.found = "as expected"


def test_threads_and_files_are_flat(parts: list[Part], target: Target, ledger: Ledger) -> None:
    with ledger.trying(
        "R16", "threads and files under load", expected=f"no more than {MORE} more", target=target
    ) as row:
        first, last = parts[0].vitals, parts[-1].vitals
        row.inputs = sum(len(part.records) for part in parts)
        assert last.threads <= first.threads + MORE
        assert last.files <= first.files + MORE
        row.found = "as expected"


def test_speed_is_kept(parts: list[Part], target: Target, ledger: Ledger) -> None:
    """Best against best: what else runs on a machine makes work dearer, never cheaper."""
    costs = [part.work_cpu_s for part in parts]
    noise = max(max(each) / min(each) - 1 for each in costs)
    if noise > NOISE:
        pytest.skip(f"the same work varied by {noise:.0%} on this machine")
    with ledger.trying(
        "R16", "speed after a mixed load", expected=f"{KEPT:.0%} of that before", target=target
    ) as row:
        row.inputs = WORK_REPEATS * PARTS
        assert min(costs[0]) / min(costs[-1]) > KEPT - noise / 2
        row.found = "as expected"


FIRST = Part(Vitals(100, 100, 20, 20), (1.0, 1.0), (), 20_000)
TARGET = Target("native", "tiny")


@pytest.mark.parametrize(
    ("check", "last", "says"),
    [
        (test_threads_and_files_are_flat, {"vitals": Vitals(100, 100, 40, 20)}, "40 <= "),
        (test_threads_and_files_are_flat, {"vitals": Vitals(100, 100, 20, 40)}, "40 <= "),
        (test_speed_is_kept, {"work_cpu_s": (1.1, 1.1)}, " > "),
        (test_every_answer_is_whole, {}, "False"),
        (test_memory_is_bounded, {"vitals": Vitals(2000, 2000, 20, 20)}, " < "),
        (test_gpu_memory_is_flat, {"gpu_mib": 20_201}, "<= 200"),
    ],
    ids=[
        *("more threads", "more files", "dearer work", "no answers", "more memory"),
        "more GPU memory",
    ],
)
def test_worse_is_noticed(
    request: pytest.FixtureRequest,
    ledger: Ledger,
    check: Callable[..., None],
    last: dict[str, Any],
    says: str,
) -> None:
    service = config.load(workspace.ROOT).service("tiny")
    parts = [FIRST, replace(FIRST, **last)]
    given = {"parts": parts, "target": TARGET, "ledger": Ledger("negative"), "service": service}
    with ledger.catching(check, f"a last part with {request.node.callspec.id}", says=says):
        check(**{name: given[name] for name in inspect.signature(check).parameters})
