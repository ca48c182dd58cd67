"""What a row selected: settled once, so that kernels read keys that count; and where a key's gradients lie.

`settle` turns indices into picks: int32, -1 where a pick does not count. Duplicates are told by a bitmap of the row's
keys. Rows without any, as selections are, are done then; a row with some compares its picks with one another, in the
order they stand in, so that the first of equal picks stands for all and the result does not depend on who came first.

`rank` and `collect` are a scatter without atomics on floats: the gradients of a slab's picks lie in memory pick by
pick; the same bitmap says which rows picked a key, and how many keys of such a row come before it; `rank` noted, once a
block, at which place the row's n-th key stands. One writer a key adds them up in the order of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headfold.backends.triton.launch import launch
from headfold.backends.triton.operands import factor
from headfold.backends.triton.visible import bias_strides, bound_strides, row_bounds
from headfold.scatter_tiles import DenseTile, ScatterTile

# start, end, bias, offset and ratio of a call
Ranges = tuple[Tensor | None, Tensor | None, Tensor | None, int | None, int]
# Picks that a program of `settle` reads at a time, and that it compares with one another where some are equal.
BLOCK, COMPARED = 1024, 64
# Channels that a program of `collect` sums.
CHANNELS = 128


@triton.jit
def picked(indices, j, topk, step, lo, hi, bias, bias_step):
    """Load picks j of a row: their keys int64, whether they count, and their bias, 0 where there is none."""
    t = tl.load(indices + j.to(tl.int64) * step, mask=j < topk, other=-1).to(tl.int64)
    live = (t >= lo) & (t < hi)
    t = tl.where(live, t, 0)
    if bias is not None:
        added = tl.load(bias + t * bias_step, mask=live, other=0.0)
        live = live & (added != float("-inf"))
    else:
        added = 0.0
    return t, live, added


@triton.jit
def _is_wild(x, ACC: tl.constexpr):
    """1 where x is infinite or NaN, else 0."""
    return tl.where(tl.abs(x.to(ACC)) < float("inf"), 0, 1)


@triton.jit
def _settle(
    picks, sums, largest, dscores, broken, bitmap, indices, g, q, w, start, end, bias,
    first_row, sq, sk, topk, words, offset, scale,
    i_batch, i_row, i_step, g_batch, g_row, g_step,
    q_batch, q_row, q_head, q_step, w_batch, w_row, w_head,
    start_batch, start_step, end_batch, end_step, bias_batch, bias_row, bias_step,
    RATIO: tl.constexpr, STATIC: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, COMPARED: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One row: picks [topk] int32 and, for dscores g, sums [topk]: scale · g, with that of equal picks at the first.

    Or these in dscores [sk], at the keys that were picked, and zeros at all others. Its bitmap is cleared here then.
    Where queries q or weights w are infinite or NaN, the row is broken, and its dscores are NaN where it picked.
    """
    r = tl.program_id(0).to(tl.int64)
    b, row = (first_row + r) // sq, (first_row + r) % sq
    indices += b * i_batch + row * i_row
    if picks is not None:
        picks += r * topk
    bitmap += r * words
    if start is not None:
        start += b * start_batch
    if end is not None:
        end += b * end_batch
    if bias is not None:
        bias += b * bias_batch + row * bias_row
    if g is not None:
        g += b * g_batch + row * g_row
        if sums is not None:
            sums += r * topk
        times = factor(scale, SCALE, ACC)
    lo, hi = row_bounds(row, tl.full((), 1, tl.int1), sk, start, end, start_step, end_step, offset, RATIO, STATIC)
    if dscores is not None:
        dscores += r * sk
        for t0 in range(0, sk, BLOCK):
            t = t0 + tl.arange(0, BLOCK)
            tl.store(dscores + t, tl.zeros((BLOCK,), ACC), mask=t < sk)
        for w0 in range(0, words, BLOCK):
            word = w0 + tl.arange(0, BLOCK)
            tl.store(bitmap + word, tl.zeros((BLOCK,), tl.int32), mask=word < words)
        wild = tl.zeros((BLOCK,), tl.int32)
        for n0 in range(0, H * D, BLOCK):
            n = n0 + tl.arange(0, BLOCK)
            place = b * q_batch + row * q_row + (n // D).to(tl.int64) * q_head + (n % D).to(tl.int64) * q_step
            wild |= _is_wild(tl.load(q + place, mask=n < H * D, other=0.0), ACC)
        if w is not None:
            for h0 in range(0, H, BLOCK):
                head = h0 + tl.arange(0, BLOCK)
                place = b * w_batch + row * w_row + head.to(tl.int64) * w_head
                wild |= _is_wild(tl.load(w + place, mask=head < H, other=0.0), ACC)
        wild = tl.max(wild, 0)
        tl.store(broken + 1 + r, wild)
        tl.store(broken, 1, mask=wild > 0)
        times = tl.where(wild > 0, tl.full((), float("nan"), ACC), times)
        tl.debug_barrier()
    again = tl.zeros((BLOCK,), tl.int32)
    for j0 in range(0, topk, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        t, live, _ = picked(indices, j, topk, i_step, lo, hi, bias, bias_step)
        bit = tl.full((BLOCK,), 1, tl.int32) << (t & 31).to(tl.int32)
        again |= tl.where(live, tl.atomic_or(bitmap + (t >> 5), bit, mask=live, sem="relaxed") & bit, 0)
    top = tl.zeros((), ACC)
    if tl.max((again != 0).to(tl.int32), 0) > 0:
        for j0 in range(0, topk, COMPARED):
            j = j0 + tl.arange(0, COMPARED)
            t, live, _ = picked(indices, j, topk, i_step, lo, hi, bias, bias_step)
            earlier = tl.zeros((COMPARED,), tl.int32)
            total = tl.zeros((COMPARED,), ACC)
            for i0 in range(0, topk, COMPARED):
                i = i0 + tl.arange(0, COMPARED)
                other, counts, _ = picked(indices, i, topk, i_step, lo, hi, bias, bias_step)
                same = (t[:, None] == other[None, :]) & live[:, None] & counts[None, :]
                earlier = tl.maximum(earlier, tl.max((same & (i[None, :] < j[:, None])).to(tl.int32), 1))
                if g is not None:
                    given = tl.load(g + i.to(tl.int64) * g_step, mask=counts, other=0.0).to(ACC)
                    total += tl.sum(tl.where(same, given[None, :], 0.0), 1)
            first = live & (earlier == 0)
            if picks is not None:
                tl.store(picks + j, tl.where(first, t, -1).to(tl.int32), mask=j < topk)
            if g is not None:
                total = tl.where(first, total * times, 0.0)
                if sums is not None:
                    tl.store(sums + j, total, mask=j < topk)
                if dscores is not None:
                    tl.store(dscores + t, total, mask=first)
                if largest is not None:
                    top = tl.maximum(top, tl.max(tl.abs(total), 0))
    else:
        for j0 in range(0, topk, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            t, live, _ = picked(indices, j, topk, i_step, lo, hi, bias, bias_step)
            if picks is not None:
                tl.store(picks + j, tl.where(live, t, -1).to(tl.int32), mask=j < topk)
            if g is not None:
                total = tl.load(g + j.to(tl.int64) * g_step, mask=live, other=0.0).to(ACC) * times
                if sums is not None:
                    tl.store(sums + j, total, mask=j < topk)
                if dscores is not None:
                    tl.store(dscores + t, total, mask=live)
                if largest is not None:
                    top = tl.maximum(top, tl.max(tl.abs(total), 0))
    if largest is not None:
        tl.store(largest + r, top.to(tl.float32))


@triton.jit
def _ones(x):
    """How many bits of int32 are set."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x + (x >> 8) + (x >> 16) + (x >> 24)) & 63).to(tl.int32)


@triton.jit
def _rank(places, before, picks, bitmap, topk, words, BLOCK: tl.constexpr):
    """One row: how many keys come before each word of its bitmap; and where in its picks the n-th key stands."""
    r = tl.program_id(0).to(tl.int64)
    picks += r * topk
    places += r * topk
    bitmap += r * words
    before += r * words
    count = tl.zeros((), tl.int32)
    for w0 in range(0, words, BLOCK):
        w = w0 + tl.arange(0, BLOCK)
        ones = _ones(tl.load(bitmap + w, mask=w < words, other=0))
        tl.store(before + w, count + tl.cumsum(ones, 0) - ones, mask=w < words)
        count += tl.sum(ones, 0)
    tl.debug_barrier()
    for j0 in range(0, topk, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        t = tl.load(picks + j, mask=j < topk, other=-1)
        live = t >= 0
        w = tl.where(live, t, 0) >> 5
        below = (tl.full((BLOCK,), 1, tl.int32) << (t & 31)) - 1
        n = tl.load(before + w, mask=live, other=0) + _ones(tl.load(bitmap + w, mask=live, other=0) & below)
        tl.store(places + n, j, mask=live)


@triton.jit
def _collect(
    total, spread, bitmap, before, places,
    rows, first_pick, last_pick, sk, topk, words, span, total_head, total_key,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Add to the keys of a word of total [heads, sk, WIDTH] what spread [rows, heads, span, WIDTH] holds of them."""
    word = tl.program_id(0)
    lane = tl.arange(0, 32)
    t = word * 32 + lane
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    head, heads = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    within = c < WIDTH
    at = total + (head * total_head + t.to(tl.int64) * total_key)[:, None] + c[None, :]
    below = (tl.full((32,), 1, tl.int32) << lane) - 1
    for r0 in range(0, rows, 32):
        r = r0 + tl.arange(0, 32)
        bits = tl.load(bitmap + r.to(tl.int64) * words + word, mask=r < rows, other=0)
        # Each key's rows as bits.
        left = tl.sum(((bits[None, :] >> lane[:, None]) & 1) << tl.arange(0, 32)[None, :], 1)
        if tl.max((left != 0).to(tl.int32), 0) > 0:
            sums = tl.zeros((32, CHANNELS), total.dtype.element_ty)
            while tl.max((left != 0).to(tl.int32), 0) > 0:
                # The lowest bit as a float: its exponent is the row. The highest is negative, with the same exponent.
                low = left & -left
                has = left != 0
                row = r0 + ((low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
                row = tl.where(has, row, 0).to(tl.int64)
                earlier = tl.load(bitmap + row * words + word, mask=has, other=0) & below
                n = tl.load(before + row * words + word, mask=has, other=0) + _ones(earlier)
                place = tl.load(places + row * topk + n, mask=has, other=-1)
                has = has & (place >= first_pick) & (place < last_pick)
                line = ((row * heads + head) * span + tl.where(has, place - first_pick, 0)) * WIDTH
                sums += tl.load(spread + line[:, None] + c[None, :], mask=has[:, None] & within[None, :], other=0.0)
                left = left ^ low
            mask = (t < sk)[:, None] & within[None, :]
            tl.store(at, tl.load(at, mask=mask, other=0.0) + sums, mask=mask)


class Picks:
    """The settled picks of a block of rows, in buffers that are allocated once.

    picks: int32 [rows, topk].   sums: scale · g beside them, when asked for.   largest: float32 [rows], of |sums|.
    """

    def __init__(
        self, tile: ScatterTile, like: Tensor, *, dtype: torch.dtype | None = None, ranged: bool = False
    ) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=like.device)

        self.tile = tile
        self.picks, self.bitmap = empty(tile.block, tile.topk), empty(tile.block, tile.words)
        self.sums = None if dtype is None else empty(tile.block, tile.topk, dtype=dtype)
        self.largest = empty(tile.block, dtype=torch.float32) if ranged else None

    def settle(
        self,
        indices: Tensor,
        row: tuple[int, int],
        sk: int,
        ranges: Ranges,
        g: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        """Settle rows of indices [b, sq, topk] and of dscores g, numbered over the batch: i·sq + s."""
        self.bitmap.zero_()
        outputs = self.picks, self.sums, self.largest, None, None, self.bitmap
        _settle_rows(outputs, indices, row, sk, ranges, g, scale)


class AllKeys:
    """The settled dscores of a slab of rows at all keys, zeros where nothing was picked, in buffers allocated once.

    dscores: [1, rows, sk].   broken: int32 [1 + rows], whether any row so far, and which of these, has a
    query or weight that is infinite or NaN.
    """

    def __init__(self, tile: DenseTile, like: Tensor, dtype: torch.dtype) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=like.device)

        self.tile = tile
        self.dscores = empty(1, tile.rows, tile.sk, dtype=dtype)
        self.bitmap = empty(tile.rows, tile.words)
        self.broken = empty(1 + tile.rows).zero_()

    def tensors(self) -> tuple[Tensor, ...]:
        """Return every buffer."""
        return self.dscores, self.bitmap, self.broken

    def settle(
        self,
        indices: Tensor,
        row: tuple[int, int],
        ranges: Ranges,
        g: Tensor,
        scale: float,
        q: Tensor,
        weights: Tensor | None,
    ) -> Tensor:
        """Settle rows as `Picks.settle` does, in a single launch, and return their dscores.

        q [b, sq, h, d], weights [b, sq, h]: broken rows have dscores of NaN where they picked.
        """
        outputs = None, None, None, self.dscores, self.broken, self.bitmap
        _settle_rows(outputs, indices, row, self.dscores.shape[2], ranges, g, scale, q, weights)
        return self.dscores[:, : row[1] - row[0]]


def _settle_rows(
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor],
    indices: Tensor,
    row: tuple[int, int],
    sk: int,
    ranges: Ranges,
    g: Tensor | None,
    scale: float,
    q: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    start, end, bias, offset, ratio = ranges
    double = g is not None and any(x is not None and x.dtype == torch.float64 for x in outputs)
    launch(
        _settle, (row[1] - row[0],),
        *outputs, indices, g, q, weights, start, end, bias,
        row[0], indices.shape[1], sk, indices.shape[2], outputs[-1].shape[1], offset or 0, scale,
        *indices.stride(), *strides(g, 3), *strides(q, 4), *strides(weights, 3),
        *bound_strides(start), *bound_strides(end), *bias_strides(bias),
        RATIO=ratio, STATIC=offset is not None,
        SCALE=scale if double else None, ACC=tl.float64 if double else tl.float32,
        BLOCK=BLOCK, COMPARED=COMPARED, H=0 if q is None else q.shape[2], D=1 if q is None else q.shape[3], num_warps=4,
    )  # fmt: skip


class Scatter:
    """Adds gradients of the picks of slabs of settled rows to those of their keys."""

    def __init__(self, tile: ScatterTile, like: Tensor) -> None:
        self.tile = tile
        self.before = torch.empty(tile.block, tile.words, dtype=torch.int32, device=like.device)
        self.places = torch.empty(tile.block, tile.topk, dtype=torch.int32, device=like.device)

    def rank(self, picks: Picks, rows: int) -> None:
        """Note where the keys of settled rows stand in their picks."""
        launch(
            _rank, (rows,),
            self.places, self.before, picks.picks, picks.bitmap, self.tile.topk, self.tile.words,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip

    def collect(
        self, total: Tensor, spread: Tensor, picks: Picks, slab: tuple[int, int], span: tuple[int, int]
    ) -> None:
        """Add spread [rows, heads, span, d] of a slab to total [heads, sk, d], dense in its last axis."""
        heads, sk, width = total.shape
        channels, first = min(CHANNELS, max(16, triton.next_power_of_2(width))), slab[0]
        launch(
            _collect, (self.tile.words, triton.cdiv(width, channels), heads),
            total, spread, picks.bitmap[first:], self.before[first:], self.places[first:],
            slab[1] - first, *span, sk, self.tile.topk, self.tile.words, self.tile.span, *total.stride()[:2],
            WIDTH=width, CHANNELS=channels, num_warps=4,
        )  # fmt: skip


def strides(x: Tensor | None, axes: int) -> tuple[int, ...]:
    """Return the strides of a tensor that may be absent."""
    return (0,) * axes if x is None else x.stride()
