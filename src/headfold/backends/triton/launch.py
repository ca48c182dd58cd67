"""How a kernel is started: a compiled one at once, without all that Triton does first.

`kernel[grid](…)` binds every argument by name and asks of each what it was compiled for, which takes the host tens of
microseconds: more than many of these kernels take the device. What it finds follows from little, told in a few
microseconds here; what is not known yet, and every launch under the interpreter or on ROCm, goes through it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

# Whether pointers or integers are multiples of this is compiled in, as is a 1.
_ALIGNED = 16

Key = tuple[Any, ...]
_compiled: dict[Key, tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run kernel[grid](*args, **constants) on the current device and stream.

    args: tensors, integers, floats and None, for every parameter that is no constant.   constants: the others and
    the launch's options, hashable.
    """
    if not isinstance(kernel, triton.JITFunction) or torch.version.hip is not None:
        kernel[grid](*args, **constants)
        return
    key = (kernel, torch.cuda.current_device(), *constants.values(), *constants, *traits(args, specialized(kernel)))
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*args, **constants)
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, rest = known
    grid = (*grid, 1, 1)
    compiled[grid](*args, *rest)


def traits(args: tuple[Any, ...], specialized: tuple[bool, ...]) -> list[Any]:
    """Return what a compiled kernel is told of its arguments: two lists of them that are equal share one.

    specialized: of each argument, whether an integer's value is looked at.
    """
    found: list[Any] = []
    for x, looked_at in zip(args, specialized, strict=False):
        if isinstance(x, int):
            wide = not -0x80000000 <= x <= 0x7FFFFFFF
            found.append((wide, x == 1, x % _ALIGNED == 0) if looked_at else wide)
        elif isinstance(x, Tensor):
            found += (x.dtype, x.data_ptr() % _ALIGNED == 0)
        else:
            found.append(type(x))
    return found


@functools.cache
def specialized(kernel: Any) -> tuple[bool, ...]:
    """Return of each parameter of a kernel whether Triton compiles an integer's value in."""
    return tuple(not parameter.do_not_specialize for parameter in kernel.params)
