"""selection_agreement: how far two selections of the same rows agree, as sets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headfold.contract import enough_workspace, same_device, workspace_bytes
from headfold.selection import TopK
from headfold.selection_record import INDEX_DTYPES, SelectionRecord


class Agreement(NamedTuple):
    """How far two selections agree.

    per_row: float64 [b, sq], the share of a row's members that both selected: 2 · |a ∩ b| / (|a| + |b|), which is
    |a ∩ b| / topk where both rows are full; 1 where both are empty.
    equal: bool [b, sq], rows that are equal as sets.
    rows: float64 [], the share of rows that are equal.
    members: float64 [], the share of all members that both selected, rows weighted by what they hold.
    Both shares are 1 where there is nothing to compare.
    """

    per_row: Tensor
    equal: Tensor
    rows: Tensor
    members: Tensor


def selection_agreement(
    a: Tensor | TopK | SelectionRecord, b: Tensor | TopK | SelectionRecord, *, workspace: int | None = None
) -> Agreement:
    """Compare two selections row by row, as sets of keys.

    Order is ignored, and so are negative indices; a key that a row holds twice counts once. Widths and integer dtypes
    may differ. No tensor data is read on the host. Ranges of records are not compared: that would need it.

    Args:
        a: int32 or int64 [b, sq, topk], or a TopK or SelectionRecord with such indices.
        b: as a, with its own width.
        workspace: bytes of scratch, 64 MiB when None; rows are compared in blocks that fit it.

    Returns:
        Agreement(per_row, equal, rows, members).

    Memory: 33 bytes a row (9 of them results) and at most `workspace` more; a block takes 48 bytes a member at most.

    Raises: TypeError or ValueError for a broken contract, before anything is allocated.
    """
    op = "selection_agreement"
    if isinstance(a, SelectionRecord) and isinstance(b, SelectionRecord) and a.sk != b.sk:
        raise ValueError(f"{op}: b must be selected from a's {a.sk} keys, got one from {b.sk}.")
    x, y = _indices(op, "a", a), _indices(op, "b", b)
    if x.shape[:2] != y.shape[:2]:
        raise ValueError(f"{op}: b must have a's [b, sq] = {list(x.shape[:2])}, got {list(y.shape[:2])}.")
    same_device(op, b=y, a=x)
    batch, sq = x.shape[:2]
    row_bytes = 48 * (x.shape[2] + y.shape[2])
    space = workspace_bytes(op, workspace)
    enough_workspace(op, row_bytes, space)
    rows = max(1, space // max(1, row_bytes))
    shared, held = (torch.empty(batch, sq, dtype=torch.int64, device=x.device) for _ in range(2))
    batches, block = max(1, rows // max(1, sq)), min(rows, max(1, sq))
    for i in range(0, batch, batches):
        for s in range(0, sq, block):
            at = slice(i, i + batches), slice(s, s + block)
            _count(x[at], y[at], shared[at], held[at])
    per_row = shared.double().mul_(2).div_(held).masked_fill_(held == 0, 1.0)
    equal = 2 * shared == held
    return Agreement(per_row, equal, _share(equal.sum(), equal.numel()), _share(2 * shared.sum(), held.sum()))


def _indices(op: str, name: str, selection: Tensor | TopK | SelectionRecord) -> Tensor:
    x = selection.indices if isinstance(selection, (TopK, SelectionRecord)) else selection
    if not isinstance(x, Tensor) or x.dtype not in INDEX_DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} must be int32 or int64 indices, a TopK or a SelectionRecord, got {got}.")
    if x.dim() != 3:
        raise ValueError(f"{op}: {name} must be [b, sq, topk], got shape {list(x.shape)}.")
    return x


def _count(x: Tensor, y: Tensor, shared: Tensor, held: Tensor) -> None:
    """Write how many keys both rows hold, and how many each holds, added."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = (z.to(dtype).contiguous().sort(-1).values for z in (x, y))
    first = _first(x)
    torch.add(first.sum(-1), _first(y).sum(-1), out=held)
    if x.shape[2] == 0 or y.shape[2] == 0:
        shared.zero_()
        return
    place = torch.searchsorted(y, x).clamp_(max=y.shape[2] - 1)
    shared.copy_(first.logical_and_(y.gather(-1, place) == x).sum(-1))


def _first(x: Tensor) -> Tensor:
    """Mark the first of each key in rows that are sorted."""
    first = x >= 0
    first[..., 1:] &= x[..., 1:] != x[..., :-1]
    return first


def _share(part: Tensor, whole: Tensor | int) -> Tensor:
    whole = torch.as_tensor(whole, device=part.device)
    return torch.where(whole == 0, 1.0, part.double() / whole)
