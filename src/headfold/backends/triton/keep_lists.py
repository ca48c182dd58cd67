"""The best keys of rows whose lists were sifted, in no order, if the lists hold them, and else another pivot."""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.cut_lists import any_row, cut_lists, orders_of
from headfold.backends.triton.orders import bits_of, ordered, scores_of
from headfold.backends.triton.sift import LISTS

# How far a row's lower pivot is moved where it was wrong, as a share of the distance between both: down by as much as
# samples are seldom further off, and up by what a list is seldom longer for than its neighbours are.
DOWN, UP = tl.constexpr(0.4), tl.constexpr(0.2)
# Numbers of keys of a row that is to be sifted again, and of one that was.
FAILED_ROW, LEFT_ROW = tl.constexpr(-1), tl.constexpr(-2)


@triton.jit
def _move(pivots, lower, upper, few, failed, TOP: tl.constexpr):
    """Write other pivots of rows that failed, lower ones where there were too few keys, and say that they are others.

    pivots: pointers [rows].   lower, upper: orders [rows].
    """
    pivot = scores_of(lower, TOP)
    apart = scores_of(upper, TOP) - pivot
    pivot = tl.where(few, pivot - apart * DOWN, pivot + apart * UP)
    # Among infinities there is none: then all is listed, if there is room.
    bits = bits_of(tl.where(tl.abs(pivot) < float("inf"), pivot, float("-inf")))
    tl.debug_barrier()  # until every thread has read them
    tl.store(pivots, bits, mask=failed)
    tl.store(pivots + 1, bits, mask=failed)
    tl.store(pivots + 2, tl.full(bits.shape, -1, tl.int32), mask=failed)


@triton.jit
def keep_lists(
    scores, entries, counts, pivots, indices, results, lists_row, indices_row, results_row, wanted, sk, topk, room,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, HELD: tl.constexpr, REST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the best topk keys of rows' lists, in no order, and -1 and -inf where one runs out of them.

    scores, entries, counts, pivots: of the first of the rows, as `sift` has them, lists_row apart.   indices, results:
    where its keys and scores are written, other rows' so far apart; scores may lie where the lists' do, or be None.
    wanted: [rows], nothing is written of the others.
    HELD, REST: places of a row that a thread holds, of the first and of others, with room for all.   WIDE: its threads.
    Return how many there are [rows]. Of a row of which a list was too short or the pivot too high write nothing but the
    next pivot, and return FAILED_ROW, or LEFT_ROW where that was another one's next.
    """
    mine = tl.arange(0, wanted.shape[0])
    row, one = counts + mine[:, None] * LISTS, tl.arange(0, LISTS)[None, :]
    of_lists = tl.load(row + one, mask=wanted[:, None], other=0)
    many, longest = tl.sum(of_lists, axis=1), tl.max(of_lists, axis=1)
    pivots += mine * 4
    lower = ordered(tl.load(pivots, mask=wanted, other=0), TOP)
    moved = tl.load(pivots + 2, mask=wanted, other=0) < 0
    upper = tl.load(pivots + 3, mask=wanted, other=0)
    few = (many < topk) & (lower > BOTTOM)
    failed = wanted & (few | (longest > room))
    if any_row(failed):
        _move(pivots, lower, upper, few, failed, TOP)
    kept = wanted & ~failed
    n = tl.load(row + tl.arange(0, WIDE)[None, :] % LISTS, mask=kept[:, None], other=0)
    scores, entries = scores + mine * lists_row, entries + mine * lists_row
    indices += mine * indices_row
    if results is not None:
        results += mine * results_row
    held = orders_of(scores, n, 0, BOTTOM, TOP, HELD)
    rest = orders_of(scores, n, HELD * WIDE, BOTTOM, TOP, REST)
    many = tl.where(kept, many, 0)
    written = cut_lists(held, rest, entries, many, topk, sk, lower, upper, indices, results, BOTTOM, TOP)
    some = tl.min(tl.where(kept, written, topk), axis=0)
    for first in range(some, topk, WIDE):
        i = first + tl.arange(0, WIDE)[None, :]
        none = kept[:, None] & (i >= written[:, None]) & (i < topk)
        tl.store(indices[:, None] + i, tl.full((1, WIDE), -1, indices.dtype.element_ty), mask=none)
        if results is not None:
            tl.store(results[:, None] + i, tl.full((1, WIDE), float("-inf"), results.dtype.element_ty), mask=none)
    return tl.where(failed, tl.where(moved, LEFT_ROW, FAILED_ROW), written)
