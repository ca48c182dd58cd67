"""Selection from a slab of scores: the launches, and the scratch that they share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from headfold.backends.triton.keep import keep_kernel
from headfold.backends.triton.order import count_kernel, sort_kernel, write_kernel
from headfold.backends.triton.table import arch_of
from headfold.backends.triton.visible import bound_strides
from headfold.triton_tiles import Kept, cdiv


class Row(NamedTuple):
    """Sizes of the selecting kernels for rows of up to `sk` keys.

    step, sample: keys of one step of a walk, and of the sample.   warps, sort_warps: of the launches.   many_warps: of
    sorting MANY_ROWS and more in one launch, which fill a chip with fewer warps each.
    pairs: kept keys that one program of `count_kernel` compares with as many others.
    """

    arch: str
    sk: int
    step: int
    sample: int
    warps: int
    sort_warps: int
    many_warps: int
    pairs: int


ANY = 1 << 31
WRITE_WARPS = 4
MANY_ROWS = 400
# A step of more keys than 8 a thread takes so many registers that fewer rows are at work at once, for no fewer
# instructions a key. The sample grows where more keys lie between its pivots than may wait.
TILES = (
    Row("cpu", ANY, 256, 64, 1, 1, 1, 32),
    # With 8 keys a thread a walk of bounded rows spills on sm_80.
    Row("sm_80", 2048, 1024, 256, 8, 4, 2, 64),
    Row("sm_80", 65536, 1024, 1024, 8, 4, 2, 64),
    Row("sm_80", ANY, 1024, 4096, 8, 4, 2, 64),
    Row("*", 2048, 1024, 256, 4, 4, 2, 64),
    Row("*", 65536, 1024, 1024, 4, 4, 2, 64),
    Row("*", ANY, 2048, 4096, 8, 4, 2, 64),
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
        kept, waiting = plan.rows * plan.topk, plan.waiting * plan.capacity
        self.found, self.waiting = empty(kept, torch.int64), empty(waiting, torch.int64)
        alone = plan.size == 8  # a float64 score leaves no room for its key
        self.found_key = empty(kept, torch.int32) if alone else None
        self.waiting_key = empty(waiting, torch.int32) if alone else None


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
    order(indices, scores, slab.dtype, scratch)


def keep(
    slab: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    offset: int | None,
    ratio: int,
    scratch: Scratch,
    line: int,
) -> None:
    """Write to the lines of the scratch from `line` on which keys of every row of a slab are its best, in no order.

    slab: float32 or float64 [b, rows, sk], dense along keys, -inf where a key is not visible.
    start, end: int32 [1 or b, rows] or None; offset, ratio: the static bound of the slab's first row: they bound
    what is read.   scratch: for at least line + b · rows rows, whose topk is at most sk.
    """
    plan, tile, ordered = scratch.plan, row_of(arch_of(slab.device), slab.shape[2]), ORDERS[slab.dtype]
    b, rows, sk = slab.shape
    if b * rows * plan.topk == 0:
        return
    with torch.cuda.device_of(slab):
        keep_kernel[(rows, b)](
            slab,
            start,
            end,
            scratch.found,
            scratch.found_key,
            scratch.waiting,
            scratch.waiting_key,
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
            ALIGNED=_aligned(slab),
            BOTTOM=ordered.bottom,
            TOP=ordered.top,
            ORDER=ordered.dtype,
            SAMPLE=tile.sample,
            STEP=tile.step,
            num_warps=tile.warps,
        )


def order(indices: Tensor, scores: Tensor | None, dtype: torch.dtype, scratch: Scratch) -> None:
    """Write the first b · rows lines of the scratch, kept from scores of `dtype`, in order: results as of `select`."""
    if indices.numel() == 0:
        return
    with torch.cuda.device_of(indices):
        _order(indices, scores, ORDERS[dtype].top, scratch)


def _order(indices: Tensor, scores: Tensor | None, top: int, scratch: Scratch) -> None:
    plan, tile = scratch.plan, row_of(arch_of(indices.device), 1)
    b, rows, topk = indices.shape
    results = indices, scores, topk
    strides = *indices.stride()[:2], *((0, 0) if scores is None else scores.stride()[:2])
    if plan.size == 8:
        kept = scratch.found, scratch.found_key, scratch.count
        grid = rows, cdiv(topk, tile.pairs), b
        constants = {"TOP": top, "BLOCK": tile.pairs, "num_warps": WRITE_WARPS}
        count_kernel[grid](*kept, *results, *strides, **constants)
        return
    kept, blocks, block = (scratch.found, scratch.count, scratch.packed), plan.blocks, plan.block
    for period, apart in rounds(blocks):
        first = period == 1
        grid = rows, blocks // 2 if first else blocks - apart, b
        warps = tile.many_warps if blocks == 2 and b * rows >= MANY_ROWS else tile.sort_warps
        constants = {"TOP": top, "BLOCK": block, "FIRST": first, "ONLY": blocks == 2, "num_warps": warps}
        sort_kernel[grid](*kept, *results, blocks, period, apart, *strides, **constants)
    if blocks > 2:
        grid = rows, cdiv(topk, block), b
        constants = {"TOP": top, "STEP": block, "num_warps": WRITE_WARPS}
        write_kernel[grid](scratch.packed, *results, blocks * block, *strides, **constants)


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


def _aligned(slab: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 scores, with room to read on to the next one."""
    steps = [step for n, step in zip(slab.shape[:2], slab.stride()[:2], strict=True) if n > 1]
    whole = slab.storage_offset() + sum((n - 1) * step for n, step in zip(slab.shape, slab.stride(), strict=True)) + 16
    return (
        slab.data_ptr() % 64 == 0
        and all(step % 16 == 0 for step in steps)
        and (slab.shape[2] % 16 == 0 or whole * slab.itemsize <= slab.untyped_storage().nbytes())
    )
