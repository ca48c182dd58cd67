"""What differentiable ops share: autograd that runs once, and the refusal of a second time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

ONCE = (
    'headfold: {op} can be differentiated once. For second derivatives use impl="materialized", which is plain '
    "PyTorch and keeps the head axis."
)


def gradients_like(
    inputs: tuple[Tensor, Tensor | None, Tensor], needs: Sequence[bool], key_like: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dweights and dk for a fake: like their inputs, or empty where they are not needed."""
    q = inputs[0]
    likes = (torch.empty_like, torch.empty_like, key_like)
    dq, dweights, dk = (
        like(x) if need and x is not None else q.new_empty(0)
        for like, x, need in zip(likes, inputs, needs, strict=True)
    )
    return dq, dweights, dk


def differentiable_once(name: str, op: Any, backward: Any, tensors: int, inputs: int = 3) -> None:
    """Register autograd of an op whose first `inputs` of `tensors` leading arguments are differentiated.

    Its backward op takes g, the gradient of the op's first or only result, the op's own arguments, and which of the
    gradients are needed. Further results are not differentiated.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors])
        ctx.rest = inputs[tensors:]

    def differentiate(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[:inputs]
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        grads = backward(g, *ctx.saved_tensors, *ctx.rest, *needs)
        others = tensors - inputs + len(ctx.rest)
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * others)

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(ONCE.format(op=name))

    def nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save nothing: the backward that would need it refuses."""

    op.register_autograd(differentiate, setup_context=save)
    backward.register_autograd(refuse, setup_context=nothing)
