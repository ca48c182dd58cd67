"""indexer_loss in one walk over slabs: teacher, student, loss, selection and all gradients.

A slab is a block of query rows with all of the keys that the static bound lets them see. Its scores become the student,
then g = dL/dscores, and the backward walk consumes them before the next slab overwrites them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headfold.backends.eager.scores import empty_rows_like
from headfold.backends.eager.scratch import NEG_INF, Visible, batch_element, head
from headfold.backends.eager.teacher import Teacher
from headfold.backends.eager.topk import PackedCandidates, SortedCandidates
from headfold.backends.eager.walks import BackwardWalk, ForwardWalk, tile_of
from headfold.contract import compute_dtype
from headfold.loss_tiles import LossTile
from headfold.tiles import MIB, blocks

Reduce = Callable[[Tensor], None]


def loss_plan(q: Tensor, k: Tensor, query: Tensor, key: Tensor, relu: bool, topk: int | None) -> LossTile:
    """Return the slab of a call over batch-first tensors."""
    (b, sq), (np, hn) = q.shape[:2], query.shape[2:]
    accelerator = q.device.type != "cpu"
    return LossTile.of(b, sq, tile_of(q, k, relu), k.shape[1], np, key.shape[2], hn, topk, accelerator=accelerator)


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
    (b, sq), sk, dtype, device = q.shape[:2], k.shape[1], compute_dtype(q.dtype), q.device
    plan = loss_plan(q, k, query, key, relu, topk)
    indices = None if topk is None else torch.full((b, sq, topk), -1, dtype=torch.int32, device=device)
    # Zeros: rows that the static bound bars from every key are not visited.
    dq = torch.zeros_like(q, dtype=dtype) if needs[0] else None
    dweights = torch.zeros_like(weights, dtype=dtype) if needs[1] and weights is not None else None
    dk = empty_rows_like(k, dtype).zero_() if needs[2] else None
    gradients = dq, dweights, dk
    with torch.autocast(device.type, enabled=False):
        share = share_of_a_row(row_mask, b * sq, mean, dtype, device)
        losses = torch.zeros(plan.slabs, dtype=dtype, device=device)
        slab = _Slab(plan, q, scale, softmax_scale, sparse, backward=any(x is not None for x in gradients))
        for i in range(b):
            visible = Visible.of(i, sk, start, end, bias, offset, ratio)
            inputs = q[i], batch_element(weights, i), k[i]
            for j, row in enumerate(blocks(sq, plan.tile.rows)):
                n = visible.limit(row[1] - 1)
                if n == 0:
                    continue
                span = slice(*row)
                hidden = slab.score(*inputs, visible, row, n, None if indices is None else indices[i, span])
                counted = None if row_mask is None else row_mask[i, span]
                dead = slab.without_loss(hidden, row[1] - row[0], n, counted)
                mass = slab.mass(query[i, span], key[i], hidden, n)
                if reduce is not None:
                    reduce(mass)
                slab.compare(mass, hidden, dead, losses[i * (plan.slabs // b) + j])
                slab.differentiate(mass, dead, share, inputs, row, [batch_element(x, i) for x in gradients])
        return losses.sum().mul_(share), indices, *gradients


def scaled(factor: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Return factor · gradient [b, s, ...] in dtype; where a cast takes memory, it is made block by block."""
    if gradient.dtype == dtype:
        return gradient * factor
    out = torch.empty_like(gradient, dtype=dtype)
    if gradient.is_cuda:  # casts as it writes
        torch.mul(gradient, factor, out=out)
    elif gradient.numel() > 0:
        step = max(1, MIB * gradient.shape[1] // (4 * gradient.nbytes))
        for span in blocks(gradient.shape[1], step):
            out[:, slice(*span)] = gradient[:, slice(*span)] * factor
    return out


def share_of_a_row(row_mask: Tensor | None, rows: int, mean: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what a row's loss is multiplied by: 1, or 1 over the rows that count (1 where none counts)."""
    if not mean:
        return torch.ones((), dtype=dtype, device=device)
    if row_mask is None:
        return torch.full((), 1 / max(1, rows), dtype=dtype, device=device)
    return row_mask.sum().clamp_(min=1).to(dtype).reciprocal_()


class _Slab:
    """The buffers of one slab and what happens to them, in order: score, mass, compare, differentiate."""

    def __init__(
        self, plan: LossTile, like: Tensor, scale: float, softmax_scale: float, sparse: bool, *, backward: bool
    ) -> None:
        self.plan, self.sparse = plan, sparse
        self.forward = ForwardWalk(plan.tile, like, scale)
        self.backward = BackwardWalk(plan.tile, like, scale, self.forward) if backward else None
        scratch, rows = self.forward.scratch, plan.tile.rows
        self.scores, self.teacher_mass = scratch.empty(rows * plan.sk), scratch.empty(rows * plan.sk)
        self.sums = scratch.empty(rows)
        self.hidden, self.other, self.dead, self.nothing = (
            torch.empty(count, dtype=torch.bool, device=like.device)
            for count in (rows * (plan.sk + 1), rows * plan.sk, rows, rows)
        )
        self.teacher = Teacher(plan, scratch.dtype, like.device, softmax_scale)
        self.candidates: PackedCandidates | SortedCandidates | None = None
        if plan.selection is not None:
            packed = scratch.dtype == torch.float32
            self.candidates = (PackedCandidates if packed else SortedCandidates)(plan.selection, like.device)
            self.picked = torch.empty(rows * plan.selection.kept, dtype=torch.int64, device=like.device)

    def score(
        self,
        q: Tensor,
        weights: Tensor | None,
        k: Tensor,
        visible: Visible,
        row: tuple[int, int],
        n: int,
        indices: Tensor | None,
    ) -> Tensor | None:
        """Fill the scores [rows, n], -inf beyond the support, and the indices [rows, topk]; return the marks.

        The marks are bool [rows, m], true for those of the last m keys that are no support, or None when all are.
        """
        rows, plan = row[1] - row[0], self.plan.selection
        self.student = head(self.scores, rows, n)
        waiting = 0
        if self.candidates is not None:
            self.candidates.start(rows)
        for _, key, scores in self.forward.tiles(q, weights, k, visible, row):
            self.student[:, slice(*key)] = scores
            if self.candidates is not None and plan is not None:
                if waiting + key[1] - key[0] > plan.chunk:
                    self.candidates.reduce(rows, waiting, last=False)
                    waiting = 0
                self.candidates.add(scores, key[0], waiting)
                waiting += key[1] - key[0]
        if self.candidates is not None and plan is not None and indices is not None:
            self.candidates.reduce(rows, waiting, last=True)
            self.candidates.write(rows, indices[:, : plan.kept], None)
        if not self.sparse:
            return self._unseen(visible, row, n)
        hidden = self._unselected(None if plan is None else indices, rows, n)
        self.student.masked_fill_(hidden, NEG_INF)
        return hidden

    def _unseen(self, visible: Visible, row: tuple[int, int], n: int) -> Tensor | None:
        """Marks of what the rows may not see. Where the bound is static, its first keys are seen by all of them."""
        moving = visible.start is not None or visible.end is not None or visible.bias is not None
        first = 0 if moving else visible.limit(row[0])
        if first == n and not moving:
            return None
        hidden = head(self.hidden, row[1] - row[0], n - first).fill_(False)
        t = torch.arange(first, n, dtype=torch.int32, device=hidden.device)
        bias = None if visible.bias is None else visible.bias[slice(*row), :n]
        visible.hide(hidden, row, t, bias, head(self.other, *hidden.shape))
        return hidden

    def _unselected(self, indices: Tensor | None, rows: int, n: int) -> Tensor:
        """Marks of what the rows did not select, with a column behind the keys for -1 to fall into."""
        hidden = head(self.hidden, rows, n + 1).fill_(True)
        if indices is not None and self.plan.selection is not None:
            picked = head(self.picked, rows, self.plan.selection.kept).copy_(indices[:, : self.plan.selection.kept])
            hidden.scatter_(1, picked.remainder_(n + 1), False)
        return hidden[:, :n]

    def without_loss(self, hidden: Tensor | None, rows: int, n: int, counted: Tensor | None) -> Tensor | None:
        """Return bool [rows], true for rows that have no support or do not count; None when there are none."""
        dead = None if counted is None else torch.logical_not(counted, out=self.dead[:rows])
        if hidden is None or hidden.shape[1] < n:
            return dead
        nothing = torch.all(hidden, 1, out=self.nothing[:rows])
        return nothing if dead is None else dead.logical_or_(nothing)

    def mass(self, query: Tensor, key: Tensor, hidden: Tensor | None, n: int) -> Tensor:
        """Return the attention mass [rows, n], not yet normalised."""
        mass = head(self.teacher_mass, query.shape[0], n)
        self.teacher.fill(mass, query, key, hidden)
        return mass

    def compare(self, mass: Tensor, hidden: Tensor | None, dead: Tensor | None, loss: Tensor) -> None:
        """Normalise the mass to p, turn the scores into log softmax, and write Σ p·(log p − log softmax) of the slab.

        p·log p is taken from the smallest normal number up: below it the product is nothing beside rounding.
        """
        rows, n = mass.shape
        sums = self.sums[:rows]
        mass /= torch.sum(mass, 1, out=sums).unsqueeze(1)
        torch.ops.aten._log_softmax.out(self.student, 1, False, out=self.student)
        terms = head(self.teacher.logits, rows, n)
        torch.clamp(mass, min=torch.finfo(mass.dtype).tiny, out=terms).log_().sub_(self.student)
        if hidden is not None:
            terms[:, n - hidden.shape[1] :].masked_fill_(hidden, 0)
        torch.sum(terms.mul_(mass), 1, out=sums)
        if dead is not None:
            sums.masked_fill_(dead, 0)
        torch.sum(sums, 0, out=loss)

    def differentiate(
        self,
        mass: Tensor,
        dead: Tensor | None,
        share: Tensor,
        inputs: tuple[Tensor, Tensor | None, Tensor],
        row: tuple[int, int],
        gradients: list[Tensor | None],
    ) -> None:
        """Write the rows of dq and dweights and add to dk: g = (softmax(score) − p) · share, through the scores."""
        if self.backward is None:
            return
        g = self.student.exp_().sub_(mass).mul_(share)
        if dead is not None:
            g.masked_fill_(dead.unsqueeze(1), 0)
        everything = Visible(g.shape[1], None, None, None, 1, None)  # g is zero wherever a row may not see
        dq, dweights, dk = gradients
        self.backward.slab(g, *inputs, everything, row, dq, dweights, dk, kept=self.plan.keeps_logits)
