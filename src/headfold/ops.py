"""torch.library registration: schema, fake, autograd, FLOP formula and the refusal of double backward.

Ops take batch-first views and plain values, so that records stay out of schemas. The bodies that ship are the
undecorated functions of the backend; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headfold.backends import eager
from headfold.contract import compute_dtype
from headfold.geometry import score_flops

ONCE = (
    'headfold: {op} can be differentiated once. For second derivatives use impl="materialized", which is plain '
    "PyTorch and keeps the head axis."
)


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
) -> Tensor:
    """Run the forward walk."""
    return eager.index_scores(q, weights, k, start, end, bias, offset, ratio, relu, scale)


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
    need_q: bool,
    need_weights: bool,
    need_k: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward walk; a gradient not needed is an empty tensor, since a schema has no optional results."""
    needs = (need_q, need_weights, need_k)
    grads = eager.index_scores_backward(g, q, weights, k, start, end, bias, offset, ratio, relu, scale, needs)
    dq, dweights, dk = (q.new_empty(0) if grad is None else grad for grad in grads)
    return dq, dweights, dk


@index_scores_backward.register_fake
def _(g: Tensor, q: Tensor, weights: Tensor | None, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like((q, weights, k), rest[-3:], eager.empty_rows_like)


def _gradients_like(
    inputs: tuple[Tensor, Tensor | None, Tensor], needs: Sequence[bool], key_like: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    q = inputs[0]
    likes = (torch.empty_like, torch.empty_like, key_like)
    dq, dweights, dk = (
        like(x) if need and x is not None else q.new_empty(0)
        for like, x, need in zip(likes, inputs, needs, strict=True)
    )
    return dq, dweights, dk


def _differentiable_once(name: str, op: Any, backward: Any, tensors: int) -> None:
    """Register autograd of an op whose first three of `tensors` leading arguments are q, weights and k.

    Its backward op takes g, the op's own arguments, and which of the three gradients are needed.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.rest = inputs[tensors:]

    def differentiate(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[:3]
        grads = backward(g, *ctx.saved_tensors, *ctx.rest, *needs)
        others = tensors - 3 + len(ctx.rest)
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * others)

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(ONCE.format(op=name))

    def nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save nothing: the backward that would need it refuses."""

    op.register_autograd(differentiate, setup_context=save)
    backward.register_autograd(refuse, setup_context=nothing)


_differentiable_once("index_scores", index_scores, index_scores_backward, tensors=6)


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
) -> Tensor:
    """Run the gathered forward walk."""
    return eager.selected_scores(q, weights, k, indices, start, end, bias, offset, ratio, relu, scale)


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
    need_q: bool,
    need_weights: bool,
    need_k: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the gathered backward walk; a gradient not needed is an empty tensor."""
    needs = (need_q, need_weights, need_k)
    rest = start, end, bias, offset, ratio, relu, scale, needs
    grads = eager.selected_scores_backward(g, q, weights, k, indices, *rest)
    dq, dweights, dk = (q.new_empty(0) if grad is None else grad for grad in grads)
    return dq, dweights, dk


@selected_scores_backward.register_fake
def _(g: Tensor, q: Tensor, weights: Tensor | None, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like((q, weights, k), rest[-3:], lambda x: x.new_empty(x.shape))


_differentiable_once("selected_scores", selected_scores, selected_scores_backward, tensors=7)


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
) -> tuple[Tensor, Tensor]:
    """Run the selecting fold; scores not asked for are an empty tensor."""
    rest = topk, with_scores, index_dtype, workspace
    indices, scores = eager.index_topk(q, weights, k, start, end, bias, offset, ratio, relu, scale, *rest)
    return indices, q.new_empty(0) if scores is None else scores


@index_topk.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    topk, with_scores, index_dtype, _ = rest[-4:]
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


@register_flop_formula(torch.ops.headfold.index_scores)
def _forward_flops(q: Any, weights: Any, k: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    b, sq, h, d = q
    offset, ratio, relu = rest[3:6]
    return score_flops(b, sq, k[1], h, d, products=1, relu=relu, offset=offset, ratio=ratio)


@register_flop_formula(torch.ops.headfold.index_scores_backward)
def _backward_flops(g: Any, q: Any, weights: Any, k: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    b, sq, h, d = q
    offset, ratio, relu = rest[3:6]
    need_q, need_weights, need_k = rest[-3:]
    products = 1 + need_q + need_k if relu else (need_q or need_weights) + need_k
    return score_flops(b, sq, k[1], h, d, products=products, relu=relu, offset=offset, ratio=ratio)


@register_flop_formula(torch.ops.headfold.selected_scores)
def _selected_flops(q: Any, weights: Any, k: Any, indices: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    b, sq, h, d = q
    return score_flops(b, sq, indices[2], h, d, products=1, relu=rest[5])


@register_flop_formula(torch.ops.headfold.selected_scores_backward)
def _selected_backward_flops(
    g: Any, q: Any, weights: Any, k: Any, indices: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    b, sq, h, d = q
    relu = rest[5]
    need_q, need_weights, need_k = rest[-3:]
    products = 1 + need_q + need_k if relu else (need_q or need_weights) + need_k
    return score_flops(b, sq, indices[2], h, d, products=products, relu=relu)


@register_flop_formula(torch.ops.headfold.index_topk)
def _topk_flops(q: Any, weights: Any, k: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    b, sq, h, d = q
    offset, ratio, relu = rest[3:6]
    return score_flops(b, sq, k[1], h, d, products=1, relu=relu, offset=offset, ratio=ratio)
