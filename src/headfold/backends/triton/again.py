"""Rows whose lists do not hold what is wanted: a sample was wrong. They are scored again, and selected from as a row.

One program does all of that for a row, in scratch of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.forward import tile_scores
from headfold.backends.triton.keep import best, clear
from headfold.backends.triton.products import load_rows
from headfold.backends.triton.visible import row_bounds


@triton.jit(do_not_specialize=["rows", "sk", "topk", "capacity", "offset", "line_row", "indices_row", "results_row"])
def again_kernel(
    count,
    later,
    lines,
    found,
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
):
    """Write the best topk of the rows that have fewer than no keys, in no order, as `keep_kernel` does.

    count: int32 [rows], as `keep_sifted_kernel` leaves them.   later: int32 [rows], what it would say of these rows; -1
    of all others.   lines: float32 [programs, line_row], scores of a row.   found: int64 [programs, capacity].
    The rest is as of `sift_kernel` and `keep_kernel`.
    """
    lines += tl.program_id(0).to(tl.int64) * line_row
    found += tl.program_id(0).to(tl.int64) * capacity
    head = tl.arange(0, HEADS)
    real = head < H
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        many = tl.full((), -1, tl.int32)
        if tl.load(count + row) < 0:
            one = row + tl.arange(0, 1)
            _, highs = row_bounds(one, one >= 0, sk, None, None, 0, 0, offset, RATIO, HAS_OFFSET)
            high = tl.max(highs, axis=0)
            wide_row = tl.cast(row, tl.int64)
            places = q + wide_row * q_row + head.to(tl.int64) * q_head
            query = tl.trans(load_rows(places, real, q_channel, 0, D, D))
            if weights is not None:
                at = weights + wide_row * weights_row + head.to(tl.int64) * weights_head
                factor = tl.load(at, mask=real, other=0.0).to(ACC)
            else:
                factor = real.to(ACC)
            for key in tl.range(0, high, KEYS, num_stages=STAGES):
                t = key + tl.arange(0, KEYS)
                there = k + t.to(tl.int64) * k_row
                some = load_rows(there, t < sk, k_channel, 0, D, D)
                x = tile_scores(
                    some, some, query, query, factor, head, scale, True, H, HEADS, 0, 1, KEYS, PRECISION, ACC, UPCAST
                )
                tl.store(lines + t, tl.reshape(x, (KEYS,)), mask=t < high)
            tl.debug_barrier()
            picked = indices + wide_row * indices_row
            beside = results
            if results is not None:
                beside += wide_row * results_row
            many = best(
                lines, found, None, picked, beside, tl.zeros((), tl.int32), high, topk, capacity, sk,
                BOTTOM, TOP, SAMPLE, DEEP, HELD, WIDE,
            )  # fmt: skip
            clear(picked, beside, many, topk, WIDE)
            tl.debug_barrier()
        tl.store(later + row, many)
