"""What a call of the score kernels allocates besides its results. Plain integers, no torch."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
# Queries folded over heads, of one slab of rows: all that is multiplied when there is no activation.
_FOLDED_BYTES = 4 * MIB
# Programs that keep a large chip busy. Fewer blocks of keys than that share out the rows, each part with sums of its
# own, up to _MOST_PARTS; a part has at least _PART_ROWS rows x heads.
_PROGRAMS = 528
_KEYS = 128
_MOST_PARTS = 8
_PARTS_BYTES = 16 * MIB
_PART_ROWS = 4096
# Heads that every half-precision tile of dk takes at once, up to so many channels and beyond. More are several
# launches, which add up in the compute dtype; tests/test_triton_bills.py holds the table of tiles to these.
_HEADS, _NARROW, _WIDE_HEADS = 64, 128, 32


@dataclass(frozen=True)
class ScoreTile:
    """The shape of a call, and the scratch that follows from it, whatever the workspace.

    size: itemsize of the compute dtype.
    """

    b: int
    sq: int
    sk: int
    h: int
    d: int
    size: int
    relu: bool = True

    @property
    def slab_rows(self) -> int:
        """Rows whose heads are folded at a time; all where nothing is folded."""
        if self.relu:
            return max(1, self.sq)
        return max(1, min(self.sq, _FOLDED_BYTES // max(1, self.b * self.d * self.size)))

    @property
    def folded_bytes(self) -> int:
        """Bytes of one buffer of folded queries."""
        return 0 if self.relu else self.b * self.slab_rows * self.d * self.size

    @property
    def parts(self) -> int:
        """Into how many sums the rows of dk are shared out."""
        blocks = self.b * -(-self.sk // _KEYS)
        terms = min(self.sq, self.slab_rows) * (self.h if self.relu else 1)
        fitting = _PARTS_BYTES // max(1, self.b * self.sk * self.d * self.size)
        return max(1, min(_MOST_PARTS, _PROGRAMS // max(1, blocks), terms // _PART_ROWS, fitting))

    @property
    def heads_at_once(self) -> int:
        """Heads that one launch for dk takes on any chip, of half-precision inputs."""
        return _HEADS if self.d <= _NARROW else _WIDE_HEADS

    @property
    def part_bytes(self) -> int:
        """Bytes of the parts of dk, where there is more than one."""
        return self.parts * self.b * self.sk * self.d * self.size if self.parts > 1 else 0

    @property
    def writes_once(self) -> bool:
        """Whether dk is made at once: of all rows and heads in one sum, which can be written in dk's own dtype."""
        heads = self.h if self.relu else 1
        return self.parts == 1 and 0 < self.sq <= self.slab_rows and heads <= self.heads_at_once

    @property
    def forward_bytes(self) -> int:
        """Scratch of the forward body."""
        return self.folded_bytes

    @property
    def backward_bytes(self) -> int:
        """Scratch of the backward body; sums of dk in the compute dtype are not counted, they are a gradient."""
        return 2 * self.folded_bytes + self.part_bytes

    def sums_bytes(self, itemsize: int) -> int:
        """Bytes of dk in the compute dtype, where it is added up there and cast to inputs of `itemsize` bytes."""
        return 0 if itemsize >= self.size or self.writes_once else self.b * self.sk * self.d * self.size
