"""index_mask and update_index_mask_: a selection as a mask, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from headfold import ops
from headfold.contract import MASK_DTYPES, at_least, key_indices, one_of, updatable


def index_mask(indices: Tensor, sk: int, *, dtype: torch.dtype = torch.bool) -> Tensor:
    """Return the mask of a selection, as torch's scaled_dot_product_attention takes it.

    Duplicates count once, and an entry of -1 (any negative one) selects nothing, wherever it stands in its row. Nothing
    is read back: the call captures into a CUDA graph, and what it returns does not depend on any order of writing.

    Args:
        indices: int32 or int64 [b, sq, topk], positions of keys, as `index_topk` returns them. An entry of sk or more
            cannot be told without reading it back: on a CPU torch raises RuntimeError, on an accelerator the kernel's
            own assertion fails. With sk = 0 nothing is written, whatever the entries are.
        sk: number of keys.
        dtype: torch.bool, for True where a key is selected; or float16, bfloat16, float32 or float64, for 0 where it is
            selected and -inf elsewhere.

    Returns:
        mask [b, sq, sk].

    Memory: the mask and at most 16 MiB more.

    Raises: ValueError or TypeError for a broken contract, before anything is allocated.

    Source: DeepSeek-V3.2 (arXiv:2512.02556), equation 2.
    """
    op = "index_mask"
    key_indices(op, indices)
    at_least(op, "sk", sk, 0)
    one_of(op, "dtype", dtype, MASK_DTYPES)
    mask: Tensor = ops.index_mask(indices, sk, dtype)
    return mask


def update_index_mask_(mask: Tensor, indices: Tensor, *, first_row: int = 0) -> Tensor:
    """Unmask the keys of a selection in a block of rows, in place; what was unmasked before stays.

    Args:
        mask: [b, sq, sk], bool, float16, bfloat16, float32 or float64, in any strides that keep its entries apart.
            Where a key is selected, False becomes True and what is below 0 becomes 0; no other entry is written.
        indices: int32 or int64 [b, rows, topk], as in `index_mask`, for the rows first_row to first_row + rows - 1. An
            entry of sk or more is met as there, perhaps after other entries were written.
        first_row: where the block begins.

    Returns:
        mask itself.

    Memory: at most 16 MiB.

    Raises: ValueError or TypeError for a broken contract, before anything is written.

    Source: Megatron-Core's `scatter_topk_into_index_mask`.
    """
    op = "update_index_mask_"
    key_indices(op, indices)
    updatable(op, mask, indices, first_row)
    ops.update_index_mask_(mask, indices, first_row)
    return mask
