"""What the compile lane compiles of the selection: every row of its table, in both compute dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from headfold.backends.triton.compiling import Specimen
from headfold.backends.triton.keep import keep_kernel
from headfold.backends.triton.order import count_kernel, sort_kernel, write_kernel
from headfold.backends.triton.select import ORDERS, TILES, WRITE_WARPS, Row, row_of
from headfold.triton_tiles import Kept

POINTERS = {torch.float32: "*fp32:16", torch.float64: "*fp64:16"}
# Widths of a selection: one that one program sorts, the widest of these, and one that is merged.
WIDTHS = (512, 2048, 4096)
# Arguments by whose values nothing is specialised, and strides that are not a multiple of 16.
ODD = ("sk", "topk", "capacity", "first_line", "offset", "blocks", "period", "apart", "start_row", "end_row")


def specimens(arch: str) -> Iterator[Specimen]:
    """Yield the selecting kernels' specimens of an architecture; those of the default selection come first."""
    rows = [row for row in TILES if row is row_of(arch, row.sk)]
    for row in rows:
        for ranged in (False, True):
            yield _keep(row, torch.float32, ranged=ranged)
    for width in WIDTHS:
        yield from _sort(rows[0], width)
    for row in rows:
        yield _keep(row, torch.float64, ranged=True)
    yield _specimen("order by counting", count_kernel, torch.float64, {"BLOCK": rows[0].pairs}, WRITE_WARPS)


def _keep(row: Row, dtype: torch.dtype, *, ranged: bool) -> Specimen:
    order = ORDERS[dtype]
    constants: dict[str, Any] = {
        "RATIO": 1,
        "HAS_OFFSET": True,
        "ALIGNED": not ranged,
        "BOTTOM": order.bottom,
        "ORDER": order.dtype,
        "SAMPLE": row.sample,
        "STEP": row.step,
    }
    if not ranged:
        constants |= dict.fromkeys(("start", "end"))
    if dtype == torch.float32:
        constants |= dict.fromkeys(("found_key", "waiting_key"))
    label = f"keep {str(dtype).removeprefix('torch.')} sk={row.sk}" + (" ranged" if ranged else "")
    return _specimen(label, keep_kernel, dtype, constants, row.warps)


def _sort(row: Row, width: int) -> Iterator[Specimen]:
    plan = Kept.of(1, 2 * width, width, 4)
    label, only = f"sort topk={width}", plan.blocks == 2
    for first in (True,) if only else (True, False):
        constants = {"BLOCK": plan.block, "FIRST": first, "ONLY": only}
        name = label + ("" if first else " merge")
        yield _specimen(name, sort_kernel, torch.float32, constants, row.sort_warps)
        if only:
            yield _specimen(f"{name}, many rows", sort_kernel, torch.float32, constants, row.many_warps)
    if not only:
        yield _specimen(f"write topk={width}", write_kernel, torch.float32, {"STEP": plan.block}, WRITE_WARPS)


def _specimen(label: str, kernel: Any, dtype: torch.dtype, constants: dict[str, Any], warps: int) -> Specimen:
    constants = {**constants, "TOP": ORDERS[dtype].top}
    types = dict.fromkeys(("start", "end", "count", "found_key", "waiting_key", "indices"), "*i32:16")
    types |= dict.fromkeys(("found", "waiting", "packed"), "*i64:16")
    types |= {"scores": POINTERS[dtype], **dict.fromkeys(ODD, "i32")}
    taken = {name: types.get(name, "i32:16") for name in kernel.arg_names if name not in constants}
    return Specimen(label, kernel, taken, constants, warps, 1, matrix=False)
