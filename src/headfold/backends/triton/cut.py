"""The best topk of what was kept of a row, in no order: a cut found by bisection, among ties by their keys."""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.orders import between, bits_of, evenly_between, key_of, numbered, ordered, scores_of


@triton.jit
def _least(found_key):
    """Return the least integer of an order's width, below all orders of what is kept."""
    return tl.full((), -(2**31), tl.int32) if found_key is None else tl.full((), -(2**63), tl.int64)


@triton.jit
def _orders(found, found_key, i, many, TOP: tl.constexpr):
    """Read bits back, as orders; of places that hold none, the least integer."""
    if found_key is None:
        order = ordered((tl.load(found + i, mask=i < many, other=0) >> 32).to(tl.int32), TOP)
    else:
        order = ordered(tl.load(found + i, mask=i < many, other=0), TOP)
    return tl.where(i < many, order, _least(found_key))


@triton.jit
def _keys(found, found_key, i, many):
    """Read keys back."""
    if found_key is None:
        key = key_of(tl.load(found + i, mask=i < many, other=0)).to(tl.int32)
    else:
        key = tl.load(found_key + i, mask=i < many, other=0)
    return key


@triton.jit
def read(found, found_key, first, many, TOP: tl.constexpr, HELD: tl.constexpr, WIDE: tl.constexpr):
    """Read orders and keys [WIDE, HELD] of places from `first` on, of which a thread takes HELD."""
    i = first + tl.arange(0, WIDE)[:, None] + tl.arange(0, HELD)[None, :] * WIDE
    return _orders(found, found_key, i, many, TOP), _keys(found, found_key, i, many)


@triton.jit
def seen(scores, low, n, TOP: tl.constexpr, HELD: tl.constexpr, WIDE: tl.constexpr):
    """Read orders and keys [WIDE, HELD] of a row itself, n keys from `low` on."""
    i = tl.arange(0, WIDE)[:, None] + tl.arange(0, HELD)[None, :] * WIDE
    bits = bits_of(tl.load(scores + low + i, mask=i < n, other=float("-inf")))
    order = ordered(bits, TOP)
    least: tl.constexpr = -(2**31) if scores.dtype.element_ty.primitive_bitwidth == 32 else -(2**63)
    return tl.where(i < n, order, least), low + i


@triton.jit
def _count(which):
    """Return how many of [WIDE, HELD] are true: one number of each thread crosses threads."""
    return tl.sum(tl.sum(which.to(tl.int32), axis=1), axis=0)


@triton.jit
def _find(
    order, key, found, found_key, many, topk,
    TOP: tl.constexpr, HELD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return (order, key): the best topk of `many` places are above the order, or have it with a smaller key.

    order, key: those of the first places, which stay in registers; others are read again for each pivot.
    """
    STEP: tl.constexpr = HELD * WIDE
    # More than topk are above a, and at most topk above b.
    b = tl.max(tl.max(order, axis=1), axis=0)
    a = tl.min(tl.min(tl.where(order == _least(found_key), b, order), axis=1), axis=0) - 1
    for first in range(STEP, many, STEP):
        other, _ = read(found, found_key, first, many, TOP, HELD, WIDE)
        b = tl.maximum(b, tl.max(tl.max(other, axis=1), axis=0))
        a = tl.minimum(a, tl.min(tl.min(tl.where(other == _least(found_key), b, other), axis=1), axis=0) - 1)
    more, fewer, steps = many, tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    while (a + 1 < b) & (fewer < topk):
        # By turns: one is quick where orders lie evenly, the other is never slow.
        pivot = between(a, b)
        if (steps % 2 == 0) & ((a < 0) == (b < 0)):  # else what lies between them may be more than an integer
            pivot = evenly_between(a, b, more, fewer, topk)
        over = _count(order > pivot)
        for first in range(STEP, many, STEP):
            other, _ = read(found, found_key, first, many, TOP, HELD, WIDE)
            over += _count(other > pivot)
        if over > topk:
            a, more = pivot, over
        else:
            b, fewer = pivot, over
        steps += 1
    until = tl.zeros((), tl.int32)
    if fewer < topk:
        # The smallest keys of those that are b: the first key past as many as are wanted.
        last = tl.full((), 0x7FFFFFFF, tl.int32)
        while until + 1 < last:
            middle = between(until, last)
            ties = _count((order == b) & (key < middle))
            for first in range(STEP, many, STEP):
                other, others = read(found, found_key, first, many, TOP, HELD, WIDE)
                ties += _count((other == b) & (others < middle))
            last = tl.where(fewer + ties >= topk, middle, last)
            until = tl.where(fewer + ties >= topk, until, middle)
        until = last
    return b, until


@triton.jit
def cut(
    order, key, found, found_key, many, topk, orders, keys, scores,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, HELD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the best topk of `many` keys of a row, in no order, and return how many they are: none scores -inf.

    order, key [WIDE, HELD]: of the first of them; of the others in found and found_key.   orders, keys, scores: where
    a row's are written, dense; None where they are not wanted.
    """
    order_cut, key_cut = _least(found_key), tl.zeros((), tl.int32)
    if many > topk:
        order_cut, key_cut = _find(order, key, found, found_key, many, topk, TOP, HELD, WIDE)
    written = tl.zeros((), tl.int32)
    for first in range(0, many, HELD * WIDE):
        if first > 0:
            order, key = read(found, found_key, first, many, TOP, HELD, WIDE)
        chosen = (order > BOTTOM) & ((order > order_cut) | ((order == order_cut) & (key < key_cut)))
        place, some = numbered(chosen)
        place += written
        tl.store(keys + place, key.to(keys.dtype.element_ty), mask=chosen)
        if orders is not None:
            tl.store(orders + place, order, mask=chosen)
        if scores is not None:
            tl.store(scores + place, scores_of(order, TOP), mask=chosen)
        written += some
    return written
