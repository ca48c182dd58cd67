"""Selection from a slab of scores: the launches, and the scratch that they share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from headfold.backends.triton.cut import cut_kernel
from headfold.backends.triton.keep import keep_kernel
from headfold.backends.triton.launch import launch
from headfold.backends.triton.order import count_kernel, merge_kernel, order_kernel, write_kernel
from headfold.backends.triton.table import arch_of
from headfold.backends.triton.visible import bound_strides
from headfold.triton_tiles import Kept, cdiv, power_of_two


class Row(NamedTuple):
    """Sizes of the selecting kernels for rows of up to `sk` keys.

    deep, sample: keys that a thread takes in one step of a walk, and keys of the sample.   warps, order_warps: of the
    programs that keep rows, and that sort them whole.   pairs: kept keys that one program of `count_kernel` compares
    with as many others.
    """

    arch: str
    sk: int
    deep: int
    sample: int
    warps: int
    order_warps: int
    pairs: int


ANY = 1 << 31
# Of programs that cut rows, sort their parts and write them.
PART_WARPS = 4
# Orders that stay in registers while a row is cut, and what a thread then takes in one step of moving them.
HELD, MOVED = 4096, 8
# The sample grows where more keys lie above its pivot than may be kept.
TILES = (
    Row("cpu", ANY, 8, 64, 1, 1, 32),
    Row("*", 2048, 8, 256, 4, 4, 64),
    Row("*", 32768, 16, 2048, 4, 4, 64),
    Row("*", 65536, 8, 4096, 8, 4, 64),
    Row("*", ANY, 8, 4096, 16, 4, 64),
)


class Order(NamedTuple):
    """The integers that have the order of scores: their dtype, that of -inf, and that of NaN."""

    dtype: tl.dtype
    bottom: int
    top: int


ORDERS = {
    torch.float32: Order(tl.int32, -0x7F800001, 2**31 - 1),
    torch.float64: Order(tl.int64, -0x7FF0000000000001, 2**63 - 1),
}


class Scratch:
    """Buffers for what is kept of rows, made once and used by every slab: a line for each row until it is sorted."""

    def __init__(self, plan: Kept, device: torch.device) -> None:
        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype, device=device)

        self.plan = plan
        self.count = empty(plan.rows, torch.int32)
        self.packed = empty(plan.rows * plan.packed, torch.int64)
        self.found = empty(plan.rows * plan.capacity, torch.int64)
        # A float64 score leaves no room for its key.
        self.found_key = empty(plan.rows * plan.capacity, torch.int32) if plan.size == 8 else None


def row_of(arch: str, sk: int) -> Row:
    """Return the sizes for rows of sk keys."""
    return next(row for row in TILES if row.arch in (arch, "*") and sk <= row.sk)


def select(
    slab: Tensor,
    indices: Tensor,
    scores: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    offset: int | None,
    ratio: int,
    scratch: Scratch,
) -> None:
    """Write the best keys of every row of a slab in the total order, -1 (and -inf) where a row runs out.

    indices: int32 or int64 [b, rows, topk], dense along topk, which is the scratch's.   scores: as indices, in the
    slab's dtype, or None.   The rest is as of `keep`.
    """
    keep(slab, start, end, offset, ratio, scratch, 0)
    finish(indices, scores, slab.dtype, scratch)


def keep(
    slab: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    offset: int | None,
    ratio: int,
    scratch: Scratch,
    line: int,
) -> None:
    """Write keys of every row of a slab to the lines of the scratch from `line` on, its best topk among them.

    slab: float32 or float64 [b, rows, sk], dense along keys, -inf where a key is not visible.
    start, end: int32 [1 or b, rows] or None; offset, ratio: the static bound of the slab's first row: they bound
    what is read.   scratch: for at least line + b · rows rows, whose topk is at most sk.
    """
    plan, tile, ordered = scratch.plan, row_of(arch_of(slab.device), slab.shape[2]), ORDERS[slab.dtype]
    b, rows, sk = slab.shape
    if b * rows * plan.topk == 0:
        return
    with torch.cuda.device_of(slab):
        launch(
            keep_kernel,
            (rows, b),
            slab,
            start,
            end,
            scratch.found,
            scratch.found_key,
            scratch.count,
            sk,
            plan.topk,
            plan.capacity,
            line,
            0 if offset is None else offset,
            slab.stride(0),
            slab.stride(1),
            *bound_strides(start),
            *bound_strides(end),
            RATIO=ratio,
            HAS_OFFSET=offset is not None,
            BOTTOM=ordered.bottom,
            TOP=ordered.top,
            ORDER=ordered.dtype,
            SAMPLE=tile.sample,
            DEEP=deep(tile, slab.dtype),
            WIDE=32 * tile.warps,
            num_warps=tile.warps,
        )


def finish(
    indices: Tensor, scores: Tensor | None, dtype: torch.dtype, scratch: Scratch, *, in_order: bool = True
) -> None:
    """Cut the first b · rows lines of the scratch, kept from scores of `dtype`, and write them: results as of `select`.

    in_order: whether they have to be in the total order; float64 scores are, whether or not.
    """
    if indices.numel() == 0:
        return
    with torch.cuda.device_of(indices):
        _finish(indices, scores, ORDERS[dtype].top, scratch, in_order)


def _finish(indices: Tensor, scores: Tensor | None, top: int, scratch: Scratch, in_order: bool) -> None:
    plan, tile = scratch.plan, row_of(arch_of(indices.device), 1)
    b, rows, topk = indices.shape
    strides = *indices.stride()[:2], *((0, 0) if scores is None else scores.stride()[:2])
    results = indices, scores, topk
    if plan.size == 4 and (plan.blocks == 2 or not in_order):
        warps = tile.order_warps
        constants = {"TOP": top, "IN_ORDER": in_order, **network(plan.block, warps), **cut_constants(plan, warps)}
        launch(
            order_kernel,
            (rows, 1, b),
            scratch.found,
            scratch.count,
            *results,
            plan.capacity,
            *strides,
            **constants,
            num_warps=warps,
        )
        return
    kept = scratch.found, scratch.found_key, scratch.count
    cutting = {"TOP": top, **cut_constants(plan, PART_WARPS), "num_warps": PART_WARPS}
    launch(cut_kernel, (b * rows,), *kept, topk, plan.capacity, **cutting)
    if plan.size == 8:
        grid = rows, cdiv(topk, tile.pairs), b
        constants = {"TOP": top, "BLOCK": tile.pairs, "num_warps": PART_WARPS}
        launch(count_kernel, grid, *kept, *results, plan.capacity, *strides, **constants)
        return
    for period, apart in rounds(plan.blocks):
        first = period == 1
        grid = rows, plan.blocks // 2 if first else plan.blocks - apart, b
        constants = {"BLOCK": plan.block, "FIRST": first, "num_warps": PART_WARPS}
        run = plan.capacity, plan.blocks, period, apart
        launch(merge_kernel, grid, scratch.found, scratch.count, scratch.packed, *run, **constants)
    grid = rows, cdiv(topk, plan.block), b
    constants = {"TOP": top, "STEP": plan.block, "num_warps": PART_WARPS}
    launch(write_kernel, grid, scratch.packed, *results, plan.blocks * plan.block, *strides, **constants)


def deep(tile: Row, dtype: torch.dtype) -> int:
    """Return the keys that a thread takes in one step of a walk over scores of a dtype."""
    return tile.deep * 4 // dtype.itemsize


def network(block: int, warps: int) -> dict[str, int]:
    """Return the constants of a network over two blocks."""
    log = block.bit_length()
    lanes = min(log, 5 + warps.bit_length() - 1)
    return {"LOG": log, "LANES": lanes, "CHUNK": min(2 * block, 256 * warps)}


def cut_constants(plan: Kept, warps: int) -> dict[str, int]:
    """Return the constants of a cut."""
    bottom = ORDERS[torch.float32 if plan.size == 4 else torch.float64].bottom
    held = min(HELD // (plan.size // 4), power_of_two(plan.capacity))
    return {"BOTTOM": bottom, "HELD": held, "DEEP": MOVED, "WIDE": 32 * warps}


def rounds(blocks: int) -> list[tuple[int, int]]:
    """Return the rounds of Batcher's merge exchange over so many blocks: (period, apart), each of them a launch."""
    found, period = [], 1
    while period < blocks:
        apart = period
        while apart:
            found.append((period, apart))
            apart //= 2
        period *= 2
    return found
