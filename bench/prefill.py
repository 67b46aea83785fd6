"""Time to the first token by the length of the prompt, and what a long one does to others.

    python -m bench.prefill --quant q4 --stand-in --lengths 1000,8000,32000 --out FILE.json

For each length: a prompt that nothing has in its cache, alone; the same with 64 tokens more, its
beginning cached; another one while three streams decode. Prompts are token ids drawn at random.
Beside it, `llama-bench` reads a prompt of 8,192 tokens with the same build and settings.

    stalled = 1 - (tokens of the three streams while the prompt is read)
                  / (the time it took x their rate in the seconds before)
"""

import argparse
import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from bench import ceiling
from stack import client, config, gpu, runtime
from stack.server import Server

ROOT = Path(__file__).parent.parent
STREAMS = 3
MORE = 64
BEFORE_S = 2.0
LIMIT_S = 600


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a prompt of so many tokens took; milliseconds."""

    prompt_tokens: int
    cold_ms: float
    cached_ms: float
    beside_ms: float
    """Cold, while three streams decode."""
    gap_ms: float
    """Between two tokens of one of the streams, before: the median."""
    longest_gap_ms: float
    stalled: float


def read(server: Server, lengths: list[int]) -> Iterator[Reading]:
    """Measure each length in turn. Raises httpx.HTTPError, and StopIteration without a token."""
    vocabulary = client.models(server)["data"][0]["meta"]["n_vocab"]

    def draw(length: int) -> list[int]:
        # Beyond the single bytes, and before the special tokens.
        return [random.randrange(vocabulary // 3, vocabulary // 2) for _ in range(length)]

    for length in lengths:
        prompt = draw(length)
        cold = _ttft_ms(server, prompt)
        cached = _ttft_ms(server, prompt + draw(MORE))
        with_others = _beside(server, draw(length), [draw(MORE) for _ in range(STREAMS)])
        yield Reading(prompt_tokens=length, cold_ms=cold, cached_ms=cached, **with_others)


def _tokens(server: Server, prompt: list[int], most: int) -> Iterator[float]:
    """Yield when each token arrives, by `time.perf_counter`."""
    body = {"prompt": prompt, "n_predict": most, "stream": True, "ignore_eos": True}
    with (
        client.session(server, timeout_s=LIMIT_S) as session,
        session.stream("POST", "/completion", json=body) as reply,
    ):
        reply.raise_for_status()
        for line in reply.iter_lines():
            if line.startswith("data: ") and '"stop":true' not in line:
                yield time.perf_counter()


def _ttft_ms(server: Server, prompt: list[int]) -> float:
    begun = time.perf_counter()
    return 1000 * (next(_tokens(server, prompt, 2)) - begun)


def _beside(server: Server, prompt: list[int], others: list[list[int]]) -> dict[str, float]:
    """Read a prompt while streams decode, and see what becomes of these."""
    ends = threading.Event()
    arrived: list[list[float]] = [[] for _ in others]

    def decode(other: list[int], times: list[float]) -> None:
        for at in _tokens(server, other, 100_000):
            times.append(at)
            if ends.is_set():
                return

    threads = [
        threading.Thread(target=decode, args=both) for both in zip(others, arrived, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        while not all(arrived):
            time.sleep(0.01)
        time.sleep(BEFORE_S)
        begun = time.perf_counter()
        took_ms = _ttft_ms(server, prompt)
        ended = begun + took_ms / 1000
        time.sleep(0.5)  # the gap that lasts over the end, too
    finally:
        ends.set()
        for thread in threads:
            thread.join()
    gaps = [(a, b - a) for times in arrived for a, b in pairwise(times)]
    before = [gap for at, gap in gaps if begun - BEFORE_S < at < begun - 0.2]
    rate = sum(begun - BEFORE_S < at <= begun for times in arrived for at in times) / BEFORE_S
    during = sum(begun < at <= ended for times in arrived for at in times)
    return {
        "beside_ms": took_ms,
        "gap_ms": 1000 * median(before),
        "longest_gap_ms": 1000 * max(gap for at, gap in gaps if begun - 0.2 < at < ended),
        "stalled": max(0.0, 1 - during / (rate * (ended - begun))),
    }


def main() -> None:
    """Serve, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quant", default="q4")
    parser.add_argument("--lengths", default="1000,8000,32000")
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    project = config.load(ROOT)
    if given.stand_in:
        project = config.load(ROOT, overrides=config.stand_ins(project))
    native = runtime.native(project)
    service = project.service(given.quant)
    up = runtime.up(native, project, service, stand_in=given.stand_in, choose=True)
    try:
        lengths = [int(each) for each in given.lengths.split(",")]
        rows = [asdict(row) for row in read(up.server, lengths)]
    finally:
        native.stop(up.server.service)
    bench = native.tool(
        up.server.service,
        "llama-bench",
        *ceiling.options(up.server.service.environment),
        *("--n-prompt", "8192", "--n-gen", "1", "--repetitions", "3", "--output", "json"),
        timeout_s=LIMIT_S,
    )
    engine = ceiling.parse_single(bench.stdout)
    given.out.write_text(
        json.dumps(
            {
                "gpu": next((each.name for each in gpu.of(service)), ""),
                "quant": given.quant,
                "engine": f"b{project.engine.build}, patches {project.engine.patches}",
                "slots": up.server.service.slots,
                "ubatch": up.server.service.environment["LLAMA_ARG_UBATCH"],
                "llama_bench_8192_tokens_s": engine.prefill_tokens_s,
                "rows": rows,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
