"""Which keys a row may see, as kernels read it: one half-open range a row, and the bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NO_OFFSET = 0


@triton.jit
def _causal_end(row, sk, offset, RATIO: tl.constexpr):
    """Return behind which key rows see none, as int32 within [0, sk]."""
    return tl.minimum(tl.maximum(row.to(tl.int64) + 1 + offset, 0) // RATIO, sk).to(tl.int32)


@triton.jit
def row_bounds(
    rows,
    inside,
    sk,
    start,
    end,
    start_stride,
    end_stride,
    offset,
    RATIO: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """Return int32 [low, high) within [0, sk] of each row; (0, 0) or another empty range where none is visible.

    rows: int, row numbers.   inside: which of them exist.   start, end: int32 of this batch element, or None.
    """
    low = tl.zeros(rows.shape, tl.int32)
    high = tl.zeros(rows.shape, tl.int32) + sk
    if start is not None:
        low = tl.load(start + rows.to(tl.int64) * start_stride, mask=inside, other=0)
        low = tl.minimum(tl.maximum(low, 0), sk)
    if end is not None:
        high = tl.minimum(tl.load(end + rows.to(tl.int64) * end_stride, mask=inside, other=0), sk)
    if HAS_OFFSET:
        high = tl.minimum(high, _causal_end(rows, sk, offset, RATIO))
    high = tl.where(inside, high, 0)
    low = tl.where(inside, low, sk)
    return low, tl.maximum(high, 0)


@triton.jit
def seen_by_any(
    low, high, first_row, last_row, sk, start, end, offset,
    RATIO: tl.constexpr, HAS_OFFSET: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Return int32 scalars [first, last) that hold the keys of every one of rows [first_row, last_row), not none.

    low, high: their `row_bounds`.   UNIFORM: told from row numbers alone where those bounds are no tensor's. A loop
    between numbers that were reduced from a tile has its counters and addresses in the registers of every thread.
    """
    if start is not None or end is not None or not UNIFORM:
        first = tl.min(low, 0)
        last = tl.max(high, 0)
    else:
        first = sk * 0
        last = _causal_end(last_row - 1, sk, offset, RATIO) if HAS_OFFSET else sk * 1
    return first, last


@triton.jit
def seen_by_all(
    low, high, inside, first_row, sk, start, end, offset,
    RATIO: tl.constexpr, HAS_OFFSET: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Return int32 scalars [first, last) of the keys that all rows that are inside see, as `seen_by_any`."""
    if start is not None or end is not None or not UNIFORM:
        first = tl.max(tl.where(inside, low, 0), 0)
        last = tl.min(tl.where(inside, high, sk), 0)
    else:
        first = sk * 0
        last = _causal_end(first_row, sk, offset, RATIO) if HAS_OFFSET else sk * 1
    return first, last


def bound_strides(x: Tensor | None) -> tuple[int, int]:
    """Return the batch and row strides of start or end [1 or b, sq]; an axis of size one stands for all."""
    return (0, 0) if x is None else (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))


def bias_strides(x: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of bias [1 or b, sq, sk]; an axis of size one stands for all."""
    return (0, 0, 0) if x is None else (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1), x.stride(2))


def rows_of(x: Tensor | None, first: int, end: int) -> Tensor | None:
    """Return rows [first, end) of a tensor [b, sq, ...] or None."""
    return None if x is None else torch.narrow(x, 1, first, end - first)
