"""A search among orders: three pivots at a time, told apart by how many orders are above each."""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.orders import between, bits_of, by_warp, ordered, scores_of

# Of what is left on either side, how far from the likely place the outer pivots lie.
NEAR = tl.constexpr(0.2)
# Scores as large have no place told from them: infinity, NaN, and what float32 holds no difference of.
LARGE = tl.constexpr(1e38)


@triton.jit
def pivots(a, b, more, fewer, wanted, step, TOP: tl.constexpr):
    """Return three orders between two that are not neighbours, in order, to find one that `wanted` are above.

    more, fewer: how many are above each.   step: of the search, from 0 on. Every fifth quarters the orders left, which
    is never slow; the others are quick where scores lie evenly.
    """
    middle = between(a, b)
    first, last = between(a, middle), between(middle, b)
    low, high = scores_of(a, TOP), scores_of(b, TOP)
    if (step % 5 < 4) & (low > -LARGE) & (high < LARGE):
        share = (more - wanted).to(low.dtype) / (more - fewer).to(low.dtype)
        likely = low + (high - low) * share
        middle = tl.minimum(tl.maximum(ordered(bits_of(likely), TOP), a + 1), b - 1)
        first = ordered(bits_of(likely - (likely - low) * NEAR), TOP)
        last = ordered(bits_of(likely + (high - likely) * NEAR), TOP)
    return tl.maximum(tl.minimum(first, middle), a + 1), middle, tl.minimum(tl.maximum(last, middle), b - 1)


@triton.jit
def count_true(which):
    """Return how many of [wide, deep] are true: one number of each thread crosses threads."""
    return tl.sum(tl.sum(which.to(tl.int32), axis=1), axis=0)


@triton.jit
def tally(order, first, middle, last):
    """Return how many of a thread's orders [wide, deep] are above each of three pivots, three counts in one integer.

    None of the pivots is below one before it. Of up to 1023 orders of a thread, tallies may be added up.
    """
    return tl.sum(
        tl.where(order > last, 0x100401, tl.where(order > middle, 0x401, tl.where(order > first, 1, 0))), axis=1
    )


@triton.jit
def totals(each):
    """Return three counts of all threads, fewer than 2 ** 20 of each, given what `tally` said of them."""
    # Two of a warp's counts fit one integer: lanes are added up in one instruction, and warps in one sum.
    near = tl.sum(by_warp((each & 0x3FF) | ((each & 0xFFC00) << 6)), axis=1).to(tl.uint32, bitcast=True)
    far = tl.sum(by_warp(each >> 20), axis=1)
    spread = (near & 0xFFFF).to(tl.int64) | ((near >> 16).to(tl.int64) << 20) | (far.to(tl.int64) << 40)
    every = tl.sum(spread, axis=0)
    return (every & 0xFFFFF).to(tl.int32), ((every >> 20) & 0xFFFFF).to(tl.int32), (every >> 40).to(tl.int32)


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
