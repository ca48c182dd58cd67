"""Tiles as data: one row a kernel, architecture, dtype, width and number of heads. Correct a row, and nothing else.

A row is for a kernel, a chip ("*": any), a dtype (its own, or "half": float16 and bfloat16), widths up to d and up to
h heads. What it says:

    rows             query rows x heads of one program's tile; more heads than that are several launches
    keys             keys of the tile
    warps, stages    of the launch
    registers        of a thread, at most; None leaves them to the compiler
    uniform          whether `visible.seen_by_any` may tell a loop's bounds from row numbers alone
    whole            query rows of a program at most that reads tiles of keys whole: where there are more, the registers
                     of a second loop would leave a core a program less
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from headfold.contract import UnsupportedError

ANY = 1 << 30
# Calls that have the rows of another kernel too, the first of either: a bias, rows to leave out, values that are a
# tensor of their own, and lists take registers or shared memory.
SHARED = {
    "biased_scores": "scores",
    "sifted_scores": "scores",
    "key_sums": "key_gradients",
    **{f"apart_{kernel}": kernel for kernel in ("attention", "attention_rows", "attention_keys")},
}
KINDS = {torch.float16: "half", torch.bfloat16: "half", torch.float32: "float32", torch.float64: "float64"}


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
    registers: int | None = None
    uniform: bool = True
    whole: int = 4

    @property
    def options(self) -> dict[str, int]:
        """Options of a launch, beside the stages of its loops."""
        return {"num_warps": self.warps, **({} if self.registers is None else {"maxnreg": self.registers})}

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether the row is for inputs of a dtype."""
        return self.dtype in (KINDS[dtype], str(dtype).removeprefix("torch."), "*")

    def is_covered(self, by: Row) -> bool:
        """Whether another row of the same architecture takes all the calls that this one is for."""
        return by.kernel == self.kernel and by.dtype in (self.dtype, "*") and by.d >= self.d and by.h >= self.h


# Read off the compile lane: no spills, shared memory within the chip, tensor cores in use (docs/kernels.md). The first
# row that covers a call is its row.
TABLE = (
    # kernel, arch, dtype, d, h, rows, keys, warps, stages, registers, uniform
    # The interpreter's: few steps of Python.
    Row("scores", "cpu", "*", 256, ANY, 128, 64, 4, 1),
    Row("query_gradients", "cpu", "*", 256, ANY, 128, 64, 4, 1),
    Row("key_gradients", "cpu", "*", 256, ANY, 128, 64, 4, 1),
    Row("fold", "cpu", "*", 256, ANY, 64, 0, 4, 1),
    Row("selected_scores", "cpu", "*", 256, ANY, 64, 64, 4, 1),
    Row("selected_rows", "cpu", "*", 256, ANY, 64, 64, 4, 1),
    Row("selected_keys", "cpu", "*", 256, ANY, 64, 64, 4, 1),
    Row("attention", "cpu", "*", 576, ANY, 32, 64, 4, 1),
    Row("attention_rows", "cpu", "*", 576, ANY, 32, 64, 4, 1),
    Row("attention_keys", "cpu", "*", 576, ANY, 64, 64, 4, 1),
    Row("attention_masked", "cpu", "*", 256, ANY, 64, 64, 4, 1),
    Row("biased_scores", "sm_80", "half", 256, 1, 32, 64, 4, 2),
    Row("sifted_scores", "sm_80", "half", 128, ANY, 128, 64, 4, 2, 255),
    Row("scores", "sm_80", "half", 128, 2, 64, 64, 4, 2),
    Row("scores", "sm_80", "half", 128, ANY, 128, 64, 4, 2),
    Row("scores", "sm_80", "half", 256, ANY, 64, 64, 4, 2),
    Row("query_gradients", "sm_80", "half", 128, ANY, 64, 64, 4, 2),
    Row("query_gradients", "sm_80", "half", 256, ANY, 64, 32, 8, 2),
    Row("key_gradients", "sm_80", "half", 128, ANY, 64, 64, 8, 2),
    Row("key_gradients", "sm_80", "half", 256, ANY, 32, 64, 8, 2),
    Row("biased_scores", "sm_90", "half", 256, 1, 32, 64, 4, 2),
    Row("biased_scores", "sm_90", "half", 256, 4, 64, 64, 4, 2),
    Row("biased_scores", "sm_90", "half", 256, ANY, 128, 64, 4, 2),
    Row("sifted_scores", "sm_90", "half", 64, ANY, 128, 64, 4, 3, 168),
    Row("sifted_scores", "sm_90", "half", 128, ANY, 256, 64, 8, 3, 128),
    Row("scores", "sm_90", "half", 128, 2, 64, 64, 4, 2),
    Row("scores", "sm_90", "half", 64, ANY, 128, 64, 4, 3, whole=8),
    Row("scores", "sm_90", "half", 128, 8, 128, 64, 4, 3),
    Row("scores", "sm_90", "half", 128, 16, 256, 64, 8, 2),
    Row("scores", "sm_90", "half", 128, 32, 128, 64, 4, 2, None, False),
    Row("scores", "sm_90", "half", 128, ANY, 256, 64, 8, 3),
    Row("scores", "sm_90", "half", 192, ANY, 128, 64, 4, 2, None, False),
    Row("scores", "sm_90", "half", 256, ANY, 128, 64, 4, 3),
    Row("query_gradients", "sm_90", "bfloat16", 128, 32, 64, 64, 4, 3),
    Row("query_gradients", "sm_90", "bfloat16", 128, ANY, 64, 128, 4, 3),
    Row("query_gradients", "sm_90", "bfloat16", 256, 2, 64, 64, 8, 2),
    Row("query_gradients", "sm_90", "bfloat16", 256, ANY, 64, 64, 4, 2),
    Row("query_gradients", "sm_90", "float16", 128, ANY, 128, 64, 8, 3),
    Row("query_gradients", "sm_90", "float16", 256, ANY, 128, 32, 8, 3),
    Row("key_gradients", "sm_90", "bfloat16", 128, ANY, 64, 64, 4, 4),
    Row("key_gradients", "sm_90", "float16", 128, ANY, 128, 32, 4, 2),
    Row("key_sums", "sm_90", "half", 256, ANY, 32, 64, 8, 2),
    Row("key_gradients", "sm_90", "bfloat16", 256, 2, 32, 64, 8, 2),
    Row("key_gradients", "sm_90", "bfloat16", 192, ANY, 64, 64, 4, 2),
    Row("key_gradients", "sm_90", "bfloat16", 256, ANY, 64, 128, 8, 2),
    Row("key_gradients", "sm_90", "float16", 256, ANY, 32, 128, 8, 3),
    Row("biased_scores", "sm_100", "half", 256, 1, 32, 64, 8, 2),
    Row("biased_scores", "sm_100", "half", 128, ANY, 128, 64, 8, 2),
    Row("scores", "sm_100", "half", 128, 16, 128, 64, 8, 2),
    Row("scores", "sm_100", "half", 128, ANY, 256, 64, 8, 2),
    Row("scores", "sm_100", "half", 256, ANY, 128, 64, 8, 2),
    Row("query_gradients", "sm_100", "half", 128, ANY, 128, 64, 8, 3),
    Row("query_gradients", "sm_100", "half", 256, ANY, 64, 64, 8, 2),
    Row("key_gradients", "sm_100", "half", 128, ANY, 64, 128, 8, 3),
    Row("key_gradients", "sm_100", "half", 256, ANY, 32, 64, 8, 2),
    Row("scores", "gfx942", "half", 128, ANY, 128, 64, 4, 1),
    Row("scores", "gfx942", "half", 256, ANY, 64, 64, 4, 1),
    Row("query_gradients", "gfx942", "half", 128, ANY, 64, 64, 4, 1),
    Row("query_gradients", "gfx942", "half", 256, ANY, 64, 32, 8, 1),
    Row("key_gradients", "gfx942", "half", 128, ANY, 64, 64, 4, 1),
    Row("key_gradients", "gfx942", "half", 256, ANY, 32, 64, 8, 1),
    # Gathered kernels: `rows` are heads of one row (of one key head), `keys` its picks. Where keys stay, as above.
    Row("selected_scores", "sm_80", "half", 128, ANY, 64, 64, 4, 2),
    Row("selected_scores", "sm_80", "half", 256, ANY, 64, 64, 4, 2),
    Row("selected_rows", "sm_80", "half", 128, ANY, 32, 64, 4, 2),
    Row("selected_rows", "sm_80", "half", 256, ANY, 32, 64, 4, 2),
    Row("selected_keys", "sm_80", "half", 128, ANY, 64, 64, 4, 1),
    Row("selected_keys", "sm_80", "half", 256, ANY, 64, 64, 8, 1),
    Row("attention", "sm_80", "half", 128, ANY, 16, 64, 4, 2),
    Row("attention", "sm_80", "half", 256, ANY, 16, 64, 8, 2),
    Row("attention_rows", "sm_80", "half", 128, ANY, 16, 64, 4, 2),
    Row("attention_rows", "sm_80", "half", 256, ANY, 16, 64, 8, 2),
    Row("attention", "sm_80", "half", 576, ANY, 16, 32, 8, 1),
    Row("attention_rows", "sm_80", "half", 576, ANY, 16, 32, 8, 1),
    Row("attention_keys", "sm_80", "half", 576, 16, 16, 64, 4, 2),
    Row("attention_keys", "sm_80", "half", 576, ANY, 128, 64, 8, 2),
    Row("attention_masked", "sm_80", "half", 128, ANY, 64, 64, 8, 2),
    Row("attention_masked", "sm_80", "half", 256, ANY, 64, 64, 8, 1),
    Row("selected_scores", "sm_90", "half", 128, ANY, 32, 128, 4, 4),
    Row("selected_scores", "sm_90", "half", 256, ANY, 64, 64, 4, 2),
    Row("selected_rows", "sm_90", "half", 128, ANY, 64, 64, 4, 2),
    Row("selected_rows", "sm_90", "half", 256, ANY, 32, 64, 4, 2),
    Row("selected_keys", "sm_90", "half", 128, ANY, 64, 64, 4, 1),
    Row("selected_keys", "sm_90", "half", 256, ANY, 64, 64, 8, 1),
    Row("attention", "sm_90", "half", 128, 16, 32, 64, 4, 2),
    Row("attention", "sm_90", "half", 128, ANY, 32, 64, 4, 3),
    Row("attention", "sm_90", "half", 256, ANY, 16, 32, 4, 2),
    Row("attention_rows", "sm_90", "half", 128, ANY, 32, 64, 4, 2),
    Row("attention_rows", "sm_90", "half", 256, ANY, 16, 64, 4, 2),
    Row("apart_attention", "sm_90", "half", 576, ANY, 64, 32, 8, 2),
    Row("attention", "sm_90", "half", 576, 32, 32, 64, 8, 2),
    Row("attention", "sm_90", "half", 576, ANY, 64, 32, 8, 2),
    Row("apart_attention_rows", "sm_90", "half", 576, ANY, 32, 16, 8, 1),
    Row("attention_rows", "sm_90", "half", 576, ANY, 16, 64, 8, 2),
    Row("attention_keys", "sm_90", "half", 576, 16, 16, 64, 4, 2),
    Row("attention_keys", "sm_90", "bfloat16", 576, ANY, 128, 64, 8, 2),
    Row("attention_keys", "sm_90", "half", 576, ANY, 64, 64, 8, 2),
    Row("attention_masked", "sm_90", "half", 128, ANY, 32, 64, 4, 2),
    Row("attention_masked", "sm_90", "half", 256, ANY, 16, 64, 8, 2),
    Row("selected_scores", "sm_100", "half", 128, ANY, 64, 64, 4, 2),
    Row("selected_scores", "sm_100", "half", 256, ANY, 64, 64, 4, 2),
    Row("selected_rows", "sm_100", "half", 128, ANY, 64, 64, 4, 2),
    Row("selected_rows", "sm_100", "half", 256, ANY, 32, 64, 4, 2),
    Row("selected_keys", "sm_100", "half", 128, ANY, 64, 64, 4, 1),
    Row("selected_keys", "sm_100", "half", 256, ANY, 64, 64, 8, 1),
    Row("attention", "sm_100", "half", 128, ANY, 32, 64, 4, 2),
    Row("attention", "sm_100", "half", 256, ANY, 16, 64, 4, 2),
    Row("attention_rows", "sm_100", "half", 128, ANY, 16, 64, 4, 1),
    Row("attention_rows", "sm_100", "half", 256, ANY, 16, 64, 8, 2),
    Row("apart_attention", "sm_100", "half", 576, ANY, 16, 64, 8, 1),
    Row("attention", "sm_100", "half", 576, ANY, 32, 64, 8, 2),
    Row("apart_attention_rows", "sm_100", "half", 576, ANY, 16, 32, 4, 1),
    Row("attention_rows", "sm_100", "half", 576, ANY, 16, 64, 8, 1),
    Row("attention_keys", "sm_100", "half", 576, 16, 16, 64, 4, 2),
    Row("attention_keys", "sm_100", "half", 576, ANY, 128, 64, 8, 1),
    Row("attention_masked", "sm_100", "half", 128, ANY, 64, 64, 8, 2),
    Row("attention_masked", "sm_100", "half", 256, ANY, 32, 64, 8, 2),
    Row("selected_scores", "gfx942", "half", 128, ANY, 64, 64, 4, 1),
    Row("selected_scores", "gfx942", "half", 256, ANY, 64, 64, 4, 1),
    Row("selected_rows", "gfx942", "half", 128, ANY, 32, 64, 4, 1),
    Row("selected_rows", "gfx942", "half", 256, ANY, 32, 64, 4, 1),
    Row("selected_keys", "gfx942", "half", 128, ANY, 64, 64, 4, 1),
    Row("selected_keys", "gfx942", "half", 256, ANY, 64, 64, 4, 1),
    Row("attention", "gfx942", "half", 128, ANY, 16, 64, 4, 1),
    Row("attention", "gfx942", "half", 256, ANY, 16, 64, 8, 1),
    Row("attention_rows", "gfx942", "half", 128, ANY, 16, 64, 4, 1),
    Row("attention_rows", "gfx942", "half", 256, ANY, 16, 64, 4, 1),
    Row("attention", "gfx942", "half", 576, ANY, 16, 32, 8, 1),
    Row("attention_rows", "gfx942", "half", 576, ANY, 16, 32, 4, 1),
    Row("attention_keys", "gfx942", "half", 576, 16, 16, 64, 4, 1),
    Row("attention_keys", "gfx942", "half", 576, ANY, 128, 64, 8, 1),
    Row("attention_masked", "gfx942", "half", 128, ANY, 64, 64, 4, 1),
    Row("attention_masked", "gfx942", "half", 256, ANY, 32, 64, 4, 1),
    Row("selected_scores", "*", "float32", 256, ANY, 16, 16, 8, 2),
    Row("selected_scores", "*", "float64", 256, ANY, 16, 16, 8, 1),
    Row("selected_rows", "*", "float32", 256, ANY, 16, 16, 8, 1),
    Row("selected_rows", "*", "float64", 256, ANY, 16, 16, 8, 1),
    Row("selected_keys", "*", "float32", 256, ANY, 16, 16, 8, 1),
    Row("selected_keys", "*", "float64", 256, ANY, 16, 16, 8, 1),
    Row("attention", "*", "float32", 576, ANY, 16, 16, 8, 2),
    Row("attention", "*", "float64", 576, ANY, 16, 16, 8, 1),
    Row("attention_rows", "*", "float32", 576, ANY, 16, 16, 8, 2),
    Row("attention_rows", "gfx942", "float64", 576, ANY, 16, 16, 4, 1),
    Row("attention_rows", "*", "float64", 576, ANY, 16, 16, 8, 1),
    Row("attention_keys", "*", "float32", 576, ANY, 16, 16, 8, 1),
    Row("attention_keys", "*", "float64", 576, ANY, 16, 16, 8, 1),
    # Exact float32 and float64, which have no fast instruction everywhere: small tiles.
    Row("scores", "*", "float32", 256, ANY, 32, 32, 4, 1),
    Row("query_gradients", "*", "float32", 128, ANY, 32, 32, 4, 1),
    Row("query_gradients", "gfx942", "float32", 256, ANY, 16, 32, 4, 1),
    Row("query_gradients", "*", "float32", 256, ANY, 16, 32, 8, 1),
    Row("key_gradients", "*", "float32", 128, ANY, 32, 32, 4, 1),
    Row("key_gradients", "*", "float32", 256, ANY, 32, 16, 4, 1),
    Row("scores", "*", "float64", 256, ANY, 16, 16, 4, 1),
    Row("query_gradients", "*", "float64", 256, ANY, 16, 16, 4, 1),
    Row("key_gradients", "*", "float64", 256, ANY, 16, 16, 4, 1),
    Row("fold", "*", "*", 256, ANY, 16, 0, 4, 1),
    # The teacher of a loss: rows are query rows, whatever the heads.
    Row("teacher sums", "cpu", "*", ANY, ANY, 16, 32, 4, 1),
    Row("teacher mass", "cpu", "*", ANY, ANY, 16, 32, 4, 1),
    Row("teacher sums", "sm_80", "half", 128, ANY, 128, 64, 4, 3),
    Row("teacher sums", "sm_80", "half", 256, ANY, 64, 64, 4, 2),
    Row("teacher sums", "sm_80", "half", ANY, ANY, 64, 32, 4, 2),
    Row("teacher sums", "sm_90", "half", 128, ANY, 128, 64, 4, 3),
    Row("teacher sums", "sm_90", "half", 192, ANY, 128, 64, 8, 3),
    Row("teacher sums", "sm_90", "half", 256, ANY, 128, 64, 8, 2),
    Row("teacher sums", "sm_90", "half", ANY, ANY, 64, 64, 4, 2),
    Row("teacher sums", "sm_100", "half", 128, ANY, 128, 64, 4, 3),
    Row("teacher sums", "sm_100", "half", 192, ANY, 128, 64, 8, 3),
    Row("teacher sums", "sm_100", "half", 256, ANY, 128, 64, 8, 2),
    Row("teacher sums", "sm_100", "half", ANY, ANY, 64, 64, 4, 2),
    Row("teacher sums", "gfx942", "half", 128, ANY, 128, 64, 4, 1),
    Row("teacher sums", "gfx942", "half", ANY, ANY, 64, 64, 4, 1),
    Row("teacher sums", "*", "float32", 128, ANY, 64, 32, 8, 2),
    Row("teacher sums", "*", "float32", 256, ANY, 32, 32, 8, 1),
    Row("teacher sums", "*", "float64", 256, ANY, 16, 16, 4, 1),
    Row("teacher mass", "sm_80", "half", 128, ANY, 128, 64, 8, 3),
    Row("teacher mass", "sm_80", "half", 192, ANY, 64, 128, 8, 2),
    Row("teacher mass", "sm_80", "half", 256, ANY, 64, 64, 4, 2),
    Row("teacher mass", "sm_80", "half", ANY, ANY, 64, 32, 4, 2),
    Row("teacher mass", "sm_90", "half", 192, ANY, 128, 128, 8, 2),
    Row("teacher mass", "sm_90", "half", 256, ANY, 128, 64, 8, 2),
    Row("teacher mass", "sm_90", "half", ANY, ANY, 64, 32, 4, 2),
    Row("teacher mass", "sm_100", "half", 192, ANY, 128, 128, 8, 2),
    Row("teacher mass", "sm_100", "half", 256, ANY, 128, 64, 8, 2),
    Row("teacher mass", "sm_100", "half", ANY, ANY, 64, 32, 4, 2),
    Row("teacher mass", "gfx942", "half", 128, ANY, 128, 64, 4, 1),
    Row("teacher mass", "gfx942", "half", ANY, ANY, 64, 64, 4, 1),
    Row("teacher mass", "*", "float32", 128, ANY, 64, 32, 8, 2),
    Row("teacher mass", "*", "float32", 256, ANY, 32, 32, 8, 1),
    Row("teacher mass", "*", "float64", 256, ANY, 16, 16, 4, 1),
    Row("compare", "cpu", "*", ANY, ANY, 1, 64, 4, 1),
    Row("compare", "*", "*", ANY, ANY, 1, 1024, 4, 1),
)


# Rows that go before the table's.
_TRIED: list[Row] = []


def rows_of(arch: str) -> list[Row]:
    """Return the rows that calls on an architecture get: those that no row before them covers."""
    rows: list[Row] = []
    for row in TABLE:
        if row.arch in (arch, "*") and not any(row.is_covered(by) for by in rows):
            rows.append(row)
    return rows


@functools.cache  # a fold of many slabs asks for each
def tile(kernel: str, arch: str, dtype: torch.dtype, d: int, h: int = 1) -> Row:
    """Return the row of a call.   arch: as `arch_of` names it."""
    kernels = kernel, SHARED.get(kernel)
    for row in (*_TRIED, *TABLE):
        meant = row.kernel in kernels and row.arch in (arch, "*") and row.takes(dtype)
        if meant and d <= row.d and h <= row.h:
            return row
    raise UnsupportedError(f'{kernel}: has no tile for {arch}, {KINDS[dtype]}, d={d}, h={h}. Use impl="eager".')


def tried() -> tuple[Row, ...]:
    """Return the rows that go before the table's now."""
    return tuple(_TRIED)


@contextmanager
def trying(row: Row) -> Iterator[None]:
    """Put a row before the table, for calls made meanwhile."""
    _TRIED.append(row)
    tile.cache_clear()
    try:
        yield
    finally:
        _TRIED.remove(row)
        tile.cache_clear()


@functools.cache  # asking torch takes longer than launching a kernel
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
