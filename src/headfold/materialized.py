"""The upstream-style score path, which builds [sq, b, h, sk]: the only oracle, and the baseline.

Plain differentiable PyTorch in the order of operations of Megatron-Core's `_compute_index_scores`: one einsum over all
heads, the activation, the head weights, and only then the sum over heads. Run on float64 inputs it is the truth; run on
any other dtype it sets the error budget and the price that headfold is compared with.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from headfold.contract import compute_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from headfold.contract import ScoreCall


def index_scores(call: ScoreCall) -> Tensor:
    """Scores [b, sq, sk] of a checked call, through the resident head axis.

    Memory: two [sq, b, h, sk] tensors in the compute dtype at the peak; autograd keeps one of them until backward.
    """
    q, weights, k = call.q.transpose(0, 1), call.weights, call.k.transpose(0, 1)
    dtype = compute_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("sbhd,tbd->sbht", q.to(dtype), k.to(dtype))
        if call.relu:
            scores = torch.relu(scores)
        if weights is not None:
            scores = scores * weights.transpose(0, 1).to(dtype).unsqueeze(-1)
        scores = scores.sum(dim=2).transpose(0, 1)
        if call.scale != 1.0:
            scores = scores * call.scale
        if call.bias is not None:
            scores = scores + call.bias.to(dtype)
        hidden = invisible(call)
        return scores if hidden is None else scores.masked_fill(hidden, float("-inf"))


def index_topk(call: ScoreCall, topk: int, with_scores: bool, index_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Indices [b, sq, topk] by a stable sort of the whole score matrix, and their scores if asked for."""
    indices, best = best_of(index_scores(call), topk, index_dtype)
    return indices, best if with_scores else None


def best_of(scores: Tensor, topk: int, index_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Indices and scores [b, sq, topk] of the best keys of scores [b, sq, sk]; -1 and -inf where a row runs out."""
    best, indices = torch.sort(scores + 0.0, dim=-1, descending=True, stable=True)
    best = torch.nn.functional.pad(best[..., :topk], (0, max(0, topk - best.shape[-1])), value=float("-inf"))
    indices = torch.nn.functional.pad(indices[..., :topk], (0, max(0, topk - indices.shape[-1])), value=-1)
    indices = indices.masked_fill(best == float("-inf"), -1)
    return indices.to(index_dtype), best


def selected_scores(call: ScoreCall, indices: Tensor) -> Tensor:
    """Scores [b, sq, topk] gathered from the whole score matrix; -inf at -1."""
    return at_indices(index_scores(call), indices)


def at_indices(scores: Tensor, indices: Tensor) -> Tensor:
    """Gather [b, sq, topk] from scores [b, sq, sk]; -inf at -1."""
    if scores.shape[-1] == 0:
        return torch.nn.functional.pad(scores, (0, indices.shape[-1]), value=float("-inf"))
    picked = scores.gather(-1, indices.long().clamp(min=0))
    return picked.masked_fill(indices < 0, float("-inf"))


def invisible(call: ScoreCall) -> Tensor | None:
    """Boolean [1 or b, sq, sk], true where the row may not see the key; None when every key is visible."""
    sq, sk = call.q.shape[1], call.k.shape[1]
    rows = torch.arange(sq, device=call.q.device)
    keys = torch.arange(sk, device=call.q.device)
    hidden: list[Tensor] = []
    if call.start is not None:
        hidden.append(keys < call.start.unsqueeze(-1))
    if call.end is not None:
        hidden.append(keys >= call.end.unsqueeze(-1))
    if call.offset is not None:
        limit = torch.div(rows + (1 + call.offset), call.ratio, rounding_mode="floor")
        hidden.append((keys >= limit.unsqueeze(-1)).unsqueeze(0))
    if call.bias is not None:
        hidden.append(call.bias == float("-inf"))
    if not hidden:
        return None
    return functools.reduce(torch.logical_or, hidden)


def gathered(call: ScoreCall, indices: Tensor, generator: torch.Generator) -> Tensor:
    """Scores [b, sq, topk] from gathered keys [b, sq, topk, d], with every sum taken in a shuffled order.

    The other way to write selected scores in plain PyTorch. A key that stands in a row twice is two keys here, so their
    gradients are added after the products and not before: its rounding, too, is the materialised path's own.
    """
    (_, _, h, d), dtype = call.q.shape, compute_dtype(call.q.dtype)
    heads, width, picks = (
        torch.randperm(n, generator=generator, device=indices.device) for n in (h, d, indices.shape[-1])
    )
    q, safe = call.q.to(dtype)[:, :, heads][..., width], indices.long().clamp(min=0)[..., picks]
    batch = torch.arange(len(safe), device=safe.device).view(-1, 1, 1)
    keys = call.k.to(dtype)[..., width][batch, safe]
    weights = torch.ones_like(q[..., 0]) if call.weights is None else call.weights.to(dtype)[..., heads]
    if call.relu:
        logits = torch.einsum("bshd,bstd->bsht", q, keys)
        scores = (torch.relu(logits) * weights.unsqueeze(-1)).sum(dim=2)
    else:
        scores = torch.einsum("bsd,bstd->bst", (q * weights.unsqueeze(-1)).sum(dim=2), keys)
    scores = scores * call.scale
    if call.bias is not None:
        scores = scores + call.bias.to(dtype).expand(len(safe), -1, -1).gather(-1, safe)
    hidden = indices[..., picks] < 0
    barred = invisible(call)
    if barred is not None:
        hidden = hidden | barred.expand(len(safe), -1, -1).gather(-1, safe)
    return scores.masked_fill(hidden, float("-inf"))[..., picks.argsort()]


def reordered(call: ScoreCall, generator: torch.Generator) -> Tensor:
    """Scores of the same call with every sum, forward and backward, taken in a shuffled order.

    Without an activation the sum over heads comes first, which is only another order too. What this differs by from
    `index_scores` is rounding of the materialised path alone, so it tells how large that path's error is where float64
    has no wider truth to compare with, and where one order was lucky in a short row.
    """
    (_, sq, h, d), sk = call.q.shape, call.k.shape[1]
    dtype = compute_dtype(call.q.dtype)

    def shuffled(n: int) -> Tensor:
        return torch.randperm(n, generator=generator, device=call.q.device)

    rows, keys, heads, width = shuffled(sq), shuffled(sk), shuffled(h), shuffled(d)
    q, k = call.q[:, rows][:, :, heads][..., width], call.k[:, keys][..., width]
    weights = None if call.weights is None else call.weights[:, rows][..., heads]
    if not call.relu:
        q = q.to(dtype) if weights is None else q.to(dtype) * weights.to(dtype).unsqueeze(-1)
        q, k, weights = q.sum(dim=2, keepdim=True), k.to(dtype), None
    hidden, bias = invisible(call), call.bias
    if hidden is not None:
        bias = torch.zeros_like(hidden, dtype=dtype) if bias is None else bias
        bias = bias.masked_fill(hidden, float("-inf"))[:, rows][:, :, keys]
    shuffled_call = call._replace(q=q, weights=weights, k=k, bias=bias, start=None, end=None, offset=None)
    scores = index_scores(shuffled_call)
    return scores[:, rows.argsort()][:, :, keys.argsort()]
