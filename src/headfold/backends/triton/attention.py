"""sparse_attention by kernels: a program holds a row's heads of one key head and gathers the row's keys by blocks.

Forward is an online softmax over settled picks. Backward makes it again, without its values, for what the gradients
need of a row: its largest logit, its share and the mean of dprobabilities. dq is then made with its row resident, dk
and dv pick by pick, and `Scatter` adds those up by one writer a key. Nothing is held between forward and backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from headfold.backends import eager
from headfold.backends.eager.attention import heads_apart, rows_like
from headfold.backends.triton.attention_kernels import attend, row_gradients, sink_gradients, spread_gradients
from headfold.backends.triton.operands import options
from headfold.backends.triton.picks import Picks, Scatter, strides
from headfold.backends.triton.products import NARROWEST, pieces
from headfold.backends.triton.table import arch_of, tile
from headfold.contract import compute_dtype
from headfold.scatter_tiles import WIDEST_GRADIENTS, ScatterTile
from headfold.tiles import blocks

# Channels of a block at most.
WIDEST = 128
# Heads that fill the long side of a product; fewer leave it to the keys.
TURNING = 64
SINK_ROWS, SINK_HEADS = 64, 16


class AttentionBytes(NamedTuple):
    """Scratch of a call."""

    forward_bytes: int
    backward_bytes: int


def attention_tile_of(
    query: Tensor, key: Tensor, value: Tensor | None, indices: Tensor, v_dim: int, gathered: bool
) -> AttentionBytes:
    """Return the scratch of a call on batch-first query [b, sq, np, hn], key [b, sk, np_k, hn] and indices."""
    forward = _forward_tile(query, key, indices).settled_bytes
    if _wide(query, v_dim):
        walk = eager.attention_tile_of(query, key, value, indices, v_dim, gathered)
        return AttentionBytes(forward, max(forward, walk.backward_bytes))
    backward = _backward_tile(query, key, value, indices, v_dim)
    sinks = query.shape[2] * compute_dtype(query.dtype).itemsize
    return AttentionBytes(forward, backward.settled_bytes + backward.scatter_bytes + sinks)


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
    """As `headfold.backends.eager.sparse_attention`; picks are always gathered."""
    b, sq, heads, _ = query.shape
    out = rows_like(query, v_dim)
    lse = torch.empty(b, heads, sq, dtype=compute_dtype(query.dtype), device=query.device) if with_lse else None
    if b * sq == 0:
        return out, lse
    walk, cut = _forward_tile(query, key, indices), _cut("attention", query, key)
    picks, sink = Picks(walk, query), None if sink is None else sink.contiguous()
    values = key if value is None else value
    grid_heads = key.shape[2] * triton.cdiv(heads // key.shape[2], cut["BH"])
    for rows in blocks(b * sq, walk.block):
        if walk.topk:
            picks.settle(indices, rows, key.shape[1], (start, end, None, offset, ratio))
        attend[(rows[1] - rows[0], grid_heads)](
            out, lse, query, key, values, sink, picks.picks, rows[0], sq, walk.topk, scale,
            *out.stride(), *query.stride(), *key.stride(), *values.stride(),
            **_widths(query, key, v_dim, value is None), **cut, **options(query, scale),
        )  # fmt: skip
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
    """As `headfold.backends.eager.sparse_attention_backward`, which takes wide heads; picks are always gathered."""
    if _wide(query, v_dim):
        rest = start, end, offset, ratio, scale, v_dim, gathered, needs
        return eager.sparse_attention_backward(g, query, key, value, sink, indices, *rest)
    b, sq = query.shape[:2]
    dtype = compute_dtype(query.dtype)
    dq = torch.empty_like(query) if needs[0] else None
    dk = heads_apart(key) if needs[1] else None
    dv = heads_apart(value) if needs[2] and value is not None else None
    dsink = torch.empty_like(sink) if needs[3] and sink is not None else None
    walk = _backward_tile(query, key, value, indices, v_dim)
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
        dtype, (_, self.sq, heads, _) = compute_dtype(query.dtype), query.shape
        ranged = query.dtype == torch.float16

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=query.device)

        self.walk, self.query, self.key, self.scale = walk, query, key, scale
        self.sink = None if sink is None else sink.contiguous()
        self.values, shared = (key, True) if value is None else (value, False)
        self.merged = shared and not ranged
        self.picks, self.scatter = Picks(walk, query), Scatter(walk, query)
        self.top, self.share, self.mean = (empty(walk.block, heads) for _ in range(3))
        self.reach = empty(walk.block, heads) if ranged else None
        slab = walk.rows, key.shape[2], walk.span
        self.dkeys = empty(*slab, query.shape[3]) if want_keys else None
        apart = want_values or (want_keys and shared and ranged)
        self.dvalues = empty(*slab, v_dim) if apart else None
        self.dsink = empty(heads).zero_()
        self.arithmetic = {**_widths(query, key, v_dim, shared), **options(query, scale)}
        self.row_cut = _cut("attention_rows", query, key)
        self.key_cut = _cut("attention_keys", query, key)
        self.strides = *query.stride(), *key.stride(), *self.values.stride()

    def rows(self, dq: Tensor | None, g: Tensor, rows: tuple[int, int]) -> None:
        """Make what each row needs, and its dq."""
        key_heads = self.key.shape[2]
        grid = rows[1] - rows[0], key_heads * triton.cdiv(self.query.shape[2] // key_heads, self.row_cut["BH"])
        row_gradients[grid](
            dq, self.top, self.share, self.mean, self.reach,
            g, self.query, self.key, self.values, self.sink, self.picks.picks,
            rows[0], self.sq, self.walk.topk, self.scale, *strides(dq, 4), *g.stride(), *self.strides,
            **self.arithmetic, **self.row_cut,
        )  # fmt: skip

    def sinks(self, rows: tuple[int, int]) -> None:
        """Add the rows' part of dsink."""
        heads = self.query.shape[2]
        sink_gradients[(triton.cdiv(heads, SINK_HEADS),)](
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
        """Add the rows' part of dk [np_k, sk, hn] and dv [np_k, sk, v_dim], slab by slab."""
        if self.dkeys is None and self.dvalues is None:
            return
        walk, key_heads = self.walk, self.key.shape[2]
        group = self.query.shape[2] // key_heads
        for slab in blocks(rows[1] - rows[0], walk.rows):
            some, count = slice(*slab), slab[1] - slab[0]
            for span in blocks(walk.topk, walk.span):
                self.scatter.place(self.picks.picks[some], span)
                spread_gradients[(count, triton.cdiv(span[1] - span[0], self.key_cut["BN"]), key_heads)](
                    self.dkeys, self.dvalues, self.top[some], self.share[some], self.mean[some],
                    None if self.reach is None else self.reach[some],
                    g, self.query, self.key, self.values, self.picks.picks[some],
                    rows[0] + slab[0], *span, self.sq, walk.topk, walk.span, group, self.scale,
                    *g.stride(), *self.strides,
                    **self.arithmetic, **self.key_cut, MERGED=self.merged, TURNED=self.key_cut["BH"] >= TURNING,
                )  # fmt: skip
                if dk is not None and self.dkeys is not None:
                    self.scatter.collect(dk, self.dkeys, count)
                if self.dvalues is not None:
                    into = dv if dv is not None else dk
                    assert into is not None
                    self.scatter.collect(into[..., : self.dvalues.shape[3]], self.dvalues, count)


def _wide(query: Tensor, v_dim: int) -> bool:
    return max(query.shape[3], v_dim) > WIDEST_GRADIENTS


def _forward_tile(query: Tensor, key: Tensor, indices: Tensor) -> ScatterTile:
    return ScatterTile.of_picks(query.shape[0] * query.shape[1], key.shape[1], indices.shape[2])


def _backward_tile(query: Tensor, key: Tensor, value: Tensor | None, indices: Tensor, v_dim: int) -> ScatterTile:
    _, sq, heads, dim = query.shape
    shape = sq, key.shape[1], indices.shape[2], heads, key.shape[2], dim, v_dim, compute_dtype(query.dtype).itemsize
    return ScatterTile.of_attention(*shape, shared=value is None, ranged=query.dtype == torch.float16)


def _widths(query: Tensor, key: Tensor, v_dim: int, shared: bool) -> dict[str, int | bool]:
    heads, dim = query.shape[2:]
    keys, values = _blocks(dim), _blocks(v_dim)
    named = {f"D{n}": x for n, x in keys.items()} | {f"V{n}": x for n, x in values.items()}
    reuse = shared and values["S"] == keys["S"] and values["N"] <= keys["N"] and values["R"] in (0, keys["R"])
    if values["R"] and values["N"] < keys["N"]:
        reuse = False
    return {"H": heads, "GROUP": heads // key.shape[2], "D": dim, "V": v_dim, **named, "REUSE": reuse}


def _blocks(width: int) -> dict[str, int]:
    """Cut channels into N blocks of size S and one of R, and count them in P."""
    first, rest = pieces(width)
    size = min(first, WIDEST)
    return {"S": size, "N": first // size, "R": rest, "P": first // size + (rest > 0)}


def _cut(kernel: str, query: Tensor, key: Tensor) -> dict[str, int]:
    """Return tile and launch of a kernel, as its constants."""
    group = query.shape[2] // key.shape[2]
    row = tile(kernel, arch_of(query.device), query.dtype, query.shape[3], group)
    heads = min(row.rows, max(NARROWEST, triton.next_power_of_2(group)))
    return {"BH": heads, "BN": row.keys, "STAGES": row.stages, "num_warps": row.warps}
