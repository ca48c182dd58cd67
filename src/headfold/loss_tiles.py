"""How a loss is cut: slabs of query rows with all of their keys, and the bytes of scratch that one slab needs.

Plain integers, no torch, as `headfold.tiles`, whose tiles the slabs are made of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from headfold.tiles import MIB, Selection, Tile

# What a slab keeps of its keys: scores, attention mass, one head's logits, marks, candidates. Beside a tile at h=32,
# d=128 it has to fit 16 MiB.
_SLAB_BYTES = 9 * MIB // 2
# Staged attention keys of one product, for inputs that need a cast.
_KEYS_BYTES = MIB
# The queries, and the logits, of the attention heads that one product takes together, where heads share their keys.
_SHARED_BYTES = 2 * MIB


@dataclass(frozen=True)
class LossTile:
    """One step of the loss: `tile.rows` query rows with all of their `sk` keys.

    tile: of the scores, forward and backward; its rows are the slab's.   heads: attention heads of one product, which
    share their keys.   keys: attention keys of one product.   hn: width of an attention head.   slabs: how many there
    are.   selection: the fold that selects, or None.   The grid is a function of the shape alone.
    """

    tile: Tile
    sk: int
    heads: int
    keys: int
    hn: int
    slabs: int
    selection: Selection | None

    @classmethod
    def of(
        cls,
        b: int,
        sq: int,
        tile: Tile,
        sk: int,
        np: int,
        np_k: int,
        hn: int,
        topk: int | None,
        *,
        accelerator: bool = False,
    ) -> LossTile:
        """Return the slab for a call of this shape, whose scores alone would be cut into `tile`.

        Rows are halved until what a slab keeps is small, at the extreme to one: a row of many keys is never cut, so
        the scratch grows with sk from there on.
        """
        keys = max(64, min(sk, _KEYS_BYTES // (hn * tile.size)) // 64 * 64)
        selection = (
            Selection(tile, min(topk, sk), tile.keys, accelerator) if topk is not None and topk * sk > 0 else None
        )
        slab = cls(tile, sk, 1, keys, hn, 0, selection)
        while slab.slab_bytes > _SLAB_BYTES and slab.tile.rows > 1:
            slab = slab._with_tile(slab.tile.with_rows(slab.tile.rows // 2, sk))
        rows = slab.tile.rows
        heads = max(1, min(np // np_k, _SHARED_BYTES // (rows * max(sk, hn) * tile.size)))
        slab = replace(slab, heads=heads, slabs=b * -(-sq // rows))
        while slab.slab_bytes > _SLAB_BYTES and slab.heads > 1:
            slab = replace(slab, heads=slab.heads // 2)
        return slab

    def _with_tile(self, tile: Tile) -> LossTile:
        selection = self.selection
        if selection is not None:
            selection = replace(selection, tile=tile, chunk=tile.keys)
        return replace(self, tile=tile, selection=selection)

    @property
    def keeps_logits(self) -> bool:
        """Whether one tile holds all keys of a slab, so that backward finds the logits where forward left them."""
        return self.tile.relu and self.tile.keys >= self.sk

    @property
    def slab_bytes(self) -> int:
        """Scratch that grows with the keys of a slab: scores, mass, marks, logits, and what selects."""
        rows, size = self.tile.rows, self.tile.size
        kept = rows * self.sk * (2 * size + 2) + rows + rows * self.heads * self.sk * size
        if self.selection is None:
            return kept
        picked = 8 * rows * self.selection.kept
        return kept + self.selection.scratch_bytes - self.tile.forward_bytes + picked

    @property
    def teacher_bytes(self) -> int:
        """Scratch of one product of the teacher: staged queries and keys."""
        return (self.tile.rows * self.heads + self.keys) * self.hn * self.tile.size

    @property
    def rows_bytes(self) -> int:
        """Sums and marks of the rows of a slab, one sum for each slab, and the positions that marks are made from."""
        rows, size = self.tile.rows, self.tile.size
        return rows * (size + 2) + self.slabs * size + 4 * self.sk + 24 * rows + 128

    @property
    def forward_bytes(self) -> int:
        """Scratch of a loss without gradients."""
        return self.tile.forward_bytes + self.slab_bytes + self.teacher_bytes + self.rows_bytes

    @property
    def backward_bytes(self) -> int:
        """Scratch of a loss that makes its gradients in the same walk."""
        return self.forward_bytes + self.tile.backward_bytes - self.tile.forward_bytes
