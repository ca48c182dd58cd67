"""The launches of a fold, kept for later calls that differ in their data alone.

A fold of many slabs asks its plan, views its tensors and tells its kernels apart before every launch: more work for
the host than a slab is for the device. All of it follows from shapes, strides and options, so the second call of a kind
notes what it launches, and what torch does in between, and later ones do that again, with every pointer as far into its
tensor as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Launches that are kept, each with all of its arguments: enough for some ninety calls of 32768 rows.
_MOST = 1 << 14
# Whether pointers or integers are multiples of this is compiled into kernels.
ALIGNED = 16


class Step(NamedTuple):
    """A launch: start(*args, stream=…).   pointers: (at, tensor, offset), where args[at] is so many bytes into one.

    Without pointers what torch does: start(*args), where args are views.
    """

    start: Callable[..., None]
    args: list[Any]
    pointers: tuple[tuple[int, int, int], ...] | None


class View(NamedTuple):
    """A tensor that begins so many bytes into another one."""

    tensor: int
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]

    def of(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return this view of one of the tensors."""
        base = tensors[self.tensor]
        assert base is not None
        memory = base.untyped_storage()
        begin = base.data_ptr() - memory.data_ptr() + self.offset
        view = torch.empty(0, dtype=self.dtype, device=base.device)
        return view.set_(memory, begin // self.dtype.itemsize, self.shape, self.strides)


class Notes:
    """What one call launches on its tensors.

    steps: None where it cannot be launched again by pointers alone.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.places = _places(tensors)
        self.steps: list[Step] | None = []

    def add(self, compiled: Any, grid: tuple[int, ...], args: Sequence[Any]) -> None:
        """Note a launch of a compiled kernel with all of its arguments."""
        if self.steps is None:
            return
        pointers = []
        for at, x in enumerate(args):
            if isinstance(x, Tensor) and x.numel() > 0:
                found = self._found(x)
                if found is None:
                    return
                pointers.append((at, *found))
        numbers = [0 if isinstance(x, Tensor) else x for x in args]
        self.steps.append(Step(compiled[grid], numbers, tuple(pointers)))

    def add_call(self, function: Callable[..., None], args: Sequence[Tensor]) -> None:
        """Note what torch did to tensors."""
        if self.steps is None or any(x.numel() == 0 for x in args):
            return
        found = [self._found(x) for x in args]
        views = [View(*at, x.dtype, x.shape, x.stride()) for x, at in zip(args, found, strict=True) if at is not None]
        if self.steps is not None:
            self.steps.append(Step(function, views, None))

    def _found(self, x: Tensor) -> tuple[int, int] | None:
        """Return which tensor's memory x views, and how many bytes behind its start; or note that it is none's."""
        found = self.places.get(_memory_of(x))
        if found is None:
            self.steps = None
            return None
        return found[0], x.data_ptr() - found[1]


class _Local(threading.local):
    notes: Notes | None = None


class _Kept:
    """Steps by key, the last used last, and None where a key was met once or its call cannot be launched again."""

    def __init__(self, most: int) -> None:
        self.most, self.launches = most, 0
        self.steps: dict[Hashable, list[Step] | None] = {}
        self.lock = threading.Lock()

    def take(self, key: Hashable) -> tuple[bool, list[Step] | None]:
        """Return whether a key was met before, and its steps, which are no longer kept."""
        with self.lock:
            met = key in self.steps
            steps = self.steps.pop(key, None)
            self.launches -= _size(steps) if met else 0
        return met, steps

    def put(self, key: Hashable, steps: list[Step] | None) -> None:
        """Keep the steps of a key, and let go of those that were not used for longest where there are too many."""
        with self.lock:
            self.launches += _size(steps) - (_size(self.steps[key]) if key in self.steps else 0)
            self.steps[key] = steps
            while self.launches > self.most:
                self.launches -= _size(self.steps.pop(next(iter(self.steps))))


def _size(steps: list[Step] | None) -> int:
    return 1 + len(steps or ())


_local = _Local()
_kept = _Kept(_MOST)


def replay(run: Callable[[], None], key: Hashable, *tensors: Tensor | None) -> None:
    """Run what does nothing but launch kernels, and `do`, on `tensors` of one device, or do again what it did before.

    key: everything that the launches follow from beside the tensors' dtypes, shapes, strides and alignment.
    """
    first = next(x for x in tensors if x is not None)
    key = key, first.device, _apart(tensors), *map(_traits, tensors)
    with torch.cuda.device_of(first):
        met, steps = _kept.take(key)
        if not met:  # nor may it be again, as where keys grow by one with every call
            _kept.put(key, None)
            run()
            return
        if steps is None:
            _kept.put(key, _noted(run, tensors))
            return
        _kept.put(key, steps)
        bases = [0 if x is None else x.data_ptr() for x in tensors]
        stream = torch.cuda.current_stream(first.device).cuda_stream
        for start, args, pointers in steps:
            if pointers is None:
                start(*[view.of(tensors) for view in args])
                continue
            args = [*args]
            for at, tensor, offset in pointers:
                args[at] = bases[tensor] + offset
            start(*args, stream=stream)


def _noted(run: Callable[[], None], tensors: Sequence[Tensor | None]) -> list[Step] | None:
    """Run and return what was launched, or None where that is not all there is to it."""
    outer, _local.notes = _local.notes, Notes(tensors)
    try:
        run()
        return _local.notes.steps
    finally:
        _local.notes = outer


def do(function: Callable[..., None], *tensors: Tensor) -> None:
    """Call function(*tensors), which returns nothing, does the same to all tensors alike, and nothing to empty ones."""
    function(*tensors)
    if _local.notes is not None:
        _local.notes.add_call(function, tensors)


def note(compiled: Any, grid: tuple[int, ...], args: Sequence[Any]) -> None:
    """Note a launch, where they are noted."""
    if _local.notes is not None:
        _local.notes.add(compiled, grid, args)


def give_up() -> None:
    """Say that something was launched in another way, where launches are noted."""
    if _local.notes is not None:
        _local.notes.steps = None


def _memory_of(x: Tensor) -> int:
    """Return what tells the memory that a tensor views from other tensors'."""
    return x.untyped_storage().data_ptr()


def _places(tensors: Sequence[Tensor | None]) -> dict[int, tuple[int, int]]:
    """Return of each memory the first of the tensors that are in it, and where that one begins."""
    places: dict[int, tuple[int, int]] = {}
    for i, x in enumerate(tensors):
        if x is not None and x.numel() > 0:
            places.setdefault(_memory_of(x), (i, x.data_ptr()))
    return places


def _apart(tensors: Sequence[Tensor | None]) -> Hashable:
    """Return how far tensors lie from the first in the same memory: a pointer does not say which of them it is into."""
    places, found = _places(tensors), []
    for i, x in enumerate(tensors):
        if x is not None and x.numel() > 0:
            first, begin = places[_memory_of(x)]
            if first != i:
                found.append((i, first, x.data_ptr() - begin))
    return tuple(found)


def _traits(x: Tensor | None) -> Hashable:
    return None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % ALIGNED)
