"""The matrix products of a call, run again alone: the floor under its time that it sets itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)


class _Recording(TorchDispatchMode):
    """Notes every matrix product, with the shapes and strides of its operands."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in PRODUCTS:
            self.calls.append((func, *tree_map(_described, (args, kwargs))))
        return func(*args, **kwargs)


class _Operand(tuple[Any, ...]):
    """Size, stride and dtype of a tensor."""


def _described(x: Any) -> Any:
    return _Operand((tuple(x.shape), x.stride(), x.dtype, x.device)) if isinstance(x, Tensor) else x


def products_of(body: Callable[[], Any]) -> tuple[Callable[[], None], int]:
    """Run an undecorated op body, and return what runs its matrix products alone, and how many there are.

    Operands of one shape share a buffer, so that they are as warm as the tiles of a walk.
    """
    with _Recording() as recording, torch.no_grad():
        body()
    buffers: dict[_Operand, Tensor] = {}

    def buffer(x: Any) -> Any:
        if not isinstance(x, _Operand):
            return x
        if x not in buffers:
            shape, stride, dtype, device = x
            buffers[x] = torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()
        return buffers[x]

    calls = [(func, *tree_map(buffer, (args, kwargs))) for func, args, kwargs in recording.calls]

    def replay() -> None:
        with torch.no_grad():
            for func, args, kwargs in calls:
                func(*args, **kwargs)

    return replay, len(calls)
