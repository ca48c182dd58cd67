"""Rows whose lists do not hold what is wanted: a sample was wrong. They are scored again, and selected from as a row.

One program does all of that for a row, in scratch of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.forward import tile_scores
from headfold.backends.triton.keep import best, clear
from headfold.backends.triton.order import sort_in_memory, write_scores
from headfold.backends.triton.orders import ordered
from headfold.backends.triton.products import load_rows
from headfold.backends.triton.sift import tile_queries
from headfold.backends.triton.visible import row_bounds


@triton.jit(do_not_specialize=["rows", "sk", "topk", "capacity", "offset", "line_row", "indices_row", "results_row"])
def again_kernel(
    left,
    count,
    lines,
    found,
    bits,
    indices,
    results,
    q,
    weights,
    k,
    rows,
    sk,
    topk,
    capacity,
    offset,
    scale: tl.float64,
    line_row,
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
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    BOTTOM: tl.constexpr,
    TOP: tl.constexpr,
    SAMPLE: tl.constexpr,
    DEEP: tl.constexpr,
    HELD: tl.constexpr,
    WIDE: tl.constexpr,
    LOG: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Write the best topk of the rows that have fewer than no keys, in order or in none.

    left: int32 [1], how many those are.   count: int32 [rows], as `select_rows_kernel` leaves them.
    lines: float32 [programs, line_row], scores of a row.   found: int64 [programs, capacity].
    bits: float32 [programs, topk], of what is put in order, or None.   The rest is as of `sift` and `keep_kernel`.
    """
    if tl.load(left) == 0:
        return
    lines += tl.program_id(0).to(tl.int64) * line_row
    found += tl.program_id(0).to(tl.int64) * capacity
    if bits is not None:
        bits += tl.program_id(0).to(tl.int64) * topk
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        if tl.load(count + row) < 0:
            one = row + tl.arange(0, 1)
            _, highs = row_bounds(one, one >= 0, sk, None, None, 0, 0, offset, RATIO, HAS_OFFSET)
            high = tl.max(highs, axis=0)
            wide_row = tl.cast(row, tl.int64)
            # Rows are scored as `sift` and `score_slab` do, to the same bits: with those of their tile.
            mine = tl.arange(0, ROWS) == row % ROWS
            queries, factor, head = tile_queries(
                q, weights, row // ROWS * ROWS, rows, q_row, q_head, q_channel, weights_row, weights_head,
                H, D, HEADS, ROWS, ACC,
            )  # fmt: skip
            for key in tl.range(0, high, KEYS, num_stages=STAGES):
                t = key + tl.arange(0, KEYS)
                there = k + t.to(tl.int64) * k_row
                some = load_rows(there, t < sk, k_channel, 0, D, D)
                x = tile_scores(
                    some, some, queries, queries, factor, head, scale, True, H, HEADS, 0, ROWS, KEYS, PRECISION, ACC,
                    UPCAST,
                )  # fmt: skip
                at_keys = tl.broadcast_to((lines + t)[:, None], (KEYS, ROWS))
                tl.store(at_keys, x, mask=(t < high)[:, None] & mine[None, :])
            tl.debug_barrier()
            picked = indices + wide_row * indices_row
            beside = results
            if results is not None:
                beside += wide_row * results_row
            kept = beside if bits is None else bits
            many = best(
                lines, found, None, picked, kept, tl.zeros((), tl.int32), high, topk, capacity, sk,
                BOTTOM, TOP, SAMPLE, DEEP, HELD, WIDE,
            )  # fmt: skip
            clear(picked, beside, many, topk, WIDE)
            tl.debug_barrier()
            if bits is not None:
                orders, e = bits.to(tl.pointer_type(tl.int32)), tl.arange(0, 1 << LOG)
                tl.store(orders + e, ordered(tl.load(orders + e, mask=e < many, other=0), TOP), mask=e < many)
                tl.debug_barrier()
                sort_in_memory(orders, picked, many, LOG, PAIRS)
                if beside is not None:
                    write_scores(orders, beside, many, topk, TOP, LOG)
                tl.debug_barrier()
