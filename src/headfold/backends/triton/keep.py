"""The best keys of every row of a slab of scores, exactly, in the total order.

One program keeps one row. A sample of it says between which two pivots the cut lies; one walk over the row then takes
what is above both and lets what is between wait; the waiting ones are cut by bisection. Where the sample was wrong, or
more lie between than may wait, the pivots are bisected over the row itself until they are right, and the walk is made
again: the sample decides how long it takes, never what is kept. Kept keys are then sorted.

Scores are compared as integers of their own width that have their order: equal zeros, and one NaN above all others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.visible import row_bounds

# Deviations of the sample's count that the pivots lie apart on either side; a wrong sample costs time only.
DEVIATIONS = tl.constexpr(3.5)
# Bits of a count in the lower half of a pair of counts.
HALF, LOW_HALF = tl.constexpr(16), tl.constexpr(0xFFFF)


@triton.jit
def ordered(x, TOP: tl.constexpr):
    """Return signed integers of x's width in the order of x: -0.0 is 0, and NaN of either sign is TOP."""
    if x.dtype.primitive_bitwidth == 64:
        bits = x.to(tl.int64, bitcast=True)
        order = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        nan = (bits & 0x7FFFFFFFFFFFFFFF) > 0x7FF0000000000000
    else:
        bits = x.to(tl.int32, bitcast=True)
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
def _between(low, high):
    """Return the middle of two integers, rounded down, where their sum would overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _chunk(scores, first, high, fence, BOTTOM: tl.constexpr, TOP: tl.constexpr, STEP: tl.constexpr):
    """Return STEP keys of a row and their order, BOTTOM from `high` on; nothing from `fence` on is read."""
    t = first + tl.arange(0, STEP)
    order = ordered(tl.load(scores + t, mask=t < fence, other=0.0), TOP)
    return t, tl.where(t < high, order, BOTTOM)


@triton.jit
def packed(order, key):
    """Return int32 order and key as one int64 that has the total order: ties go to the smaller key."""
    return (order.to(tl.int64) << 32) | (key ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def key_of(both):
    """Return the key of what is packed, as int64."""
    return (both & 0xFFFFFFFF) ^ 0x7FFFFFFF


@triton.jit
def _put(found, found_key, at, order, key, mask):
    """Write orders and keys to places of a row: together where one int64 holds both, else to two arrays.

    found, found_key: the start of what is kept or of what waits, of one or of each.
    """
    if found_key is None:
        tl.store(found + at, packed(order, key), mask=mask)
    else:
        tl.store(found + at, order, mask=mask)
        tl.store(found_key + at, key, mask=mask)


@triton.jit
def _get(found, found_key, at, mask):
    """Read orders and keys back, zeros where not in mask."""
    x = tl.load(found + at, mask=mask, other=0)
    if found_key is None:
        order, key = (x >> 32).to(tl.int32), key_of(x).to(tl.int32)
    else:
        order, key = x, tl.load(found_key + at, mask=mask, other=0)
    return order, key


@triton.jit
def _pivots(scores, low, n, topk, BOTTOM: tl.constexpr, TOP: tl.constexpr, ORDER: tl.constexpr, SAMPLE: tl.constexpr):
    """Return two pivots, from an even sample of the row, between which its cut probably lies."""
    i = tl.arange(0, SAMPLE).to(tl.int64)
    order = ordered(tl.load(scores + low + i * n // SAMPLE), TOP)
    share = topk.to(tl.float32) / n.to(tl.float32)
    apart = DEVIATIONS * tl.sqrt(SAMPLE * share * (1 - share)) + 2
    most = tl.floor(SAMPLE * share - apart).to(tl.int32)
    least = tl.ceil(SAMPLE * share + apart).to(tl.int32)
    # At most `most` of the sample lie above `b`, at least `least` above `a`.
    a, a_high = tl.full((), BOTTOM, ORDER), tl.full((), TOP, ORDER)
    b_low, b = tl.full((), BOTTOM, ORDER), tl.full((), TOP, ORDER)
    if most < 0:
        b_low = b
    if least > SAMPLE:
        a_high = a
    while (a < a_high - 1) | (b_low < b - 1):
        a_next, b_next = _between(a, a_high), _between(b_low, b)
        counts = tl.sum((order > b_next).to(tl.int32) + ((order > a_next).to(tl.int32) << HALF), axis=0)
        above_b, above_a = counts & LOW_HALF, counts >> HALF
        a_high = tl.where(above_a < least, a_next, tl.where(above_a == least, a_next + 1, a_high))
        a = tl.where(above_a < least, a, a_next)
        b_low = tl.where(above_b > most, b_next, tl.where(above_b == most, b_next - 1, b_low))
        b = tl.where(above_b > most, b, b_next)
    return tl.minimum(a, b), b


@triton.jit
def _walk(
    scores,
    found,
    found_key,
    waiting,
    waiting_key,
    low,
    high,
    fence,
    a,
    b,
    topk,
    capacity,
    BOTTOM: tl.constexpr,
    TOP: tl.constexpr,
    STEP: tl.constexpr,
):
    """Keep what is above b, let what is above a alone wait, both in the order of keys; return their numbers."""
    above = tl.zeros((), tl.int32)
    between = tl.zeros((), tl.int32)
    for first in range(low // 16 * 16, high, STEP):
        t, order = _chunk(scores, first, high, fence, BOTTOM, TOP, STEP)
        over, under = order > b, (order > a) & (order <= b)
        tally = over.to(tl.int32) + (under.to(tl.int32) << HALF)
        place = tl.cumsum(tally, axis=0) - tally
        at = tl.where(over, above + (place & LOW_HALF), between + (place >> HALF))
        room = at < tl.where(over, topk, capacity)
        places, key_places = tl.where(over, found, waiting), None
        if found_key is not None:
            key_places = tl.where(over, found_key, waiting_key)
        _put(places, key_places, at, order, t, (over | under) & room)
        total = tl.sum(tally, axis=0)
        above += total & LOW_HALF
        between += total >> HALF
    return above, between


@triton.jit(do_not_specialize=["sk", "topk", "capacity", "first_line", "offset"])
def keep_kernel(
    scores,
    start,
    end,
    found,
    found_key,
    waiting,
    waiting_key,
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
    ALIGNED: tl.constexpr,
    BOTTOM: tl.constexpr,
    TOP: tl.constexpr,
    ORDER: tl.constexpr,
    SAMPLE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Keep the best topk keys of a row that score above -inf, in no order.

    found: [lines, topk], int64 of order and key, or orders alone with found_key beside them: what is kept. The rows of
    all batches are lines from `first_line` on.   waiting, waiting_key: as those, [batches, rows, capacity], what waits
    for the cut; capacity is at least topk.   count: int32 [lines], how many are kept.
    ALIGNED: whether rows begin at, and may be read up to, a multiple of 16 scores.
    """
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    here = batch * tl.num_programs(0) + row
    line = first_line + here
    scores += batch * scores_batch + row.to(tl.int64) * scores_row
    found += line * topk
    waiting += here * capacity
    if found_key is not None:
        found_key += line * topk
        waiting_key += here * capacity
    if start is not None:
        start += batch * start_batch
    if end is not None:
        end += batch * end_batch
    rows = row + tl.arange(0, 1)
    lows, highs = row_bounds(rows, rows >= 0, sk, start, end, start_row, end_row, offset, RATIO, HAS_OFFSET)
    low, high = tl.max(lows, axis=0), tl.max(highs, axis=0)
    n = tl.maximum(high - low, 0)
    fence = (high + 15) // 16 * 16 if ALIGNED else high

    a, b = tl.full((), BOTTOM, ORDER), tl.full((), TOP, ORDER)
    if n <= topk:
        b = a
    elif n > capacity:
        a, b = _pivots(scores, low, n, topk, BOTTOM, TOP, ORDER, SAMPLE)
    above, between = _walk(
        scores, found, found_key, waiting, waiting_key, low, high, fence, a, b, topk, capacity, BOTTOM, TOP, STEP
    )

    # The cut lies in (a, b]: at most topk keys are above b, and at least topk above a, or a is BOTTOM.
    crowded = (between > capacity) & (a + 1 < b)
    short = (above + between < topk) & (a > BOTTOM)
    if (above > topk) | short | crowded:
        more, fewer = above + between, above
        if above > topk:
            a, more, b, fewer = b, above, tl.full((), TOP, ORDER), tl.zeros((), tl.int32)
        elif short:
            b, fewer, a, more = a, above + between, tl.full((), BOTTOM, ORDER), n
        while (a + 1 < b) & (more - fewer > capacity):
            pivot = _between(a, b)
            over = tl.zeros((), tl.int32)
            for first in range(low // 16 * 16, high, STEP):
                _, order = _chunk(scores, first, high, fence, BOTTOM, TOP, STEP)
                over += tl.sum((order > pivot).to(tl.int32), axis=0)
            if over > topk:
                a, more = pivot, over
            else:
                b, fewer = pivot, over
        tl.debug_barrier()
        above, between = _walk(
            scores, found, found_key, waiting, waiting_key, low, high, fence, a, b, topk, capacity, BOTTOM, TOP, STEP
        )
    tl.debug_barrier()

    # Of those that wait, in the order of keys, take what is above b, and the first ones of what is b.
    wanted, between = topk - above, tl.minimum(between, capacity)
    taken = tl.zeros((), tl.int32)
    if wanted >= between:
        b, taken = a, between
    while (a + 1 < b) & (taken < wanted):
        pivot = _between(a, b)
        over = tl.zeros((), tl.int32)
        for first in range(0, between, STEP):
            i = first + tl.arange(0, STEP)
            order, _ = _get(waiting, waiting_key, i, i < between)
            over += tl.sum(((order > pivot) & (i < between)).to(tl.int32), axis=0)
        if over > wanted:
            a = pivot
        else:
            b, taken = pivot, over
    at_over, at_even = above, above + taken
    for first in range(0, between, STEP):
        i = first + tl.arange(0, STEP)
        order, key = _get(waiting, waiting_key, i, i < between)
        over, even = (order > b) & (i < between), (order == b) & (i < between)
        tally = over.to(tl.int32) + (even.to(tl.int32) << HALF)
        place = tl.cumsum(tally, axis=0) - tally
        at = tl.where(over, at_over + (place & LOW_HALF), at_even + (place >> HALF))
        _put(found, found_key, at, order, key, (over | even) & (at < topk))
        total = tl.sum(tally, axis=0)
        at_over += total & LOW_HALF
        at_even += total >> HALF
    tl.store(count + line, tl.minimum(at_even, topk))
