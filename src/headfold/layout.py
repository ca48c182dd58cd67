"""Layouts are views: sbhd, bshd and thd to one batch-first view, and back. Nothing here copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = ("sbhd", "bshd", "thd")

# What a user of each layout calls the axes of q, weights and k; error messages quote it.
AXES = {
    "sbhd": {"q": "[sq, b, h, d]", "weights": "[sq, b, h]", "k": "[sk, b, d]"},
    "bshd": {"q": "[b, sq, h, d]", "weights": "[b, sq, h]", "k": "[b, sk, d]"},
    "thd": {"q": "[tq, h, d]", "weights": "[tq, h]", "k": "[tk, d]"},
}
# The same of the attention that the indexer serves.
ATTENTION_AXES = {
    "sbhd": {"query": "[sq, b, np, hn]", "key": "[sk, b, np_k, hn]", "value": "[sk, b, np_k, v_dim]"},
    "bshd": {"query": "[b, sq, np, hn]", "key": "[b, sk, np_k, hn]", "value": "[b, sk, np_k, v_dim]"},
    "thd": {"query": "[tq, np, hn]", "key": "[tk, np_k, hn]", "value": "[tk, np_k, v_dim]"},
}


def batch_first(x: Tensor, layout: str) -> Tensor:
    """View a tensor of the given layout with axes [b, s, ...]."""
    if layout == "sbhd":
        return x.transpose(0, 1)
    return x.unsqueeze(0) if layout == "thd" else x


def from_batch_first(x: Tensor, layout: str) -> Tensor:
    """View a [b, s, ...] tensor in the given layout: the inverse of `batch_first`."""
    if layout == "sbhd":
        return x.transpose(0, 1)
    return x.squeeze(0) if layout == "thd" else x
