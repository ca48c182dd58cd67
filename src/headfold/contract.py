"""The whole input contract: every public op checks its arguments here, before anything is allocated or written."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from headfold.keyrange import KeyRange
from headfold.layout import ATTENTION_AXES, AXES, LAYOUTS, batch_first
from headfold.tiles import DEFAULT_WORKSPACE

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASK_DTYPES = (torch.bool, *DTYPES)
ACTIVATIONS = ("relu", None)


class UnsupportedError(RuntimeError):
    """This implementation cannot do this call; the message says which can."""


class ScoreCall(NamedTuple):
    """A checked call, batch-first: q [b, sq, h, d], weights [b, sq, h], k [b, sk, d], start and end [1 or b, sq]."""

    q: Tensor
    weights: Tensor | None
    k: Tensor
    start: Tensor | None
    end: Tensor | None
    offset: int | None
    ratio: int
    bias: Tensor | None
    relu: bool
    scale: float
    workspace: int

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """What is differentiated: q, weights and k."""
        return self.q, self.weights, self.k

    @property
    def options(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, int | None, int, bool, float]:
        """What follows the tensors in every op's schema: start, end, bias, offset, ratio, relu and scale."""
        return self.start, self.end, self.bias, self.offset, self.ratio, self.relu, self.scale


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


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that scores and accumulators of these inputs have: promote(dtype, float32)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def score_call(
    op: str,
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    *,
    causal: bool,
    keys: KeyRange | None,
    bias: Tensor | None,
    activation: str | None,
    scale: float,
    layout: str,
    workspace: int | None,
) -> ScoreCall:
    """Check the arguments that every scoring op shares and return them batch-first, as views."""
    one_of(op, "layout", layout, LAYOUTS)
    one_of(op, "activation", activation, ACTIVATIONS)
    number(op, "scale", scale)
    axes = AXES[layout]
    floating(op, "q", q)
    floating(op, "k", k)
    rank(op, "q", q, axes["q"])
    rank(op, "k", k, axes["k"])
    if q.dtype != k.dtype:
        raise TypeError(f"{op}: k must have q's dtype {q.dtype}, got {k.dtype}. Cast one of them.")
    same_device(op, k=k, q=q)
    if weights is not None:
        floating(op, "weights", weights)
        rank(op, "weights", weights, axes["weights"])
        if weights.shape != q.shape[:-1]:
            raise ValueError(
                f"{op}: weights must be {axes['weights']} = {list(q.shape[:-1])} to match q, got {list(weights.shape)}."
            )
        same_device(op, weights=weights, q=q)
    if layout == "thd" and keys is None:
        raise ValueError(
            f'{op}: layout "thd" needs keys=KeyRange.packed(...) to tell its sequences apart, got keys=None.'
        )

    q, k = batch_first(q, layout), batch_first(k, layout)
    weights = None if weights is None else batch_first(weights, layout)
    (b, _, h, d), sk = q.shape, k.shape[1]
    if k.shape[0] != b:
        raise ValueError(f"{op}: k must have q's batch size b = {b}, got {k.shape[0]}.")
    if k.shape[2] != d:
        raise ValueError(f"{op}: k must have q's width d = {d}, got {k.shape[2]}.")
    if h < 1 or d < 1:
        raise ValueError(f"{op}: q needs at least one head and one channel, got h = {h}, d = {d}.")
    start, end, offset, ratio = _bounds(op, q, sk, causal, keys)
    return ScoreCall(
        q=q,
        weights=weights,
        k=k,
        start=start,
        end=end,
        offset=offset,
        ratio=ratio,
        bias=_bias(op, q, sk, bias),
        relu=activation == "relu",
        scale=float(scale),
        workspace=workspace_bytes(op, workspace),
    )


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


def number(op: str, name: str, value: object) -> None:
    """Refuse what is not a Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a Python number, got {type(value).__name__}.")


def key_indices(op: str, indices: object) -> None:
    """Refuse what is not a selection: int32 or int64 [b, sq, topk]."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{op}: indices must be a tensor, got {type(indices).__name__}.")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: indices must be int32 or int64, got {indices.dtype}.")
    rank(op, "indices", indices, "[b, sq, topk]")


def indices_for(op: str, indices: Tensor, q: Tensor, name: str = "q") -> None:
    """Refuse what is not a selection for batch-first q (or query, by name); the values of indices stay unread."""
    key_indices(op, indices)
    if indices.shape[:2] != q.shape[:2]:
        b, sq = q.shape[:2]
        raise ValueError(f"{op}: indices must be [b, sq, topk] = [{b}, {sq}, topk], got {list(indices.shape)}.")
    same_device(op, **{"indices": indices, name: q})


def updatable(op: str, mask: object, indices: Tensor, first_row: int) -> None:
    """Refuse a mask that a checked selection cannot be written into from `first_row` on."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: mask must be a tensor, got {type(mask).__name__}.")
    if mask.dtype not in MASK_DTYPES:
        raise TypeError(f"{op}: mask must be bool, float16, bfloat16, float32 or float64, got {mask.dtype}.")
    rank(op, "mask", mask, "[b, sq, sk]")
    same_device(op, mask=mask, indices=indices)
    if mask.requires_grad:
        raise ValueError(f"{op}: mask must not require grad, got one that does. It is never differentiated: detach it.")
    (b, rows, _), sq = indices.shape, mask.shape[1]
    if mask.shape[0] != b:
        raise ValueError(f"{op}: mask must have the batch size b = {b} of indices, got {mask.shape[0]}.")
    at_least(op, "first_row", first_row, 0)
    if first_row + rows > sq:
        raise ValueError(
            f"{op}: indices must end within the mask's sq = {sq} rows, got {rows} rows from first_row = {first_row} on."
        )
    if not _apart(mask):
        raise ValueError(
            f"{op}: mask must hold each entry at a place of its own, got shape {list(mask.shape)} with strides "
            f"{list(mask.stride())}. Make it contiguous."
        )


def _apart(x: Tensor) -> bool:
    """Whether no two entries share memory, told from sizes and strides: each step leaves all smaller ones behind.

    Compared pair by pair, not sorted, so that symbolic sizes of a compiler serve as well.
    """
    axes = list(enumerate(zip(x.shape, x.stride(), strict=True)))
    for i, (size, step) in axes:
        reach = sum((n - 1) * smaller for j, (n, smaller) in axes if j != i and smaller <= step)
        if size > 1 and step <= reach:
            return x.numel() == 0
    return True


def one_of(op: str, name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def at_least(op: str, name: str, value: object, least: int) -> None:
    """Refuse what is not an int, or is one below `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}.")


def floating(op: str, name: str, x: object) -> None:
    """Refuse what is not a tensor of a supported floating dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}.")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}.")


def rank(op: str, name: str, x: Tensor, axes: str) -> None:
    """Refuse a tensor whose rank differs from that of `axes`, a string such as "[b, sq, h]"."""
    if x.dim() != axes.count(",") + 1:
        raise ValueError(f"{op}: {name} must be {axes}, got shape {list(x.shape)}.")


def same_device(op: str, **pair: Tensor) -> None:
    """Refuse two named tensors on different devices."""
    (name, x), (other, y) = pair.items()
    if x.device != y.device:
        raise ValueError(f"{op}: {name} must be on {other}'s device {y.device}, got {x.device}.")


def workspace_bytes(op: str, workspace: int | None) -> int:
    """Return the workspace in bytes; None means 64 MiB."""
    if workspace is None:
        return DEFAULT_WORKSPACE
    if isinstance(workspace, bool) or not isinstance(workspace, int):
        raise TypeError(f"{op}: workspace must be a number of bytes (int) or None, got {type(workspace).__name__}.")
    if workspace < 0:
        raise ValueError(f"{op}: workspace must be at least 0 bytes, got {workspace}.")
    return workspace


def enough_workspace(op: str, needed: int, workspace: int) -> None:
    """Refuse a workspace below the smallest that works."""
    if workspace < needed:
        raise ValueError(f"{op}: workspace must be at least {needed} bytes for this shape, got {workspace}.")


def wants_grad(*inputs: Tensor | None) -> bool:
    """Whether autograd will run backward to any of the inputs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def reverse_mode_only(op: str, *inputs: Tensor | None) -> None:
    """Refuse inputs that carry a forward-mode tangent, which an op without a forward formula would drop silently."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise UnsupportedError(
            f'{op}: differentiates in reverse mode only, got a forward-mode tangent. Use impl="materialized".'
        )


def _bounds(
    op: str, q: Tensor, sk: int, causal: bool, keys: KeyRange | None
) -> tuple[Tensor | None, Tensor | None, int | None, int]:
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be True or False, got {type(causal).__name__}.")
    if keys is None:
        return None, None, (sk - q.shape[1]) if causal else None, 1
    if causal:
        raise ValueError(f"{op}: causal=True excludes keys, got both. Use keys=keys & KeyRange.causal(sq, sk).")
    if not isinstance(keys, KeyRange):
        raise TypeError(f"{op}: keys must be a KeyRange or None, got {type(keys).__name__}.")
    return _bound(op, "keys.start", keys.start, q), _bound(op, "keys.end", keys.end, q), keys.offset, keys.ratio


def _bound(op: str, name: str, bound: Tensor | None, q: Tensor) -> Tensor | None:
    if bound is None:
        return None
    b, sq = q.shape[:2]
    if bound.shape not in ((sq,), (b, sq)):
        raise ValueError(f"{op}: {name} must be [sq] = [{sq}] or [b, sq] = [{b}, {sq}], got {list(bound.shape)}.")
    if bound.device != q.device:
        raise ValueError(f"{op}: {name} must be on q's device {q.device}, got {bound.device}.")
    return bound if bound.dim() == 2 else bound.unsqueeze(0)


def _bias(op: str, q: Tensor, sk: int, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    floating(op, "bias", bias)
    b, sq = q.shape[:2]
    if bias.dim() != 3 or bias.shape[0] not in (1, b) or tuple(bias.shape[1:]) != (sq, sk):
        raise ValueError(f"{op}: bias must be [b or 1, sq, sk] = [{b} or 1, {sq}, {sk}], got {list(bias.shape)}.")
    same_device(op, bias=bias, q=q)
    if bias.requires_grad:
        raise ValueError(f"{op}: bias must not require grad, got one that does. It is never differentiated: detach it.")
    return bias


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
    start, end, offset, ratio = _bounds(op, query, sk, causal, keys)
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
