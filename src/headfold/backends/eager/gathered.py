"""selected_scores by gathered tiles: each row multiplies keys of its own, and their gradients are scattered back.

A tile gathers the selected keys of a few rows. Keys that a row may not see, and the -1 that pads a selection, stand on
some key's place in it: forward they are overwritten with -inf, backward their rows are zeros, so that not even a NaN
of a key that nobody selected reaches a gradient. A NaN query reaches dk of whatever key stands there, as it reaches
every key of a score matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headfold.backends.eager.scratch import (
    NEG_INF,
    Queries,
    Visible,
    batch_element,
    blank,
    fold,
    head,
    scatter_add,
    threshold_backward,
)
from headfold.contract import compute_dtype
from headfold.tiles import GatherTile, blocks


def gather_tile_of(q: Tensor, k: Tensor, indices: Tensor, relu: bool) -> GatherTile:
    """Return the tile of a gathered walk over batch-first q [b, sq, h, d] and indices [b, sq, topk], for any k."""
    _, sq, h, d = q.shape
    size = compute_dtype(q.dtype).itemsize
    shape = sq, indices.shape[2], h, d, size, q.dtype.itemsize
    return GatherTile.of(*shape, relu=relu, accelerator=q.device.type != "cpu")


class _Gathered:
    """The buffers of one gathered walk, and the steps that forward and backward share."""

    def __init__(self, tile: GatherTile, like: Tensor) -> None:
        count = tile.rows * tile.picks
        self.queries = Queries(tile.rows, tile.h, tile.d, like)
        empty, device = self.queries.empty, like.device
        self.keys = empty(count * tile.d)
        uncast = like.dtype != self.queries.dtype
        self.uncast = torch.empty(count * tile.d, dtype=like.dtype, device=device) if uncast else self.keys
        self.logits = empty(tile.logits)
        self.scores, self.bias = empty(count), empty(count)
        self.given_bias = torch.empty(8 * count, dtype=torch.uint8, device=device)
        self.picked = torch.empty(count, dtype=torch.int64, device=device)
        self.hidden = torch.empty(2, count, dtype=torch.bool, device=device)

    def gather(
        self, k: Tensor, indices: Tensor, visible: Visible, row: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return keys [rows, picks, d], their places int64 and hidden bool [rows, picks], and their bias or None."""
        rows, picks = indices.shape
        picked = head(self.picked, rows, picks).copy_(indices)
        hidden = torch.lt(picked, 0, out=head(self.hidden[0], rows, picks))
        picked.clamp_(min=0)
        bias = None
        if visible.bias is not None:
            given = head(self.given_bias.view(visible.bias.dtype), rows, picks)
            bias = torch.gather(visible.bias[slice(*row)], 1, picked, out=given)
        visible.hide(hidden, row, picked, bias, head(self.hidden[1], rows, picks))
        keys = head(self.keys, rows * picks, k.shape[1])
        gathered = torch.index_select(k, 0, picked.view(-1), out=head(self.uncast, *keys.shape))
        if gathered.dtype != keys.dtype:
            keys.copy_(gathered)
        return keys.view(rows, picks, -1), picked, hidden, bias


def selected_scores(
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    indices: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    bias: Tensor | None,
    offset: int | None,
    ratio: int,
    relu: bool,
    scale: float,
) -> Tensor:
    """Scores [b, sq, topk] at the given indices of a checked, batch-first call (see `headfold.contract.ScoreCall`)."""
    b, sq, topk = indices.shape
    out = torch.empty(b, sq, topk, dtype=compute_dtype(q.dtype), device=q.device)
    if k.shape[1] == 0:
        return out.fill_(NEG_INF)
    tile = gather_tile_of(q, k, indices, relu)
    with torch.autocast(q.device.type, enabled=False):
        s = _Gathered(tile, q)
        for i in range(b):
            visible, factors_of = Visible.of(i, k.shape[1], start, end, bias, offset, ratio), batch_element(weights, i)
            for row in blocks(sq, tile.rows):
                query, factors = s.queries.stage(q[i, slice(*row)], _rows(factors_of, row))
                folded = None if relu else fold(query, factors, s.logits).unsqueeze(1)
                for pick in blocks(topk, tile.picks):
                    place = i, slice(*row), slice(*pick)
                    keys, _, hidden, added = s.gather(k[i], indices[place], visible, row)
                    scores = head(s.scores, *hidden.shape)
                    if folded is None:
                        logits = head(s.logits, *query.shape[:2], keys.shape[1])
                        rectified = torch.bmm(query, keys.transpose(1, 2), out=logits).relu_()
                        torch.bmm(factors.unsqueeze(1), rectified, out=scores.unsqueeze(1))
                    else:
                        torch.bmm(folded, keys.transpose(1, 2), out=scores.unsqueeze(1))
                    if scale != 1.0:
                        scores *= scale
                    if added is not None:
                        scores += head(s.bias, *added.shape).copy_(added)
                    out[place] = scores.masked_fill_(hidden, NEG_INF)
    return out


def selected_scores_backward(
    g: Tensor,
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    indices: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    bias: Tensor | None,
    offset: int | None,
    ratio: int,
    relu: bool,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, weights and k, each in its input's dtype; None where `needs` is false. dk is contiguous."""
    dq = torch.zeros_like(q) if needs[0] else None
    dweights = torch.zeros_like(weights) if needs[1] and weights is not None else None
    dk = torch.zeros(k.shape, dtype=k.dtype, device=k.device) if needs[2] else None
    if k.shape[1] == 0 or indices.shape[2] == 0:
        return dq, dweights, dk
    with torch.autocast(q.device.type, enabled=False):
        walk = _GatheredBackward(gather_tile_of(q, k, indices, relu), q, scale)
        cast = dk is not None and dk.dtype != walk.scratch.queries.dtype
        total = torch.empty(k.shape[1:], dtype=walk.scratch.queries.dtype, device=k.device) if cast else None
        for i in range(q.shape[0]):
            visible = Visible.of(i, k.shape[1], start, end, bias, offset, ratio)
            sums = batch_element(dk, i) if total is None else total.zero_()
            inputs = g[i], q[i], batch_element(weights, i), k[i], indices[i]
            walk.element(*inputs, visible, batch_element(dq, i), batch_element(dweights, i), sums)
            if dk is not None and total is not None:
                dk[i] = total
    return dq, dweights, dk


class _GatheredBackward:
    """Turns dscores at selected keys into gradients in three products, as BackwardWalk, over gathered keys.

    The gradient of a tile's keys, [rows, picks, d], is made in scratch and added to dk in the order of the picks.
    """

    def __init__(self, tile: GatherTile, like: Tensor, scale: float) -> None:
        self.scratch, self.tile, self.scale = _Gathered(tile, like), tile, scale
        empty = self.scratch.queries.empty
        self.u = empty(tile.rows * tile.h * tile.d)
        self.weighted = empty(tile.rows * tile.h * tile.d)
        self.dweights, self.part = empty(tile.rows * tile.h), empty(tile.rows * tile.h)
        self.dkeys = empty(tile.dkeys)

    def element(
        self,
        g: Tensor,
        q: Tensor,
        weights: Tensor | None,
        k: Tensor,
        indices: Tensor,
        visible: Visible,
        dq: Tensor | None,
        dweights: Tensor | None,
        dk: Tensor | None,
    ) -> None:
        """Write dq and dweights of one batch element and add to dk [sk, d], in the compute dtype and contiguous."""
        s, relu = self.scratch, self.tile.relu
        for row in blocks(q.shape[0], self.tile.rows):
            query, factors = s.queries.stage(q[slice(*row)], _rows(weights, row))
            weighted = head(self.weighted, *query.shape)
            if relu:
                operand = torch.mul(query, factors.unsqueeze(-1), out=weighted)
            else:
                operand = fold(query, factors, s.logits).unsqueeze(1)
            u = totals = None
            if dq is not None or (dweights is not None and not relu):
                u = head(self.u, *operand.shape).zero_()
            if dweights is not None:
                totals = head(self.dweights, *factors.shape).zero_()
            for pick in blocks(indices.shape[1], self.tile.picks):
                place = slice(*row), slice(*pick)
                keys, picked, hidden, _ = s.gather(k, indices[place], visible, row)
                blank(keys, hidden, s.bias)
                incoming = torch.mul(g[place], self.scale, out=head(s.scores, *hidden.shape)).masked_fill_(hidden, 0)
                a = incoming.unsqueeze(2)
                if relu:
                    # Keys first: with few heads beside many picks these products run faster this way round.
                    logits = head(s.logits, *keys.shape[:2], query.shape[1])
                    torch.bmm(keys, query.transpose(1, 2), out=logits)
                    if totals is not None:
                        self._add_sums(totals, incoming, logits.relu_(), self.part)
                    a = threshold_backward(a, logits, 0, grad_input=logits)
                if u is not None and relu:
                    u.baddbmm_(a.transpose(1, 2), keys)
                elif u is not None:
                    self._add_sums(u.squeeze(1), incoming, keys, self.weighted)
                if dk is not None:
                    dkeys = torch.bmm(a, operand, out=head(self.dkeys, *keys.shape))
                    scatter_add(dk, picked.view(-1), dkeys.flatten(0, 1))
            if dweights is not None and totals is not None:
                if u is not None and not relu:
                    torch.sum(torch.mul(u, query, out=weighted), -1, out=totals)
                dweights[slice(*row)] = totals
            if dq is not None and u is not None:
                dq[slice(*row)] = torch.mul(u, factors.unsqueeze(-1), out=weighted)

    def _add_sums(self, totals: Tensor, g: Tensor, x: Tensor, part: Tensor) -> None:
        """Add Σ_t g [rows, t] · x [rows, t, n] to totals [rows, n], in memory of `part` and in what dkeys take later.

        Summed in pairs: a CPU's product would sum as many terms as there are picks in one chain. On an accelerator the
        product splits them itself, and a sum would take scratch for that.
        """
        if g.device.type != "cpu":
            totals.unsqueeze(1).baddbmm_(g.unsqueeze(1), x)
            return
        rows, picks, n = x.shape
        for some in blocks(picks, max(1, self.dkeys.numel() // (rows * n))):
            span = slice(*some)
            terms = head(self.dkeys, rows, some[1] - some[0], n)
            torch.mul(x[:, span], g[:, span].unsqueeze(2), out=terms)
            totals += torch.sum(terms, 1, out=head(part, rows, n))


def _rows(x: Tensor | None, row: tuple[int, int]) -> Tensor | None:
    return None if x is None else x[slice(*row)]
