"""Operands of the gathered kernels: what their arithmetic is told, how they are rounded, loaded and stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.knobs import runtime

from headfold.backends.triton.products import ACCUMULATORS, NARROWEST, precision, product
from headfold.contract import compute_dtype

# Channels of a step, at most.
STREAMED = 64


def options(like: torch.Tensor, scale: float) -> dict[str, object]:
    """Return what every kernel is told about its arithmetic, by the name of its parameter.

    A kernel's float arguments are float32, so that a float64 factor is part of the kernel.
    """
    dtype = compute_dtype(like.dtype)
    return {
        "SCALE": scale if dtype == torch.float64 else None,
        "ACC": ACCUMULATORS[dtype],
        "UPCAST": like.dtype == torch.bfloat16 and runtime.interpret,
        "PRECISION": precision(like.dtype),
        "RANGED": like.dtype == torch.float16,
    }


def streamed(width: int) -> int:
    """Return the channels of a step where a width passes in steps."""
    return int(min(STREAMED, max(NARROWEST, triton.next_power_of_2(width))))


@triton.jit
def rounded(x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """Cast x to nearest even; by its bits in the interpreter, whose casts to bfloat16 cut off."""
    if UPCAST and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        finite = (bits & 0x7F800000) != 0x7F800000
        return tl.where(finite, near, bits).to(tl.float32, bitcast=True).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def halves(x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """Two numbers of a 16-bit DTYPE that sum to float32 x, twice as exactly as one; of a wider DTYPE x and zeros.

    Neither has another sign than x, and neither is 0 but where x is: times infinity they are infinite as x is.
    """
    if DTYPE.primitive_bitwidth == 16:
        # Bits that DTYPE has no room for are cut off, so that what is left has the sign of x.
        lost: tl.constexpr = 16 if DTYPE == tl.bfloat16 else 13
        high = (x.to(tl.int32, bitcast=True) >> lost << lost).to(tl.float32, bitcast=True).to(DTYPE)
        least: tl.constexpr = 2.0**-126 if DTYPE == tl.bfloat16 else 2.0**-24
        left = x - high.to(tl.float32)
        low = tl.where(x > 0, tl.maximum(left, least), tl.where(x < 0, tl.minimum(left, -least), 0.0))
        return high, rounded(low, DTYPE, UPCAST)
    else:
        return x.to(DTYPE), tl.zeros_like(x).to(DTYPE)


@triton.jit
def power_of_two(x):
    """The power of two at or below each x > 0 in float32; 1 where x is 0, infinite or NaN."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7F800000
    usable = (bits != 0) & (bits != 0x7F800000)
    return tl.where(usable, bits, 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def factor(scale, SCALE: tl.constexpr, ACC: tl.constexpr):
    """The factor of a call in the compute dtype: its float32 argument, or in float64 the constant."""
    if SCALE is None:
        return scale
    else:
        return tl.full((), SCALE, ACC)


@triton.jit
def matrix(base, rows, live, step, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Load [rows, SIZE] channels from FIRST on of rows at int64 offsets; zeros where not live and beyond WIDTH."""
    c = FIRST + tl.arange(0, SIZE)
    at = base + rows[:, None] + (c.to(tl.int64) * step)[None, :]
    if FIRST + SIZE <= WIDTH:
        return tl.load(at, mask=live[:, None], other=0.0)
    else:
        return tl.load(at, mask=live[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def some_channels(x, rows, live, step, first, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Load [rows, SIZE] channels from a multiple of SIZE on, as `matrix` does from a constant."""
    c = first + tl.arange(0, SIZE)
    at = x + rows[:, None] + (c.to(tl.int64) * step)[None, :]
    if WIDTH % SIZE == 0:
        return tl.load(at, mask=live[:, None], other=0.0)
    else:
        return tl.load(at, mask=live[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def meet(
    x, xs, x_live, x_step, y, ys, y_live, y_step,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x · yᵀ [ROWS, COLUMNS] of rows at int64 offsets xs and ys, SIZE of WIDTH channels at a time."""
    s = tl.zeros((ROWS, COLUMNS), ACC)
    for c in tl.range(0, WIDTH, SIZE, num_stages=STAGES):
        a = some_channels(x, xs, x_live, x_step, c, SIZE, WIDTH)
        b = some_channels(y, ys, y_live, y_step, c, SIZE, WIDTH)
        s = product(a, tl.trans(b), s, PRECISION, ACC, UPCAST)
    return s


@triton.jit
def put(base, rows, live, step, x, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Store [rows, SIZE] channels from FIRST on, as `matrix` loads them."""
    c = FIRST + tl.arange(0, SIZE)
    tl.store(base + rows[:, None] + (c.to(tl.int64) * step)[None, :], x, mask=live[:, None] & (c < WIDTH)[None, :])
