"""The backward of sparse_attention: the softmax again, without its values, for what the gradients need of a row.

That is its largest logit, its share and the mean of dprobabilities. dq is made then, with its row resident. dk and dv
come one of two ways, chosen by shape: pick by pick, to be added up by one writer a key, or with keys resident, from all
rows of a block, masked by what those picked.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from headfold.backends.eager.attention import heads_apart
from headfold.backends.triton.attention_cuts import cut, masked_cut, widths
from headfold.backends.triton.attention_gradients import (
    masked_gradients,
    row_gradients,
    sink_gradients,
    spread_gradients,
)
from headfold.backends.triton.launch import launch
from headfold.backends.triton.operands import options, streamed
from headfold.backends.triton.picks import Picks, Scatter, strides
from headfold.contract import compute_dtype
from headfold.scatter_tiles import ScatterTile
from headfold.tiles import blocks

SINK_ROWS, SINK_HEADS = 64, 16
# Rows whose picks a program looks through at a time for those that have one of its keys.
SCANNED = 256


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
    """As `headfold.backends.eager.sparse_attention_backward`, whose `gathered` chooses nothing here."""
    b, sq = query.shape[:2]
    dtype = compute_dtype(query.dtype)
    dq = torch.empty_like(query) if needs[0] else None
    dk = heads_apart(key) if needs[1] else None
    dv = heads_apart(value) if needs[2] and value is not None else None
    dsink = torch.empty_like(sink) if needs[3] and sink is not None else None
    walk = backward_tile(query, key, value, indices, v_dim)
    if 0 in (b * sq, walk.topk):
        for x in (dq, dk, dv, dsink):
            if x is not None:
                x.zero_()
    else:
        s = _Backward(walk, query, key, value, sink, v_dim, scale, dk is not None, dv is not None)
        totals = [None if x is None or x.dtype == dtype else x.new_empty(x.shape[1:], dtype=dtype) for x in (dk, dv)]
        for i in range(b):
            sums = [
                None if x is None else (x[i] if total is None else total).zero_()
                for x, total in zip((dk, dv), totals, strict=True)
            ]
            for block in blocks(sq, walk.block):
                rows = i * sq + block[0], i * sq + block[1]
                s.picks.settle(indices, rows, key.shape[1], (start, end, None, offset, ratio))
                s.rows(dq, g, rows)
                if dsink is not None:
                    s.sinks(rows)
                s.keys(sums[0], sums[1], g, rows)
            for x, total in zip((dk, dv), totals, strict=True):
                if x is not None and total is not None:
                    x[i] = total
        if dsink is not None:
            dsink.copy_(s.dsink)
    dk, dv = (None if x is None else x.transpose(1, 2) for x in (dk, dv))
    return dq, dk, dv, dsink


def backward_tile(query: Tensor, key: Tensor, value: Tensor | None, indices: Tensor, v_dim: int) -> ScatterTile:
    """Return the block and the slab of a backward; without a slab where keys meet all rows, masked."""
    (_, sq, heads, dim), size = query.shape, compute_dtype(query.dtype).itemsize
    shape = sq, key.shape[1], indices.shape[2], heads, key.shape[2], dim, v_dim, size
    kinds = {"ranged": query.dtype == torch.float16, "exact": query.dtype.itemsize > 2}
    return ScatterTile.of_attention(*shape, shared=value is None, **kinds)


class _Backward:
    """The buffers of a backward walk, and its steps over a block of settled rows."""

    def __init__(
        self,
        walk: ScatterTile,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        sink: Tensor | None,
        v_dim: int,
        scale: float,
        want_keys: bool,
        want_values: bool,
    ) -> None:
        dtype, (_, self.sq, heads, dim) = compute_dtype(query.dtype), query.shape
        ranged = query.dtype == torch.float16

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=query.device)

        self.walk, self.query, self.key, self.scale, self.v_dim = walk, query, key, scale, v_dim
        self.sink = None if sink is None else sink.contiguous()
        self.value, self.values, self.shared = value, key if value is None else value, value is None
        self.picks = Picks(walk, query)
        self.top, self.share, self.mean = (empty(walk.block, heads) for _ in range(3))
        self.reach = torch.empty(walk.block, heads, dtype=torch.float32, device=query.device) if ranged else None
        self.dsink = empty(heads).zero_()
        self.widths, self.arithmetic = widths(query, key, v_dim, self.shared), options(query, scale)
        self.streamed = {"SIZE": streamed(max(dim, v_dim)), "SHARED": self.shared}
        self.strides = *query.stride(), *key.stride(), *self.values.stride()
        self.scatter, self.dkeys, self.dvalues = None, None, None
        if walk.channels and (want_keys or want_values):
            slab = walk.rows, key.shape[2], walk.span
            self.merged = self.shared and not ranged
            self.scatter = Scatter(walk, query)
            self.dkeys = empty(*slab, dim) if want_keys else None
            self.dvalues = empty(*slab, v_dim) if want_values or (self.shared and ranged) else None

    def rows(self, dq: Tensor | None, g: Tensor, rows: tuple[int, int]) -> None:
        """Make what each row needs, and its dq."""
        key_heads, tile = self.key.shape[2], cut("attention_rows", self.query, self.key, self.value)
        grid = rows[1] - rows[0], key_heads * triton.cdiv(self.query.shape[2] // key_heads, tile["BH"])
        launch(
            row_gradients, grid,
            dq, self.top, self.share, self.mean, self.reach,
            g, self.query, self.key, self.values, self.sink, self.picks.picks,
            rows[0], self.sq, self.walk.topk, self.scale, *strides(dq, 4), *g.stride(), *self.strides,
            **self.widths, **self.arithmetic, **tile, **self.streamed, STREAM=self.query.dtype.itemsize > 2,
        )  # fmt: skip

    def sinks(self, rows: tuple[int, int]) -> None:
        """Add the rows' part of dsink."""
        heads = self.query.shape[2]
        launch(
            sink_gradients,
            (triton.cdiv(heads, SINK_HEADS),),
            self.dsink,
            self.top,
            self.share,
            self.mean,
            self.sink,
            rows[1] - rows[0],
            H=heads,
            ROWS=SINK_ROWS,
            HEADS=SINK_HEADS,
        )

    def keys(self, dk: Tensor | None, dv: Tensor | None, g: Tensor, rows: tuple[int, int]) -> None:
        """Add the rows' part of dk [np_k, sk, hn] and dv [np_k, sk, v_dim]."""
        through_values = dv if not self.shared or dk is None else dk[..., : self.v_dim]
        if self.walk.channels == 0:
            for total, values in ((dk, False), (through_values, True)):
                if total is not None:
                    self._masked(total, values, g, rows)
        elif self.scatter is not None:
            self._scattered(self.scatter, dk, through_values, g, rows)

    def _masked(self, total: Tensor, values: bool, g: Tensor, rows: tuple[int, int]) -> None:
        tile, arithmetic = masked_cut(self.query, self.key), {**self.widths, **self.arithmetic}
        del arithmetic["REUSE"]
        launch(
            masked_gradients, (triton.cdiv(self.walk.sk, tile["BN"]), self.key.shape[2]),
            total, self.top, self.share, self.mean, self.picks.bitmap, g, self.query, self.key, self.values,
            rows[0], rows[1] - rows[0], self.sq, self.walk.sk, self.walk.words, self.scale,
            *total.stride()[:2], *g.stride(), *self.strides, **arithmetic, **tile, VALUES=values, SCAN=SCANNED,
        )  # fmt: skip

    def _scattered(
        self, scatter: Scatter, dk: Tensor | None, through_values: Tensor | None, g: Tensor, rows: tuple[int, int]
    ) -> None:
        walk, key_heads, heads = self.walk, self.key.shape[2], self.query.shape[2]
        tile = cut("attention_keys", self.query, self.key, self.value)
        group, dim = heads // key_heads, self.query.shape[3]
        constants = {"H": heads, "GROUP": group, "D": dim, "V": self.v_dim, **self.streamed}
        scatter.rank(self.picks, rows[1] - rows[0])
        for slab in blocks(rows[1] - rows[0], walk.rows):
            some = slice(*slab)
            for span in blocks(walk.topk, walk.span):
                launch(
                    spread_gradients, (slab[1] - slab[0], triton.cdiv(span[1] - span[0], tile["BN"]), key_heads),
                    self.dkeys, self.dvalues, self.top[some], self.share[some], self.mean[some],
                    None if self.reach is None else self.reach[some],
                    g, self.query, self.key, self.values, self.picks.picks[some],
                    rows[0] + slab[0], *span, self.sq, walk.topk, walk.span, group, self.scale,
                    *g.stride(), *self.strides, **constants, **self.arithmetic, **tile,
                    MERGED=self.merged,
                )  # fmt: skip
                for total, spread in ((dk, self.dkeys), (through_values, self.dvalues)):
                    if total is not None and spread is not None:
                        scatter.collect(total, spread, self.picks, slab, span)
