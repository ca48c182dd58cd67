"""Lane: rows with a verdict, one form for the terminal, for markdown and for JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import humanize

T = TypeVar("T")
Row = dict[str, Any]
Kind = Literal["text", "bytes", "seconds", "ratio", "share", "number"]
Track = Callable[[Sequence[T], str], Iterable[T]]

PASS, FAIL, SKIP, INFO = "pass", "fail", "not run", ""


@dataclass(frozen=True)
class Column:
    """One column: the row's key, what people call it, and how its values read."""

    key: str
    title: str
    kind: Kind = "text"


@dataclass
class Lane:
    """The answer to one question: rows, the notes that go with them, and a verdict.

    Each row may hold "verdict": pass, fail, "not run" (with "note" saying why) or nothing where there is no claim to
    judge.
    """

    name: str
    question: str
    columns: tuple[Column, ...]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no row failed."""
        return all(row.get("verdict") != FAIL for row in self.rows)

    @property
    def verdict(self) -> str:
        """The lane's verdict in a sentence."""
        counts = {word: sum(row.get("verdict") == word for row in self.rows) for word in (PASS, FAIL, SKIP)}
        said = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
        return said or "nothing to judge"

    def filled_columns(self) -> list[Column]:
        """Return the columns that any row has a value for."""
        return [column for column in self.columns if any(row.get(column.key) not in (None, "") for row in self.rows)]

    def cells(self) -> list[list[str]]:
        """Return every row as text, in the order of the filled columns."""
        columns = self.filled_columns()
        return [[show(row.get(column.key), column.kind) for column in columns] for row in self.rows]

    def to_json(self) -> dict[str, Any]:
        """Return the lane as JSON types; JSON has no infinities, so those are text."""
        rows = [{key: _plain(value) for key, value in row.items()} for row in self.rows]
        return {**asdict(self), "rows": rows, "passed": self.passed}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def show(value: Any, kind: Kind) -> str:
    """Format one value for people."""
    if value is None:
        return ""
    if kind == "bytes":
        return show_bytes(value)
    if kind == "seconds":
        return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
    if kind == "ratio":
        return f"{value:.3g}"
    if kind == "share":  # rounded down, so that only all is 1
        return f"{math.floor(value * 1e6) / 1e6:g}"
    if kind == "number":
        return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    return str(value)


def show_bytes(count: int) -> str:
    """Format bytes with binary units."""
    return humanize.naturalsize(count, binary=True, format="%.4g")


def show_facts(facts: dict[str, Any]) -> dict[str, str]:
    """Format an environment for people: its byte counts with units."""
    return {
        name.removesuffix("_bytes").replace("_", " "): show_bytes(value) if name.endswith("_bytes") else str(value)
        for name, value in facts.items()
    }


def no_track(items: Sequence[T], _: str) -> Iterable[T]:
    """Track nothing."""
    return items
