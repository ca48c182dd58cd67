"""KeyRange: which keys each query row may see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

INT32 = 2**31 - 1


@dataclass(frozen=True, eq=False)
class KeyRange:
    """A half-open range of visible keys per query row.

    Key t is visible to row s iff start[s] <= t < end[s] and, when `offset` is given, t < (s + 1 + offset) // ratio.
    Ends are clamped to [0, sk]; an empty range is legal. `offset` and `ratio` are Python ints, so whole tiles beyond
    them are skipped without reading data; the tensors are only ever read by kernels.

    Args:
        start: int32 [sq] or [b, sq], first visible key; None means 0.
        end: int32 [sq] or [b, sq], one past the last visible key; None means sk.
        offset: static causal bound, see above; None means no bound.
        ratio: query positions per key, for compressed keys.

    Raises: TypeError for a tensor that is not int32 or an offset or ratio that is not an int; ValueError for a rank
    other than 1 or 2, or ratio < 1.
    """

    start: Tensor | None = None
    end: Tensor | None = None
    offset: int | None = None
    ratio: int = 1

    def __post_init__(self) -> None:
        """Refuse what no op could read."""
        for name in ("start", "end"):
            bound = getattr(self, name)
            if bound is None:
                continue
            if not isinstance(bound, Tensor) or bound.dtype != torch.int32:
                got = bound.dtype if isinstance(bound, Tensor) else type(bound).__name__
                raise TypeError(f"KeyRange: {name} must be an int32 tensor, got {got}. Convert it with .int().")
            if bound.dim() not in (1, 2):
                raise ValueError(f"KeyRange: {name} must be [sq] or [b, sq], got shape {list(bound.shape)}.")
        _static_int("KeyRange", "offset", self.offset, -INT32 - 1, optional=True)
        _static_int("KeyRange", "ratio", self.ratio, 1)

    @classmethod
    def causal(cls, sq: int, sk: int, *, offset: int | None = None, ratio: int = 1) -> KeyRange:
        """Row s sees t < (s + 1 + offset) // ratio; the default offset sk - sq aligns the last row with the last key.

        Note that this is bottom-right aligned, where scaled_dot_product_attention's is_causal is top-left. With
        compressed keys (ratio > 1) the alignment depends on the positions, so the offset has to be given.
        """
        if offset is None:
            if ratio != 1:
                raise ValueError(
                    f"KeyRange.causal: offset must be given when ratio is not 1, got ratio {ratio}. It is the absolute "
                    "position of query row 0, so 0 for a prefill from the start."
                )
            offset = sk - sq
        return cls(offset=offset, ratio=ratio)

    @classmethod
    def at_positions(cls, positions: Tensor, *, ratio: int = 1) -> KeyRange:
        """The row at absolute position p sees t < (p + 1) // ratio: chunked prefill, zigzag shards.

        Args:
            positions: integer [sq] or [b, sq].
            ratio: positions per key.
        """
        _integers("KeyRange.at_positions", "positions", positions)
        _static_int("KeyRange.at_positions", "ratio", ratio, 1)
        end = torch.div(positions.long() + 1, ratio, rounding_mode="floor")
        return cls(end=end.clamp(0, INT32).int())

    @classmethod
    def packed(cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, total_q: int, causal: bool = True) -> KeyRange:
        """Sequences packed on one axis: a row sees its own sequence's keys, causally (bottom-right) or all of them.

        Rows past cu_seqlens_q[-1] (padding) see nothing. Nothing is read on the host, so whole tiles are not skipped;
        where both sides share their lengths, `KeyRange.packed(...) & KeyRange.causal(total, total)` halves the work.

        Args:
            cu_seqlens_q: integer [n + 1], cumulative query lengths from 0.
            cu_seqlens_k: integer [n + 1], cumulative key lengths from 0.
            total_q: length of the packed query axis.
            causal: whether the last row of a sequence is aligned with its last key.
        """
        for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            _integers("KeyRange.packed", name, cu)
            if cu.dim() != 1 or cu.numel() < 1:
                raise ValueError(f"KeyRange.packed: {name} must be [n + 1], got shape {list(cu.shape)}.")
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                "KeyRange.packed: cu_seqlens_q and cu_seqlens_k must have one length, "
                f"got {list(cu_seqlens_q.shape)} and {list(cu_seqlens_k.shape)}."
            )
        _static_int("KeyRange.packed", "total_q", total_q, 0)
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.long(), cu_seqlens_k.long()
        rows = torch.arange(total_q, device=cu_seqlens_q.device)
        if cu_seqlens_q.numel() == 1:
            empty = torch.zeros_like(rows, dtype=torch.int32)
            return cls(start=empty, end=empty)
        after = torch.searchsorted(cu_seqlens_q, rows, right=True)
        padding = after == cu_seqlens_q.numel()
        after = after.clamp(max=cu_seqlens_q.numel() - 1)
        start, end = cu_seqlens_k[after - 1], cu_seqlens_k[after]
        if causal:
            end = (end - (cu_seqlens_q[after] - 1 - rows)).maximum(start)
        end = torch.where(padding, start, end)
        return cls(start=start.to(torch.int32), end=end.to(torch.int32))

    @classmethod
    def sliding(cls, sq: int, sk: int, window: int, *, device: torch.device | str | None = None) -> KeyRange:
        """Causal (bottom-right), and at most the `window` latest keys of each row."""
        _static_int("KeyRange.sliding", "window", window, 0)
        offset = sk - sq
        first = torch.arange(sq, device=device, dtype=torch.int32) + (1 + offset - window)
        return cls(start=first.clamp(min=0), offset=offset)

    def __and__(self, other: KeyRange) -> KeyRange:
        """Keys visible in both ranges."""
        if not isinstance(other, KeyRange):
            return NotImplemented
        start = _merge(self.start, other.start, torch.maximum)
        end = _merge(self.end, other.end, torch.minimum)
        if self.offset is None or other.offset is None:
            static = other if self.offset is None else self
            return KeyRange(start, end, static.offset, static.ratio)
        if self.ratio == other.ratio:
            return KeyRange(start, end, min(self.offset, other.offset), self.ratio)
        rows = start if start is not None else end
        if rows is None:
            raise ValueError(
                f"KeyRange: two static bounds of different ratio, {self.ratio} and {other.ratio}, do not fit one "
                "record; give one of them as positions with KeyRange.at_positions."
            )
        position = torch.arange(rows.shape[-1], device=rows.device)
        bound = torch.div(position + (1 + other.offset), other.ratio, rounding_mode="floor").clamp(0, INT32)
        return KeyRange(start, _merge(end, bound.int(), torch.minimum), self.offset, self.ratio)


def _merge(a: Tensor | None, b: Tensor | None, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"KeyRange: both ranges must have one number of rows, got {a.shape[-1]} and {b.shape[-1]}.")
    return combine(a, b)


def _integers(where: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: {name} must be an integer tensor, got {type(x).__name__}.")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{where}: {name} must be integers, got {x.dtype}.")


def _static_int(where: str, name: str, value: object, least: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(
            f"{where}: {name} must be a Python int{' or None' if optional else ''}, got {type(value).__name__}."
        )
    if value < least:
        raise ValueError(f"{where}: {name} must be at least {least}, got {value}.")
    if value > INT32:
        raise ValueError(f"{where}: {name} must be at most {INT32}, got {value}.")
