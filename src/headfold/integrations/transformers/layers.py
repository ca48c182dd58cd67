"""What runs in a layer: the indexer's forward, and the attention function "headfold"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headfold.attention import sparse_attention
from headfold.contract import UnsupportedError
from headfold.integrations.transformers.masks import NAME, Selected, VisibleKeys
from headfold.integrations.transformers.models import check_attention, model_type_of, operands
from headfold.integrations.transformers.training import Operands, state_of
from headfold.selection import index_topk


def latent_forward(
    self: Any,
    hidden_states: Tensor,
    q_resid: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: VisibleKeys | Tensor,
    position_ids: Tensor,
    past_key_values: Any = None,
) -> Tensor:
    """Select keys for queries that are projected from the attention's query latent; see `select`."""
    return select(self, hidden_states, q_resid, position_embeddings, attention_mask, position_ids, past_key_values)


def direct_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: VisibleKeys | Tensor,
    position_ids: Tensor,
    past_key_values: Any = None,
) -> Tensor:
    """Select keys for queries that are projected from the layer's input; see `select`."""
    return select(
        self, hidden_states, hidden_states, position_embeddings, attention_mask, position_ids, past_key_values
    )


def select(
    indexer: Any,
    hidden: Tensor,
    latent: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    mask: VisibleKeys | Tensor,
    position_ids: Tensor,
    cache: Any,
) -> Tensor:
    """Return the selection int32 [b, s, min(topk, t)] of a layer, by index_topk.

    Rows that see fewer keys end in -1. Beside a mask in a tensor they end in 0: other attentions scatter a selection
    into that mask, and what a row may not see stays hidden in it.

    In training the operands stay with the indexer for its loss. They are made of detached inputs: the loss trains the
    indexer alone.
    """
    state = state_of(indexer)
    training = state.training if indexer.training else None
    with torch.set_grad_enabled(training is not None and torch.is_grad_enabled()):
        model_type = model_type_of("headfold", indexer.config)
        made = operands(model_type, indexer, hidden.detach(), latent.detach(), position_embeddings, position_ids)
        q, weights, k = made
        if cache is not None:
            k = cache.update_indexer(k, indexer.layer_idx)
        common = torch.promote_types(q.dtype, k.dtype)
        q, k = q.to(common), k.to(common)
    visible = mask if isinstance(mask, VisibleKeys) else None
    bias = mask.bias if isinstance(mask, VisibleKeys) else _bias(mask)
    topk = min(indexer.index_topk, k.shape[1])
    if training is not None:
        if visible is None:
            raise UnsupportedError(
                f'headfold trains indexers under attn_implementation="{NAME}" and a mask [b, sk] or none, got one with '
                "a row per query."
            )
        state.left = Operands(q, weights, k, visible, topk, indexer.softmax_scale)
        if training.dense:
            return hidden.new_empty(*hidden.shape[:2], 0, dtype=torch.int32)
    selected = index_topk(
        q,
        weights,
        k,
        topk,
        keys=None if visible is None else visible.keys,
        bias=bias,
        scale=indexer.softmax_scale,
        layout="bshd",
        workspace=state.workspace,
    ).indices
    return selected.clamp_(min=0) if visible is None else selected


def _bias(mask: Tensor) -> Tensor:
    """Return what a mask [b, s, t] adds to scores: 0 or -inf where it is bool, itself where it is not."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=torch.float16, device=mask.device).masked_fill_(~mask, -torch.inf)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: VisibleKeys | Selected | Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    indices: Tensor | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attend to a selection, or to every visible key of a layer without one; registered as attention "headfold".

    Attentions of both directions, of encoders beside a text model that share its attention's name, run on sdpa.

    Args:
        module: the attention.
        query: [b, np, s, hn].
        key: [b, np_k, t, hn].
        value: [b, np_k, t, v].
        attention_mask: what `visible_keys` returned, a selection, or a bool mask [b, 1, s, t] of the caller's.
        scaling: factor of the logits.
        dropout: 0.
        indices: int32 [b, s, topk], or None.
        s_aux: [np], sinks.
        rest: sdpa's, where that runs.

    Returns: out [b, s, np, v], and None where other attentions return their weights.
    """
    if not getattr(module, "is_causal", True):
        mask: Any = attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **rest)
    check_attention(module.config)
    if dropout:
        raise UnsupportedError(f'attn_implementation="{NAME}" has no dropout, got {dropout}. Set attention_dropout=0.')
    state = state_of(module)
    training = state.training if module.training else None
    query, key, value = (x.transpose(1, 2) for x in _alike(query, key, value))
    indexer = getattr(module, "indexer", None)
    if training is not None and indexer is not None:
        own = state_of(indexer)
        left, own.left = own.left, None
        if left is None:
            raise ValueError(f"headfold: layer {module.layer_idx} attends before its indexer ran.")
        training.add_layer(module.layer_idx, left, query, key, scaling)
    b, device, keys = query.shape[0], query.device, None
    if isinstance(attention_mask, Selected):
        indices = attention_mask.indices
    elif indices is None or (training is not None and training.dense):
        indices = torch.arange(key.shape[1], dtype=torch.int32, device=device).expand(b, query.shape[1], -1)
        if isinstance(attention_mask, VisibleKeys):
            indices, keys = attention_mask.every_key(b, device), attention_mask.keys
    if not isinstance(attention_mask, (VisibleKeys, Selected)):
        indices = _shown(attention_mask, indices)
    out = sparse_attention(
        query,
        key,
        value,
        indices,
        softmax_scale=scaling,
        sink=s_aux,
        keys=keys,
        layout="bshd",
        workspace=state.workspace,
    )
    assert isinstance(out, Tensor)
    return out, None


def _alike(*operands: Tensor) -> list[Tensor]:
    """Return operands in one dtype: autocast's, as sdpa has them under it, where rotary parts come in float32."""
    device = operands[0].device.type
    dtype = operands[0].dtype
    for x in operands[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) for x in operands]


def _shown(mask: Tensor | None, indices: Tensor) -> Tensor:
    """Return a selection with -1 for keys that a mask [b, 1, s, t] of the caller's hides."""
    if mask is None or mask.dtype != torch.bool:
        got = "None" if mask is None else str(mask.dtype)
        raise UnsupportedError(
            f'attn_implementation="{NAME}" takes a mask [b, sk], or [b, 1, sq, sk] of dtype bool, got {got}.'
        )
    seen = mask[:, 0].expand(*indices.shape[:2], -1).gather(-1, indices.clamp(min=0).long())
    return indices.where(seen, -1)
