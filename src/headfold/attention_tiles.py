"""How a call of sparse attention is cut: which walk it takes, its fixed grid, its bytes and FLOPs. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from headfold.flops import visible_pairs

# Logits of one slab; a backward holds two slabs. Keys of one span, gathered or cast.
_GATHERED_LOGITS = 1 << 20
_MASKED_LOGITS = 2 << 20
_SPAN_BYTES = 2 << 20
# Rows of the left operand (query rows x heads) at which a masked slab's products reach their rate.
_PRODUCT_ROWS = 256
# Bytes of int64 entries that a masked slab stages to write its mask.
_ENTRIES_BYTES = 4 << 20
# A gathered pick costs one key head as much as this many masked keys, and each query head that shares it as much as
# so many more. Measured on two cores (docs/design.md, "Sparse attention gathers or masks").
_PICK_COST = 20
_HEAD_COST = 2


def gathers(sk: int, topk: int, heads: int, key_heads: int) -> bool:
    """Whether picks are gathered: topk · np_k · (20 + 2 · np / np_k) <= sk · np. Else a slab of all keys is masked."""
    return topk * (_PICK_COST * key_heads + _HEAD_COST * heads) <= sk * heads


@dataclass(frozen=True)
class AttentionTile:
    """One step of a walk: the logits of `rows` query rows and the `group` heads of one key head, over `width` keys.

    gathered: whether each row has keys of its own, width = topk, or all rows those of the key axis, width = sk.
    span: keys that are gathered or cast at a time.   topk: entries that a row selects.   heads: of the queries.
    shared: whether values are the first v_dim channels of the keys.   size, itemsize: of the compute dtype and of the
    inputs.   accelerator: whether torch takes scratch of its own from the allocator, as on CUDA. The grid starts at row
    0 and key 0 and depends on the shape alone, never on the workspace.
    """

    gathered: bool
    rows: int
    width: int
    span: int
    topk: int
    heads: int
    group: int
    dim: int
    v_dim: int
    shared: bool
    size: int
    itemsize: int
    accelerator: bool = False

    @classmethod
    def of(
        cls,
        gathered: bool,
        sq: int,
        sk: int,
        topk: int,
        heads: int,
        key_heads: int,
        dim: int,
        v_dim: int,
        size: int,
        itemsize: int,
        *,
        shared: bool,
        accelerator: bool = False,
    ) -> AttentionTile:
        """Return the tile for a call of this shape."""
        group = heads // key_heads
        fit = max(1, _SPAN_BYTES // (max(dim, v_dim) * size))
        if gathered:
            width = topk if sk else 0
            span = max(1, min(width, fit))
            rows = max(1, min(sq, fit // span, _GATHERED_LOGITS // (group * (width + 1) * size)))
        else:
            width, span = sk, max(1, min(sk, max(64, fit)))
            entries = _ENTRIES_BYTES // (8 * max(1, topk))
            rows = max(1, min(sq, _PRODUCT_ROWS // group, _MASKED_LOGITS // (group * (width + 1) * size), entries))
        shape = heads, group, dim, v_dim, shared, size, itemsize, accelerator
        return cls(gathered, rows, width, span, topk, *shape)

    @property
    def logits(self) -> int:
        """Elements of a slab [rows, group, 1 + width]: a column for the sink stands before the keys."""
        return self.rows * self.group * (self.width + 1)

    @property
    def staged(self) -> int:
        """Keys of a span, over all rows where each has its own."""
        return self.span * (self.rows if self.gathered else 1)

    @property
    def apart(self) -> bool:
        """Whether values need a buffer of their own: they are not part of the keys, or those are gone by then."""
        return not self.shared or self.width > self.span

    @property
    def widest(self) -> int:
        """Channels of the wider of keys and values."""
        return max(self.dim, self.v_dim)

    @property
    def forward_bytes(self) -> int:
        """Scratch of the forward walk: one slab, queries, results, a span of keys and values, and the selection."""
        row = self.group * (self.dim + self.widest) * self.size
        span = self.staged * (self.dim + (self.v_dim if self.apart else 0)) * self.size
        settled = self.rows * self.group * (2 * self.size + 8) + self.heads * self.size
        return self.logits * self.size + self.rows * row + span + settled + self._selection_bytes

    @property
    def backward_bytes(self) -> int:
        """Scratch of the backward walk: the forward's, a second slab, incoming gradients, gradients of a span.

        On an accelerator torch's backward of a softmax takes a slab of its own.
        """
        slabs = (2 if self.accelerator else 1) * self.logits
        incoming = self.rows * self.group * self.v_dim
        spread = self.staged * self.widest
        sinks = self.heads + self.group
        sorting = 52 * self.staged if self.accelerator and self.gathered else 0
        return self.forward_bytes + (slabs + incoming + spread + sinks) * self.size + sorting

    @property
    def _selection_bytes(self) -> int:
        """Gathered: picks as given, sorted and their order, marks, and a span uncast. Masked: entries and masks."""
        bounds = 40 * self.rows + 64
        if not self.gathered:
            marks = self.width * (2 + 2 * self.size) + 1
            return self.rows * (8 * self.topk + marks) + 4 * self.width + bounds
        uncast = self.staged * self.widest * self.itemsize if self.itemsize < self.size else 0
        places = 8 * self.staged if self.width > self.span else 0
        sorting = (32 * self.rows if self.accelerator else 8) * self.width
        return self.rows * self.width * (24 + 2) + self.staged * self.size + uncast + places + sorting + bounds


def attention_flops(
    tile_is_gathered: bool,
    b: int,
    sq: int,
    sk: int,
    topk: int,
    heads: int,
    channels: int,
    *,
    offset: int | None = None,
    ratio: int = 1,
) -> int:
    """Count the FLOPs of products that run over `channels` channels in all, for every head, row and key or pick."""
    pairs = sq * topk if tile_is_gathered else visible_pairs(sq, sk, offset, ratio)
    return 2 * b * pairs * heads * channels
