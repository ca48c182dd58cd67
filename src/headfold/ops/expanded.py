"""One head of a key that was expanded over all heads, and its gradient given back without the copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def heads_once(key: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return one head of key and value [b, sk, np, d] where their heads lie in the same memory; else both as they are.

    Told by a stride of 0, which no data is read for.
    """
    given = [key] if value is None else [key, value]
    if key.shape[2] == 1 or any(x.stride(2) != 0 for x in given):
        return key, value
    return _one_head(key), None if value is None else _one_head(value)


def _one_head(x: Tensor) -> Tensor:
    head: Tensor = _OneHead.apply(x)  # type: ignore[no-untyped-call]
    return head


class _OneHead(torch.autograd.Function):
    """x[:, :, :1] of heads that are one. Its gradient is spread evenly, expanded, over the np that stand for it.

    What the head behind the expansion gets is their sum. Slicing's own backward would allocate all np of them.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Return the first head, as a view."""
        return x[:, :, :1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep how many heads there were."""
        ctx.heads = inputs[0].shape[2]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """Return g / np at every head, in the memory of one."""
        spread: Tensor = (g / ctx.heads).expand(-1, -1, ctx.heads, -1)
        return spread
