"""The input contract of attention: of `sparse_attention`, and of the attention that `indexer_loss` compares with."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from headfold.contract import (
    at_least,
    bounds,
    floating,
    indices_for,
    number,
    one_of,
    rank,
    same_device,
    workspace_bytes,
)
from headfold.keyrange import KeyRange
from headfold.layout import ATTENTION_AXES, LAYOUTS, batch_first

if TYPE_CHECKING:
    from headfold.contract import ScoreCall


class AttentionCall(NamedTuple):
    """A checked call, batch-first: query [b, sq, np, hn], key [b, sk, np_k, hn], value [b, sk, np_k, v_dim] or None.

    Without a value, values are the first v_dim channels of key. sink [np], indices [b, sq, topk], start and end
    [1 or b, sq].
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    sink: Tensor | None
    indices: Tensor
    start: Tensor | None
    end: Tensor | None
    offset: int | None
    ratio: int
    scale: float
    v_dim: int
    workspace: int

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What is differentiated: query, key, value and sink."""
        return self.query, self.key, self.value, self.sink

    @property
    def options(self) -> tuple[Tensor, Tensor | None, Tensor | None, int | None, int, float, int]:
        """What follows the inputs in every op's schema: indices, start, end, offset, ratio, scale and v_dim."""
        return self.indices, self.start, self.end, self.offset, self.ratio, self.scale, self.v_dim


def attention_call(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    indices: Tensor,
    *,
    softmax_scale: float,
    v_dim: int | None,
    sink: Tensor | None,
    causal: bool,
    keys: KeyRange | None,
    layout: str,
    workspace: int | None,
) -> AttentionCall:
    """Check the arguments of sparse attention and return them batch-first, as views."""
    one_of(op, "layout", layout, LAYOUTS)
    number(op, "softmax_scale", softmax_scale)
    axes = ATTENTION_AXES[layout]
    given = {"query": query, "key": key} if value is None else {"query": query, "key": key, "value": value}
    for name, x in given.items():
        floating(op, name, x)
        rank(op, name, x, axes[name])
        if x.dtype != query.dtype:
            raise TypeError(f"{op}: {name} must have query's dtype {query.dtype}, got {x.dtype}. Cast one of them.")
        if x is not query:
            same_device(op, **{name: x, "query": query})
    if layout == "thd" and keys is None:
        raise ValueError(
            f'{op}: layout "thd" needs keys=KeyRange.packed(...) to tell its sequences apart, got keys=None.'
        )
    query, key = batch_first(query, layout), batch_first(key, layout)
    value = None if value is None else batch_first(value, layout)
    (b, _, heads, dim), (_, sk, key_heads, _) = query.shape, key.shape
    if key.shape[0] != b:
        raise ValueError(f"{op}: key must have query's batch size b = {b}, got {key.shape[0]}.")
    if key.shape[3] != dim:
        raise ValueError(f"{op}: key must have query's width hn = {dim}, got {key.shape[3]}.")
    if heads < 1 or dim < 1:
        raise ValueError(f"{op}: query needs at least one head and one channel, got np = {heads}, hn = {dim}.")
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"{op}: key must have a number of heads that divides query's np = {heads}, got {key_heads}.")
    if value is not None and value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"{op}: value must have key's batch, keys and heads [{b}, {sk}, {key_heads}], got {list(value.shape[:3])}."
        )
    v_dim = _value_width(op, value, v_dim, dim)
    if sink is not None:
        floating(op, "sink", sink)
        if sink.shape != (heads,):
            raise ValueError(f"{op}: sink must be [np] = [{heads}], got {list(sink.shape)}.")
        same_device(op, sink=sink, query=query)
    indices_for(op, indices, query, "query")
    if isinstance(keys, KeyRange):
        for name, bound in (("keys.start", keys.start), ("keys.end", keys.end)):
            if bound is not None:
                same_device(op, **{name: bound, "query": query})
    start, end, offset, ratio = bounds(op, query, sk, causal, keys)
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        sink=sink,
        indices=indices,
        start=start,
        end=end,
        offset=offset,
        ratio=ratio,
        scale=float(softmax_scale),
        v_dim=v_dim,
        workspace=workspace_bytes(op, workspace),
    )


def _value_width(op: str, value: Tensor | None, v_dim: int | None, dim: int) -> int:
    if v_dim is not None:
        at_least(op, "v_dim", v_dim, 1)
    if value is None:
        if v_dim is None:
            raise ValueError(f"{op}: value=None reads values from key and needs v_dim, their width, got v_dim=None.")
        if v_dim > dim:
            raise ValueError(f"{op}: v_dim must be at most key's width hn = {dim} with value=None, got {v_dim}.")
        return v_dim
    if value.shape[3] < 1:
        raise ValueError(f"{op}: value needs at least one channel, got {value.shape[3]}.")
    if v_dim is not None and v_dim != value.shape[3]:
        raise ValueError(f"{op}: v_dim must be value's width {value.shape[3]} or None, got {v_dim}.")
    return value.shape[3]


def attention_of(op: str, query: Tensor, key: Tensor, call: ScoreCall, layout: str) -> tuple[Tensor, Tensor]:
    """Check the attention beside a call; return query [b, sq, np, hn] and key [b, sk, np_k, hn], detached views.

    A head axis that was expanded from one head, stride 0, becomes that one head.
    """
    axes = ATTENTION_AXES[layout]
    for name, x in (("query", query), ("key", key)):
        floating(op, name, x)
        rank(op, name, x, axes[name])
        same_device(op, **{name: x, "q": call.q})
    if key.dtype != query.dtype:
        raise TypeError(f"{op}: key must have query's dtype {query.dtype}, got {key.dtype}. Cast one of them.")
    query, key = batch_first(query.detach(), layout), batch_first(key.detach(), layout)
    for name, x, other, like in (("query", query, "q", call.q), ("key", key, "k", call.k)):
        if x.shape[:2] != like.shape[:2]:
            raise ValueError(
                f"{op}: {name} must have {other}'s batch and length {list(like.shape[:2])}, got {list(x.shape[:2])}."
            )
    (np, hn), (np_k, width) = query.shape[2:], key.shape[2:]
    if np < 1 or hn < 1 or np_k < 1:
        raise ValueError(f"{op}: query and key need at least one head and one channel, got {np} x {hn} and {np_k}.")
    if width != hn:
        raise ValueError(f"{op}: key must have query's width hn = {hn}, got {width}.")
    if np % np_k != 0:
        raise ValueError(f"{op}: query's heads must be a multiple of key's, got np = {np}, np_k = {np_k}.")
    return query, key[:, :, :1] if np_k > 1 and key.stride(2) == 0 else key


def rows_of(op: str, row_mask: Tensor | None, q: Tensor) -> None:
    """Refuse what is not a bool [b, sq] that says which rows of batch-first q count."""
    if row_mask is None:
        return
    if not isinstance(row_mask, Tensor):
        raise TypeError(f"{op}: row_mask must be a tensor or None, got {type(row_mask).__name__}.")
    if row_mask.dtype != torch.bool:
        raise TypeError(f"{op}: row_mask must be bool, got {row_mask.dtype}.")
    if row_mask.shape != q.shape[:2]:
        raise ValueError(f"{op}: row_mask must be [b, sq] = {list(q.shape[:2])}, got {list(row_mask.shape)}.")
    same_device(op, row_mask=row_mask, q=q)
