"""Rows so long that the kernels select from them without their scores, some of them with samples that are wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from headfold.keyrange import KeyRange
from headfold.sift_tiles import LISTS, SiftedSelection
from headfold.tiles import DEFAULT_WORKSPACE

SIZES = {"sq": 2112, "sk": 32768, "h": 32, "d": 128}
FEWER = {"sq": 850, "sk": 24576, "h": 64, "d": 64}
TOPK = 2048
# Of so many rows the best keys are all of one list, which has no room for them.
CROWDED = 12


def long_rows(device: torch.device, dtype: torch.dtype, sizes: dict[str, int]) -> list[Tensor]:
    """Return q [sq, 1, h, d], weights and k; the best keys of the last rows are all of one list."""
    sq, sk, h, d = sizes["sq"], sizes["sk"], sizes["h"], sizes["d"]
    assert SiftedSelection.of(sq, sk, h, d, TOPK, DEFAULT_WORKSPACE) is not None
    generator = torch.Generator(device).manual_seed(0)
    shapes = (sq, 1, h, d), (sq, 1, h), (sk, 1, d)
    q, weights, k = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    k[..., 0] = 0.0
    k[:: 2 * LISTS, :, 0] = 40.0
    q[..., 0] = 0.0
    q[-CROWDED:, ..., 0] = 4.0
    weights[-CROWDED:].abs_()
    return [x.to(dtype) for x in (q, weights, k)]


def seen(sizes: dict[str, int]) -> KeyRange:
    """Return a causal bound under which the first rows see few keys, and the last all of them."""
    return KeyRange(offset=sizes["sk"] - sizes["sq"])
