"""sparse_attention by kernels: a program holds a row's heads of one key head and gathers the row's keys by blocks.

Forward is an online softmax over settled picks; `attention_backward` makes it again. Nothing is held between the two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from headfold.backends.eager.attention import rows_like
from headfold.backends.triton.attention_backward import backward_tile
from headfold.backends.triton.attention_cuts import cut, widths
from headfold.backends.triton.attention_kernels import attend
from headfold.backends.triton.launch import launch
from headfold.backends.triton.operands import options, streamed
from headfold.backends.triton.picks import Picks
from headfold.contract import compute_dtype
from headfold.scatter_tiles import ScatterTile
from headfold.tiles import blocks


class AttentionBytes(NamedTuple):
    """Scratch of a call."""

    forward_bytes: int
    backward_bytes: int


def attention_tile_of(
    query: Tensor, key: Tensor, value: Tensor | None, indices: Tensor, v_dim: int, gathered: bool
) -> AttentionBytes:
    """Return the scratch of a call on batch-first query [b, sq, np, hn], key [b, sk, np_k, hn] and indices."""
    backward = backward_tile(query, key, value, indices, v_dim)
    sinks = query.shape[2] * compute_dtype(query.dtype).itemsize
    return AttentionBytes(_forward_tile(query, key, indices).settled_bytes, backward.backward_bytes + sinks)


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
    walk, values = _forward_tile(query, key, indices), key if value is None else value
    tile = cut("attention", query, key, value)
    picks, sink = Picks(walk, query), None if sink is None else sink.contiguous()
    grid_heads = key.shape[2] * triton.cdiv(heads // key.shape[2], tile["BH"])
    for rows in blocks(b * sq, walk.block):
        if walk.topk:
            picks.settle(indices, rows, key.shape[1], (start, end, None, offset, ratio))
        launch(
            attend, (rows[1] - rows[0], grid_heads),
            out, lse, query, key, values, sink, picks.picks, rows[0], sq, walk.topk, scale,
            *out.stride(), *query.stride(), *key.stride(), *values.stride(),
            **widths(query, key, v_dim, value is None), **tile, **options(query, scale),
            SIZE=streamed(query.shape[3]), STREAM=query.dtype.itemsize > 2,
        )  # fmt: skip
    return out, lse


def _forward_tile(query: Tensor, key: Tensor, indices: Tensor) -> ScatterTile:
    return ScatterTile.of_picks(query.shape[0] * query.shape[1], key.shape[1], indices.shape[2])
