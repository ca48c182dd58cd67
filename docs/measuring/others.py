"""Other implementations, called as their own users call them, where they are installed."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch

from headfold.lanes.peers import installed_peers
from measuring.calls import indexer, lengths, product_flops
from measuring.rows import Absent, Place, Ready, Sizes

# The names that headfold.lanes.peers gives what scores or selects; all of them see every key.
NAMES = (
    "megatron-core _compute_index_scores",
    "megatron-core fused_qk_topk_naive",
    "attn-gym lightning_indexer, reference",
    "transformers DeepseekV4IndexerScorer",
    "transformers DeepseekV32Indexer",
)


def peer(x: Sizes, dtype: torch.dtype, place: Place, *, name: str) -> Ready:
    """Return a peer that is installed, at every key; topk of the sizes where it selects."""
    found, absent = installed_peers(place.device, x["topk"])
    for one in found:
        if one.name == name:
            prepared = one.prepare(*indexer(x, dtype, place))
            return Ready(torch.no_grad()(partial(one.forward, *prepared)), product_flops(x, False))
    raise Absent("; ".join(reason for package, reason in absent if name.startswith(package)) or "not found")


def attn_gym_fused(x: Sizes, dtype: torch.dtype, place: Place) -> Ready:
    """Return attention-gym's own kernels for scores and selection, causal: as many keys as rows, Hopper or newer."""
    sparse = _module("attn_gym.sparse")
    if place.device.type != "cuda":
        raise Absent(f"its kernels need a CUDA device, this is a {place.device.type}")
    q, weights, k = (one.transpose(0, 1).contiguous() for one in indexer(x, dtype, place))
    run = partial(sparse.lightning_indexer, q, k, weights, x["topk"], causal=True, impl="fused")
    return Ready(run, product_flops(x, True))


def cudnn(x: Sizes, dtype: torch.dtype, place: Place) -> Ready:
    """Return cuDNN's kernel for scores, causal as its mask is."""
    forward = getattr(_module("cudnn"), "DSA", None)
    if place.device.type != "cuda":
        raise Absent(f"its kernels need a CUDA device, this is a {place.device.type}")
    if forward is None:
        raise Absent("this version of cudnn has no DSA")
    if lengths(x)[0] != lengths(x)[1]:
        raise Absent("it aligns causal rows at the top left")
    q, weights, k = (one.transpose(0, 1).contiguous() for one in indexer(x, dtype, place))
    run = partial(forward.indexer_forward_wrapper, q, k.unsqueeze(2), weights, ratio=1)
    return Ready(run, product_flops(x, True))


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        raise Absent(f"does not import here: {error}") from error
