"""The teacher of a loss: the attention mass that each key of a slab of query rows gets, summed over heads."""

from __future__ import annotations

import torch
from torch import Tensor

from headfold.backends.eager.scratch import NEG_INF, head, stage
from headfold.loss_tiles import LossTile
from headfold.tiles import blocks


class Teacher:
    """Fills slabs of attention mass, one head at a time, or a few that share their keys, and never holds more."""

    def __init__(self, plan: LossTile, dtype: torch.dtype, device: torch.device, softmax_scale: float) -> None:
        self.plan, self.softmax_scale = plan, softmax_scale
        rows = plan.tile.rows * plan.heads
        self.query, self.key, self.logits = (
            torch.empty(count, dtype=dtype, device=device)
            for count in (rows * plan.hn, plan.keys * plan.hn, rows * plan.sk)
        )

    def fill(self, mass: Tensor, query: Tensor, key: Tensor, hidden: Tensor | None) -> None:
        """Write into mass [rows, n] the sum over heads of softmax(query · key · softmax_scale) over the support.

        query: [rows, np, hn].   key: [sk, np_k, hn], of which the first n are read.   hidden: bool [rows, m], true for
        those of the last m keys that are no support; a row without support gets NaN.
        """
        (rows, n), (np_k, hn) = mass.shape, key.shape[1:]
        shared = query.shape[1] // np_k
        first = True
        for head_of_keys in range(np_k):
            for some in blocks(shared, self.plan.heads):
                heads = some[1] - some[0]
                at = head_of_keys * shared + some[0]
                staged = head(self.query, rows, heads, hn).copy_(query[:, at : at + heads]).mul_(self.softmax_scale)
                logits = head(self.logits, rows * heads, n)
                for span in blocks(n, self.plan.keys):
                    keys = stage(key[slice(*span), head_of_keys], self.key)
                    torch.mm(staged.view(-1, hn), keys.t(), out=logits[:, slice(*span)])
                by_row = logits.view(rows, heads, n)
                if hidden is not None:
                    by_row[..., n - hidden.shape[1] :].masked_fill_(hidden.unsqueeze(1), NEG_INF)
                torch.softmax(logits, 1, out=logits)
                for one in by_row.unbind(1):
                    if first:
                        mass.copy_(one)
                    else:
                        mass += one
                    first = False
