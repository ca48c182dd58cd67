"""A mode under which reading tensor data on the host is an error: on a CPU, the proof that nothing would sync.

A custom op is opaque to a dispatch mode, so proofs run the undecorated bodies under it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

CONVERSIONS = (
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__complex__",
    "__contains__",
    "__array__",
    "__repr__",
    "__format__",
    "cpu",
    "item",
    "numpy",
    "tolist",
)
# Ops whose result leaves the device, or whose shape depends on data: a host must read back either.
READING_OPS = (
    "_local_scalar_dense",
    "_unique",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique",
)
INDEXING_OPS = ("index", "index_put", "index_put_", "_index_put_impl_")


class DataRead(AssertionError):
    """Tensor data was read on the host."""


class _NoReadingOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(READING_OPS) or (name in INDEXING_OPS and _holds_a_mask(args[1])):
            raise DataRead(f"{name} reads tensor data on the host")
        return func(*args, **(kwargs or {}))


def _holds_a_mask(indices: Any) -> bool:
    return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)


@contextmanager
def no_data_reads() -> Iterator[None]:
    """Raise DataRead at every op and every Python conversion that reads tensor data back.

    What it cannot see: a copy from CPU to CPU is no op at all, so `x.to("cpu")` passes there (`x.cpu()` does not).
    """

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
