"""The paths that the lanes compare: upstream's, the seed's loop over heads, and headfold's, to score and to select."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headfold.bills import Bill
from headfold.geometry import SELECTED, SELECTING, IndexerGeometry
from headfold.lanes.problem import Problem
from headfold.lanes.record import show_bytes
from headfold.scores import index_scores
from headfold.selected import selected_scores
from headfold.selection import index_topk
from headfold.tiles import DEFAULT_WORKSPACE, MIB


@dataclass(frozen=True)
class IndexerPath:
    """One way to score or to select, given q, weights and k in layout sbhd.

    family: its name in IndexerGeometry.bill.   forward: called as forward(q, weights, k, causal, scale).
    workspace: what it was given, for headfold.   trains: whether its result has a gradient.
    kept: whether its result has topk columns, where scores have sk.
    """

    name: str
    family: str
    forward: Callable[[Tensor, Tensor, Tensor, bool, float], Tensor]
    workspace: int | None = None
    trains: bool = True
    kept: bool = False

    def __call__(self, inputs: Sequence[Tensor], causal: bool, scale: float) -> Tensor:
        """Score q, weights and k, or select by them."""
        q, weights, k = inputs
        return self.forward(q, weights, k, causal, scale)

    @property
    def ours(self) -> bool:
        """Whether headfold's contract binds it."""
        return self.family.startswith("headfold")

    @property
    def workspace_bytes(self) -> int:
        """The workspace in bytes."""
        return DEFAULT_WORKSPACE if self.workspace is None else self.workspace

    def bill(self, problem: Problem, device: torch.device) -> Bill:
        """Return the planned bytes."""
        return problem.geometry.bill(
            self.family,
            causal=problem.causal,
            scale=problem.scale,
            workspace=self.workspace_bytes,
            accelerator=device.type != "cpu",
        )

    def result_bytes(self, problem: Problem) -> int:
        """Return the bytes of what it returns."""
        g = problem.geometry
        if not self.kept:
            return g.scores_bytes
        return g.selected_bytes if self.trains else g.indices_bytes


def scoring(g: IndexerGeometry, workspace: int | None = None, *, with_loop: bool = True) -> list[IndexerPath]:
    """Every way to score; headfold at a workspace, or at both the default and 16 MiB (the smallest, if larger)."""
    others = [materialized(), *([loop()] if with_loop else [])]
    return others + [headfold(*at) for at in _workspaces("headfold", workspace, g.backward_scratch)]


def selecting(g: IndexerGeometry, device: torch.device, workspace: int | None = None) -> list[IndexerPath]:
    """Every way to select and to score a selection; headfold at a workspace, or at two."""
    least = g.selection(0, accelerator=device.type != "cpu").scratch_bytes
    ours = [headfold_topk(g.topk, *at) for at in _workspaces("headfold top-k", workspace, least)]
    return [materialized_topk(g.topk), *ours, headfold_selected(g, device, workspace)]


def rebuilt(family: str, g: IndexerGeometry, device: torch.device, workspace: int | None) -> IndexerPath:
    """Return the path of a family for another geometry, or in another process."""
    makers: dict[str, Callable[[], IndexerPath]] = {
        "materialized": materialized,
        "per-head loop": loop,
        "headfold": lambda: headfold(workspace),
        SELECTING[0]: lambda: materialized_topk(g.topk),
        SELECTING[1]: lambda: headfold_topk(g.topk, workspace),
        SELECTED: lambda: headfold_selected(g, device, workspace),
    }
    return makers[family]()


def _workspaces(name: str, workspace: int | None, least: int) -> list[tuple[int | None, str]]:
    if workspace is not None:
        return [(workspace, f"{name}, {show_bytes(workspace)} workspace")]
    small = max(16 * MIB, least)
    return [(None, name), (small, f"{name}, {show_bytes(small)} workspace")]


def headfold(workspace: int | None = None, label: str = "headfold") -> IndexerPath:
    """Our scores, at a workspace."""

    def forward(q: Tensor, weights: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        return index_scores(q, weights, k, causal=causal, scale=scale, workspace=workspace)

    return IndexerPath(label, "headfold", forward, workspace)


def materialized() -> IndexerPath:
    """The upstream-style einsum over all heads."""

    def forward(q: Tensor, weights: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        return index_scores(q, weights, k, causal=causal, scale=scale, impl="materialized")

    return IndexerPath("materialized", "materialized", forward)


def loop() -> IndexerPath:
    """The seed's answer: one head at a time, added into the output."""
    return IndexerPath("per-head loop", "per-head loop", per_head_loop)


def materialized_topk(topk: int) -> IndexerPath:
    """Upstream's selection: torch.topk of the whole score matrix, whose ties fall as they may."""

    def forward(q: Tensor, weights: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        scores = index_scores(q, weights, k, causal=causal, scale=scale, impl="materialized")
        return torch.topk(scores, min(topk, scores.shape[-1])).indices

    return IndexerPath(SELECTING[0], SELECTING[0], forward, trains=False, kept=True)


def headfold_topk(topk: int, workspace: int | None = None, label: str = "headfold top-k") -> IndexerPath:
    """Our selection, at a workspace."""

    def forward(q: Tensor, weights: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        return index_topk(q, weights, k, topk, causal=causal, scale=scale, workspace=workspace).indices

    return IndexerPath(label, SELECTING[1], forward, workspace, trains=False, kept=True)


def headfold_selected(
    g: IndexerGeometry, device: torch.device, workspace: int | None = None, indices: Tensor | None = None
) -> IndexerPath:
    """Our scores of a selection of this geometry; without one, of keys at even steps, which take the same bytes."""
    indices = spread_indices(g, device) if indices is None else indices

    def forward(q: Tensor, weights: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        return selected_scores(q, weights, k, indices, causal=causal, scale=scale, workspace=workspace)

    return IndexerPath(SELECTED, SELECTED, forward, workspace, kept=True)


def spread_indices(g: IndexerGeometry, device: torch.device) -> Tensor:
    """Return int32 [b, sq, topk]: in row s, keys s, s + step, ... around the axis, and -1 where there are no more."""
    kept = min(g.topk, g.sk)
    rows = torch.arange(g.sq, device=device, dtype=torch.int32).unsqueeze(1)
    picks = torch.arange(kept, device=device, dtype=torch.int32) * max(1, g.sk // max(1, kept))
    spread = torch.nn.functional.pad((rows + picks).remainder_(max(1, g.sk)), (0, g.topk - kept), value=-1)
    return spread.expand(g.b, -1, -1)


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
