"""Scores that are computed when somebody reads them: what layers drop unread then takes neither memory nor time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from headfold.contract import wants_grad

# What can be asked without reading: shape, dtype and device are known from the start.
_KNOWN = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad")),
}


def offered(scores: Callable[[], Tensor], shape: tuple[int, ...], *sources: Tensor | None, now: bool) -> Tensor:
    """Return float32 scores [b, sq, sk], computed now, or where nothing records them when they are first read.

    Args:
        scores: makes them.
        shape: of them.
        sources: tensors that they are made from.
        now: whether to compute at once, as is done too where gradients or a compiler record what happens.
    """
    if now or wants_grad(*sources) or torch.compiler.is_compiling():
        return scores()
    return Deferred(scores, shape, [x for x in sources if x is not None])


class Deferred(Tensor):
    """A float32 tensor without memory that becomes an ordinary one as soon as an operation takes it.

    It keeps what it is made from alive until then. What was changed in place in between is noticed and refused, except
    for inference tensors, which do not count their changes.
    """

    _scores: Tensor | None
    _make: Callable[[], Tensor] | None
    _sources: list[tuple[Tensor, int | None]]

    @staticmethod
    def __new__(cls, make: Callable[[], Tensor], shape: tuple[int, ...], sources: list[Tensor]) -> Deferred:
        """Make the shape, of no storage."""
        made: Deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=sources[0].device)
        return made

    def __init__(self, make: Callable[[], Tensor], shape: tuple[int, ...], sources: list[Tensor]) -> None:
        """Keep the recipe, and how often its sources were changed so far."""
        self._scores, self._make = None, make
        self._sources = [(x, _changes(x)) for x in sources]

    def read(self) -> Tensor:
        """Return the scores, the same tensor each time.

        Raises: RuntimeError where a source was changed in place since.
        """
        if self._scores is None:
            assert self._make is not None
            if any(_changes(x) != before for x, before in self._sources):
                raise RuntimeError(
                    "fused_qk_topk_naive: scores must be read before q, weights, k or mask is changed in place, got a "
                    "change. headfold.integrations.megatron.apply(keep_scores=True) computes them at once."
                )
            with torch.no_grad():
                self._scores = self._make()
            self._make, self._sources = None, []
        return self._scores

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what is known; run everything else on the scores."""
        if func in _KNOWN:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        args, kwargs = tree_map_only(Deferred, Deferred.read, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run on the scores what came past Python."""
        args, kwargs = tree_map_only(Deferred, Deferred.read, (args, kwargs or {}))
        return func(*args, **kwargs)


def _changes(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
