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
    def part_bytes(self) -> int:
        """Bytes of the parts of dk, where there is more than one."""
        return self.parts * self.b * self.sk * self.d * self.size if self.parts > 1 else 0

    @property
    def writes_once(self) -> bool:
        """Whether dk is made at once: of all rows in one sum, which can be written in dk's own dtype."""
        return self.parts == 1 and 0 < self.sq <= self.slab_rows

    @property
    def forward_bytes(self) -> int:
        """Scratch of the forward body."""
        return self.folded_bytes

    @property
    def backward_bytes(self) -> int:
        """Scratch of the backward body; sums of dk in the compute dtype are not counted, they are a gradient."""
        return 2 * self.folded_bytes + self.part_bytes
