"""What every eager walk stands on: buffers made once, queries staged in them, and the marks of hidden keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headfold.contract import compute_dtype

NEG_INF = float("-inf")
threshold_backward = torch.ops.aten.threshold_backward.grad_input


@dataclass(frozen=True)
class Visible:
    """Which of `sk` keys the rows of one batch element may see: the parts of a KeyRange, and the bias.

    start, end: int32 [sq] or None.   offset, ratio: the static bound of a KeyRange.   bias: floating [sq, sk] or None.
    """

    sk: int
    start: Tensor | None
    end: Tensor | None
    offset: int | None
    ratio: int
    bias: Tensor | None

    @classmethod
    def of(
        cls,
        i: int,
        sk: int,
        start: Tensor | None,
        end: Tensor | None,
        bias: Tensor | None,
        offset: int | None,
        ratio: int,
    ) -> Visible:
        """Return what the rows of batch element i may see, given an op's arguments."""
        return cls(sk, batch_element(start, i), batch_element(end, i), offset, ratio, batch_element(bias, i))

    def limit(self, row: int) -> int:
        """Return one past the last key that the static bound lets `row` see."""
        if self.offset is None:
            return self.sk
        return max(0, min(self.sk, (row + 1 + self.offset) // self.ratio))

    def partial(self, first: int, key_end: int) -> bool:
        """Whether any row from `first` on may be barred from any key before `key_end`."""
        moving = self.start is not None or self.end is not None or self.bias is not None
        return moving or self.limit(first) < key_end

    def hide(self, hidden: Tensor, row: tuple[int, int], t: Tensor, bias: Tensor | None, other: Tensor) -> None:
        """Mark in bool `hidden` [rows, keys] what the rows may not see of keys t, int [keys] or [rows, keys].

        bias: that of those keys, [rows, keys].   other: bool scratch of hidden's shape.
        """
        if self.offset is not None:
            s = torch.arange(*row, device=t.device)  # int64: an offset may pass int32 once rows are added
            bound = torch.div(s.add_(1 + self.offset), self.ratio, rounding_mode="floor").clamp_(0, self.sk)
            hidden |= torch.ge(t, bound.int().unsqueeze(1), out=other)
        if self.start is not None:
            hidden |= torch.lt(t, self.start[slice(*row)].unsqueeze(1), out=other)
        if self.end is not None:
            hidden |= torch.ge(t, self.end[slice(*row)].unsqueeze(1), out=other)
        if bias is not None:
            hidden |= torch.eq(bias, NEG_INF, out=other)


class Queries:
    """The buffers that queries and weights of a block of rows are staged in, in the compute dtype of `like`."""

    def __init__(self, rows: int, h: int, d: int, like: Tensor) -> None:
        self.dtype, self.device = compute_dtype(like.dtype), like.device
        self.q = self.empty(rows * h * d)
        self.weights = self.empty(rows * h)

    def empty(self, count: int) -> Tensor:
        """Allocate `count` elements of the compute dtype."""
        return torch.empty(count, dtype=self.dtype, device=self.device)

    def stage(self, q: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return q [rows, h, d] dense and weights [rows, h] in the compute dtype; weights are ones when None."""
        if q.dtype != self.dtype or not q.is_contiguous():
            q = head(self.q, *q.shape).copy_(q)
        staged = head(self.weights, *q.shape[:2])
        return q, staged.fill_(1) if weights is None else staged.copy_(weights)


def fold(q: Tensor, weights: Tensor, buffer: Tensor) -> Tensor:
    """Return Σ_h weights · q, [rows, d], in a buffer: all that a product needs when there is no activation."""
    folded = head(buffer, q.shape[0], 1, q.shape[2])
    return torch.bmm(weights.unsqueeze(1), q, out=folded).squeeze(1)


def head(buffer: Tensor, *shape: int) -> Tensor:
    """View the first elements of a flat buffer with the given shape."""
    return buffer[: math.prod(shape)].view(shape)


def stage(x: Tensor, buffer: Tensor) -> Tensor:
    """Return the matrix x in the buffer's dtype with dense rows, as products read it: itself, or a copy there."""
    if x.dtype == buffer.dtype and x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x
    return head(buffer, *x.shape).copy_(x)


def batch_element(x: Tensor | None, i: int) -> Tensor | None:
    """Return batch element i; an axis of size one stands for all."""
    if x is None:
        return None
    return x[i if x.shape[0] > 1 else 0]


def scatter_add(dk: Tensor, picked: Tensor, dkeys: Tensor) -> None:
    """Add dkeys [n, d] to the rows `picked` of dk, in an order that does not change from run to run.

    On a CPU rows of an expanded index are sorted by key and summed by one writer each, three times faster than
    index_add_ (docs/design.md, "Selected scores gather"). On CUDA index_put_ sorts; the others add atomically.
    """
    if dk.device.type == "cpu":
        dk.scatter_add_(0, picked.unsqueeze(1).expand(-1, dk.shape[1]), dkeys)
    else:
        dk.index_put_((picked,), dkeys, accumulate=True)


def blank(keys: Tensor, hidden: Tensor, buffer: Tensor) -> None:
    """Make rows of keys [rows, picks, d] zeros where hidden [rows, picks], NaN included.

    By their bits: four times faster than filling under a mask that is broadcast along the rows.
    buffer: rows · picks elements of the dtype of the keys.
    """
    bits = torch.int32 if keys.itemsize == 4 else torch.int64
    kept = head(buffer.view(bits), *hidden.shape).copy_(hidden).sub_(1)
    keys.view(bits).bitwise_and_(kept.unsqueeze(-1))
