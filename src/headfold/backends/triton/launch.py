"""How a kernel is started: a compiled one at once, without all that Triton does first.

`kernel[grid](…)` binds every argument by name and asks of each what it was compiled for, which takes the host tens of
microseconds: more than many of these kernels take the device. What it finds follows from little, told in a few
microseconds here; what is not known yet, and every launch under the interpreter or on ROCm, goes through it. Hooks
around launches are called all the same; Triton's debugging knobs are those of a kernel's first launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from headfold.backends.triton.keys import settle_key
from headfold.backends.triton.replay import ALIGNED, give_up, note

Values = tuple[Any, ...]


class Parameters(NamedTuple):
    """Parameters of a kernel that are no constants, by what is compiled in of their arguments.

    kernel: kept, so that its id stays its own.   looked_at: numbers of whose values something is.   others: numbers of
    which only the width is.   rest: tensors and None at first. What was a float stays one, and nothing is.
    """

    kernel: Any
    looked_at: Callable[[Values], Values]
    others: Callable[[Values], Values]
    rest: Callable[[Values], Values]


_parameters: dict[int, Parameters] = {}
_compiled: dict[Values, tuple[Any, Values]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run kernel[grid](*args, **constants) on the current device and stream.

    args: tensors, integers, floats and None, for every parameter that is no constant; what is a float is one in every
    launch.   constants: the others and the launch's options, hashable.
    """
    known = _parameters.get(id(kernel))  # hashing a kernel itself takes as long as all the rest of the key
    if known is None and isinstance(kernel, triton.JITFunction):
        settle_key(kernel)
        known = _parameters[id(kernel)] = parameters(kernel, args)
    if known is None or torch.version.hip is not None:
        kernel[grid](*args, **constants)
        give_up()
        return
    key = (
        id(kernel),
        torch.cuda.current_device(),
        tuple(constants),
        *constants.values(),
        traits_of_numbers(known.looked_at(args)),
        widths(known.others(args)),
        *traits(known.rest(args)),
    )
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        if not isinstance(compiled, triton.compiler.CompiledKernel):  # a hook may have kept it from being one
            give_up()
            return
        rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        _compiled[key] = compiled, rest
        note(compiled, (*grid, 1, 1), (*args, *rest))
        return
    compiled, rest = found
    grid, args = (*grid, 1, 1), (*args, *rest)
    compiled[grid](*args)
    note(compiled, grid, args)


def parameters(kernel: Any, args: Values) -> Parameters:
    """Tell the parameters of a kernel apart, given the arguments of a launch."""
    chosen: tuple[list[int], list[int], list[int]] = [], [], []
    for i, x in enumerate(args):
        if isinstance(x, int):
            chosen[kernel.params[i].do_not_specialize].append(i)
        elif not isinstance(x, float):
            chosen[2].append(i)
    return Parameters(kernel, *(_getter(places) for places in chosen))


def _getter(places: list[int]) -> Callable[[Values], Values]:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda args: tuple(args[i] for i in places)


@functools.lru_cache(maxsize=4096)  # mostly strides, the same in call after call
def traits_of_numbers(numbers: Values) -> int:
    """Return what a compiled kernel is told of integers and None: two lists of them that are equal share one."""
    traits = 1
    for x in numbers:
        # A 1 is compiled in too. No integer is both that and a multiple of 16.
        one = 3 if x is None else _is_narrow(x) << 2 | (x == 1) << 1 | (x % ALIGNED == 0)
        traits = traits << 3 | one
    return traits


def is_aligned(x: Tensor) -> bool:
    """Whether kernels are compiled to read a tensor in vectors: of neighbours along its last axis, in any row."""
    *strides, last = x.stride()
    return last == 1 and x.data_ptr() % ALIGNED == 0 and all(n % ALIGNED == 0 for n in strides)


def _is_narrow(x: int) -> bool:
    return -(2**31) <= x < 2**31


def widths(numbers: Values) -> Values | None:
    """Return which of numbers are narrow, and which are None, or None where all are narrow, as nearly always."""
    if None in numbers:
        return tuple(x if x is None else _is_narrow(x) for x in numbers)
    if not numbers or (_is_narrow(max(numbers)) and _is_narrow(min(numbers))):
        return None
    return tuple(map(_is_narrow, numbers))


def traits(rest: Values) -> list[Any]:
    """Return what a compiled kernel is told of tensors, of None, and of what is a number in another launch."""
    return [
        x if x is None else (x.dtype, x.data_ptr() % ALIGNED == 0) if isinstance(x, Tensor) else traits_of_numbers((x,))
        for x in rest
    ]
