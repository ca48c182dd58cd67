"""The matrix products of a call, run again alone: the floor under its time that it sets itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_)


class _Recording(TorchDispatchMode):
    """Keeps every matrix product with its operands."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in PRODUCTS:
            self.calls.append((func, args, kwargs))
        return func(*args, **kwargs)


def products_of(body: Callable[[], Any]) -> tuple[Callable[[], None], int]:
    """Run an undecorated op body, and return what runs its matrix products alone, and how many there are.

    They run in its order on its own operands: the inputs, and its scratch as the body left it, which is kept alive.
    """
    with _Recording() as recording, torch.no_grad():
        body()

    def replay() -> None:
        with torch.no_grad():
            for func, args, kwargs in recording.calls:
                func(*args, **kwargs)

    return replay, len(recording.calls)
