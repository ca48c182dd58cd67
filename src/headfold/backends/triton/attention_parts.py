"""What the kernels of sparse attention share: blocks of channels, settled picks, and a softmax taken step by step."""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.operands import matrix, put, rounded
from headfold.backends.triton.products import product


@triton.jit
def channels(
    x, rows, live, step, SIZE: tl.constexpr, COUNT: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Load the blocks of channels of some rows: COUNT of SIZE, and one of REST unless that is 0.

    Several narrow blocks, not one wide: a thread then has few rows, whose addresses its registers hold, in each.
    """
    parts = ()
    for i in tl.static_range(COUNT):
        parts = parts + (matrix(x, rows, live, step, i * SIZE, SIZE, WIDTH),)
    if REST > 0:
        parts = parts + (matrix(x, rows, live, step, COUNT * SIZE, REST, WIDTH),)
    return parts


@triton.jit
def store(x, rows, live, step, parts, SIZE: tl.constexpr, COUNT: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr,
          UPCAST: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """Store blocks of channels [rows, SIZE], or transposed where TURNED, as `channels` loads them."""
    for i in tl.static_range(COUNT):
        y = rounded(parts[i], x.dtype.element_ty, UPCAST)
        put(x, rows, live, step, tl.trans(y) if TURNED else y, i * SIZE, SIZE, WIDTH)
    if REST > 0:
        y = rounded(parts[COUNT], x.dtype.element_ty, UPCAST)
        put(x, rows, live, step, tl.trans(y) if TURNED else y, COUNT * SIZE, REST, WIDTH)


@triton.jit
def zeros(ROWS: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, REST: tl.constexpr, ACC: tl.constexpr,
           TURNED: tl.constexpr):  # fmt: skip
    """Sums for blocks of channels: [ROWS, SIZE] each, or transposed where TURNED."""
    parts = ()
    for _ in tl.static_range(COUNT):
        parts = parts + (tl.zeros((SIZE, ROWS) if TURNED else (ROWS, SIZE), ACC),)
    if REST > 0:
        parts = parts + (tl.zeros((REST, ROWS) if TURNED else (ROWS, REST), ACC),)
    return parts


@triton.jit
def scaled(parts, factor, PARTS: tl.constexpr):
    """Every part times a factor that broadcasts to it."""
    more = ()
    for i in tl.static_range(PARTS):
        more = more + (parts[i] * factor,)
    return more


@triton.jit
def products(a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr):
    """a · bᵀ over their blocks of channels."""
    x = tl.zeros((a[0].shape[0], b[0].shape[0]), ACC)
    for i in tl.static_range(PARTS):
        x = product(a[i], tl.trans(b[i]), x, PRECISION, ACC, UPCAST)
    return x


@triton.jit
def onto(
    a,
    x,
    sums,
    PARTS: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """sums + a [n, m] · x [m, d] by blocks of channels; where TURNED sums + xᵀ · a, with a [m, n]."""
    more = ()
    for i in tl.static_range(PARTS):
        if TURNED:
            more = more + (product(tl.trans(x[i]), a, sums[i], PRECISION, ACC, UPCAST),)
        else:
            more = more + (product(a, x[i], sums[i], PRECISION, ACC, UPCAST),)
    return more


@triton.jit
def settled(picks, j, topk):
    """Load settled picks: keys int64 and whether they count."""
    key = tl.load(picks + j, mask=j < topk, other=-1)
    live = key >= 0
    return tl.where(live, key, 0).to(tl.int64), live


@triton.jit
def begin(sink, heads, live, BN: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr):
    """The largest logit [BH] and the terms [BN, BH] of a softmax that holds the sink alone, or nothing."""
    if sink is None:
        return tl.full((BH,), float("-inf"), ACC), tl.zeros((BN, BH), ACC)
    else:
        largest = tl.load(sink + heads, mask=live, other=float("-inf")).to(ACC)
        none = largest == float("-inf")
        base = tl.where(none, 0.0, largest)
        term = tl.where(none, 0.0, tl.exp(base - base))  # NaN where the sink is infinite
        return largest, tl.where((tl.arange(0, BN) == 0)[:, None], term[None, :], 0.0)


@triton.jit
def advance(s, largest):
    """Take logits s [BN, BH] into a softmax: p, what its sums shrink by, and its largest logit."""
    after = tl.maximum(largest, tl.max(s, 0))
    base = tl.where(after == float("-inf"), 0.0, after)
    return tl.exp(s - base[None, :]), tl.exp(largest - base), after
