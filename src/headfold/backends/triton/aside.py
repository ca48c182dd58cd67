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
from headfold.backends.triton.pivots import count_above, narrowed, pivots

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
    """Return (a, b, more): at least `least` of a sample are above a, which `more` are, and fewer above b.

    As they are given, but nearer: at most `slack` more than that are above a, unless b is its neighbour. Where what is
    given is not so, for a sample's NaN or -inf, what is returned may not be either.
    """
    steps = tl.zeros((), tl.int32)
    while (a + 1 < b) & (more > least + slack):
        lower, middle, upper = pivots(a, b, more, fewer, least + slack // 2, steps, TOP)
        over, over_middle, over_upper = count_above(order, lower, middle, upper)
        a, b, more, fewer = narrowed(a, b, more, fewer, least, lower, middle, upper, over, over_middle, over_upper)
        steps += 1
    return a, b, more


@triton.jit
def _quantile(share):
    """Return how many deviations above its mean a share of a normal distribution begins, to about 0.003.

    Hastings' approximation (Abramowitz and Stegun, 26.2.22), of the tail that is the smaller.
    """
    t = tl.sqrt(-2 * tl.log(tl.minimum(share, 1 - share)))
    far = t - (2.30753 + 0.27061 * t) / (1 + 0.99229 * t + 0.04481 * t * t)
    return tl.where(share > 0.5, -far, far)


@triton.jit
def _guess(mean, deviation, count, a, b, SAMPLE: tl.constexpr, TOP: tl.constexpr):
    """Return an order between two that about `count` of a sample are above, were it normal."""
    share = tl.minimum(tl.maximum(count / SAMPLE, 1 / SAMPLE), 1 - 1 / SAMPLE)
    likely = mean + deviation * _quantile(share).to(mean.dtype)
    return tl.maximum(tl.minimum(ordered(bits_of(likely), TOP), b - 1), a + 1)


@triton.jit
def sampled(
    scores, low, n, topk, capacity,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, SAMPLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return two pivots, from an even sample of the row: the cut probably between them, at most capacity keys above.

    Both are looked for from three guesses on, as scores that sum over many heads are nearly normal. Neither is past the
    order of an infinity, as what is above is told by comparing floats.
    """
    i = places(0, SAMPLE // WIDE, WIDE).to(tl.int64)
    x = tl.load(scores + low + i * n // SAMPLE)
    order = ordered(bits_of(x), TOP)
    share = topk.to(tl.float32) / n.to(tl.float32)
    # Lists are not equally long: an eighth of the room is left to those that are longer.
    spare = tl.maximum(capacity - capacity // 8 - topk, 0).to(tl.float32) / n.to(tl.float32) * SAMPLE / 2
    apart = tl.minimum(DEVIATIONS * tl.sqrt(SAMPLE * share * (1 - share)) + 2, spare)
    least, most = tl.ceil(SAMPLE * share + apart).to(tl.int32), tl.floor(SAMPLE * share - apart).to(tl.int32)
    slack, slack_upper = least // SLACK, most // SLACK_UPPER
    infinite: tl.constexpr = -BOTTOM - 1
    a = tl.minimum(tl.maximum(tl.min(tl.min(order, axis=1), axis=0) - 1, BOTTOM), infinite)
    b = tl.minimum(tl.max(tl.max(order, axis=1), axis=0), infinite)
    mean = tl.sum(tl.sum(tl.where(tl.abs(x) < ADDED, x, 0.0), axis=1), axis=0) / SAMPLE
    deviation = (tl.minimum(scores_of(b, TOP), ADDED) - tl.maximum(scores_of(a, TOP), -ADDED)) / RANGE
    lower = _guess(mean, deviation, least + slack / 2, a, b, SAMPLE, TOP)
    middle = tl.maximum(_guess(mean, deviation, SAMPLE * share, a, b, SAMPLE, TOP), lower)
    upper = tl.maximum(_guess(mean, deviation, most - slack_upper / 2, a, b, SAMPLE, TOP), middle)
    over, over_middle, over_upper = count_above(order, lower, middle, upper)
    every, none = tl.full((), SAMPLE, tl.int32), tl.zeros((), tl.int32)
    pivot = tl.full((), BOTTOM, order.dtype)
    if least <= SAMPLE:
        below, above, more, fewer = narrowed(
            a, b, every, none, least, lower, middle, upper, over, over_middle, over_upper
        )
        pivot, _, _ = _near(order, below, above, more, fewer, least, slack, TOP)
    pivot_upper = b
    if most > 0:
        wanted = most - slack_upper
        below, above, more, fewer = narrowed(
            a, b, every, none, wanted, lower, middle, upper, over, over_middle, over_upper
        )
        below, above, many = _near(order, below, above, more, fewer, wanted, slack_upper, TOP)
        pivot_upper = tl.where(many <= most, below, above)
    return pivot, tl.maximum(pivot_upper, pivot)


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
