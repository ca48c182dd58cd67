"""sparse_attention by slabs: the logits of a few rows against their keys, one key head at a time, forward and backward.

A slab has a column before its keys, for the sink: a logit without a value. Where there is no sink it holds the lowest
finite number, which takes no part beside any key and everything in a row without one, so that such a row is zeros and
not NaN. Backward makes the slab again; nothing of it, nor of the results, is kept. No function here reads tensor data
on the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headfold.attention_tiles import AttentionTile
from headfold.backends.eager.attention_keys import GatheredKeys, MaskedKeys
from headfold.backends.eager.scratch import NEG_INF, Visible, head
from headfold.contract import compute_dtype
from headfold.tiles import blocks

softmax = torch.ops.aten._softmax.out
softmax_backward = torch.ops.aten._softmax_backward_data.out


def attention_tile_of(
    query: Tensor, key: Tensor, value: Tensor | None, indices: Tensor, v_dim: int, gathered: bool
) -> AttentionTile:
    """Return the tile of a walk over batch-first query [b, sq, np, hn], key [b, sk, np_k, hn] and indices."""
    _, sq, heads, dim = query.shape
    shape = sq, key.shape[1], indices.shape[2], heads, key.shape[2], dim, v_dim
    sizes = compute_dtype(query.dtype).itemsize, query.dtype.itemsize
    return AttentionTile.of(gathered, *shape, *sizes, shared=value is None, accelerator=query.device.type != "cpu")


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    sink: Tensor | None,
    indices: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    offset: int | None,
    ratio: int,
    scale: float,
    v_dim: int,
    gathered: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return out [b, sq, np, v_dim] and lse [b, np, sq] of a checked `AttentionCall`."""
    b, sq, heads, _ = query.shape
    out = rows_like(query, v_dim)
    lse = torch.empty(b, heads, sq, dtype=compute_dtype(query.dtype), device=query.device) if with_lse else None
    tile = attention_tile_of(query, key, value, indices, v_dim, gathered)
    with torch.autocast(query.device.type, enabled=False):
        s = _Slab(tile, query, sink, scale)
        for i in range(b):
            visible = Visible.of(i, key.shape[1], start, end, None, offset, ratio)
            for row in blocks(sq, tile.rows):
                s.width = s.source.select(indices[i, slice(*row)], visible, row)
                for j in range(key.shape[2]):
                    place = slice(*row), slice(j * tile.group, (j + 1) * tile.group)
                    k, v = key[i, :, j], key[i, :, j, :v_dim] if value is None else value[i, :, j]
                    p, keys = s.probabilities(query[i][place], k, place[1], with_largest=with_lse)
                    if lse is not None:
                        lse[i, place[1], place[0]] = s.log_sum_exp(p).t()
                    acc = s.accumulator(v_dim)
                    for n, span in enumerate(s.source.spans()):
                        values = keys[..., :v_dim] if keys is not None and value is None else s.source.values(v, span)
                        product(p[..., 1 + span[0] : 1 + span[1]], values, acc, add=n > 0)
                    out[i][place] = acc.view(out[i][place].shape)
    return out, lse


def sparse_attention_backward(
    g: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    sink: Tensor | None,
    indices: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    offset: int | None,
    ratio: int,
    scale: float,
    v_dim: int,
    gathered: bool,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value and sink, each in its input's dtype; None where `needs` is false."""
    tile = attention_tile_of(query, key, value, indices, v_dim, gathered)
    dtype = compute_dtype(query.dtype)
    dq = torch.empty_like(query) if needs[0] else None
    dk = heads_apart(key) if needs[1] else None
    dv = heads_apart(value) if needs[2] and value is not None else None
    dsink = torch.empty_like(sink) if needs[3] and sink is not None else None
    with torch.autocast(query.device.type, enabled=False):
        s = _BackwardSlab(tile, query, sink, scale)
        totals = [None if x is None or x.dtype == dtype else x.new_empty(x.shape[1:], dtype=dtype) for x in (dk, dv)]
        for i in range(query.shape[0]):
            visible = Visible.of(i, key.shape[1], start, end, None, offset, ratio)
            sums = [
                None if x is None else (x[i] if total is None else total).zero_()
                for x, total in zip((dk, dv), totals, strict=True)
            ]
            for row in blocks(query.shape[1], tile.rows):
                s.width = s.source.select(indices[i, slice(*row)], visible, row)
                for j in range(key.shape[2]):
                    place = slice(*row), slice(j * tile.group, (j + 1) * tile.group)
                    k, v = key[i, :, j], None if value is None else value[i, :, j]
                    s.key_head(
                        g[i][place],
                        query[i][place],
                        k,
                        v,
                        place[1],
                        None if dq is None else dq[i][place],
                        *(None if x is None else x[j] for x in sums),
                        sinks=dsink is not None,
                    )
            for x, total in zip((dk, dv), totals, strict=True):
                if x is not None and total is not None:
                    x[i] = total
    if dsink is not None:
        dsink.copy_(s.dsink)
    dk, dv = (None if x is None else x.transpose(1, 2) for x in (dk, dv))
    return dq, dk, dv, dsink


class _Slab:
    """The buffers of a forward walk, allocated once, and the steps that forward and backward share."""

    def __init__(
        self, tile: AttentionTile, like: Tensor, sink: Tensor | None, scale: float, *, backward: bool = False
    ) -> None:
        self.tile, self.scale = tile, scale
        # A product rounds an operand that it scales; of half-precision inputs its terms are exact without.
        self.scaled_after = abs(math.frexp(scale)[0]) != 0.5
        self.dtype, self.device = compute_dtype(like.dtype), like.device
        self.lowest = torch.finfo(self.dtype).min
        self.width = 0  # of the current slab, without the sink's column
        source = GatheredKeys if tile.gathered else MaskedKeys
        self.source = source(tile, like, backward=backward)
        count = tile.rows * tile.group
        self.query, self.acc = self.empty(count * tile.dim), self.empty(count * tile.widest)
        self.logits = self.empty(tile.logits)
        self.largest, self.share = self.empty(count), self.empty(count)
        self.where = torch.empty(count, dtype=torch.int64, device=self.device)
        self.sink = self.empty(tile.heads).fill_(self.lowest)
        if sink is not None:
            self.sink.copy_(sink).clamp_(min=self.lowest)

    def empty(self, count: int) -> Tensor:
        """Allocate `count` elements of the compute dtype."""
        return torch.empty(count, dtype=self.dtype, device=self.device)

    def matrices(self, x: Tensor) -> Tensor:
        """View [rows, heads, d] as the operand of products: one matrix a row, or one for all."""
        return x if self.tile.gathered else x.view(1, -1, x.shape[2])

    def accumulator(self, width: int) -> Tensor:
        """Return the result [rows, heads, width] of this slab as products see it; zeros where there is no key."""
        shape = self.shape[0], self.shape[1], width
        acc = head(self.acc, *shape)
        return self.matrices(acc if self.source.spans() else acc.zero_())

    def probabilities(
        self, query: Tensor, key: Tensor, heads: slice, *, with_largest: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return p [.., 1 + width] of query rows [rows, heads, dim], and the keys if one span holds them all.

        with_largest: whether log_sum_exp will be asked for.
        """
        self.shape = query.shape
        self.q = self.matrices(head(self.query, *query.shape).copy_(query))
        slab = head(self.logits, *query.shape[:2], 1 + self.width)
        logits, spans, keys = self.matrices(slab), self.source.spans(), None
        scale = 1.0 if self.scaled_after else self.scale
        for span in spans:
            keys = self.source.keys(key, span)
            product(self.q, keys.transpose(1, 2), logits[..., 1 + span[0] : 1 + span[1]], scale=scale)
        if self.scaled_after:
            slab[..., 1:] *= self.scale
        self.source.hide(slab[..., 1:])
        slab[..., 0] = self.sink[heads]
        if with_largest:
            torch.amax(slab, -1, out=head(self.largest, *query.shape[:2]))
        softmax(slab, -1, False, out=slab)
        return logits, keys if len(spans) == 1 else None

    def log_sum_exp(self, p: Tensor) -> Tensor:
        """Return lse [rows, heads] of the slab's logits, whose largest has the share exp(largest - lse)."""
        largest = head(self.largest, *self.shape[:2])
        share = torch.amax(p.view(*self.shape[:2], -1), -1, out=head(self.share, *self.shape[:2]))
        none = largest == self.lowest
        return largest.sub_(share.log_()).masked_fill_(none, NEG_INF)


class _BackwardSlab(_Slab):
    """The buffers of a backward walk: a second slab beside the first."""

    def __init__(self, tile: AttentionTile, like: Tensor, sink: Tensor | None, scale: float) -> None:
        super().__init__(tile, like, sink, scale, backward=True)
        self.dlogits = self.empty(tile.logits)
        self.incoming = self.empty(tile.rows * tile.group * tile.v_dim)
        self.dsink, self.part = self.empty(tile.heads).zero_(), self.empty(tile.group)

    def key_head(
        self,
        g: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        heads: slice,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        *,
        sinks: bool,
    ) -> None:
        """Write dq [rows, heads, dim] of one key head and add to its dk [sk, dim] and dv [sk, v_dim]."""
        source, v_dim, spans = self.source, self.tile.v_dim, self.source.spans()
        p, keys = self.probabilities(query, key, heads)
        incoming = self.matrices(head(self.incoming, *g.shape).copy_(g))
        ds = head(self.dlogits, *p.shape)
        ds[..., 0] = 0
        for span in spans:
            if keys is not None and value is None:
                values = keys[..., :v_dim]
            else:
                values = source.values(key[:, :v_dim] if value is None else value, span)
            product(incoming, values.transpose(1, 2), ds[..., 1 + span[0] : 1 + span[1]])
        softmax_backward(ds, p, -1, self.dtype, grad_input=ds)
        if sinks:
            column = ds.view(*self.shape[:2], -1)[..., 0]
            self.dsink[heads] += torch.sum(column, 0, out=self.part)
        acc = self.accumulator(self.tile.dim)
        for n, span in enumerate(spans):
            columns = slice(1 + span[0], 1 + span[1])
            if dq is not None:
                product(ds[..., columns], source.keys(key, span) if keys is None else keys, acc, add=n > 0)
            if dk is not None:
                through_values = [] if value is not None else [(p[..., columns], incoming, 1.0)]
                source.add(dk, span, [(ds[..., columns], self.q, self.scale), *through_values])
            if dv is not None:
                source.add(dv, span, [(p[..., columns], incoming, 1.0)])
        if dq is not None:
            dq.copy_(acc.mul_(self.scale).view(dq.shape))


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, scale: float = 1.0) -> None:
    """Write, or add, scale times the products of matrices [n, r, c] and [n, c, d] into out [n, r, d]."""
    if a.shape[0] == 1:
        out[0].addmm_(a[0], b[0], beta=int(add), alpha=scale)
    else:
        out.baddbmm_(a, b, beta=int(add), alpha=scale)


def rows_like(query: Tensor, width: int) -> Tensor:
    """Allocate [b, sq, np, width], in the order of batch and rows that query lies in."""
    b, sq, heads, _ = query.shape
    if query.stride(0) < query.stride(1):
        return query.new_empty(sq, b, heads, width).transpose(0, 1)
    return query.new_empty(b, sq, heads, width)


def heads_apart(x: Tensor) -> Tensor:
    """Allocate the gradient of x [b, sk, np_k, d] as [b, np_k, sk, d], so that the keys of a head are dense."""
    b, sk, heads, d = x.shape
    return x.new_empty(b, heads, sk, d)
