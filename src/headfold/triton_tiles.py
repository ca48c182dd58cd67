"""How the Triton kernels cut a call, and the bytes of scratch that it takes. Plain integers, no torch.

As in `tiles`, the launches and the planner read the same numbers, so a planned byte is an allocated byte.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from headfold.score_tiles import ScoreTile
from headfold.tiles import MIB

# What the CUDA allocator takes beyond what it is asked for: of a block of more than 10 MiB it keeps a rest of up to 1,
# and a slab is such a block, and one more at most.
_ROUNDED = 2 * MIB
# About what stays in L2 (50 MB on an H100) between the kernel that fills a slab of scores and the one that selects from
# it. Every slab costs the ends of two launches, and one of long rows has too few of them to fill a chip.
_SLAB_BYTES = 48 * MIB
# What is kept of the rows of some slabs until it is sorted, and room for a slab's rows where those are too long to be
# cut at once. A slab has the rest.
_KEPT_BYTES = 30 * MIB
# Long rows that are cut at a time, as many as fill a chip. Twice as many wait to be sorted.
_KEPT_ROWS = 512
# Under a causal bound the first slabs of long rows see few keys and have more rows: so many times as the last.
_NARROWER = 4
# The fixed grid: slabs begin at a multiple of so many rows, and of the rows that one program scores, so that a row has
# one place in its tile whatever the workspace. Fewer where even those are large: no GPU's product depends on the place.
_ROWS = 16
_PRODUCT_ROWS = 128  # rows x heads
_LEAST_BYTES = 12 * MIB
# Scores that a row of a slab is padded to, so that rows begin where vector loads can.
PADDING = 64
# Keys of a row that is cut at once.
_HELD = 4096
# Keys of a longer row that may be put aside, in rows of up to so many keys: a multiple of those wanted, and the least.
# They have to hold what lies above the lower pivot of a sample, which is more in longer rows, in a list for each warp:
# some are longer than others. 16 MiB are 512 of 4096.
_CAPACITIES = ((65536, 2, 4096), (None, 7 / 2, 7168))
# The sorting network takes two blocks in registers: as many as are kept, or two of these at a time.
_SORTED = 1024
_KEY = 4  # bytes of an int32
_GRID = 65535  # programs along the second and third axis of a CUDA grid, which batches lie along


@dataclass(frozen=True)
class Kept:
    """Scratch to select `topk` keys of so many rows before they are sorted, whose scores have `size` bytes.

    room: rows that are cut at a time of those with more than `held` keys.   capacity: how many keys of such a row may
    be put aside, at least topk.   in_order: whether rows are sorted, as those of float64 always are.
    """

    rows: int
    room: int
    topk: int
    capacity: int
    size: int
    in_order: bool = True

    @classmethod
    def of(cls, rows: int, sk: int, topk: int, size: int) -> Kept:
        """Return the scratch for rows of sk keys, all of which are cut at a time."""
        topk = min(topk, sk)
        share, least = next((share, least) for upto, share, least in _CAPACITIES if upto is None or sk <= upto)
        capacity = min(sk, max(least, int(share * topk)))
        one = cls(rows, rows, topk, capacity, size)
        return one if sk > one.held else replace(one, room=0)

    @property
    def held(self) -> int:
        """Keys of the longest row of which nothing is put aside."""
        return max(_HELD, self.capacity)

    @property
    def block(self) -> int:
        """Keys of one block of the sorting network: half a power of two of at least 16."""
        return min(_SORTED, max(8, (1 << (self.topk - 1).bit_length()) // 2))

    @property
    def blocks(self) -> int:
        """Blocks that hold a row, an even number of them."""
        return -(-self.topk // (2 * self.block)) * 2

    @property
    def packed(self) -> int:
        """Keys of a row that are packed into int64 between rounds of sorting; none where one round is enough."""
        return self.block * self.blocks if self.size == 4 and self.blocks > 2 and self.in_order else 0

    @property
    def waiting(self) -> int:
        """Keys of a row whose scores wait until they are sorted."""
        return self.topk if self.in_order or self.size == 8 else 0

    @property
    def line_bytes(self) -> int:
        """Scratch of a row until it is sorted: scores, a count, what is packed, and keys that have no other place."""
        keys = self.topk * _KEY if self.size == 8 else 0
        return self.waiting * self.size + keys + _KEY + 8 * self.packed

    @property
    def room_bytes(self) -> int:
        """Scratch of a row until it is cut: scores and keys that may be put aside."""
        return self.capacity * (self.size + _KEY)

    @property
    def scratch_bytes(self) -> int:
        """Scratch of all rows."""
        return self.rows * self.line_bytes + self.room * self.room_bytes


@dataclass(frozen=True)
class SlabSelection:
    """A fold of slabs of scores into the best keys of each row, which are sorted when `kept` is full of them.

    elements: scores of a slab.   least: rows of the fixed grid, of which a slab holds a whole number.   folded: bytes
    of the queries of a slab's rows folded over heads, where there is no activation.
    """

    kept: Kept
    elements: int
    least: int
    folded: int = 0

    @classmethod
    def of(
        cls,
        b: int,
        sq: int,
        sk: int,
        h: int,
        d: int,
        topk: int,
        size: int,
        workspace: int,
        *,
        relu: bool = True,
        in_order: bool = True,
    ) -> SlabSelection:
        """Return the fold that a workspace leaves room for, or the smallest there is."""
        one = Kept.of(1, sk, topk, size)
        scored, room_row = padded(sk) * size, one.room * one.room_bytes
        folded = 0 if relu else d * size
        line = one.line_bytes + folded
        least = max(_ROWS, _PRODUCT_ROWS >> (h - 1).bit_length())
        while least > 1 and min(sq, least) * (scored + line + room_row) > _LEAST_BYTES:
            least //= 2
        least = max(1, min(sq, least))
        one = replace(one, in_order=in_order)  # the grid is the same in any order
        line = one.line_bytes + folded
        most = max(1, b) * -(-sq // least) * least

        def fitting(space: int, row_bytes: int) -> int:
            return max(least, min(most, space // row_bytes // least * least, _GRID // least * least))

        # A slab of rows that see few keys has more of them, so what is kept has a share of its own.
        space = min(_KEPT_BYTES, workspace * 15 // 32, max(0, workspace - least * scored))
        room, rows, usable = 0, fitting(space, line), _SLAB_BYTES
        if room_row:
            space = min(space, _KEPT_ROWS * (room_row + 2 * line))
            seeing_all = fitting(min(_SLAB_BYTES, workspace - space), scored)
            room = min(fitting(space, line + room_row), _KEPT_ROWS // least * least, _NARROWER * seeing_all)
            rows = min(fitting(space - room * room_row, line), 2 * _KEPT_ROWS)
            # More of the short rows, where slabs of long ones leave bytes.
            short, spare = padded(one.held) * size, workspace - room * room_row
            rows = max(rows, min(fitting(spare - min(_SLAB_BYTES, room * scored), line), fitting(spare, short + line)))
            usable = min(_SLAB_BYTES, max(room * scored, rows * short))
        spare = workspace - rows * line - room * room_row - min(_ROUNDED, workspace // 32)
        elements = max(least, min(most, min(usable, spare) // max(1, scored))) * padded(sk)
        kept = replace(one, rows=rows, room=room)
        return cls(kept, elements, least, ScoreTile(1, rows, sk, h, d, size, relu).folded_bytes)

    @property
    def scratch_bytes(self) -> int:
        """Scratch of the fold: a slab, what is kept of its rows, and folded queries."""
        return self.elements * self.kept.size + self.kept.scratch_bytes + self.folded

    def slabs(self, b: int, sq: int, limit: Callable[[int], int]) -> Iterator[Part]:
        """Yield the slabs of a call that see any key.   limit: one past the last key that a row may see."""
        batches = 1
        if self._rows(0, sq, limit) == sq:
            most = self.elements // max(1, sq * padded(limit(sq - 1)))
            batches = max(1, min(b, self._at_once(limit(sq - 1)) // max(1, sq), most))
        for batch in range(0, b, batches):
            row = 0
            while row < sq:
                rows = self._rows(row, sq, limit)
                width = limit(row + rows - 1)
                if width > 0:
                    yield Part(batch, min(b, batch + batches), row, row + rows, width)
                row += rows

    def _rows(self, row: int, sq: int, limit: Callable[[int], int]) -> int:
        """Return how many rows from `row` on a slab takes: as many as fit, with all the keys that they see."""

        def crowded(grains: int) -> bool:
            rows = min(sq - row, grains * self.least)
            width = limit(row + rows - 1)
            return rows * padded(width) > self.elements or rows > self._at_once(width)

        most = max(1, self.kept.rows // self.least)
        rows = self.least * max(1, bisect_left(range(1, most + 1), x=True, key=crowded))
        return min(sq - row, rows)

    def _at_once(self, width: int) -> int:
        """Return how many rows of so many keys there is scratch for."""
        return self.kept.rows if width <= self.kept.held else min(self.kept.rows, self.kept.room)


@dataclass(frozen=True)
class Part:
    """Rows [row, row_end) of batch elements [batch, batch_end), against the first `width` keys."""

    batch: int
    batch_end: int
    row: int
    row_end: int
    width: int


def padded(width: int) -> int:
    """Return the scores from one row of a slab to the next."""
    return -(-width // PADDING) * PADDING


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def power_of_two(x: int) -> int:
    """Return the smallest power of two that is at least x."""
    return 1 << max(0, x - 1).bit_length()
