"""How gradients of gathered keys are scattered by kernels: rows of a slab, its bytes. Plain integers, no torch.

A walk settles the picks of a block of rows, then takes the block slab by slab: the gradients of a slab's picks are
written one by one, and one writer a key adds them up. The grid depends on the shape alone, never on the workspace.
"""

from __future__ import annotations

from dataclasses import dataclass

# Rows that one int32 of a key tells apart.
ROWS_A_WORD = 32
# Settled picks with the bitmaps they are told apart by; gradients of a slab's picks with where they lie.
_SETTLED_BYTES = 3 << 20
_SLAB_BYTES = 12 << 20
# Those of attention, whose picks have gradients of every key head: too few rows a slab would leave a GPU idle.
_ATTENTION_SLAB_BYTES = 40 << 20
# Picks of a row that a slab takes at least, however many keys there are.
_LEAST_SPAN = 64
# Channels of a pick whose gradients one program can hold: wider ones spill registers, and eager's walk makes them.
WIDEST_GRADIENTS = 256


@dataclass(frozen=True)
class ScatterTile:
    """A block of rows with settled picks, and slabs of it: `rows` rows and `span` of their picks.

    channels: of a pick's gradients, over all key heads, keys and values.   beside: bytes that a row of the block holds
    for each pick beside an int32.   held: bytes that it holds once.   size: of the compute dtype.
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
        slab_bytes = _ATTENTION_SLAB_BYTES if attention else _SLAB_BYTES
        settled = topk * (4 + beside) + 4 * -(-sk // 32) + held
        block = max(1, min(sq, _SETTLED_BYTES // max(1, settled)))
        pick, table = channels * size, 4 * sk
        fit = (slab_bytes - 2 * table) // pick
        span = max(1, min(topk, max(_LEAST_SPAN, fit)))
        rows = (slab_bytes - table) // max(1, span * pick + table + table // ROWS_A_WORD)
        rows = max(1, min(block, rows))
        if rows > ROWS_A_WORD:
            rows -= rows % ROWS_A_WORD
        return cls(block, rows, span, topk, sk, channels, beside, held, size)

    @classmethod
    def of_scores(cls, sq: int, sk: int, topk: int, d: int, size: int, *, ranged: bool) -> ScatterTile:
        """Return the tile of dk of selected scores.   ranged: whether gradients are kept within float16's range."""
        return cls.of(sq, sk, topk, d, size, beside=size, held=4 if ranged else 0)

    @classmethod
    def of_picks(cls, rows: int, sk: int, topk: int) -> ScatterTile:
        """Return the tile of a forward of attention, which settles the picks of all rows [b · sq] and no more."""
        return cls.of(rows, sk, topk if sk else 0, 1, 4)

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
    ) -> ScatterTile:
        """Return the tile of a backward of attention.   shared: whether values are part of the keys."""
        channels = key_heads * (dim + (0 if shared and not ranged else v_dim))
        held = heads * (3 * size + (4 if ranged else 0))
        return cls.of(sq, sk, topk if sk else 0, channels, size, held=held, attention=True)

    @property
    def words(self) -> int:
        """Int32 of one row's bitmap of keys."""
        return -(-self.sk // 32)

    @property
    def groups(self) -> int:
        """Int32 that each key needs to tell the rows of a slab apart."""
        return -(-self.rows // ROWS_A_WORD)

    @property
    def settled_bytes(self) -> int:
        """Bytes of a block's picks, of what stands beside them, and of their bitmaps."""
        return self.block * (self.topk * (4 + self.beside) + 4 * self.words + self.held)

    @property
    def scatter_bytes(self) -> int:
        """Bytes of a slab's gradients and of the tables that say where they lie."""
        return self.rows * self.span * self.channels * self.size + 4 * self.sk * (self.rows + self.groups)

    @property
    def forward_bytes(self) -> int:
        """Scratch of a forward of selected scores: none, for picks are read as they stand."""
        return 0

    @property
    def backward_bytes(self) -> int:
        """Scratch of a backward walk."""
        return self.settled_bytes + self.scatter_bytes
