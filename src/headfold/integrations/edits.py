"""What a patch is made of: names to rebind and hooks, how each is made and reverted, and what it checks before."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakSet

import torch

from headfold.contract import UnsupportedError


class PatchError(UnsupportedError):
    """What was found is not what a patch was written for, and nothing was changed; or some of it cannot be put back."""


@dataclass(frozen=True, eq=False)
class Replace:
    """One name that is rebound.

    Args:
        owner: a module, a class or an instance; or its path, "package.module" or "package.module:Class".
        name: the attribute. An inherited one is shadowed, and uncovered again by undo.
        value: what takes its place, as it is: a static method comes wrapped in staticmethod.
        signature: what the target has to take, without annotations, such as "(q, k, scale=1.0)"; for an autograd
            function that of its forward, without ctx. None checks nothing.
    """

    owner: object
    name: str
    value: object
    signature: str | None = None

    @property
    def label(self) -> str:
        """Name the binding for people."""
        if isinstance(self.owner, str):
            return f"{self.owner.replace(':', '.')}.{self.name}"
        if isinstance(self.owner, ModuleType):
            return f"{self.owner.__name__}.{self.name}"
        if isinstance(self.owner, type):
            return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"
        return f"{type(self.owner).__qualname__} at {id(self.owner):#x}.{self.name}"


@dataclass(frozen=True, eq=False)
class Hook:
    """A change that is not a rebinding, such as an entry in a registry.

    Args:
        label: name for people.
        apply: makes the change and returns what undo needs.
        undo: takes that and reverts the change.
        check: raises PatchError where the change cannot be made; runs before anything is changed.
    """

    label: str
    apply: Callable[[], object]
    undo: Callable[[Any], None]
    check: Callable[[], None] | None = None


_ABSENT: Any = object()
# What is replaced is a state of the process: here equal patches of a name find each other. Weak, so that a patch that
# nobody holds any more keeps no model alive.
_IN_FORCE: WeakSet[Rebinding] = WeakSet()


@dataclass(eq=False)
class Rebinding:
    """A name, what it held, whether its owner held it itself or had it from a class, and how many patches hold it."""

    label: str
    owner: Any
    name: str
    value: object
    original: object
    own: bool
    holders: int = 0

    @classmethod
    def of(cls, change: Replace) -> Rebinding:
        """Find the owner and what it holds; raises PatchError where there is none."""
        owner = _resolve(change.owner) if isinstance(change.owner, str) else change.owner
        original = _held(owner, change.name)
        own = original is not _ABSENT
        if not own:
            original = inspect.getattr_static(owner, change.name, _ABSENT)
            if original is _ABSENT or hasattr(original, "__set__"):
                # What the owner makes up, as torch's modules do their submodules, or keeps behind a property.
                original, own = getattr(owner, change.name, _ABSENT), True
            if original is _ABSENT:
                raise PatchError(f"needs {change.label}, got no such name.")
        return cls(change.label, owner, change.name, change.value, original, own)

    def current(self) -> object:
        """Return what the name holds now."""
        held = _held(self.owner, self.name)
        return getattr(self.owner, self.name, None) if held is _ABSENT else held

    @property
    def displaced(self) -> bool:
        """Whether somebody rebound the name since."""
        return self.current() is not self.value

    def in_force(self) -> Rebinding | None:
        """Return the rebinding of an equal patch that the name holds now."""
        return next(
            (
                other
                for other in _IN_FORCE
                if other.owner is self.owner
                and other.name == self.name
                and not other.displaced
                and _alike(other.value, self.value)
            ),
            None,
        )

    def make(self) -> None:
        """Rebind the name for the first patch that holds it."""
        if self.holders == 0:
            setattr(self.owner, self.name, self.value)
            _IN_FORCE.add(self)
        self.holders += 1

    def revert(self) -> None:
        """Put the original back for the last patch that held it."""
        if self.holders == 1:
            if self.own:
                setattr(self.owner, self.name, self.original)
            else:
                delattr(self.owner, self.name)
            _IN_FORCE.discard(self)
        self.holders -= 1


@dataclass(eq=False)
class Registration:
    """A hook, and what it returned."""

    hook: Hook
    kept: object = None

    @property
    def label(self) -> str:
        """Name the hook for people."""
        return self.hook.label

    def make(self) -> None:
        """Run the hook."""
        self.kept = self.hook.apply()

    def revert(self) -> None:
        """Undo the hook."""
        self.hook.undo(self.kept)


Edit = Rebinding | Registration


def signature_of(target: object) -> str:
    """Return what a callable takes, without annotations; for an autograd function its forward's, without ctx."""
    target = getattr(target, "__func__", target) if isinstance(target, (staticmethod, classmethod)) else target
    if isinstance(target, type) and issubclass(target, torch.autograd.Function):
        parameters = list(inspect.signature(target.forward).parameters.values())[1:]
    elif callable(target):
        parameters = list(inspect.signature(target).parameters.values())
    else:
        return f"a {type(target).__name__}"
    return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))


def _alike(held: object, value: object) -> bool:
    return held is value or (type(held) is type(value) and callable(value) and bool(held == value))


def check_signature(change: Replace, original: object) -> None:
    """Refuse a target that takes something else than a change says."""
    if change.signature is None:
        return
    try:
        found = signature_of(original)
    except (TypeError, ValueError):
        found = f"{brief(original)}, which hides what it takes"
    if found != change.signature:
        raise PatchError(f"needs {change.label} to take {change.signature}, got {found}.")


def _held(owner: Any, name: str) -> Any:
    """Return what the owner itself holds under a name, unbound, or _ABSENT."""
    return getattr(owner, "__dict__", {}).get(name, _ABSENT)


def _resolve(path: str) -> object:
    """Import "package.module" or "package.module:Class"."""
    module, _, inner = path.partition(":")
    try:
        owner: Any = importlib.import_module(module)
    except ImportError as error:
        raise PatchError(f"needs the module {module}, got an import that failed: {error}.") from error
    for name in filter(None, inner.split(".")):
        owner = getattr(owner, name, _ABSENT)
        if owner is _ABSENT:
            raise PatchError(f"needs {name} in {module}, got no such name.")
    return owner


def brief(value: object) -> str:
    """Name a value for people."""
    name = getattr(value, "__qualname__", None)
    return f"{getattr(value, '__module__', '?')}.{name}" if name else f"a {type(value).__name__}"
