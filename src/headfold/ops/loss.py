"""indexer_loss: one op that returns its gradients beside the loss, and one that scales them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from headfold.backends import eager, load
from headfold.contract import compute_dtype
from headfold.flops import score_flops, visible_pairs
from headfold.ops.counted import counted
from headfold.ops.once import ONCE

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
ARGUMENTS = 21


@torch.library.custom_op("headfold::indexer_loss", mutates_args=())
def indexer_loss(
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    query: Tensor,
    key: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    bias: Tensor | None,
    row_mask: Tensor | None,
    offset: int | None,
    ratio: int,
    relu: bool,
    scale: float,
    softmax_scale: float,
    topk: int | None,
    sparse: bool,
    mean: bool,
    backend: str,
    need_q: bool,
    need_weights: bool,
    need_k: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the walk: loss, indices, dq, dweights and dk; what was not asked for is an empty tensor."""
    rest = start, end, bias, row_mask, offset, ratio, relu, scale, softmax_scale, topk, sparse, mean, backend
    return _walk(q, weights, k, query, key, *rest, need_q, need_weights, need_k)


def _walk(*args: Any, reduce: Callable[[Tensor], None] | None = None) -> Result:
    q, backend, needs = args[0], args[-4], args[-3:]
    loss, *others = load(backend).indexer_loss(*args[:-4], needs=needs, reduce=reduce)
    indices, dq, dweights, dk = (q.new_empty(0) if x is None else x for x in others)
    return loss, indices, dq, dweights, dk


@indexer_loss.register_fake
def _(q: Tensor, weights: Tensor | None, k: Tensor, *rest: Any) -> Result:
    topk, need_q, need_weights, need_k = rest[-7], *rest[-3:]
    dtype = compute_dtype(q.dtype)
    nothing = q.new_empty(0)
    return (
        q.new_empty((), dtype=dtype),
        nothing if topk is None else q.new_empty((q.shape[0], q.shape[1], topk), dtype=torch.int32),
        torch.empty_like(q, dtype=dtype) if need_q else q.new_empty(0),
        torch.empty_like(weights, dtype=dtype) if need_weights and weights is not None else q.new_empty(0),
        eager.empty_rows_like(k, dtype) if need_k else q.new_empty(0),
    )


@torch.library.custom_op("headfold::indexer_loss_backward", mutates_args=())
def indexer_loss_backward(
    factor: Tensor, dq: Tensor, dweights: Tensor, dk: Tensor, dtype: torch.dtype, weights_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale the gradients and cast them to their inputs' dtypes."""
    dtypes = dtype, weights_dtype, dtype
    scaled = (eager.scaled(factor, x, to) for x, to in zip((dq, dweights, dk), dtypes, strict=True))
    dq, dweights, dk = scaled
    return dq, dweights, dk


@indexer_loss_backward.register_fake
def _(
    factor: Tensor, dq: Tensor, dweights: Tensor, dk: Tensor, dtype: torch.dtype, weights_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(dq, dtype=dtype),
        torch.empty_like(dweights, dtype=weights_dtype),
        torch.empty_like(dk, dtype=dtype),
    )


def _hold(ctx: Any, q: Tensor, weights: Tensor | None, needs: tuple[bool, ...], gradients: tuple[Tensor, ...]) -> None:
    """Hold the gradients and nothing else.

    They are outputs that stay differentiable: that is what makes a second differentiation reach the refusal below.
    """
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.dtypes = q.dtype, q.dtype if weights is None else weights.dtype
    ctx.made = needs


def _scale(ctx: Any, factor: Tensor | None) -> list[Tensor | None]:
    if factor is None:
        return [None] * 3
    gradients = indexer_loss_backward(factor, *ctx.saved_tensors, *ctx.dtypes)
    return [x if made else None for x, made in zip(gradients, ctx.made, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    _hold(ctx, inputs[0], inputs[1], inputs[-3:], output[2:])


def _differentiate(ctx: Any, factor: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return (*_scale(ctx, factor), *[None] * (ARGUMENTS - 3))


def _refuse(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(ONCE.format(op="indexer_loss"))


def _nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save nothing: the backward that would need it refuses."""


indexer_loss.register_autograd(_differentiate, setup_context=_save)
indexer_loss_backward.register_autograd(_refuse, setup_context=_nothing)


class _InGroup(torch.autograd.Function):
    """The same walk with its teacher summed over a group, which no schema can name."""

    @staticmethod
    def forward(ctx: Any, reduce: Callable[[Tensor], None], *args: Any) -> Result:
        result = _walk(*args, reduce=reduce)
        _hold(ctx, args[0], args[1], args[-3:], result[2:])
        return result

    @staticmethod
    def backward(ctx: Any, factor: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return (None, *_scale(ctx, factor), *[None] * (ARGUMENTS - 3))


def indexer_loss_in_group(reduce: Callable[[Tensor], None], *args: Any) -> Result:
    """Run the op of these arguments with every slab of the teacher passed to `reduce`."""
    result: Result = _InGroup.apply(reduce, *args)  # type: ignore[no-untyped-call]
    return result


@counted(torch.ops.headfold.indexer_loss)
def _loss_flops(q: Any, weights: Any, k: Any, query: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    b, sq, h, d = q
    offset, ratio, relu = rest[5:8]
    need_q, need_weights, need_k = rest[-3:]
    again = need_q or need_weights or need_k
    products = 1 + (again + need_q + need_k if relu else (need_q or need_weights) + need_k)
    scores = score_flops(b, sq, k[1], h, d, products=products, relu=relu, offset=offset, ratio=ratio)
    attention: int = 2 * b * visible_pairs(sq, k[1], offset, ratio) * query[2] * query[3]
    return scores + attention
