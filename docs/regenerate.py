"""Write the measured tables and figures of the README and docs from the files of docs/results.

    headfold prove --full --rounds 3 --threads 2 --report docs/results     # measures
    python examples/warmup.py --threads 2 --out docs/results               # measures the example
    python docs/measure_megatron.py                                        # measures Megatron-Core's functions
    python docs/measure_transformers.py --threads 2                        # measures transformers
    python docs/measure_kernels.py --output docs/results/kernels_h200.jsonl  # measures a GPU's kernels
    python docs/regenerate.py                                              # writes it into the pages
    python docs/regenerate.py --check                                      # exits 1 when a page says otherwise

A page marks a place with <!-- measured: NAME --> and <!-- end -->.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from headfold.lanes.record import show, show_bytes
from measuring.tables import beside_pytorch, kernels

DOCS = Path(__file__).parent
PAGES = (DOCS.parent / "README.md", *(DOCS / f"{name}.md" for name in ("story", "megatron", "transformers", "kernels")))
PLACE = re.compile(r"(<!-- measured: ([a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Report = dict[str, Any]


def rows(report: Report, lane: str) -> list[dict[str, Any]]:
    """Return the rows of a lane."""
    return next(found["rows"] for found in report["lanes"] if found["name"] == lane)


def row(report: Report, lane: str, path: str, phase: str) -> dict[str, Any]:
    """Return one row of a lane."""
    return next(r for r in rows(report, lane) if r["path"] == path and r["phase"] == phase)


def conditions(report: Report) -> str:
    """Say where the numbers were measured."""
    e, g = report["environment"], report["geometry"]
    return (
        f"b={g['b']}, sq=sk={g['sq']}, h={g['heads']}, d={g['dim']}, {g['dtype']}; "
        f"{e['cpu']}, {e['threads']} threads, torch {e['torch'].split('+')[0]}, Python {e['python']}"
    )


def headline(report: Report) -> str:
    """One measured number in bytes, with its conditions."""
    both = "forward + backward"
    before, after = (row(report, "residency", path, both)["measured"] for path in ("materialized", "headfold"))
    return (
        f"**{before:,} bytes → {after:,} bytes**: measured peak of one indexer training step, forward and backward, "
        f"beyond its inputs ({conditions(report)}; made by `headfold prove`)."
    )


def residency(report: Report) -> str:
    """Peaks at the report's shape, and at the seed's full shape."""
    table = []
    for lane in ("residency", "residency, full shape"):
        shape = "b=1" if lane == "residency" else "b=8"
        for r in rows(report, lane):
            measured = show_bytes(r["measured"]) if "measured" in r else "not run: " + r["note"].split(" (")[0]
            table.append(
                [shape, r["path"], r["phase"], show_bytes(r["planned"]), measured, show(r.get("process"), "bytes")]
            )
    head = ["sq=sk=4096, h=32, d=128", "path", "phase", "planned", "measured", "process"]
    return tabulate(table, head, tablefmt="github")


def speed(report: Report) -> str:
    """Medians, shares of the matrix-product rate and speed-ups."""
    table = [
        [
            r["path"],
            r["phase"],
            show(r["seconds"], "seconds"),
            show(r["share"], "ratio"),
            show(r.get("speedup"), "ratio"),
        ]
        for r in rows(report, "speed")
        if "seconds" in r
    ]
    notes = next(lane["notes"] for lane in report["lanes"] if lane["name"] == "speed")
    head = ["path", "phase", "median", "of matrix-product rate", "× materialised"]
    return tabulate(table, head, tablefmt="github") + f"\n\n{notes[0]}"


def selection(report: Report) -> str:
    """Peaks of every selection that was measured, and what it cost in time at the report's shape."""
    table = []
    for lane in (lane for lane in report["lanes"] if lane["name"].startswith("selection residency")):
        shape = lane["question"].removeprefix("And at ").split(", h=")[0]
        if lane["name"] == "selection residency":
            shape = f"b={report['geometry']['b']}, sq={report['geometry']['sq']}, sk={report['geometry']['sk']}"
        for r in lane["rows"]:
            if r["phase"] == "held for backward":
                continue
            measured = show_bytes(r["measured"]) if "measured" in r else "not run: " + r["note"].split(" (")[0]
            table.append([shape, r["path"], r["phase"], show_bytes(r["planned"]), measured])
    head = ["h=32, d=128", "path", "phase", "planned", "measured"]
    times = [
        [r["path"], r["phase"], show(r["seconds"], "seconds"), show(r.get("speedup"), "ratio"), r.get("note", "")]
        for r in rows(report, "selection speed")
        if "seconds" in r
    ]
    notes = next(lane["notes"] for lane in report["lanes"] if lane["name"] == "selection speed")
    times_head = ["path", "phase", "median", "× materialised", "ratio"]
    parts = tabulate(table, head, tablefmt="github"), tabulate(times, times_head, tablefmt="github"), notes[0]
    return "\n\n".join(parts)


def warmup(_: Report) -> str:
    """Recall and loss of the example's selections, from a file of their own."""
    found = json.loads((DOCS / "results" / "warmup.json").read_text(encoding="utf-8"))
    settings, recall, loss = found["settings"], found["recall"], found["loss"]
    table = [[n, f"{recall.get(n, 1.0):.3f}", f"{x:.4f}", f"{x - loss['dense']:+.4f}"] for n, x in loss.items()]
    head = [f"{settings['topk']} keys of up to {settings['context']}", "recall", "loss, nats per byte", "above dense"]
    return tabulate(table, head, tablefmt="github", disable_numparse=True) + (
        f"\n\nHeld-out text, {settings['layers']} layers, {settings['steps']} steps of the model and "
        f"{settings['warmup_steps']} of the indexer, {found['seconds']['all']:.0f} seconds, threads: "
        f"{found['environment']['threads']}."
    )


def megatron(_: Report) -> str:
    """Peaks of Megatron-Core's functions as they come and on headfold, from a file of their own."""
    found = json.loads((DOCS / "results" / "megatron.json").read_text(encoding="utf-8"))
    e, shape = found["environment"], ", ".join(f"{name}={size}" for name, size in found["shape"].items())
    table = [
        [r["call"], show_bytes(r["stock"]), show_bytes(r["headfold"]), f"{r['stock'] / r['headfold']:.0f} ×"]
        for r in found["rows"]
    ]
    head = ["peak of a call", "as it comes", "on headfold", "less by"]
    where = (
        f"{shape}, float32, sparse loss; megatron-core {e['megatron-core'].split('+')[0]}, torch "
        f"{e['torch'].split('+')[0]}, {e['threads']} thread of a CPU."
    )
    return tabulate(table, head, tablefmt="github", disable_numparse=True) + f"\n\n{where}"


def transformers(_: Report) -> str:
    """Peaks of a model of transformers before and after, from a file of their own."""
    found = json.loads((DOCS / "results" / "transformers.json").read_text(encoding="utf-8"))
    e, model = found["environment"], found["settings"]
    cells = {(r["s"], r["phase"], r["path"]): r for r in found["rows"]}

    def shown(cell: dict[str, Any]) -> list[str]:
        if "note" in cell:
            return [f"not run: {cell['note']}", ""]
        return [show_bytes(cell["process"]), show_bytes(cell["allocator"])]

    table = [
        [f"{s:,}", phase, *shown(cells[s, phase, "stock"]), *shown(cells[s, phase, "headfold"])]
        for s, phase in dict.fromkeys((s, phase) for s, phase, _ in cells)
    ]
    head = ["s", "what runs", "stock, process", "stock, allocator", "headfold, process", "headfold, allocator"]
    return tabulate(table, head, tablefmt="github", disable_numparse=True) + (
        f"\n\nb={model['b']}, {model['dtype']}, one layer of deepseek_v32: {model['index_n_heads']} index heads of "
        f"{model['index_head_dim']}, topk {model['index_topk']}, {model['num_attention_heads']} attention heads, "
        f"hidden size {model['hidden_size']}; transformers {e['transformers']} with sdpa, "
        f"torch {e['torch'].split('+')[0]}, {e['cpu']}, {e['threads']} threads."
    )


MEASURED: dict[str, Callable[[Report], str]] = {
    "headline": headline,
    "residency": residency,
    "speed": speed,
    "selection": selection,
    "warmup": warmup,
    "megatron": megatron,
    "kernels": lambda _: kernels(DOCS / "results"),
    "gpu": lambda _: beside_pytorch(DOCS / "results"),
    "transformers": transformers,
    "conditions": lambda report: f"Measured at {conditions(report)}.",
}


def written(page: str, report: Report) -> str:
    """Return the page with every marked place filled."""
    return PLACE.sub(lambda m: f"{m[1]}{MEASURED[m[2]](report)}\n{m[3]}", page)


def main(arguments: list[str]) -> int:
    """Rewrite the pages, or with --check only compare."""
    report = json.loads((DOCS / "results" / "report.json").read_text(encoding="utf-8"))
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = written(text, report)
        if new != text:
            stale.append(page.name)
            if "--check" not in arguments:
                page.write_text(new, encoding="utf-8")
    if stale and "--check" in arguments:
        sys.stderr.write(f"{', '.join(stale)}: run python docs/regenerate.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
