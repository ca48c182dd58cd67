"""Scores as integers that have their order, alone or in one int64 with their keys, and how chosen ones are stored.

Equal zeros are equal, and one NaN is above all others. A float64 score leaves no room for its key: it lies beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Threads that keep a list of their own, and count what they put there without a barrier: a warp, or half of one.
TOGETHER = tl.constexpr(32)


@triton.jit
def bits_of(x):
    """Return a float's bits, as a signed integer of its width."""
    return x.to(tl.int64, bitcast=True) if x.dtype.primitive_bitwidth == 64 else x.to(tl.int32, bitcast=True)


@triton.jit
def ordered(bits, TOP: tl.constexpr):
    """Return signed integers in the order of the floats that have these bits: -0.0 is 0, NaN of either sign is TOP."""
    if bits.dtype.primitive_bitwidth == 64:
        order = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        nan = (bits & 0x7FFFFFFFFFFFFFFF) > 0x7FF0000000000000
    else:
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
    order = tl.where(order == -1, 0, order)  # only -0.0 is -1
    return tl.where(nan, TOP, order)


@triton.jit
def scores_of(order, TOP: tl.constexpr):
    """Return the floats that `ordered` made these integers of."""
    if order.dtype.primitive_bitwidth == 64:
        bits = tl.where(order == TOP, 0x7FF8000000000000, order ^ ((order >> 63) & 0x7FFFFFFFFFFFFFFF))
        x = bits.to(tl.float64, bitcast=True)
    else:
        bits = tl.where(order == TOP, 0x7FC00000, order ^ ((order >> 31) & 0x7FFFFFFF))
        x = bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def between(low, high):
    """Return the middle of two integers, rounded down, where their sum would overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def packed(order, key):
    """Return an int32 and a key as one int64. Of an order, it has the total order: ties go to the smaller key."""
    return (order.to(tl.int64) << 32) | (key ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def key_of(both):
    """Return the key of what is packed, as int64."""
    return (both & 0xFFFFFFFF) ^ 0x7FFFFFFF


@triton.jit
def put(found, found_key, at, order, key, mask):
    """Write orders (or bits) and keys to places of a row: in one int64 that holds both, else to two arrays.

    found, found_key: the start of what is kept of a row, of one or of each.
    """
    if found_key is None:
        tl.store(found + at, packed(order, key), mask=mask)
    else:
        tl.store(found + at, order, mask=mask)
        tl.store(found_key + at, key, mask=mask)


@triton.jit
def taken(found, found_key, at, mask):
    """Return the orders (or bits) and keys of places of a row that `put` wrote."""
    if found_key is None:
        both = tl.load(found + at, mask=mask, other=0)
        order, key = (both >> 32).to(tl.int32), key_of(both).to(tl.int32)
    else:
        order, key = tl.load(found + at, mask=mask, other=0), tl.load(found_key + at, mask=mask, other=0)
    return order, key


@triton.jit
def places(first, DEEP: tl.constexpr, WIDE: tl.constexpr):
    """Return places [WIDE, DEEP] from `first` on, of which a thread takes DEEP."""
    return first + tl.arange(0, WIDE)[:, None] + tl.arange(0, DEEP)[None, :] * WIDE


@triton.jit
def spots(first, DEEP: tl.constexpr, WIDE: tl.constexpr):
    """Return places [WIDE, DEEP] of lists from `first` on, of which a thread takes DEEP: each warp of its own list."""
    return first + (tl.arange(0, WIDE) % TOGETHER)[:, None] + tl.arange(0, DEEP)[None, :] * TOGETHER


# Places are no neighbours, but said to be in pairs: then every Triton stores them from the threads that they are in. It
# is safe where masks depend on data, as stores are never merged beyond what their masks share, and has to be said where
# places are computed.
@triton.jit
def numbered(one):
    """Return the sum of what stands before each of [wide, deep], thread by thread, and the sum of all.

    Of what is 1 for what is chosen, and else 0, they are places from 0 on. A thread holds a row: of the sum over all
    of them only one value a row crosses threads.
    """
    one = one.to(tl.int32)
    each = tl.sum(one, axis=1)
    place = (tl.cumsum(each, axis=0) - each)[:, None] + (tl.cumsum(one, axis=1) - one)
    return tl.max_contiguous(place, (2, 1)), tl.sum(each, axis=0)


@triton.jit
def by_warp(each):
    """Return what is of each thread [wide] as [warps, threads]."""
    return tl.reshape(each, (each.shape[0] // TOGETHER, TOGETHER))


@triton.jit
def by_thread(each):
    """Return what is of each warp and thread [warps, threads] as [wide, 1]."""
    return tl.reshape(each, (each.shape[0] * TOGETHER, 1))


@triton.jit
def numbered_apart(chosen, kept):
    """Return a place behind `kept` of its warp for each of what is chosen, and how many [warps] each then has."""
    one = chosen.to(tl.int32)
    each = by_warp(tl.sum(one, axis=1))
    before = by_thread(tl.cumsum(each, axis=1) - each + kept[:, None])
    place = before + (tl.cumsum(one, axis=1) - one)
    return tl.max_contiguous(place, (2, 1)), kept + tl.sum(each, axis=1)
