"""Rows selected from without their scores: programs that take blocks of rows in turn, and sift, cut and sort each.

While one program cuts and sorts, which is a matter of latency, the other one of its core multiplies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.keep import LEFT_ROW, keep_sifted
from headfold.backends.triton.order import order_row
from headfold.backends.triton.sift import LISTS, sift
from headfold.backends.triton.turns import LEFT, begin, end, give, take


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
    ordered: whether they are put in order, as an integer.
    The rest is as of `score_slab`, of one batch element, and of `keep_kernel`.
    """
    blocks, in_order = tl.cdiv(sq, ROWS), ordered != 0
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
        failed = tl.zeros((), tl.int32)
        for mine in range(0, ROWS):
            row = block * ROWS + mine
            if tl.load(count + row, mask=row < sq, other=0) < 0:
                picked, beside = indices + row.to(tl.int64) * indices_row, results
                # A distance of which nothing is known: were lists known to be aligned, a thread would take several
                # neighbours of what is sorted, and neighbours would lie on fewer threads.
                at = (line + mine) * lists_row
                # What waits to be sorted lies where the lists' scores did.
                kept = scores + at
                if results is not None:
                    beside += row.to(tl.int64) * results_row
                    kept = tl.where(in_order, kept, beside)
                many = keep_sifted(
                    scores + at, entries + at, counts + (line + mine) * LISTS, pivots + row * 4, picked, kept,
                    sk, topk, room, BOTTOM, TOP, HELD, WIDE,
                )  # fmt: skip
                tl.debug_barrier()
                tl.store(count + row, many)
                if many == LEFT_ROW:
                    tl.atomic_add(turns + LEFT, 1)
                elif many < 0:
                    failed += 1
                elif in_order:
                    bits = (scores + at).to(tl.pointer_type(tl.int32))
                    order_row(bits, many, picked, beside, topk, TOP, LOG, LANES, PAIRS)
        tl.debug_barrier()
        give(turns, place)
        end(turns, queue, block, failed)
