"""How gradients reach gathered keys by kernels: a block of settled rows, slabs of it, their bytes. No torch.

A walk settles the picks of a block of rows. Then it either takes the block slab by slab: the gradients of a slab's
picks are written one by one, and one writer a key adds them up. Or one writer a key makes them again for all rows of
the block, masked by what those picked; for scores, given the dscores of a slab at all keys, zeros where nothing was
picked. The grid depends on the shape alone, never on the workspace.
"""

from __future__ import annotations

from dataclasses import dataclass

# Settled picks with the bitmaps they are told apart by; gradients of a slab's picks.
_SETTLED_BYTES = 3 << 20
_SLAB_BYTES = 12 << 20
# Those of attention, whose picks have gradients of every key head, and whose rows are long programs: too few of them a
# launch would leave a GPU idle.
_ATTENTION_SETTLED_BYTES = 8 << 20
_ATTENTION_SLAB_BYTES = 40 << 20
# A block of rows that needs no slab.
_MASKED_BYTES = 24 << 20
# Picks of a row that a slab takes at least, however many keys there are.
_LEAST_SPAN = 64
# Channels of the widest keys and values that one program holds for all rows.
_WIDEST_MASKED = 256
# What a pick's gradients cost a key head, in masked logits of one head: a slab's bytes are written and read, and its
# launches wait for one another (docs/kernels_gathered.md).
_PICK_COST = 360
# Dscores of a slab at all keys, with what stands beside them. With the sums of dk and small change below 16 MiB.
_DENSE_BYTES = 7 << 20
# Sums of dk that the rows of a slab are shared out to, where keys alone are too few programs (of 64 keys each) for a
# chip; each has rows x heads enough to be worth it.
_PARTS_BYTES = 8 << 20
_PROGRAMS, _PROGRAM_KEYS, _MOST_PARTS, _PART_ROWS = 256, 64, 8, 1024
# What a pick costs a channel, in multiply-adds of a visible pair, and the h · d below which a pair costs no less, for
# its launches (docs/kernels_gathered.md). Exact products take ten times as long, and launches no longer.
_PICK_PRODUCTS, _LEAST_PRODUCTS = 2000, 6000
_EXACT_KEYS = 4


def meets_every_key(sk: int, topk: int, h: int, d: int, *, exact: bool) -> bool:
    """Whether dk of selected scores is made of dscores at all keys, and not pick by pick.

    Where sk · max(h · d, 6000) <= 2000 · topk · d, or sk <= 4 · topk for exact products.
    """
    if exact:
        return sk <= _EXACT_KEYS * topk
    return sk * max(h * d, _LEAST_PRODUCTS) <= _PICK_PRODUCTS * topk * d


def masks_keys(sk: int, topk: int, heads: int, key_heads: int, widest: int, *, exact: bool) -> bool:
    """Whether keys meet all rows, masked, for their gradients, and not only the rows that picked them.

    Where keys are not wide, sk · np <= topk · (360 · np_k + np). Never where products are exact: there a probability
    has to come from the very logit that its softmax was made of, by the same tile.
    """
    near = sk * heads <= topk * (_PICK_COST * key_heads + heads)
    return near and widest <= _WIDEST_MASKED and not exact


@dataclass(frozen=True)
class ScatterTile:
    """A block of rows with settled picks, and slabs of it: `rows` rows and `span` of their picks.

    channels: of a pick's gradients, over all key heads, keys and values; 0 where nothing is written pick by pick.
    beside: bytes that a row of the block holds for each pick beside an int32.   held: bytes that it holds once.
    size: of the compute dtype.
    """

    block: int
    rows: int
    span: int
    topk: int
    sk: int
    channels: int
    beside: int
    held: int
    size: int

    @classmethod
    def of(
        cls,
        sq: int,
        sk: int,
        topk: int,
        channels: int,
        size: int,
        *,
        beside: int = 0,
        held: int = 0,
        attention: bool = False,
    ) -> ScatterTile:
        """Return the tile for a call of this shape."""
        settled_bytes = _ATTENTION_SETTLED_BYTES if attention else _SETTLED_BYTES
        if channels == 0 and attention:
            settled_bytes = _MASKED_BYTES
        slab_bytes = _ATTENTION_SLAB_BYTES if attention else _SLAB_BYTES
        one = cls(1, 0, 0, topk, sk, channels, beside, held, size)
        block = max(1, min(sq, settled_bytes // max(1, one.settled_bytes)))
        pick = channels * size
        span = max(1, min(topk, max(_LEAST_SPAN, slab_bytes // pick))) if pick else 0
        rows = max(1, min(block, slab_bytes // (span * pick))) if pick else 0
        return cls(block, rows, span, topk, sk, channels, beside, held, size)

    @classmethod
    def of_picks(cls, rows: int, sk: int, topk: int) -> ScatterTile:
        """Return the tile of a forward of attention, which settles the picks of all rows [b · sq] and no more."""
        return cls.of(rows, sk, topk if sk else 0, 0, 4)

    @classmethod
    def of_attention(
        cls,
        sq: int,
        sk: int,
        topk: int,
        heads: int,
        key_heads: int,
        dim: int,
        v_dim: int,
        size: int,
        *,
        shared: bool,
        ranged: bool,
        exact: bool,
    ) -> ScatterTile:
        """Return the tile of a backward of attention, without a slab where keys meet all rows, masked.

        shared: whether values are part of the keys.   exact: whether products are.
        """
        topk = topk if sk else 0
        channels = key_heads * (dim + (0 if shared and not ranged else v_dim))
        if masks_keys(sk, topk, heads, key_heads, max(dim, v_dim), exact=exact):
            channels = 0
        held = heads * (3 * size + (4 if ranged else 0))
        return cls.of(sq, sk, topk, channels, size, held=held, attention=True)

    @property
    def words(self) -> int:
        """Int32 of one row's bitmap of keys."""
        return -(-self.sk // 32)

    @property
    def settled_bytes(self) -> int:
        """Bytes of a block's picks, of what stands beside them, of their bitmaps, and of where keys stand in picks."""
        ranks = 4 * (self.topk + self.words) if self.channels else 0
        return self.block * (self.topk * (4 + self.beside) + 4 * self.words + ranks + self.held)

    @property
    def scatter_bytes(self) -> int:
        """Bytes of a slab's gradients."""
        return self.rows * self.span * self.channels * self.size

    @property
    def forward_bytes(self) -> int:
        """Scratch of a forward of selected scores: none, for picks are read as they stand."""
        return 0

    @property
    def backward_bytes(self) -> int:
        """Scratch of a backward walk."""
        return self.settled_bytes + self.scatter_bytes


@dataclass(frozen=True)
class DenseTile:
    """Slabs of `rows` rows whose dscores stand at all keys, and the `parts` sums of dk that rows are shared out to.

    size: of the compute dtype.
    """

    rows: int
    parts: int
    sk: int
    d: int
    size: int
    relu: bool

    @classmethod
    def of(cls, sq: int, sk: int, h: int, d: int, size: int, *, relu: bool) -> DenseTile:
        """Return the tile for a call of this shape."""
        one = cls(1, 1, sk, d, size, relu)
        rows = max(1, min(sq, _DENSE_BYTES // max(1, one.slab_bytes)))
        programs = _PROGRAMS // max(1, -(-sk // _PROGRAM_KEYS))
        fitting = _PARTS_BYTES // max(1, sk * d * size)
        parts = max(1, min(_MOST_PARTS, programs, fitting, rows * (h if relu else 1) // _PART_ROWS))
        return cls(rows, parts, sk, d, size, relu)

    @property
    def words(self) -> int:
        """Int32 of one row's bitmap of keys."""
        return -(-self.sk // 32)

    @property
    def slab_bytes(self) -> int:
        """Bytes of a slab's dscores, bitmaps and marks and, without an activation, of its folded queries."""
        return self.rows * (self.sk * self.size + 4 * self.words + 4 + (0 if self.relu else self.d * self.size))

    @property
    def forward_bytes(self) -> int:
        """Scratch of a forward of selected scores: none, for picks are read as they stand."""
        return 0

    @property
    def backward_bytes(self) -> int:
        """Scratch of a backward walk."""
        return 4 + self.slab_bytes + (self.parts * self.sk * self.d * self.size if self.parts > 1 else 0)


def tile_of_scores(
    sq: int, sk: int, topk: int, h: int, d: int, size: int, *, relu: bool, ranged: bool, exact: bool
) -> ScatterTile | DenseTile:
    """Return the tile of dk of selected scores.

    ranged: whether gradients are kept within float16's range.   exact: whether products are exact.
    """
    if meets_every_key(sk, topk, h, d, exact=exact):
        return DenseTile.of(sq, sk, h, d, size, relu=relu)
    return ScatterTile.of(sq, sk, topk, d, size, beside=size, held=4 if ranged else 0)
