"""indexer_loss: what trains an indexer to score keys as attention weighs them, without a score matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from headfold import backends, materialized_loss, ops
from headfold.contract import (
    at_least,
    attention_of,
    enough_workspace,
    number,
    one_of,
    reverse_mode_only,
    rows_of,
    score_call,
    wants_grad,
)
from headfold.parallel import summing

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from headfold.keyrange import KeyRange


class IndexerLoss(NamedTuple):
    """A scalar loss, and the selection [b, sq, topk] that was made on the way, or None without topk."""

    loss: Tensor
    indices: Tensor | None


def indexer_loss(
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    softmax_scale: float,
    topk: int | None = None,
    sparse: bool = False,
    row_mask: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    causal: bool = False,
    keys: KeyRange | None = None,
    bias: Tensor | None = None,
    activation: str | None = "relu",
    scale: float = 1.0,
    layout: str = "sbhd",
    impl: str = "auto",
    workspace: int | None = None,
) -> IndexerLoss:
    """Kullback-Leibler divergence of softmax(score) from attention, in nats; one walk makes it and its gradients.

    The teacher p is softmax(query · key · softmax_scale) of every head over the row's support, summed over heads and
    normalised; the student is softmax(score) over the same support. A row adds Σ_t p · (log p - log student). Support
    is every visible key, or with sparse=True the selected ones. Gradients go to q, weights and k, never to query or
    key. Rows without support add neither loss nor gradient.

    Args:
        q: [sq, b, h, d] float16, bfloat16, float32 or float64.
        weights: [sq, b, h], cast to the compute dtype; None means ones.
        k: [sk, b, d], as q.
        query: [sq, b, np, hn], queries of the attention, any floating dtype ([b, sq, np, hn] and [tq, np, hn] in the
            other layouts).
        key: [sk, b, np_k, hn], query's dtype; np_k divides np, and head j of query reads head j // (np // np_k). A
            head axis of stride 0 counts as one head and is not copied.
        softmax_scale: factor on query · key.
        topk: number of keys to select, in the order of `index_topk`; None selects nothing.
        sparse: whether the support is what was selected; needs topk.
        row_mask: bool [b, sq], true for rows that count; None means all.
        reduction: "mean" over the rows that count, those without support included (0 where none counts), or "sum".
        group: process group over which attention heads are split; its ranks pass the same q, weights and k, heads of
            their own, and one shape. The teacher is summed over it slab by slab, and every rank gets the whole loss.
        causal: as in `index_scores`.
        keys: as in `index_scores`.
        bias: as in `index_scores`; it moves the student, and hides keys from the teacher where it is -inf.
        activation: as in `index_scores`.
        scale: as in `index_scores`.
        layout: as in `index_scores`.
        impl: as in `index_scores`; "materialized" holds [sq, b, h, sk] and [b, np, sq, sk].
        workspace: bytes of scratch, 64 MiB when None. The result does not depend on it.

    Returns:
        IndexerLoss(loss, indices): a float32 scalar (float64 for float64 inputs), and int32 [b, sq, topk] or None.

    Memory: the selection, the gradients that inputs ask for, in the compute dtype, and at most `workspace` more. The
    gradients, and nothing else, are held for backward, which returns them scaled and cast, each beside the held one;
    under no_grad none is formed. Nothing has the size of sq · sk. Scratch has room for at least one row with all of its
    keys: from some 200 thousand keys on it grows with them.

    Raises: ValueError or TypeError for a broken contract, before anything is allocated; UnsupportedError for
    forward-mode tangents; RuntimeError when differentiated twice.

    Source: DeepSeek-V3.2 (arXiv:2512.02556), equations 3 and 4.
    """
    op = "indexer_loss"
    call = score_call(
        op,
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
    query, key = attention_of(op, query, key, call, layout)
    number(op, "softmax_scale", softmax_scale)
    one_of(op, "sparse", sparse, (True, False))
    one_of(op, "reduction", reduction, ("mean", "sum"))
    if topk is not None:
        at_least(op, "topk", topk, 0)
    elif sparse:
        raise ValueError(
            f"{op}: sparse=True needs topk, got topk=None. It says how many keys of a row are its support."
        )
    rows_of(op, row_mask, call.q)
    reduce = summing(op, group)
    mean = reduction == "mean"
    backend = backends.choose(op, impl, call.q, query.shape[-1])
    if backend == "materialized":
        rest = float(softmax_scale), topk, sparse, row_mask, mean, reduce
        return IndexerLoss(*materialized_loss.indexer_loss(call, query, key, *rest))
    reverse_mode_only(op, *call.inputs)
    needs = tuple(wants_grad(x) for x in call.inputs)
    plan = backends.load(backend).loss_plan(call.q, call.k, query, key, call.relu, topk)
    enough_workspace(op, plan.backward_bytes if any(needs) else plan.forward_bytes, call.workspace)
    ranges = call.start, call.end, call.bias, row_mask, call.offset, call.ratio, call.relu, call.scale
    arguments = *call.inputs, query, key, *ranges, float(softmax_scale), topk, sparse, mean, backend, *needs
    if reduce is None:
        loss, indices, *_ = ops.indexer_loss(*arguments)
    else:
        loss, indices, *_ = ops.indexer_loss_in_group(reduce, *arguments)
    return IndexerLoss(loss, None if topk is None else indices)
