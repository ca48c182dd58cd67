"""Megatron-Core 0.17 and 0.18: its DSA functions, signature by signature, on headfold.

This generation knows neither varlen bounds nor -1: a row that sees fewer keys than it selects also selects keys that
it may not see, and whoever reads the selection hides them again, causally. Its loss takes logarithms of p + 1e-10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headfold.attention import sparse_attention
from headfold.contract import wants_grad
from headfold.integrations.megatron import arguments as args
from headfold.integrations.megatron.current import DSA, Scores, select
from headfold.integrations.megatron.deferred import offered
from headfold.integrations.megatron.earlier_loss import EarlierLoss
from headfold.integrations.patching import Replace
from headfold.keyrange import KeyRange
from headfold.parallel import summing
from headfold.scores import index_scores
from headfold.tiles import DEFAULT_WORKSPACE, blocks

_FILL_BYTES = 16 << 20  # positions of hidden keys, of one block of rows


def replacements(*, keep_scores: bool, workspace: int | None) -> Sequence[Replace]:
    """Return what replaces the functions of this generation."""
    return (
        Replace(DSA, "_compute_index_scores", EarlierScores(workspace), "(q, weights, k)"),
        Replace(
            DSA, "fused_qk_topk_naive", EarlierTopK(workspace, keep_scores), "(q, k, weights, index_topk, mask=None)"
        ),
        Replace(
            DSA,
            "FusedDSAIndexerLoss",
            EarlierIndexerLoss(workspace),
            "(q, weights, k, query, key, softmax_scale, topk, loss_coeff, mask, sparse_loss, pg_collection)",
        ),
        Replace(DSA, "unfused_dsa_fn", EarlierAttention(workspace), "(query, key, value, topk_indices, softmax_scale)"),
    )


@dataclass(frozen=True)
class EarlierScores:
    """`_compute_index_scores`, always with ReLU: float32 [b, sq, sk]."""

    workspace: int | None

    def __call__(self, q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
        """Score every key."""
        return Scores(self.workspace)(q, weights, k)


@dataclass(frozen=True)
class EarlierTopK:
    """`fused_qk_topk_naive`: scores [b, sq, sk] and int64 indices [b, sq, min(topk, sq)], none of them negative.

    Where a row sees too few keys, the smallest that it may not see follow, as if all of those tied. Without keep_scores
    the scores are computed when they are first read.
    """

    workspace: int | None
    keep_scores: bool

    def __call__(
        self, q: Tensor, k: Tensor, weights: Tensor, index_topk: int, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Select, and score where scores are kept."""
        q, k = args.together(q, k)
        call: dict[str, Any] = {"bias": args.additive(mask), "workspace": self.workspace}
        indices = chosen(q, weights, k, index_topk, **call)
        shape = q.shape[1], q.shape[0], k.shape[0]
        score = partial(index_scores, q, weights, k, **call)
        return offered(score, shape, q, weights, k, mask, now=self.keep_scores), indices


def chosen(q: Tensor, weights: Tensor, k: Tensor, topk: int, *, bias: Tensor | None, workspace: int | None) -> Tensor:
    """Return int64 [b, sq, min(topk, sq)], none of them negative."""
    return filled(select(q, weights, k, min(topk, q.shape[0]), bias=bias, workspace=workspace), bias)


def filled(indices: Tensor, bias: Tensor | None) -> Tensor:
    """Replace the -1 at the end of rows [b, sq, topk] by the smallest keys that bias [1 or b, sq, sk] hides, in place.

    A row hides at least as many keys as it has -1, for it selects no more keys than there are.
    """
    (b, sq, width), keys = indices.shape, 0 if bias is None else bias.shape[2]
    if bias is None or keys == 0 or width == 0:
        return indices
    columns = torch.arange(width, device=indices.device)
    t = torch.arange(keys, device=indices.device)
    for span in blocks(sq, max(1, _FILL_BYTES // (16 * b * keys))):
        rows = indices[:, slice(*span)]
        hidden = bias[:, slice(*span)] == float("-inf")
        rank = hidden.cumsum(-1, dtype=torch.int32)
        place = torch.where(hidden & (rank <= width), rank - 1, width).long()
        smallest = rows.new_zeros(*place.shape[:2], width + 1).scatter_(-1, place, t.expand(place.shape))
        missing = (columns - (rows >= 0).sum(-1, keepdim=True)).clamp_(min=0)
        rows.copy_(torch.where(rows < 0, smallest.expand(b, -1, -1).gather(-1, missing), rows))
    return indices


@dataclass(frozen=True)
class EarlierIndexerLoss:
    """`FusedDSAIndexerLoss`, of which callers use `apply`: int64 indices and a float32 scalar."""

    workspace: int | None

    def __call__(
        self,
        q: Tensor,
        weights: Tensor,
        k: Tensor,
        query: Tensor,
        key: Tensor,
        softmax_scale: float,
        topk: int,
        loss_coeff: float,
        mask: Tensor | None,
        sparse_loss: bool,
        pg_collection: Any,
    ) -> tuple[Tensor, Tensor]:
        """Select under the mask, and compare with causal attention."""
        q, k = args.together(q, k)
        bias = args.additive(mask)
        indices = chosen(q, weights, k, topk, bias=bias, workspace=self.workspace)
        reduce = summing("FusedDSAIndexerLoss", pg_collection.tp if pg_collection.tp.size() > 1 else None)
        workspace = DEFAULT_WORKSPACE if self.workspace is None else self.workspace
        rest = bias, indices if sparse_loss else None, softmax_scale, reduce, workspace, wants_grad(q, weights, k)
        loss: Tensor = EarlierLoss.apply(q, weights, k, query.detach(), args.heads_once(key.detach()), *rest)  # type: ignore[no-untyped-call]
        return indices, loss * loss_coeff

    apply = __call__


@dataclass(frozen=True)
class EarlierAttention:
    """`unfused_dsa_fn`: [sq, b, np · hnv]; a row that sees none of its keys is NaN, as it is there."""

    workspace: int | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, topk_indices: Tensor, softmax_scale: float) -> Tensor:
        """Attend to the selected keys up to each row's own."""
        dtype = value.dtype
        query, key, value = args.together(query, key, value)
        attend = partial(sparse_attention, softmax_scale=softmax_scale, workspace=self.workspace, return_lse=True)
        out, lse = attend(query, key, value, args.picks(topk_indices, query.device), keys=KeyRange(offset=0))
        nothing = (lse == float("-inf")).permute(2, 0, 1).unsqueeze(-1)
        return out.masked_fill(nothing, float("nan")).flatten(2).to(dtype)
