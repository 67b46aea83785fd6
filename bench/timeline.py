"""Where the time of a decode step goes: the server's own calls, timed as it serves.

    python -m bench.timeline --quant q4 --clients 1,4,16,64 --stand-in --out FOLDER

A shim (`timeline.c`) is preloaded into the native server, with as many slots as clients, under the
load test's closed loop. What lies between two beginnings of `llama_process` is a step:

    prepare  graphs built and allocated, buffers reserved, inputs set, until the GPU is given work
    GPU      from there until `llama_synchronize` returns, the launch of that work included
    sample   `common_sampler_sample` and `_accept`
    text     `common_token_to_piece`
    state    caches of prompts saved to host memory and restored
    begin    samplers made and set for new requests
    rest     JSON, queues, choosing slots: what is left of the step

Streams are what was sampled in a step. Only steps between the first and the last that served all
clients count. A step that followed a new sampler is one in which a request began.
"""

import argparse
import itertools
import json
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from bench import loadtest
from bench.loadtest import Plan
from stack import config, gpu, host, runtime
from stack.config import Project
from stack.errors import Code, StackError

ROOT = Path(__file__).parent.parent
SOURCE = Path(__file__).with_suffix(".c")
PARTS = ("prepare", "gpu", "sample", "text", "state", "begin", "rest")
_HEAD = 4096
_RECORD = struct.Struct("<QIIQ")
_COMPUTE = "ggml_backend_sched_graph_compute_async"
_SAMPLE = "common_sampler_sample"
_PARTS = {
    _SAMPLE: "sample",
    "common_sampler_accept": "sample",
    "common_token_to_piece": "text",
    "llama_state_seq_get_data_ext": "state",
    "llama_state_seq_set_data_ext": "state",
    "common_sampler_init": "begin",
    "llama_set_sampler": "begin",
}


@dataclass(frozen=True)
class Call:
    """One call of the engine, as the shim saw it."""

    name: str
    start_ns: int
    end_ns: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the server's loop; milliseconds."""

    streams: int
    begins: bool
    launches: int
    """Graphs computed: micro-batches, or runs of neighbouring slots."""
    replayed: bool
    """Its CUDA graph was there already."""
    whole: float
    parts: dict[str, float]
    saved_mib: float


def build(folder: Path) -> Path:
    """Compile the shim. Raises StackError: HOST without a C compiler that can."""
    shim = folder / "timeline.so"
    argv: list[str | Path] = [
        "cc",
        "-O2",
        "-fno-builtin",
        "-shared",
        "-fPIC",
        SOURCE,
        "-o",
        shim,
        "-ldl",
    ]
    done = host.run(argv)
    if done.status:
        raise StackError(
            f"{SOURCE.name} did not compile: {host.reason(done)}",
            "Install a C compiler, and try again.",
            Code.HOST,
        )
    return shim


def calls(path: Path) -> list[Call]:
    """Read what the shim wrote, in the order in which the calls began."""
    with path.open("rb") as file:
        names = [_plain(line) for line in file.read(_HEAD).rstrip(b"\0").decode().splitlines()]
        raw = iter(lambda: _RECORD.unpack(file.read(_RECORD.size)), (0, 0, 0, 0))
        found = [Call(names[call], at, at + length, size) for at, length, call, size in raw]
    return sorted(found, key=lambda call: call.start_ns)


def _plain(name: str) -> str:
    """Return a C++ function's name out of its mangled one: `_Z<length><name>...`."""
    digits = name.removeprefix("_Z")
    length = digits[: len(digits) - len(digits.lstrip("0123456789"))]
    return digits[len(length) :][: int(length)] if length else name


def steps(found: Sequence[Call], clients: int) -> list[Step]:
    """Cut the calls into steps, and keep those in which the load was whole."""
    starts = [at for at, call in enumerate(found) if call.name == "llama_process"]
    whole, begins = [], False
    for here, there in itertools.pairwise(starts):
        step = _step(found[here:there], found[there].start_ns, begins=begins)
        begins = any(call.name == "common_sampler_init" for call in found[here:there])
        whole.append(step)
    full = [at for at, step in enumerate(whole) if step.streams == clients]
    return whole[full[0] : full[-1]] if full else []


def _step(of: Sequence[Call], end_ns: int, *, begins: bool) -> Step:
    begun_ns = of[0].start_ns
    count = Counter(call.name for call in of)
    parts = dict.fromkeys(PARTS, 0.0)
    for call in of:
        if part := _PARTS.get(call.name):
            parts[part] += (call.end_ns - call.start_ns) / 1e6
    launched = next((call.start_ns for call in of if call.name == _COMPUTE), begun_ns)
    done = max(call.end_ns for call in of if call.name in ("llama_process", "llama_synchronize"))
    # Each sample waits once more for what is done already.
    done = min(done, next((c.start_ns for c in of if c.name == _SAMPLE), done))
    parts["prepare"] = (launched - begun_ns) / 1e6
    parts["gpu"] = (done - launched) / 1e6
    whole = (end_ns - begun_ns) / 1e6
    parts["rest"] = whole - sum(parts.values())
    return Step(
        streams=count[_SAMPLE],
        begins=begins,
        launches=count[_COMPUTE],
        replayed=bool(count["cudaGraphLaunch"]) and not count["cudaStreamEndCapture"],
        whole=whole,
        parts=parts,
        saved_mib=sum(c.size for c in of if c.name == "llama_state_seq_get_data_ext") / 2**20,
    )


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Steps of one kind: how many, their mean length and its parts, in milliseconds."""

    steps: int
    whole_ms: float
    parts_ms: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """The steps of so many clients, by kind."""

    clients: int
    decode: Kind
    """Of all clients' streams, by a CUDA graph that was there already."""
    other: Kind
    """Of all or fewer streams, after one ended, and until the CUDA graph is captured anew."""
    begin: Kind
    """In which the prompt of a new request is read beside the other streams."""
    launches: float
    """Graphs computed a step."""
    saved_mib: float
    """Of prompts' caches, saved to host memory, a new request."""


def summary(found: list[Step], clients: int) -> Row:
    """Sort the steps by kind, and average each."""
    graphs = any(step.replayed for step in found)  # a CPU has none
    kinds: dict[str, list[Step]] = {"decode": [], "other": [], "begin": []}
    for step in found:
        decodes = (step.streams, step.replayed) == (clients, graphs)
        kinds["begin" if step.begins else "decode" if decodes else "other"].append(step)
    return Row(
        clients=clients,
        **{name: _kind(of) for name, of in kinds.items()},
        launches=round(fmean(step.launches for step in found), 2),
        saved_mib=round(sum(step.saved_mib for step in found) / max(1, len(kinds["begin"])), 1),
    )


def _kind(found: list[Step]) -> Kind:
    def mean(values: Iterable[float]) -> float:
        return round(fmean([*values] or [0.0]), 3)

    return Kind(
        steps=len(found),
        whole_ms=mean(step.whole for step in found),
        parts_ms={part: mean(step.parts[part] for step in found) for part in PARTS},
    )


def measure(
    project: Project, quant: str, *, seconds: float, folder: Path, stand_in: bool = False
) -> Row:
    """Serve a quant natively under the shim, for the project's clients, and sum up its steps.

    Raises:
        StackError: as `loadtest.own`; VERIFY where no step served all clients.

    """
    trace, clients = folder / "trace", project.clients
    given = {"LD_PRELOAD": str(build(folder)), "ENGINE_TIMELINE": str(trace)}
    plan = Plan(clients=(clients,), duration_s=seconds, warmup_s=2, repeats=1, ceiling=False)
    native, service = runtime.native(project), project.service(quant)
    os.environ |= given  # a native server inherits them
    try:
        loadtest.own(native, project, service, plan, folder=folder / "load", stand_in=stand_in)
    finally:
        for name in given:
            del os.environ[name]
    found = steps(calls(trace), clients)
    trace.unlink()
    if not found:
        raise StackError(
            f"No step served {clients} clients.", "Give it more --seconds.", Code.VERIFY
        )
    return summary(found, clients)


def main() -> None:
    """Measure each number of clients, and write one JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quant", default="q4")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    stand_ins = config.stand_ins(config.load(ROOT)) if given.stand_in else {}
    rows = []
    for clients in given.clients.split(","):
        project = config.load(ROOT, overrides={**stand_ins, "GLM_CLIENTS": clients})
        with tempfile.TemporaryDirectory() as name:
            row = measure(
                project,
                given.quant,
                seconds=given.seconds,
                folder=Path(name),
                stand_in=given.stand_in,
            )
        rows.append(asdict(row))
    told = {
        "gpu": next((each.name for each in gpu.of(project.service(given.quant))), ""),
        "quant": given.quant,
        "engine": f"b{project.engine.build}, patches {project.engine.patches}",
        "rows": rows,
    }
    given.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
