"""How a selection that keeps no scores is cut, and the bytes of its scratch. Plain integers, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from headfold.triton_tiles import cdiv, padded, power_of_two

# Lists of a row, and places of each. A list is of as many keys as are wanted of a sample of one key in STRIDE, which is
# as many as there are lists: of 2048 in 32768 keys those are 64 and 4.8 deviations, 105 to 110, give or take 15.
LISTS, STRIDE, ROOM, DEVIATIONS = 32, 32, 192, 4.8
# Keys of a row that is listed whole.
FITTING = 4096
# Bytes of a place: a score, and its key's number in its list.
_PLACE = 4 + 2
# Most keys that are wanted: of three times as many some lists get too long.
_MOST = 2048
# Rows that a chip of 132 multiprocessors scores at a time, by width and by the power of two that holds their heads: two
# or three programs each, of 128 or 256 rows x heads. Those of fewer heads are more than there is room for; more heads,
# and keys of other widths, which are read in two pieces, take registers.
_ABREAST = {64: {32: 1584, 64: 792}, 128: {32: 1584, 64: 1056}}
# Programs that wait while others have a row to score are idle: so many of 100 rows have to be there for.
_USED = 80
# Keys of the shortest rows, and of the longest: a program holds a sample of those, and 16 bits the number of a tile.
_SHORTEST, _LONGEST = 6 * FITTING, 1 << 19
# Rows whose pivots are looked for at a time.
_PIVOTS = 16384
_PIVOT = 4 * 4 + 4  # and a count
# Programs that select again where a sample was wrong, and what each puts aside.
_AGAIN, CAPACITY = 264, 4096
_ALIGNED = 512


@dataclass(frozen=True)
class SiftedSelection:
    """A fold of groups of rows, whose scores are told apart as they are made.

    rows: of a group.   pivots: rows whose pivots are looked for at a time.
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
        rows = _ABREAST.get(d, {}).get(power_of_two(h), 0)
        if not rows or topk > _MOST or not _SHORTEST <= sk <= _LONGEST:
            return None
        if 100 * sq < _USED * rows * cdiv(sq, rows):
            return None
        one = cls(rows, rows, sk, d, topk, in_order)
        if one.sample_rows < 1:
            return None
        plan = cls(rows, min(_PIVOTS, max(rows, one.sample_rows)) // rows * rows, sk, d, topk, in_order)
        return plan if plan.scratch_bytes <= workspace and plan.programs > 0 else None

    @property
    def sampled(self) -> int:
        """Keys of a sample."""
        return self.sk // STRIDE

    @property
    def sample_bytes(self) -> int:
        """Bytes of the sampled keys, in half precision."""
        return _aligned(self.sampled * self.d * 2)

    @property
    def sample_rows(self) -> int:
        """Rows whose samples fit at a time, a multiple of what a program scores."""
        return max(0, self.lists_bytes - self.sample_bytes) // (4 * padded(self.sampled)) // 16 * 16

    @property
    def places(self) -> int:
        """Places of the lists of a group."""
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
    def scratch_bytes(self) -> int:
        """Scratch of the fold."""
        return self.lists_bytes + self.rows * LISTS * 4 + self.pivots * _PIVOT


def _aligned(size: int) -> int:
    return cdiv(size, _ALIGNED) * _ALIGNED
