"""The paths that the lanes compare: upstream's, the seed's loop over heads, and headfold's, to score and to select."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headfold import backends
from headfold.bills import Bill, Scratch
from headfold.geometry import ATTENDING, LOSSES, OURS, PATHS, SELECTED, SELECTING, IndexerGeometry
from headfold.lanes.problem import Problem, normal
from headfold.lanes.record import show_bytes
from headfold.scores import index_scores
from headfold.selected import selected_scores
from headfold.selection import index_topk
from headfold.tiles import DEFAULT_WORKSPACE, MIB


@dataclass(frozen=True)
class IndexerPath:
    """One way to score or to select, given q, weights and k in layout sbhd.

    family: its name in IndexerGeometry.bill.   forward: called as forward(q, weights, k, causal, scale).
    make: makes this path for a geometry, a device and a workspace, as in another process.
    workspace: what it was given, for headfold.   backend: whose bytes it takes, for headfold.   trains: whether its
    result has a gradient.   kept: whether its result has topk columns, where scores have sk.
    """

    name: str
    family: str
    forward: Callable[..., Tensor]
    make: Make
    workspace: int | None = None
    backend: str = ""
    trains: bool = True
    kept: bool = False

    def __call__(self, inputs: Sequence[Tensor], causal: bool, scale: float) -> Tensor:
        """Score q, weights and k, or select by them."""
        return self.forward(*inputs, causal, scale)

    def inputs(self, problem: Problem, device: torch.device, *, grad: bool = False) -> list[Tensor]:
        """Make what it is called with, and differentiated by."""
        return problem.tensors(device, grad=grad)

    def incoming(self, problem: Problem, device: torch.device) -> Tensor:
        """Return a fixed gradient of its result, of either sign, in the compute dtype."""
        g = problem.geometry
        return normal((g.b, g.sq, g.topk if self.kept else g.sk), device, g.dtype)

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
            backend=self.backend or "eager",
        )

    def scratch(self, g: IndexerGeometry) -> Scratch:
        """Return what it takes beside its results and gradients, for headfold."""
        return g.scratch(self.family, backend=self.backend)

    def result_bytes(self, problem: Problem) -> int:
        """Return the bytes of what it returns."""
        g = problem.geometry
        if not self.kept:
            return g.scores_bytes
        return g.selected_bytes if self.trains else g.indices_bytes

    def inputs_bytes(self, g: IndexerGeometry) -> int:
        """Return the bytes of what it is called with."""
        return g.inputs_bytes

    def gradients_bytes(self, g: IndexerGeometry) -> int:
        """Return the bytes of its gradients, and of the sums that they are cast from."""
        return g.gradients_bytes + self.scratch(g).sums


Make = Callable[[IndexerGeometry, torch.device, int | None], IndexerPath]


# The op of each family of ours, and the widths that its kernels have to take.
OPS: dict[str, tuple[str, Callable[[IndexerGeometry], tuple[int, ...]]]] = {
    PATHS[2]: ("index_scores", lambda g: (g.dim,)),
    SELECTING[1]: ("index_topk", lambda g: (g.dim,)),
    SELECTED: ("selected_scores", lambda g: (g.dim,)),
    LOSSES[1]: ("indexer_loss", lambda g: (g.dim, g.hn)),
    ATTENDING[1]: ("sparse_attention", lambda g: (g.hn, g.v_dim)),
}


def backend_of(family: str, g: IndexerGeometry, device: torch.device, impl: str = "auto") -> str:
    """Return the backend that a call of one of our families gets on a device."""
    if impl != "auto":
        return impl
    op, widths = OPS[family]
    return backends.automatic(op, device, getattr(torch, g.dtype), *widths(g))[0]


def activation_of(g: IndexerGeometry) -> str | None:
    """Return what a call of a geometry passes as its activation."""
    return "relu" if g.relu else None


def kernels_take(family: str, g: IndexerGeometry) -> bool:
    """Whether the kernels of one of our families take the widths of a geometry, wherever they run."""
    op, widths = OPS[family]
    narrowest, widest = backends.TRITON_WIDTHS[op]
    return all(narrowest <= width <= widest for width in widths(g))


def least_workspace(g: IndexerGeometry, device: torch.device, impl: str = "auto") -> int:
    """Return the smallest workspace in which scores and, where topk is given, selections work, with gradients."""
    return max(_least(family, g, device, impl) for family in (OURS[:3] if g.topk else OURS[:1]))


def _least(family: str, g: IndexerGeometry, device: torch.device, impl: str) -> int:
    backend = backend_of(family, g, device, impl)
    return g.scratch(family, workspace=0, accelerator=device.type != "cpu", backend=backend).backward


def scoring(
    g: IndexerGeometry,
    device: torch.device,
    workspace: int | None = None,
    *,
    impl: str = "auto",
    with_loop: bool = True,
    with_materialized: bool = True,
) -> list[IndexerPath]:
    """Every way to score; headfold at a workspace, or at both the default and 16 MiB (the smallest, if larger)."""
    others = [materialized(g, device)] if with_materialized else []
    others += [loop(g, device)] if with_loop else []
    return others + at_workspaces(headfold, PATHS[2], g, device, workspace, impl)


def selecting(
    g: IndexerGeometry, device: torch.device, workspace: int | None = None, *, impl: str = "auto"
) -> list[IndexerPath]:
    """Every way to select and to score a selection; headfold at a workspace, or at two."""
    ours = at_workspaces(headfold_topk, SELECTING[1], g, device, workspace, impl)
    return [materialized_topk(g, device), *ours, headfold_selected(g, device, workspace, impl=impl)]


def at_workspaces(
    make: Callable[..., IndexerPath],
    family: str,
    g: IndexerGeometry,
    device: torch.device,
    workspace: int | None,
    impl: str,
) -> list[IndexerPath]:
    """Make a path at a workspace, or at both the default and 16 MiB (the smallest that works, if larger)."""
    small = max(16 * MIB, _least(family, g, device, impl))
    paths = [make(g, device, at, impl=impl) for at in ([None, small] if workspace is None else [workspace])]
    return [
        path if path.workspace is None else replace(path, name=f"{path.family}, {show_bytes(path.workspace)} workspace")
        for path in paths
    ]


def headfold(
    g: IndexerGeometry, device: torch.device, workspace: int | None = None, *, impl: str = "auto"
) -> IndexerPath:
    """Our scores, at a workspace."""

    def forward(q: Tensor, weights: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        call: dict[str, Any] = {"causal": causal, "scale": scale, "activation": activation_of(g)}
        return index_scores(q, weights, k, impl=impl, workspace=workspace, **call)

    backend = backend_of(PATHS[2], g, device, impl)
    return IndexerPath("headfold", "headfold", forward, partial(headfold, impl=impl), workspace, backend)


def materialized(g: IndexerGeometry, device: torch.device, _: int | None = None) -> IndexerPath:
    """The upstream-style einsum over all heads."""

    def forward(q: Tensor, weights: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        call: dict[str, Any] = {"causal": causal, "scale": scale, "activation": activation_of(g)}
        return index_scores(q, weights, k, impl="materialized", **call)

    return IndexerPath("materialized", "materialized", forward, materialized)


def loop(g: IndexerGeometry, device: torch.device, _: int | None = None) -> IndexerPath:
    """The seed's answer: one head at a time, added into the output."""
    return IndexerPath("per-head loop", "per-head loop", per_head_loop, loop)


def materialized_topk(g: IndexerGeometry, device: torch.device, _: int | None = None) -> IndexerPath:
    """Upstream's selection: torch.topk of the whole score matrix, whose ties fall as they may."""

    def forward(q: Tensor, weights: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        call: dict[str, Any] = {"causal": causal, "scale": scale, "activation": activation_of(g)}
        scores = index_scores(q, weights, k, impl="materialized", **call)
        return torch.topk(scores, min(g.topk, scores.shape[-1])).indices

    return IndexerPath(SELECTING[0], SELECTING[0], forward, materialized_topk, trains=False, kept=True)


def headfold_topk(
    g: IndexerGeometry, device: torch.device, workspace: int | None = None, *, impl: str = "auto"
) -> IndexerPath:
    """Our selection, at a workspace."""

    def forward(q: Tensor, weights: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        call: dict[str, Any] = {"causal": causal, "scale": scale, "activation": activation_of(g)}
        return index_topk(q, weights, k, g.topk, impl=impl, workspace=workspace, **call).indices

    make, backend = partial(headfold_topk, impl=impl), backend_of(SELECTING[1], g, device, impl)
    return IndexerPath(SELECTING[1], SELECTING[1], forward, make, workspace, backend, trains=False, kept=True)


def headfold_selected(
    g: IndexerGeometry,
    device: torch.device,
    workspace: int | None = None,
    indices: Tensor | None = None,
    *,
    impl: str = "auto",
) -> IndexerPath:
    """Our scores of a selection of this geometry; without one, of keys at even steps, which take the same bytes."""
    indices = spread_indices(g, device) if indices is None else indices

    def forward(q: Tensor, weights: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        call: dict[str, Any] = {"causal": causal, "scale": scale, "activation": activation_of(g)}
        return selected_scores(q, weights, k, indices, impl=impl, workspace=workspace, **call)

    make, backend = partial(headfold_selected, impl=impl), backend_of(SELECTED, g, device, impl)
    return IndexerPath(SELECTED, SELECTED, forward, make, workspace, backend, kept=True)


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
