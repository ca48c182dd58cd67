"""PyTorch tiles, on any device: fold the heads while a tile of logits is hot.

A walk visits the fixed grid of `headfold.tiles`: blocks of query rows, and for each the blocks of keys it may see.
Scratch is allocated once per walk, and is all in `Tile.forward_bytes` and `Tile.backward_bytes`. No function here reads
tensor data on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headfold.backends.eager.scratch import (
    NEG_INF,
    Queries,
    Visible,
    fold,
    head,
    stage,
    threshold_backward,
)
from headfold.contract import compute_dtype
from headfold.tiles import Tile, blocks

# Terms that a matrix library may sum in one chain where the error budget is close: relative error grows with its root.
CHAIN = 256
# Products of fewer columns are summed in one chain whatever their length (docs/design.md, "Narrow products").
NARROW = 16


class _Scratch:
    """The buffers of one walk, allocated once, and the steps that forward and backward share."""

    def __init__(self, tile: Tile, like: Tensor, scale: float) -> None:
        self.tile, self.scale = tile, scale
        self.queries = Queries(tile.rows, tile.h, tile.d, like)
        self.dtype, self.device, self.empty = self.queries.dtype, self.queries.device, self.queries.empty
        self.logits = self.empty(tile.logits_bytes // tile.size)
        self.k = self.empty(tile.keys * tile.d)
        self.scores = self.empty(tile.rows * tile.keys)
        self.bias = self.empty(tile.rows * tile.keys)
        self.hidden = torch.empty(2, tile.rows * tile.keys, dtype=torch.bool, device=like.device)

    def product(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the logits [rows, h, keys] of one tile, in the scratch."""
        rows, h, d = q.shape
        logits = head(self.logits, rows * h, k.shape[0])
        torch.mm(q.view(rows * h, d), k.t(), out=logits)
        return logits.view(rows, h, k.shape[0])

    def cast_bias(self, bias: Tensor) -> Tensor:
        """Return a tile of the bias in the compute dtype; adding another dtype would allocate the cast."""
        if bias.dtype == self.dtype:
            return bias
        return head(self.bias, *bias.shape).copy_(bias)

    def mask(self, visible: Visible, row: tuple[int, int], key: tuple[int, int]) -> Tensor | None:
        """Return bool [rows, keys], true where the row may not see the key, or None when the whole tile is visible."""
        if not visible.partial(row[0], key[1]):
            return None
        hidden = head(self.hidden[0], row[1] - row[0], key[1] - key[0]).fill_(False)
        other = head(self.hidden[1], *hidden.shape)
        t = torch.arange(*key, device=self.device, dtype=torch.int32)
        bias = None if visible.bias is None else visible.bias[slice(*row), slice(*key)]
        visible.hide(hidden, row, t, bias, other)
        return hidden


class ForwardWalk:
    """Makes tiles of scores. q [sq, h, d], weights [sq, h] or None and k [sk, d] are views of one batch element."""

    def __init__(self, tile: Tile, like: Tensor, scale: float) -> None:
        self.scratch, self.tile = _Scratch(tile, like, scale), tile

    def tiles(
        self, q: Tensor, weights: Tensor | None, k: Tensor, visible: Visible, rows: tuple[int, int]
    ) -> Iterator[tuple[tuple[int, int], tuple[int, int], Tensor]]:
        """Yield (rows, keys, scores [rows, keys]) of every tile that the static bound lets some row see, row by row.

        Scores lie in the scratch and last until the next tile. rows[0] must be a multiple of tile.rows, so that tiles
        lie on the grid. Keys that a row may not see score -inf; keys beyond the bound of a row block are not visited.
        """
        s = self.scratch
        for row in blocks(rows[1], self.tile.rows, rows[0]):
            query, factors = s.queries.stage(q[slice(*row)], None if weights is None else weights[slice(*row)])
            folded = None if self.tile.relu else fold(query, factors, s.logits)
            for key in blocks(visible.limit(row[1] - 1), self.tile.keys):
                keys = stage(k[slice(*key)], s.k)
                scores = head(s.scores, row[1] - row[0], key[1] - key[0])
                if folded is None:
                    torch.bmm(factors.unsqueeze(1), s.product(query, keys).relu_(), out=scores.unsqueeze(1))
                else:
                    torch.mm(folded, keys.t(), out=scores)
                if s.scale != 1.0:
                    scores *= s.scale
                if visible.bias is not None:
                    scores += s.cast_bias(visible.bias[slice(*row), slice(*key)])
                hidden = s.mask(visible, row, key)
                if hidden is not None:
                    scores.masked_fill_(hidden, NEG_INF)
                yield row, key, scores


class BackwardWalk:
    """Turns dscores into gradients in three products (logits, u, dk).

    With a = g·[logit > 0] and u = Σ_t a·k: dq = weights·u and dk = Σ_{s,h} aᵀ·(weights·q). dweights = Σ_t g·relu(logit)
    is one pass over the tile. It also equals q·u, which would save the pass, but u is summed in the long chains of a
    matrix product and over a few thousand keys that can cost more than the error budget. Without an activation a is g
    itself, one row for all heads, and dweights is q·u. Only what the gradients asked for need is made.
    """

    def __init__(self, tile: Tile, like: Tensor, scale: float, after: ForwardWalk | None = None) -> None:
        """Make the buffers; a walk that follows a forward walk of the same tile, slab by slab, shares its buffers."""
        self.scratch, self.tile = _Scratch(tile, like, scale) if after is None else after.scratch, tile
        self.u = self.scratch.empty(tile.rows * tile.h * tile.d)
        self.weighted = self.scratch.empty(tile.rows * tile.h * tile.d)
        self.dweights = self.scratch.empty(tile.rows * tile.h)
        self.narrow = self.scratch.empty(tile.keys * tile.d) if tile.narrow else None

    def slab(
        self,
        g: Tensor,
        q: Tensor,
        weights: Tensor | None,
        k: Tensor,
        visible: Visible,
        rows: tuple[int, int],
        dq: Tensor | None,
        dweights: Tensor | None,
        dk: Tensor | None,
        *,
        kept: bool = False,
    ) -> None:
        """Write dq and dweights of query rows [first, end) and add to dk, given g = dL/dscores [end - first, sk].

        q, weights, k, dq, dweights: as in ForwardWalk, the whole batch element.   dk: [sk, d] in the compute dtype.
        kept: whether the walk that this one follows left the rectified logits of these rows, in a single tile.
        """
        s = self.scratch
        for first, end in blocks(rows[1], self.tile.rows, rows[0]):
            query, factors = s.queries.stage(q[first:end], None if weights is None else weights[first:end])
            weighted = head(self.weighted, *query.shape)
            if self.tile.relu:
                operand = torch.mul(query, factors.unsqueeze(-1), out=weighted)
            else:
                operand = fold(query, factors, s.logits).unsqueeze(1)
            u = totals = None
            if dq is not None or (dweights is not None and not self.tile.relu):
                u = head(self.u, *operand.shape).zero_()
            if dweights is not None:
                totals = head(self.dweights, *factors.shape).zero_()
            for key in blocks(visible.limit(end - 1), self.tile.keys):
                keys = stage(k[slice(*key)], s.k)
                a = self._incoming(g[first - rows[0] : end - rows[0], slice(*key)], visible, (first, end), key)
                if self.tile.relu:
                    logits = head(s.logits, *query.shape[:2], len(keys)) if kept else s.product(query, keys)
                    if totals is not None:
                        _add_weight_sums(totals, a, logits.relu_())
                    a = threshold_backward(a.unsqueeze(1), logits, 0, grad_input=logits).flatten(0, 1)
                if u is not None:
                    u.flatten(0, 1).addmm_(a, keys)
                if dk is not None:
                    self._add_product(dk[slice(*key)], a, operand.flatten(0, 1))
            if dweights is not None and totals is not None:
                if u is not None and not self.tile.relu:
                    torch.sum(torch.mul(u, query, out=weighted), -1, out=totals)
                dweights[first:end] = totals
            if dq is not None and u is not None:
                dq[first:end] = torch.mul(u, factors.unsqueeze(-1), out=weighted)

    def _add_product(self, dk: Tensor, a: Tensor, operand: Tensor) -> None:
        """Add aᵀ·operand [keys, d] to dk; narrow ones in parts, which MKL would sum in one long chain."""
        if self.narrow is None:
            dk.addmm_(a.t(), operand)
            return
        for part in blocks(a.shape[0], CHAIN):
            dk += torch.mm(a[slice(*part)].t(), operand[slice(*part)], out=head(self.narrow, *dk.shape))

    def _incoming(self, g: Tensor, visible: Visible, row: tuple[int, int], key: tuple[int, int]) -> Tensor:
        """Return scale · g [rows, keys] with zeros, whatever g held, at the keys that a row may not see."""
        s = self.scratch
        hidden = s.mask(visible, row, key)
        if hidden is None and s.scale == 1.0:
            return stage(g, s.scores)
        staged = torch.mul(g, s.scale, out=head(s.scores, *g.shape))
        return staged if hidden is None else staged.masked_fill_(hidden, 0)


def tile_of(q: Tensor, k: Tensor, relu: bool) -> Tile:
    """Return the tile of a walk over batch-first q [b, sq, h, d] and k [b, sk, d]."""
    _, sq, h, d = q.shape
    return Tile.of(sq, k.shape[1], h, d, compute_dtype(q.dtype).itemsize, relu=relu)


def _add_weight_sums(totals: Tensor, g: Tensor, rectified: Tensor) -> None:
    """Add Σ_t g [rows, t] · rectified [rows, h, t] to totals [rows, h].

    As rows of dot products over few keys, which sum most exactly.
    """
    for part in blocks(g.shape[1], CHAIN if rectified.shape[1] >= NARROW else NARROW):
        span = slice(*part)
        totals.unsqueeze(1).baddbmm_(g[:, span].unsqueeze(1), rectified[:, :, span].transpose(1, 2))
