"""Writes docs/memory.md, and the tables of docs/loadtest.md and settings.md: python -m bench.page.

A test compares them with what this makes, so that they cannot say anything else.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import loads, results
from bench.candidates import UNTUNED
from stack import config, gguf_header, models, plan

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "memory.md"
LOAD_PAGE = ROOT / "docs" / "loadtest.md"
SETTINGS_PAGE = ROOT / "docs" / "settings.md"
HEAD = """\
# GPU memory

Made by `python -m bench.page` from the JSON files in `bench/results/`; every figure was measured by
`nox -s vram` in the run that its file records. Sizes are MiB.

## Planned, told by the engine, measured

{measured}

*Planned* comes from the GGUF header alone, before anything loads (`invoke plan`). *Engine* is the
sum of the buffers in its log; *unexplained* is what NVML sees beyond them: CUDA's context, its
kernels, cuBLAS. *Prefill peak* is while one prompt of so many tokens was read, *load
peak* while every slot decoded. *After stop* is what was held beyond the baseline.

{together}


## What fits on a card

The largest context of each slot, in tokens, on an otherwise empty card with 1 GiB kept free,
planned with the same formula from the shape of each quant's file. *Shared* is one pool for four
slots, as `compose.yaml` sets it; a private slot keeps its context whatever the others do.

{capacity}
"""
MEASURED = (
    *(
        "GPU",
        "quant",
        "context x slots",
        "planned",
        "engine",
        "NVML",
        "unexplained",
        "plan's error",
    ),
    *("prefill peak", "load peak", "after stop", "ready s", "decode tok/s"),
)


SETTINGS = (
    *("Quant", "clients", "slots", "defaults", "unpatched, CPU sampling", "unpatched"),
    *("patches 1, 2", "1 to 3", "1 to 4", "all", "over defaults", "target"),
    *("decode, of the engine", "target", "the same, mean", "TTFT (ms)"),
)
DECODE_TARGETS = {1: 0.95, 4: 0.92, 8: 0.90, 16: 0.85, 64: 0.75}
"""By slots, of what the engine decodes with as many streams as there are clients."""
HALF = 0.9
"""What fewer clients than slots may take of that."""
SPEED_UP_TARGETS = {4: 1.3, 64: 2.5}
TUNED = (
    *("Candidate", "profile", "tokens/s at so many clients", "score, of the choice's"),
    *("TTFT (ms)", "tokens each", "ready s"),
)
STEPS = (
    *("Streams", "step", "of the time", "ms", "of the engine alone", "prepare", "GPU", "sampling"),
    *("text", "saving prompts", "new samplers", "rest"),
)
PROMPTS = (
    *("Prompt tokens", "TTFT (ms)", "tokens/s", "its beginning cached (ms)"),
    *("beside 3 streams (ms)", "their gap (ms)", "longest (ms)", "stalled"),
    *("without patch 7: beside (ms)", "longest (ms)"),
)
LOADS = (
    *("Stand-in", "clients", "tok/s", "of the engine", "decode, of the engine"),
    *("TTFT p50 (ms)", "ITL p50 (ms)", "tok/J"),
)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _error(planned: int, loaded: int) -> str:
    return f"{100 * (planned - loaded) / loaded:+.2f} %"


def _measured(record: dict[str, Any]) -> list[str]:
    engine = sum(record["engine"][key] for key in ("model_mib", "cache_mib", "compute_mib"))
    planned, loaded = sum(record["planned"].values()), record["loaded_mib"]
    prefill = f"{record['prefill_tokens']:,} in {record['prefill_s']:.0f} s"
    kind = "stand-in" if record["stand_in"] else "the published file"
    return [
        record["gpu"],
        f"{record['quant']}, {kind}",
        f"{record['context']:,} x {record['slots']}",
        f"{planned:,}",
        f"{engine:,.0f}",
        f"{loaded:,}",
        f"{loaded - engine:,.0f}",
        _error(planned, loaded),
        f"{record['prefill_peak_mib']:,} ({prefill})",
        f"{record['load_peak_mib']:,}",
        f"{record['released_mib']:,}",
        f"{record['ready_s']:.1f}",
        f"{record['decode_tokens_s']:.0f}",
    ]


def _together(record: dict[str, Any]) -> list[str]:
    planned, loaded = sum(record["planned"].values()), record["loaded_mib"]
    return [
        record["gpu"],
        " and ".join(record["planned"]),
        f"{planned:,}",
        f"{loaded:,}",
        _error(planned, loaded),
    ]


def _capacity() -> Iterator[list[str]]:
    for service in config.load(ROOT).services.values():
        if service.gpus:
            header = gguf_header.parse(models.plan(service.model.random).header)
            rows = plan.capacity(header)
            for card in dict.fromkeys(row.card_gb for row in rows):
                contexts = (row.context for row in rows if row.card_gb == card)
                yield [service.quant, f"{card} GB", *(f"{c:,}" if c else "none" for c in contexts)]


def page() -> str:
    """Return the page."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("vram-*"))]
    alone = [record for record in records if "model" in record]
    together = [record for record in records if "model" not in record]
    slots = ("shared", *(f"{n} private" for n in plan.PRIVATE_SLOTS))
    return HEAD.format(
        measured=_table(MEASURED, map(_measured, alone)),
        together=_table(
            ("GPU", "together", "planned", "NVML", "plan's error"), map(_together, together)
        ),
        capacity=_table(("quant", "card", *slots), _capacity()),
    )


def _loads() -> Iterator[list[str]]:
    for path in sorted(RESULTS.glob("loadtest-*/summary.json")):
        summary = results.read(path)
        for load in loads.of(summary):
            joules = [run.joules_token for run in load.runs if run.joules_token]
            yield [
                f"[{path.parent.name.split('-')[1]}](../bench/results/{path.parent.name}/)",
                f"{load.level:g}",
                f"{load.tokens.value:.0f}",
                *(f"{100 * share:.0f} %" for share in (load.ratio or 0, load.decode_ratio or 0)),
                f"{load.value(lambda p: p.ttft.p50):,.0f}",
                f"{load.value(lambda p: p.itl.p50):.1f}",
                f"{len(joules) / sum(joules):.2f}" if joules else "",
            ]


def load_page() -> str:
    """Return docs/loadtest.md with its table of results made anew."""
    return _with_table(LOAD_PAGE.read_text(), LOADS, _loads())


def settings_page() -> str:
    """Return docs/settings.md with its tables of results made anew."""
    text = SETTINGS_PAGE.read_text()
    for head, rows in (
        (SETTINGS, [*_settings("q4"), *_settings("q8")]),
        (TUNED, _tuned()),
        (STEPS, _steps()),
        (PROMPTS, _prompts()),
    ):
        text = _with_table(text, head, rows)
    return text


def _with_table(text: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    before, _, after = re.split(rf"^(\| {head[0]} \|(?:.*\n)+?)\n", text, flags=re.MULTILINE)
    return f"{before}{_table(head, rows)}\n\n{after}"


def _settings(quant: str) -> Iterator[list[str]]:
    kinds = ("private-cpu", "none", "p12", "p123", "p1234", "all")
    tests = {
        kind: _by_clients(RESULTS.glob(f"settings-{quant}-nvidia-h100/{kind}-*.json"))
        for kind in kinds
    }
    shipped = _by_clients(RESULTS.glob(f"loadtest-{quant}-nvidia-h100/summary.json"))
    defaults = {clients: load for (clients, _), load in shipped.items()}
    for (clients, slots), load in sorted(tests["all"].items()):
        others = (tests[kind].get((clients, slots)) for kind in kinds[:-1])
        default, top = defaults[clients], load.ceiling and load.ceiling.at(clients)
        each = load.value(lambda p: p.itl.p50)
        decode_target = DECODE_TARGETS[slots] * (HALF if clients < slots else 1)
        yield [
            *(quant, f"{clients}", f"{slots}", f"{default.tokens.value:.0f}"),
            *(f"{other.tokens.value:.0f}" if other else "" for other in others),
            f"{load.tokens.value:.0f}",
            f"{load.tokens.value / default.tokens.value:.2f} x",
            f"{SPEED_UP_TARGETS[slots]} x" if slots in SPEED_UP_TARGETS else "",
            f"{100 * top.decode_share(slots, 1000 / each):.0f} %" if top else "",
            f"{100 * decode_target:.0f} %",
            f"{100 * load.decode_ratio:.0f} %" if load.decode_ratio else "",
            f"{load.value(lambda p: p.ttft.p50):,.0f}",
        ]


def _tuned() -> Iterator[list[str]]:
    for path in sorted((ROOT / "profiles").glob("*.json")):
        found = json.loads(path.read_text())
        last = {trial["candidate"]: trial for trial in found["trials"]}
        for name, score in found["scores"].items():
            runs = last[name]["runs"]
            yield [
                name,
                f"[{found['subject']['quant']}, {found['shape']}](../profiles/{path.name})",
                ", ".join(f"{run['clients']}: {run['tokens_s']:.0f}" for run in runs),
                f"{score / found['scores'][UNTUNED]:.3f}",
                ", ".join(f"{run['ttft_ms']:.0f}" for run in runs),
                f"{last[name]['context']:,}",
                f"{last[name]['ready_s']:.1f}",
            ]


def _steps() -> Iterator[list[str]]:
    whole = _by_clients(RESULTS.glob("settings-q4-nvidia-h100/all-*.json"))
    alone = {
        clients: load.ceiling.at(clients)
        for (clients, slots), load in whole.items()
        if load.ceiling and clients == slots
    }
    for row in json.loads((RESULTS / "timeline-q4-nvidia-h100.json").read_text())["rows"]:
        kinds = {name: row[name] for name in ("decode", "begin", "other")}
        total = sum(kind["steps"] * kind["whole_ms"] for kind in kinds.values())
        for name, kind in kinds.items():
            top = alone.get(row["clients"]) if name == "decode" else None
            yield [
                f"{row['clients']}",
                name,
                f"{100 * kind['steps'] * kind['whole_ms'] / total:.0f} %",
                f"{kind['whole_ms']:.1f}",
                f"{1000 * top.streams / top.decode_tokens_s:.1f}" if top else "",
                *(f"{ms:.1f}" for ms in kind["parts_ms"].values()),
            ]


def _prompts() -> Iterator[list[str]]:
    told, before = (
        json.loads((RESULTS / f"prefill-q4-{kind}nvidia-h100.json").read_text())["rows"]
        for kind in ("", "p1234-")
    )
    for row, other in zip(told, before, strict=True):
        yield [
            f"{row['prompt_tokens']:,}",
            f"{row['cold_ms']:,.0f}",
            f"{1000 * row['prompt_tokens'] / row['cold_ms']:,.0f}",
            f"{row['cached_ms']:,.0f}",
            f"{row['beside_ms']:,.0f}",
            f"{row['gap_ms']:.1f}",
            f"{row['longest_gap_ms']:,.0f}",
            f"{100 * row['stalled']:.0f} %",
            *(f"{other[name]:,.0f}" for name in ("beside_ms", "longest_gap_ms")),
        ]


def _by_clients(paths: Iterable[Path]) -> dict[tuple[int, int], loads.Load]:
    """Return the loads of summaries by how many clients, and slots of their server."""
    found: dict[tuple[int, int], loads.Load] = {}
    for path in paths:
        summary = results.read(path)
        slots = int(summary.provenance.server["LLAMA_ARG_N_PARALLEL"])
        found |= {(int(load.level), slots): load for load in loads.of(summary)}
    return found


if __name__ == "__main__":
    PAGE.write_text(page())
    LOAD_PAGE.write_text(load_page())
    SETTINGS_PAGE.write_text(settings_page())
