"""Rows selected from without their scores: programs that take blocks of rows in turn, and sift, cut and sort each.

While one program cuts and sorts, which is a matter of latency, the other one of its core multiplies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.cut_lists import any_row
from headfold.backends.triton.keep_lists import FAILED_ROW, LEFT_ROW, keep_lists
from headfold.backends.triton.order import order_row
from headfold.backends.triton.sift import LISTS, sift
from headfold.backends.triton.turns import LEFT, begin, end, give, take


# Calls of their own, so that what they work with takes no registers of the loops that sift.
@triton.jit(noinline=True)
def _order(
    bits, many, indices, scores, topk,
    TOP: tl.constexpr, LOG: tl.constexpr, LANES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    order_row(bits, many, indices, scores, topk, TOP, LOG, LANES, PAIRS)


@triton.jit(noinline=True)
def _cut_and_order(
    turns, scores, entries, counts, pivots, count, indices, results, line, block, sq, sk, topk, room, ordered,
    lists_row, indices_row, results_row,
    ROWS: tl.constexpr, TOGETHER: tl.constexpr, BOTTOM: tl.constexpr, TOP: tl.constexpr, HELD: tl.constexpr,
    REST: tl.constexpr, WIDE: tl.constexpr, LOG: tl.constexpr, LANES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write the best topk keys of a block's rows, of lists from `line` on, and return how many of the rows failed."""
    in_order, failed = ordered != 0, tl.zeros((), tl.int32)
    for mine in range(0, ROWS, TOGETHER):
        first, each = block * ROWS + mine, tl.arange(0, TOGETHER)
        row = first + each
        wanted = tl.load(count + row, mask=row < sq, other=0) < 0
        if any_row(wanted):
            # A distance of which nothing is known: were lists known to be aligned, a thread would take several
            # neighbours of what is sorted, and neighbours would lie on fewer threads.
            at = (line + mine) * lists_row
            picked, beside = indices + first.to(tl.int64) * indices_row, results
            # What waits to be sorted lies where the lists' scores did.
            kept, kept_row = scores + at, lists_row
            if results is not None:
                beside += first.to(tl.int64) * results_row
                kept, kept_row = tl.where(in_order, kept, beside), tl.where(in_order, lists_row, results_row)
            many = keep_lists(
                scores + at, entries + at, counts + (line + mine) * LISTS, pivots + first * 4, picked, kept,
                lists_row, indices_row, kept_row, wanted, sk, topk, room, BOTTOM, TOP, HELD, REST, WIDE,
            )  # fmt: skip
            tl.debug_barrier()
            tl.store(count + row, many, mask=wanted)
            failed += tl.sum((wanted & (many == FAILED_ROW)).to(tl.int32), axis=0)
            left = tl.sum((wanted & (many == LEFT_ROW)).to(tl.int32), axis=0)
            if left > 0:
                tl.atomic_add(turns + LEFT, left)
            if in_order:
                for one in range(0, TOGETHER):
                    of_one = tl.sum(tl.where(each == one, tl.where(wanted, many, FAILED_ROW), 0), axis=0)
                    if of_one >= 0:
                        bits = (scores + at + one * lists_row).to(tl.pointer_type(tl.int32))
                        sorted_scores = beside
                        if results is not None:
                            sorted_scores += one * results_row
                        _order(bits, of_one, picked + one * indices_row, sorted_scores, topk, TOP, LOG, LANES, PAIRS)
    return failed


@triton.jit(
    do_not_specialize=[
        *("sq", "sk", "topk", "offset", "room", "abreast", "ordered"),
        *("lists_row", "indices_row", "results_row"),
    ]
)
def select_rows_kernel(
    turns,
    queue,
    scores,
    entries,
    counts,
    pivots,
    count,
    indices,
    results,
    q,
    weights,
    k,
    sq,
    sk,
    topk,
    offset,
    room,
    abreast,
    ordered,
    scale: tl.float64,
    lists_row,
    indices_row,
    results_row,
    q_row,
    q_head,
    q_channel,
    weights_row,
    weights_head,
    k_row,
    k_channel,
    RATIO: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BOTTOM: tl.constexpr,
    TOP: tl.constexpr,
    HELD: tl.constexpr,
    REST: tl.constexpr,
    TOGETHER: tl.constexpr,
    WIDE: tl.constexpr,
    LOG: tl.constexpr,
    LANES: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Write the best topk keys of all rows, in order or in none, and -1 and -inf where a row runs out of them.

    turns, queue: as of `turns`.   abreast: places of memory, which are of ROWS lines each.
    scores, entries: float32 and int16 [lines, room, LISTS], lists_row apart.   counts: int32 [lines, LISTS].
    pivots: int32 [sq, 4], as `pivots_kernel` writes them; those of a row that is selected from again are changed.
    count: int32 [sq], less than no keys of each row at first, and in the end of those that are left to another kernel.
    ordered: whether they are put in order, as an integer.   TOGETHER: rows that are cut and sorted at once.
    The rest is as of `score_slab`, of one batch element, and of `keep_lists`.
    """
    blocks = tl.cdiv(sq, ROWS)
    block = begin(turns, queue, blocks)
    if block >= 0:
        place = take(turns, abreast)
        line = place * ROWS
        sift(
            scores, entries, counts, pivots, count, q, weights, k, line, block, sq, sk, offset, room, scale,
            q_row, q_head, q_channel, weights_row, weights_head, k_row, k_channel,
            RATIO, HAS_OFFSET, H, D, HEADS, ROWS, STAGES, UNIFORM, PRECISION, ACC, UPCAST, ASSEMBLY,
        )  # fmt: skip
        tl.debug_barrier()
        failed = _cut_and_order(
            turns, scores, entries, counts, pivots, count, indices, results, line, block, sq, sk, topk, room, ordered,
            lists_row, indices_row, results_row,
            ROWS, TOGETHER, BOTTOM, TOP, HELD, REST, WIDE, LOG, LANES, PAIRS,
        )  # fmt: skip
        tl.debug_barrier()
        give(turns, place)
        end(turns, queue, block, failed)
