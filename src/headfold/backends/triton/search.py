"""The best of a row, put aside whatever a sample said of it: a pivot is looked for in the row itself."""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.orders import between, bits_of, numbered, ordered, places, put
from headfold.backends.triton.pivots import count_above, count_true, narrowed, pivots


@triton.jit
def _count_row(
    scores, low, high, lower, middle, upper,
    TOP: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return how many keys of a row are above each of three pivots."""
    over, over_middle, over_upper = tl.zeros((), tl.int32), tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for first in range(low, high, DEEP * WIDE):
        t = places(first, DEEP, WIDE)
        order = ordered(bits_of(tl.load(scores + t, mask=t < high, other=float("-inf"))), TOP)
        some, some_middle, some_upper = count_above(order, lower, middle, upper)
        over, over_middle, over_upper = over + some, over_middle + some_middle, over_upper + some_upper
    return over, over_middle, over_upper


@triton.jit
def _ties(scores, low, value, until, TOP: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr):
    """Return how many keys before `until` have a value."""
    ties = tl.zeros((), tl.int32)
    for first in range(low, until, DEEP * WIDE):
        t = places(first, DEEP, WIDE)
        order = ordered(bits_of(tl.load(scores + t, mask=t < until, other=float("-inf"))), TOP)
        ties += count_true((order == value) & (t < until))
    return ties


@triton.jit
def search(
    scores, found, found_key, low, high, topk, capacity,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Put the best topk aside, and at most capacity keys, whatever a sample said; return how many."""
    integer: tl.constexpr = tl.int64 if scores.dtype.element_ty.primitive_bitwidth == 64 else tl.int32
    a, b = tl.full((), BOTTOM, integer), tl.full((), TOP, integer)
    more, _, _ = _count_row(scores, low, high, a, a, a, TOP, DEEP, WIDE)
    fewer, steps = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    # At least topk keys are above a, or it is BOTTOM, and fewer are above b.
    while (a + 1 < b) & (more > capacity):
        lower, middle, upper = pivots(a, b, more, fewer, topk, steps, TOP)
        over, over_middle, over_upper = _count_row(scores, low, high, lower, middle, upper, TOP, DEEP, WIDE)
        a, b, more, fewer = narrowed(a, b, more, fewer, topk, lower, middle, upper, over, over_middle, over_upper)
        steps += 1
    until = low
    if more > capacity:
        # Too many have the one value b: its first keys are enough.
        a, last = b, high
        while (until + 1 < last) & (more > capacity):
            middle = between(until, last)
            before = fewer + _ties(scores, low, a, middle, TOP, DEEP, WIDE)
            enough = before >= topk
            last, more = tl.where(enough, middle, last), tl.where(enough, before, more)
            until = tl.where(enough, until, middle)
        until = last
    kept = tl.zeros((), tl.int32)
    for first in range(low, high, DEEP * WIDE):
        t = places(first, DEEP, WIDE)
        bits = bits_of(tl.load(scores + t, mask=t < high, other=float("-inf")))
        order = ordered(bits, TOP)
        chosen = (order > a) | ((order == a) & (t < until))
        place, many = numbered(chosen)
        put(found, found_key, tl.max_contiguous(kept + place, (2, 1)), bits, t, chosen)
        kept += many
    return kept
