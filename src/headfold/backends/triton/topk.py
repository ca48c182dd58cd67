"""index_topk by slabs: scores of a block of rows, which stay in L2 while the best of every row are taken from them."""

from __future__ import annotations

import functools
from typing import overload

import torch
from torch import Tensor

from headfold.backends.triton.launches import Slab
from headfold.backends.triton.products import precision
from headfold.backends.triton.replay import replay
from headfold.backends.triton.scores import fill_scores
from headfold.backends.triton.select import Scratch, finish, keep
from headfold.backends.triton.sifted import Lists, fold, sifted_plan
from headfold.contract import compute_dtype
from headfold.triton_tiles import Part, SlabSelection, padded

NEG_INF = float("-inf")


def selection_plan(q: Tensor, k: Tensor, relu: bool, topk: int, workspace: int, in_order: bool = True) -> SlabSelection:
    """Return the fold of a call over batch-first q [b, sq, h, d] and k [b, sk, d]."""
    b, sq, h, d = q.shape
    size = compute_dtype(q.dtype).itemsize
    return SlabSelection.of(b, sq, k.shape[1], h, d, topk, size, workspace, relu=relu, in_order=in_order)


def index_topk(
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    bias: Tensor | None,
    offset: int | None,
    ratio: int,
    relu: bool,
    scale: float,
    topk: int,
    with_scores: bool,
    index_dtype: torch.dtype,
    workspace: int,
    in_order: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Indices [b, sq, topk] of a checked, batch-first call and their scores if asked for, in the total order or any."""
    b, sq, sk = q.shape[0], q.shape[1], k.shape[1]
    dtype = compute_dtype(q.dtype)
    indices = torch.empty(b, sq, topk, dtype=index_dtype, device=q.device)
    scores = torch.empty(b, sq, topk, dtype=dtype, device=q.device) if with_scores else None
    if indices.numel() == 0 or sk == 0:
        _clear(indices, scores)
        return indices, scores
    call = Slab(q, weights, k, start, end, bias, offset, ratio, scale)
    sifted = sifted_plan(call, topk, workspace, in_order) if relu else None
    if sifted is not None:
        lists = Lists(sifted, q.device)
        kind = "lists", sifted, offset, ratio, scale.hex()
        replay(
            functools.partial(fold, indices, scores, call, lists),
            kind,
            indices,
            scores,
            *call.tensors(),
            *lists.tensors(),
        )
        return indices, scores
    plan = selection_plan(q, k, relu, topk, workspace, in_order)
    parts, most = _slabs(plan, b, sq, sk, offset, ratio), plan.kept.topk
    unseen = parts[0].row if parts else sq  # rows that the static bound bars from every key are in no slab
    if unseen:
        _clear(indices[:, :unseen], None if scores is None else scores[:, :unseen])
    if most < topk:
        _clear(indices[..., most:], None if scores is None else scores[..., most:])
    buffer = torch.empty(plan.elements, dtype=dtype, device=q.device)
    scratch = Scratch(plan.kept, q.device)
    run = functools.partial(_fold, indices, scores, call, buffer, scratch, plan, relu=relu)
    if relu:  # else heads are folded first, into memory of their own
        key = "selection", plan, offset, ratio, scale.hex(), precision(k.dtype)
        replay(run, key, indices, scores, *call.tensors(), buffer, *scratch.tensors())
    else:
        run()
    return indices, scores


def _clear(indices: Tensor, scores: Tensor | None) -> None:
    """Write that there are no keys."""
    indices.fill_(-1)
    if scores is not None:
        scores.fill_(NEG_INF)


def _fold(
    indices: Tensor,
    scores: Tensor | None,
    call: Slab,
    buffer: Tensor,
    scratch: Scratch,
    plan: SlabSelection,
    *,
    relu: bool,
) -> None:
    """Write to indices and scores [b, sq, topk], but for rows that are in no slab and places past all keys."""
    b, sq, topk = indices.shape
    most = plan.kept.topk
    every = [x if x is None else x.view(1, b * sq, topk)[..., :most] for x in (indices, scores)]
    keys, beside = indices[..., :most], None if scores is None else scores[..., :most]
    first, line = 0, 0  # rows [first, line) of the call, counted over batches, are kept and not yet finished
    for part in _slabs(plan, b, sq, call.k.shape[1], call.offset, call.ratio):
        rows = (part.batch_end - part.batch) * (part.row_end - part.row)
        at = part.batch * sq + part.row
        if at != line or line - first + rows > plan.kept.rows:
            _finish(every, first, line, buffer.dtype, scratch)
            first = at
        slab = slab_of(buffer, part)
        few_start, few_end, few_bias = (rows_within(x, part) for x in (call.start, call.end, call.bias))
        moved = None if call.offset is None else call.offset + part.row
        fill_scores(
            slab,
            rows_within(call.q, part),
            rows_within(call.weights, part),
            call.k[part.batch : part.batch_end, : part.width],
            few_start,
            few_end,
            None if few_bias is None else few_bias[..., : part.width],
            moved,
            call.ratio,
            relu,
            call.scale,
        )
        picked, best = rows_within(keys, part), rows_within(beside, part)
        bounds = few_start, few_end, moved, call.ratio
        keep(slab, picked, best, *bounds, scratch, at - first)
        line = at + rows
    _finish(every, first, line, buffer.dtype, scratch)


@functools.lru_cache(maxsize=64)  # every layer and step asks for the same
def _slabs(plan: SlabSelection, b: int, sq: int, sk: int, offset: int | None, ratio: int) -> tuple[Part, ...]:
    return tuple(plan.slabs(b, sq, functools.partial(limit, sk, offset, ratio)))


def _finish(every: list[Tensor | None], first: int, end: int, dtype: torch.dtype, scratch: Scratch) -> None:
    """Write rows [first, end) of indices and scores [1, b · sq, topk], which are the first lines of the scratch."""
    indices, scores = (None if x is None else x[:, first:end] for x in every)
    if indices is not None:
        finish(indices, scores, dtype, scratch)


def limit(sk: int, offset: int | None, ratio: int, row: int) -> int:
    """Return one past the last of sk keys that the static bound lets `row` see."""
    return sk if offset is None else max(0, min(sk, (row + 1 + offset) // ratio))


def slab_of(buffer: Tensor, part: Part) -> Tensor:
    """View a flat buffer as the scores [b, rows, width] of a part; rows begin at multiples of the padding."""
    rows, apart = part.row_end - part.row, padded(part.width)
    return buffer.as_strided((part.batch_end - part.batch, rows, part.width), (rows * apart, apart, 1))


@overload
def rows_within(x: Tensor, part: Part) -> Tensor: ...
@overload
def rows_within(x: None, part: Part) -> None: ...
def rows_within(x: Tensor | None, part: Part) -> Tensor | None:
    """Return the rows of a part of a tensor [1 or b, sq, ...]; an axis of size one stands for all."""
    if x is None:
        return None
    batches = slice(part.batch, part.batch_end) if x.shape[0] > 1 else slice(1)
    return x[batches, part.row : part.row_end]
