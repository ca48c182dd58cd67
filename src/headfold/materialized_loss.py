"""indexer_loss with full tensors: the direct formulation, the oracle and the baseline.

Plain differentiable PyTorch in the order of operations of Megatron-Core's `FusedDSAIndexerLoss`: all scores, all
attention probabilities [b, np, sq, sk], their sum over heads, normalised, and a Kullback-Leibler sum over each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headfold import materialized
from headfold.contract import compute_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from headfold.contract import ScoreCall


def indexer_loss(
    call: ScoreCall,
    query: Tensor,
    key: Tensor,
    softmax_scale: float,
    topk: int | None,
    sparse: bool,
    row_mask: Tensor | None,
    mean: bool,
    reduce: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Tensor | None]:
    """Loss and indices of a checked call.

    Memory: two [b, np, sq, sk] tensors beside what `materialized.index_scores` takes; autograd keeps [b, sq, sk] ones.
    """
    with torch.autocast(call.q.device.type, enabled=False):
        scores = materialized.index_scores(call)
        with torch.no_grad():
            indices = None if topk is None else materialized.best_of(scores, topk, torch.int32)[0]
            hidden = torch.zeros_like(scores, dtype=torch.bool)
            if sparse and indices is not None:
                hidden = _unselected(hidden, indices)
            else:
                unseen = materialized.invisible(call)
                hidden = hidden if unseen is None else hidden | unseen
            nothing = hidden.all(dim=-1, keepdim=True)
            target = _target(query, key, softmax_scale, hidden, compute_dtype(call.q.dtype), reduce)
        student = scores.masked_fill(hidden, float("-inf")).masked_fill(nothing, 0).log_softmax(-1)
        rows = (torch.xlogy(target, target) - target * student.masked_fill(hidden, 0)).masked_fill(nothing, 0).sum(-1)
        if row_mask is not None:
            rows = rows.masked_fill(~row_mask, 0)
        loss = rows.sum()
        if mean:
            count = torch.ones_like(rows) if row_mask is None else row_mask
            loss = loss / count.sum().clamp(min=1)
    return loss, indices


def _unselected(hidden: Tensor, indices: Tensor) -> Tensor:
    """Bool [b, sq, sk], true where indices [b, sq, topk] select nothing; a column for -1 comes and goes."""
    sk = hidden.shape[-1]
    marks = torch.ones_like(torch.nn.functional.pad(hidden, (0, 1)))
    return marks.scatter(-1, indices.long().masked_fill(indices < 0, sk), False)[..., :sk]


def _target(
    query: Tensor,
    key: Tensor,
    softmax_scale: float,
    hidden: Tensor,
    dtype: torch.dtype,
    reduce: Callable[[Tensor], None] | None,
) -> Tensor:
    """Attention mass [b, sq, sk] over the support, summed over heads and the group, normalised; 0 elsewhere."""
    key = key.to(dtype).repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    logits = torch.einsum("bsnd,btnd->bnst", query.to(dtype), key) * softmax_scale
    mass = logits.masked_fill(hidden.unsqueeze(1), float("-inf")).softmax(-1).sum(dim=1)
    if reduce is not None:
        reduce(mass)
    return (mass / mass.sum(-1, keepdim=True)).masked_fill(hidden, 0)
