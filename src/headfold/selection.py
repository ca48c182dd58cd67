"""index_topk: the best keys of every query row, without a score matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from headfold import backends, materialized, ops
from headfold.contract import at_least, enough_workspace, one_of, score_call

if TYPE_CHECKING:
    from torch import Tensor

    from headfold.keyrange import KeyRange


class TopK(NamedTuple):
    """A selection: indices [b, sq, topk], score-descending, -1 where a row ran out of keys; scores alike, or None.

    In another order, with -1 last all the same, where it was asked for with sorted=False.
    """

    indices: Tensor
    scores: Tensor | None


def index_topk(
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    topk: int,
    *,
    with_scores: bool = False,
    index_dtype: torch.dtype = torch.int32,
    sorted: bool = True,
    causal: bool = False,
    keys: KeyRange | None = None,
    bias: Tensor | None = None,
    activation: str | None = "relu",
    scale: float = 1.0,
    layout: str = "sbhd",
    impl: str = "auto",
    workspace: int | None = None,
) -> TopK:
    """Select the topk best-scoring visible keys of every query row, never holding all scores.

    The order is total: score descending, ties to the smallest key, -0.0 equal to +0.0, NaN first whatever its sign. A
    key that scores -inf is never selected. Not differentiable. Rows that see at most topk keys have the same order, so
    they are scored too; scoring is skipped only where no order needs it: for topk = 0, and for blocks of rows that the
    static bound bars from every key.

    Args:
        q: [sq, b, h, d] float16, bfloat16, float32 or float64.
        weights: [sq, b, h], cast to the compute dtype; None means ones.
        k: [sk, b, d], as q.
        topk: keys to keep; the result has this width even where it exceeds sk, and rows that see fewer end in -1.
        with_scores: whether to return the scores of what was selected (-inf beside -1).
        index_dtype: torch.int32 or torch.int64.
        sorted: whether a selection is in that order. False, as torch.topk has it, leaves open in which: the same keys,
            in an order that is the same in every run of one call, -1 last. Attention needs no order, and kernels then
            do not sort (but in float64).
        causal: as in `index_scores`.
        keys: as in `index_scores`.
        bias: as in `index_scores`.
        activation: as in `index_scores`.
        scale: as in `index_scores`.
        layout: as in `index_scores`.
        impl: as in `index_scores`; "materialized" sorts a whole score matrix.
        workspace: bytes of scratch, 64 MiB when None. The result does not depend on it, but for the order where that
            is left open.

    Returns:
        TopK(indices, scores): indices [b, sq, topk]; scores [b, sq, topk] float32 (float64 for float64 inputs) or None.

    Memory: the results and at most `workspace` more.

    Raises: ValueError or TypeError for a broken contract, before anything is allocated.

    Source: DeepSeek-V3.2 (arXiv:2512.02556), equation 2.
    """
    at_least("index_topk", "topk", topk, 0)
    one_of("index_topk", "index_dtype", index_dtype, (torch.int32, torch.int64))
    call = score_call(
        "index_topk",
        q,
        weights,
        k,
        causal=causal,
        keys=keys,
        bias=bias,
        activation=activation,
        scale=scale,
        layout=layout,
        workspace=workspace,
    )
    with torch.no_grad():
        backend = backends.choose("index_topk", impl, call.q)
        if backend == "materialized":
            return TopK(*materialized.index_topk(call, topk, with_scores, index_dtype))
        least = backends.load(backend).selection_plan(call.q, call.k, call.relu, topk, 0)
        enough_workspace("index_topk", least.scratch_bytes, call.workspace)
        inputs = (x if x is None else x.detach() for x in call.inputs)
        rest = topk, with_scores, index_dtype, call.workspace, sorted
        indices, scores = ops.index_topk(*inputs, *call.options, *rest, backend)
    return TopK(indices, scores if with_scores else None)
