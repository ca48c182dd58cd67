"""A sorting network in registers: bitonic, over unsigned integers of 32 bits.

A score and its key need 64 bits, of which every exchange is several instructions. So it sorts what fits: the
leading bits of a score's distance from the least one, over the place that the score came from.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bit(AXIS: tl.constexpr, AXES: tl.constexpr):
    """Return 0 and 1 along an axis of two."""
    shape: tl.constexpr = [1] * AXIS + [2] + [1] * (AXES - 1 - AXIS)
    return tl.reshape(tl.arange(0, 2), shape)


@triton.jit
def _exchange(x, AXIS: tl.constexpr, AXES: tl.constexpr):
    """Put the larger of two along an axis first."""
    other = x ^ tl.xor_sum(x, AXIS, keep_dims=True)
    return tl.where(_bit(AXIS, AXES) != 0, tl.minimum(x, other), tl.maximum(x, other))


@triton.jit
def _exchange_warps(x, AXIS: tl.constexpr, LOG: tl.constexpr, LANES: tl.constexpr):
    """Exchange as `_exchange` does along an axis that lies on warps: neighbours in memory are neighbours on threads."""
    COUNT: tl.constexpr = 1 << LOG
    e = tl.arange(0, COUNT)
    flat = tl.reshape(tl.trans(tl.reshape(x, (1 << LANES, COUNT >> LANES))), (COUNT,))
    # LANES axes are those of the threads, the first of them the most significant.
    flat = tl.gather(flat, e ^ (1 << (LANES - 1 - AXIS)), 0)
    other = tl.reshape(tl.trans(tl.reshape(flat, (COUNT >> LANES, 1 << LANES))), [2] * LOG)
    return tl.where(_bit(AXIS, LOG) != 0, tl.minimum(x, other), tl.maximum(x, other))


@triton.jit
def descending(x, LOG: tl.constexpr, LANES: tl.constexpr):
    """Sort uint32 [2 ** LOG], of which no two are equal but zeros, the largest first.

    Runs that are to ascend are complemented while they are merged: then every exchange has one direction.   LANES: as
    of `places_by`; what they are more than the lanes of a warp are warps.
    """
    x = tl.reshape(x, [2] * LOG)
    for run in tl.static_range(1, LOG + 1):
        if run < LOG:
            complement = (-_bit(LOG - 1 - run, LOG)).to(tl.uint32, bitcast=True)
            x = x ^ complement
        for step in tl.static_range(0, run):
            if LOG - run + step < LANES - 5:
                x = _exchange_warps(x, LOG - run + step, LOG, LANES)
            else:
                x = _exchange(x, LOG - run + step, LOG)
        if run < LOG:
            x = x ^ complement
    return tl.reshape(x, (1 << LOG,))


@triton.jit
def places_by(order, live, LOG: tl.constexpr, LANES: tl.constexpr):
    """Return the places of live integers [2 ** LOG], int32, the largest first, by as many leading bits as fit.

    live: whether an integer counts; those that do stand first. Places of the others come last.   LANES: threads that
    neighbours lie on, as a power of two; they become the network's upper axes, which exchange least often.
    """
    COUNT: tl.constexpr = 1 << LOG
    place = tl.arange(0, COUNT)
    least = tl.min(tl.where(live, order, 0x7FFFFFFF), axis=0)
    apart = tl.where(live, order - least, 0).to(tl.uint32, bitcast=True)
    # Its exponent as a float is the number of its bits, or one more where rounding carries.
    exponent = (tl.max(apart, axis=0).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    shift = tl.maximum(exponent + 1 - (32 - LOG), 0).to(tl.uint32)
    both = ((apart >> shift) << LOG) | (COUNT - 1 - place).to(tl.uint32)
    both = tl.where(live, both, 0)
    both = tl.reshape(tl.trans(tl.reshape(both, (COUNT >> LANES, 1 << LANES))), (COUNT,))
    return COUNT - 1 - (descending(both, LOG, LANES) & (COUNT - 1)).to(tl.int32)
