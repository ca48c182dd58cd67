"""The graphs lane: a whole step, forward and backward, captured into a CUDA graph and replayed with other data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from headfold.attention import sparse_attention
from headfold.lanes import measure
from headfold.lanes.capture import EQUAL, Tensors, replayed, what_failed
from headfold.lanes.every_op import IMPLS, Inputs, differentiate, make_inputs, name_of
from headfold.lanes.record import FAIL, PASS, Column, Lane, Row, Track, no_track
from headfold.loss import indexer_loss
from headfold.mask import index_mask
from headfold.scores import index_scores
from headfold.selection import index_topk

COLUMNS = (
    Column("step", "step"),
    Column("backend", "backend"),
    Column("dtype", "dtype"),
    Column("found", "found"),
    Column("verdict", "verdict"),
)
TOPK = 40


def graphs(
    device: torch.device,
    *,
    impls: Sequence[str] = IMPLS,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    track: Track[Any] = no_track,
) -> Lane:
    """Capture a step per backend and dtype, each in a process of its own; only a CUDA or ROCm device has graphs."""
    lane = Lane("graphs", "Does a whole step replay as a CUDA graph, with the bits of plain calls?", COLUMNS)
    for impl, dtype in track(list(product(impls, dtypes)), "graphs"):
        found = measure.in_fresh_process(_here, impl, dtype, str(device)) or "the process that captured it was killed"
        row: Row = {"step": "scores, topk, mask, attention, loss; backward", "backend": impl, "dtype": name_of(dtype)}
        lane.rows.append({**row, "found": found, "verdict": PASS if found == EQUAL else FAIL})
    lane.notes = ["Two replays with other data in the same memory; every result and gradient, bit for bit."]
    return lane


def step(*tensors: torch.Tensor, impl: str) -> Tensors:
    """Score, select, mask, attend to the selection and compare with the attention; return results and gradients."""
    x = Inputs(*tensors)
    leaves = [one.detach().requires_grad_() for one in x[:-1]]
    q, weights, k, query, key, value, sink = leaves
    call: dict[str, Any] = {"causal": True, "layout": "bshd", "impl": impl}
    scores = index_scores(q, weights, k, **call)
    indices = index_topk(q, weights, k, TOPK, **call).indices
    mask = index_mask(indices, k.shape[1])
    out = sparse_attention(query, key, value, indices, softmax_scale=0.1, sink=sink, **call)
    assert isinstance(out, torch.Tensor)
    beside: dict[str, Any] = {"softmax_scale": 0.1, "topk": TOPK, "sparse": True, "scale": 0.1}
    loss = indexer_loss(q, weights, k, query.detach(), key.detach(), **beside, **call).loss
    indexer = leaves[:3]
    results = differentiate(scores, indexer) + differentiate(out, leaves[3:]) + differentiate(loss, indexer)
    return (indices, mask, *results)


def _inputs(dtype: torch.dtype, seed: int, device: torch.device) -> Tensors:
    return make_inputs(device, dtype, seed=seed)


def _here(impl: str, dtype: torch.dtype, device: str) -> str:
    try:
        return replayed(partial(step, impl=impl), partial(_inputs, dtype), torch.device(device))
    except RuntimeError as error:
        return what_failed(error)
