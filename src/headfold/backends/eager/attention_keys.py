"""Where a slab of attention finds its keys: gathered for each row, or all keys under a mask.

Both answer the same questions about a block of rows: what is hidden, what the keys and values of a span are, and where
gradients of that span go. Spans are counted in columns of the slab, without the column of the sink. Operands have a
leading axis for products: one matrix a row where keys are gathered, one for all rows where they are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headfold.attention_tiles import AttentionTile
from headfold.backends.eager.scratch import NEG_INF, Visible, blank, head, scatter_add, stage
from headfold.contract import compute_dtype
from headfold.tiles import blocks

# Rows that are summed in one chain into gradients of keys of so few channels (docs/design.md, "Narrow products").
CHAIN, NARROW = 64, 16
# -inf in float32 and in float64.
INFINITY_BITS = {torch.int32: -(1 << 23), torch.int64: -(1 << 52)}
Span = tuple[int, int]
# a, x and a factor: what aᵀ·x adds to the gradients of keys.
Term = tuple[Tensor, Tensor, float]


class GatheredKeys:
    """Keys of each row's own. A row's picks are sorted, so that a key that stands there twice is hidden once."""

    def __init__(self, tile: AttentionTile, like: Tensor, *, backward: bool) -> None:
        dtype, device, count = compute_dtype(like.dtype), like.device, tile.rows * tile.width
        self.tile, self.backward = tile, backward
        self.given, self.sorted, self.order = torch.empty(3, count, dtype=torch.int64, device=device)
        self.marks = torch.empty(2, count, dtype=torch.bool, device=device)
        self.key = torch.empty(tile.staged * tile.dim, dtype=dtype, device=device)
        self.value = torch.empty(tile.staged * tile.v_dim if tile.apart else 0, dtype=dtype, device=device)
        self.spread = torch.empty(tile.staged * tile.widest if backward else 0, dtype=dtype, device=device)
        uncast = tile.staged * tile.widest if like.dtype != dtype else 0
        self.uncast = torch.empty(uncast, dtype=like.dtype, device=device)
        self.kept = torch.empty(tile.staged, dtype=dtype, device=device)
        self.place = torch.empty(tile.staged if tile.width > tile.span else 0, dtype=torch.int64, device=device)

    def select(self, indices: Tensor, visible: Visible, row: Span) -> int:
        """Take the picks [rows, topk] of a block of rows and return the width of their slab."""
        shape = indices.shape[0], self.tile.width
        given = head(self.given, *shape).copy_(indices[:, : shape[1]])
        self.picked, order = head(self.sorted, *shape), head(self.order, *shape)
        if shape[1]:
            torch.sort(given, dim=-1, out=(self.picked, order))
        self.hidden = torch.lt(self.picked, 0, out=head(self.marks[0], *shape))
        other = head(self.marks[1], *shape)
        again = self.hidden[:, 1:]
        again |= torch.eq(self.picked[:, 1:], self.picked[:, :-1], out=other[:, 1:])
        visible.hide(self.hidden, row, self.picked, None, other)
        self.picked.clamp_(min=0)
        return shape[1]

    def hide(self, logits: Tensor) -> None:
        """Write -inf into logits [rows, heads, width] where hidden."""
        logits.masked_fill_(self.hidden.unsqueeze(1), NEG_INF)

    def spans(self) -> list[Span]:
        """Return the spans of the block of rows."""
        return list(blocks(self.tile.width, self.tile.span))

    def keys(self, key: Tensor, span: Span) -> Tensor:
        """Gather [rows, span, dim] from key [sk, dim]; hidden ones are zeros where a product may meet them."""
        return self._gather(key, span, self.key, clean=self.backward or not self.tile.apart)

    def values(self, value: Tensor, span: Span) -> Tensor:
        """Gather [rows, span, v_dim] from value [sk, v_dim]; hidden ones are zeros."""
        return self._gather(value, span, self.value, clean=True)

    def add(self, total: Tensor, span: Span, terms: list[Term]) -> None:
        """Add to total [sk, d], at the picks, the products of a [rows, n, span] and x [rows, n, d or fewer]."""
        rows, _, count = terms[0][0].shape
        spread = head(self.spread, rows, count, total.shape[1])
        for n, (a, x, factor) in enumerate(terms):
            spread[..., : x.shape[2]].baddbmm_(a.transpose(1, 2), x, beta=min(n, 1), alpha=factor)
        scatter_add(total, self._places(span), spread.flatten(0, 1))

    def _places(self, span: Span) -> Tensor:
        some = self.picked[:, slice(*span)]
        return some.view(-1) if some.is_contiguous() else head(self.place, *some.shape).copy_(some).view(-1)

    def _gather(self, x: Tensor, span: Span, buffer: Tensor, *, clean: bool) -> Tensor:
        hidden = self.hidden[:, slice(*span)]
        found = head(buffer, hidden.numel(), x.shape[1])
        if x.dtype == found.dtype:
            torch.index_select(x, 0, self._places(span), out=found)
        else:
            found.copy_(torch.index_select(x, 0, self._places(span), out=head(self.uncast, *found.shape)))
        found = found.view(*hidden.shape, -1)
        if clean:
            blank(found, hidden, self.kept)
        return found


class MaskedKeys:
    """All keys that the static bound lets some row see; what no row's selection holds is hidden by a mask."""

    def __init__(self, tile: AttentionTile, like: Tensor, *, backward: bool) -> None:
        dtype, device = compute_dtype(like.dtype), like.device
        self.tile = tile
        self.entries = torch.empty(tile.rows * tile.topk, dtype=torch.int64, device=device)
        self.mask = torch.empty(tile.rows * (tile.width + 1), dtype=torch.bool, device=device)
        self.other = torch.empty(tile.rows * tile.width, dtype=torch.bool, device=device)
        self.bits = torch.int32 if tile.size == 4 else torch.int64
        self.masks = torch.empty(2, tile.rows * tile.width, dtype=self.bits, device=device)
        self.key = torch.empty(tile.staged * tile.dim, dtype=dtype, device=device)
        self.value = torch.empty(tile.staged * tile.v_dim if tile.apart else 0, dtype=dtype, device=device)
        self.spread = torch.empty(tile.staged * tile.widest if backward else 0, dtype=dtype, device=device)

    def select(self, indices: Tensor, visible: Visible, row: Span) -> int:
        """Write the picks [rows, topk] of a block of rows into a mask and return the width of their slab.

        -1 falls into a column before the keys. Duplicates write the same value, so their order is of no matter.
        """
        rows, self.width = indices.shape[0], visible.limit(row[1] - 1)
        mask = head(self.mask, rows, self.tile.width + 1).fill_(True)
        entries = head(self.entries, *indices.shape).copy_(indices).add_(1).clamp_(min=0)
        hidden = mask.scatter_(1, entries, False)[:, 1 : 1 + self.width]
        if visible.partial(row[0], self.width):
            t = torch.arange(self.width, device=indices.device, dtype=torch.int32)
            visible.hide(hidden, row, t, None, head(self.other, *hidden.shape))
        self.kept = head(self.masks[0], *hidden.shape).copy_(hidden).sub_(1)
        self.infinite = torch.bitwise_not(self.kept, out=head(self.masks[1], *hidden.shape))
        self.infinite.bitwise_and_(INFINITY_BITS[self.bits])
        return self.width

    def hide(self, logits: Tensor) -> None:
        """Write -inf into logits [rows, heads, width] where hidden, whatever they held.

        By their bits, seven times faster than filling under a boolean, which took longer than a product.
        """
        bits = logits.view(self.bits)
        bits.bitwise_and_(self.kept.unsqueeze(1)).bitwise_or_(self.infinite.unsqueeze(1))

    def spans(self) -> list[Span]:
        """Return the spans of the block of rows."""
        return list(blocks(self.width, self.tile.span))

    def keys(self, key: Tensor, span: Span) -> Tensor:
        """Return [1, span, dim] of key [sk, dim] in the compute dtype."""
        return stage(key[slice(*span)], self.key).unsqueeze(0)

    def values(self, value: Tensor, span: Span) -> Tensor:
        """Return [1, span, v_dim] of value [sk, v_dim] in the compute dtype."""
        return stage(value[slice(*span)], self.value).unsqueeze(0)

    def add(self, total: Tensor, span: Span, terms: list[Term]) -> None:
        """Add to total [sk, d], at the keys, the products of a [1, n, span] and x [1, n, d or fewer].

        Made apart and then added: a product that adds to total goes on with its chain of sums, over all rows.
        """
        spread = head(self.spread, span[1] - span[0], total.shape[1])
        for part in blocks(terms[0][0].shape[1], CHAIN if total.shape[1] <= NARROW else terms[0][0].shape[1]):
            rows = slice(*part)
            for n, (a, x, factor) in enumerate(terms):
                spread[:, : x.shape[2]].addmm_(a[0, rows].t(), x[0, rows], beta=min(n, 1), alpha=factor)
            total[slice(*span)] += spread
