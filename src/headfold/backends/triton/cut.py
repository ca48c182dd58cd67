"""The best topk of what was kept of a row, moved to its front: a cut found by bisection, among ties by their keys."""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.keep import between, key_of, numbered, ordered, put


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
def _places(first, DEEP: tl.constexpr, WIDE: tl.constexpr):
    """Return places of a step, of which a thread takes DEEP."""
    return first + tl.arange(0, WIDE)[:, None] + tl.arange(0, DEEP)[None, :] * WIDE


@triton.jit
def _ties(found, found_key, many, value, until, TOP: tl.constexpr, HELD: tl.constexpr):
    """Return how many keys before `until` have a value."""
    ties = tl.zeros((), tl.int32)
    for first in range(0, many, HELD):
        i = first + tl.arange(0, HELD)
        tie = (_orders(found, found_key, i, many, TOP) == value) & (_keys(found, found_key, i, many) < until)
        ties += tl.sum((tie & (i < many)).to(tl.int32), axis=0)
    return ties


@triton.jit
def _find(found, found_key, many, topk, TOP: tl.constexpr, HELD: tl.constexpr):
    """Return (order, key): the best topk of `many` places are above the order, or have it with a smaller key.

    The first HELD orders stay in registers; others are read again for each pivot.
    """
    i = tl.arange(0, HELD)
    held = _orders(found, found_key, i, many, TOP)
    # More than topk are above a, and at most topk above b.
    b = tl.max(held, axis=0)
    a = tl.min(tl.where(i < many, held, b), axis=0) - 1
    for first in range(HELD, many, HELD):
        more = _orders(found, found_key, first + i, many, TOP)
        b = tl.maximum(b, tl.max(more, axis=0))
        a = tl.minimum(a, tl.min(tl.where(first + i < many, more, b), axis=0) - 1)
    fewer = tl.zeros((), tl.int32)
    while (a + 1 < b) & (fewer < topk):
        pivot = between(a, b)
        over = tl.sum((held > pivot).to(tl.int32), axis=0)
        for first in range(HELD, many, HELD):
            over += tl.sum((_orders(found, found_key, first + i, many, TOP) > pivot).to(tl.int32), axis=0)
        if over > topk:
            a = pivot
        else:
            b, fewer = pivot, over
    until = tl.zeros((), tl.int32)
    if fewer < topk:
        # The smallest keys of those that are b: the first key past as many as are wanted.
        last = tl.full((), 0x7FFFFFFF, tl.int32)
        while until + 1 < last:
            middle = between(until, last)
            enough = fewer + _ties(found, found_key, many, b, middle, TOP, HELD) >= topk
            last = tl.where(enough, middle, last)
            until = tl.where(enough, until, middle)
        until = last
    return b, until


@triton.jit
def _move(
    found, found_key, many, order_cut, key_cut,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Move what is above a cut and scores above -inf to the front, as orders, in no order; return how many that is."""
    moved = tl.zeros((), tl.int32)
    for first in range(0, many, DEEP * WIDE):
        i = _places(first, DEEP, WIDE)
        order, key = _orders(found, found_key, i, many, TOP), _keys(found, found_key, i, many)
        chosen = (order > BOTTOM) & ((order > order_cut) | ((order == order_cut) & (key < key_cut)))
        place, some = numbered(chosen)
        tl.debug_barrier()  # until all of the step is read: places never pass what was read
        put(found, found_key, moved + place, order, key, chosen)
        moved += some
    return moved


@triton.jit
def cut(
    found,
    found_key,
    many,
    topk,
    BOTTOM: tl.constexpr,
    TOP: tl.constexpr,
    HELD: tl.constexpr,
    DEEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Move the best topk of `many` places of a row to its front, as orders, in no order; return how many they are."""
    order_cut, key_cut = _least(found_key), tl.zeros((), tl.int32)
    if many > topk:
        order_cut, key_cut = _find(found, found_key, many, topk, TOP, HELD)
    moved = _move(found, found_key, many, order_cut, key_cut, BOTTOM, TOP, DEEP, WIDE)
    tl.debug_barrier()
    return moved


@triton.jit(do_not_specialize=["topk", "capacity"])
def cut_kernel(
    found,
    found_key,
    count,
    topk,
    capacity,
    BOTTOM: tl.constexpr,
    TOP: tl.constexpr,
    HELD: tl.constexpr,
    DEEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Cut a line of found [lines, capacity], as `keep_kernel` left it, and of its count [lines]."""
    line = tl.program_id(0).to(tl.int64)
    if found_key is not None:
        found_key += line * capacity
    many = cut(found + line * capacity, found_key, tl.load(count + line), topk, BOTTOM, TOP, HELD, DEEP, WIDE)
    tl.debug_barrier()
    tl.store(count + line, many)
