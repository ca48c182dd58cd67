"""The best keys of every row of a slab of scores, in no order: kept with some others, and cut to what is wanted.

One program takes one row. A sample of it says above which pivot the keys that are wanted lie, and some more; one
walk over the row keeps those. Where the sample was wrong, the pivot is bisected over the row itself until it
is right, and the walk is made again: the sample decides how long it takes, never what is selected in the end.

A row is kept and cut by one program: while a slab has so few rows that its programs wait for memory, cutting is free.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.cut import cut, read, seen
from headfold.backends.triton.orders import between, bits_of, evenly_between, numbered, ordered, put, scores_of
from headfold.backends.triton.visible import row_bounds

# Deviations of the sample's count that the pivot lies below the cut, where there is room to keep so many; a wrong
# sample costs time only.
DEVIATIONS = tl.constexpr(4.5)
# As a share of the sample's keys above it, by how many more than are wanted the pivot is near enough.
SLACK = tl.constexpr(32)


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
    more, fewer, steps = tl.full((), SAMPLE, tl.int32), tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    while a < high - 1:
        middle = between(a, high)
        if (steps % 2 == 1) & ((a < 0) == (high < 0)):
            middle = evenly_between(a, high, more, fewer, least)
        above = tl.sum((order > middle).to(tl.int32), axis=0)
        # At least `least` of the sample lie above `a`, fewer above `high`, unless few more do: then it is found.
        if above < least:
            high, fewer = middle, above
        else:
            a, more = middle, above
            if above <= least + least // SLACK:
                high = middle + 1
        steps += 1
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


@triton.jit(
    do_not_specialize=[
        *("sk", "topk", "capacity", "first_line", "offset"),
        *("scores_batch", "scores_row", "indices_batch", "indices_row", "results_batch", "results_row"),
    ]
)
def keep_kernel(
    scores,
    start,
    end,
    found,
    found_key,
    count,
    orders,
    keys,
    indices,
    results,
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
    indices_batch,
    indices_row,
    results_batch,
    results_row,
    RATIO: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BOTTOM: tl.constexpr,
    TOP: tl.constexpr,
    ORDER: tl.constexpr,
    SAMPLE: tl.constexpr,
    DEEP: tl.constexpr,
    HELD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the best topk keys of a row that score above -inf, in no order.

    found: [rows, capacity], int64 of bits and keys of what is kept of each, or bits alone with found_key beside them;
    capacity is at least topk, and neither is used for a row whose keys registers hold.   indices: the keys, unless
    those go to `keys` [lines, topk].   results: their scores.   orders: [lines, topk].   count: int32 [lines], how
    many there are. Each but count may be None. Rows of all batches are lines from `first_line` on.
    HELD: keys that a thread holds while the row is cut.
    """
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    room = batch * tl.num_programs(0) + row
    line = first_line + room
    scores += batch * scores_batch + row.to(tl.int64) * scores_row
    found += room * capacity
    if found_key is not None:
        found_key += room * capacity
    if orders is not None:
        orders += line * topk
    if results is not None:
        results += batch * results_batch + row.to(tl.int64) * results_row
    if keys is not None:
        written = keys + line * topk
    else:
        written = indices + batch * indices_batch + row.to(tl.int64) * indices_row
    if start is not None:
        start += batch * start_batch
    if end is not None:
        end += batch * end_batch
    rows = row + tl.arange(0, 1)
    lows, highs = row_bounds(rows, rows >= 0, sk, start, end, start_row, end_row, offset, RATIO, HAS_OFFSET)
    low, high = tl.max(lows, axis=0), tl.max(highs, axis=0)
    n = tl.maximum(high - low, 0)

    if n <= HELD * WIDE:
        kept = n
        order, key = seen(scores, low, n, TOP, HELD, WIDE)
    else:
        if n <= capacity:
            for first in range(low, high, DEEP * WIDE):
                t = _keys(first, DEEP, WIDE)
                x = tl.load(scores + t, mask=t < high, other=float("-inf"))
                put(found, found_key, t - low, bits_of(x), t, t < high)
            kept = n
        else:
            kept = _best(scores, found, found_key, low, high, topk, capacity, BOTTOM, TOP, ORDER, SAMPLE, DEEP, WIDE)
        tl.debug_barrier()
        order, key = read(found, found_key, 0, kept, TOP, HELD, WIDE)
    many = cut(order, key, found, found_key, kept, topk, orders, written, results, BOTTOM, TOP, HELD, WIDE)
    tl.store(count + line, many)
