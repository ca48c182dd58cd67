"""index_scores by tiles: the forward and backward bodies of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from headfold.backends.eager.scratch import NEG_INF, Visible, batch_element
from headfold.backends.eager.walks import BackwardWalk, ForwardWalk, tile_of
from headfold.contract import compute_dtype
from headfold.tiles import blocks


def index_scores(
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    bias: Tensor | None,
    offset: int | None,
    ratio: int,
    relu: bool,
    scale: float,
) -> Tensor:
    """Scores [b, sq, sk] of a checked, batch-first call (see `headfold.contract.ScoreCall`)."""
    tile = tile_of(q, k, relu)
    b, sq, sk = q.shape[0], q.shape[1], k.shape[1]
    out = torch.empty(b, sq, sk, dtype=compute_dtype(q.dtype), device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        walk = ForwardWalk(tile, q, scale)
        for i in range(b):
            visible = Visible.of(i, sk, start, end, bias, offset, ratio)
            for row in blocks(sq, tile.rows):
                out[i, slice(*row), visible.limit(row[1] - 1) :].fill_(NEG_INF)
            for row, key, scores in walk.tiles(q[i], batch_element(weights, i), k[i], visible, (0, sq)):
                out[i, slice(*row), slice(*key)] = scores
    return out


def index_scores_backward(
    g: Tensor,
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    bias: Tensor | None,
    offset: int | None,
    ratio: int,
    relu: bool,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, weights and k, each in its input's dtype and, but for `empty_rows_like`, strides.

    None where `needs` is false.
    """
    tile = tile_of(q, k, relu)
    dq = torch.empty_like(q) if needs[0] else None
    dweights = torch.empty_like(weights) if needs[1] and weights is not None else None
    dk = empty_rows_like(k).zero_() if needs[2] else None
    sq, sk = q.shape[1], k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        walk = BackwardWalk(tile, q, scale)
        cast = dk is not None and dk.dtype != walk.scratch.dtype
        total = torch.empty(k.shape[1:], dtype=walk.scratch.dtype, device=k.device) if cast else None
        for i in range(q.shape[0]):
            visible = Visible.of(i, sk, start, end, bias, offset, ratio)
            sums = batch_element(dk, i) if total is None else total.zero_()
            walk.slab(
                g[i],
                q[i],
                batch_element(weights, i),
                k[i],
                visible,
                (0, sq),
                batch_element(dq, i),
                batch_element(dweights, i),
                sums,
            )
            if dk is not None and total is not None:
                dk[i] = total
    return dq, dweights, dk


def empty_rows_like(k: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate dk: in k's strides, or contiguous where its rows would not be dense, into which products cannot add."""
    like = torch.empty_like(k, dtype=dtype)
    return like if like.stride(-1) == 1 else torch.empty(k.shape, dtype=like.dtype, device=k.device)
