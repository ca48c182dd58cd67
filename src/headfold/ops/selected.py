"""selected_scores and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headfold.backends import load
from headfold.contract import compute_dtype
from headfold.flops import score_flops
from headfold.ops.counted import counted
from headfold.ops.once import differentiable_once, gradients_like


@torch.library.custom_op("headfold::selected_scores", mutates_args=())
def selected_scores(
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    indices: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    bias: Tensor | None,
    offset: int | None,
    ratio: int,
    relu: bool,
    scale: float,
    backend: str,
) -> Tensor:
    """Run the gathered forward body."""
    rest = start, end, bias, offset, ratio, relu, scale
    scores: Tensor = load(backend).selected_scores(q, weights, k, indices, *rest)
    return scores


@selected_scores.register_fake
def _(q: Tensor, weights: Tensor | None, k: Tensor, indices: Tensor, *_: Any) -> Tensor:
    return q.new_empty(indices.shape, dtype=compute_dtype(q.dtype))


@torch.library.custom_op("headfold::selected_scores_backward", mutates_args=())
def selected_scores_backward(
    g: Tensor,
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    indices: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    bias: Tensor | None,
    offset: int | None,
    ratio: int,
    relu: bool,
    scale: float,
    backend: str,
    need_q: bool,
    need_weights: bool,
    need_k: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the gathered backward body; a gradient not needed is an empty tensor."""
    needs = (need_q, need_weights, need_k)
    rest = start, end, bias, offset, ratio, relu, scale, needs
    grads = load(backend).selected_scores_backward(g, q, weights, k, indices, *rest)
    dq, dweights, dk = (q.new_empty(0) if grad is None else grad for grad in grads)
    return dq, dweights, dk


@selected_scores_backward.register_fake
def _(g: Tensor, q: Tensor, weights: Tensor | None, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return gradients_like((q, weights, k), rest[-3:], lambda x: x.new_empty(x.shape))


differentiable_once("selected_scores", selected_scores, selected_scores_backward, tensors=7)


@counted(torch.ops.headfold.selected_scores)
def _selected_flops(q: Any, weights: Any, k: Any, indices: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    b, sq, h, d = q
    return score_flops(b, sq, indices[2], h, d, products=1, relu=rest[5])


@counted(torch.ops.headfold.selected_scores_backward)
def _selected_backward_flops(
    g: Any, q: Any, weights: Any, k: Any, indices: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    b, sq, h, d = q
    relu = rest[5]
    need_q, need_weights, need_k = rest[-3:]
    products = 1 + need_q + need_k if relu else (need_q or need_weights) + need_k
    return score_flops(b, sq, indices[2], h, d, products=products, relu=relu)
