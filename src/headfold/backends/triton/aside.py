"""What is put aside of a row of scores: what lies above a pivot that a sample says is below the cut.

The sample decides how long a selection takes, never what is selected: how much was put aside is counted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.orders import (
    TOGETHER,
    bits_of,
    numbered_apart,
    ordered,
    places,
    put,
    scores_of,
)
from headfold.backends.triton.pivots import count_above, count_true, narrowed, pivots

# Deviations of the sample's count that the pivots lie from the cut, where there is room for what lies between; a wrong
# sample costs time only.
DEVIATIONS = tl.constexpr(4.5)
# As a share of the sample's keys above it, by how many more than are wanted a pivot is near enough: the lower one says
# how much is put aside, the upper one only where the search for the cut begins.
SLACK, SLACK_UPPER = tl.constexpr(16), tl.constexpr(2)
# Deviations of a normal distribution from the least to the greatest of some thousand values.
RANGE = tl.constexpr(7.0)
# Scores as large as this are left out of a sample's mean: the others may be added up.
ADDED = tl.constexpr(1e30)


@triton.jit
def _near(order, a, b, more, fewer, least, slack, TOP: tl.constexpr):
    """Return (a, b, more, fewer): at least `least` of a sample are above a, which `more` are, and fewer above b.

    As they are given, but nearer: at most `slack` more than that are above a, unless b is its neighbour.
    """
    steps = tl.zeros((), tl.int32)
    while (a + 1 < b) & (more > least + slack):
        lower, middle, upper = pivots(a, b, more, fewer, least + slack // 2, steps, TOP)
        over, over_middle, over_upper = count_above(order, lower, middle, upper)
        a, b, more, fewer = narrowed(a, b, more, fewer, least, lower, middle, upper, over, over_middle, over_upper)
        steps += 1
    return a, b, more, fewer


@triton.jit
def _quantile(share):
    """Return how many deviations above its mean a share of a normal distribution begins, to about 0.003.

    Hastings' approximation (Abramowitz and Stegun, 26.2.22), of the tail that is the smaller.
    """
    t = tl.sqrt(-2 * tl.log(tl.minimum(share, 1 - share)))
    far = t - (2.30753 + 0.27061 * t) / (1 + 0.99229 * t + 0.04481 * t * t)
    return tl.where(share > 0.5, -far, far)


@triton.jit
def _guess(mean, deviation, share, a, b, count, TOP: tl.constexpr):
    """Return an order between two that about a share of a sample of so many is above, were it normal."""
    share = tl.minimum(tl.maximum(share, 1 / count), 1 - 1 / count)
    likely = mean + deviation * _quantile(share).to(mean.dtype)
    return tl.maximum(tl.minimum(ordered(bits_of(likely), TOP), b - 1), a + 1)


@triton.jit
def pivots_of(x, count, wanted, apart, BOTTOM: tl.constexpr, TOP: tl.constexpr):
    """Return two orders between which a sample's score that `wanted` are above lies, with `apart` more and fewer above.

    x: of a sample of `count` scores, -inf in places that are not of it.   wanted, apart: numbers of them, not rounded.
    Scores of -inf are not looked among: where too few others are in the sample, the lower one is BOTTOM.
    Both are looked for from three guesses on, as scores that sum over many heads are nearly normal. Neither is past the
    order of an infinity, as what is above is told by comparing floats.

    The lower one comes first, and what `_near` says of it: another above it, and how many are above each.
    """
    order = ordered(bits_of(x), TOP)
    least, most = tl.ceil(wanted + apart).to(tl.int32), tl.floor(wanted - apart).to(tl.int32)
    slack, slack_upper = least // SLACK, most // SLACK_UPPER
    infinite: tl.constexpr = -BOTTOM - 1
    lowest = tl.min(tl.min(tl.where(order > BOTTOM, order, TOP), axis=1), axis=0)
    real = count_true(order > BOTTOM)
    a = tl.minimum(lowest - 1, infinite - 1)
    b = tl.minimum(tl.max(tl.max(order, axis=1), axis=0), infinite)
    mean = tl.sum(tl.sum(tl.where(tl.abs(x) < ADDED, x, 0.0), axis=1), axis=0) / count
    deviation = (tl.minimum(scores_of(b, TOP), ADDED) - tl.maximum(scores_of(a, TOP), -ADDED)) / RANGE
    lower = _guess(mean, deviation, (least + slack / 2) / count, a, b, count, TOP)
    middle = tl.maximum(_guess(mean, deviation, wanted / count, a, b, count, TOP), lower)
    upper = tl.maximum(_guess(mean, deviation, (most - slack_upper / 2) / count, a, b, count, TOP), middle)
    over, over_middle, over_upper = count_above(order, lower, middle, upper)
    none = tl.zeros((), tl.int32)
    pivot, beyond, more, fewer = tl.full((), BOTTOM, order.dtype), tl.full((), BOTTOM, order.dtype), count, none
    if least <= real:
        below, above, some, few = narrowed(a, b, real, none, least, lower, middle, upper, over, over_middle, over_upper)
        pivot, beyond, more, fewer = _near(order, below, above, some, few, least, slack, TOP)
    pivot_upper = b
    if (most > 0) & (most <= real):
        wanted_upper = most - slack_upper
        below, above, some, few = narrowed(
            a, b, real, none, wanted_upper, lower, middle, upper, over, over_middle, over_upper
        )
        below, above, some, few = _near(order, below, above, some, few, wanted_upper, slack_upper, TOP)
        pivot_upper = tl.where(some <= most, below, above)
    return pivot, beyond, more, fewer, tl.maximum(pivot_upper, pivot)


@triton.jit
def sampled(
    scores, low, n, topk, capacity,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, SAMPLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return two pivots, from an even sample of the row: the cut probably between them, at most capacity keys above."""
    i = places(0, SAMPLE // WIDE, WIDE).to(tl.int64)
    x = tl.load(scores + low + i * n // SAMPLE)
    share = topk.to(tl.float32) / n.to(tl.float32)
    # Lists are not equally long: an eighth of the room is left to those that are longer.
    spare = tl.maximum(capacity - capacity // 8 - topk, 0).to(tl.float32) / n.to(tl.float32) * SAMPLE / 2
    apart = tl.minimum(DEVIATIONS * tl.sqrt(SAMPLE * share * (1 - share)) + 2, spare)
    pivot, _, _, _, pivot_upper = pivots_of(x, tl.full((), SAMPLE, tl.int32), SAMPLE * share, apart, BOTTOM, TOP)
    return pivot, pivot_upper


@triton.jit
def _above(x, pivot, TOP: tl.constexpr):
    """Return whether scores are above a pivot. NaN is above all."""
    # Nothing has the order -1, which would be -0.0 and equal to what is above it.
    return ~(x <= scores_of(tl.where(pivot == -1, -2, pivot), TOP))


@triton.jit
def _step(scores, found, found_key, t, x, pivot, kept, room, TOP: tl.constexpr):
    """Put keys t with scores x aside that are above a pivot; return how many each warp then has."""
    aside = _above(x, pivot, TOP)
    place, kept = numbered_apart(aside, kept)
    put(found, found_key, tl.max_contiguous(tl.minimum(place, room - 1), (2, 1)), bits_of(x), t, aside)
    return kept


@triton.jit
def walk(
    scores, found, found_key, low, n, pivot, room,
    TOP: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Put aside of n keys those above a pivot, and return how many [warps].

    found, found_key: where a thread's list starts [wide, 1], which its warp shares. It has `room` places: where it is
    too short, some are missing.
    """
    STEP: tl.constexpr = DEEP * WIDE
    kept = tl.zeros((WIDE // TOGETHER,), tl.int32)
    whole = low + n // STEP * STEP
    x = tl.load(scores + places(low, DEEP, WIDE), mask=tl.full((WIDE, DEEP), low, tl.int32) < whole)
    for first in range(low, whole, STEP):
        # What is taken next is on its way meanwhile, the last step once more: a mask would take an instruction a key.
        y = tl.load(
            scores + places(tl.minimum(first, whole - 2 * STEP) + STEP, DEEP, WIDE), eviction_policy="evict_first"
        )
        kept = _step(scores, found, found_key, places(first, DEEP, WIDE), x, pivot, kept, room, TOP)
        x = y
    if whole < low + n:
        t = places(whole, DEEP, WIDE)
        x = tl.load(scores + t, mask=t < low + n, other=float("-inf"))
        kept = _step(scores, found, found_key, t, x, pivot, kept, room, TOP)
    return kept
