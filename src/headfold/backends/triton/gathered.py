"""selected_scores by kernels: a program holds the queries of one row and gathers the row's keys, a block at a time.

Keys are the long side of every product, heads the other, so that a row's few heads fill tensor cores. Backward makes
the logits twice: once with dq and dweights of a row resident, once for the gradients of its keys. Those are written
pick by pick, and `Scatter` adds them up by one writer a key; or dscores stand at all keys, for the dense kernel of dk.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from headfold.backends.triton.gathered_kernels import query_gradients_of_picks, score_picks, spread_key_gradients
from headfold.backends.triton.launch import launch
from headfold.backends.triton.launches import Slab, empty, launch_fold, launch_key_sums
from headfold.backends.triton.operands import options, streamed
from headfold.backends.triton.picks import AllKeys, Picks, Ranges, Scatter, strides
from headfold.backends.triton.products import NARROWEST, pieces, precision
from headfold.backends.triton.replay import replay
from headfold.backends.triton.table import arch_of, tile
from headfold.backends.triton.visible import bias_strides, bound_strides
from headfold.contract import compute_dtype
from headfold.scatter_tiles import DenseTile, ScatterTile, tile_of_scores
from headfold.tiles import blocks

NEG_INF = float("-inf")
# Blocks of picks that one program scores, to be worth the load of its queries.
PICK_BLOCKS = 8


def gather_tile_of(q: Tensor, k: Tensor, indices: Tensor, relu: bool) -> ScatterTile | DenseTile:
    """Return the tile of a backward walk over batch-first q [b, sq, h, d], k [b, sk, d] and indices [b, sq, topk]."""
    shape = q.shape[1], k.shape[1], indices.shape[2], *q.shape[2:], compute_dtype(q.dtype).itemsize
    return tile_of_scores(*shape, relu=relu, ranged=q.dtype == torch.float16, exact=q.dtype.itemsize > 2)


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
    """As `headfold.backends.eager.selected_scores`; scratch is none."""
    b, sq, topk = indices.shape
    sk = k.shape[1]
    out = torch.empty(b, sq, topk, dtype=compute_dtype(q.dtype), device=q.device)
    if sk == 0:
        return out.fill_(NEG_INF)
    if out.numel() == 0:
        return out
    cut = _cut("selected_scores", q)
    grid = sq, triton.cdiv(topk, cut["BN"] * PICK_BLOCKS), b
    launch(
        score_picks, grid,
        out, q, weights, k, indices, start, end, bias,
        sk, topk, offset or 0, scale,
        *q.stride(), *strides(weights, 3), *k.stride(), *indices.stride(),
        *bound_strides(start), *bound_strides(end), *bias_strides(bias),
        **cut, **options(q, scale), BLOCKS=PICK_BLOCKS, RELU=relu, RATIO=ratio, STATIC=offset is not None,
        SIZE=streamed(q.shape[3]), STREAM=q.dtype.itemsize > 2,
    )  # fmt: skip
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
    """As `headfold.backends.eager.selected_scores_backward`; scratch is that of the call's tile, for dk alone."""
    b, sq, topk = indices.shape
    dq = torch.zeros_like(q) if needs[0] else None
    dweights = torch.zeros_like(weights) if needs[1] and weights is not None else None
    dk = torch.zeros(k.shape, dtype=k.dtype, device=k.device) if needs[2] else None
    if k.shape[1] == 0 or indices.numel() == 0:
        return dq, dweights, dk
    arithmetic = {**options(q, scale), "RELU": relu}
    if dq is not None or dweights is not None:
        cut = _cut("selected_rows", q)
        launch(
            query_gradients_of_picks, (sq, triton.cdiv(q.shape[2], cut["BH"]), b),
            dq, dweights, g, q, weights, k, indices, start, end, bias,
            k.shape[1], topk, offset or 0, scale,
            *strides(dq, 4), *strides(dweights, 3), *g.stride(), *q.stride(), *strides(weights, 3), *k.stride(),
            *indices.stride(), *bound_strides(start), *bound_strides(end), *bias_strides(bias),
            **arithmetic, **cut, RATIO=ratio, STATIC=offset is not None,
        )  # fmt: skip
    if dk is not None:
        ranges, tile = (start, end, bias, offset, ratio), gather_tile_of(q, k, indices, relu)
        if isinstance(tile, DenseTile):
            _dense_key_gradients(dk, g, q, weights, k, indices, ranges, tile, scale)
        else:
            _key_gradients(dk, g, q, weights, k, indices, ranges, tile, arithmetic, scale)
    return dq, dweights, dk


def _key_gradients(
    dk: Tensor,
    g: Tensor,
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    indices: Tensor,
    ranges: Ranges,
    walk: ScatterTile,
    arithmetic: dict[str, object],
    scale: float,
) -> None:
    """Write dk, slab by slab of rows, in the compute dtype and cast once."""
    dtype, cut = compute_dtype(q.dtype), _cut("selected_keys", q)
    picks, scatter = Picks(walk, q, dtype=dtype, ranged=q.dtype == torch.float16), Scatter(walk, q)
    assert picks.sums is not None
    spread = torch.empty(walk.rows, 1, walk.span, q.shape[3], dtype=dtype, device=q.device)
    cast = torch.empty(k.shape[1:], dtype=dtype, device=q.device) if dk.dtype != dtype else None
    sq = q.shape[1]
    for i in range(q.shape[0]):
        total = dk[i] if cast is None else cast.zero_()
        w = batch_element(weights, i)
        for block in blocks(sq, walk.block):
            picks.settle(indices, (i * sq + block[0], i * sq + block[1]), k.shape[1], ranges, g, scale)
            scatter.rank(picks, block[1] - block[0])
            for slab in blocks(block[1] - block[0], walk.rows):
                rows = slice(*slab)
                for span in blocks(walk.topk, walk.span):
                    launch(
                        spread_key_gradients, (slab[1] - slab[0], triton.cdiv(span[1] - span[0], cut["BN"])),
                        spread, picks.picks[rows], picks.sums[rows],
                        None if picks.largest is None else picks.largest[rows],
                        q[i], w, k[i], block[0] + slab[0], *span, walk.topk, walk.span,
                        *q[i].stride(), *strides(w, 2), *k[i].stride(), **arithmetic, **cut,
                    )  # fmt: skip
                    scatter.collect(total.unsqueeze(0), spread, picks, slab, span)
        if cast is not None:
            dk[i] = cast


def _dense_key_gradients(
    dk: Tensor,
    g: Tensor,
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    indices: Tensor,
    ranges: Ranges,
    tile: DenseTile,
    scale: float,
) -> None:
    """Write dk as that of dscores at all keys, slab by slab of rows, in the compute dtype and cast once."""
    dtype, (start, end, bias, offset, ratio) = compute_dtype(q.dtype), ranges
    every, sq = AllKeys(tile, q, dtype), q.shape[1]
    cast = torch.empty(k.shape[1:], dtype=dtype, device=q.device) if dk.dtype != dtype else None
    parts = empty(q, tile.parts, *k.shape[1:]) if tile.parts > 1 else None
    folded = None if tile.relu else empty(q, 1, tile.rows, 1, q.shape[3])
    for i in range(q.shape[0]):
        total = dk[i] if cast is None else cast.zero_()
        sums = (total.unsqueeze(0) if parts is None else parts.zero_()).unsqueeze(1)
        whole = Slab(
            q[i : i + 1], _alone(weights, i), k[i : i + 1], _alone(start, i), _alone(end, i), None, offset, ratio, 1.0
        )
        walk = functools.partial(_sum_slabs, sums, folded, every, whole, i * sq, indices, ranges, g, q, weights, scale)
        key = "selected keys", tile, i, offset, ratio, scale.hex(), precision(k.dtype)
        replay(walk, key, sums, folded, *every.tensors(), indices, start, end, bias, g, q, weights, k)
        if parts is not None:
            for part in parts:
                total += part
        if cast is not None:
            dk[i] = cast


def _sum_slabs(
    sums: Tensor,
    folded: Tensor | None,
    every: AllKeys,
    whole: Slab,
    first_row: int,
    indices: Tensor,
    ranges: Ranges,
    g: Tensor,
    q: Tensor,
    weights: Tensor | None,
    scale: float,
) -> None:
    """Add dk of a batch element, whose rows are numbered from first_row on, to sums [parts, 1, sk, d]."""
    for first, end in blocks(whole.q.shape[1], every.tile.rows):
        dscores = every.settle(indices, (first_row + first, first_row + end), ranges, g, scale, q, weights)
        slab = whole.rows(first, end)
        if folded is not None:
            queries = folded[:, : end - first]
            launch_fold(queries, slab.q, slab.weights)
            slab = slab.folded(queries)
        for heads in slab.groups("key_sums"):
            launch_key_sums(sums, dscores, slab.heads(*heads), relu=every.tile.relu, add=True, broken=every.broken)


def batch_element(x: Tensor | None, i: int) -> Tensor | None:
    """Return batch element i; an axis of size one stands for all."""
    return None if x is None else x[i if x.shape[0] > 1 else 0]


def _alone(x: Tensor | None, i: int) -> Tensor | None:
    """Return batch element i as a batch of one."""
    return None if x is None else x[i : i + 1] if x.shape[0] > 1 else x


def _cut(kernel: str, q: Tensor) -> dict[str, int]:
    """Return sizes, tile and launch of a kernel, as its constants."""
    h, d = q.shape[2:]
    row, (d0, d1) = tile(kernel, arch_of(q.device), q.dtype, d, h), pieces(d)
    heads = min(row.rows, max(NARROWEST, triton.next_power_of_2(h)))
    sizes = {"H": h, "D": d, "D0": d0, "D1": d1, "BH": heads, "BN": row.keys}
    return {**sizes, "STAGES": row.stages, **row.options}
