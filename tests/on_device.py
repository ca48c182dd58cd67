"""Inputs of the kernels' tests, on the device that runs them: a GPU, or a CPU under Triton's interpreter.

With a GPU and TRITON_INTERPRET=1 the interpreter wins, and the tensors are on the CPU.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import cases
from headfold import KeyRange

# With it Triton interprets its kernels, on CPU tensors alone, though there be a GPU: inputs have to go where they run.
ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def there(x: Any) -> Any:
    """Move a tensor, the tensors of a range, or those of a list or dict to the device; leave all else."""
    if isinstance(x, KeyRange):
        return replace(x, start=there(x.start), end=there(x.end))
    if isinstance(x, list):
        return [there(one) for one in x]
    if isinstance(x, dict):
        return {name: there(one) for name, one in x.items()}
    return x.to(DEVICE) if isinstance(x, Tensor) else x


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


class Case(cases.Case):
    """A case whose inputs, gradient and call are on the device."""

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor | None]:
        moved: list[Tensor | None] = there(super().inputs(dtype, seed))
        return moved

    def leaves(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [x.requires_grad_() for x in self.inputs(dtype) if x is not None]

    def incoming(self, seed: int = 1) -> Tensor:
        moved: Tensor = there(super().incoming(seed))
        return moved

    def call(self) -> dict[str, Any]:
        moved: dict[str, Any] = there(super().call())
        return moved


CASES = [Case(**vars(case)) for case in cases.CASES]


def launches_leave_nothing() -> AbstractContextManager[Any]:
    """Collect what the interpreter leaves of a launch in cycles: its arguments, which would count as alive."""
    if ON_GPU:
        return nullcontext()
    from triton.runtime.interpreter import GridExecutor

    launch: Callable[..., None] = GridExecutor.__call__

    def collected(self: Any, *args: Any, **kwargs: Any) -> None:
        launch(self, *args, **kwargs)
        gc.collect()

    return mock.patch.object(GridExecutor, "__call__", collected)
