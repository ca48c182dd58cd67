"""Patch: replace names of other packages as one, say what was replaced and what was out of reach, and put all back."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import NamedTuple

from headfold.integrations.edits import (
    Edit,
    Hook,
    PatchError,
    Rebinding,
    Registration,
    Replace,
    brief,
    check_signature,
    signature_of,
)

__all__ = ["Hook", "Patch", "PatchError", "Replace", "Requires", "Status", "signature_of"]


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

    def holds(self, version: str) -> bool:
        """Whether a version is within the range."""
        return _numbers(self.at_least) <= _numbers(version) < _numbers(self.below)

    def check(self, op: str | None = None) -> str:
        """Import the package and return its version, or refuse one outside the range in the name of op."""
        need = f"{'' if op is None else f'{op}: '}needs {self.package} >= {self.at_least}, < {self.below}"
        try:
            version = str(importlib.import_module(self.module).__version__)
        except ImportError as error:
            raise PatchError(f"{need}, got an import that failed: {error}.") from error
        except AttributeError:
            raise PatchError(f"{need}, got a {self.module} without a __version__.") from None
        if not self.holds(version):
            raise PatchError(f"{need}, got {version}.")
        return version


class Status(NamedTuple):
    """What a patch holds at this moment, each name as people write it.

    applied: whether the patch is in force, be it in part.   replaced: names that it holds rebound, and its hooks.
    shared: those of them that an equal patch holds as well, and that stay until both are undone.   displaced: those
    that somebody rebound on top.   unreached: names in other modules that were imported by value, and so still hold an
    original while the patch is applied, or a replacement after it was undone.
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
    it ends; where an error ends it, what could not be put back is a warning, and the error goes on. Patches that
    replace a name by equal values share it: it stays replaced until the last of them is undone, in any order. Different
    patches of one name stack, and are undone in reverse order. Not for several threads at once.

    Args:
        name: for sentences.
        changes: what is replaced and hooked, in order; no name twice.
        requires: packages, checked before anything else.

    Raises: ValueError for a name that is to be replaced twice.
    """

    name: str
    changes: tuple[Replace | Hook, ...]
    requires: tuple[Requires, ...] = ()
    _done: list[Edit] = field(default_factory=list, init=False, repr=False)
    _past: tuple[Edit, ...] = field(default=(), init=False, repr=False)
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

        Raises: PatchError saying what was needed and found, or that an undo left a part behind; whatever a hook raises,
        after all was put back.
        """
        if self._applied:
            if len(self._done) < len(self._past):
                left = ", ".join(edit.label for edit in self._done)
                raise PatchError(f"{self.name}: apply needs a patch that was undone, got one that still holds {left}.")
            return self
        edits = self._checked()
        done: list[Edit] = []
        try:
            for edit in edits:
                edit.make()
                done.append(edit)
        except BaseException:  # an interrupt, too, must not leave half of the changes; it goes on its way below
            for edit in reversed(done):
                edit.revert()
            raise
        self._done, self._past, self._applied = done, tuple(done), True
        return self

    def undo(self) -> None:
        """Put back the exact originals, last change first; a second time changes nothing.

        Raises, after all that can be put back was: PatchError naming what somebody rebound on top of this patch, or
        what a hook raised. Undo again then tries what is left.
        """
        left: list[Edit] = []
        displaced: list[Rebinding] = []
        failure: Exception | None = None
        while self._done:
            edit = self._done.pop()
            if isinstance(edit, Rebinding) and edit.holders == 1 and edit.displaced:
                displaced.append(edit)
                left.append(edit)
                continue
            try:
                edit.revert()
            except Exception as error:  # noqa: BLE001 - kept, and raised once the rest is put back
                left.append(edit)
                failure = failure or error
        self._done, self._applied = left[::-1], bool(left)
        if displaced:
            names = ", ".join(edit.label for edit in displaced[::-1])
            raise PatchError(
                f"{self.name}: undo needs {names} to hold what this patch put there, got "
                f"{brief(displaced[-1].current())}. The rest is put back. Undo what was applied later, then this again."
            ) from failure
        if failure is not None:
            raise failure

    def status(self) -> Status:
        """Return what the patch holds now, and which imports by value it did not reach."""
        names = [edit for edit in self._done if isinstance(edit, Rebinding)]
        if self._applied:
            stale = [edit.original for edit in names]
        else:  # a replacement that an equal patch holds is where it belongs
            stale = [edit.value for edit in self._past if isinstance(edit, Rebinding) and edit.holders == 0]
        return Status(
            applied=self._applied,
            replaced=tuple(edit.label for edit in self._done),
            shared=tuple(edit.label for edit in names if edit.holders > 1),
            displaced=tuple(edit.label for edit in names if edit.displaced),
            unreached=tuple(_holders(stale)),
        )

    @property
    def originals(self) -> Mapping[str, object]:
        """What the replaced names held, by label; empty while not applied."""
        return MappingProxyType({e.label: e.original for e in self._done if isinstance(e, Rebinding)})

    def __enter__(self) -> Patch:
        self.apply()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        try:
            self.undo()
        except Exception as failure:  # whatever a hook raises must not hide the block's own error: it is warned of
            if error is None:
                raise
            warnings.warn(str(failure), RuntimeWarning, stacklevel=2)

    def _checked(self) -> list[Edit]:
        """Resolve all changes without making any; a name that an equal patch holds is the rebinding of that one."""
        for required in self.requires:
            required.check(self.name)
        edits: list[Edit] = []
        try:
            for change in self.changes:
                if isinstance(change, Hook):
                    if change.check is not None:
                        change.check()
                    edits.append(Registration(change))
                    continue
                edit = Rebinding.of(change)
                equal = edit.in_force()
                if equal is None:
                    check_signature(change, edit.original)
                edits.append(equal or edit)
        except PatchError as error:
            raise PatchError(f"{self.name}: {error}") from error.__cause__
        return edits


# Equal values of these are one object, whoever holds them.
_NOBODYS = (type(None), int, float, complex, str, bytes, tuple, frozenset)


def _holders(values: Iterable[object]) -> Iterator[str]:
    """Name the module globals that hold one of these values, where holding it says where it came from."""
    bare = (value.__func__ if isinstance(value, (staticmethod, classmethod)) else value for value in values)
    wanted = {id(value) for value in bare if not isinstance(value, _NOBODYS)}
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
