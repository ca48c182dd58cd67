"""What a fold of slabs launches, kept for later calls that differ in their data alone.

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

from headfold.backends.triton.table import tried

# Steps that are kept, each with all of its arguments: a selection of many rows has hundreds, a loss of them thousands.
_MOST = 1 << 15
# Whether pointers or integers are multiples of this is compiled into kernels.
ALIGNED = 16


class Launch(NamedTuple):
    """start(*args, stream=…).   pointers: (at, tensor, offset), where args[at] is so many bytes into a tensor."""

    start: Callable[..., None]
    args: list[Any]
    pointers: tuple[tuple[int, int, int], ...]


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


class Done(NamedTuple):
    """What torch does to views of tensors: function(*views)."""

    function: Callable[..., None]
    views: list[View]


Steps = list[Launch | Done]


class Notes:
    """What one call does to its tensors.

    steps: None where it cannot be done again by pointers alone, or has more steps than are kept.
    """

    def __init__(self, tensors: Sequence[Tensor | None], most: int) -> None:
        self.places, self.most = _places(tensors), most
        self.steps: Steps | None = []

    def add(self, compiled: Any, grid: tuple[int, ...], args: Sequence[Any]) -> None:
        """Note a launch of a compiled kernel with all of its arguments."""
        steps = self._room()
        if steps is None:
            return
        pointers = []
        for at, x in enumerate(args):
            if isinstance(x, Tensor) and x.numel() > 0:
                found = self._found(x)
                if found is None:
                    return
                pointers.append((at, *found))
        numbers = [0 if isinstance(x, Tensor) else x for x in args]
        steps.append(Launch(compiled[grid], numbers, tuple(pointers)))

    def add_call(self, function: Callable[..., None], args: Sequence[Tensor]) -> None:
        """Note what torch did to tensors, none of them empty."""
        steps = self._room()
        if steps is None:
            return
        views = []
        for x in args:
            found = self._found(x)
            if found is None:
                return
            views.append(View(*found, x.dtype, x.shape, x.stride()))
        steps.append(Done(function, views))

    def _room(self) -> Steps | None:
        """Return the steps, where there may be one more of them."""
        if self.steps is not None and _size(self.steps) >= self.most:
            self.steps = None
        return self.steps

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
        self.most, self.size = most, 0
        self.steps: dict[Hashable, Steps | None] = {}
        self.lock = threading.Lock()

    def take(self, key: Hashable) -> tuple[bool, Steps | None]:
        """Return whether a key was met before, and its steps, which are no longer kept."""
        with self.lock:
            met = key in self.steps
            steps = self.steps.pop(key, None)
            self.size -= _size(steps) if met else 0
        return met, steps

    def put(self, key: Hashable, steps: Steps | None) -> None:
        """Keep the steps of a key, and let go of those that were not used for longest where there are too many."""
        with self.lock:
            self.size += _size(steps) - (_size(self.steps[key]) if key in self.steps else 0)
            self.steps[key] = steps
            while self.size > self.most:
                self.size -= _size(self.steps.pop(next(iter(self.steps))))


def _size(steps: Steps | None) -> int:
    return 1 + len(steps or ())


_local = _Local()
_kept = _Kept(_MOST)


def replay(run: Callable[[], None], key: Hashable, *tensors: Tensor | None) -> None:
    """Run what does nothing but launch kernels, and `do`, on `tensors` of one device, or do again what it did before.

    key: everything that the steps follow from beside the table of tiles, and the tensors' dtypes, shapes, strides,
    alignment and places in memory that they share.
    """
    if _local.notes is not None:  # which are of all of it
        run()
        return
    first = next(x for x in tensors if x is not None)
    key = key, first.device, tried(), _apart(tensors), *map(_traits, tensors)
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
        for step in steps:
            if isinstance(step, Done):
                step.function(*[view.of(tensors) for view in step.views])
                continue
            args = [*step.args]
            for at, tensor, offset in step.pointers:
                args[at] = bases[tensor] + offset
            step.start(*args, stream=stream)


def _noted(run: Callable[[], None], tensors: Sequence[Tensor | None]) -> Steps | None:
    """Run and return what was done, or None where that is not all there is to it."""
    _local.notes = Notes(tensors, _kept.most)
    try:
        run()
        return _local.notes.steps
    finally:
        _local.notes = None


def do(function: Callable[..., None], *tensors: Tensor) -> None:
    """Call function(*tensors), unless one is empty; what it does may follow from nothing but their kinds and data."""
    if any(x.numel() == 0 for x in tensors):
        return
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
    """Return which tensor is the first in the memory of each, and how far it lies from that: pointers tell no more."""
    places, found = _places(tensors), []
    for x in tensors:
        if x is not None and x.numel() > 0:
            first, begin = places[_memory_of(x)]
            found.append((first, x.data_ptr() - begin))
    return tuple(found)


def _traits(x: Tensor | None) -> Hashable:
    return None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % ALIGNED)
