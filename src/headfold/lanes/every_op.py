"""Every public op on one set of tensors, with its gradients: what lanes repeat, move and watch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headfold.attention import sparse_attention
from headfold.keyrange import KeyRange
from headfold.loss import indexer_loss
from headfold.mask import index_mask, update_index_mask_
from headfold.scores import index_scores
from headfold.selected import selected_scores
from headfold.selection import index_topk

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IMPLS = ("eager", "triton")
FIRST_ROW = 3


class Inputs(NamedTuple):
    """Batch-first tensors of every op; indices are any keys, duplicates and -1 among them.

    q [b, sq, h, d], weights [b, sq, h], k [b, sk, d]; query [b, sq, np, hn], key and value [b, sk, np_k, hn],
    sink [np]; indices int32 [b, sq, topk].
    """

    q: Tensor
    weights: Tensor
    k: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    sink: Tensor
    indices: Tensor


Run = Callable[[Inputs, str], list[Tensor]]


def make_inputs(
    device: torch.device,
    dtype: torch.dtype,
    *,
    b: int = 2,
    sq: int = 130,
    sk: int = 300,
    h: int = 8,
    d: int = 64,
    topk: int = 70,
    heads: int = 4,
    key_heads: int = 2,
    hn: int = 64,
    seed: int = 0,
) -> Inputs:
    """Return normal numbers of a seed."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    indices = torch.randint(-1, sk, (b, sq, topk), generator=generator, device=device, dtype=torch.int32)
    indexer = normal(b, sq, h, d), normal(b, sq, h), normal(b, sk, d)
    keys = normal(b, sk, key_heads, hn), normal(b, sk, key_heads, hn)
    return Inputs(*indexer, normal(b, sq, heads, hn), *keys, normal(heads), indices)


def differentiate(result: Tensor, leaves: Sequence[Tensor], *, ones: bool = False) -> list[Tensor]:
    """Return a result and its gradients, given numbers of either sign from column to column, or ones."""
    g = result.new_ones(result.shape[-1:])
    if not ones and result.dim():
        g = torch.linspace(-1, 1, result.shape[-1], device=result.device, dtype=torch.float32).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, g.expand_as(result))]


def _fresh(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def _scores(x: Inputs, impl: str) -> list[Tensor]:
    leaves = _fresh(x.q, x.weights, x.k)
    return differentiate(index_scores(*leaves, causal=True, layout="bshd", impl=impl), leaves)


def _scores_without_activation(x: Inputs, impl: str) -> list[Tensor]:
    leaves = _fresh(x.q, x.weights, x.k)
    keys = KeyRange.sliding(x.q.shape[1], x.k.shape[1], 50, device=x.q.device)
    scores = index_scores(*leaves, keys=keys, activation=None, layout="bshd", impl=impl)
    return differentiate(scores, leaves)


def _topk(x: Inputs, impl: str, *, in_order: bool = True) -> list[Tensor]:
    call: dict[str, Any] = {"causal": True, "with_scores": True, "layout": "bshd", "impl": impl, "sorted": in_order}
    found = index_topk(x.q, x.weights, x.k, x.indices.shape[2], **call)
    assert found.scores is not None
    return [found.indices, found.scores]


def _selected(x: Inputs, impl: str) -> list[Tensor]:
    leaves = _fresh(x.q, x.weights, x.k)
    q, weights, k = leaves
    scores = selected_scores(q, weights, k, x.indices, causal=True, layout="bshd", impl=impl)
    return differentiate(scores, leaves)


def _mask(x: Inputs, impl: str) -> list[Tensor]:
    return [index_mask(x.indices, x.k.shape[1]), index_mask(x.indices, x.k.shape[1], dtype=torch.bfloat16)]


def _update(x: Inputs, impl: str) -> list[Tensor]:
    (b, sq, _), sk = x.indices.shape, x.k.shape[1]
    mask = torch.full((b, sq, sk), float("-inf"), device=x.q.device)
    return [update_index_mask_(mask, x.indices[:, FIRST_ROW:], first_row=FIRST_ROW)]


def _loss(x: Inputs, impl: str) -> list[Tensor]:
    q, weights, k = leaves = _fresh(x.q, x.weights, x.k)
    call: dict[str, Any] = {"softmax_scale": 0.1, "topk": x.indices.shape[2], "sparse": True, "scale": 0.1}
    call |= {"causal": True, "layout": "bshd", "impl": impl}
    loss, indices = indexer_loss(q, weights, k, x.query, x.key, **call)
    assert indices is not None
    return [*differentiate(loss, leaves), indices]


def _attention(x: Inputs, impl: str) -> list[Tensor]:
    query, key, value, sink = leaves = _fresh(x.query, x.key, x.value, x.sink)
    call: dict[str, Any] = {"softmax_scale": 0.1, "sink": sink, "causal": True, "return_lse": True}
    out, lse = sparse_attention(query, key, value, x.indices, layout="bshd", impl=impl, **call)
    return [*differentiate(out, leaves), lse]


# By the name of the public function; masks are one body on every backend.
OPS: dict[str, Run] = {
    "index_scores": _scores,
    "index_scores, no activation": _scores_without_activation,
    "index_topk": _topk,
    "index_topk, no order": partial(_topk, in_order=False),
    "selected_scores": _selected,
    "indexer_loss": _loss,
    "sparse_attention": _attention,
    "index_mask": _mask,
    "update_index_mask_": _update,
}
MASKS = ("index_mask", "update_index_mask_")


def calls(impls: Sequence[str] = IMPLS) -> list[tuple[str, str]]:
    """Return (op, impl) of every op on every backend; the masks once, whose implementation is no argument."""
    return [(op, impl) for op in OPS for impl in impls if op not in MASKS or impl == impls[0]]


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are alike in shape, dtype, device and every bit."""
    alike = (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
    return alike and torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (x, y)))


def nearly(x: Tensor, y: Tensor) -> bool:
    """Whether two results are equal but for a rounding of the largest: a kernel sums in the layout that it loads in.

    What is read from elsewhere is off by more than that. Results that are not all finite have to be equal.
    """
    if same_bits(x, y):
        return True
    if not y.is_floating_point() or not y.isfinite().all():
        return False
    near = 2 * torch.finfo(y.dtype).eps * y.double().abs().max()
    return bool((x.double() - y.double()).abs().max() <= near)


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module."""
    return str(dtype).removeprefix("torch.")
