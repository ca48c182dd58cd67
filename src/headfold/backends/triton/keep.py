"""The best keys of every row of a slab of scores, in no order: some at sight, the others cut from what is near them.

One program takes one row. A sample of it says above which pivot the keys that are wanted probably lie, and above which
one probably none lies that is not. One walk over the row writes what is above the upper one to the results, and keeps
apart what lies between them, of which the best are cut. Where the sample was wrong, a pivot is looked for in the row
itself, and the walk is made again: the sample decides how long it takes, never what is selected in the end.

A row is kept and cut by one program: while a slab has so few rows that its programs wait for memory, cutting is free.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.cut import cut
from headfold.backends.triton.orders import between, bits_of, numbered, numbered_apart, ordered, put, scores_of, taken
from headfold.backends.triton.pivots import count_above, count_true, narrowed, pivots
from headfold.backends.triton.visible import row_bounds

# Deviations of the sample's count that the pivots lie from the cut, where there is room for what lies between; a wrong
# sample costs time only.
DEVIATIONS = tl.constexpr(4.5)
# As a share of the sample's keys above it, by how many more than are wanted the pivot is near enough.
SLACK = tl.constexpr(32)


@triton.jit
def _keys(first, DEEP: tl.constexpr, WIDE: tl.constexpr):
    """Return the DEEP · WIDE keys of a step of a walk."""
    return first + tl.arange(0, WIDE)[:, None] + tl.arange(0, DEEP)[None, :] * WIDE


@triton.jit
def _near(order, a, b, more, fewer, least, slack, TOP: tl.constexpr):
    """Return (a, b, more): at least `least` of a sample are above a, which `more` are, and fewer above b.

    As they are given, but nearer: at most `slack` more than that are above a, unless b is its neighbour.
    """
    steps = tl.zeros((), tl.int32)
    while (a + 1 < b) & (more > least + slack):
        lower, middle, upper = pivots(a, b, more, fewer, least, steps, TOP)
        over, over_middle, over_upper = count_above(order, lower, middle, upper)
        a, b, more, fewer = narrowed(a, b, more, fewer, least, lower, over)
        a, b, more, fewer = narrowed(a, b, more, fewer, least, middle, over_middle)
        a, b, more, fewer = narrowed(a, b, more, fewer, least, upper, over_upper)
        steps += 1
    return a, b, more


@triton.jit
def _sampled(
    scores, low, n, topk, capacity,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, SAMPLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return two pivots, from an even sample of the row, with probably the cut between them and at most capacity keys.

    Both are orders of numbers or infinities, as what is above is told by comparing floats.
    """
    i = _keys(0, SAMPLE // WIDE, WIDE).to(tl.int64)
    order = ordered(bits_of(tl.load(scores + low + i * n // SAMPLE)), TOP)
    share = topk.to(tl.float32) / n.to(tl.float32)
    spare = (capacity - topk).to(tl.float32) / n.to(tl.float32) * SAMPLE / 2
    apart = tl.minimum(DEVIATIONS * tl.sqrt(SAMPLE * share * (1 - share)) + 2, spare)
    least, most = tl.ceil(SAMPLE * share + apart).to(tl.int32), tl.floor(SAMPLE * share - apart).to(tl.int32)
    infinite: tl.constexpr = -BOTTOM - 1
    a = tl.minimum(tl.maximum(tl.min(tl.min(order, axis=1), axis=0) - 1, BOTTOM), infinite)
    b = tl.minimum(tl.max(tl.max(order, axis=1), axis=0), infinite)
    more, fewer = tl.full((), SAMPLE, tl.int32), tl.zeros((), tl.int32)
    if least > SAMPLE:
        a = a * 0 + BOTTOM
    else:
        a, _, more = _near(order, a, b, more, fewer, least, least // SLACK, TOP)
    upper = tl.full((), infinite, order.dtype)
    if most > 0:
        below, above, many = _near(order, a, b, more, fewer, most - most // SLACK, most // SLACK, TOP)
        upper = tl.where(many <= most, below, above)
    return a, upper


@triton.jit
def _above(x, pivot, TOP: tl.constexpr):
    """Return whether scores are above a pivot. NaN is above all."""
    # Nothing has the order -1, which would be -0.0 and equal to what is above it.
    return ~(x <= scores_of(tl.where(pivot == -1, -2, pivot), TOP))


@triton.jit
def _step(scores, found, found_key, t, x, a, b, sure, kept, capacity, TOP: tl.constexpr):
    """Put keys t with scores x aside that are above b, or above a alone, and return how many of each there are now.

    Where there is no room for both, this step puts none aside.
    """
    aside, best = _above(x, a, TOP), _above(x, b, TOP)
    place, many, many_near = numbered_apart(aside, best, sure, capacity - 1 - kept)
    if sure + many + kept + many_near <= capacity:
        put(found, found_key, place, bits_of(x), t, aside)
    return sure + many, kept + many_near


@triton.jit
def _walk(
    scores, found, found_key, low, n, a, b, capacity,
    TOP: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Put n keys aside that are above b, and from the end of the room those above a alone; return how many of each.

    Where there is no room for all of them, some are missing.
    """
    STEP: tl.constexpr = DEEP * WIDE
    sure, kept = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    whole = low + n // STEP * STEP
    t = _keys(low, DEEP, WIDE)
    x = tl.load(scores + t, mask=tl.full((WIDE, DEEP), low, tl.int32) < whole)
    for first in range(low, whole, STEP):
        t = _keys(first, DEEP, WIDE)
        more = tl.full((WIDE, DEEP), first + STEP, tl.int32) < whole
        coming = tl.load(scores + t + STEP, mask=more)  # it is on its way meanwhile
        sure, kept = _step(scores, found, found_key, t, x, a, b, sure, kept, capacity, TOP)
        x = coming
    if whole < low + n:
        t = _keys(whole, DEEP, WIDE)
        x = tl.load(scores + t, mask=t < low + n, other=float("-inf"))
        sure, kept = _step(scores, found, found_key, t, x, a, b, sure, kept, capacity, TOP)
    return sure, kept


@triton.jit
def _write(
    found, found_key, many, indices, results, DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the first keys that were put aside, and their scores."""
    for first in range(0, many, DEEP * WIDE):
        i = _keys(first, DEEP, WIDE)
        key, x = taken(found, found_key, i, i < many)
        tl.store(indices + i, key.to(indices.dtype.element_ty), mask=i < many)
        if results is not None:
            tl.store(results + i, x + 0.0, mask=i < many)  # -0.0 becomes 0.0


@triton.jit
def _count_row(
    scores, low, high, lower, middle, upper,
    TOP: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return how many keys of a row are above each of three pivots."""
    over, over_middle, over_upper = tl.zeros((), tl.int32), tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for first in range(low, high, DEEP * WIDE):
        t = _keys(first, DEEP, WIDE)
        order = ordered(bits_of(tl.load(scores + t, mask=t < high, other=float("-inf"))), TOP)
        some, some_middle, some_upper = count_above(order, lower, middle, upper)
        over, over_middle, over_upper = over + some, over_middle + some_middle, over_upper + some_upper
    return over, over_middle, over_upper


@triton.jit
def _ties(scores, low, value, until, TOP: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr):
    """Return how many keys before `until` have a value."""
    ties = tl.zeros((), tl.int32)
    for first in range(low, until, DEEP * WIDE):
        t = _keys(first, DEEP, WIDE)
        order = ordered(bits_of(tl.load(scores + t, mask=t < until, other=float("-inf"))), TOP)
        ties += count_true((order == value) & (t < until))
    return ties


@triton.jit
def _search(
    scores, found, found_key, low, high, topk, capacity,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Put the best topk aside, and at most capacity keys, whatever a sample said; return how many."""
    value = ordered(bits_of(tl.load(scores + low)), TOP) * 0
    a, b, more, fewer, steps = value + BOTTOM, value + TOP, high - low, (high - low) * 0, tl.zeros((), tl.int32)
    # At least topk keys are above a, or it is BOTTOM, and fewer are above b.
    while (a + 1 < b) & (more > capacity):
        lower, middle, upper = pivots(a, b, more, fewer, topk, steps, TOP)
        over, over_middle, over_upper = _count_row(scores, low, high, lower, middle, upper, TOP, DEEP, WIDE)
        a, b, more, fewer = narrowed(a, b, more, fewer, topk, lower, over)
        a, b, more, fewer = narrowed(a, b, more, fewer, topk, middle, over_middle)
        a, b, more, fewer = narrowed(a, b, more, fewer, topk, upper, over_upper)
        steps += 1
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
    kept = tl.zeros((), tl.int32)
    for first in range(low, high, DEEP * WIDE):
        t = _keys(first, DEEP, WIDE)
        bits = bits_of(tl.load(scores + t, mask=t < high, other=float("-inf")))
        order = ordered(bits, TOP)
        chosen = (order > a) | ((order == a) & (t < until))
        place, many = numbered(chosen)
        put(found, found_key, capacity - 1 - kept - place, bits, t, chosen)
        kept += many
    return kept


@triton.jit
def _best(
    scores, found, found_key, indices, results, low, high, topk, capacity, sk,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, SAMPLE: tl.constexpr, DEEP: tl.constexpr, HELD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Write the best topk of a row of more keys than there is room for, and return how many they are."""
    a, b = _sampled(scores, low, high - low, topk, capacity, BOTTOM, TOP, SAMPLE, WIDE)
    sure, kept = _walk(scores, found, found_key, low, high - low, a, b, capacity, TOP, DEEP, WIDE)
    if (sure > topk) | (sure + kept > capacity) | ((sure + kept < topk) & (a > BOTTOM)):
        tl.debug_barrier()
        sure = kept * 0
        kept = _search(scores, found, found_key, low, high, topk, capacity, BOTTOM, TOP, DEEP, WIDE)
    tl.debug_barrier()
    _write(found, found_key, sure, indices, results, DEEP, WIDE)
    indices += sure
    if results is not None:
        results += sure
    found += capacity - kept
    if found_key is not None:
        found_key += capacity - kept
    return sure + cut(found, found_key, kept, topk - sure, sk, indices, results, BOTTOM, TOP, True, HELD, WIDE)


@triton.jit(
    do_not_specialize=[
        *("sk", "topk", "capacity", "at_once", "first_line", "offset"),
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
    indices,
    results,
    sk,
    topk,
    capacity,
    at_once,
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
    SAMPLE: tl.constexpr,
    DEEP: tl.constexpr,
    HELD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the best topk keys of a row that score above -inf, in no order.

    indices: the keys [batches, rows, topk], dense along topk.   results: their scores, or None.
    count: int32, how many there are, of rows of all batches from first_line on.
    found: [batches, rows, capacity], int64 of bits and keys of what is kept apart, or bits alone with found_key beside
    them; capacity is at least topk.   at_once: keys of the longest row of which none is kept apart, at least capacity.
    SAMPLE: keys that are looked at first; 0 where no row has more than at_once.   DEEP, HELD: keys that a thread takes
    in a step of a walk, and of what is cut.
    """
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = batch * tl.num_programs(0) + row
    scores += batch * scores_batch + row.to(tl.int64) * scores_row
    indices += batch * indices_batch + row.to(tl.int64) * indices_row
    if results is not None:
        results += batch * results_batch + row.to(tl.int64) * results_row
    if start is not None:
        start += batch * start_batch
    if end is not None:
        end += batch * end_batch
    rows = row + tl.arange(0, 1)
    lows, highs = row_bounds(rows, rows >= 0, sk, start, end, start_row, end_row, offset, RATIO, HAS_OFFSET)
    low, high = tl.max(lows, axis=0), tl.max(highs, axis=0)
    n = tl.maximum(high - low, 0)

    if SAMPLE == 0:  # noqa: SIM114 (known when compiled: then there is no other way)
        many = cut(scores + low, low, n, topk, sk, indices, results, BOTTOM, TOP, False, HELD, WIDE)
    elif n <= at_once:
        many = cut(scores + low, low, n, topk, sk, indices, results, BOTTOM, TOP, False, HELD, WIDE)
    else:
        found += place * capacity
        if found_key is not None:
            found_key += place * capacity
        many = _best(
            scores, found, found_key, indices, results, low, high, topk, capacity, sk,
            BOTTOM, TOP, SAMPLE, DEEP, HELD, WIDE,
        )  # fmt: skip
    tl.store(count + first_line + place, many)
