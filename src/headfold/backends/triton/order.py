"""What was kept of a row, put in order: by a network where a score and its key share 64 bits, else by counting.

A row of up to 2048 is sorted by a network over its leading bits, and neighbours that those put wrong change places
until none does. Where that does not end soon, as on a plateau, a slower network sorts it whole. A row of more is
sorted in pairs of blocks, whole, and Batcher's merge exchange says which pairs, from their numbers alone: a launch is
one round of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.network import places_by
from headfold.backends.triton.orders import key_of, ordered, packed, scores_of

NOTHING = tl.constexpr(-(2**63))
# Turns in which neighbours change places. What is not in order then is far from it.
TURNS = tl.constexpr(8)


@triton.jit
def _exchange(bits, indices, left, right, many):
    """Put the better of two keys first, of pairs of which both places are before `many`; return how many were wrong."""
    pair = right < many
    better, worse = tl.load(bits + left, mask=pair, other=0), tl.load(bits + right, mask=pair, other=0)
    first, last = tl.load(indices + left, mask=pair, other=0), tl.load(indices + right, mask=pair, other=0)
    wrong = (better < worse) | ((better == worse) & (first > last))
    tl.store(bits + left, worse, mask=wrong)
    tl.store(bits + right, better, mask=wrong)
    tl.store(indices + left, last, mask=wrong)
    tl.store(indices + right, first, mask=wrong)
    return tl.sum(wrong.to(tl.int32), axis=0)


@triton.jit
def sort_in_memory(bits, indices, many, LOG: tl.constexpr, PAIRS: tl.constexpr):
    """Put the first `many` orders of a row, at most 2 ** LOG, and their keys in order, the best first."""
    # A bitonic network. Every exchange puts the better one first, so none is needed with places past the last.
    for run in range(0, LOG):
        for step in range(0, run + 1):
            apart = run - step
            for first in range(0, 1 << (LOG - 1), PAIRS):
                pair = first + tl.arange(0, PAIRS)
                left = (pair >> apart << (apart + 1)) | (pair & ((1 << apart) - 1))
                right = tl.where(step == 0, left ^ ((2 << apart) - 1), left | (1 << apart))
                _exchange(bits, indices, left, right, many)
            tl.debug_barrier()


@triton.jit
def write_scores(bits, scores, many, topk, TOP: tl.constexpr, LOG: tl.constexpr):
    """Write the scores of the first `many` orders of a row, and -inf behind them."""
    e = tl.arange(0, 1 << LOG)
    best = scores_of(tl.load(bits + e, mask=e < many, other=0), TOP)
    tl.store(scores + e, tl.where(e < many, best, float("-inf")), mask=e < topk)


@triton.jit
def _settled(x, LOG: tl.constexpr, LANES: tl.constexpr):
    """Put what is packed [2 ** LOG] and nearly in order in order, and return it, and whether it is not yet.

    Neighbours at even places and at odd ones change places by turns, until none of the one is wrong after those of the
    other.   LANES: as of `places_by`.
    """
    COUNT: tl.constexpr = 1 << LOG
    DEEP: tl.constexpr = COUNT >> LANES
    # A thread holds neighbours, at even places without asking others.
    pair = tl.reshape(x, (COUNT // 2, 2))
    better, worse = tl.max(pair, axis=1, keep_dims=True), tl.min(pair, axis=1, keep_dims=True)
    x = tl.where(tl.arange(0, 2)[None, :] == 0, better, worse)
    # What is gathered lies thread by thread, so that threads take from banks of their own.
    x = tl.reshape(tl.trans(tl.reshape(x, (1 << LANES, DEEP))), (COUNT,))
    at = tl.arange(0, COUNT)
    e = at % (1 << LANES) * DEEP + at // (1 << LANES)
    turns, wrong = tl.full((), 1, tl.int32), tl.full((), 1, tl.int32)
    while (wrong > 0) & (turns < TURNS):
        neighbour = ((e + turns % 2) ^ 1) - turns % 2
        neighbour = tl.minimum(tl.maximum(neighbour, 0), COUNT - 1)
        other = tl.gather(x, neighbour % DEEP * (1 << LANES) + neighbour // DEEP, 0)
        after = tl.where(neighbour > e, tl.maximum(x, other), tl.minimum(x, other))
        wrong = tl.sum((after != x).to(tl.int32), axis=0)
        x = after
        turns += 1
    return tl.reshape(tl.trans(tl.reshape(x, (DEEP, 1 << LANES))), (COUNT,)), wrong > 0


@triton.jit
def order_row(
    bits, many, indices, scores, topk,
    TOP: tl.constexpr, LOG: tl.constexpr, LANES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Put the first `many` keys of a row in order, the best first, and write their scores, and -inf behind them.

    There are at most 2 ** LOG.   bits: [topk], of the keys' scores; orders that move with them may be written there.
    """
    e = tl.arange(0, 1 << LOG)
    live = e < many
    order = ordered(tl.load(bits + e, mask=live, other=0), TOP)
    key = tl.load(indices + e, mask=live, other=0).to(tl.int32)
    # What is packed changes places within the program: in memory every one would be a step of its own.
    x = tl.where(live, packed(order, key), NOTHING)
    x, wrong = _settled(tl.gather(x, places_by(order, live, LOG, LANES), 0), LOG, LANES)
    order = (x >> 32).to(tl.int32)
    tl.debug_barrier()
    tl.store(indices + e, key_of(x).to(indices.dtype.element_ty), mask=live)
    if wrong:
        tl.store(bits + e, order, mask=live)
        tl.debug_barrier()
        sort_in_memory(bits, indices, many, LOG, PAIRS)
        order = tl.load(bits + e, mask=live, other=0)
    if scores is not None:
        tl.store(scores + e, tl.where(live, scores_of(order, TOP), float("-inf")), mask=e < topk)


# Were rows known to be aligned, a thread would take several neighbours, and neighbours would lie on fewer threads.
@triton.jit(do_not_specialize=["topk", "bits_row", "indices_batch", "indices_row", "scores_batch", "scores_row"])
def order_kernel(
    bits,
    count,
    indices,
    scores,
    topk,
    bits_row,
    indices_batch,
    indices_row,
    scores_batch,
    scores_row,
    TOP: tl.constexpr,
    LOG: tl.constexpr,
    LANES: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Put the first keys of a row's indices in order, the best first, and write their scores, and -inf behind them.

    There are at most 2 ** LOG.
    bits: [lines, topk], bits_row apart, of the keys' scores; orders that move with them may be written there.
    count: [lines], how many.
    """
    row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    line = batch * tl.num_programs(0) + row
    bits += line * bits_row
    indices += batch * indices_batch + row.to(tl.int64) * indices_row
    if scores is not None:
        scores += batch * scores_batch + row.to(tl.int64) * scores_row
    order_row(bits, tl.load(count + line), indices, scores, topk, TOP, LOG, LANES, PAIRS)


@triton.jit(do_not_specialize=["topk", "blocks", "period", "apart", "indices_batch", "indices_row"])
def merge_kernel(
    bits,
    count,
    indices,
    packed_rows,
    topk,
    blocks,
    period,
    apart,
    indices_batch,
    indices_row,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Sort the blocks `apart` from each other of a row, the best first.

    FIRST: take what was kept, and sort each even block and the next one. bits, count, indices: as `keep_kernel` left
    them. Else packed_rows: int64 [batches, rows, blocks · BLOCK], of the same, in a round whose runs have `period`.
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
        live = j < tl.load(count + line)
        indices += batch * indices_batch + row.to(tl.int64) * indices_row
        key = tl.load(indices + j, mask=live, other=0).to(tl.int32)
        order = ordered(tl.load(bits + line * topk + j, mask=live, other=0), TOP)
        x = tl.where(live, packed(order, key), NOTHING)
    else:
        x = tl.load(packed_rows + line * blocks * BLOCK + j)
    tl.store(packed_rows + line * blocks * BLOCK + j, tl.sort(x, descending=True))


@triton.jit(do_not_specialize=["topk"])
def write_kernel(
    packed_rows,
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
    x = tl.load(packed_rows + line * width + j, mask=j < width, other=NOTHING)
    indices += batch * indices_batch + row.to(tl.int64) * indices_row
    if scores is not None:
        scores += batch * scores_batch + row.to(tl.int64) * scores_row
    nothing = x == NOTHING
    key = tl.where(nothing, -1, key_of(x))
    tl.store(indices + j, key.to(indices.dtype.element_ty), mask=j < topk)
    if scores is not None:
        score = tl.where(nothing, float("-inf"), scores_of((x >> 32).to(tl.int32), TOP))
        tl.store(scores + j, score, mask=j < topk)


@triton.jit(do_not_specialize=["topk"])
def count_kernel(
    bits,
    keys,
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

    bits, keys: [lines, topk].   count: [lines], how many.
    """
    row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    line = batch * tl.num_programs(0) + row
    bits += line * topk
    keys += line * topk
    many = tl.load(count + line)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    order = ordered(tl.load(bits + i, mask=i < many, other=0), TOP)
    key = tl.load(keys + i, mask=i < many, other=-1)
    place = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, many, BLOCK):
        o = first + tl.arange(0, BLOCK)
        other = ordered(tl.load(bits + o, mask=o < many, other=0), TOP)[None, :]
        other_key = tl.load(keys + o, mask=o < many, other=0)[None, :]
        better = (other > order[:, None]) | ((other == order[:, None]) & (other_key < key[:, None]))
        place += tl.sum((better & (o < many)[None, :]).to(tl.int32), axis=1)
    place = tl.where(i < many, place, i)
    indices += batch * indices_batch + row.to(tl.int64) * indices_row
    tl.store(indices + place, key.to(indices.dtype.element_ty), mask=i < topk)
    if scores is not None:
        scores += batch * scores_batch + row.to(tl.int64) * scores_row
        score = tl.where(i < many, scores_of(order, TOP), float("-inf"))
        tl.store(scores + place, score, mask=i < topk)
