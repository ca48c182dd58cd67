"""Keys of compiled kernels on disk that do not depend on which kernel a process ran first.

In Triton 3.5 and 3.6 a function's key holds the constants of those functions it calls whose keys were known already:
two processes that begin with different kernels would each compile the same one. Here the keys of what a function calls
are worked out before its own. It has to be the first to ask: a key is kept as it was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def settle_key(function: Any) -> None:
    """Work out the key of a kernel, after those of all that it calls."""
    _settle(function, set())


def _settle(function: Any, met: set[int]) -> None:
    met.add(id(function))
    for one in _called(function):
        if id(one) not in met:
            _settle(one, met)
    function.cache_key  # noqa: B018 (a property that keeps what it finds)


def _called(function: Any) -> Iterator[Any]:
    """Yield the functions that one may call; those of Triton's own library call nothing of a program's."""
    names = function.fn.__globals__
    found = (names.get(name) for name in function.fn.__code__.co_names)
    # Asked of the type: asking for the key of a function works it out.
    yield from (x for x in found if hasattr(type(x), "cache_key"))
