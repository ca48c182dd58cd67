"""A mode under which reading tensor data on the host is an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

CONVERSIONS = ("__bool__", "__int__", "__float__", "__index__", "__complex__", "item", "tolist", "numpy", "__array__")
READING_OPS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "allclose", "item")


class DataRead(AssertionError):
    """Tensor data was read on the host."""


class _NoReadingOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        indexed_by_mask = (
            name.startswith("index")
            and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1] if x is not None)
            if name in ("index", "index_put", "index_put_")
            else False
        )
        if name.startswith(READING_OPS) or indexed_by_mask:
            raise DataRead(f"{name} reads tensor data on the host")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_data_reads() -> Iterator[None]:
    """Raise DataRead at every op and every Python conversion that reads tensor data back."""

    def refuse(name: str) -> Any:
        def conversion(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            raise DataRead(f"Tensor.{name} reads tensor data on the host")

        return conversion

    patches = [mock.patch.object(torch.Tensor, name, refuse(name)) for name in CONVERSIONS]
    for patch in patches:
        patch.start()
    try:
        with _NoReadingOps():
            yield
    finally:
        for patch in patches:
            patch.stop()
