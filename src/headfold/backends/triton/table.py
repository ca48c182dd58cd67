"""Tiles as data: one row a kernel, architecture, dtype, width and number of heads. Correct a row, and nothing else.

A row is found by its kernel, then the chip, the dtype, the smallest `d` that covers the call's width and the smallest
`h` that covers its heads. Sizes that a kernel calls BLOCK_... are in the row by these names:

    rows    query rows x heads of one program's tile
    keys    keys of its tile
    warps, stages    of the launch
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from headfold.contract import UnsupportedError

ANY = 1 << 30


class Row(NamedTuple):
    """A tile: what it is for (kernel, arch, dtype, widest d, most heads), and its sizes."""

    kernel: str
    arch: str
    dtype: str
    d: int
    h: int
    rows: int
    keys: int
    warps: int
    stages: int


# Read off the compile lane: no spills, shared memory within the chip, tensor cores in use (docs/kernels.md).
TABLE: tuple[Row, ...] = (
    Row("scores", "cpu", "*", ANY, ANY, 128, 64, 4, 1),
    Row("query_gradients", "cpu", "*", ANY, ANY, 128, 64, 4, 1),
    Row("key_gradients", "cpu", "*", ANY, ANY, 128, 64, 4, 1),
    Row("fold", "cpu", "*", ANY, ANY, 64, 0, 4, 1),
    # Of gathered kernels `rows` are the heads of one row, and `keys` its picks.
    Row("selected_scores", "cpu", "*", ANY, ANY, 64, 64, 4, 1),
    Row("selected_rows", "cpu", "*", ANY, ANY, 64, 64, 4, 1),
    Row("selected_keys", "cpu", "*", ANY, ANY, 64, 64, 4, 1),
    Row("attention", "cpu", "*", ANY, ANY, 32, 64, 4, 1),
    Row("attention_rows", "cpu", "*", ANY, ANY, 32, 64, 4, 1),
    Row("attention_keys", "cpu", "*", ANY, ANY, 64, 64, 4, 1),
)
KINDS = {torch.float16: "half", torch.bfloat16: "half", torch.float32: "float32", torch.float64: "float64"}


def tile(kernel: str, arch: str, dtype: torch.dtype, d: int, h: int = 1) -> Row:
    """Return the row of a call.   arch: as `arch_of` names it."""
    kind = KINDS[dtype]
    for row in TABLE:
        if row.kernel == kernel and row.arch in (arch, "*") and row.dtype in (kind, "*") and d <= row.d and h <= row.h:
            return row
    raise UnsupportedError(f'{kernel}: has no tile for {arch}, {kind}, d={d}, h={h}. Use impl="eager".')


def arch_of(device: torch.device) -> str:
    """Return the row name of a device: "cpu" under the interpreter, "sm_80", "sm_90", "sm_100" or "gfx942".

    A chip between two of these takes the smaller one's tiles, and one before sm_80 those of sm_80.
    """
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9:
        return "sm_90"
    return "sm_100" if (major, minor) in ((10, 0), (10, 3)) else "sm_80"
