"""The input contract of scoring: every public op checks its arguments here, before anything is allocated or written.

What attention adds to it is in `headfold.attention_contract`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from headfold.keyrange import KeyRange
from headfold.layout import AXES, LAYOUTS, batch_first
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
    start, end, offset, ratio = bounds(op, q, sk, causal, keys)
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


def bounds(
    op: str, q: Tensor, sk: int, causal: bool, keys: KeyRange | None
) -> tuple[Tensor | None, Tensor | None, int | None, int]:
    """Check causal and keys, and return start, end, offset and ratio."""
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
