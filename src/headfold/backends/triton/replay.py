"""The launches of a fold, kept for the next call that differs in its data alone.

A fold of many slabs asks its plan, views its tensors and tells its kernels apart before every launch: more work for
the host than a slab is for the device. All of it follows from shapes, strides and options, so the first call notes
what it launches, and later ones launch that again, with every pointer as far into its tensor as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Launches that are kept, a kilobyte each: enough for a hundred calls of 32768 rows.
_MOST = 1 << 14
_ALIGNED = 16


class Step(NamedTuple):
    """A launch: start(*args, stream=…).   pointers: (at, tensor, offset), where args[at] is so many bytes into one."""

    start: Callable[..., None]
    args: list[Any]
    pointers: tuple[tuple[int, int, int], ...]


class Notes:
    """What one call launches on its tensors, none of which may share memory with another.

    steps: None once something was launched that cannot be launched again by pointers alone.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        present = [(i, x) for i, x in enumerate(tensors) if x is not None and x.numel() > 0]
        self.places = {memory_of(x): (i, x.data_ptr()) for i, x in present}
        self.steps: list[Step] | None = [] if len(self.places) == len(present) else None

    def add(self, compiled: Any, grid: tuple[int, ...], args: Sequence[Any]) -> None:
        """Note a launch of a compiled kernel with all of its arguments."""
        if self.steps is None:
            return
        pointers = []
        for at, x in enumerate(args):
            if isinstance(x, Tensor) and x.numel() > 0:
                found = self.places.get(memory_of(x))
                if found is None:
                    self.steps = None
                    return
                pointers.append((at, found[0], x.data_ptr() - found[1]))
        numbers = [0 if isinstance(x, Tensor) else x for x in args]
        self.steps.append(Step(compiled[grid], numbers, tuple(pointers)))


class _Local(threading.local):
    notes: Notes | None = None


_local = _Local()
_kept: dict[Hashable, list[Step]] = {}


def replay(run: Callable[[], None], key: Hashable, *tensors: Tensor | None) -> None:
    """Run what does nothing but launch kernels on `tensors` of one device, or launch again what it launched before.

    key: everything that the launches follow from beside the tensors' dtypes, shapes, strides and alignment.
    """
    first = next(x for x in tensors if x is not None)
    key = key, first.device, *map(_traits, tensors)
    with torch.cuda.device_of(first):
        steps = _kept.get(key)
        if steps is None:
            steps = noted(run, tensors)
            if steps is not None:
                _keep(key, steps)
            return
        bases = [0 if x is None else x.data_ptr() for x in tensors]
        stream = torch.cuda.current_stream(first.device).cuda_stream
        for start, args, pointers in steps:
            args = [*args]
            for at, tensor, offset in pointers:
                args[at] = bases[tensor] + offset
            start(*args, stream=stream)


def noted(run: Callable[[], None], tensors: Sequence[Tensor | None]) -> list[Step] | None:
    """Run and return what was launched, or None where that is not all there is to it."""
    outer, _local.notes = _local.notes, Notes(tensors)
    try:
        run()
        return _local.notes.steps
    finally:
        _local.notes = outer


def note(compiled: Any, grid: tuple[int, ...], args: Sequence[Any]) -> None:
    """Note a launch, where they are noted."""
    if _local.notes is not None:
        _local.notes.add(compiled, grid, args)


def give_up() -> None:
    """Say that something was launched in another way, where launches are noted."""
    if _local.notes is not None:
        _local.notes.steps = None


def memory_of(x: Tensor) -> int:
    """Return what tells the memory that a tensor views from other tensors'."""
    return x.untyped_storage().data_ptr()


def _keep(key: Hashable, steps: list[Step]) -> None:
    if sum(map(len, _kept.values())) + len(steps) > _MOST:
        _kept.clear()
    if len(steps) <= _MOST:
        _kept[key] = steps


def _traits(x: Tensor | None) -> Hashable:
    return None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % _ALIGNED)
