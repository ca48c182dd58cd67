"""Megatron-Core 0.19: its DSA functions, signature by signature, on headfold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headfold.attention import sparse_attention
from headfold.integrations.megatron import arguments as args
from headfold.integrations.megatron.deferred import offered
from headfold.integrations.patching import Replace
from headfold.keyrange import KeyRange
from headfold.loss import indexer_loss
from headfold.mask import index_mask, update_index_mask_
from headfold.scores import index_scores
from headfold.selection import index_topk

DSA = "megatron.core.transformer.experimental_attention_variant.dsa"
# Why a finite bias is refused.
_TWICE = "Megatron-Core adds it twice in the forward pass of its loss and once in backward, which headfold does not"
_NO_BIAS = "headfold attends to what was selected without a bias"
_VISIBLE = "mask=None, varlen_starts=None, varlen_ends=None, key_positions=None"


def replacements(*, keep_scores: bool, workspace: int | None) -> Sequence[Replace]:
    """Return what replaces the functions of this generation."""
    return (
        Replace(DSA, "_compute_index_scores", Scores(workspace), "(q, weights, k, use_relu=True)"),
        Replace(
            DSA,
            "fused_qk_topk_naive",
            TopK(workspace, keep_scores),
            f"(q, k, weights, index_topk, {_VISIBLE}, use_relu=True)",
        ),
        Replace(
            DSA,
            "FusedDSAIndexerLoss",
            Loss(workspace),
            "(q, weights, k, query, key, softmax_scale, topk, loss_coeff, mask, sparse_loss, pg_collection, "
            "varlen_starts=None, varlen_ends=None, key_positions=None, query_valid_rows=None, "
            "calculate_per_token_loss=False, use_relu=True)",
        ),
        Replace(
            f"{DSA}_masking",
            "scatter_topk_into_index_mask",
            Scatter(),
            "(index_mask, topk_indices, *, seq_chunk_size=256)",
        ),
        Replace(
            DSA, "unfused_dsa_fn", Attention(workspace), f"(query, key, value, topk_indices, softmax_scale, {_VISIBLE})"
        ),
        Replace(
            DSA,
            "_unfused_absorbed_dsa_fn",
            AbsorbedAttention(workspace),
            f"(query, key, topk_indices, softmax_scale, v_channels, {_VISIBLE})",
        ),
    )


@dataclass(frozen=True)
class Scores:
    """`_compute_index_scores`: float32 [b, sq, sk]."""

    workspace: int | None

    def __call__(self, q: Tensor, weights: Tensor, k: Tensor, use_relu: bool = True) -> Tensor:
        """Score every key."""
        q, k = args.together(q, k)
        return index_scores(q, weights, k, activation=args.activation(use_relu), workspace=self.workspace)


@dataclass(frozen=True)
class TopK:
    """`fused_qk_topk_naive`: scores [b, sq, sk] and int64 indices [b, sq, min(topk, sk)].

    Without keep_scores the scores are computed when they are first read.
    """

    workspace: int | None
    keep_scores: bool

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        index_topk: int,
        mask: Tensor | None = None,
        varlen_starts: Tensor | None = None,
        varlen_ends: Tensor | None = None,
        key_positions: Tensor | None = None,
        use_relu: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Select, and score where scores are kept."""
        op = "fused_qk_topk_naive"
        q, k = args.together(q, k)
        keys, order = args.bounds(op, mask, varlen_starts, varlen_ends, key_positions, q.device)
        call: dict[str, Any] = {
            "keys": keys,
            "bias": args.additive(mask),
            "activation": args.activation(use_relu),
            "workspace": self.workspace,
        }
        ordered = k if order is None else k.index_select(0, order)
        indices = args.in_order(select(q, weights, ordered, index_topk, **call), order)

        def score() -> Tensor:
            scores = index_scores(q, weights, ordered, **call)
            return scores if order is None else scores.index_select(-1, order.argsort())

        shape = q.shape[1], q.shape[0], k.shape[0]
        return offered(score, shape, q, weights, k, mask, now=self.keep_scores), indices


def select(q: Tensor, weights: Tensor, k: Tensor, topk: int, **call: Any) -> Tensor:
    """Return int64 [b, sq, min(topk, sk)]."""
    return index_topk(q, weights, k, max(0, min(topk, k.shape[0])), index_dtype=torch.int64, **call).indices


@dataclass(frozen=True)
class Loss:
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
        varlen_starts: Tensor | None = None,
        varlen_ends: Tensor | None = None,
        key_positions: Tensor | None = None,
        query_valid_rows: Tensor | None = None,
        calculate_per_token_loss: bool = False,
        use_relu: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Select, and compare with attention.

        Without mask and bounds the selection sees every key and the loss is causal, as it is there.
        """
        op = "FusedDSAIndexerLoss"
        keys, order = args.bounds(op, mask, varlen_starts, varlen_ends, key_positions, q.device)
        args.hides_or_not(op, mask, _TWICE)
        q, k = args.together(q, k)
        query, key = args.together(args.four_axes(query), args.heads_once(args.four_axes(key)))
        if order is not None:
            k, key = k.index_select(0, order), key.index_select(0, order)
        (sq, b), sk = q.shape[:2], k.shape[0]
        shared: dict[str, Any] = {"activation": args.activation(use_relu), "workspace": self.workspace}
        attention: dict[str, Any] = {
            "softmax_scale": softmax_scale,
            "row_mask": args.valid_rows(op, query_valid_rows, b, sq, q.device),
            "reduction": "sum" if calculate_per_token_loss else "mean",
            "group": pg_collection.tp if pg_collection.tp.size() > 1 else None,
        }
        if keys is None and mask is None:
            indices = select(q, weights, k, topk, **shared)
            # The support is the causal part of a selection that was not causal: a mask says so, of b · sq · sk floats.
            chosen = index_mask(indices, sk, dtype=torch.float32) if sparse_loss else None
            loss, _ = indexer_loss(
                q, weights, k, query, key, keys=KeyRange(offset=0), bias=chosen, **attention, **shared
            )
            return indices, loss * loss_coeff
        loss, chosen = indexer_loss(
            q,
            weights,
            k,
            query,
            key,
            topk=max(0, min(topk, sk)),
            sparse=bool(sparse_loss),
            keys=keys,
            bias=args.additive(mask),
            **attention,
            **shared,
        )
        assert chosen is not None
        return args.in_order(chosen.long(), order), loss * loss_coeff

    apply = __call__


@dataclass(frozen=True)
class Scatter:
    """`scatter_topk_into_index_mask`: in place."""

    def __call__(self, index_mask: Tensor, topk_indices: Tensor, *, seq_chunk_size: int = 256) -> None:
        """Set selected entries to 0; seq_chunk_size changes nothing."""
        update_index_mask_(index_mask, args.picks(topk_indices, index_mask.device))


@dataclass(frozen=True)
class Attention:
    """`unfused_dsa_fn`: [sq, b, np · hnv], or [t, np · hnv] for packed inputs."""

    workspace: int | None

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        topk_indices: Tensor,
        softmax_scale: float,
        mask: Tensor | None = None,
        varlen_starts: Tensor | None = None,
        varlen_ends: Tensor | None = None,
        key_positions: Tensor | None = None,
    ) -> Tensor:
        """Attend to the selected, visible keys."""
        op = "unfused_dsa_fn"
        if value is None:
            # Upstream's own type here: what catches its refusal has to catch ours. Nothing of this is unfinished.
            raise NotImplementedError(f"{op}: value must be a tensor, got None.")
        packed = query.dim() == 3
        indices, keys = _seen(op, topk_indices, mask, varlen_starts, varlen_ends, key_positions, query.device)
        out = attend(query, key, value, indices, softmax_scale, keys=keys, workspace=self.workspace)
        out = out.flatten(2)
        return out.squeeze(1) if packed else out


@dataclass(frozen=True)
class AbsorbedAttention:
    """`_unfused_absorbed_dsa_fn`: [sq, b, np, v_channels]."""

    workspace: int | None

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        topk_indices: Tensor,
        softmax_scale: float,
        v_channels: int,
        mask: Tensor | None = None,
        varlen_starts: Tensor | None = None,
        varlen_ends: Tensor | None = None,
        key_positions: Tensor | None = None,
    ) -> Tensor:
        """Attend with values that are the first channels of the key."""
        op = "_unfused_absorbed_dsa_fn"
        indices, keys = _seen(op, topk_indices, mask, varlen_starts, varlen_ends, key_positions, query.device)
        rest: dict[str, Any] = {"v_dim": v_channels, "keys": keys, "workspace": self.workspace}
        return attend(query, key, None, indices, softmax_scale, **rest)


def attend(
    query: Tensor, key: Tensor, value: Tensor | None, indices: Tensor, softmax_scale: float, **rest: Any
) -> Tensor:
    """Return [sq, b, np, hnv] in value's dtype, from inputs of all ranks, dtypes and heads that Megatron takes."""
    given = [args.four_axes(x) for x in (query, key, value) if x is not None]
    dtype, heads = given[-1].dtype, {x.shape[2] for x in given[1:]}
    if len(heads) > 1:  # one key head beside many value heads, or the other way about
        given[1:] = [x.expand(-1, -1, max(heads), -1) for x in given[1:]]
    given = list(args.together(*given))
    out = sparse_attention(
        given[0], given[1], None if value is None else given[2], indices, softmax_scale=softmax_scale, **rest
    )
    assert isinstance(out, Tensor)
    return out.to(dtype)


def _seen(
    op: str,
    indices: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    positions: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, KeyRange | None]:
    """Return the selection and the range of keys that rows may see; what no range says is taken out of the selection.

    Without mask and bounds attention is causal, row s seeing keys 0 to s, as it is there.
    """
    indices = args.picks(indices, device)
    keys, order = args.bounds(op, mask, starts, ends, positions, device)
    if mask is not None:
        args.hides_or_not(op, mask, _NO_BIAS)
        seen = mask.expand(indices.shape[0], -1, -1).gather(-1, indices.clamp(min=0).long()) == 0
        return indices.masked_fill(~seen, -1), None
    if keys is None:
        return indices, KeyRange(offset=0)
    if order is None:
        return indices, keys
    assert keys.start is not None
    assert keys.end is not None
    place = order.argsort()[indices.clamp(min=0).long()]
    seen = (place >= keys.start.unsqueeze(-1)) & (place < keys.end.unsqueeze(-1))
    return indices.masked_fill(~seen, -1), None
