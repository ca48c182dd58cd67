"""The best keys of every row of a slab of scores, in no order, cut from what is near them.

A sample of a row says above which pivot the keys that are wanted probably lie, and above which one probably none lies
that is not. One walk over the row puts aside what is above the lower one, of which the best are cut, between the two.
Where the sample was wrong, a pivot is looked for in the row itself.

One program does all of that for a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.aside import sampled, walk
from headfold.backends.triton.cut import LISTED, ROW, cut, part
from headfold.backends.triton.orders import TOGETHER, by_thread
from headfold.backends.triton.search import search
from headfold.backends.triton.visible import row_bounds


@triton.jit
def best(
    scores, found, found_key, indices, results, low, high, topk, capacity, sk,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, SAMPLE: tl.constexpr, DEEP: tl.constexpr, HELD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Write the best topk of a row of more keys than there is room for, and return how many they are."""
    WARPS: tl.constexpr = WIDE // TOGETHER
    room = capacity // WARPS
    first = tl.arange(0, WARPS) * room
    mine = _of_threads(first)
    lists, lists_key = found + mine, found_key
    if found_key is not None:
        lists_key += mine
    a, b = sampled(scores, low, high - low, topk, capacity, BOTTOM, TOP, SAMPLE, WIDE)
    kept = walk(scores, lists, lists_key, low, high - low, a, room, TOP, DEEP, WIDE)
    many, longest = tl.reduce((kept, kept), 0, _sum_and_most)
    if (longest > room) | ((many < topk) & (a > BOTTOM)):
        tl.debug_barrier()
        many = search(scores, found, found_key, low, high, topk, capacity, BOTTOM, TOP, DEEP, WIDE)
        longest = tl.cdiv(many, WARPS)
        first = tl.arange(0, WARPS) * longest
        kept = tl.minimum(tl.maximum(many - first, 0), longest)
        a, b = tl.full((), BOTTOM, a.dtype), tl.full((), BOTTOM, b.dtype)
        mine = _of_threads(first)
        lists, lists_key = found + mine, found_key
        if found_key is not None:
            lists_key += mine
    tl.debug_barrier()
    n = _of_threads(kept)
    order, _ = part(lists, lists_key, 0, n, BOTTOM, TOP, LISTED, HELD, WIDE)
    return cut(
        order, lists, lists_key, n, longest, many, topk, sk, a, b, indices, results, BOTTOM, TOP, LISTED, HELD, WIDE
    )


@triton.jit
def _sum_and_most(many, most, many2, most2):
    """Return the sum of the first of each two, and the greater of the others: one reduction for both."""
    return many + many2, tl.maximum(most, most2)


@triton.jit
def _of_threads(each):
    """Return what is of each warp [warps] as [wide, 1]."""
    return by_thread(tl.broadcast_to(each[:, None], (each.shape[0], TOGETHER)))


@triton.jit
def _whole(
    scores, low, n, topk, sk, indices, results,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, HELD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the best topk of a row that is cut at once, and return how many they are.

    A thread holds 64 bytes of it at most: their places and keys, all at a time, take registers too.
    """
    MOST: tl.constexpr = 512 // scores.dtype.element_ty.primitive_bitwidth
    FEW: tl.constexpr = HELD if HELD < MOST else MOST
    order, _ = part(scores + low, low, 0, n, BOTTOM, TOP, ROW, FEW, WIDE)
    none = tl.full((), BOTTOM, order.dtype)
    return cut(order, scores + low, low, n, n, n, topk, sk, none, none, indices, results, BOTTOM, TOP, ROW, FEW, WIDE)


@triton.jit
def clear(indices, results, many, topk, WIDE: tl.constexpr):
    """Write that there are no keys from place `many` on."""
    # From 0 on: Triton 3.5 fails to coalesce the stores of a loop that begins at a result of an `if`.
    for first in range(0, topk - many, WIDE):
        i = many + first + tl.arange(0, WIDE)
        tl.store(indices + i, tl.full((WIDE,), -1, indices.dtype.element_ty), mask=i < topk)
        if results is not None:
            tl.store(results + i, tl.full((WIDE,), float("-inf"), results.dtype.element_ty), mask=i < topk)


@triton.jit(
    do_not_specialize=[
        *("sk", "topk", "capacity", "at_once", "first_line", "offset"),
        *("scores_batch", "scores_row", "indices_batch", "indices_row", "results_batch", "results_row"),
    ]
)
def keep_kernel(
    scores,
    start,
    end,
    found,
    found_key,
    count,
    indices,
    results,
    sk,
    topk,
    capacity,
    at_once,
    first_line,
    offset,
    scores_batch,
    scores_row,
    start_batch,
    start_row,
    end_batch,
    end_row,
    indices_batch,
    indices_row,
    results_batch,
    results_row,
    RATIO: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BOTTOM: tl.constexpr,
    TOP: tl.constexpr,
    SAMPLE: tl.constexpr,
    DEEP: tl.constexpr,
    HELD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the best topk keys of a row that score above -inf, in no order, and -1 and -inf where it runs out of them.

    indices: the keys [batches, rows, topk], dense along topk.   results: their scores, or None.
    count: int32, how many there are, of rows of all batches from first_line on.
    found: [batches, rows, capacity], int64 of bits and keys of what is put aside, or bits alone with found_key beside
    them; capacity is at least topk, and a place for each warp.   at_once: keys of the longest row of which nothing is,
    at least capacity.
    SAMPLE: keys that are looked at first; 0 where no row has more than at_once.   DEEP, HELD: keys that a thread takes
    in a step of a walk, and of what is cut.
    """
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = batch * tl.num_programs(0) + row
    scores += batch * scores_batch + row.to(tl.int64) * scores_row
    indices += batch * indices_batch + row.to(tl.int64) * indices_row
    if results is not None:
        results += batch * results_batch + row.to(tl.int64) * results_row
    if start is not None:
        start += batch * start_batch
    if end is not None:
        end += batch * end_batch
    rows = row + tl.arange(0, 1)
    lows, highs = row_bounds(rows, rows >= 0, sk, start, end, start_row, end_row, offset, RATIO, HAS_OFFSET)
    low, high = tl.max(lows, axis=0), tl.max(highs, axis=0)
    n = tl.maximum(high - low, 0)

    if SAMPLE == 0:  # noqa: SIM114 (known when compiled: then there is no other way)
        many = _whole(scores, low, n, topk, sk, indices, results, BOTTOM, TOP, HELD, WIDE)
    elif n <= at_once:
        many = _whole(scores, low, n, topk, sk, indices, results, BOTTOM, TOP, HELD, WIDE)
    else:
        found += place * capacity
        if found_key is not None:
            found_key += place * capacity
        many = best(
            scores, found, found_key, indices, results, low, high, topk, capacity, sk,
            BOTTOM, TOP, SAMPLE, DEEP, HELD, WIDE,
        )  # fmt: skip
    tl.store(count + first_line + place, many)
    clear(indices, results, many, topk, WIDE)
