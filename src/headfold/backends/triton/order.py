"""What was kept of a row, put in order: by a sorting network where a score and its key share 64 bits, else by counting.

The network sorts two blocks in registers. A row of more is sorted in pairs of blocks, and Batcher's merge exchange says
which pairs, from their numbers alone: a launch is one round of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.keep import key_of, scores_of

NOTHING = tl.constexpr(-(2**63))


@triton.jit
def _write(packed, indices, scores, j, topk, TOP: tl.constexpr):
    """Write what is packed to places j of a row of the results: -1 and -inf where there is nothing."""
    nothing = packed == NOTHING
    key = tl.where(nothing, -1, key_of(packed))
    tl.store(indices + j, key.to(indices.dtype.element_ty), mask=j < topk)
    if scores is not None:
        score = tl.where(nothing, float("-inf"), scores_of((packed >> 32).to(tl.int32), TOP))
        tl.store(scores + j, score, mask=j < topk)


@triton.jit(do_not_specialize=["topk", "blocks", "period", "apart"])
def sort_kernel(
    found,
    count,
    packed,
    indices,
    scores,
    topk,
    blocks,
    period,
    apart,
    indices_batch,
    indices_row,
    scores_batch,
    scores_row,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    ONLY: tl.constexpr,
):
    """Sort the blocks `apart` from each other of a row, the best first.

    FIRST: pack what was kept, and sort each even block and the next one. kept, kept_key: [batches, rows, topk], the
    order of a score and its key; count: [batches, rows], how many.   ONLY: there are but two blocks, write the results.
    Else packed: int64 [batches, rows, blocks · BLOCK], order over key ^ LARGEST, in a round whose runs have `period`.
    """
    row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    line = batch * tl.num_programs(0) + row
    one = tl.program_id(1)
    if FIRST:
        one = 2 * one
    else:
        skipped = apart % period
        out_of_turn = (one < skipped) | ((one - skipped) // apart % 2 == 1)
        if out_of_turn | (one // (2 * period) != (one + apart) // (2 * period)):
            return
    e = tl.arange(0, 2 * BLOCK)
    j = tl.where(e < BLOCK, one * BLOCK + e, (one + apart - 1) * BLOCK + e)
    if FIRST:
        x = tl.load(found + line * topk + j, mask=j < tl.load(count + line), other=NOTHING)
    else:
        x = tl.load(packed + line * blocks * BLOCK + j)
    x = tl.sort(x, descending=True)
    if ONLY:
        indices += batch * indices_batch + row.to(tl.int64) * indices_row
        if scores is not None:
            scores += batch * scores_batch + row.to(tl.int64) * scores_row
        _write(x, indices, scores, e, topk, TOP)
    else:
        tl.store(packed + line * blocks * BLOCK + j, x)


@triton.jit(do_not_specialize=["topk"])
def write_kernel(
    packed,
    indices,
    scores,
    topk,
    width,
    indices_batch,
    indices_row,
    scores_batch,
    scores_row,
    TOP: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write what is packed, int64 [batches, rows, width] in order, to the results."""
    row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    line = batch * tl.num_programs(0) + row
    j = tl.program_id(1) * STEP + tl.arange(0, STEP)
    x = tl.load(packed + line * width + j, mask=j < width, other=NOTHING)
    indices += batch * indices_batch + row.to(tl.int64) * indices_row
    if scores is not None:
        scores += batch * scores_batch + row.to(tl.int64) * scores_row
    _write(x, indices, scores, j, topk, TOP)


@triton.jit(do_not_specialize=["topk"])
def count_kernel(
    found,
    found_key,
    count,
    indices,
    scores,
    topk,
    indices_batch,
    indices_row,
    scores_batch,
    scores_row,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what was kept to the place that the number of better ones gives it: the order of any width, unpacked.

    found, found_key: [batches, rows, topk], order and key of what is kept.   count: [batches, rows], how many.
    """
    row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    line = batch * tl.num_programs(0) + row
    found += line * topk
    found_key += line * topk
    many = tl.load(count + line)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    order = tl.load(found + i, mask=i < many, other=0)
    key = tl.load(found_key + i, mask=i < many, other=-1)
    place = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, many, BLOCK):
        o = first + tl.arange(0, BLOCK)
        other = tl.load(found + o, mask=o < many, other=0)[None, :]
        other_key = tl.load(found_key + o, mask=o < many, other=0)[None, :]
        better = (other > order[:, None]) | ((other == order[:, None]) & (other_key < key[:, None]))
        place += tl.sum((better & (o < many)[None, :]).to(tl.int32), axis=1)
    place = tl.where(i < many, place, i)
    indices += batch * indices_batch + row.to(tl.int64) * indices_row
    tl.store(indices + place, key.to(indices.dtype.element_ty), mask=i < topk)
    if scores is not None:
        scores += batch * scores_batch + row.to(tl.int64) * scores_row
        score = tl.where(i < many, scores_of(order, TOP), float("-inf"))
        tl.store(scores + place, score, mask=i < topk)
