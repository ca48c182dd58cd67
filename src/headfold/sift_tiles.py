"""How a selection that keeps no scores is cut, and the bytes of its scratch. Plain integers, no torch."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from headfold.triton_tiles import cdiv, padded, power_of_two

# Lists of a row, and places of each. A list is of as many keys as are wanted of a sample of one key in STRIDE, which is
# as many as there are lists: of 2048 in 32768 keys those are 64 and 3.3 deviations, 92 to 98, give or take 13. So one
# row in some thousands is sifted again, with another pivot.
LISTS, STRIDE, ROOM, DEVIATIONS = 32, 32, 156, 3.3
# Keys of a row that is listed whole.
FITTING = 4096
# Bytes of a place: a score, and its key's number in its list.
_PLACE = 4 + 2
# Most keys that are wanted: of three times as many some lists get too long.
_MOST = 2048
# Widths, and rows that a chip of 132 multiprocessors has at a time, by the power of two that holds their heads: two
# programs each, of 256 rows x heads. Those of fewer heads are more than there is room for; more heads, and keys of
# other widths, which are read in two pieces, take registers.
_WIDTHS, _ABREAST = (64, 128), {32: 2112, 64: 1056}
# Programs that wait while others have a row to score are idle: so many of 100 rows have to be there for.
_USED = 80
# Keys of the shortest rows, and of the longest: a program holds a sample of those, and 16 bits the number of a tile.
_SHORTEST, _LONGEST = 6 * FITTING, 1 << 19
# Rows whose pivots are looked for at a time.
_PIVOTS = 16 * 2112
# Counters that programs share (`COUNTERS` of `backends.triton.turns`), beside three integers for each row.
_COUNTERS = 8
# Programs that select again what is left, and what each puts aside.
_AGAIN, CAPACITY = 264, 4096
_ALIGNED = 512


@dataclass(frozen=True)
class SiftedSelection:
    """A fold of rows whose scores are told apart as they are made.

    rows: that there are lists for.   pivots: rows whose pivots are looked for at a time.
    """

    rows: int
    pivots: int
    sk: int
    d: int
    topk: int
    in_order: bool

    @classmethod
    def of(
        cls, sq: int, sk: int, h: int, d: int, topk: int, workspace: int, *, in_order: bool = True
    ) -> SiftedSelection | None:
        """Return the fold of a call, or None where slabs of scores take less time or the workspace is too small."""
        rows = _ABREAST.get(power_of_two(h), 0)
        if not rows or d not in _WIDTHS or topk > _MOST or not _SHORTEST <= sk <= _LONGEST:
            return None
        if 100 * sq < _USED * rows * cdiv(sq, rows):
            return None
        plan = cls(rows, min(_PIVOTS // rows, cdiv(sq, rows)) * rows, sk, d, topk, in_order)
        fits = plan.scratch_bytes <= workspace and plan.programs > 0 and plan.sampled_rows(sq, lambda _: sk) > 0
        return plan if fits else None

    @property
    def sampled(self) -> int:
        """Keys of a sample."""
        return self.sk // STRIDE

    @property
    def sample_bytes(self) -> int:
        """Bytes of the sampled keys, in half precision."""
        return _aligned(self.sampled * self.d * 2)

    def width(self, keys: int) -> int:
        """Return how many keys of a sample a row meets that sees so many keys."""
        return min(self.sampled, cdiv(keys, STRIDE))

    def sampled_rows(self, rows: int, seen: Callable[[int], int]) -> int:
        """Return of how many rows, at most so many, there is memory for the scores of their samples, or 0.

        seen: given a number of rows, how many keys the last of them sees.
        """

        def taken(steps: int) -> int:
            some = min(rows, 16 * steps)
            return self.sample_bytes + some * 4 * padded(self.width(seen(some)))

        return min(rows, 16 * bisect.bisect(range(1, cdiv(rows, 16) + 1), self.lists_bytes, key=taken))

    @property
    def places(self) -> int:
        """Places of all lists."""
        return self.rows * ROOM * LISTS

    @property
    def lists_bytes(self) -> int:
        """Bytes of those, which are also those of samples, and of rows that are selected from again."""
        return self.places * _PLACE

    @property
    def programs(self) -> int:
        """Programs that select again, each with the scores of a row, what is put aside, and what waits to be sorted."""
        one = 4 * padded(self.sk) + 8 * CAPACITY + (4 * self.topk if self.in_order else 0)
        return min(_AGAIN, self.lists_bytes // one)

    @property
    def turns(self) -> int:
        """Integers by which programs share rows and lists, which take rows in blocks of one at least."""
        return _COUNTERS + 3 * self.pivots

    @property
    def scratch_bytes(self) -> int:
        """Scratch of the fold."""
        return self.lists_bytes + 4 * (self.rows * LISTS + 5 * self.pivots + self.turns)


def _aligned(size: int) -> int:
    return cdiv(size, _ALIGNED) * _ALIGNED
