"""Scores told apart while they are in registers: of each row, what lies above a pivot is listed, and nothing else kept.

A row has LISTS lists, each of the keys that one lane of a warp meets in every tile: what a thread lists it counts
itself, so that nothing crosses threads. Place p of list l lies at p · LISTS + l, as a score and, in 16 bits, which key
of a tile of which number it was.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold import sift_tiles
from headfold.backends.triton.forward import tile_scores
from headfold.backends.triton.products import load_rows, load_tile, tile_places
from headfold.backends.triton.visible import row_bounds, seen_by_all, seen_by_any

# Lists of a row, keys of a tile, and those of them that go to each list: two, which `_sifted` tells apart.
LISTS, KEYS = tl.constexpr(sift_tiles.LISTS), tl.constexpr(64)
MEMBERS = tl.constexpr(64 // sift_tiles.LISTS)
# The bits of a pivot that nothing but NaN is above.
INFINITY = tl.constexpr(0x7F800000)
# Lanes along the keys of a product: those of one warp lie in groups of so many, one group for each member.
LANES = tl.constexpr(8)


@triton.jit
def key_of_place(place, entry):
    """Return the key that an entry of a list stands for, given its place among the lists of its row."""
    one, entry = place % LISTS, entry.to(tl.int32) & 0xFFFF
    first = one // LANES * (LANES * MEMBERS) + one % LANES
    return entry // MEMBERS * KEYS + entry % MEMBERS * LANES + first


# A thread stores what it holds. Where Triton stores a tensor, each tile goes through shared memory first, between
# barriers, to lie as Triton would have it. Threads that hold the same score store it to the same place.
_STORE = tl.constexpr(f"""{{
    .reg .pred above;
    .reg .b16 entry;
    setp.gtu.f32 above, $1, $2;
    cvt.u16.u32 entry, $5;
    @above st.global.b32 [$3], $1;
    @above st.global.b16 [$4], entry;
    selp.b32 $0, {sift_tiles.LISTS}, 0, above;
}}""")


@triton.jit
def _listed(x, entry, pivot, place, end, scores, entries, ASSEMBLY: tl.constexpr):
    """List scores [LISTS, ROWS] that are above a pivot [ROWS] in the next place of each list, and return the one after.

    NaN is above all. Where a list is full, its last place is written again.   end: of each list, that place.
    """
    at = tl.minimum(place, end)
    if ASSEMBLY:
        wide = at.to(tl.int64)
        taken = tl.inline_asm_elementwise(
            _STORE,
            "=r,f,f,l,l,r",
            [x, pivot[None, :], scores.to(tl.int64) + wide * 4, entries.to(tl.int64) + wide * 2, entry],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        above = ~(x <= pivot[None, :])
        tl.store(scores + at, x, mask=above)
        tl.store(entries + at, tl.zeros_like(at).to(tl.int16) + entry.to(tl.int16), mask=above)
        taken = above.to(tl.int32) * LISTS
    return place + taken


@triton.jit
def _sifted(
    x, key, below, above, until, place, end, scores, entries,
    ROWS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """List what is above a pivot of a tile's scores [KEYS, ROWS], whose first key is `key`; return what `_listed` does.

    The pivot is `below` before the key `until`, and `above` from then on.
    """
    tl.static_assert(MEMBERS == 2)
    pivot = tl.where(key < until, below, above)
    x = tl.reshape(x, (LISTS // LANES, MEMBERS, LANES, ROWS))
    one, other = tl.split(tl.permute(x, (0, 2, 3, 1)))
    one, other = tl.reshape(one, (LISTS, ROWS)), tl.reshape(other, (LISTS, ROWS))
    entry = key // KEYS * MEMBERS
    place = _listed(one, entry, pivot, place, end, scores, entries, ASSEMBLY)
    return _listed(other, entry + 1, pivot, place, end, scores, entries, ASSEMBLY)


@triton.jit
def tile_queries(
    q, weights, first, rows, q_row, q_head, q_channel, weights_row, weights_head,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return what `tile_scores` takes of ROWS rows from `first` on: queries [D, ROWS * HEADS], weights, and heads."""
    each = tl.arange(0, ROWS * HEADS)
    row = (first + each // HEADS).to(tl.int64)
    head = each % HEADS
    real = (row < rows) & (head < H)
    places = q + row * q_row + head.to(tl.int64) * q_head
    queries = tl.trans(load_rows(places, real, q_channel, 0, D, D))
    if weights is not None:
        at = weights + row * weights_row + head.to(tl.int64) * weights_head
        factor = tl.load(at, mask=real, other=0.0).to(ACC)
    else:
        factor = real.to(ACC)
    return queries, factor, head


@triton.jit
def sift(
    scores, entries, counts, pivots, count, q, weights, k, line, block, sq, sk, offset, room, scale,
    q_row, q_head, q_channel, weights_row, weights_head, k_row, k_channel,
    RATIO: tl.constexpr, HAS_OFFSET: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, UNIFORM: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    UPCAST: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """List of a block of ROWS rows the keys that score above the pivots of their row, of those that are still wanted.

    scores, entries: float32 and int16 [lines, room, LISTS], written from `line` on.   counts: int32 [lines, LISTS], how
    many keys there are for each list, which has the first `room` of them but the last, and the last one.
    pivots: int32 [sq, 4], as `pivots_kernel` writes them.   count: int32 [sq], less than no keys where a row is wanted.
    ASSEMBLY: for NVIDIA's chips.   The rest is as of `score_slab`, of one batch element.
    """
    mine = tl.arange(0, ROWS)
    row = block * ROWS + mine
    inside = row < sq
    low, high = row_bounds(row, inside, sk, None, None, 0, 0, offset, RATIO, HAS_OFFSET)
    _, last = seen_by_any(
        low, high, block * ROWS, tl.minimum(block * ROWS + ROWS, sq), sk, None, None, offset, RATIO, HAS_OFFSET, UNIFORM
    )
    _, whole = seen_by_all(low, high, inside, block * ROWS, sk, None, None, offset, RATIO, HAS_OFFSET, UNIFORM)
    whole = tl.minimum(whole, last) // KEYS * KEYS

    queries, factor, head = tile_queries(
        q, weights, block * ROWS, sq, q_row, q_head, q_channel, weights_row, weights_head, H, D, HEADS, ROWS, ACC
    )
    wanted = tl.load(count + row, mask=inside, other=0) < 0
    below = tl.load(pivots + row * 4, mask=wanted, other=INFINITY).to(tl.float32, bitcast=True)
    above = tl.load(pivots + row * 4 + 1, mask=wanted, other=INFINITY).to(tl.float32, bitcast=True)
    # One for all rows, though each has its own: it takes a register less of each, and what else is listed is little.
    until = tl.max(tl.load(pivots + row * 4 + 2, mask=wanted, other=0), axis=0)
    one = tl.arange(0, LISTS)
    first = ((line + mine) * room * LISTS)[None, :] + one[:, None]
    place, end = first, first + (room - 1) * LISTS
    step = tl.arange(0, KEYS)
    # None is negative: signs would take as many registers again.
    keys = tile_places(step, k_row, k_channel, 0, D).to(tl.uint32).to(tl.int64)
    tile, tile_row = k, (tl.zeros((), tl.int32) + KEYS * k_row).to(tl.uint32).to(tl.int64)
    for key in tl.range(0, whole, KEYS, num_stages=STAGES):
        some = load_tile(tile, keys, D, D)
        tile += tile_row
        x = tile_scores(
            some, some, queries, queries, factor, head, scale, True, H, HEADS, 0, ROWS, KEYS, PRECISION, ACC, UPCAST
        )
        place = _sifted(x, key, below, above, until, place, end, scores, entries, ROWS, ASSEMBLY)
    for key in tl.range(whole, last, KEYS, num_stages=STAGES):
        t = key + step
        there = k + t.to(tl.int64) * k_row
        some = load_rows(there, t < sk, k_channel, 0, D, D)
        x = tile_scores(
            some, some, queries, queries, factor, head, scale, True, H, HEADS, 0, ROWS, KEYS, PRECISION, ACC, UPCAST
        )
        x = tl.where(t[:, None] < high[None, :], x, float("-inf"))
        place = _sifted(x, key, below, above, until, place, end, scores, entries, ROWS, ASSEMBLY)
    tl.store(counts + (line + mine)[None, :] * LISTS + one[:, None], (place - first) // LISTS)
