"""What the compile lane compiles of the selection: every row of its table, in both compute dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from headfold.backends.triton.compiling import Specimen
from headfold.backends.triton.keep import keep_kernel
from headfold.backends.triton.order import count_kernel, merge_kernel, order_kernel, write_kernel
from headfold.backends.triton.select import ORDERS, PART_WARPS, TILES, Row, network, row_of, taken
from headfold.triton_tiles import Kept

POINTERS = {torch.float32: "*fp32:16", torch.float64: "*fp64:16"}
# Widths of a selection: one that one program sorts, the widest of these, and one that is merged.
WIDTHS = (512, 2048, 4096)
# Arguments by whose values nothing is specialised, and strides that are not a multiple of 16.
ODD = (
    *("sk", "topk", "capacity", "at_once", "first_line", "offset", "blocks", "period", "apart", "start_row", "end_row"),
    *("scores_batch", "scores_row", "indices_batch", "indices_row", "results_batch", "results_row", "bits_row"),
)


def specimens(arch: str) -> Iterator[Specimen]:
    """Yield the selecting kernels' specimens of an architecture; those of the default selection come first."""
    rows = [row for row in TILES if row is row_of(arch, row.sk)]
    for row in rows:
        for ranged in (False, True):
            yield _keep(row, torch.float32, ranged=ranged)
        yield _keep(row, torch.float32, in_order=False)
    for width in WIDTHS:
        yield from _sort(rows[0], width)
    for row in rows:
        yield _keep(row, torch.float64, ranged=True)
    yield _specimen("order by counting", count_kernel, torch.float64, {"BLOCK": rows[0].pairs}, PART_WARPS)


def _keep(row: Row, dtype: torch.dtype, *, ranged: bool = False, in_order: bool = True) -> Specimen:
    plan = Kept.of(1, row.sk, min(2048, row.sk), dtype.itemsize)
    constants: dict[str, Any] = {
        "RATIO": 1,
        "HAS_OFFSET": True,
        "BOTTOM": ORDERS[dtype].bottom,
        "SAMPLE": row.sample if plan.room else 0,
        "DEEP": taken(row.deep, dtype),
        "HELD": taken(row.held, dtype),
        "WIDE": 32 * row.warps,
    }
    if not ranged:
        constants |= dict.fromkeys(("start", "end"))
    if dtype == torch.float32:
        constants["found_key"] = None
    if not in_order:
        constants["results"] = None
    label = (
        f"keep {str(dtype).removeprefix('torch.')} sk={row.sk}"
        + (" ranged" if ranged else "")
        + ("" if in_order else " keys alone")
    )
    return replace(_specimen(label, keep_kernel, dtype, constants, row.warps), registers=row.registers)


def _sort(row: Row, width: int) -> Iterator[Specimen]:
    plan = Kept.of(1, 2 * width, width, 4)
    label = f"order topk={width}"
    if plan.blocks == 2:
        constants: dict[str, Any] = dict(network(plan.block, row.order_warps))
        yield _specimen(label, order_kernel, torch.float32, constants, row.order_warps)
        return
    for first in (True, False):
        name = label + ("" if first else " merge")
        yield _specimen(name, merge_kernel, torch.float32, {"BLOCK": plan.block, "FIRST": first}, PART_WARPS)
    yield _specimen(f"write topk={width}", write_kernel, torch.float32, {"STEP": plan.block}, PART_WARPS)


def _specimen(label: str, kernel: Any, dtype: torch.dtype, constants: dict[str, Any], warps: int) -> Specimen:
    constants = {**constants, **({"TOP": ORDERS[dtype].top} if "TOP" in kernel.arg_names else {})}
    types = dict.fromkeys(("start", "end", "count", "found_key", "indices", "keys"), "*i32:16")
    types |= dict.fromkeys(("found", "packed_rows"), "*i64:16")
    types["bits"] = "*i64:16" if dtype == torch.float64 else "*i32:16"
    types |= {"scores": POINTERS[dtype], "results": POINTERS[dtype], **dict.fromkeys(ODD, "i32")}
    taken = {name: types.get(name, "i32:16") for name in kernel.arg_names if name not in constants}
    return Specimen(label, kernel, taken, constants, warps, 1, matrix=False)
