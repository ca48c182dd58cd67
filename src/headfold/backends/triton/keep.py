"""Keys of every row of a slab of scores that hold its best ones, exactly, and at most as many as there is room for.

One program keeps one row. A sample of it says above which pivot the keys that are wanted lie, and some more; one
walk over the row keeps those. Where the sample was wrong, the pivot is bisected over the row itself until it
is right, and the walk is made again: the sample decides how long it takes, never what is selected in the end.

Scores are compared as integers of their own width that have their order: equal zeros, and one NaN above all others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.visible import row_bounds

# Deviations of the sample's count that the pivot lies below the cut, where there is room to keep so many; a wrong
# sample costs time only.
DEVIATIONS = tl.constexpr(4.5)


@triton.jit
def bits_of(x):
    """Return a float's bits, as a signed integer of its width."""
    return x.to(tl.int64, bitcast=True) if x.dtype.primitive_bitwidth == 64 else x.to(tl.int32, bitcast=True)


@triton.jit
def ordered(bits, TOP: tl.constexpr):
    """Return signed integers in the order of the floats that have these bits: -0.0 is 0, NaN of either sign is TOP."""
    if bits.dtype.primitive_bitwidth == 64:
        order = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        nan = (bits & 0x7FFFFFFFFFFFFFFF) > 0x7FF0000000000000
    else:
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
    order = tl.where(order == -1, 0, order)  # only -0.0 is -1
    return tl.where(nan, TOP, order)


@triton.jit
def scores_of(order, TOP: tl.constexpr):
    """Return the floats that `ordered` made these integers of."""
    if order.dtype.primitive_bitwidth == 64:
        bits = tl.where(order == TOP, 0x7FF8000000000000, order ^ ((order >> 63) & 0x7FFFFFFFFFFFFFFF))
        x = bits.to(tl.float64, bitcast=True)
    else:
        bits = tl.where(order == TOP, 0x7FC00000, order ^ ((order >> 31) & 0x7FFFFFFF))
        x = bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def between(low, high):
    """Return the middle of two integers, rounded down, where their sum would overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def packed(order, key):
    """Return an int32 and a key as one int64. Of an order, it has the total order: ties go to the smaller key."""
    return (order.to(tl.int64) << 32) | (key ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def key_of(both):
    """Return the key of what is packed, as int64."""
    return (both & 0xFFFFFFFF) ^ 0x7FFFFFFF


@triton.jit
def put(found, found_key, at, order, key, mask):
    """Write orders (or bits) and keys to places of a row: in one int64 that holds both, else to two arrays.

    found, found_key: the start of what is kept of a row, of one or of each.
    """
    if found_key is None:
        tl.store(found + at, packed(order, key), mask=mask)
    else:
        tl.store(found + at, order, mask=mask)
        tl.store(found_key + at, key, mask=mask)


@triton.jit
def numbered(chosen):
    """Return a place for each of what is chosen [wide, deep], from 0 on, thread by thread, and how many there are.

    A thread holds a row: of the sum over all of them only one value a row crosses threads.
    """
    one = chosen.to(tl.int32)
    within = tl.cumsum(one, axis=1)
    each = tl.sum(one, axis=1)
    place = (tl.cumsum(each, axis=0) - each)[:, None] + (within - one)
    # Places are no neighbours. Said to be, they are stored from the threads that they are in, by every Triton: stores
    # are never merged beyond what their masks share, which is nothing.
    return tl.max_contiguous(place, (2, 1)), tl.sum(each, axis=0)


@triton.jit
def _keys(first, DEEP: tl.constexpr, WIDE: tl.constexpr):
    """Return the DEEP · WIDE keys of a step of a walk."""
    return first + tl.arange(0, WIDE)[:, None] + tl.arange(0, DEEP)[None, :] * WIDE


@triton.jit
def _orders(scores, t, high, TOP: tl.constexpr):
    """Return the order of keys of a row, that of -inf from `high` on."""
    return ordered(bits_of(tl.load(scores + t, mask=t < high, other=float("-inf"))), TOP)


@triton.jit
def _pivot(
    scores, low, n, topk, capacity,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, ORDER: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """Return a pivot, from an even sample of the row, above which probably lie topk keys and at most capacity."""
    i = tl.arange(0, SAMPLE).to(tl.int64)
    order = ordered(bits_of(tl.load(scores + low + i * n // SAMPLE)), TOP)
    share = topk.to(tl.float32) / n.to(tl.float32)
    spare = (capacity - topk).to(tl.float32) / n.to(tl.float32) * SAMPLE / 2
    apart = tl.minimum(DEVIATIONS * tl.sqrt(SAMPLE * share * (1 - share)) + 2, spare)
    least = tl.ceil(SAMPLE * share + apart).to(tl.int32)
    # At most +inf, whose order is -BOTTOM - 1: what is above is told by comparing floats.
    a, high = tl.full((), BOTTOM, ORDER), tl.full((), -BOTTOM, ORDER)
    if least > SAMPLE:
        high = a
    while a < high - 1:
        middle = between(a, high)
        above = tl.sum((order > middle).to(tl.int32), axis=0)
        # At least `least` of the sample lie above `a`, fewer above `high`, unless as many do: then it is found.
        high = tl.where(above < least, middle, tl.where(above == least, middle + 1, high))
        a = tl.where(above < least, a, middle)
    return a


@triton.jit
def _keep(found, found_key, t, x, a, until, kept, capacity, TIES: tl.constexpr, TOP: tl.constexpr):
    """Keep of keys t with scores x those above a and, with TIES, those that are a and before `until`.

    Return how many were meant to be kept so far; there may be no room for so many, and then this step keeps none.
    """
    if TIES:
        order = ordered(bits_of(x), TOP)
        chosen = (order > a) | ((order == a) & (t < until))
    else:
        # Nothing has the order -1, which would be -0.0 and equal to what is above it. NaN is chosen.
        chosen = ~(x <= scores_of(tl.where(a == -1, -2, a), TOP))
    place, many = numbered(chosen)
    if kept + many <= capacity:
        put(found, found_key, kept + place, bits_of(x), t, chosen)
    return kept + many


@triton.jit
def _walk(
    scores,
    found,
    found_key,
    low,
    high,
    a,
    until,
    capacity,
    TIES: tl.constexpr,
    TOP: tl.constexpr,
    DEEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Keep what is above a and, with TIES, keys before `until` of what is a; return how many those are."""
    kept = tl.zeros((), tl.int32)
    for first in range(low, high, DEEP * WIDE):
        t = _keys(first, DEEP, WIDE)
        x = tl.load(scores + t, mask=t < high, other=float("-inf"))
        kept = _keep(found, found_key, t, x, a, until, kept, capacity, TIES, TOP)
    return kept


@triton.jit
def _above(scores, low, high, pivot, TOP: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr):
    """Return how many keys of a row are above a pivot."""
    above = tl.zeros((), tl.int32)
    for first in range(low, high, DEEP * WIDE):
        order = _orders(scores, _keys(first, DEEP, WIDE), high, TOP)
        above += tl.sum(tl.sum((order > pivot).to(tl.int32), axis=1), axis=0)
    return above


@triton.jit
def _ties(scores, low, value, until, TOP: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr):
    """Return how many keys before `until` have a value."""
    ties = tl.zeros((), tl.int32)
    for first in range(low, until, DEEP * WIDE):
        order = _orders(scores, _keys(first, DEEP, WIDE), until, TOP)
        ties += tl.sum(tl.sum((order == value).to(tl.int32), axis=1), axis=0)
    return ties


@triton.jit
def _best(
    scores, found, found_key, low, high, topk, capacity,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, ORDER: tl.constexpr, SAMPLE: tl.constexpr, DEEP: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Keep the best topk of more keys than there is room for, and what else is above a pivot; return how many."""
    a = _pivot(scores, low, high - low, topk, capacity, BOTTOM, TOP, ORDER, SAMPLE)
    kept = _walk(scores, found, found_key, low, high, a, low, capacity, False, TOP, DEEP, WIDE)
    short = (kept < topk) & (a > BOTTOM)
    if (kept > capacity) | short:
        # At least topk keys are above a, or it is BOTTOM, and fewer are above b.
        more, fewer, b = kept, tl.zeros((), tl.int32), tl.full((), TOP, ORDER)
        if short:
            b, fewer, a, more = a, kept, tl.full((), BOTTOM, ORDER), high - low
        while (a + 1 < b) & (more > capacity):
            pivot = between(a, b)
            over = _above(scores, low, high, pivot, TOP, DEEP, WIDE)
            if over < topk:
                b, fewer = pivot, over
            else:
                a, more = pivot, over
        until = low
        if more > capacity:
            # Too many have the one value b: its first keys are enough.
            a, last = b, high
            while until + 1 < last:
                middle = between(until, last)
                enough = fewer + _ties(scores, low, a, middle, TOP, DEEP, WIDE) >= topk
                last = tl.where(enough, middle, last)
                until = tl.where(enough, until, middle)
            until = last
        tl.debug_barrier()
        kept = _walk(scores, found, found_key, low, high, a, until, capacity, True, TOP, DEEP, WIDE)
    return kept


@triton.jit(do_not_specialize=["sk", "topk", "capacity", "first_line", "offset", "scores_batch", "scores_row"])
def keep_kernel(
    scores,
    start,
    end,
    found,
    found_key,
    count,
    sk,
    topk,
    capacity,
    first_line,
    offset,
    scores_batch,
    scores_row,
    start_batch,
    start_row,
    end_batch,
    end_row,
    RATIO: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BOTTOM: tl.constexpr,
    TOP: tl.constexpr,
    ORDER: tl.constexpr,
    SAMPLE: tl.constexpr,
    DEEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Keep at least the best topk keys of a row that score above -inf, and at most capacity, in no order.

    Where there is room for all keys all are kept, -inf or not; else only what is above it.

    found: [lines, capacity], int64 of a score's bits and key, or bits alone with found_key beside them. Rows of all
    batches are lines from `first_line` on; capacity is at least topk.   count: int32 [lines], how many are kept.
    """
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    line = first_line + batch * tl.num_programs(0) + row
    scores += batch * scores_batch + row.to(tl.int64) * scores_row
    found += line * capacity
    if found_key is not None:
        found_key += line * capacity
    if start is not None:
        start += batch * start_batch
    if end is not None:
        end += batch * end_batch
    rows = row + tl.arange(0, 1)
    lows, highs = row_bounds(rows, rows >= 0, sk, start, end, start_row, end_row, offset, RATIO, HAS_OFFSET)
    low, high = tl.max(lows, axis=0), tl.max(highs, axis=0)
    n = tl.maximum(high - low, 0)

    if n <= capacity:
        for first in range(low, high, DEEP * WIDE):
            t = _keys(first, DEEP, WIDE)
            x = tl.load(scores + t, mask=t < high, other=float("-inf"))
            put(found, found_key, t - low, bits_of(x), t, t < high)
        tl.store(count + line, n)
    else:
        kept = _best(scores, found, found_key, low, high, topk, capacity, BOTTOM, TOP, ORDER, SAMPLE, DEEP, WIDE)
        tl.store(count + line, kept)
