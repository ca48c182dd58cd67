"""Patch: replace names of other packages as one, say what was replaced and what was out of reach, and put all back."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType, TracebackType
from typing import Any, NamedTuple

import torch

from headfold.contract import UnsupportedError


class PatchError(UnsupportedError):
    """What was found is not what a patch was written for, or cannot be put back; nothing was changed."""


@dataclass(frozen=True)
class Requires:
    """A package, by the module that knows its version, and the versions that a patch was written for.

    Args:
        package: name for the sentence.
        module: module with a __version__.
        at_least: first version that serves, such as "0.17".
        below: first version that no longer serves; development versions of it do not serve either.
    """

    package: str
    module: str
    at_least: str
    below: str

    def found(self) -> str:
        """Import the package and return its version."""
        try:
            return str(importlib.import_module(self.module).__version__)
        except ImportError as error:
            raise PatchError(f"{self._need}, got an import that failed: {error}.") from error
        except AttributeError:
            raise PatchError(f"{self._need}, got a {self.module} without a __version__.") from None

    def serves(self) -> bool:
        """Whether the version is within the range."""
        return _numbers(self.at_least) <= _numbers(self.found()) < _numbers(self.below)

    def check(self) -> None:
        """Refuse a version outside the range."""
        if not self.serves():
            raise PatchError(f"{self._need}, got {self.found()}.")

    @property
    def _need(self) -> str:
        return f"needs {self.package} >= {self.at_least}, < {self.below}"


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


class Status(NamedTuple):
    """What a patch holds at this moment, each name as people write it.

    applied: whether the patch is in force.   replaced: names that this patch rebound, and its hooks.   shared: names
    that another patch had rebound alike before, and that stay with that one.   displaced: names that somebody rebound
    on top of this patch.   unreached: names in other modules that were imported by value, and so still hold an original
    while the patch is applied, or a replacement after it was undone.
    """

    applied: bool
    replaced: tuple[str, ...]
    shared: tuple[str, ...]
    displaced: tuple[str, ...]
    unreached: tuple[str, ...]

    def __str__(self) -> str:
        lines = ["applied" if self.applied else "not applied"]
        for title, names in zip(self._fields[1:], self[1:], strict=True):
            lines += [f"{title}: {name}" for name in names]
        return "\n".join(lines)


@dataclass(eq=False)
class Patch:
    """Changes to other packages that are made together or not at all.

    As a context manager it is applied inside, if it was not before, and undone when the outermost `with` ends, however
    it ends. Two patches that replace a name by equal values share it: it stays with the first until that one is undone.
    Different patches of one name stack, and are undone in reverse order. Not for several threads at once.

    Args:
        name: for sentences.
        changes: what is replaced and hooked, in order; no name twice.
        requires: packages, checked before anything else.

    Raises: ValueError for a name that is to be replaced twice.
    """

    name: str
    changes: tuple[Replace | Hook, ...]
    requires: tuple[Requires, ...] = ()
    _done: list[_Edit] = field(default_factory=list, init=False, repr=False)
    _shared: tuple[str, ...] = field(default=(), init=False, repr=False)
    _past: tuple[_Edit, ...] = field(default=(), init=False, repr=False)
    _applied: bool = field(default=False, init=False)
    _depth: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse a patch that would stand in its own way."""
        labels = [change.label for change in self.changes]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"{self.name}: changes must name {label} once, got it {labels.count(label)} times.")

    def apply(self) -> Patch:
        """Check every version and signature, then make all changes or none; a second time changes nothing.

        Raises: PatchError saying what was needed and found; whatever a hook raises, after all was put back.
        """
        if self._applied:
            return self
        edits, shared = self._checked()
        done: list[_Edit] = []
        try:
            for edit in edits:
                edit.make()
                done.append(edit)
        except BaseException:  # an interrupt, too, must not leave half of the changes; it goes on its way below
            for edit in reversed(done):
                edit.revert()
            raise
        self._done, self._shared, self._applied = done, shared, True
        return self

    def undo(self) -> None:
        """Put back the exact originals, last change first; a second time changes nothing.

        Raises: PatchError, with nothing changed, where somebody rebound a name on top of this patch. What a hook
        raises, after all that could be put back was; undo again then tries what is left.
        """
        displaced = self._displaced()
        if displaced:
            raise PatchError(
                f"{self.name}: undo needs {displaced[0].label} to hold what this patch put there, got "
                f"{_brief(displaced[0].current())}. Undo what was applied later first."
            )
        self._past = tuple(self._done) or self._past
        left, failure = [], None
        while self._done:
            edit = self._done.pop()
            try:
                edit.revert()
            except Exception as error:  # noqa: BLE001 - kept, and raised once the rest is put back
                left.append(edit)
                failure = failure or error
        self._done = left[::-1]
        if failure is not None:
            raise failure
        self._shared, self._applied = (), False

    def status(self) -> Status:
        """Return what the patch holds now, and which imports by value it did not reach."""
        replaced = tuple(edit.label for edit in self._done)
        displaced = tuple(edit.label for edit in self._displaced())
        if self._applied:
            stale = [edit.original for edit in self._done if isinstance(edit, _Rebinding)]
        else:
            stale = [edit.value for edit in self._past if isinstance(edit, _Rebinding)]
        return Status(self._applied, replaced, self._shared, displaced, tuple(_holders(stale)))

    @property
    def originals(self) -> Mapping[str, object]:
        """What the replaced names held, by label; empty while not applied."""
        return MappingProxyType({e.label: e.original for e in self._done if isinstance(e, _Rebinding)})

    def __enter__(self) -> Patch:
        self.apply()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.undo()

    def _displaced(self) -> list[_Rebinding]:
        return [e for e in self._done if isinstance(e, _Rebinding) and e.current() is not e.value]

    def _checked(self) -> tuple[list[_Edit], tuple[str, ...]]:
        """Resolve all changes without making any; leave out what another patch has done already."""
        edits: list[_Edit] = []
        shared: list[str] = []
        try:
            for required in self.requires:
                required.check()
            for change in self.changes:
                if isinstance(change, Hook):
                    if change.check is not None:
                        change.check()
                    edits.append(_Registration(change))
                    continue
                edit = _Rebinding.of(change)
                if _alike(edit.original, edit.value):
                    shared.append(edit.label)
                else:
                    _check_signature(change, edit.original)
                    edits.append(edit)
        except PatchError as error:
            raise PatchError(f"{self.name}: {error}") from error.__cause__
        return edits, tuple(shared)


_ABSENT: Any = object()


@dataclass(eq=False)
class _Rebinding:
    """A name, what it held, and whether its owner held it itself or had it from a class."""

    label: str
    owner: Any
    name: str
    value: object
    original: object
    own: bool

    @classmethod
    def of(cls, change: Replace) -> _Rebinding:
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
        held = _held(self.owner, self.name)
        return getattr(self.owner, self.name, None) if held is _ABSENT else held

    def make(self) -> None:
        setattr(self.owner, self.name, self.value)

    def revert(self) -> None:
        if self.own:
            setattr(self.owner, self.name, self.original)
        else:
            delattr(self.owner, self.name)


@dataclass(eq=False)
class _Registration:
    """A hook, and what it returned."""

    hook: Hook
    kept: object = None

    @property
    def label(self) -> str:
        return self.hook.label

    def make(self) -> None:
        self.kept = self.hook.apply()

    def revert(self) -> None:
        self.hook.undo(self.kept)


_Edit = _Rebinding | _Registration


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


def _check_signature(change: Replace, original: object) -> None:
    if change.signature is None:
        return
    try:
        found = signature_of(original)
    except (TypeError, ValueError):
        found = f"{_brief(original)}, which hides what it takes"
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


def _holders(values: Iterable[object]) -> Iterator[str]:
    """Name the module globals that hold one of these values."""
    wanted = {id(value) for value in values}
    seen: set[int] = set()
    for module_name, module in sorted(sys.modules.items()):
        names = getattr(module, "__dict__", None)
        if not wanted or not isinstance(names, dict) or id(names) in seen:
            continue
        seen.add(id(names))
        yield from (f"{module_name}.{name}" for name, value in list(names.items()) if id(value) in wanted)


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release of a version: its leading numbers."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _brief(value: object) -> str:
    name = getattr(value, "__qualname__", None)
    return f"{getattr(value, '__module__', '?')}.{name}" if name else f"a {type(value).__name__}"
