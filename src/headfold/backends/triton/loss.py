"""indexer_loss by kernels, in one walk over slabs: scores, selection, teacher, comparison and all gradients.

A slab is a block of query rows, of some or all batch elements, with all of the keys that the static bound lets them
see. Its scores become g = dL/dscores, and the gradient kernels consume them before the next slab overwrites them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple, overload

import torch
from torch import Tensor

from headfold.backends.eager.loss import share_of_a_row
from headfold.backends.eager.scores import empty_rows_like
from headfold.backends.eager.scratch import Visible
from headfold.backends.triton.compare import compare, mark_seen, mark_selected
from headfold.backends.triton.memory import Allocator, Arena
from headfold.backends.triton.products import precision
from headfold.backends.triton.replay import do, replay
from headfold.backends.triton.scores import add_gradients, fill_scores
from headfold.backends.triton.select import Scratch, select
from headfold.backends.triton.teacher import fill_mass
from headfold.backends.triton.visible import rows_of
from headfold.contract import compute_dtype
from headfold.loss_slabs import LossSlab
from headfold.tiles import blocks
from headfold.triton_tiles import padded

Reduce = Callable[[Tensor], None]


class Call(NamedTuple):
    """The arguments of a loss, batch-first, of all rows or of those of a slab."""

    q: Tensor
    weights: Tensor | None
    k: Tensor
    query: Tensor
    key: Tensor
    start: Tensor | None
    end: Tensor | None
    bias: Tensor | None
    row_mask: Tensor | None
    offset: int | None
    ratio: int
    relu: bool
    scale: float
    softmax_scale: float

    def of(self, batch: tuple[int, int], row: tuple[int, int]) -> Call:
        """Return the call of rows [row) of batch elements [batch)."""
        return self._replace(
            q=part(self.q, batch, row),
            weights=part(self.weights, batch, row),
            k=self.k[slice(*batch)],
            query=part(self.query, batch, row),
            key=self.key[slice(*batch)],
            start=part(self.start, batch, row),
            end=part(self.end, batch, row),
            bias=part(self.bias, batch, row),
            row_mask=part(self.row_mask, batch, row),
            offset=None if self.offset is None else self.offset + row[0],
        )

    @property
    def seen(self) -> tuple[Tensor | None, Tensor | None, int | None, int]:
        """The range: start, end, offset and ratio."""
        return self.start, self.end, self.offset, self.ratio

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return every tensor."""
        return self.q, self.weights, self.k, self.query, self.key, self.start, self.end, self.bias, self.row_mask

    def traits(self) -> Hashable:
        """Return what the launches of a call follow from beside its tensors and its plan."""
        scales = float(self.scale).hex(), float(self.softmax_scale).hex()
        return self.offset, self.ratio, self.relu, scales, precision(self.k.dtype), precision(self.query.dtype)

    def limit(self) -> int:
        """Return one past the last key that the static bound lets the last row see."""
        return Visible(self.k.shape[1], None, None, self.offset, self.ratio, None).limit(self.q.shape[1] - 1)


def loss_plan(q: Tensor, k: Tensor, query: Tensor, key: Tensor, relu: bool, topk: int | None) -> LossSlab:
    """Return the slab of a call over batch-first tensors."""
    (b, sq, h, d), size = q.shape, compute_dtype(q.dtype).itemsize
    return LossSlab.of(b, sq, k.shape[1], h, d, query.shape[2], size, topk, relu=relu)


def indexer_loss(
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    query: Tensor,
    key: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    bias: Tensor | None,
    row_mask: Tensor | None,
    offset: int | None,
    ratio: int,
    relu: bool,
    scale: float,
    softmax_scale: float,
    topk: int | None,
    sparse: bool,
    mean: bool,
    *,
    needs: tuple[bool, bool, bool],
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Loss, indices, dq, dweights and dk of a checked, batch-first call; gradients in the compute dtype.

    needs: which gradients are made; the others are None.   reduce: sums a contiguous tensor over a group, in place.
    """
    (b, sq), dtype, device = q.shape[:2], compute_dtype(q.dtype), q.device
    ranges = start, end, bias, row_mask, offset, ratio
    call = Call(q, weights, k, query, key, *ranges, relu, scale, softmax_scale)
    plan = loss_plan(q, k, query, key, relu, topk)
    indices = None if topk is None else torch.full((b, sq, topk), -1, dtype=torch.int32, device=device)
    dq = torch.empty_like(q, dtype=dtype) if needs[0] else None
    dweights = torch.empty_like(weights, dtype=dtype) if needs[1] and weights is not None else None
    dk = empty_rows_like(k, dtype).zero_() if needs[2] else None
    backward = any(x is not None for x in (dq, dweights, dk))
    with torch.autocast(device.type, enabled=False), torch.cuda.device_of(q):
        share = share_of_a_row(row_mask, b * sq, mean, dtype, device)
        losses = torch.zeros(b, sq, dtype=dtype, device=device)
        buffer = torch.empty(plan.batches * plan.rows * plan.width, dtype=dtype, device=device)
        memory = Arena(plan.backward_step_bytes if backward else plan.forward_step_bytes, device)
        results = losses, indices, dq, dweights, dk
        walk = functools.partial(_walk, plan, call, buffer, memory, results, share, reduce, sparse=sparse)
        if reduce is None:
            replay(walk, ("loss", plan, sparse, call.traits()), buffer, memory.bytes, *results, share, *call.tensors())
        else:  # which nothing is known of
            walk()
        return losses.sum().mul_(share), indices, dq, dweights, dk


def _walk(
    plan: LossSlab,
    call: Call,
    buffer: Tensor,
    memory: Allocator,
    results: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    share: Tensor,
    reduce: Reduce | None,
    *,
    sparse: bool,
) -> None:
    """Write losses, zeros before, and indices, dq and dweights, and add to dk: slab by slab of scores in the buffer."""
    losses, indices, dq, dweights, dk = results
    backward = any(x is not None for x in results[2:])
    b, sq = losses.shape
    for batch in blocks(b, plan.batches):
        for row in blocks(sq, plan.rows):
            some = call.of(batch, row)
            gradients = part(dq, batch, row), part(dweights, batch, row), None if dk is None else dk[slice(*batch)]
            if some.limit() == 0:
                _zero(*gradients[:2])
                continue
            with memory.step():
                scores = _scores(buffer, plan, some, memory)
            picked = part(indices, batch, row)
            with memory.step():
                _select(plan, scores, some, picked, memory)
            rows = part(losses, batch, row)
            with memory.step():
                _compare(plan, scores, some, picked, sparse, rows, share, reduce, memory, backward=backward)
            if backward:  # all keys, so that dk is summed alike in every slab; g is zero where the bias hides
                inputs = some.q, some.weights, some.k, some.start, some.end
                options = None, some.offset, some.ratio, some.relu, some.scale
                with memory.step():
                    add_gradients(scores, *inputs, *options, *gradients, memory)


@overload
def part(x: Tensor, batch: tuple[int, int], row: tuple[int, int]) -> Tensor: ...


@overload
def part(x: None, batch: tuple[int, int], row: tuple[int, int]) -> None: ...


def part(x: Tensor | None, batch: tuple[int, int], row: tuple[int, int]) -> Tensor | None:
    """Return rows [row) of batch elements [batch) of x [1 or b, sq, ...]; an axis of size one stands for all."""
    if x is None:
        return None
    return x[slice(*batch) if x.shape[0] > 1 else slice(None), slice(*row)]


def _zero(*gradients: Tensor | None) -> None:
    """Zero the gradients of rows that the static bound bars from every key."""
    for gradient in gradients:
        if gradient is not None:
            do(_fill_with_zeros, gradient)


def _fill_with_zeros(x: Tensor) -> None:
    x.zero_()


def _scores(buffer: Tensor, plan: LossSlab, some: Call, memory: Allocator) -> Tensor:
    """Return the scores [batches, rows, sk] of a slab, in the buffer; keys from the static bound on are not written."""
    (b, rows), n = some.q.shape[:2], some.limit()
    scores = buffer[: b * rows * plan.width].view(b, rows, plan.width)[..., : plan.sk]
    bias = None if some.bias is None else some.bias[..., :n]
    ranges = some.start, some.end, bias, some.offset, some.ratio
    fill_scores(scores[..., :n], some.q, some.weights, some.k[:, :n], *ranges, some.relu, some.scale, memory)
    return scores


def _select(plan: LossSlab, scores: Tensor, some: Call, indices: Tensor | None, memory: Allocator) -> None:
    """Write the indices [batches, rows, topk] of a slab: as many rows at a time as the plan has room for."""
    if indices is None or plan.kept is None:
        return
    n, scratch = some.limit(), Scratch(plan.kept, scores.device, memory)
    for first, end in blocks(scores.shape[1], plan.kept.rows // plan.batches):
        offset = None if some.offset is None else some.offset + first
        start, stop = rows_of(some.start, first, end), rows_of(some.end, first, end)
        picked = indices[:, first:end, : plan.kept.topk]
        select(scores[:, first:end, :n], picked, None, start, stop, offset, some.ratio, scratch)


def _compare(
    plan: LossSlab,
    scores: Tensor,
    some: Call,
    indices: Tensor | None,
    sparse: bool,
    losses: Tensor,
    share: Tensor,
    reduce: Reduce | None,
    memory: Allocator,
    *,
    backward: bool,
) -> None:
    """Write the losses of a slab's rows and, for backward, dL/dscores in place of its scores."""
    (b, rows), n = some.q.shape[:2], some.limit()
    empty = functools.partial(memory.empty, device=scores.device)
    mass = empty(b, rows, padded(n), dtype=scores.dtype)
    marks = None
    if sparse:
        marks = empty(*mass.shape, dtype=torch.uint8)
        do(_fill_with_zeros, marks)
        if plan.kept is not None and indices is not None:
            mark_selected(marks, indices[..., : plan.kept.topk])
    elif some.bias is not None:
        marks = empty(*mass.shape, dtype=torch.uint8)
        mark_seen(marks, some.bias, *some.seen, n)
    sums = empty(plan.sums, dtype=scores.dtype)
    fill_mass(mass, sums, some.query, some.key, marks, *some.seen, n, some.softmax_scale)
    if reduce is not None:
        reduce(mass)
    compare(losses, scores, mass, marks, *some.seen[:2], some.row_mask, share, *some.seen[2:], n, backward=backward)
