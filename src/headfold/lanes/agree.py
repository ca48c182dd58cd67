"""The agreement lane: how far two selections of the same rows agree, and how many rows tie exactly at the cut."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headfold.agreement import selection_agreement
from headfold.keyrange import KeyRange
from headfold.lanes.problem import Problem, from_file
from headfold.lanes.record import FAIL, PASS, Column, Lane, Row, Track, no_track
from headfold.selection import index_topk
from headfold.selection_record import SelectionRecord

COLUMNS = (
    Column("a", "a"),
    Column("b", "b"),
    Column("topk", "topk", "number"),
    Column("rows", "rows", "number"),
    Column("rows_agree", "rows that agree", "share"),
    Column("members_agree", "members that agree", "share"),
    Column("worst", "worst row's members", "share"),
    Column("worst_row", "worst row"),
    Column("ties_a", "tied at a's cut", "number"),
    Column("ties_b", "tied at b's cut", "number"),
    Column("verdict", "verdict"),
    Column("note", "note"),
)
NEG_INF = float("-inf")


@dataclass(frozen=True)
class Side:
    """One of two selections: saved, or made by scoring a problem's tensors.

    record, problem: the one or the other.   tensors: the dtype that the problem's tensors are made or read in.
    dtype: what they are rounded to before they are scored; both None take the tensors as they are.
    """

    name: str
    record: SelectionRecord | None = None
    problem: Problem | None = None
    tensors: torch.dtype | None = None
    dtype: torch.dtype | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """b, sq and sk."""
        if self.record is not None:
            return (self.record.indices.shape[0], self.record.indices.shape[1], self.record.sk)
        assert self.problem is not None
        g = self.problem.geometry
        return g.b, g.sq, g.sk

    @property
    def width(self) -> int:
        """The topk that it comes with; 0 when it leaves that open."""
        if self.record is not None:
            return self.record.indices.shape[2]
        assert self.problem is not None
        return self.problem.geometry.topk


class Selected(NamedTuple):
    """A side's indices [b, sq, topk], and which rows [b, sq] tie at the cut; None where the scores are not known."""

    indices: Tensor
    tied: Tensor | None


def from_files(first: Path, second: Path) -> tuple[Side, Side]:
    """Read two files, each a saved selection or a capture with q, weights and k."""
    return _read(first), _read(second)


def at_dtypes(problem: Problem, first: torch.dtype, second: torch.dtype) -> tuple[Side, Side]:
    """Return one problem's tensors rounded to two dtypes: made or read in the wider one, then rounded to each."""
    wide = torch.promote_types(first, second)
    names = (str(dtype).removeprefix("torch.") for dtype in (first, second))
    one, two = (
        Side(name, problem=problem, tensors=wide, dtype=dtype)
        for name, dtype in zip(names, (first, second), strict=True)
    )
    return one, two


def agree(
    sides: tuple[Side, Side],
    device: torch.device,
    *,
    topk: int | None = None,
    at_least: float | None = None,
    track: Track[Any] = no_track,
) -> Lane:
    """Select on both sides where that is still to do, and compare row by row, as sets.

    topk: keys to keep; None takes the width that the sides come with. A saved selection is cut to it, best first.
    at_least: the share of members that has to agree for a verdict of pass; None judges nothing.

    Raises: ValueError for sides of different rows or keys, or a width that neither side gives or can give.
    """
    a, b = sides
    for name, mine, theirs in zip(("b", "sq", "sk"), a.sizes, b.sizes, strict=True):
        if mine != theirs:
            raise ValueError(
                f"agree: both sides must have one {name}, got {mine} in {a.name} and {theirs} in {b.name}."
            )
    width = _width(a, b, topk)
    one, two = (_select(side, width, device) for side in track(sides, "agree, selecting"))
    found = selection_agreement(one.indices, two.indices)
    row: Row = {
        "a": a.name,
        "b": b.name,
        "topk": width,
        "rows": found.equal.numel(),
        "rows_agree": float(found.rows),
        "members_agree": float(found.members),
    }
    if found.equal.numel():
        worst = int(found.per_row.argmin())
        row["worst"] = float(found.per_row.flatten()[worst])
        row["worst_row"] = str(list(divmod(worst, found.equal.shape[1])))
    for name, tied in (("ties_a", one.tied), ("ties_b", two.tied)):
        row[name] = None if tied is None else int(tied.sum())
    if at_least is not None:
        row["verdict"] = PASS if row["members_agree"] >= at_least else FAIL
        row["note"] = f"at least {at_least:g} of the members asked for"
    lane = Lane("agree", "How far do two selections of the same rows agree?", COLUMNS, [row])
    lane.notes = [*_meaning(a, b), *_ties(one, two, ~found.equal), *_doubts(a, b, width)]
    return lane


def _read(path: Path) -> Side:
    from safetensors import SafetensorError, safe_open

    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                saved = "indices" in file.keys()  # noqa: SIM118 - no dict
        except (SafetensorError, OSError):
            saved = False
        if saved:
            return Side(path.name, record=SelectionRecord.load(path))
    return Side(path.name, problem=from_file(path, "agree"))


def _width(a: Side, b: Side, topk: int | None) -> int:
    given = {side.width for side in (a, b) if side.width}
    if topk is None and len(given) != 1:
        got = f"{a.width} and {b.width}" if given else "none from the inputs"
        raise ValueError(f"--topk: needs the number of keys to compare, got {got}.")
    width = given.pop() if topk is None else topk
    for side in (a, b):
        if side.record is not None and side.width < width:
            raise ValueError(f"--topk: must be at most the width of {side.name}, {side.width}, got {width}.")
    return width


def _select(side: Side, topk: int, device: torch.device) -> Selected:
    if side.record is not None:
        return Selected(side.record.indices[..., :topk].to(device), None)
    problem = side.problem
    assert problem is not None
    q, weights, k = problem.tensors(device, side.tensors)
    if side.dtype is not None:
        q, weights, k = (x.to(side.dtype) for x in (q, weights, k))
    # One key more than asked for: whether it ties with the last one is what the cut hides.
    call: dict[str, Any] = {"causal": problem.causal, "scale": problem.scale}
    indices, scores = index_topk(q, weights, k, topk + 1, with_scores=True, **call)
    assert scores is not None
    last, next_ = scores[..., topk - 1], scores[..., topk]
    tied = (indices[..., topk] >= 0) & ((last == next_) | (last.isnan() & next_.isnan()))
    return Selected(indices[..., :topk], tied)


def _meaning(a: Side, b: Side) -> list[str]:
    notes = [
        "Rows agree when they hold the same keys, in any order. Members: 2 · |a ∩ b| / (|a| + |b|), over all rows; "
        "the worst row is the first with the least of it."
    ]
    if a.tensors is not None and a.problem is not None:
        wide = str(a.tensors).removeprefix("torch.")
        notes.append(f"Tensors: {a.problem.source}.")
        notes.append(
            f"q, weights and k are taken in {wide}, rounded to each dtype, and scored by the same op in its compute "
            "dtype (float64 for float64, float32 for the others): what differs is the rounding of the inputs and the "
            "order of sums."
        )
        held = getattr(torch, a.problem.geometry.dtype)
        dtypes = [side.dtype for side in (a, b) if side.dtype is not None]
        if a.problem.path is not None and all(torch.promote_types(held, dtype) == dtype for dtype in dtypes):
            notes.append(f"The capture holds {a.problem.geometry.dtype}, so no value is rounded on either side.")
    return notes


def _ties(one: Selected, two: Selected, differ: Tensor) -> list[str]:
    known = [side.tied for side in (one, two) if side.tied is not None]
    if not known:
        return ["Ties at the cut need scores beyond it, which a saved selection does not hold."]
    both = int((differ & torch.stack(known).any(0)).sum())
    return [
        "A row ties at the cut when the best key left out scores exactly what the last one kept does; ties go to the "
        f"smaller key. Of {int(differ.sum()):,} rows that differ, {both:,} tie at a cut."
    ]


def _doubts(a: Side, b: Side, topk: int) -> list[str]:
    """What makes the figures say less than they seem to."""
    notes = []
    if topk >= a.sizes[2]:
        notes.append(f"topk = {topk} keeps every one of the {a.sizes[2]} keys that a row sees; give a smaller --topk.")
    if a.problem is None or b.problem is None:
        record, other = (a.record, b) if a.record is not None else (b.record, a)
        assert record is not None
        try:
            record.rebind(_range(other))
        except ValueError as error:
            notes.append(f"The two sides may not see the same keys: {error}")
    elif a.problem.causal != b.problem.causal:
        notes.append("The two sides do not see the same keys: one is causal, the other is not.")
    return notes


def _range(side: Side) -> KeyRange | None:
    if side.record is not None:
        return side.record.keys
    assert side.problem is not None
    _, sq, sk = side.sizes
    return KeyRange.causal(sq, sk) if side.problem.causal else None
