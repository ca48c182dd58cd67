"""Dense masked attention, which builds [b, np, sq, sk]: the oracle of sparse attention, and its baseline.

Plain differentiable PyTorch. Run on float64 inputs it is the truth; on any other dtype it sets the error budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headfold.contract import ScoreCall, compute_dtype
from headfold.materialized import invisible

if TYPE_CHECKING:
    from torch import Tensor

    from headfold.attention_contract import AttentionCall


def sparse_attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return out [b, sq, np, v_dim] in query's dtype and lse [b, np, sq] in the compute dtype."""
    return dense(call, hidden_keys(call))


def dense(call: AttentionCall, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """As `sparse_attention`, with the selection and the range as one mask: hidden, bool [b, sq, sk].

    A column for the sink stands before the keys; without one it holds the lowest finite number, which counts only in a
    row that has no key.
    """
    dtype = compute_dtype(call.query.dtype)
    group = call.query.shape[2] // call.key.shape[2]
    value = call.key[..., : call.v_dim] if call.value is None else call.value
    with torch.autocast(call.query.device.type, enabled=False):
        query = call.query.to(dtype).transpose(1, 2)
        key, value = (x.to(dtype).transpose(1, 2).repeat_interleave(group, 1) for x in (call.key, value))
        logits = (query @ key.transpose(2, 3)) * call.scale
        logits = logits.masked_fill(hidden.unsqueeze(1), float("-inf"))
        lowest = torch.finfo(dtype).min
        sink = query.new_full((query.shape[1],), lowest) if call.sink is None else call.sink.to(dtype).clamp(min=lowest)
        logits = torch.cat([sink.view(1, -1, 1, 1).expand(*logits.shape[:3], 1), logits], -1)
        lse = torch.logsumexp(logits, -1)
        lse = lse.masked_fill(lse == lowest, float("-inf"))
        out = torch.softmax(logits, -1)[..., 1:] @ value
        return out.transpose(1, 2).to(call.query.dtype), lse


def hidden_keys(call: AttentionCall) -> Tensor:
    """Boolean [b, sq, sk], true where the row did not select the key or may not see it."""
    (b, sq, _), sk = call.indices.shape, call.key.shape[1]
    hidden = torch.ones(b, sq, sk + 1, dtype=torch.bool, device=call.indices.device)
    hidden = hidden.scatter(2, (call.indices.long() + 1).clamp(min=0), False)[..., 1:]
    ranged = ScoreCall(
        q=call.query,
        weights=None,
        k=call.key,
        start=call.start,
        end=call.end,
        offset=call.offset,
        ratio=call.ratio,
        bias=None,
        relu=False,
        scale=1.0,
        workspace=0,
    )
    barred = invisible(ranged)
    return hidden if barred is None else hidden | barred


def reordered(call: AttentionCall, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the same results with every sum, forward and backward, taken in a shuffled order.

    What they differ by from `sparse_attention` is rounding of the materialised path alone.
    """
    (_, sq, heads, dim), (_, sk, key_heads, _) = call.query.shape, call.key.shape

    def shuffled(n: int) -> Tensor:
        return torch.randperm(n, generator=generator, device=call.query.device)

    rows, keys, width, v_width = shuffled(sq), shuffled(sk), shuffled(dim), shuffled(call.v_dim)
    within = shuffled(heads // key_heads)
    group = (torch.arange(key_heads, device=within.device).unsqueeze(1) * len(within) + within).view(-1)
    value = call.key[..., : call.v_dim] if call.value is None else call.value
    out, lse = dense(
        call._replace(
            query=call.query[:, rows][:, :, group][..., width],
            key=call.key[:, keys][..., width],
            value=value[:, keys][..., v_width],
            sink=None if call.sink is None else call.sink[group],
        ),
        hidden_keys(call)[:, rows][:, :, keys],
    )
    back, order = group.argsort(), rows.argsort()
    return out[:, order][:, :, back][..., v_width.argsort()], lse[:, back][:, :, order]
