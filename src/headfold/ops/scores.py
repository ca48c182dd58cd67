"""index_scores and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headfold.backends import eager, load
from headfold.contract import compute_dtype
from headfold.flops import score_flops
from headfold.ops.counted import counted
from headfold.ops.once import differentiable_once, gradients_like


@torch.library.custom_op("headfold::index_scores", mutates_args=())
def index_scores(
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
    backend: str,
) -> Tensor:
    """Run the forward body."""
    scores: Tensor = load(backend).index_scores(q, weights, k, start, end, bias, offset, ratio, relu, scale)
    return scores


@index_scores.register_fake
def _(q: Tensor, weights: Tensor | None, k: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], k.shape[1], dtype=compute_dtype(q.dtype))


@torch.library.custom_op("headfold::index_scores_backward", mutates_args=())
def index_scores_backward(
    g: Tensor,
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
    backend: str,
    need_q: bool,
    need_weights: bool,
    need_k: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward body; a gradient not needed is an empty tensor, since a schema has no optional results."""
    needs = (need_q, need_weights, need_k)
    rest = start, end, bias, offset, ratio, relu, scale, needs
    grads = load(backend).index_scores_backward(g, q, weights, k, *rest)
    dq, dweights, dk = (q.new_empty(0) if grad is None else grad for grad in grads)
    return dq, dweights, dk


@index_scores_backward.register_fake
def _(g: Tensor, q: Tensor, weights: Tensor | None, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return gradients_like((q, weights, k), rest[-3:], eager.empty_rows_like)


differentiable_once("index_scores", index_scores, index_scores_backward, tensors=6)


@counted(torch.ops.headfold.index_scores)
def _forward_flops(q: Any, weights: Any, k: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    b, sq, h, d = q
    offset, ratio, relu = rest[3:6]
    return score_flops(b, sq, k[1], h, d, products=1, relu=relu, offset=offset, ratio=ratio)


@counted(torch.ops.headfold.index_scores_backward)
def _backward_flops(g: Any, q: Any, weights: Any, k: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    b, sq, h, d = q
    offset, ratio, relu = rest[3:6]
    need_q, need_weights, need_k = rest[-3:]
    # The algorithm's, as `IndexerGeometry.backward_products`: the kernels, that make the logits twice, run one more.
    products = 1 + need_q + need_k if relu else (need_q or need_weights) + need_k
    return score_flops(b, sq, k[1], h, d, products=products, relu=relu, offset=offset, ratio=ratio)
