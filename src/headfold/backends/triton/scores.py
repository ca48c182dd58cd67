"""index_scores by kernels: the bodies of the op, and the slab launchers that other folds call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headfold.backends.eager.scores import empty_rows_like
from headfold.backends.triton.launches import (
    Slab,
    empty,
    launch_fold,
    launch_key_gradients,
    launch_query_gradients,
    launch_scores,
    launch_unfold,
)
from headfold.backends.triton.memory import FRESH, Allocator
from headfold.contract import compute_dtype
from headfold.score_tiles import ScoreTile
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
    out = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=compute_dtype(q.dtype), device=q.device)
    fill_scores(out, q, weights, k, start, end, bias, offset, ratio, relu, scale)
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
    dq = torch.empty_like(q) if needs[0] else None
    dweights = torch.empty_like(weights) if needs[1] and weights is not None else None
    dk = empty_rows_like(k) if needs[2] else None
    slab = Slab(q, weights, k, start, end, bias, offset, ratio, scale)
    total, add = dk, False
    if dk is not None and not tile_of(q, k, relu).writes_once:
        dtype = compute_dtype(k.dtype)
        total = (dk if dk.dtype == dtype else torch.empty_like(dk, dtype=dtype)).zero_()
        add = True
    _gradients(g, slab, dq, dweights, total, FRESH, relu=relu, add=add)
    if dk is not None and total is not None and total is not dk:
        dk.copy_(total)
    return dq, dweights, dk


def fill_scores(
    out: Tensor,
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
    memory: Allocator = FRESH,
) -> None:
    """Write every element of out [b, rows, sk], in the compute dtype and any strides; -inf where invisible.

    A slab that starts at row r takes the rows of q, weights, start, end and bias from r on, and offset + r.
    Without an activation it takes `ScoreTile.folded_bytes` of memory, else nothing.
    """
    slab = Slab(q, weights, k, start, end, bias, offset, ratio, scale)
    with torch.cuda.device_of(q):
        if relu:
            for heads in slab.groups("scores"):
                launch_scores(out, slab.heads(*heads), relu=True, add=heads[0] > 0)
        else:
            for rows, folded in _folded(slab, memory):
                launch_scores(out[:, slice(*rows)], slab.rows(*rows).folded(folded), relu=False)


def add_gradients(
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
    dq: Tensor | None,
    dweights: Tensor | None,
    dk: Tensor | None,
    memory: Allocator = FRESH,
) -> None:
    """Write dq and dweights and add to dk, any of which may be None, given g = dL/dscores [b, rows, sk] of a slab.

    dq [b, rows, h, d], dweights [b, rows, h]: any dtype and strides.   dk [b, sk, d]: in the compute dtype.
    g is used where a row may see the key, and nowhere else. Takes at most `ScoreTile.backward_bytes` of memory.
    """
    slab = Slab(q, weights, k, start, end, bias, offset, ratio, scale)
    _gradients(g, slab, dq, dweights, dk, memory, relu=relu, add=True)


def tile_of(q: Tensor, k: Tensor, relu: bool) -> ScoreTile:
    """Return what a call on batch-first q [b, sq, h, d] and k [b, sk, d] allocates."""
    b, sq, h, d = q.shape
    return ScoreTile(b, sq, k.shape[1], h, d, compute_dtype(q.dtype).itemsize, relu)


def _gradients(
    g: Tensor,
    slab: Slab,
    dq: Tensor | None,
    dweights: Tensor | None,
    dk: Tensor | None,
    memory: Allocator,
    *,
    relu: bool,
    add: bool,
) -> None:
    q, parts = slab.q, tile_of(slab.q, slab.k, relu).parts
    with torch.cuda.device_of(q):
        if not relu:
            _folded_gradients(g, slab, dq, dweights, dk, memory, add=add, parts=parts)
            return
        for first, end in slab.groups("query_gradients"):
            dquery, dfactors = (None if x is None else x[:, :, first:end] for x in (dq, dweights))
            launch_query_gradients(dquery, dfactors, g, slab.heads(first, end), relu=True)
        if dk is not None:
            for first, end in slab.groups("key_gradients"):
                heads = slab.heads(first, end)
                launch_key_gradients(dk, g, heads, relu=True, add=add or first > 0, parts=parts, memory=memory)


def _folded_gradients(
    g: Tensor,
    slab: Slab,
    dq: Tensor | None,
    dweights: Tensor | None,
    dk: Tensor | None,
    memory: Allocator,
    *,
    add: bool,
    parts: int,
) -> None:
    """Without an activation: u = Σ_t g · k is one head's dq, and dk = Σ_s g · (Σ_h weights · q)."""
    q, weights = slab.q, slab.weights
    u = None
    if dq is not None or dweights is not None:
        u = empty(q, q.shape[0], tile_of(q, slab.k, relu=False).slab_rows, 1, q.shape[3], memory=memory)
    for rows, folded in _folded(slab, memory):
        some = slice(*rows)
        one = slab.rows(*rows).folded(folded)
        if u is not None:
            launch_query_gradients(u[:, : rows[1] - rows[0]], None, g[:, some], one, relu=False)
            dquery, dfactors, factors = (None if x is None else x[:, some] for x in (dq, dweights, weights))
            launch_unfold(dquery, dfactors, u, q[:, some], factors)
        if dk is not None:
            more = add or rows[0] > 0
            launch_key_gradients(dk, g[:, some], one, relu=False, add=more, parts=parts, memory=memory)


def _folded(slab: Slab, memory: Allocator) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Yield (rows, queries folded over heads [b, rows, 1, d] in the compute dtype), slab by slab in one buffer."""
    b, sq, _, d = slab.q.shape
    step = tile_of(slab.q, slab.k, relu=False).slab_rows
    buffer = empty(slab.q, b, step, 1, d, memory=memory)
    for first, end in blocks(sq, step):
        folded = buffer[:, : end - first]
        launch_fold(folded, slab.q[:, first:end], None if slab.weights is None else slab.weights[:, first:end])
        yield (first, end), folded
