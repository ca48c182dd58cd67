"""How a loss is cut for kernels: slabs of query rows with all of their keys, and the bytes of scratch that one needs.

Plain integers, no torch, as `headfold.loss_tiles`, which cuts the same call into PyTorch tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

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
        return _fitting(cls(1, 1, b, sq, sk, h, d, np, size, kept, relu), _SLAB_BYTES, _PRODUCT_ROWS)

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

    @cached_property
    def kept(self) -> Kept | None:
        """What selects from a slab: as many rows of every batch element at a time as need no more than the teacher."""
        if self.topk is None:
            return None
        one = Kept.of(self.batches, self.sk, self.topk, self.size)
        rows = max(1, min(self.rows, self.teacher_bytes // one.scratch_bytes))
        return Kept.of(self.batches * rows, self.sk, self.topk, self.size)

    @cached_property
    def score_tile(self) -> ScoreTile:
        """What the score kernels allocate for a slab."""
        return ScoreTile(self.batches, self.rows, self.sk, self.h, self.d, self.size, self.relu)

    @property
    def rows_bytes(self) -> int:
        """Losses of all rows, their share, and their sum."""
        return (self.b * self.sq + 4) * self.size + 16

    @cached_property
    def forward_step_bytes(self) -> int:
        """Scratch of the largest step of a slab, beside its scores, where no gradients are made."""
        kept = 0 if self.kept is None else self.kept.scratch_bytes
        scored = max(tile.forward_bytes for tile in self._score_tiles)
        return max(self.teacher_bytes, kept, scored) + _PIECES * PIECE

    @cached_property
    def backward_step_bytes(self) -> int:
        """Scratch of the largest step of a slab, beside its scores, where gradients are made."""
        scored = max(tile.backward_bytes for tile in self._score_tiles)
        return max(self.forward_step_bytes, scored + _PIECES * PIECE)

    @property
    def _score_tiles(self) -> tuple[ScoreTile, ScoreTile]:
        """Of all slabs but the last batch elements', which may be fewer, their rows shared out among more sums."""
        return self.score_tile, replace(self.score_tile, b=self.b % self.batches or self.batches)

    @cached_property
    def forward_bytes(self) -> int:
        """Scratch of a loss without gradients: scores, and beside them whatever the largest step takes."""
        return self.scores_bytes + self.forward_step_bytes + self.rows_bytes

    @cached_property
    def backward_bytes(self) -> int:
        """Scratch of a loss that makes its gradients in the same walk."""
        return self.scores_bytes + self.backward_step_bytes + self.rows_bytes


@lru_cache(maxsize=64)  # every layer and step asks for the same
def _fitting(one: LossSlab, slab_bytes: int, product_rows: int) -> LossSlab:
    """Return a slab of one row with as many rows as fit so many bytes, a multiple of a product's."""
    fit = max(1, slab_bytes // max(1, one.scores_bytes + one.teacher_bytes))
    batches = max(1, min(one.b, fit // max(1, min(one.sq, product_rows))))
    rows = fit // batches
    step = next(step for step in (product_rows, _LEAST_ROWS, 1) if rows >= step)
    return replace(one, batches=batches, rows=max(1, min(one.sq, rows // step * step)))
