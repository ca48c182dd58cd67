"""What was kept of a row, cut and put in order: by a network where a score and its key share 64 bits, else by counting.

A row of up to 2048 is sorted by a network over its leading bits, and neighbours that those put wrong change places
until none does. A row of more is sorted in pairs of blocks, whole, and Batcher's merge exchange says which pairs, from
their numbers alone: a launch is one round of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.cut import cut
from headfold.backends.triton.keep import key_of, scores_of
from headfold.backends.triton.network import places_by

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


@triton.jit
def _put_in_order(found, indices, many, LOG: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr):
    """Write the places of the first `many` of a row of found to its indices, the best first."""
    e = tl.arange(0, 1 << LOG)
    kept = tl.load(found + e, mask=e < many, other=0)
    place = places_by((kept >> 32).to(tl.int32), e < many, LOG, LANES)
    tl.store(indices + e, place.to(indices.dtype.element_ty), mask=e < many)
    tl.debug_barrier()

    swaps = tl.full((), 1, tl.int32)
    while swaps > 0:
        swaps = tl.zeros((), tl.int32)
        for odd in range(0, 2):
            for first in range(odd, many - 1, CHUNK):
                j = first + 2 * tl.arange(0, CHUNK // 2)
                pair = j + 1 < many
                left = tl.load(indices + j, mask=pair, other=0)
                right = tl.load(indices + j + 1, mask=pair, other=0)
                wrong = pair & (tl.load(found + left, mask=pair, other=0) < tl.load(found + right, mask=pair, other=0))
                tl.store(indices + j, right, mask=wrong)
                tl.store(indices + j + 1, left, mask=wrong)
                swaps += tl.sum(wrong.to(tl.int32), axis=0)
            tl.debug_barrier()


# Were rows known to be aligned, a thread would take several neighbours, and neighbours would lie on fewer threads.
@triton.jit(do_not_specialize=["topk", "capacity", "indices_batch", "indices_row", "scores_batch", "scores_row"])
def order_kernel(
    found,
    count,
    indices,
    scores,
    topk,
    capacity,
    indices_batch,
    indices_row,
    scores_batch,
    scores_row,
    BOTTOM: tl.constexpr,
    TOP: tl.constexpr,
    IN_ORDER: tl.constexpr,
    LOG: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    HELD: tl.constexpr,
    DEEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the best topk of what was kept of a row, IN_ORDER if asked: topk is then at most 2 ** LOG.

    found, count: as `cut_kernel` takes them. While it is put in order, the row's indices hold places in found.
    """
    row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    line = batch * tl.num_programs(0) + row
    found += line * capacity
    indices += batch * indices_batch + row.to(tl.int64) * indices_row
    if scores is not None:
        scores += batch * scores_batch + row.to(tl.int64) * scores_row
    many = cut(found, None, tl.load(count + line), topk, BOTTOM, TOP, HELD, DEEP, WIDE)
    if IN_ORDER:
        _put_in_order(found, indices, many, LOG, LANES, CHUNK)
    for first in range(0, topk, CHUNK):
        j = first + tl.arange(0, CHUNK)
        best = tl.load(indices + j, mask=j < many, other=0) if IN_ORDER else j
        _write(tl.load(found + best, mask=j < many, other=NOTHING), indices, scores, j, topk, TOP)


@triton.jit(do_not_specialize=["capacity", "blocks", "period", "apart"])
def merge_kernel(
    found,
    count,
    packed,
    capacity,
    blocks,
    period,
    apart,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Sort the blocks `apart` from each other of a row, the best first.

    FIRST: take what was cut, and sort each even block and the next one. found, count: as `cut_kernel` left them.
    Else packed: int64 [batches, rows, blocks · BLOCK], of the same, in a round whose runs have `period`.
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
        x = tl.load(found + line * capacity + j, mask=j < tl.load(count + line), other=NOTHING)
    else:
        x = tl.load(packed + line * blocks * BLOCK + j)
    tl.store(packed + line * blocks * BLOCK + j, tl.sort(x, descending=True))


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


@triton.jit(do_not_specialize=["topk", "capacity"])
def count_kernel(
    found,
    found_key,
    count,
    indices,
    scores,
    topk,
    capacity,
    indices_batch,
    indices_row,
    scores_batch,
    scores_row,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what was cut to the place that the number of better ones gives it: the order of any width, unpacked.

    found, found_key: [lines, capacity], order and key.   count: [lines], how many.
    """
    row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    line = batch * tl.num_programs(0) + row
    found += line * capacity
    found_key += line * capacity
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
