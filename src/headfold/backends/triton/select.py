"""Selection from a slab of scores: the launches, and the scratch that they share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headfold.backends.triton.keep import keep_kernel
from headfold.backends.triton.launch import launch
from headfold.backends.triton.memory import FRESH, Allocator
from headfold.backends.triton.order import count_kernel, merge_kernel, order_kernel, write_kernel
from headfold.backends.triton.table import arch_of
from headfold.backends.triton.visible import bound_strides
from headfold.triton_tiles import Kept, cdiv


class Row(NamedTuple):
    """Sizes of the selecting kernels for rows of up to `sk` keys.

    held, deep: keys that a thread takes of what is cut, and in one step of a walk.   sample: keys that are looked at
    first.   warps, registers: of the programs that keep rows, and of their threads, at most: as many programs are to
    fit a core as a slab has rows for each.   order_warps: of those that sort rows whole.   pairs: kept keys that one
    program of `count_kernel` compares with as many others.
    """

    arch: str
    sk: int
    held: int
    deep: int
    sample: int
    warps: int
    registers: int
    order_warps: int
    pairs: int


ANY = 1 << 31
# Of programs that write rows, or sort their parts.
PART_WARPS = 4
# A larger sample leaves fewer keys of a long row between its pivots.
TILES = (
    # arch, sk, held, deep, sample, warps, registers, order_warps, pairs
    Row("cpu", ANY, 4, 4, 64, 2, 255, 1, 32),
    Row("*", 4096, 8, 8, 2048, 4, 128, 4, 64),
    Row("*", 32768, 32, 8, 2048, 4, 128, 4, 64),
    Row("*", 65536, 16, 8, 4096, 8, 128, 4, 64),
    Row("*", ANY, 16, 16, 4096, 16, 128, 4, 64),
)


class Order(NamedTuple):
    """Of the integers that have the order of scores, that of -inf and that of NaN."""

    bottom: int
    top: int


ORDERS = {
    torch.float32: Order(-0x7F800001, 2**31 - 1),
    torch.float64: Order(-0x7FF0000000000001, 2**63 - 1),
}


class Scratch:
    """Buffers for what is kept of rows, used by every slab: room while a row is cut, lines until they are sorted."""

    def __init__(self, plan: Kept, device: torch.device, memory: Allocator = FRESH) -> None:
        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return memory.empty(count, dtype=dtype, device=device)

        # A float64 score leaves no room for its key, and is not put in order where its key is written.
        wide = plan.size == 8
        self.plan = plan
        self.found = empty(plan.room * plan.capacity, torch.int64)
        self.found_key = empty(plan.room * plan.capacity, torch.int32) if wide else None
        self.count = empty(plan.rows, torch.int32)
        self.scores = empty(plan.rows * plan.waiting, torch.float64 if wide else torch.float32)
        self.keys = empty(plan.rows * plan.topk, torch.int32) if wide else None
        self.packed = empty(plan.rows * plan.packed, torch.int64)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return every buffer."""
        return self.found, self.found_key, self.count, self.scores, self.keys, self.packed

    @property
    def bits(self) -> Tensor:
        """The scores as integers of their width."""
        return self.scores.view(torch.int64 if self.plan.size == 8 else torch.int32)

    def lines(self, buffer: Tensor, first: int, b: int, rows: int) -> Tensor:
        """View lines of a buffer of this scratch, from `first` on, as [b, rows, topk]."""
        topk = self.plan.topk
        return buffer[first * topk : (first + b * rows) * topk].view(b, rows, topk)


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
    keep(slab, indices, scores, start, end, offset, ratio, scratch, 0)
    finish(indices, scores, slab.dtype, scratch)


def keep(
    slab: Tensor,
    indices: Tensor,
    scores: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    offset: int | None,
    ratio: int,
    scratch: Scratch,
    line: int,
) -> None:
    """Write the best topk keys of every row of a slab, in no order, and -1 and -inf where a row runs out.

    They are results, unless the scratch is for rows in order: then `finish` takes them, and its lines from `line` on,
    which are written too.

    slab: float32 or float64 [b, rows, sk], dense along keys, -inf where a key is not visible.
    start, end: int32 [1 or b, rows] or None; offset, ratio: the static bound of the slab's first row: they bound
    what is read.   scratch: for at least line + b · rows rows; its topk may be more than a slab has keys.
    """
    plan, tile, order = scratch.plan, row_of(arch_of(slab.device), slab.shape[2]), ORDERS[slab.dtype]
    b, rows, sk = slab.shape
    if b * rows * plan.topk == 0:
        return
    if plan.waiting:
        scores = scratch.lines(scratch.scores, line, b, rows)
    if scratch.keys is not None:
        indices = scratch.lines(scratch.keys, line, b, rows)
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
            indices,
            scores,
            sk,
            plan.topk,
            plan.capacity,
            plan.held,
            line,
            0 if offset is None else offset,
            slab.stride(0),
            slab.stride(1),
            *bound_strides(start),
            *bound_strides(end),
            *indices.stride()[:2],
            *((0, 0) if scores is None else scores.stride()[:2]),
            RATIO=ratio,
            HAS_OFFSET=offset is not None,
            BOTTOM=order.bottom,
            TOP=order.top,
            SAMPLE=tile.sample if sk > plan.held else 0,
            DEEP=taken(tile.deep, slab.dtype),
            HELD=taken(tile.held, slab.dtype),
            WIDE=32 * tile.warps,
            num_warps=tile.warps,
            **({"maxnreg": tile.registers} if torch.version.hip is None else {}),
        )


def finish(indices: Tensor, scores: Tensor | None, dtype: torch.dtype, scratch: Scratch) -> None:
    """Put rows of results in order that `keep` wrote with the first lines of the scratch, if those wait for that."""
    if indices.numel() == 0 or not scratch.plan.waiting:
        return
    with torch.cuda.device_of(indices):
        _finish(indices, scores, ORDERS[dtype].top, scratch)


def _finish(indices: Tensor, scores: Tensor | None, top: int, scratch: Scratch) -> None:
    plan, tile = scratch.plan, row_of(arch_of(indices.device), 1)
    b, rows, topk = indices.shape
    strides = *indices.stride()[:2], *((0, 0) if scores is None else scores.stride()[:2])
    results = indices, scores, topk
    if plan.size == 8:
        grid, kept = (rows, cdiv(topk, tile.pairs), b), (scratch.bits, scratch.keys, scratch.count)
        constants = {"TOP": top, "BLOCK": tile.pairs, "num_warps": PART_WARPS}
        launch(count_kernel, grid, *kept, *results, *strides, **constants)
        return
    if plan.blocks == 2:
        constants = {"TOP": top, **network(plan.block, tile.order_warps), "num_warps": tile.order_warps}
        launch(order_kernel, (rows, 1, b), scratch.bits, scratch.count, *results, topk, *strides, **constants)
        return
    for period, apart in rounds(plan.blocks):
        first = period == 1
        grid = rows, plan.blocks // 2 if first else plan.blocks - apart, b
        constants = {"TOP": top, "BLOCK": plan.block, "FIRST": first, "num_warps": PART_WARPS}
        run = topk, plan.blocks, period, apart, *strides[:2]
        launch(merge_kernel, grid, scratch.bits, scratch.count, indices, scratch.packed, *run, **constants)
    grid = rows, cdiv(topk, plan.block), b
    constants = {"TOP": top, "STEP": plan.block, "num_warps": PART_WARPS}
    launch(write_kernel, grid, scratch.packed, *results, plan.blocks * plan.block, *strides, **constants)


def taken(count: int, dtype: torch.dtype) -> int:
    """Return how many scores of a dtype a thread takes, for so many of float32."""
    return count * 4 // dtype.itemsize


def network(block: int, warps: int) -> dict[str, int]:
    """Return the constants of a network over two blocks."""
    log = block.bit_length()
    lanes = min(log, 5 + warps.bit_length() - 1)
    # A pair for each thread at least, of 64 a warp: what several threads hold, one of them stores while others load.
    return {"LOG": log, "LANES": lanes, "PAIRS": max(64 * warps, min(block, 512))}


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
