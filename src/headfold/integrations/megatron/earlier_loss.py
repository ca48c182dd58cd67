"""The indexer loss of Megatron-Core 0.17 and 0.18, a block of query rows at a time.

Its arithmetic step by step, epsilon and mask included: forward masks the student by the mask that was passed and the
teacher causally, backward masks both causally. With a causal mask, which causal layers pass, those are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headfold.scores import index_scores
from headfold.tiles import blocks

EPSILON = 1e-10
_HELD = 12  # tensors [b, rows, sk] of four bytes that a block has at its most
_NEG_INF = float("-inf")


class EarlierLoss(torch.autograd.Function):
    """Loss of q, weights, k against query and key: a float32 scalar, its gradients made in the same walk."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        weights: Tensor,
        k: Tensor,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        chosen: Tensor | None,
        softmax_scale: float,
        reduce: Callable[[Tensor], None] | None,
        workspace: int,
        wanted: bool,
    ) -> Tensor:
        """Walk the blocks.

        Args:
            ctx: autograd's.
            q: [sq, b, h, d].
            weights: [sq, b, h].
            k: [sk, b, d].
            query: [sq, b, np, hn].
            key: [sk, b, np or 1, hn].
            bias: [1 or b, sq, sk], the mask of the selection, or None.
            chosen: int64 [b, sq, topk], the support of a sparse loss, or None.
            softmax_scale: factor on query · key.
            reduce: sums the attention mass over the tensor-parallel group.
            workspace: bytes that a block may take, beside those of the scores.
            wanted: whether autograd will run backward, which in here cannot be seen.
        """
        (sq, b), sk = q.shape[:2], k.shape[0]
        loss = torch.zeros((), device=q.device)
        ctx.dtypes = [x.dtype if wanted and x.requires_grad else None for x in (q, weights, k)]
        dq, dweights, dk = (
            None if dtype is None else torch.zeros_like(x, dtype=torch.float32)
            for x, dtype in zip((q, weights, k), ctx.dtypes, strict=True)
        )
        if wanted:  # float32, as there: the gradients of a block then are, and are rounded once all blocks are summed
            k = k.float()
        for first, end in blocks(sq, max(1, workspace // max(1, _HELD * 4 * b * sk))):
            span = slice(first, end)
            future = torch.ones(end - first, sk, dtype=torch.bool, device=q.device).triu_(first + 1)
            unchosen = None if chosen is None else _unchosen(chosen[:, span], sk)
            target = _target(query[span], key, softmax_scale, future, unchosen, reduce)
            rows = (x.float() if wanted else x for x in (q[span], weights[span]))
            leaves = [x.detach().requires_grad_(wanted) for x in (*rows, k)]
            with torch.set_grad_enabled(wanted):
                scores = index_scores(*leaves, workspace=workspace)
            student = scores.detach() if bias is None else scores.detach() + bias[:, span]
            student = _softmax(student, None, unchosen)
            loss += (target * ((target + EPSILON).log() - (student + EPSILON).log())).sum()
            if not wanted:
                continue
            student = _softmax(scores.detach(), future, unchosen)
            # Products, not masks: a row without support is NaN, in its gradients as in its loss.
            g = _through_softmax(student, target).mul_(~future)
            scores.backward(g if unchosen is None else g.mul_(~unchosen))
            for held, leaf, part in ((dq, leaves[0], span), (dweights, leaves[1], span), (dk, leaves[2], slice(None))):
                if held is not None and leaf.grad is not None:
                    held[part] += leaf.grad
        ctx.save_for_backward(*(x for x in (dq, dweights, dk) if x is not None))
        ctx.rows = b * sq
        return loss / max(1, b * sq)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients."""
        held = iter(ctx.saved_tensors)
        share = grad_loss / ctx.rows
        return *(None if dtype is None else (next(held) * share).to(dtype) for dtype in ctx.dtypes), *(None,) * 8


def _unchosen(chosen: Tensor, sk: int) -> Tensor:
    return torch.ones(*chosen.shape[:2], sk, dtype=torch.bool, device=chosen.device).scatter_(-1, chosen, False)


def _softmax(scores: Tensor, future: Tensor | None, unchosen: Tensor | None) -> Tensor:
    for hidden in (future, unchosen):
        scores = scores if hidden is None else scores.masked_fill(hidden, _NEG_INF)
    return scores.softmax(-1)


def _target(
    query: Tensor,
    key: Tensor,
    softmax_scale: float,
    future: Tensor,
    unchosen: Tensor | None,
    reduce: Callable[[Tensor], None] | None,
) -> Tensor:
    """Attention mass [b, rows, sk], a head at a time, summed over heads and the group, normalised."""
    mass: Tensor | None = None
    for j in range(query.shape[2]):
        head = key[:, :, min(j, key.shape[2] - 1)].permute(1, 2, 0).float()
        logits = torch.bmm(query[:, :, j].transpose(0, 1).float(), head).mul_(softmax_scale)
        probabilities = _softmax(logits, future, unchosen)
        mass = probabilities if mass is None else mass.add_(probabilities)
    assert mass is not None
    if reduce is not None:
        reduce(mass)
    return mass.div_(mass.sum(-1, keepdim=True))


def _through_softmax(student: Tensor, target: Tensor) -> Tensor:
    """Gradient of Σ target · −log(student + ε) to the logits of the student."""
    slope = target.neg().div_(student + EPSILON)
    return slope.sub_((slope * student).sum(-1, keepdim=True)).mul_(student)
