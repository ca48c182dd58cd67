"""The paths that the lanes compare: the materialised path, the seed's loop over heads, and headfold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headfold.bills import Bill
from headfold.lanes.problem import Problem
from headfold.scores import index_scores


@dataclass(frozen=True)
class ScorePath:
    """One way to compute scores [b, sq, sk] from q, weights and k in layout sbhd.

    forward: called as forward(q, weights, k, causal, scale).   workspace: what it was given, for headfold.
    """

    name: str
    family: str
    forward: Callable[[Tensor, Tensor, Tensor, bool, float], Tensor]
    workspace: int | None = None

    def __call__(self, inputs: Sequence[Tensor], causal: bool, scale: float) -> Tensor:
        """Score q, weights and k."""
        q, weights, k = inputs
        return self.forward(q, weights, k, causal, scale)

    def bill(self, problem: Problem) -> Bill:
        """Return the planned bytes."""
        return problem.geometry.bill(self.family, causal=problem.causal, scale=problem.scale)


def headfold(workspace: int | None = None, label: str = "headfold") -> ScorePath:
    """Our path, at a workspace."""

    def forward(q: Tensor, weights: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        return index_scores(q, weights, k, causal=causal, scale=scale, workspace=workspace)

    return ScorePath(label, "headfold", forward, workspace)


def materialized() -> ScorePath:
    """The upstream-style einsum over all heads."""

    def forward(q: Tensor, weights: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        return index_scores(q, weights, k, causal=causal, scale=scale, impl="materialized")

    return ScorePath("materialized", "materialized", forward)


def loop() -> ScorePath:
    """The seed's answer: one head at a time, added into the output."""
    return ScorePath("per-head loop", "per-head loop", per_head_loop)


def per_head_loop(q: Tensor, weights: Tensor, k: Tensor, causal: bool = False, scale: float = 1.0) -> Tensor:
    """Scores [b, sq, sk] of sbhd inputs by a loop over heads: no head axis, until autograd keeps every head's relu."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(dtype).permute(1, 2, 0)
    scores = torch.zeros(q.shape[1], q.shape[0], k.shape[0], dtype=dtype, device=q.device)
    for head in range(q.shape[2]):
        factor = weights[:, :, head].to(dtype).transpose(0, 1).unsqueeze(-1)
        scores += torch.relu(torch.bmm(q[:, :, head].to(dtype).transpose(0, 1), keys)) * factor
    if scale != 1.0:
        scores = scores * scale
    if causal:
        sq, sk = scores.shape[1:]
        hidden = torch.ones(sq, sk, dtype=torch.bool, device=q.device).triu(sk - sq + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores
