"""How a call is cut: the fixed grid of tiles, and the bytes of scratch that one tile needs. Plain integers, no torch.

The walk and the planner both read their numbers here, so a planned byte is an allocated byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

MIB = 1 << 20
DEFAULT_WORKSPACE = 64 * MIB

# A tile of logits this large stays in L3 while it is made, rectified and folded. Measured on two cores that share 32
# MiB at h=32, d=128 (docs/design.md, "Tile size"): 4 to 6 MiB is fastest, 8 MiB and more falls out of cache, 2 MiB pays
# call overhead.
_LOGITS_BYTES = 6 * MIB
# Rows of the left operand (query rows x heads) at which the matrix product reaches its rate.
_PRODUCT_ROWS = 2048
# One of the backward's three buffers of queries, for heads so wide that 2048 product rows would fill the workspace.
_QUERY_BYTES = 8 * MIB
# Gathered keys of one tile, in the compute dtype. Measured on two cores that share 32 MiB at h=32, d=128: 2 MiB pays
# call overhead (two thirds of the speed); 8 MiB is no faster beyond noise, and a backward would not fit 16 MiB.
_GATHERED_BYTES = 4 * MIB
# What a selection keeps of a block of rows; more rows or a larger topk than that take smaller blocks.
_KEPT_BYTES = 7 * MIB
# Staged keys of one tile, so that a decode step (one row, many keys) does not copy the whole key cache at once.
_KEYS_BYTES = 4 * MIB
# Staged entries of a selection that is written into a mask: more than a million for each launch on an accelerator, and
# a quarter of the default workspace.
_ENTRIES_BYTES = 16 * MIB
_KEY_AND_MARK_BYTES = 8 + 1  # int64 and bool
_SCALAR_BYTES = 8  # the number that keys are compared with, as torch wraps it


@dataclass(frozen=True)
class Tile:
    """One step of the walk: `rows` query rows against `keys` keys, all `h` heads of width `d`.

    `size` is the itemsize of the compute dtype, 4 or 8 bytes. The grid starts at row 0 and key 0 and depends on the
    shape alone, never on the workspace: that is why results are bitwise equal across workspaces.
    """

    rows: int
    keys: int
    h: int
    d: int
    size: int
    relu: bool = True

    @classmethod
    def of(cls, sq: int, sk: int, h: int, d: int, size: int, *, relu: bool = True) -> Tile:
        """Return the tile for a call of this shape."""
        rows = max(1, min(sq, _PRODUCT_ROWS // h, _QUERY_BYTES // (h * d * size)))
        return cls(rows, 1, h, d, size, relu).with_rows(rows, sk)

    def with_rows(self, rows: int, sk: int) -> Tile:
        """Return the tile of so many rows: the fewer they are, the more of the sk keys fit."""
        fit = _LOGITS_BYTES // (rows * self.h * self.size)
        cap = max(64, _KEYS_BYTES // (self.d * self.size))
        keys = max(64, min(fit, cap) // 64 * 64)
        return replace(self, rows=rows, keys=max(1, min(sk, keys)))

    @property
    def logits_bytes(self) -> int:
        """Bytes of the [rows, h, keys] logits; without an activation, of the [rows, d] queries folded over heads."""
        return self.rows * (self.h * self.keys if self.relu else self.d) * self.size

    @property
    def query_bytes(self) -> int:
        """Bytes of one [rows, h, d] buffer."""
        return self.rows * self.h * self.d * self.size

    @property
    def weight_bytes(self) -> int:
        """Bytes of one [rows, h] buffer."""
        return self.rows * self.h * self.size

    @property
    def narrow(self) -> bool:
        """Whether d is so small that dk has to be summed in parts: below 12 columns MKL's own sums are inexact."""
        return self.d < 16

    @property
    def forward_bytes(self) -> int:
        """Scratch of the forward walk: logits, staged q, weights and k, folded scores, bias and masks."""
        staged_key = self.keys * self.d * self.size
        scores_and_masks = self.rows * self.keys * (2 * self.size + 2)
        positions = 4 * self.keys + 24 * self.rows + 64  # and the scalars they are compared with
        return self.logits_bytes + self.query_bytes + self.weight_bytes + staged_key + scores_and_masks + positions

    @property
    def backward_bytes(self) -> int:
        """Scratch of the backward walk: the forward's, u, weights * q, dweights, and partial sums of a narrow dk."""
        partial = self.keys * self.d * self.size if self.narrow else 0
        return self.forward_bytes + 2 * self.query_bytes + self.weight_bytes + partial


@dataclass(frozen=True)
class GatherTile:
    """One step of the gathered walk: `rows` query rows, each against `picks` keys of its own.

    size, itemsize: of the compute dtype and of the inputs. The grid is a function of the shape alone, as a Tile's.
    accelerator: whether index_put_ takes scratch to sort the keys by which gradients are scattered.
    """

    rows: int
    picks: int
    h: int
    d: int
    size: int
    itemsize: int
    relu: bool = True
    accelerator: bool = False

    @classmethod
    def of(
        cls,
        sq: int,
        topk: int,
        h: int,
        d: int,
        size: int,
        itemsize: int,
        *,
        relu: bool = True,
        accelerator: bool = False,
    ) -> GatherTile:
        """Return the tile for a call of this shape."""
        fit = max(1, min(_GATHERED_BYTES // (d * size), _LOGITS_BYTES // (h * size)))
        picks = max(1, min(topk, fit))
        rows = max(1, min(sq, fit // picks, _PRODUCT_ROWS // h, _QUERY_BYTES // (h * d * size)))
        return cls(rows, picks, h, d, size, itemsize, relu, accelerator)

    @property
    def query_bytes(self) -> int:
        """Bytes of one [rows, h, d] buffer."""
        return self.rows * self.h * self.d * self.size

    @property
    def weight_bytes(self) -> int:
        """Bytes of one [rows, h] buffer."""
        return self.rows * self.h * self.size

    @property
    def key_bytes(self) -> int:
        """Bytes of one [rows, picks, d] buffer in the compute dtype."""
        return self.rows * self.picks * self.d * self.size

    @property
    def logits(self) -> int:
        """Elements of the [rows, h, picks] logits; without an activation, of the [rows, d] folded queries."""
        return self.rows * (self.h * self.picks if self.relu else self.d)

    @property
    def dkeys(self) -> int:
        """Elements of the gradients of gathered keys, whose memory also takes terms [rows, 1 or more picks, h]."""
        return self.rows * max(self.picks * self.d, self.h)

    @property
    def forward_bytes(self) -> int:
        """Scratch of the forward walk: gathered keys before and after their cast, logits, q, weights, bias, marks."""
        uncast = self.rows * self.picks * self.d * self.itemsize if self.itemsize < self.size else 0
        # Scores and cast bias; the bias as given, at most 8 bytes wide; the key as an int64; two marks.
        per_pick = 2 * self.size + 8 + 8 + 2
        bounds = 40 * self.rows + 64
        staged = self.query_bytes + self.weight_bytes
        return self.key_bytes + uncast + self.logits * self.size + staged + self.rows * self.picks * per_pick + bounds

    @property
    def backward_bytes(self) -> int:
        """Scratch of the backward walk: the forward's, u, weights * q, dweights twice, gradients of gathered keys."""
        sorting = 52 * self.rows * self.picks if self.accelerator else 0
        return self.forward_bytes + 2 * self.query_bytes + 2 * self.weight_bytes + self.dkeys * self.size + sorting


@dataclass(frozen=True)
class Selection:
    """A fold of tiles into the best `kept` keys of each row; `chunk` keys may wait beside them between two selections.

    The chunk is what the workspace leaves, in whole tiles; what is selected does not depend on it. accelerator: whether
    torch's topk and sort take scratch of their own from the allocator.
    """

    tile: Tile
    kept: int
    chunk: int
    accelerator: bool = False

    @classmethod
    def of(cls, tile: Tile, sk: int, topk: int, workspace: int, *, accelerator: bool = False) -> Selection:
        """Return the widest selection that fits the workspace, or the narrowest there is.

        Rows are halved until what they keep is small. That depends on the shape alone, so results still do not depend
        on the workspace; at a few rows a product may round otherwise than that of a whole tile.
        """
        least = cls(tile, min(topk, sk), tile.keys, accelerator)
        while least.kept_bytes > _KEPT_BYTES and least.tile.rows > 1:
            least = replace(least, tile=replace(least.tile, rows=least.tile.rows // 2))
        tile = least.tile
        spare = max(0, workspace - least.scratch_bytes) // (tile.rows * least.candidate_bytes * tile.keys)
        most = -(-sk // tile.keys)
        return replace(least, chunk=tile.keys * max(1, min(1 + spare, most)))

    @property
    def candidate_bytes(self) -> int:
        """Bytes of one waiting candidate: a packed int64; for float64 a score, a key, and both again sorted.

        On an accelerator more (read off CUDA's allocator): topk copies rows that are not dense, sort works in copies.
        """
        packed = self.tile.size == 4
        copied = (8 if packed else 48) if self.accelerator else 0
        return (8 if packed else 8 + 4 + 16) + copied

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is kept: as candidates, and once more with places (int64) and marks while it is selected."""
        sorting = 24 if self.accelerator and self.tile.size == 4 else 0
        return self.tile.rows * self.kept * (self.candidate_bytes + 17 + sorting)

    @property
    def scratch_bytes(self) -> int:
        """Scratch of the fold: that of the scores, what is kept, and the candidates that wait beside it."""
        rows, keys = self.tile.rows, self.tile.keys
        order = 4 * rows * keys + 4 * keys + 64
        return self.tile.forward_bytes + self.kept_bytes + rows * self.chunk * self.candidate_bytes + order


@dataclass(frozen=True)
class Entries:
    """A block of a selection [b, rows, topk] on its way into a mask: `batches` x `rows` x `width` of its entries.

    `size` is the itemsize of the mask. Whole rows, and whole batch elements, are taken as far as they fit.
    """

    batches: int
    rows: int
    width: int
    size: int

    @classmethod
    def of(cls, b: int, rows: int, topk: int, size: int) -> Entries:
        """Return the block for a selection of this shape."""
        fit = (_ENTRIES_BYTES - _SCALAR_BYTES) // (_KEY_AND_MARK_BYTES + size)
        width = max(1, min(topk, fit))
        some = max(1, min(rows, fit // width))
        return cls(max(1, min(b, fit // (width * some))), some, width, size)

    @property
    def count(self) -> int:
        """Entries in a block."""
        return self.batches * self.rows * self.width

    @property
    def scratch_bytes(self) -> int:
        """Scratch of a block: a key, a mark and what is written, for each entry."""
        return self.count * (_KEY_AND_MARK_BYTES + self.size) + _SCALAR_BYTES


def blocks(stop: int, step: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of each block of `step` from `start` up to `stop`; the last may be short."""
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
