"""The teacher of a loss on a GPU: the attention mass that each key of a slab of query rows gets, summed over heads.

Two passes over the keys, and nothing head-wide in memory but sums. The first finds the maximum and the sum of
exponentials of every row and head, in splits of keys that are joined in order. The second makes the logits of a tile
again, head after head, and adds up what softmax gives: one writer for a tile of mass. Widths that are not a power of
two are taken in chunks, 80 as 64 + 16 and 192 as 128 + 64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headfold.backends.triton.compare import bounds_of
from headfold.backends.triton.launch import launch
from headfold.backends.triton.products import ACCUMULATORS, precision
from headfold.backends.triton.table import arch_of, tile
from headfold.backends.triton.visible import bound_strides
from headfold.loss_slabs import SPLIT_KEYS

NEG_INF = tl.constexpr(float("-inf"))
INTERPRETED = not isinstance(bounds_of, triton.JITFunction)
JOINED = 1024


@triton.jit
def chunks(
    P, stride, HN: tl.constexpr, WIDE: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr, CAST: tl.constexpr
):
    """Load rows of width HN from pointers P [n]: COUNT chunks of WIDE columns and, unless it is 0, one of TAIL."""
    parts = ()
    for i in tl.static_range(COUNT):
        d = i * WIDE + tl.arange(0, WIDE)
        x = tl.load(P[:, None] + d[None, :] * stride)
        parts = parts + (x if CAST is None else x.to(CAST),)  # type: ignore[assignment]  # noqa: RUF005
    if TAIL > 0:
        d = COUNT * WIDE + tl.arange(0, TAIL)
        if HN == COUNT * WIDE + TAIL:
            x = tl.load(P[:, None] + d[None, :] * stride)
        else:
            x = tl.load(P[:, None] + d[None, :] * stride, mask=(d < HN)[None, :], other=0.0)
        parts = parts + (x if CAST is None else x.to(CAST),)  # type: ignore[assignment]  # noqa: RUF005
    return parts


@triton.jit
def logits(
    a, b, ROWS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):
    """Return a · bᵀ [ROWS, KEYS] of matrices that come in PARTS chunks."""
    s = tl.zeros((ROWS, KEYS), ACC)
    for i in tl.static_range(PARTS):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION, out_dtype=ACC)
    return s


@triton.jit(do_not_specialize=["offset"])
def sums_kernel(
    STATS,
    QUERY,
    KEY,
    MARKS,
    START,
    END,
    rows,
    n,
    width,
    heads,
    batches,
    group,
    stat_split,
    query_b,
    query_s,
    query_h,
    query_d,
    key_b,
    key_s,
    key_h,
    key_d,
    start_b,
    start_s,
    end_b,
    end_s,
    offset,
    factor: tl.float64,
    RATIO: tl.constexpr,
    HN: tl.constexpr,
    WIDE: tl.constexpr,
    COUNT: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    CAST: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the maximum and the sum of 2^(logit − maximum) of a block of rows, for one head and one split of the keys.

    STATS [2, splits, batches, heads, rows]: maxima (-inf without support), then sums. Logits are in units of ln 2.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(rows, ROWS)
    row = pid % blocks * ROWS + tl.arange(0, ROWS)
    pid = pid // blocks
    h = pid % heads
    pid = pid // heads
    b = (pid % batches).to(tl.int64)
    split = pid // batches
    alive = row < rows
    unit = (tl.zeros((), tl.float64) + factor).to(ACC)  # where it runs interpreted, a Python float
    lo, hi = bounds_of(START, END, b, row, alive, n, start_b, start_s, end_b, end_s, offset, RATIO)
    at = QUERY + b * query_b + h.to(tl.int64) * query_h + tl.minimum(row, rows - 1).to(tl.int64) * query_s
    q = chunks(at, query_d, HN, WIDE, COUNT, TAIL, CAST)
    keys = KEY + b * key_b + (h // group).to(tl.int64) * key_h
    m = tl.full((ROWS,), NEG_INF, ACC)
    l = tl.zeros((ROWS,), ACC)  # noqa: E741
    # Tiles that no row sees are skipped; those that all see are not masked.
    first = tl.maximum(split * SPLIT, tl.min(lo, 0) // KEYS * KEYS)
    last = tl.minimum(tl.minimum(split * SPLIT + SPLIT, n), tl.max(hi, 0))
    inner_lo = tl.max(tl.where(alive, lo, 0), 0)
    inner_hi = tl.min(tl.where(alive, hi, n), 0)
    for t0 in tl.range(first, last, KEYS):
        t = t0 + tl.arange(0, KEYS)
        if MARKS is not None:
            # Before the product: read behind it, marks bring all that follows to the layout that they are read in.
            place = (b * rows + row)[:, None] * width + t[None, :]
            marked = tl.load(MARKS + place, mask=alive[:, None] & (t < n)[None, :], other=0) != 0
        k = chunks(keys + tl.minimum(t, n - 1).to(tl.int64) * key_s, key_d, HN, WIDE, COUNT, TAIL, CAST)
        s = logits(q, k, ROWS, KEYS, COUNT + (TAIL > 0), ACC, PRECISION) * unit
        if MARKS is not None:
            s = tl.where(marked, s, NEG_INF)
        elif (t0 < inner_lo) | (t0 + KEYS > inner_hi):
            s = tl.where((t[None, :] >= lo[:, None]) & (t[None, :] < hi[:, None]), s, NEG_INF)
        larger = tl.maximum(m, tl.max(s, 1))
        base = tl.where(larger == NEG_INF, 0.0, larger)
        l = l * tl.exp2(m - base) + tl.sum(tl.exp2(s - base[:, None]), 1)  # noqa: E741
        m = larger
    out = STATS + split.to(tl.int64) * stat_split + (b * heads + h) * rows + row
    tl.store(out, m, mask=alive)
    tl.store(out + tl.cdiv(n, SPLIT).to(tl.int64) * stat_split, l, mask=alive)


@triton.jit
def join_kernel(STATS, splits, count, BLOCK: tl.constexpr):
    """Join the maxima and sums [2, splits, count] of all splits, in order, into those of the first."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    alive = i < count
    zero = tl.zeros((), tl.int64)
    sums = STATS + (zero + splits) * count
    m = tl.load(STATS + i, mask=alive, other=0.0)
    l = tl.load(sums + i, mask=alive, other=0.0)  # noqa: E741
    for split in range(1, splits):
        at = (zero + split) * count + i
        other = tl.load(STATS + at, mask=alive, other=0.0)
        larger = tl.maximum(m, other)
        base = tl.where(larger == NEG_INF, 0.0, larger)
        l = l * tl.exp2(m - base) + tl.load(sums + at, mask=alive, other=0.0) * tl.exp2(other - base)  # noqa: E741
        m = larger
    tl.store(STATS + i, m, mask=alive)
    tl.store(sums + i, l, mask=alive)


@triton.jit(do_not_specialize=["offset"])
def mass_kernel(
    MASS,
    STATS,
    QUERY,
    KEY,
    MARKS,
    START,
    END,
    rows,
    n,
    width,
    heads,
    batches,
    group,
    stat_split,
    query_b,
    query_s,
    query_h,
    query_d,
    key_b,
    key_s,
    key_h,
    key_d,
    start_b,
    start_s,
    end_b,
    end_s,
    offset,
    factor: tl.float64,
    RATIO: tl.constexpr,
    HN: tl.constexpr,
    WIDE: tl.constexpr,
    COUNT: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    CAST: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a tile of mass [batches, rows, width]: Σ over heads of softmax, 0 beyond the support and in the padding."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(width, KEYS)
    t = pid % blocks * KEYS + tl.arange(0, KEYS)
    first = pid % blocks * KEYS
    pid = pid // blocks
    blocks = tl.cdiv(rows, ROWS)
    row = pid % blocks * ROWS + tl.arange(0, ROWS)
    b = (pid // blocks).to(tl.int64)
    alive = row < rows
    unit = (tl.zeros((), tl.float64) + factor).to(ACC)  # where it runs interpreted, a Python float
    lo, hi = bounds_of(START, END, b, row, alive, n, start_b, start_s, end_b, end_s, offset, RATIO)
    live = (tl.max(hi, 0) > first) & (tl.min(lo, 0) < first + KEYS)
    queries = QUERY + b * query_b + tl.minimum(row, rows - 1).to(tl.int64) * query_s
    keys = KEY + b * key_b + tl.minimum(t, n - 1).to(tl.int64) * key_s
    maxima = STATS + b * heads * rows + row
    sums = maxima + tl.cdiv(n, SPLIT).to(tl.int64) * stat_split
    mass = tl.zeros((ROWS, KEYS), ACC)
    zero = tl.zeros((), tl.int64)
    # Hidden keys are made like the rest, and dropped at the end: whatever they are does not reach their neighbours.
    # The heads that share a key read it again each: held through the loop it would cost registers that there are not.
    for j in tl.range(0, tl.where(live, heads, 0)):
        h = zero + j
        m = tl.load(maxima + h * rows, mask=alive, other=0.0)
        l = tl.load(sums + h * rows, mask=alive, other=0.0)  # noqa: E741
        q = chunks(queries + h * query_h, query_d, HN, WIDE, COUNT, TAIL, CAST)
        k = chunks(keys + h // group * key_h, key_d, HN, WIDE, COUNT, TAIL, CAST)
        s = logits(q, k, ROWS, KEYS, COUNT + (TAIL > 0), ACC, PRECISION) * unit
        alone = l == 0  # no support: what is made here is dropped below
        mass += tl.exp2(s - tl.where(alone, 0.0, m)[:, None]) * (1 / tl.where(alone, 1.0, l))[:, None]
    place = (b * rows + row)[:, None] * width + t[None, :]
    if MARKS is not None:
        seen = tl.load(MARKS + place, mask=alive[:, None] & (t < n)[None, :], other=0) != 0
    else:
        seen = (t[None, :] >= lo[:, None]) & (t[None, :] < hi[:, None])
    tl.store(MASS + place, tl.where(seen, mass, 0.0), mask=alive[:, None] & (t < width)[None, :])


def fill_mass(
    mass: Tensor,
    stats: Tensor,
    query: Tensor,
    key: Tensor,
    marks: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    offset: int | None,
    ratio: int,
    n: int,
    softmax_scale: float,
) -> None:
    """Write into mass [b, rows, width] the sum over heads of softmax(query · key · softmax_scale) over the support.

    Columns beyond the support, the padding from n on, and rows without support are 0.

    query: [b, rows, np, hn].   key: [b, sk, np_k, hn], of which the first n are read.   marks: bytes [b, rows, width],
    not 0 for the support, or None where that is the range.   start, end, offset: of the slab's own rows.   stats: flat
    scratch of mass's dtype, 2 · splits · b · np · rows elements.
    """
    (b, rows, np, hn), np_k, width = query.shape, key.shape[2], mass.shape[2]
    splits = -(-n // SPLIT_KEYS)
    count = b * np * rows
    strides = (
        *query.stride(),
        *key.stride(),
        *bound_strides(start),
        *bound_strides(end),
        offset,
        softmax_scale / math.log(2),
    )
    first, second = (tile(name, arch_of(query.device), query.dtype, hn) for name in ("teacher sums", "teacher mass"))
    common = {
        "RATIO": ratio,
        "HN": hn,
        **widths(hn),
        "SPLIT": SPLIT_KEYS,
        **arithmetic(query.dtype, mass.dtype),
    }
    seen = marks, start, end, rows, n, width
    launch(
        sums_kernel,
        (triton.cdiv(rows, first.rows) * np * b * splits,),
        stats,
        query,
        key,
        *seen,
        np,
        b,
        np // np_k,
        count,
        *strides,
        **common,
        ROWS=first.rows,
        KEYS=first.keys,
        **first.options,
        num_stages=first.stages,
    )
    if splits > 1:
        launch(join_kernel, (triton.cdiv(count, JOINED),), stats, splits, count, BLOCK=JOINED)
    launch(
        mass_kernel,
        (triton.cdiv(width, second.keys) * triton.cdiv(rows, second.rows) * b,),
        mass,
        stats,
        query,
        key,
        *seen,
        np,
        b,
        np // np_k,
        count,
        *strides,
        **common,
        ROWS=second.rows,
        KEYS=second.keys,
        **second.options,
        num_stages=second.stages,
    )


def widths(hn: int) -> dict[str, int]:
    """Return the chunks of a head: as many of 64 or 128 columns as fit, and a power of two for the rest."""
    wide = 128 if hn >= 128 and hn % 64 == 0 else 64
    rest = hn % wide
    return {"WIDE": wide, "COUNT": hn // wide, "TAIL": max(16, triton.next_power_of_2(rest)) if rest else 0}


def arithmetic(given: torch.dtype, computed: torch.dtype) -> dict[str, Any]:
    """Return what operands are cast to before a product (None: nothing), what it adds up in, and its precision."""
    acc = ACCUMULATORS[computed]
    as_given = (given.itemsize == 2 and acc == tl.float32 and not INTERPRETED) or given == computed
    return {"CAST": None if as_given else acc, "ACC": acc, "PRECISION": precision(given)}
