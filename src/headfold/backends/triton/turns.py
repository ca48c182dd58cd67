"""Turns that programs of one launch take: which block of rows each does, and which place in memory it has meanwhile.

There are `blocks` of rows, twice as many programs, and `abreast` places. A block that has to be done again, once at
most, goes to the next program that begins; the last ones wait until all are done. No program waits for one that has not
begun: a place is given back by a program that has it.

turns: int32 [COUNTERS + 2 * blocks], counters, and places that were given back.   queue: int32 [blocks], of blocks that
are to be done again. Both are zeros at first. Every thread has to see the same, so that one of them asks, by atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Places taken and given back; blocks begun, done, to be done again, and begun again; rows that are left to others.
TAKEN, GIVEN, BEGUN, DONE, FAILED, REPEATED, LEFT = (tl.constexpr(i) for i in range(7))
COUNTERS = tl.constexpr(8)


@triton.jit
def _published(at):
    """Return what another program writes to a place, once it is no longer zero."""
    x = tl.atomic_add(at, 0)
    while x == 0:
        x = tl.atomic_add(at, 0)
    return x


@triton.jit
def _failed(turns, queue):
    """Return a block that is to be done again and that no program has begun again, or -1."""
    block = tl.full((), -1, tl.int32)
    failed = tl.atomic_add(turns + FAILED, 0)
    if failed > 0:
        repeated = tl.atomic_add(turns + REPEATED, 0)
        if repeated < failed:  # noqa: SIM102 (what is asked next has an effect)
            if tl.atomic_cas(turns + REPEATED, repeated, repeated + 1) == repeated:
                block = _published(queue + repeated) - 1
    return block


@triton.jit
def begin(turns, queue, blocks):
    """Return a block: one that is to be done again, or the next one, or -1 where all are done."""
    block = _failed(turns, queue)
    if block < 0:
        turn = tl.atomic_add(turns + BEGUN, 1)
        if turn < blocks:
            # Under a causal bound the last rows see most keys: they are first.
            block = blocks - 1 - turn
        else:
            while (block < 0) & (tl.atomic_add(turns + DONE, 0) < blocks):
                block = _failed(turns, queue)
    return block


@triton.jit
def end(turns, queue, block, failed):
    """Say that a block that `begin` returned is done, or where rows of it failed, that it is to be done again."""
    if failed > 0:
        turn = tl.atomic_add(turns + FAILED, 1)
        tl.atomic_xchg(queue + turn, block + 1)
    else:
        tl.atomic_add(turns + DONE, 1)


@triton.jit
def take(turns, abreast):
    """Return a place that no other program has."""
    turn = tl.atomic_add(turns + TAKEN, 1)
    place = turn
    if turn >= abreast:
        place = _published(turns + COUNTERS + turn - abreast) - 1
    return place


@triton.jit
def give(turns, place):
    """Give a place back that `take` returned."""
    turn = tl.atomic_add(turns + GIVEN, 1)
    tl.atomic_xchg(turns + COUNTERS + turn, place + 1)
