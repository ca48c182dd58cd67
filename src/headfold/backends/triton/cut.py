"""The best topk of a row of scores, or of what was kept of one, in no order: a cut found by bisection."""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.orders import (
    TOGETHER,
    between,
    bits_of,
    by_warp,
    numbered,
    numbered_apart,
    ordered,
    places,
    scores_of,
    spots,
    taken,
)
from headfold.backends.triton.pivots import count_true, narrowed, pivots, tally, totals

# Keys that a thread takes at a time of what it does not hold.
PART = tl.constexpr(8)
# What is cut.
ROW, LISTED = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def part(
    row, keys, first, n,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, KIND: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the orders of places from `first` on, DEEP of each thread, of those past n BOTTOM, and their keys.

    KIND: ROW of scores, whose first key is `keys`; LISTED, in lists of warps, of bits and keys.
    """
    if KIND == LISTED:
        i = spots(first, DEEP, WIDE)
        live = i < n
        bits, key = taken(row, keys, i, live)
    else:
        i = places(first, DEEP, WIDE)
        live = i < n
        bits = bits_of(tl.load(row + i, mask=live, other=float("-inf")))
        key = keys + i
    return tl.where(live, ordered(bits, TOP), BOTTOM), key


@triton.jit
def _ends(order, BOTTOM: tl.constexpr, TOP: tl.constexpr):
    """Return of each thread: the least of its orders above BOTTOM, or TOP, the greatest, and how many are above it."""
    seen = order > BOTTOM
    return tl.min(tl.where(seen, order, TOP), axis=1), tl.max(order, axis=1), tl.sum(seen.to(tl.int32), axis=1)


@triton.jit
def _count(
    order, row, keys, n, longest, lower, middle, upper,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, KIND: tl.constexpr, HELD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return how many orders of a row are above each of three pivots; its first places are `order`.

    A call of its own: Triton 3.4 dies of a branch that is written out in a `for` within a `while`.
    """
    TOOK: tl.constexpr = TOGETHER if KIND == LISTED else WIDE
    OFTEN: tl.constexpr = (1023 - HELD) // PART
    each = tally(order, lower, middle, upper)
    over, over_middle, over_upper = tl.zeros((), tl.int32), tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for first in range(HELD * TOOK, longest, PART * TOOK):
        if (first // TOOK - HELD) // PART % OFTEN == OFTEN - 1:
            some, some_middle, some_upper = totals(each)
            over, over_middle, over_upper = over + some, over_middle + some_middle, over_upper + some_upper
            each = tl.zeros_like(each)
        other, _ = part(row, keys, first, n, BOTTOM, TOP, KIND, PART, WIDE)
        each += tally(other, lower, middle, upper)
    some, some_middle, some_upper = totals(each)
    return over + some, over_middle + some_middle, over_upper + some_upper


@triton.jit
def _find(
    order, row, keys, n, longest, many, topk, end, a, b,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, KIND: tl.constexpr, HELD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return (order, key): the best topk of a row are above the order, or have it with a smaller key.

    order: of the first places, which stay in registers; others are read again for each step.   end: past all keys.
    a, b: as of `cut`.
    """
    TOOK: tl.constexpr = TOGETHER if KIND == LISTED else WIDE
    more, fewer = many, tl.zeros((), tl.int32)
    if a > BOTTOM:
        fewer = count_true(order > b)
        for first in range(HELD * TOOK, longest, PART * TOOK):
            other, _ = part(row, keys, first, n, BOTTOM, TOP, KIND, PART, WIDE)
            fewer += count_true(other > b)
    if (a == BOTTOM) | (fewer > topk):
        least, greatest, seen = _ends(order, BOTTOM, TOP)
        for first in range(HELD * TOOK, longest, PART * TOOK):
            other, _ = part(row, keys, first, n, BOTTOM, TOP, KIND, PART, WIDE)
            some_least, some_greatest, some_seen = _ends(other, BOTTOM, TOP)
            least, greatest = tl.minimum(least, some_least), tl.maximum(greatest, some_greatest)
            seen += some_seen
        known, some = a > BOTTOM, tl.sum(seen, axis=0)
        a, more = tl.where(known, b, tl.min(least, axis=0) - 1), tl.where(known, fewer, some)
        b, fewer = tl.max(greatest, axis=0), tl.zeros((), tl.int32)
    if more <= topk:
        a, b = tl.full((), BOTTOM, order.dtype), tl.full((), BOTTOM, order.dtype)
    # More than topk are above a, and at most topk above b.
    steps = tl.zeros((), tl.int32)
    while (a + 1 < b) & (fewer < topk):
        lower, middle, upper = pivots(a, b, more, fewer, topk, steps, TOP)
        over, over_middle, over_upper = _count(
            order, row, keys, n, longest, lower, middle, upper, BOTTOM, TOP, KIND, HELD, WIDE
        )
        a, b, more, fewer = narrowed(a, b, more, fewer, topk + 1, lower, middle, upper, over, over_middle, over_upper)
        steps += 1
    until = tl.zeros((), tl.int32)
    if (fewer < topk) & (b > BOTTOM):
        # The smallest keys of those that are b: a key past as many as are wanted, and no more.
        last, before = until + end, more
        while (until + 1 < last) & (before > topk):
            middle_key = between(until, last)
            ties = tl.zeros((), tl.int32)
            for first in range(0, longest, PART * TOOK):
                other, key = part(row, keys, first, n, BOTTOM, TOP, KIND, PART, WIDE)
                ties += count_true((other == b) & (key < middle_key))
            enough = fewer + ties >= topk
            last, before = tl.where(enough, middle_key, last), tl.where(enough, fewer + ties, before)
            until = tl.where(enough, until, middle_key)
        until = last
    return b, until


@triton.jit
def _write_lists(
    order, lists, keys, n, longest, order_cut, key_cut, indices, results,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, HELD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write what is chosen of lists, and return how many they are: counted first, so that no warp waits for another."""
    each = tl.sum((order > order_cut).to(tl.int32), axis=1)
    for first in range(HELD * TOGETHER, longest, PART * TOGETHER):
        other, _ = part(lists, keys, first, n, BOTTOM, TOP, LISTED, PART, WIDE)
        each += tl.sum((other > order_cut).to(tl.int32), axis=1)
    if key_cut > 0:
        for first in range(0, longest, PART * TOGETHER):
            other, key = part(lists, keys, first, n, BOTTOM, TOP, LISTED, PART, WIDE)
            each += tl.sum(((other == order_cut) & (key < key_cut)).to(tl.int32), axis=1)
    many = tl.sum(by_warp(each), axis=1)
    before = tl.cumsum(many, axis=0) - many
    for first in range(0, longest, PART * TOGETHER):
        other, key = part(lists, keys, first, n, BOTTOM, TOP, LISTED, PART, WIDE)
        chosen = (other > order_cut) | ((other == order_cut) & (key < key_cut))
        place, before = numbered_apart(chosen, before)
        _store(indices, results, place, key, other, chosen, TOP)
    return tl.sum(many, axis=0)


@triton.jit
def _write_row(
    order, row, first_key, n, order_cut, key_cut, indices, results,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, HELD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write what is chosen of a row of scores, and return how many they are."""
    written = tl.zeros((), tl.int32)
    for first in range(0, n, HELD * WIDE):
        if first > 0:
            order, _ = part(row, first_key, first, n, BOTTOM, TOP, ROW, HELD, WIDE)
        key = first_key + places(first, HELD, WIDE)
        chosen = order > order_cut
        if key_cut > 0:
            chosen = chosen | ((order == order_cut) & (key < key_cut))
        place, some = numbered(chosen)
        _store(indices, results, tl.max_contiguous(written + place, (2, 1)), key, order, chosen, TOP)
        written += some
    return written


@triton.jit
def _store(indices, results, place, key, order, chosen, TOP: tl.constexpr):
    tl.store(indices + place, key.to(indices.dtype.element_ty), mask=chosen)
    if results is not None:
        tl.store(results + place, scores_of(order, TOP), mask=chosen)


@triton.jit
def cut(
    order, row, keys, n, longest, many, topk, end, a, b, indices, results,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, KIND: tl.constexpr, HELD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the best topk of a row of n places, in no order, and return how many they are: none scores -inf.

    order: of the first HELD places of each thread, which stay in registers; others are read again for each step.
    row, keys, n: as of `part`.   longest: places of the longest list.
    many: places of them all.
    a: an order that all that count are above, or BOTTOM; b: one that probably at most topk are above.
    indices, results: where keys and scores of a row are written, dense; results may be None.   end: past all keys.
    """
    order_cut, key_cut = _find(order, row, keys, n, longest, many, topk, end, a, b, BOTTOM, TOP, KIND, HELD, WIDE)
    if KIND == LISTED:
        written = _write_lists(
            order, row, keys, n, longest, order_cut, key_cut, indices, results, BOTTOM, TOP, HELD, WIDE
        )
    else:
        written = _write_row(order, row, keys, n, order_cut, key_cut, indices, results, BOTTOM, TOP, HELD, WIDE)
    return written
