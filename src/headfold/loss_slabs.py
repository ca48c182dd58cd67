"""How a loss is cut for kernels: slabs of query rows with all of their keys, and the bytes of scratch that one needs.

Plain integers, no torch, as `headfold.loss_tiles`, which cuts the same call into PyTorch tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from headfold.score_tiles import ScoreTile
from headfold.tiles import MIB
from headfold.triton_tiles import Kept, padded

# Scores, mass, marks and sums of a slab. They stay in the L2 of an A100 (40 MiB), and with what is counted per row of
# the call they fit 16 MiB.
_SLAB_BYTES = 14 * MIB
# Rows that a product takes at a time: batch elements are parted before rows are fewer.
_PRODUCT_ROWS = 64
# Rows of the smallest product there is.
_LEAST_ROWS = 16
# What a tensor of a step's scratch may take beyond its bytes, so that the next one is aligned, and the most of them.
PIECE = 256
_PIECES = 8
# Keys of one program of the teacher's first pass. Splits are joined in order, so this is part of the result.
SPLIT_KEYS = 1024


@dataclass(frozen=True)
class LossSlab:
    """One step of the loss: `rows` query rows of `batches` batch elements, with all of their `sk` keys.

    b, sq, h, d, np: of the call.   size: itemsize of the compute dtype.   topk: keys that are selected, or None.
    The grid is a function of the shape alone.
    """

    batches: int
    rows: int
    b: int
    sq: int
    sk: int
    h: int
    d: int
    np: int
    size: int
    topk: int | None
    relu: bool

    @classmethod
    def of(
        cls, b: int, sq: int, sk: int, h: int, d: int, np: int, size: int, topk: int | None, *, relu: bool
    ) -> LossSlab:
        """Return the slab for a call of this shape: as many rows as fit, at the extreme one of any number of keys."""
        kept = min(topk, sk) if topk is not None and topk * sk > 0 else None
        one = cls(1, 1, b, sq, sk, h, d, np, size, kept, relu)
        fit = max(1, _SLAB_BYTES // max(1, one.scores_bytes + one.teacher_bytes))
        batches = max(1, min(b, fit // max(1, min(sq, _PRODUCT_ROWS))))
        rows = fit // batches
        step = next(step for step in (_PRODUCT_ROWS, _LEAST_ROWS, 1) if rows >= step)
        return cls(batches, max(1, min(sq, rows // step * step)), b, sq, sk, h, d, np, size, kept, relu)

    @property
    def width(self) -> int:
        """Columns of a slab: its keys and the padding behind them."""
        return padded(self.sk)

    @property
    def scores_bytes(self) -> int:
        """Scores, which become dL/dscores."""
        return self.batches * self.rows * self.width * self.size

    @property
    def sums(self) -> int:
        """Maxima and sums of the teacher: of every row, head and split of the keys."""
        return 2 * -(-self.sk // SPLIT_KEYS) * self.batches * self.np * self.rows

    @property
    def teacher_bytes(self) -> int:
        """Mass, a byte of marks for each of its entries, and the sums that the mass is made from."""
        return self.batches * self.rows * self.width * (self.size + 1) + self.sums * self.size

    @property
    def kept(self) -> Kept | None:
        """What selects from a slab: as many rows of every batch element at a time as need no more than the teacher."""
        if self.topk is None:
            return None
        one = Kept.of(self.batches, self.sk, self.topk, self.size)
        rows = max(1, min(self.rows, self.teacher_bytes // one.scratch_bytes))
        return Kept.of(self.batches * rows, self.sk, self.topk, self.size)

    @property
    def score_tile(self) -> ScoreTile:
        """What the score kernels allocate for a slab."""
        return ScoreTile(self.batches, self.rows, self.sk, self.h, self.d, self.size, self.relu)

    @property
    def rows_bytes(self) -> int:
        """Losses of all rows, their share, and their sum."""
        return (self.b * self.sq + 4) * self.size + 16

    def step_bytes(self, backward: bool) -> int:
        """Scratch of the largest step of a slab, beside its scores."""
        kept = 0 if self.kept is None else self.kept.scratch_bytes
        # The last batch elements may be fewer, and their rows shared out among more sums.
        tiles = self.score_tile, replace(self.score_tile, b=self.b % self.batches or self.batches)
        scored = max(tile.backward_bytes if backward else tile.forward_bytes for tile in tiles)
        return max(self.teacher_bytes, kept, scored) + _PIECES * PIECE

    @property
    def forward_bytes(self) -> int:
        """Scratch of a loss without gradients: scores, and beside them whatever the largest step takes."""
        return self.scores_bytes + self.step_bytes(backward=False) + self.rows_bytes

    @property
    def backward_bytes(self) -> int:
        """Scratch of a loss that makes its gradients in the same walk."""
        return self.scores_bytes + self.step_bytes(backward=True) + self.rows_bytes
