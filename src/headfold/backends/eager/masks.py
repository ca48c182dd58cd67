"""A selection written into a mask, block by block of its entries: one maximum, with no case for -1.

Masks are read as integers of their own width, where "selected" is the larger value and a -1 brings a value below all
others to key 0. So nothing that an earlier update unmasked is ever masked again, whatever the order of the entries, and
half-precision masks take no float32 copy, which scatter_reduce makes of them on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headfold.backends.eager.scratch import NEG_INF, head
from headfold.tiles import Entries, blocks

# CUDA has no atomic maximum of bool, and has one of each of these.
BITS = {
    torch.bool: torch.uint8,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class _Scratch:
    """Buffers for one block of entries, allocated once: keys, marks of absent ones, and what is written."""

    def __init__(self, plan: Entries, bits: torch.dtype, device: torch.device) -> None:
        # Zero has the bits of False and 0.0; -inf and every negative number lie below it.
        self.selected = int(bits == torch.uint8)
        self.never = torch.iinfo(bits).min
        self.key = torch.empty(plan.count, dtype=torch.int64, device=device)
        self.absent = torch.empty(plan.count, dtype=torch.bool, device=device)
        self.written = torch.empty(plan.count, dtype=bits, device=device)

    def unmask(self, target: Tensor, indices: Tensor) -> None:
        """Raise the entries of target [b, rows, sk] that indices [b, rows, width] select."""
        key = head(self.key, *indices.shape).copy_(indices)
        absent = torch.lt(key, 0, out=head(self.absent, *indices.shape))
        written = head(self.written, *indices.shape).fill_(self.selected).masked_fill_(absent, self.never)
        target.scatter_reduce_(2, key.masked_fill_(absent, 0), written, "amax")


def index_mask(indices: Tensor, sk: int, dtype: torch.dtype) -> Tensor:
    """Mask [b, sq, sk] of a checked selection [b, sq, topk]."""
    b, sq, _ = indices.shape
    hidden = False if dtype == torch.bool else NEG_INF
    mask = torch.full((b, sq, sk), hidden, dtype=dtype, device=indices.device)
    update_index_mask_(mask, indices, 0)
    return mask


def update_index_mask_(mask: Tensor, indices: Tensor, first_row: int) -> None:
    """Unmask in a checked mask [b, sq, sk], from `first_row` on, what indices [b, rows, topk] select."""
    b, rows, topk = indices.shape
    if mask.numel() == 0 or indices.numel() == 0:
        return
    plan = Entries.of(b, rows, topk, mask.itemsize)
    target = mask[:, first_row : first_row + rows].view(BITS[mask.dtype])
    scratch = _Scratch(plan, target.dtype, mask.device)
    for batch in blocks(b, plan.batches):
        for row in blocks(rows, plan.rows):
            some = slice(*batch), slice(*row)
            for entry in blocks(topk, plan.width):
                scratch.unmask(target[some], indices[some][..., slice(*entry)])
