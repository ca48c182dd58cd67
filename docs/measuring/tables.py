"""Tables of what was measured on GPUs, one a card, from files of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from headfold.lanes.record import show_bytes
from measuring.rows import CALLS, RUNS

# Share of a call's time from which on the host that launches it may be what took it.
HOST_BOUND = 0.8
TIMES = ("median ms", "fastest", "slowest")
HEAD = ("call", "shape", *TIMES, "TFLOP/s", "products counted", "of the product's", "peak extra", "note")
# What a selection is compared with, at its own shape.
SCORING = ("index_scores, triton, causal, forward", "index_scores, causal")
SELECTING = "index_topk "
# A call, what plain PyTorch does instead, and where.
FULL, LONG, LOSS = "b=8 s=4096 h=32 d=128", "b=1 s=32768 h=32 d=128", "s=4096 h=32 d=128 np=64 np_k=64 hn=128"
ATTENDING = "s=4096 topk=1024 np=64 np_k=8 hn=128"
BESIDE_PYTORCH = (
    ("index_scores, triton, forward", "index_scores, materialized, forward", FULL),
    ("index_scores, triton, backward", "index_scores, materialized, backward", FULL),
    ("index_topk 2048, causal", "torch.topk 2048 of materialized scores, causal", FULL),
    ("index_topk 2048, causal", "torch.topk 2048 of materialized scores, causal", LONG),
    ("indexer_loss with gradients, triton", "indexer_loss with gradients, materialized", LOSS),
    ("sparse_attention, forward", "sparse_attention, materialized, forward", ATTENDING),
    ("sparse_attention, backward", "sparse_attention, materialized, backward", ATTENDING),
)
BESIDE_HEAD = ("call", "shape", "headfold", "plain PyTorch", "", "headfold, peak", "plain PyTorch, peak")

Found = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A row, and the measurement that it is part of: the device's facts and its rates, TFLOP/s by dtype."""

    row: Found
    facts: Found
    rates: dict[str, float]


def read(lines: Iterable[str]) -> list[Measured]:
    """Return the rows of a file, which may hold several measurements, each after its facts."""
    found: list[Measured] = []
    facts: Found = {}
    rates: dict[str, float] = {}
    for line in filter(str.strip, lines):
        row = json.loads(line)
        if "call" not in row:
            facts, rates = row, {}
            continue
        if row["call"] == "matrix product" and "tflops" in row:
            rates[_dtype(row)] = row["tflops"]
        found.append(Measured(row, facts, rates))
    return found


def cards(paths: Iterable[Path]) -> dict[str, list[Measured]]:
    """Return the rows of each card; of the same call at the same shape and dtype, the one that came later."""
    found: dict[str, dict[tuple[str, str, str], Measured]] = {}
    for path in sorted(paths):
        for one in read(path.read_text(encoding="utf-8").splitlines()):
            found.setdefault(one.facts["device"], {})[one.row["call"], one.row["shape"], _dtype(one.row)] = one
    return {card: list(rows.values()) for card, rows in found.items()}


def kernels(folder: Path) -> str:
    """Return the table of every card that a folder has files of, kernels_*.jsonl."""
    found = cards(folder.glob("kernels_*.jsonl"))
    tables = []
    for card, rows in found.items():
        title = f"### {card}\n\n" if len(found) > 1 else ""
        shown = [_shown(one, rows) for one in rows]
        table = tabulate(shown, HEAD, tablefmt="github", disable_numparse=True)
        tables.append(f"{title}{table}\n\n{card}, {_versions(rows)}; bfloat16 where a shape names no other dtype.")
    return "\n\n".join(tables)


def beside_pytorch(folder: Path) -> str:
    """Return a short table of every card that a folder has files of: what calls take, and plain PyTorch instead."""
    tables = []
    for card, rows in cards(folder.glob("kernels_*.jsonl")).items():
        at = {(one.row["call"], one.row["shape"]): one.row for one in rows if _dtype(one.row) == "bfloat16"}
        pairs = [(at.get((call, shape), {}), at.get((other, shape), {})) for call, other, shape in BESIDE_PYTORCH]
        shown = [_beside(ours, theirs) for ours, theirs in pairs if "ms" in ours and theirs]
        table = tabulate(shown, BESIDE_HEAD, tablefmt="github", disable_numparse=True)
        tables.append(f"{table}\n\n{card}, {_versions(rows)}; bfloat16, medians, peaks beyond the inputs.")
    return "\n\n".join(tables)


def _beside(ours: Found, theirs: Found) -> list[str]:
    """Return the cells of a row of BESIDE_HEAD."""
    name = ours["call"].replace(", triton", "")
    cells = [name, ours["shape"], f"{ours['ms']:g} ms"]
    if "ms" not in theirs:
        return [*cells, _missing(theirs), "", show_bytes(ours["peak_bytes"]), ""]
    peaks = show_bytes(ours["peak_bytes"]), show_bytes(theirs["peak_bytes"])
    return [*cells, f"{theirs['ms']:g} ms", f"{theirs['ms'] / ours['ms']:.1f} ×", *peaks]


def _dtype(row: Found) -> str:
    return str(row.get("dtype", "bfloat16"))


def _versions(rows: Sequence[Measured]) -> str:
    """What every measurement of these rows ran on, once each."""
    names = {"driver": "driver", "torch": "torch", "triton": "Triton", "cuda": "CUDA", "headfold": "headfold"}
    said = [
        ", ".join(f"{name} {str(one.facts[x]).split('+')[0]}" for x, name in names.items() if x in one.facts)
        for one in rows
    ]
    return "; ".join(dict.fromkeys(said))


def _shown(one: Measured, rows: Sequence[Measured]) -> list[str]:
    row, dtype = one.row, _dtype(one.row)
    shape = row["shape"] if dtype in ("bfloat16", "uint8") else f"{row['shape']} {dtype}"
    if "ms" not in row:
        return [row["call"], shape, *[""] * (len(HEAD) - 3), _missing(row)]
    rate = one.rates.get(dtype)
    share = f"{row['tflops'] / rate:.0%}" if "tflops" in row and rate and row["call"] != "matrix product" else ""
    peak = show_bytes(row["peak_bytes"]) if "peak_bytes" in row else ""
    times = (f"{row[x]:g}" for x in ("ms", "fastest", "slowest"))
    rated = str(row.get("tflops", "")), str(row.get("products", ""))
    return [row["call"], shape, *times, *rated, share, peak, _note(row, rows)]


def _missing(row: Found) -> str:
    if "out_of_memory" in row:
        asked = row["out_of_memory"]
        return f"out of memory, asked for {show_bytes(asked)}" if isinstance(asked, int) and asked else "out of memory"
    if "slow" in row:
        return f"took more than {row['slow']:g} s"
    return str(row["absent"]) if "absent" in row else f"failed: {row['failed']}"


def _note(row: Found, rows: Sequence[Measured]) -> str:
    notes = []
    if "gb_per_s" in row:
        notes.append(f"{row['gb_per_s'] / 1e3:.2f} TB/s read and written")
    if row["call"].startswith(SELECTING):
        scoring = next((x.row for x in rows if _scores_of(x.row, row)), None)
        if scoring is not None:
            notes.append(f"{row['ms'] / scoring['ms'] - 1:.0%} on top of scoring")
    if row.get("calls", 1) > 1 and row.get("host_ms", 0.0) > HOST_BOUND * row["ms"]:
        notes.append(f"the host takes {row['host_ms']:g} ms to launch it")
    if "runs" in row and (row["runs"] < RUNS or row["calls"] < CALLS):
        notes.append(f"{row['runs']} runs of {row['calls']}")
    return "; ".join(notes)


def _scores_of(scoring: Found, selecting: Found) -> bool:
    alike = (scoring["shape"], _dtype(scoring)) == (selecting["shape"], _dtype(selecting))
    return alike and scoring["call"] in SCORING and "ms" in scoring
