"""The best topk of the lists of a few rows at once, in no order: a cut found by bisection, for each row its own.

A cut is a chain of steps that wait for each other, where rows wait together. Each has warps of its own, so that what is
one number of a row is worked out by those alone. Tensors are [rows, deep, wide]: a thread holds what lies along the
second axis, of one row, and all places of it are held.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.orders import between, bits_of, ordered, scores_of
from headfold.backends.triton.pivots import narrowed, pivots, tally, totals_of_rows
from headfold.backends.triton.sift import LISTS, key_of_place


@triton.jit
def any_row(which):
    """Return whether something is true of a row."""
    return tl.max(which.to(tl.int32), axis=0) > 0


@triton.jit
def _of_rows(x):
    return x[:, None, None]


@triton.jit
def _deep(first, DEEP: tl.constexpr, WIDE: tl.constexpr):
    """Return places [1, DEEP, 1] of a row's lists that its first thread holds, from `first` on."""
    return first + (tl.arange(0, DEEP) * WIDE)[None, :, None]


@triton.jit
def _wide(WIDE: tl.constexpr):
    """Return how many places behind the first thread's those of a thread [1, 1, WIDE] lie."""
    return tl.arange(0, WIDE)[None, None, :]


@triton.jit
def orders_of(scores, n, first, BOTTOM: tl.constexpr, TOP: tl.constexpr, DEEP: tl.constexpr):
    """Return the orders [rows, DEEP, wide] of places from `first` on, and BOTTOM of those past the end of their list.

    scores: pointers [rows].   n: [rows, wide], places of the list that a thread meets.
    """
    WIDE: tl.constexpr = n.shape[1]
    deep, wide = _deep(first, DEEP, WIDE), _wide(WIDE)
    live = deep // LISTS < n[:, None, :] - wide // LISTS
    # In this order, as then a thread has one address, and distances that are known when it is compiled.
    bits = bits_of(tl.load(_of_rows(scores) + wide + deep, mask=live, other=float("-inf")))
    return tl.where(live, ordered(bits, TOP), BOTTOM)


@triton.jit
def _entries_of(entries, which, first):
    """Return the entries of those of places [rows, deep, wide] from `first` on that are asked for.

    entries: pointers [rows].
    """
    at = _of_rows(entries) + _wide(which.shape[2]) + _deep(first, which.shape[1], which.shape[2])
    return tl.load(at, mask=which, other=0)


@triton.jit
def _keys(entries):
    """Return the keys of entries [rows, deep, wide]."""
    return key_of_place(_wide(entries.shape[2]), entries)


@triton.jit
def _count(one, other):
    """Return how many are true [rows] of two tensors."""
    each = tl.sum(one.to(tl.int32), axis=1) + tl.sum(other.to(tl.int32), axis=1)
    return tl.sum(each, axis=1)


@triton.jit
def _find(held, rest, many, topk, a, b, BOTTOM: tl.constexpr, TOP: tl.constexpr):
    """Return (b, more, fewer) [rows]: at least topk are b or above, as `more` are, and fewer or as many are above b.

    BOTTOM for b where all are among the best.   The rest is as of `cut_lists`.
    """
    known, more = a > BOTTOM, many
    fewer = tl.where(known, _count(held > _of_rows(b), rest > _of_rows(b)), 0)
    beyond = (more > topk) & (~known | (fewer > topk))
    if any_row(beyond):
        greatest = tl.max(tl.maximum(tl.max(held, axis=1), tl.max(rest, axis=1)), axis=1)
        least = tl.min(tl.where(held > BOTTOM, held, TOP), axis=1)
        least = tl.min(tl.minimum(least, tl.min(tl.where(rest > BOTTOM, rest, TOP), axis=1)), axis=1)
        a, more = tl.where(beyond, tl.where(known, b, least - 1), a), tl.where(beyond & known, fewer, more)
        b, fewer = tl.where(beyond, greatest, b), tl.where(beyond, 0, fewer)
    b, fewer = tl.where(more > topk, b, BOTTOM), tl.where(more > topk, fewer, topk)
    # More than topk are above a, and at most topk above b.
    steps = tl.zeros((), tl.int32)
    looking = (a + 1 < b) & (fewer < topk)
    while any_row(looking):
        lower, middle, upper = pivots(a, b, more, fewer, topk, steps, TOP, True)
        first, second, third = _of_rows(lower), _of_rows(middle), _of_rows(upper)
        each = tally(held, first, second, third) + tally(rest, first, second, third)
        over, over_middle, over_upper = totals_of_rows(each)
        next_a, next_b, next_more, next_fewer = narrowed(
            a, b, more, fewer, topk + 1, lower, middle, upper, over, over_middle, over_upper
        )
        a, b = tl.where(looking, next_a, a), tl.where(looking, next_b, b)
        more, fewer = tl.where(looking, next_more, more), tl.where(looking, next_fewer, fewer)
        looking = (a + 1 < b) & (fewer < topk)
        steps += 1
    return b, more, fewer


@triton.jit
def _first_keys(held, rest, entries, topk, end, b, more, fewer, HELD: tl.constexpr):
    """Return [rows]: of the keys that are b those before this one are among the best; 0 where none are needed."""
    until = tl.zeros_like(b)
    tied = fewer < topk
    if any_row(tied):
        # A key past as many as are wanted, and no more.
        one, other = held == _of_rows(b), rest == _of_rows(b)
        last, before = until + end, more
        looking = tied & (before > topk)
        while any_row(looking):
            middle = between(until, last)
            ahead = one & (_keys(_entries_of(entries, one, 0)) < _of_rows(middle))
            others = other & (_keys(_entries_of(entries, other, HELD)) < _of_rows(middle))
            there = fewer + _count(ahead, others)
            enough = there >= topk
            last, before = tl.where(looking & enough, middle, last), tl.where(looking & enough, there, before)
            until = tl.where(looking & ~enough, middle, until)
            looking = tied & (until + 1 < last) & (before > topk)
        until = tl.where(tied, last, 0)
    return until


@triton.jit
def _chosen(order, entries, first, b, until, BOTTOM: tl.constexpr):
    """Return the orders of places from `first` on that are chosen, and BOTTOM for the others."""
    chosen = tl.where(order > _of_rows(b), order, BOTTOM)
    if any_row(until > 0):
        tie = order == _of_rows(b)
        chosen = tl.where(tie & (_keys(_entries_of(entries, tie, first)) < _of_rows(until)), order, chosen)
    return chosen


@triton.jit
def _halves(x):
    """Return the first and the second half of a tensor [rows, deep, wide] along its depth."""
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, HALF, x.shape[2])), (0, 2, 3, 1)))


@triton.jit
def _write_eight(order, entry, before, indices, results, BOTTOM: tl.constexpr, TOP: tl.constexpr):
    """Write what is chosen of a depth of eight behind `before` [rows], and return how many it is then behind.

    Neighbours of one depth are written side by side, and counted in eight bits of an integer.
    """
    tl.static_assert(order.shape[1] == 8 and order.shape[2] < 256)
    chosen = order > BOTTOM
    at = (8 * tl.arange(0, 8))[None, :, None]
    each = tl.sum(chosen.to(tl.int64) << at, axis=1)
    many = tl.sum(each, axis=1)
    every = (_of_rows(many) >> at) & 0xFF
    every = tl.broadcast_to(every.to(tl.int32), order.shape)
    upto = ((tl.cumsum(each, axis=1)[:, None, :] >> at) & 0xFF).to(tl.int32)
    # Said to be neighbours in pairs, as `numbered` does.
    place = tl.max_contiguous(_of_rows(before) + tl.cumsum(every, axis=1) - every + upto - 1, (1, 1, 2))
    tl.store(_of_rows(indices) + place, _keys(entry).to(indices.dtype.element_ty), mask=chosen)
    if results is not None:
        tl.store(_of_rows(results) + place, scores_of(order, TOP), mask=chosen)
    many = (many & 0x00FF00FF00FF00FF) + ((many >> 8) & 0x00FF00FF00FF00FF)
    many = (many & 0x0000FFFF0000FFFF) + ((many >> 16) & 0x0000FFFF0000FFFF)
    return before + ((many & 0xFFFF) + (many >> 32)).to(tl.int32)


@triton.jit
def _write_sixteen(order, entry, before, indices, results, BOTTOM: tl.constexpr, TOP: tl.constexpr):
    """Write what is chosen of a depth of sixteen as `_write_eight` does, eight after eight."""
    one, other = _halves(order)
    one_entry, other_entry = _halves(entry)
    before = _write_eight(one, one_entry, before, indices, results, BOTTOM, TOP)
    return _write_eight(other, other_entry, before, indices, results, BOTTOM, TOP)


@triton.jit
def _write(order, entry, before, indices, results, BOTTOM: tl.constexpr, TOP: tl.constexpr):
    """Write what is chosen of a depth of 32 as `_write_eight` does: eight after eight, whose places take few registers.

    Of one that called itself Triton 3.4 would find no key.
    """
    one, other = _halves(order)
    one_entry, other_entry = _halves(entry)
    before = _write_sixteen(one, one_entry, before, indices, results, BOTTOM, TOP)
    return _write_sixteen(other, other_entry, before, indices, results, BOTTOM, TOP)


@triton.jit
def cut_lists(
    held, rest, entries, many, topk, end, a, b, indices, results,
    BOTTOM: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Write the best topk of each row, in no order, and return how many they are [rows].

    held, rest: orders of all its places, the first and the others, 32 and 8 deep, as `orders_of` returns them.
    many: [rows], places.
    entries, indices, results: pointers [rows], to the lists' entries and to where keys and scores are written, dense;
    results may be None, or lie where the lists' scores do.   end: past all keys.
    a: [rows], an order that all places are above, or BOTTOM; b: one that probably at most topk are above.
    """
    HELD: tl.constexpr = held.shape[1] * held.shape[2]
    b, more, fewer = _find(held, rest, many, topk, a, b, BOTTOM, TOP)
    until = _first_keys(held, rest, entries, topk, end, b, more, fewer, HELD)
    held = _chosen(held, entries, 0, b, until, BOTTOM)
    rest = _chosen(rest, entries, HELD, b, until, BOTTOM)
    held_entries, rest_entries = _entries_of(entries, held > BOTTOM, 0), _entries_of(entries, rest > BOTTOM, HELD)
    written = _write(held, held_entries, tl.zeros_like(many), indices, results, BOTTOM, TOP)
    return _write_eight(rest, rest_entries, written, indices, results, BOTTOM, TOP)
