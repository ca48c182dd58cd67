"""How a call of sparse attention is cut for its kernels: its tiles, and blocks of channels, as their constants."""

from __future__ import annotations

import triton
from torch import Tensor

from headfold.backends.triton.launch import is_aligned
from headfold.backends.triton.products import NARROWEST, pieces
from headfold.backends.triton.table import arch_of, tile

# Channels of a block at most.
WIDEST = 128
# Keys of a tile that is read through registers on sm_90. From 64 on, its product and the one after it are both of
# operands in shared memory, at one place in turn, and ptxas 12.8 (of Triton 3.6) then reads the second from elsewhere.
UNALIGNED = 32


def widths(query: Tensor, key: Tensor, v_dim: int, shared: bool) -> dict[str, int | bool]:
    """Return heads, and widths in blocks; shared: whether values are the first v_dim channels of the keys."""
    heads, dim = query.shape[2:]
    keys, values = channel_blocks(dim), channel_blocks(v_dim)
    named = {f"D{n}": x for n, x in keys.items()} | {f"V{n}": x for n, x in values.items()}
    reuse = shared and values["S"] == keys["S"] and values["N"] <= keys["N"] and values["R"] in (0, keys["R"])
    if values["R"] and values["N"] < keys["N"]:
        reuse = False
    return {"H": heads, "GROUP": heads // key.shape[2], "D": dim, "V": v_dim, **named, "REUSE": reuse}


def channel_blocks(width: int) -> dict[str, int]:
    """Cut channels into N blocks of size S and one of R, and count them in P."""
    first, rest = pieces(width)
    size = min(first, WIDEST)
    return {"S": size, "N": first // size, "R": rest, "P": first // size + (rest > 0)}


def cut(kernel: str, query: Tensor, key: Tensor, value: Tensor | None) -> dict[str, int]:
    """Return tile and launch of a kernel, as its constants.   value: None where keys hold the values."""
    group, arch = query.shape[2] // key.shape[2], arch_of(query.device)
    row = tile(kernel if value is None else f"apart_{kernel}", arch, query.dtype, query.shape[3], group)
    heads, keys = min(row.rows, max(NARROWEST, triton.next_power_of_2(group))), row.keys
    if arch == "sm_90" and query.dtype.itemsize == 2 and not all(is_aligned(x) for x in (key, value) if x is not None):
        keys = min(keys, UNALIGNED)
    return {"BH": heads, "BN": keys, "STAGES": row.stages, **row.options}


def masked_cut(query: Tensor, key: Tensor) -> dict[str, int]:
    """Return tile and launch of the kernel whose keys stay: rows x heads of a step, and as many heads as fill it."""
    group = query.shape[2] // key.shape[2]
    row = tile("attention_masked", arch_of(query.device), query.dtype, query.shape[3], group)
    heads = min(row.rows, triton.next_power_of_2(group))
    return {"HEADS": heads, "BM": row.rows, "BN": row.keys, "STAGES": row.stages, **row.options}
