"""A search among orders: three pivots at a time, told apart by how many orders are above each."""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.orders import between, bits_of, by_warp, ordered, scores_of

# Of what is left on either side, how far from the likely place the outer pivots lie.
NEAR = tl.constexpr(0.2)
# The same where the first place is found as in a tail: then it is nearer, and those after it less so.
NEAR_FIRST, NEAR_SECOND, NEAR_THEN = tl.constexpr(0.1), tl.constexpr(0.15), tl.constexpr(0.3)
# Scores as large have no place told from them: infinity, NaN, and what float32 holds no difference of.
LARGE = tl.constexpr(1e38)


@triton.jit
def pivots(a, b, more, fewer, wanted, step, TOP: tl.constexpr, TAIL: tl.constexpr = False):
    """Return three orders between two that are not neighbours, in order, to find one that `wanted` are above.

    a, b, more, fewer: the two, and how many are above each, of one row or of several; of one that is done whatever is.
    step: of the search, from 0 on. Every fifth quarters the orders left, which is never slow; the others are quick
    where scores lie evenly, or with TAIL, where at first they thin out as those of a distribution's tail do.
    """
    middle = between(a, b)
    first, last = between(a, middle), between(middle, b)
    low, high = scores_of(a, TOP), scores_of(b, TOP)
    even = (step % 5 < 4) & (a < b) & (low > -LARGE) & (high < LARGE)
    low, high = tl.where(even, low, 0), tl.where(even, high, 0)
    share, near = (more - wanted).to(low.dtype) / tl.maximum(more - fewer, 1).to(low.dtype), NEAR
    if TAIL:
        # A logarithm of counts would be even: the first term of its series by (r - 1) / (r + 1) is near enough.
        bend = (more + fewer).to(low.dtype) / (more + wanted).to(low.dtype)
        share = tl.where(step == 0, share * bend, share)
        near = tl.where(step == 0, NEAR_FIRST, tl.where(step == 1, NEAR_SECOND, NEAR_THEN))
    likely = low + (high - low) * share
    closest = tl.minimum(tl.maximum(ordered(bits_of(likely), TOP), a + 1), b - 1)
    middle = tl.where(even, closest, middle)
    first = tl.where(even, ordered(bits_of(likely - (likely - low) * near), TOP), first)
    last = tl.where(even, ordered(bits_of(likely + (high - likely) * near), TOP), last)
    return tl.maximum(tl.minimum(first, middle), a + 1), middle, tl.minimum(tl.maximum(last, middle), b - 1)


@triton.jit
def count_true(which):
    """Return how many of [wide, deep] are true: one number of each thread crosses threads."""
    return tl.sum(tl.sum(which.to(tl.int32), axis=1), axis=0)


@triton.jit
def tally(order, first, middle, last):
    """Return how many of a thread's orders are above each of three pivots, three counts in one integer.

    They lie along the second axis. None of the pivots is below one before it. Of up to 1023 orders of a thread, tallies
    may be added up.
    """
    return tl.sum(
        tl.where(order > last, 0x100401, tl.where(order > middle, 0x401, tl.where(order > first, 1, 0))), axis=1
    )


@triton.jit
def totals(each):
    """Return three counts of all threads, fewer than 2 ** 20 of each, given what `tally` said of them [wide]."""
    # Two of a warp's counts fit one integer: lanes are added up in one instruction, and warps in one sum.
    near = tl.sum(by_warp((each & 0x3FF) | ((each & 0xFFC00) << 6)), axis=1).to(tl.uint32, bitcast=True)
    far = tl.sum(by_warp(each >> 20), axis=1)
    spread = (near & 0xFFFF).to(tl.int64) | ((near >> 16).to(tl.int64) << 20) | (far.to(tl.int64) << 40)
    every = tl.sum(spread, axis=0)
    return (every & 0xFFFFF).to(tl.int32), ((every >> 20) & 0xFFFFF).to(tl.int32), (every >> 40).to(tl.int32)


@triton.jit
def totals_of_rows(each):
    """Return three counts [rows], fewer than 2 ** 16 of each, given what `tally` said of threads [rows, wide]."""
    near = tl.sum((each & 0x3FF) | ((each & 0xFFC00) << 6), axis=1).to(tl.uint32, bitcast=True)
    return (near & 0xFFFF).to(tl.int32), (near >> 16).to(tl.int32), tl.sum(each >> 20, axis=1)


@triton.jit
def count_above(order, first, middle, last):
    """Return how many orders [wide, deep] are above each of three pivots, of which none is below one before it."""
    return totals(tally(order, first, middle, last))


@triton.jit
def _narrowed(a, b, more, fewer, least, pivot, over):
    up = over >= least
    down = (over < least) & (pivot < b)
    return tl.where(up, pivot, a), tl.where(down, pivot, b), tl.where(up, over, more), tl.where(down, over, fewer)


@triton.jit
def narrowed(a, b, more, fewer, least, first, middle, last, over, over_middle, over_last):
    """Return (a, b, more, fewer) after three pivots between a and b, in order, that so many are above.

    At least `least` are above a, which `more` are, and fewer above b, which `fewer` are.
    """
    a, b, more, fewer = _narrowed(a, b, more, fewer, least, first, over)
    a, b, more, fewer = _narrowed(a, b, more, fewer, least, middle, over_middle)
    return _narrowed(a, b, more, fewer, least, last, over_last)
