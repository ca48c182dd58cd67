"""index_topk, and masks of what it selected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headfold.backends import eager, load
from headfold.contract import compute_dtype
from headfold.flops import score_flops
from headfold.ops.counted import counted


@torch.library.custom_op("headfold::index_topk", mutates_args=())
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
    in_order: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Run the selecting fold; scores not asked for are an empty tensor."""
    rest = topk, with_scores, index_dtype, workspace, in_order
    indices, scores = load(backend).index_topk(q, weights, k, start, end, bias, offset, ratio, relu, scale, *rest)
    return indices, q.new_empty(0) if scores is None else scores


@index_topk.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    topk, with_scores, index_dtype, *_ = rest[-6:]
    shape = q.shape[0], q.shape[1], topk
    scores = q.new_empty(shape, dtype=compute_dtype(q.dtype)) if with_scores else q.new_empty(0)
    return q.new_empty(shape, dtype=index_dtype), scores


@torch.library.custom_op("headfold::index_mask", mutates_args=())
def index_mask(indices: Tensor, sk: int, dtype: torch.dtype) -> Tensor:
    """Write a selection into a new mask."""
    return eager.index_mask(indices, sk, dtype)


@index_mask.register_fake
def _(indices: Tensor, sk: int, dtype: torch.dtype) -> Tensor:
    return indices.new_empty(indices.shape[0], indices.shape[1], sk, dtype=dtype)


@torch.library.custom_op("headfold::update_index_mask_", mutates_args=("mask",))
def update_index_mask_(mask: Tensor, indices: Tensor, first_row: int) -> None:
    """Write a selection into a mask."""
    eager.update_index_mask_(mask, indices, first_row)


@update_index_mask_.register_fake
def _(mask: Tensor, indices: Tensor, first_row: int) -> None:
    """Nothing but the mask's data changes."""


@counted(torch.ops.headfold.index_topk)
def _topk_flops(q: Any, weights: Any, k: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    b, sq, h, d = q
    offset, ratio, relu = rest[3:6]
    return score_flops(b, sq, k[1], h, d, products=1, relu=relu, offset=offset, ratio=ratio)
