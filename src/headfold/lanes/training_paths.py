"""The paths that train: the indexer loss and sparse attention, ours and with full tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from headfold.attention import sparse_attention
from headfold.geometry import ATTENDING, LOSSES, IndexerGeometry
from headfold.lanes.paths import IndexerPath, Make, activation_of, at_workspaces, backend_of, spread_indices
from headfold.lanes.problem import Problem, normal
from headfold.loss import indexer_loss
from headfold.presets import SHAPES


@dataclass(frozen=True)
class LossPath(IndexerPath):
    """One way to compute the loss, called with q, weights and k; query and key are part of it."""

    def incoming(self, problem: Problem, device: torch.device) -> Tensor:
        """Return 1, in the compute dtype."""
        return normal((), device, problem.geometry.dtype).fill_(1)

    def result_bytes(self, problem: Problem) -> int:
        """Return the bytes of a scalar."""
        return problem.geometry.compute_itemsize

    def gradients_bytes(self, g: IndexerGeometry) -> int:
        """Return the bytes of the gradients in the compute dtype, in which they are held."""
        return g.inputs_bytes // g.itemsize * g.compute_itemsize


@dataclass(frozen=True)
class AttentionPath(IndexerPath):
    """One way to attend to a selection, called with query, key and value; the selection is part of it."""

    def inputs(self, problem: Problem, device: torch.device, *, grad: bool = False) -> list[Tensor]:
        """Make query, key and value."""
        return [x.requires_grad_(grad) for x in attention_tensors(problem.geometry, device)]

    def incoming(self, problem: Problem, device: torch.device) -> Tensor:
        """Return a fixed gradient of the result, in its dtype."""
        g = problem.geometry
        return normal((g.sq, g.b, g.np, g.v_dim), device, g.dtype).to(getattr(torch, g.dtype))

    def result_bytes(self, problem: Problem) -> int:
        """Return the bytes of the attention's result."""
        return problem.geometry.attended_bytes

    def inputs_bytes(self, g: IndexerGeometry) -> int:
        """Return the bytes of query, key, value and the selection."""
        return g.attention_bytes + g.indices_bytes

    def gradients_bytes(self, g: IndexerGeometry) -> int:
        """Return the bytes of the gradients, and of the sums that they are cast from."""
        return g.attention_bytes + self.scratch(g).sums


def trained(problem: Problem) -> Problem:
    """Return the problem itself where it has an attention, else the project's shape for one.

    Its scores are scaled by (h · d)^-0.5, as published models scale theirs: unscaled, softmax is one key and denormals.
    """
    if problem.geometry.np:
        return problem
    g = SHAPES["train"]
    return Problem(g, scale=(g.heads * g.dim) ** -0.5)


def losses(
    g: IndexerGeometry, device: torch.device, workspace: int | None = None, *, impl: str = "auto"
) -> list[IndexerPath]:
    """Every way to compute the loss; ours at a workspace, or at two."""
    return [materialized_loss(g, device), *at_workspaces(headfold_loss, LOSSES[1], g, device, workspace, impl)]


def attending(
    g: IndexerGeometry, device: torch.device, workspace: int | None = None, *, impl: str = "auto"
) -> list[IndexerPath]:
    """Every way to attend to a selection; ours at a workspace, or at two."""
    ours = at_workspaces(headfold_attention, ATTENDING[1], g, device, workspace, impl)
    return [materialized_attention(g, device), *ours]


def headfold_loss(
    g: IndexerGeometry, device: torch.device, workspace: int | None = None, *, impl: str = "auto"
) -> IndexerPath:
    """Our loss, over every visible key."""
    return _loss(g, device, LOSSES[1], impl, workspace)


def materialized_loss(g: IndexerGeometry, device: torch.device, _: int | None = None) -> IndexerPath:
    """The same loss with full tensors, differentiated by autograd."""
    return _loss(g, device, LOSSES[0], "materialized", None)


def headfold_attention(
    g: IndexerGeometry, device: torch.device, workspace: int | None = None, *, impl: str = "auto"
) -> IndexerPath:
    """Our attention over a selection."""
    return _attention(g, device, ATTENDING[1], impl, workspace)


def materialized_attention(g: IndexerGeometry, device: torch.device, _: int | None = None) -> IndexerPath:
    """Attention to every key behind a mask, differentiated by autograd."""
    return _attention(g, device, ATTENDING[0], "materialized", None)


def attention_tensors(g: IndexerGeometry, device: torch.device) -> list[Tensor]:
    """Return fresh query [sq, b, np, hn], key [sk, b, np_k, hn] and value [sk, b, np_k, v_dim]."""
    shapes = (g.sq, g.b, g.np, g.hn), (g.sk, g.b, g.np_k, g.hn), (g.sk, g.b, g.np_k, g.v_dim)
    dtype = getattr(torch, g.dtype)
    return [normal(shape, device, g.dtype, seed).to(dtype) for seed, shape in enumerate(shapes, 2)]


def _loss(g: IndexerGeometry, device: torch.device, family: str, impl: str, workspace: int | None) -> IndexerPath:
    query, key, _ = attention_tensors(g, device)

    def forward(q: Tensor, weights: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        rest = {"causal": causal, "scale": scale, "activation": activation_of(g), "impl": impl, "workspace": workspace}
        return indexer_loss(q, weights, k, query, key, softmax_scale=g.hn**-0.5, **rest).loss  # type: ignore[arg-type]

    return LossPath(family, family, forward, *_made(family, g, device, impl, workspace))


def _attention(g: IndexerGeometry, device: torch.device, family: str, impl: str, workspace: int | None) -> IndexerPath:
    indices = spread_indices(g, device)

    def forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
        rest = {"causal": causal, "impl": impl, "workspace": workspace}
        out = sparse_attention(query, key, value, indices, softmax_scale=g.hn**-0.5, **rest)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        return out

    return AttentionPath(family, family, forward, *_made(family, g, device, impl, workspace))


def _made(
    family: str, g: IndexerGeometry, device: torch.device, impl: str, workspace: int | None
) -> tuple[Make, int | None, str]:
    """Return what makes a path again, its workspace and its backend."""
    if impl == "materialized":
        return MAKERS[family], workspace, ""
    return partial(MAKERS[family], impl=impl), workspace, backend_of(family, g, device, impl)


MAKERS: dict[str, Callable[..., IndexerPath]] = {
    LOSSES[0]: materialized_loss,
    LOSSES[1]: headfold_loss,
    ATTENDING[0]: materialized_attention,
    ATTENDING[1]: headfold_attention,
}
