"""Our load generator beside established ones, in one run: `python -m bench.peers`.

Each is installed in an environment of its own and sends the same load to the built-in server,
which knows when it sent what, and to llama-server with the tiny model. The tables go to
docs/peers.md.
"""

import contextlib
import datetime as dt
import hashlib
import itertools
import json
import os
import platform
import re
import resource
import shutil
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx

from bench import generator, reference
from bench.generator import Load
from bench.prompts import Spread
from bench.records import Run
from stack import client, config, keys, runtime
from stack.errors import Code, StackError
from stack.host import run
from stack.server import Server

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "peers.md"
STREAMS = (64, 256)
TOKENS = 128
ROUNDS = (2, 6)
"""Answers a stream in two runs: what the second takes more is free of the cost of starting up."""
ITL_MS = 20
TTFT_MS = 200
SLOTS = 4
_INSTALL_S = 900
_RUN_S = 600
_BOOK = "http://book.invalid/"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to send, and where; the same for all."""

    url: str
    key: str
    model: str
    streams: int
    requests: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one of them reported. Times are milliseconds."""

    ttft: Sequence[float]
    tpot: Sequence[float]
    gaps: Sequence[float] = ()
    """Between chunks; empty where it does not tell."""
    cpu_s: float = 0


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An established tool."""

    name: str
    version: str
    argv: Callable[[Job, Path], list[str]]
    read: Callable[[Path], Figures]


def _benchy(job: Job, home: Path) -> list[str]:
    return [
        *("llama-benchy", "--base-url", f"{job.url}/v1", "--api-key", job.key or "none"),
        *("--model", job.model, "--tokenizer", str(home / "tokenizer"), "--book-url", _BOOK),
        *("--pp", str(TOKENS), "--tg", str(TOKENS), "--exact-tg", "--latency-mode", "none"),
        *("--concurrency", str(job.streams), "--runs", str(job.requests // job.streams)),
        *("--no-warmup", "--no-adapt-prompt", "--skip-coherence"),
        *("--format", "json", "--save-result", str(home / "result.json")),
    ]


def _read_benchy(home: Path) -> Figures:
    (told,) = json.loads((home / "result.json").read_text())["benchmarks"]
    return Figures(
        ttft=told["e2e_ttft"]["values"],
        tpot=[1000 / rate for rate in told["tg_req_throughput"]["values"]],
    )


def _aiperf(job: Job, home: Path) -> list[str]:
    return [
        *("aiperf", "profile", "--url", job.url, "--model", job.model, "--endpoint-type", "chat"),
        *("--streaming", "--use-server-token-count", "--tokenizer", str(home / "tokenizer")),
        *("--concurrency", str(job.streams), "--request-count", str(job.requests)),
        *("--isl", str(TOKENS), "--osl", str(TOKENS), "--extra-inputs", "ignore_eos:true"),
        *("--ui", "none", "--artifact-dir", str(home / "result"), "--random-seed", "1"),
        *(("--api-key", job.key) if job.key else ()),
    ]


def _read_aiperf(home: Path) -> Figures:
    lines = (home / "result" / "profile_export.jsonl").read_text().splitlines()
    told = [
        each for line in lines if "time_to_first_token" in (each := json.loads(line)["metrics"])
    ]
    return Figures(
        ttft=[each["time_to_first_token"]["value"] for each in told],
        tpot=[each["inter_token_latency"]["value"] for each in told],
        gaps=[gap for each in told for gap in each["inter_chunk_latency"]["value"]],
    )


PEERS = (
    Peer(name="llama-benchy", version="0.4.0", argv=_benchy, read=_read_benchy),
    Peer(name="aiperf", version="0.13.0", argv=_aiperf, read=_read_aiperf),
)


def install(environment: Path, *requirements: str) -> float:
    """Install into an environment of its own; return its size in MB.

    Raises:
        StackError: HOST where that fails.

    """
    if not (environment / "done").exists():
        shutil.rmtree(environment, ignore_errors=True)
        uv = os.environ.get("UV", "uv")
        _must([uv, "venv", "--quiet", "--python", sys.executable, environment])
        python = environment / "bin" / "python"
        _must([uv, "pip", "install", "--quiet", "--python", python, *requirements])
        (environment / "done").touch()
    files = (path.lstat() for path in environment.rglob("*"))
    return sum(each.st_size for each in files) / 1e6


def _must(
    argv: list[str | Path], *, timeout_s: float = _INSTALL_S, home: Path | None = None
) -> None:
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    if home:
        env["HOME"] = str(home)
    done = run(argv, env=env, timeout_s=timeout_s)
    if done.status:
        raise StackError(
            f"`{' '.join(map(str, argv[:3]))} …` failed: {(done.stderr or done.stdout)[-500:]}",
            "See whether it still has these options; its version is pinned in bench/peers.py.",
            Code.HOST,
        )


def ask(peer: Peer, environment: Path, job: Job) -> Figures:
    """Run a tool to its end; return what it reported, and its CPU time with all its processes.

    Raises:
        StackError: HOST where it fails.

    """
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        _furnish(home)
        program, *arguments = peer.argv(job, home)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _must([environment / "bin" / program, *arguments], timeout_s=_RUN_S, home=home)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return replace(peer.read(home), cpu_s=cpu_s)


def _furnish(home: Path) -> None:
    """Give a home to a tool that would fetch a tokenizer and a book from the Internet."""
    words = [f"w{number}" for number in range(1000)]
    model = {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "w0"}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": model,
    }
    class_ = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    book = home / ".cache" / "llama-benchy" / hashlib.md5(_BOOK.encode()).hexdigest()  # noqa: S324
    for path, text in {
        home / "tokenizer" / "tokenizer.json": json.dumps(tokenizer),
        home / "tokenizer" / "tokenizer_config.json": json.dumps(class_),
        book.with_suffix(".txt"): " ".join(words * 20),
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def ours(job: Job) -> Figures:
    """Do a job with our generator, in this process. Raises as `generator.run`."""
    service = config.load(ROOT).service("tiny")
    server = Server(runtime="attached", service=service, url=job.url, key=job.key)
    length = Spread(TOKENS, TOKENS)
    load = Load(
        clients=job.streams,
        requests=job.requests,
        warmup_s=0,
        duration_s=_RUN_S,
        prompt=length,
        output=length,
        timings_per_token=False,  # as the others: the same bytes
    )
    done = generator.run(server, load)
    return replace(_figures(done), cpu_s=done.cpu_s)


def _figures(done: Run) -> Figures:
    whole = [record for record in done.records if not record.error and not record.cut]
    return Figures(
        ttft=[(record.reads[0].at_ns - record.sent_ns) / 1e6 for record in whole],
        tpot=[
            (record.reads[-1].at_ns - record.reads[0].at_ns)
            / 1e6
            / ((record.output_tokens or 0) - record.reads[0].tokens)
            for record in whole
        ],
        gaps=[
            (after.at_ns - before.at_ns) / 1e6
            for record in whole
            for before, after in itertools.pairwise(record.reads)
        ],
    )


def _truth(url: str) -> Figures:
    """Ask the built-in server what it did."""
    told = httpx.get(f"{url}/truth", trust_env=False, timeout=30).json()
    return Figures(
        ttft=[(sent[0] - received) / 1e6 for received, sent in told],
        tpot=[(sent[-1] - sent[0]) / 1e6 / (len(sent) - 1) for _, sent in told],
        gaps=[(b - a) / 1e6 for _, sent in told for a, b in itertools.pairwise(sent)],
    )


def _rank(samples: Sequence[float], percent: int) -> float:
    return sorted(samples)[max(0, -(-percent * len(samples) // 100) - 1)]


def against_truth(name: str, do: Callable[[Job], Figures], streams: int) -> list[str]:
    """Send two loads to the built-in server; return a row of the table."""
    cpu_s = []
    for rounds in ROUNDS:
        with reference.serving(ttft_ms=TTFT_MS, itl_ms=ITL_MS) as url:
            requests = rounds * streams
            job = Job(url=url, key="", model=reference.MODEL, streams=streams, requests=requests)
            told = do(job)
            true = _truth(url)
        cpu_s.append(told.cpu_s)
    events = (ROUNDS[1] - ROUNDS[0]) * streams * TOKENS
    tpot = statistics.mean(told.tpot) / statistics.mean(true.tpot) - 1
    gap = f"{_rank(told.gaps, 99) - _rank(true.gaps, 99):+.2f}" if told.gaps else "not told"
    return [
        name,
        str(streams),
        *(f"{_rank(told.ttft, p) - _rank(true.ttft, p):+.2f}" for p in (50, 99)),
        f"{tpot:+.2%}",
        gap,
        f"{(cpu_s[1] - cpu_s[0]) * 1e6 / events:.0f}",
    ]


def against_engine(name: str, do: Callable[[Job], Figures], server: Server) -> list[str]:
    """Send a load to llama-server; return a row of the table."""
    before = _counters(server)
    requests = ROUNDS[1] * SLOTS
    model = server.service.alias
    told = do(Job(url=server.url, key=server.key, model=model, streams=SLOTS, requests=requests))
    after = _counters(server)
    count = {key: after[key] - before[key] for key in after}
    tokens = count["tokens_predicted_total"]
    true_tpot = count["tokens_predicted_seconds_total"] * 1e3 / (tokens - len(told.tpot))
    tpot = statistics.mean(told.tpot)
    return [
        name,
        f"{_rank(told.ttft, 50):.1f}",
        f"{count['prompt_seconds_total'] * 1e3 / len(told.ttft):.1f}",
        f"{tpot:.3f}",
        f"{true_tpot:.3f}",
        f"{tpot / true_tpot - 1:+.1%}",
        str(requests - len(told.tpot)),
    ]


def _counters(server: Server) -> dict[str, float]:
    with client.session(server) as session:
        text = session.get("/metrics").text
    return {
        key: float(value)
        for key, value in re.findall(r"^llamacpp:(\w+_total) (\S+)$", text, re.MULTILINE)
    }


@contextlib.contextmanager
def engine() -> Iterator[Server]:
    """Give the tiny model's server: the one that runs natively here, or one of our own.

    Of random weights: a trained model's tokens are held back where a turn may end, come together
    later, and no tool can tell how many came.
    """
    project = config.load(ROOT, overrides={"GLM_TINY_FILE": "glm-tiny-random.gguf"})
    service = project.service("tiny")
    native = runtime.native(project)
    found = native.find(service, key=keys.read(service)) if service.key_file.exists() else None
    if found and found.ended() is None:
        yield found
        return
    with runtime.serving(native, project, service) as up:
        yield up.server


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page() -> str:
    """Measure all, and return the tables.

    Raises:
        StackError: HOST where a tool cannot be installed or fails, else as `runtime.up`.

    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = ROOT / ".cache" / "peers"
    sizes = {"ours": install(folder / "ours", *project["dependencies"])}
    doers: dict[str, Callable[[Job], Figures]] = {"ours": ours}
    for peer in PEERS:
        name = f"{peer.name} {peer.version}"
        environment = folder / f"{peer.name}-{peer.version}"
        sizes[name] = install(environment, f"{peer.name}=={peer.version}")
        doers[name] = partial(ask, peer, environment)
    load = os.getloadavg()[0]
    truth = [
        [*against_truth(name, do, streams), f"{sizes[name]:.0f}"]
        for streams in STREAMS
        for name, do in doers.items()
    ]
    with engine() as server:
        engines = [against_engine(name, do, server) for name, do in doers.items()]
        version = client.props(server)["build_info"]
    return _PAGE.format(
        day=dt.datetime.now(dt.UTC).date(),
        cores=os.cpu_count(),
        machine=platform.machine(),
        load=load,
        version=version,
        truth=_table(_TRUTH_HEAD, truth),
        engine=_table(_ENGINE_HEAD, engines),
    )


_TRUTH_HEAD = (
    *("Tool", "Streams", "TTFT p50 (ms)", "TTFT p99 (ms)", "TPOT", "gap p99 (ms)"),
    *("CPU (µs/event)", "installed (MB)"),
)
_ENGINE_HEAD = (
    *("Tool", "TTFT p50 (ms)", "server's prefill (ms)", "TPOT (ms)", "server's TPOT (ms)", "error"),
    "failed",
)
_PAGE = f"""# Our load generator beside others

Made by `nox -s loadtest_peers`, {{day}}, on {{cores}} cores ({{machine}}) that servers, clients
and whatever else ran share; load average before: {{load:.1f}}.

## Against the built-in server

{TTFT_MS} ms to the first token at least, then one every {ITL_MS} ms, all streams on one grid.
{TOKENS} tokens an answer, {ROUNDS[1]} answers a stream. Each error is the tool's figure less the
server's, of the same requests: TTFT and the gaps between chunks at a percentile, TPOT in the mean.
CPU is of all the tool's processes: what {ROUNDS[1]} answers a stream take more than {ROUNDS[0]}.

{{truth}}

## Against llama-server

Build {{version}}, random weights of the tiny shape,
{SLOTS} clients on {SLOTS} slots. TPOT in the mean, beside the server's own
(`tokens_predicted_seconds_total` over tokens after the first); the load of the tool itself slows
the server down, so rows compare within themselves. Failed are requests that the tool counted as
such: the server closes idle connections, which is no failure.

{{engine}}
"""


if __name__ == "__main__":
    PAGE.write_text(page())
