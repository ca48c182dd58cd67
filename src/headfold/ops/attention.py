"""sparse_attention and its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headfold.attention_tiles import attention_flops
from headfold.backends import eager, load
from headfold.contract import compute_dtype
from headfold.ops.counted import counted
from headfold.ops.once import differentiable_once


@torch.library.custom_op("headfold::sparse_attention", mutates_args=())
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    sink: Tensor | None,
    indices: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    offset: int | None,
    ratio: int,
    scale: float,
    v_dim: int,
    gathered: bool,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Run the forward body; a log-sum-exp not asked for is an empty tensor."""
    rest = start, end, offset, ratio, scale, v_dim, gathered, with_lse
    out, lse = load(backend).sparse_attention(query, key, value, sink, indices, *rest)
    return out, query.new_empty(0) if lse is None else lse


@sparse_attention.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    v_dim, _, with_lse, _ = rest[-4:]
    b, sq, heads, _ = query.shape
    dtype = compute_dtype(query.dtype)
    lse = query.new_empty(b, heads, sq, dtype=dtype) if with_lse else query.new_empty(0)
    return eager.rows_like(query, v_dim), lse


@torch.library.custom_op("headfold::sparse_attention_backward", mutates_args=())
def sparse_attention_backward(
    g: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    sink: Tensor | None,
    indices: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    offset: int | None,
    ratio: int,
    scale: float,
    v_dim: int,
    gathered: bool,
    with_lse: bool,
    backend: str,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_sink: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward body; a gradient not needed is an empty tensor."""
    needs = need_query, need_key, need_value, need_sink
    rest = start, end, offset, ratio, scale, v_dim, gathered, needs
    grads = load(backend).sparse_attention_backward(g, query, key, value, sink, indices, *rest)
    dq, dk, dv, dsink = (query.new_empty(0) if grad is None else grad for grad in grads)
    return dq, dk, dv, dsink


@sparse_attention_backward.register_fake
def _(
    g: Tensor, query: Tensor, key: Tensor, value: Tensor | None, sink: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    likes: tuple[Callable[[Tensor], Tensor], ...] = (torch.empty_like, _key_like, _key_like, torch.empty_like)
    dq, dk, dv, dsink = (
        like(x) if need and x is not None else query.new_empty(0)
        for like, x, need in zip(likes, (query, key, value, sink), rest[-4:], strict=True)
    )
    return dq, dk, dv, dsink


def _key_like(x: Tensor) -> Tensor:
    return eager.heads_apart(x).transpose(1, 2)


differentiable_once("sparse_attention", sparse_attention, sparse_attention_backward, tensors=7, inputs=4)


@counted(torch.ops.headfold.sparse_attention)
def _forward_flops(
    query: Any, key: Any, value: Any, sink: Any, indices: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    b, sq, heads, dim = query
    _, _, offset, ratio, _, v_dim, gathered, _, _ = rest
    shape = b, sq, key[1], indices[2], heads, dim + v_dim
    return attention_flops(gathered, *shape, offset=offset, ratio=ratio)


@counted(torch.ops.headfold.sparse_attention_backward)
def _backward_flops(
    g: Any, query: Any, key: Any, value: Any, sink: Any, indices: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    b, sq, heads, dim = query
    _, _, offset, ratio, _, v_dim, gathered, _, _, need_query, need_key, need_value, _ = rest
    through_values = need_key if value is None else need_value
    channels = dim * (1 + need_query + need_key) + v_dim * (1 + through_values)
    return attention_flops(gathered, b, sq, key[1], indices[2], heads, channels, offset=offset, ratio=ratio)
