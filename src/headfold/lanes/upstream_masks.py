"""How a selection was written into a mask upstream: two patterns that sync with the host, kept as a reproducer.

Both clamp -1 to key 0, scatter, and then repair key 0 of the rows that held a -1. Whether to repair is asked of the
data on the host: an accelerator must finish first, a CUDA graph cannot hold the question, and a compiler cannot trace
it. The repair itself is wrong once a mask is updated twice: it masks key 0 again although an update before unmasked it.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEG_INF = float("-inf")


def unmask_unless_equal(mask: Tensor, indices: Tensor) -> Tensor:
    """Update an additive mask [b, sq, sk] in place; a Python bool from torch.equal decides on the repair."""
    keys = indices.clamp(min=0).long()
    mask.scatter_(-1, keys, 0.0)
    if not torch.equal(keys, indices.long()):
        _mask_key_0_again(mask, indices)
    return mask


def unmask_branching_on_any(mask: Tensor, indices: Tensor) -> Tensor:
    """Update an additive mask [b, sq, sk] in place; a branch on any() decides on the repair."""
    mask.scatter_(-1, indices.clamp(min=0).long(), 0.0)
    if (indices < 0).any():
        _mask_key_0_again(mask, indices)
    return mask


def _mask_key_0_again(mask: Tensor, indices: Tensor) -> None:
    """Undo what the clamp did: mask key 0 where a row holds -1 and does not itself select key 0."""
    undone = (indices < 0).any(-1) & ~(indices == 0).any(-1)
    mask[..., 0].masked_fill_(undone, NEG_INF)
