"""What compares a slab of scores with its teacher: marks of the support, and the loss and its gradient row by row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headfold.backends.triton.launch import launch
from headfold.backends.triton.products import ACCUMULATORS
from headfold.backends.triton.table import arch_of, tile
from headfold.backends.triton.visible import bias_strides, bound_strides, row_bounds

NEG_INF = tl.constexpr(float("-inf"))
# The smallest normal numbers: p · log p of less is nothing beside rounding.
TINY = {tl.float32: 2.0**-126, tl.float64: 2.0**-1022}


@triton.jit
def bounds_of(START, END, b, row, alive, n, start_b, start_s, end_b, end_s, offset, RATIO: tl.constexpr):
    """Return int32 [lo, hi) of the n keys that rows of batch element b may see. START, END and offset may be None."""
    start = START
    if START is not None:
        start = START + b * start_b
    end = END
    if END is not None:
        end = END + b * end_b
    has_offset: tl.constexpr = offset is not None
    return row_bounds(row, alive, n, start, end, start_s, end_s, offset, RATIO, has_offset)


@triton.jit(do_not_specialize=["offset"])
def mark_seen_kernel(
    MARKS,
    BIAS,
    START,
    END,
    rows,
    n,
    width,
    bias_b,
    bias_s,
    bias_t,
    start_b,
    start_s,
    end_b,
    end_s,
    offset,
    RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a row's marks: 1 where a key is in range and its bias is not -inf, 0 elsewhere."""
    pid = tl.program_id(0)
    b = (pid // rows).to(tl.int64)
    row = pid % rows + tl.arange(0, 1)
    lo, hi = bounds_of(START, END, b, row, row >= 0, n, start_b, start_s, end_b, end_s, offset, RATIO)
    lo = tl.max(lo, 0)
    hi = tl.max(hi, 0)
    bias = BIAS + b * bias_b + (pid % rows).to(tl.int64) * bias_s
    marks = MARKS + pid.to(tl.int64) * width
    for t0 in range(0, n, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        seen = (t >= lo) & (t < hi)
        added = tl.load(bias + t.to(tl.int64) * bias_t, mask=seen, other=NEG_INF)
        tl.store(marks + t, (added != NEG_INF).to(tl.int8), mask=t < n)


@triton.jit
def mark_selected_kernel(MARKS, INDICES, rows, width, kept, indices_b, indices_s, BLOCK: tl.constexpr):
    """Write 1 into a row's marks where it selected a key; -1 selects nothing. The marks are zeros before."""
    pid = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    indices = INDICES + (pid // rows).to(tl.int64) * indices_b + (pid % rows).to(tl.int64) * indices_s
    key = tl.load(indices + i, mask=i < kept, other=-1)
    tl.store(MARKS + pid.to(tl.int64) * width + key, tl.full((BLOCK,), 1, tl.int8), mask=key >= 0)


@triton.jit
def support(marks, t, n, lo, hi):
    """Return which keys t of a row are its support: those marked, or without marks those in range."""
    seen = (t >= lo) & (t < hi)
    if marks is not None:
        seen = tl.load(marks + t, mask=t < n, other=0) != 0
    return seen


@triton.jit(do_not_specialize=["offset"])
def compare_kernel(
    LOSSES,
    SCORES,
    MASS,
    MARKS,
    START,
    END,
    COUNTED,
    SHARE,
    rows,
    n,
    width,
    losses_b,
    scores_b,
    scores_s,
    start_b,
    start_s,
    end_b,
    end_s,
    counted_b,
    counted_s,
    offset,
    RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
    TINY: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write a row's Σ p · (log p − log softmax(score)), and (softmax(score) − p) · share in place of its scores.

    p is the mass over its sum. A row without support, or that does not count, gets zeros, and so do other keys.
    """
    pid = tl.program_id(0)
    b = (pid // rows).to(tl.int64)
    one = pid % rows
    row = one + tl.arange(0, 1)
    lo, hi = bounds_of(START, END, b, row, row >= 0, n, start_b, start_s, end_b, end_s, offset, RATIO)
    lo = tl.max(lo, 0)
    hi = tl.max(hi, 0)
    scores = SCORES + b * scores_b + one.to(tl.int64) * scores_s
    mass = MASS + pid.to(tl.int64) * width
    marks = MARKS
    if MARKS is not None:
        marks = MARKS + pid.to(tl.int64) * width
    top = tl.full((BLOCK,), NEG_INF, ACC)
    total = tl.zeros((BLOCK,), ACC)
    some = tl.zeros((BLOCK,), tl.int32)
    for t0 in range(0, n, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        seen = support(marks, t, n, lo, hi)
        top = tl.maximum(top, tl.load(scores + t, mask=seen, other=NEG_INF))
        total += tl.load(mass + t, mask=seen, other=0.0)
        some = some | seen.to(tl.int32)
    counted = tl.max(some, 0)
    if COUNTED is not None:
        counted *= tl.load(COUNTED + b * counted_b + one.to(tl.int64) * counted_s).to(tl.int32)
    live = counted != 0
    end = tl.where(live, n, 0)  # a row that is dead has no keys from here on
    highest = tl.where(live, tl.max(top, 0), 0.0)
    each = 1 / tl.where(live, tl.sum(total, 0), 1.0)
    total = tl.zeros((BLOCK,), ACC)
    for t0 in range(0, n, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        seen = support(marks, t, n, lo, hi) & (t < end)
        total += tl.exp(tl.load(scores + t, mask=seen, other=NEG_INF) - highest)
    total = tl.where(live, tl.sum(total, 0), 1.0)
    log_total = tl.log(total)
    loss = tl.zeros((BLOCK,), ACC)
    share = tl.load(SHARE)
    for t0 in range(0, n, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        seen = support(marks, t, n, lo, hi) & (t < end)
        score = tl.load(scores + t, mask=seen, other=0.0) - highest
        p = tl.load(mass + t, mask=seen, other=0.0) * each
        loss += tl.where(seen, p * (tl.log(tl.maximum(p, TINY)) - (score - log_total)), 0.0)
        if BACKWARD:
            g = tl.where(seen, (tl.exp(score) / total - p) * share, 0.0)
            tl.store(scores + t, g, mask=t < n)
    tl.store(LOSSES + b * losses_b + one, tl.sum(loss, 0))


def mark_seen(
    marks: Tensor, bias: Tensor, start: Tensor | None, end: Tensor | None, offset: int | None, ratio: int, n: int
) -> None:
    """Write marks [b, rows, width], bytes: 1 where a row may see one of the first n keys, 0 where it may not.

    bias: [1 or b, rows, n or more].   start, end, offset: of the slab's own rows.
    """
    b, rows, width = marks.shape
    strides = *bias_strides(bias), *bound_strides(start), *bound_strides(end), offset
    row = tile("compare", arch_of(marks.device), torch.float32, 1)
    launch(
        mark_seen_kernel,
        (b * rows,),
        marks,
        bias,
        start,
        end,
        rows,
        n,
        width,
        *strides,
        RATIO=ratio,
        BLOCK=row.keys,
        num_warps=row.warps,
    )


def mark_selected(marks: Tensor, indices: Tensor) -> None:
    """Write 1 into marks [b, rows, width], zeros, where indices [b, rows, topk], dense along topk, select a key."""
    b, rows, width = marks.shape
    kept = indices.shape[2]
    row = tile("compare", arch_of(marks.device), torch.float32, 1)
    if kept > 0:
        launch(
            mark_selected_kernel,
            (b * rows, triton.cdiv(kept, row.keys)),
            marks,
            indices,
            rows,
            width,
            kept,
            *indices.stride()[:2],
            BLOCK=row.keys,
            num_warps=row.warps,
        )


def compare(
    losses: Tensor,
    scores: Tensor,
    mass: Tensor,
    marks: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    counted: Tensor | None,
    share: Tensor,
    offset: int | None,
    ratio: int,
    n: int,
    *,
    backward: bool,
) -> None:
    """Write the losses [b, rows] of a slab and, for backward, dL/dscores in place of its scores.

    scores: [b, rows, sk], dense along keys, of which the first n are used.   mass, marks: [b, rows, width].   counted:
    bool [b, rows], false for rows without loss, or None.   share: what a row's gradient is multiplied by, a scalar.
    """
    (b, rows, width), dtype = mass.shape, ACCUMULATORS[mass.dtype]
    counted_strides = (0, 0) if counted is None else counted.stride()
    strides = *scores.stride()[:2], *bound_strides(start), *bound_strides(end), *counted_strides, offset
    row = tile("compare", arch_of(mass.device), mass.dtype, 1)
    launch(
        compare_kernel,
        (b * rows,),
        losses,
        scores,
        mass,
        marks,
        start,
        end,
        None if counted is None else counted.view(torch.uint8),
        share,
        rows,
        n,
        width,
        losses.stride(0),
        *strides,
        RATIO=ratio,
        BLOCK=row.keys,
        BACKWARD=backward,
        TINY=TINY[dtype],
        ACC=dtype,
        num_warps=row.warps,
    )
