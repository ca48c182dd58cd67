"""FLOP formulas for torch's counter, given to it when it is imported: that imports Triton, or warns that there is none.

They have to be there before a counter is made, which copies what is registered then: a first call would be too late.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"
Formula = Callable[..., int]

_waiting: list[tuple[Any, Formula]] = []


def counted(op: Any) -> Callable[[Formula], Formula]:
    """Return a decorator that makes a function the FLOP formula of an op."""

    def keep(formula: Formula) -> Formula:
        _waiting.append((op, formula))
        if COUNTER in sys.modules:
            _register(sys.modules[COUNTER])
        return formula

    return keep


def _register(counter: ModuleType) -> None:
    while _waiting:
        op, formula = _waiting.pop()
        counter.register_flop_formula(op)(formula)


class _Finder(MetaPathFinder):
    """Finds the counter with a loader that registers what waits for it."""

    looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self)
        return spec


class _Registering(Loader):
    """Loads the counter by its own loader, which the module then names, and registers what waits for it."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Finder())
