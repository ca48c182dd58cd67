"""Indexers that score groups of keys, each by a key made of its members: what runs in their layers.

    deepseek_v4   compressed keys, each of a window of positions, which attention reads too
    glm5_next     pools of neighbouring keys, of which attention reads the members
    qwen4_exp     blocks of neighbouring keys without head weights, of which attention reads the members

A row sees a group once it sees its last member. The groups that it sees are a range, so that no tensor of rows by keys
is made; the keys past the last whole group, which are selected always, follow the selection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headfold.contract import UnsupportedError
from headfold.integrations.transformers.masks import NAME, Selected, VisibleKeys
from headfold.integrations.transformers.models import MODEL_TYPES, head_weights
from headfold.integrations.transformers.training import state_of
from headfold.keyrange import KeyRange
from headfold.selection import index_topk


@torch.no_grad()
def compressed_forward(
    self: Any,
    hidden_states: Tensor,
    q_residual: Tensor,
    position_ids: Tensor,
    past_key_values: Any,
    layer_idx: int,
) -> Tensor:
    """Select compressed keys: int64 [b, s, min(topk, number of them)], -1 where a row sees fewer."""
    b, s, _ = hidden_states.shape
    rotate, topk = MODEL_TYPES["deepseek_v4"].rotate, self.index_topk
    k = _compressed(self, hidden_states, past_key_values, layer_idx)
    q = self.q_b_proj(q_residual).view(b, s, self.num_heads, self.head_dim)
    turns = self.rotary_emb(hidden_states, position_ids=position_ids, layer_type=self.rope_layer_type)
    q = rotate(q, *turns, unsqueeze_dim=2)
    weights = head_weights(self.scorer.weights_proj, hidden_states, self.num_heads)
    keys = KeyRange.at_positions(position_ids.expand(b, -1), ratio=self.compress_rate)
    return _select(self, q, weights, k, topk, keys=keys, scale=self.scorer.softmax_scale).long()


def _compressed(indexer: Any, hidden: Tensor, cache: Any, layer_idx: int) -> Tensor:
    """Return the compressed keys [b, n, d] of all positions so far; the rest of a window waits in the cache.

    Each is a weighted mean, by channel, of the second half of what its window's positions give, and of the first half
    of what those of the window before give.
    """
    rate, d = indexer.compress_rate, indexer.head_dim
    layer, first = None if cache is None else cache.layers[layer_idx], 0
    kv, gate = indexer.kv_proj(hidden), indexer.gate_proj(hidden)
    if layer is None:
        whole = kv.shape[1] // rate * rate
        kv, gate = kv[:, :whole], gate[:, :whole]
    else:
        kv, gate, first = layer.store_compression_weights("indexer", kv, gate)
    b, n = kv.shape[0], kv.shape[1] // rate
    k: Tensor = kv.new_zeros(b, 0, d)
    if n:
        kv = kv.view(b, n, rate, 2 * d)
        gate = gate.view(b, n, rate, 2 * d) + indexer.position_bias
        before = None, None
        if layer is not None:
            before = layer.update_overlap_state("indexer", kv, gate, d)
        kv, gate = _overlapped(kv, before[0], 0.0), _overlapped(gate, before[1], -torch.inf)
        share = gate.softmax(2, dtype=torch.promote_types(gate.dtype, torch.float32)).to(kv.dtype)
        k = indexer.kv_norm((kv * share).sum(2))
        places = (torch.arange(n, device=k.device) * rate + first).expand(b, -1)
        turns = indexer.rotary_emb(k, position_ids=places, layer_type=indexer.rope_layer_type)
        k = MODEL_TYPES["deepseek_v4"].rotate(k.unsqueeze(1), *turns).squeeze(1)
    if layer is not None:
        k = layer.update_compressor_states("indexer", k)
    return k


def _overlapped(x: Tensor, before: Tensor | None, none: float) -> Tensor:
    """Put the window before beside each window: [b, n, rate, 2 · d] -> [b, n, 2 · rate, d]."""
    older, newer = x.chunk(2, -1)
    head = x.new_full(older[:, 0].shape, none) if before is None else before.to(x.dtype)
    return torch.cat([torch.cat([head.unsqueeze(1), older[:, :-1]], 1), newer], 2)


@torch.no_grad()
def pooled_forward(
    self: Any, hidden_states: Tensor, q_resid: Tensor, attention_mask: Tensor, past_key_values: Any
) -> Tensor:
    """Select the members of the best pools, and the keys past the last whole pool where the model says so.

    Args: attention_mask: bool [b, s], false where a row is padding.

    Returns: int32 [b, s, topk], and pool - 1 more with the rest; -1 where there are fewer.
    """
    b, s, _ = hidden_states.shape
    pool, device = self.index_kpool, hidden_states.device
    q = self.wq_b(q_resid).view(b, s, self.n_heads, self.head_dim)
    k = self.k_norm(self.wk(hidden_states))
    gates = torch.nn.functional.linear(hidden_states, self.index_kpool_compress_gate)
    packed = torch.cat([k, gates, attention_mask.to(k.dtype).unsqueeze(-1)], -1)
    own = torch.arange(s, device=device)
    if past_key_values is not None:
        packed = past_key_values.update_indexer(packed, self.layer_idx)
        own = own + (past_key_values.layers[self.layer_idx].get_seq_length() - s)
    k, gates, real = packed.split([self.head_dim, self.head_dim, 1], -1)
    real, t = real.squeeze(-1).bool(), k.shape[1]
    n = t // pool
    # Pools begin at the first key that is no padding; one that holds padding is no pool.
    first = torch.where(real.any(-1), real.long().argmax(-1), t)
    members = first[:, None] + torch.arange(n * pool, device=device)
    whole = (real.gather(1, members.clamp(max=t - 1)) & (members < t)).view(b, n, pool).all(-1)
    k, gates = (_gathered(x, members).view(b, n, pool, self.head_dim) for x in (k, gates))
    logits = gates.to(torch.promote_types(gates.dtype, torch.float32)) + self.index_kpool_compress_ape
    k = (logits.softmax(2).to(k.dtype) * k).sum(2)
    seen = torch.div(own - first[:, None] + 1, pool, rounding_mode="floor").clamp(0, n)
    bias = torch.zeros(b, n, device=device).masked_fill_(~whole, -torch.inf).unsqueeze(1).expand(-1, s, -1)
    weights = head_weights(self.weights_proj, hidden_states, self.n_heads)
    options = {"keys": KeyRange(end=seen.int()), "bias": bias, "scale": self.softmax_scale}
    picked = _select(self, q, weights, k, self.index_topk // pool, **options)
    offsets = torch.arange(pool, device=device)
    chosen = (first[:, None, None, None] + picked[..., None] * pool + offsets).where(picked[..., None] >= 0, -1)
    found, width = [chosen.flatten(2)], self.index_topk
    if self.index_kpool_always_select_tail:
        count = real.cumsum(-1).gather(1, own.clamp(max=t - 1).expand(b, -1))
        left = count % pool
        rest = (first[:, None] + count - left).unsqueeze(-1) + offsets[: pool - 1]
        shown = (rest < t) & (rest <= own[:, None]) & (offsets[: pool - 1] < left.unsqueeze(-1))
        shown &= real.gather(1, rest.clamp(max=t - 1).flatten(1)).view_as(rest)
        found.append(rest.where(shown, -1))
        width += pool - 1
    indices = torch.cat(found, -1)
    indices = torch.nn.functional.pad(indices, (0, width - indices.shape[-1]), value=-1)
    return indices.masked_fill_(~attention_mask.unsqueeze(-1), -1).int()


def selecting(build_mask: Callable[..., Any]) -> Callable[..., Any]:
    """Return what stands for a pooled attention's build_attention_mask_from_topk, given that.

    Under the attention "headfold" it hands the selection on as it is, where the model makes a mask of it.
    """

    def build(self: Any, topk_indices: Tensor, query_states: Tensor, kv_length: int) -> Any:
        if self.config._attn_implementation == NAME:
            return Selected(topk_indices)
        return build_mask(self, topk_indices, query_states, kv_length)

    return build


@torch.no_grad()
def block_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: VisibleKeys | Tensor,
    past_key_values: Any,
) -> Selected:
    """Select the members of the best blocks, and the keys past the last whole block: int32 [b, s, n], -1 for none."""
    if not isinstance(attention_mask, VisibleKeys):
        raise UnsupportedError(
            f'headfold runs indexers of qwen4_exp under attn_implementation="{NAME}" and a mask [b, sk] or none, got '
            "one with a row per query, whose blocks of keys could differ from row to row."
        )
    b, s, _ = hidden_states.shape
    rotate, d, ratio = MODEL_TYPES["qwen4_exp_text"].rotate, self.index_head_dim, self.compress_ratio
    q, k = self.index_qk_proj(hidden_states).split([self.index_n_heads * d, d], -1)
    q = self.q_layernorm(q.view(b, s, self.index_n_heads, d))
    cos, sin = position_embeddings  # of all positions so far
    q = rotate(q, cos=cos[:, -s:], sin=sin[:, -s:], unsqueeze_dim=2)
    if past_key_values is not None:
        k = past_key_values.update_indexer(k, self.layer_idx)
    t = k.shape[1]
    blocks = _blocks(attention_mask, b, t, ratio, k.device)
    n = blocks.members.shape[1]
    k = _gathered(k, blocks.members.flatten(1)).view(b, n, ratio, d)
    k = self.k_layernorm(k.to(torch.promote_types(k.dtype, torch.float32)).mean(2).to(k.dtype)).unsqueeze(2)
    turns = {name: _gathered(x.expand(b, -1, -1), blocks.members[..., 0])
             for name, x in (("cos", cos), ("sin", sin))}  # fmt: skip
    k = rotate(k, **turns, unsqueeze_dim=2).squeeze(2)
    picked = _select(self, q, None, k, self.block_topk, keys=blocks.seen, scale=d**-0.5)
    chosen = _gathered(blocks.members, picked.clamp(min=0).flatten(1)).view(b, s, -1, ratio)
    chosen = chosen.where(picked.unsqueeze(-1) >= 0, -1)
    return Selected(torch.cat([chosen.flatten(2), blocks.rest], -1).int())


class _Blocks(NamedTuple):
    """Blocks of keys.

    members: [b, n, ratio].   seen: the range of blocks that each row sees.   rest: [b, s, ratio - 1], -1 for none.
    """

    members: Tensor
    seen: KeyRange
    rest: Tensor


def _blocks(mask: VisibleKeys, b: int, t: int, ratio: int, device: torch.device) -> _Blocks:
    """Divide the keys that are no padding into blocks, from the first that the rows of their sequence see."""
    real = torch.ones(b, t, dtype=torch.bool, device=device) if mask.padding is None else mask.padding.to(device)
    count = real.cumsum(-1)
    own = mask.own(device).expand(b, -1)
    start = torch.zeros_like(own)
    before = torch.zeros_like(count[:, :1])  # keys before the sequence's first, of every key's sequence
    if mask.keys.start is not None:
        if mask.sq != t:
            raise UnsupportedError(
                f"headfold runs indexers of qwen4_exp on packed sequences without a cache, got {mask.sq} rows and {t} "
                "keys."
            )
        start = mask.keys.start.to(device).long().expand(b, -1)
        before = (count - real.long()).gather(1, start)
    order = torch.argsort(~real, dim=-1, stable=True)  # the keys that are no padding, then the others
    last = real & ((count - before) % ratio == 0)
    made = last.cumsum(-1)
    n, places = t // ratio, torch.arange(t, device=device)
    ends = places.where(last, t).sort(-1).values[:, :n].clamp(max=t - 1)
    at = count.gather(1, ends).unsqueeze(-1) - ratio + torch.arange(ratio, device=device)
    members = order.gather(1, at.clamp(min=0).flatten(1)).view(b, n, ratio)
    seen = KeyRange((made - last.long()).gather(1, start).int(), made.gather(1, own).int())
    visible = count.gather(1, own) - before
    left = visible % ratio
    offsets = torch.arange(ratio - 1, device=device)
    rest = (before + visible - left).unsqueeze(-1) + offsets
    rest = order.gather(1, rest.clamp(max=t - 1).flatten(1)).view(b, own.shape[1], ratio - 1)
    return _Blocks(members, seen, rest.where(offsets < left.unsqueeze(-1), -1))


def _select(indexer: Any, q: Tensor, weights: Tensor | None, k: Tensor, topk: int, **options: Any) -> Tensor:
    """Return the selection [b, s, min(topk, n)] of groups."""
    common = torch.promote_types(q.dtype, k.dtype)
    q, k, workspace = q.to(common), k.to(common), state_of(indexer).workspace
    return index_topk(q, weights, k, min(topk, k.shape[1]), layout="bshd", workspace=workspace, **options).indices


def _gathered(x: Tensor, places: Tensor) -> Tensor:
    """Return the rows of x [b, t, d] at places [b, n], the last one for those beyond."""
    return x.gather(1, places.clamp(max=x.shape[1] - 1).unsqueeze(-1).expand(-1, -1, x.shape[2]))
