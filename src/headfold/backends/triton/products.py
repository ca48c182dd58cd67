"""Matrix products of kernels: operands loaded in two pieces of a width, multiplied in the dtype that is asked for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headfold.triton_tiles import power_of_two

ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}
NARROWEST = 16  # a matrix instruction's own


def pieces(d: int) -> tuple[int, int]:
    """Return the two powers of two that a width is read in: 128 and 0, or 64 and 16 for 80.

    One piece is padded where two would not be smaller together.
    """
    whole = max(NARROWEST, triton.next_power_of_2(d))
    first = max(NARROWEST, whole // 2)
    second = max(NARROWEST, triton.next_power_of_2(max(1, d - first)))
    return (first, second) if first + second < whole else (whole, 0)


def precision(dtype: torch.dtype) -> str:
    """Return how float32 operands are multiplied: exactly, unless torch's own switch allows TF32."""
    if dtype != torch.float32 or not torch.cuda.is_available():
        return "ieee"
    switch = torch.backends.cuda.matmul
    allowed = getattr(switch, "fp32_precision", None)  # torch 2.9 and later, where reading the older switch may raise
    return "tf32" if (switch.allow_tf32 if allowed is None else allowed == "tf32") else "ieee"


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr):
    """Return acc + a · b in ACC. UPCAST multiplies in ACC: the interpreter cannot multiply bfloat16."""
    if UPCAST:
        a = a.to(ACC)
        b = b.to(ACC)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def add_product(a, b, total, some, PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr):
    """Return total + a · b in ACC, of a sum over many blocks.

    Exact operands are summed block by block: without tensor cores a product adds its terms one after another, and a
    chain of thousands of them rounds more than its budget.   some: true, which the compiler may not know: it would
    make one chain of the sum again.
    """
    if a.dtype.primitive_bitwidth >= 32 and PRECISION == "ieee":
        block = product(a, b, tl.zeros_like(total), PRECISION, ACC, UPCAST)
        return total + tl.where(some, block, 0.0)
    else:  # noqa: RET505 - both would be compiled otherwise
        return product(a, b, total, PRECISION, ACC, UPCAST)


@triton.jit
def never_empty(first, last):
    """Return the end of a loop from `first` that runs to `last`, and once where that is not behind it.

    What a product sums over a loop that may be skipped has two origins, its zeros and the loop: on sm_90 the assembler
    then lets no two instructions of a product overlap. What the body adds from `last` on has to be nothing, or dropped.
    """
    end = tl.maximum(last, first + 1)
    tl.assume(first < end)
    return end


@triton.jit
def number(x, ACC: tl.constexpr, UPCAST: tl.constexpr):
    """Return a float64 argument in ACC; the interpreter passes Python's own number, which has every dtype."""
    if UPCAST:
        return x
    else:  # noqa: RET505 - both would be compiled otherwise
        return x.to(ACC)


@triton.jit
def load_rows(places, inside, channel_stride, first: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr):
    """Load [rows, PIECE] from channel `first` on, zeros past WIDTH channels of it and in rows that are not inside.

    places: pointers to channel 0 of each row.
    """
    channel = tl.arange(0, PIECE).to(tl.int64)
    mask = inside[:, None]
    if PIECE > WIDTH:
        mask = mask & (channel < WIDTH)[None, :]
    return tl.load(places[:, None] + (first + channel)[None, :] * channel_stride, mask=mask, other=0.0)


@triton.jit
def tile_places(rows, row_stride, channel_stride, first: tl.constexpr, PIECE: tl.constexpr):
    """Return where [rows, PIECE] lie from channel `first` of row 0 on: made once for many tiles, if it `is_near`."""
    return rows[:, None] * row_stride + (first + tl.arange(0, PIECE))[None, :] * channel_stride


@triton.jit
def load_tile(tile, places, PIECE: tl.constexpr, WIDTH: tl.constexpr):
    """Load places of a tile, all of whose rows exist; zeros past WIDTH channels."""
    if PIECE > WIDTH:
        x = tl.load(tile + places, mask=(tl.arange(0, PIECE) < WIDTH)[None, :], other=0.0)
    else:
        x = tl.load(tile + places)
    return x


def is_near(x: Tensor, rows: int) -> bool:
    """Whether the places of a tile of so many rows of x [..., d] are 32-bit integers, and few enough to be held."""
    *_, row, channel = x.stride()
    return x.dtype.itemsize == 2 and rows * row + power_of_two(x.shape[-1]) * channel < 2**31
