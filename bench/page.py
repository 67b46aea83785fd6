"""Writes docs/memory.md, and the tables of docs/loadtest.md and settings.md: python -m bench.page.

A test compares them with what this makes, so that they cannot say anything else.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import loads, results
from stack import config, gguf_header, models, plan

ROOT = Path(__file__).parent.parent
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
    *("Clients", "slots", "defaults", "private caches, CPU sampling"),
    *("private caches, GPU sampling", "as chosen: that, with our patches", "over defaults"),
    *("decode, of the engine", "TTFT (ms)"),
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
    records = [
        json.loads(path.read_text()) for path in sorted((ROOT / "bench/results").glob("vram-*"))
    ]
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
    for path in sorted((ROOT / "bench" / "results").glob("loadtest-*/summary.json")):
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
    return _with_table(LOAD_PAGE, LOADS, _loads())


def settings_page() -> str:
    """Return docs/settings.md with its table of results made anew."""
    return _with_table(SETTINGS_PAGE, SETTINGS, _settings())


def _with_table(path: Path, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    before, _, after = re.split(
        rf"^(\| {head[0]} \|(?:.*\n)+?)\n", path.read_text(), flags=re.MULTILINE
    )
    return f"{before}{_table(head, rows)}\n\n{after}"


def _settings() -> Iterator[list[str]]:
    folder = ROOT / "bench" / "results"
    tests = {
        kind: _by_clients((folder / "settings-q4-nvidia-h100").glob(f"{kind}-*.json"))
        for kind in ("private-cpu", "private-gpu", "patched-gpu")
    }
    defaults = _by_clients(folder.glob("loadtest-q4-nvidia-h100/summary.json"))
    for clients, (load, slots) in sorted(tests["patched-gpu"].items()):
        default = defaults[clients][0]
        others = (tests[kind].get(clients) for kind in ("private-cpu", "private-gpu"))
        measured = tests["private-gpu"].get(clients)  # the engine alone, in that run only
        top = measured[0].ceiling if measured else None
        streams = top.at(clients) if top else None
        decoded = clients * load.value(lambda p: p.decode_tokens_s)
        yield [
            f"{clients}",
            f"{slots}",
            f"{default.tokens.value:.0f}",
            *(f"{other[0].tokens.value:.0f}" if other else "" for other in others),
            f"{load.tokens.value:.0f}",
            f"{load.tokens.value / default.tokens.value:.2f} x",
            f"{100 * decoded / streams.decode_tokens_s:.0f} %" if streams else "",
            f"{load.value(lambda p: p.ttft.p50):,.0f}",
        ]


def _by_clients(paths: Iterable[Path]) -> dict[int, tuple[loads.Load, int]]:
    """Return the loads of summaries, and the slots of their server, by how many clients."""
    found: dict[int, tuple[loads.Load, int]] = {}
    for path in paths:
        summary = results.read(path)
        slots = int(summary.provenance.server["LLAMA_ARG_N_PARALLEL"])
        found |= {int(load.level): (load, slots) for load in loads.of(summary)}
    return found


if __name__ == "__main__":
    PAGE.write_text(page())
    LOAD_PAGE.write_text(load_page())
    SETTINGS_PAGE.write_text(settings_page())
