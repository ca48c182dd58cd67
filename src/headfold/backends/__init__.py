"""Which implementation a call gets."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from headfold.contract import UnsupportedError, one_of

IMPLEMENTATIONS = ("auto", "eager", "triton", "materialized")
# The ops that the Triton package has, and the widths its kernels take. An op that is not here is eager's alone.
TRITON_WIDTHS = {
    "index_scores": (16, 256),
    "index_topk": (16, 256),
    "selected_scores": (16, 256),
    "indexer_loss": (16, 256),
    "sparse_attention": (1, 576),
}
# The batch elements that ops take whose batch lies along an axis of a grid; the others cut theirs.
MOST_BATCHES = 65535
TRITON_BATCHES = {"index_scores": MOST_BATCHES, "selected_scores": MOST_BATCHES, "indexer_loss": MOST_BATCHES}
# What "auto" gives to the kernels. They run float64 too, for gradcheck, at a rate that is no reason to choose them.
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HAS_TRITON = find_spec("triton") is not None  # told without importing it
RULE = (
    "auto: triton for a CUDA or ROCm tensor of float16, bfloat16 or float32 whose widths and batch the op's kernels "
    "take, where Triton can be imported; eager, which runs every dtype and width on any device, for everything else"
)


def choose(op: str, impl: str, x: Tensor, *widths: int) -> str:
    """Return "eager", "triton" or "materialized" for a call on x [b, .., d]; an explicit one is that one or an error.

    widths: further widths that the kernels of the op have to take, besides x's own.
    """
    one_of(op, "impl", impl, IMPLEMENTATIONS)
    widths = (x.shape[-1], *widths)
    if impl == "auto":
        return automatic(op, x.device, x.dtype, *widths, batch=x.shape[0])[0]
    if impl == "triton":
        _require_triton(op, x, widths)
    return impl


def automatic(op: str, device: torch.device, dtype: torch.dtype, *widths: int, batch: int = 1) -> tuple[str, str]:
    """Return what "auto" gives, "eager" or "triton" and never the materialised path, and why."""
    if device.type != "cuda":
        return "eager", f"kernels run on a CUDA or ROCm device, not on {device.type}"
    if not HAS_TRITON:
        return "eager", "Triton is not installed"
    if op not in TRITON_WIDTHS:
        return "eager", f"{op} has no kernel"
    if dtype not in TRITON_DTYPES:
        return "eager", f"kernels are chosen for half precision and float32, not for {_name(dtype)}"
    narrowest, widest = TRITON_WIDTHS[op]
    if not all(narrowest <= d <= widest for d in widths):
        return "eager", f"kernels take widths {narrowest} to {widest}, not {', '.join(map(str, widths))}"
    if batch > TRITON_BATCHES.get(op, batch):
        return "eager", f"kernels take up to {MOST_BATCHES} batch elements, not {batch}"
    return "triton", f"{device.type}, {_name(dtype)}, and widths within {narrowest} to {widest}"


def load(name: str) -> Any:
    """Return the package of a backend, "eager" or "triton"; nothing of headfold imports Triton before this does."""
    if name == "eager":
        from headfold.backends import eager

        return eager
    from headfold.backends import triton

    return triton


def _require_triton(op: str, x: Tensor, widths: tuple[int, ...]) -> None:
    way_out = 'Use impl="eager" or impl="auto".'
    if op not in TRITON_WIDTHS:
        raise UnsupportedError(f'{op}: has no Triton kernel, got impl="triton". {way_out}')
    if not HAS_TRITON:
        raise UnsupportedError(f'{op}: impl="triton" needs Triton, which is not installed here. {way_out}')
    if x.device.type != "cuda" and not (x.device.type == "cpu" and load("triton").INTERPRETED):
        raise UnsupportedError(
            f'{op}: impl="triton" needs a CUDA or ROCm tensor (or TRITON_INTERPRET=1 before the first import of '
            f"Triton, for tests on a CPU), got one on {x.device}. {way_out}"
        )
    if x.dtype == torch.float64 and not load("triton").FLOAT64:
        raise UnsupportedError(
            f'{op}: impl="triton" in float64 needs Triton >= 3.5, which torch 2.9 brings, got '
            f"{load('triton').VERSION}. {way_out}"
        )
    narrowest, widest = TRITON_WIDTHS[op]
    for d in widths:
        if not narrowest <= d <= widest:
            raise UnsupportedError(f'{op}: impl="triton" needs widths from {narrowest} to {widest}, got {d}. {way_out}')
    if x.shape[0] > TRITON_BATCHES.get(op, x.shape[0]):
        raise UnsupportedError(f'{op}: impl="triton" needs b <= {MOST_BATCHES}, got {x.shape[0]}. {way_out}')


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
