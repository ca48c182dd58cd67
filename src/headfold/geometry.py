"""IndexerGeometry: every byte and FLOP formula of an indexer and of the attention it serves, as integers. No torch.

One byte formula serves the planner, the lanes, the tests and the docs. A peak counts what a call allocates beyond its
inputs (and beyond the incoming gradient), its results included; tests/test_plan.py holds every bill to measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from headfold import bills, dense_bills
from headfold.attention_tiles import AttentionTile, gathers
from headfold.bills import Bill, Scratch
from headfold.flops import score_flops
from headfold.loss_slabs import LossSlab
from headfold.loss_tiles import LossTile
from headfold.scatter_tiles import ScatterTile, tile_of_scores
from headfold.score_tiles import ScoreTile
from headfold.sift_tiles import SiftedSelection
from headfold.tiles import DEFAULT_WORKSPACE, MIB, GatherTile, Selection, Tile
from headfold.triton_tiles import SlabSelection

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Ways to score every key; ways to keep topk keys a row; scoring of the keys that were kept.
PATHS = ("materialized", "per-head loop", "headfold")
SELECTING = ("materialized + topk", "headfold top-k")
SELECTED = "headfold selected scores"
# The loss that trains an indexer, and attention over what it selected; each with full tensors and by slabs.
LOSSES = ("materialized loss", "headfold loss")
ATTENDING = ("materialized attention", "headfold attention")
OURS = (PATHS[2], SELECTING[1], SELECTED, LOSSES[1], ATTENDING[1])
BACKENDS = ("eager", "triton")


@dataclass(frozen=True)
class IndexerGeometry:
    """The shape of one indexer call.

    Args:
        b, sq, sk: batch, query rows, keys.   heads, dim: indexer heads and their width.
        topk: keys kept per row; 0 where nothing is selected.
        dtype: of q, weights and k: "float16", "bfloat16", "float32" or "float64".
        relu: whether scores pass through ReLU; without it the heads fold before the product.
        np, np_k, hn, v_dim: heads of the attention, its key heads, and the widths of a head's keys and values; all 0
            where only the indexer is looked at.

    Raises: ValueError for a size below its minimum, an unknown dtype or an attention of which a part is missing.
    """

    b: int
    sq: int
    sk: int
    heads: int
    dim: int
    topk: int = 0
    dtype: str = "float32"
    relu: bool = True
    np: int = 0
    np_k: int = 0
    hn: int = 0
    v_dim: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that no call has."""
        for name, least in (("b", 0), ("sq", 0), ("sk", 0), ("heads", 1), ("dim", 1), ("topk", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"IndexerGeometry: {name} must be an integer of at least {least}, got {value!r}.")
        attention = {name: getattr(self, name) for name in ("np", "np_k", "hn", "v_dim")}
        if any(attention.values()):
            for name, value in attention.items():
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ValueError(
                        f"IndexerGeometry: {name} must be an integer of at least 1 beside the rest of an attention, "
                        f"got {value!r}."
                    )
            if self.np % self.np_k:
                raise ValueError(f"IndexerGeometry: np_k must divide np = {self.np}, got {self.np_k}.")
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"IndexerGeometry: dtype must be one of {', '.join(ITEMSIZE)}, got {self.dtype!r}.")

    def with_(self, **changes: Any) -> IndexerGeometry:
        """Return this geometry with some fields changed."""
        return replace(self, **changes)

    @property
    def itemsize(self) -> int:
        """Bytes of one element of q, weights and k."""
        return ITEMSIZE[self.dtype]

    @property
    def compute_itemsize(self) -> int:
        """Bytes of one score: float64 for float64 inputs, else float32."""
        return max(4, self.itemsize)

    @property
    def q_elements(self) -> int:
        """Elements of q."""
        return self.b * self.sq * self.heads * self.dim

    @property
    def weights_elements(self) -> int:
        """Elements of weights."""
        return self.b * self.sq * self.heads

    @property
    def k_elements(self) -> int:
        """Elements of k."""
        return self.b * self.sk * self.dim

    @property
    def inputs_bytes(self) -> int:
        """Bytes of q, weights and k."""
        return (self.q_elements + self.weights_elements + self.k_elements) * self.itemsize

    @property
    def query_elements(self) -> int:
        """Elements of the attention's query."""
        return self.b * self.sq * self.np * self.hn

    @property
    def key_value_elements(self) -> int:
        """Elements of the attention's key and value."""
        return self.b * self.sk * self.np_k * (self.hn + self.v_dim)

    @property
    def attention_bytes(self) -> int:
        """Bytes of the attention's query, key and value."""
        return (self.query_elements + self.key_value_elements) * self.itemsize

    @property
    def attended_bytes(self) -> int:
        """Bytes of the attention's result."""
        return self.b * self.sq * self.np * self.v_dim * self.itemsize

    @property
    def logits_bytes(self) -> int:
        """Bytes of one [b, np, sq, sk] tensor, which dense attention builds."""
        return self.scores_bytes * self.np

    @property
    def scores_bytes(self) -> int:
        """Bytes of the [b, sq, sk] scores."""
        return self.b * self.sq * self.sk * self.compute_itemsize

    @property
    def intermediate_bytes(self) -> int:
        """Bytes of one [sq, b, h, sk] tensor, which the materialised path builds."""
        return self.scores_bytes * self.heads

    @property
    def indices_bytes(self) -> int:
        """Bytes of the [b, sq, topk] int32 selection."""
        return 4 * self.b * self.sq * self.topk

    @property
    def selected_bytes(self) -> int:
        """Bytes of the [b, sq, topk] scores of a selection."""
        return self.b * self.sq * self.topk * self.compute_itemsize

    @property
    def gradients_bytes(self) -> int:
        """Bytes of dq, dweights and dk, each in its input's dtype."""
        return self.inputs_bytes

    @property
    def tile(self) -> Tile:
        """The tile of the walk."""
        return Tile.of(self.sq, self.sk, self.heads, self.dim, self.compute_itemsize, relu=self.relu)

    @property
    def forward_scratch(self) -> int:
        """Bytes of workspace that the forward walk takes; the smallest workspace that works without gradients."""
        return self.tile.forward_bytes

    @property
    def backward_scratch(self) -> int:
        """Bytes of workspace that the backward walk takes; the smallest workspace that works with gradients."""
        return self.tile.backward_bytes

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of the float32 [sk, d] sums that half-precision dk is cast from, one batch element at a time."""
        return self.sk * self.dim * 4 if self.itemsize < 4 else 0

    def least_workspace(self, *, accelerator: bool = False, backend: str = "eager") -> int:
        """Return the smallest workspace in which scores and, where topk is given, selections work, with gradients."""
        paths = OURS[:3] if self.topk else OURS[:1]
        return max(self.scratch(path, workspace=0, accelerator=accelerator, backend=backend).backward for path in paths)

    def gather_tile(self, *, accelerator: bool = False) -> GatherTile:
        """Return the tile of the gathered walk, which scores selected keys."""
        shape = self.sq, self.topk, self.heads, self.dim, self.compute_itemsize, self.itemsize
        return GatherTile.of(*shape, relu=self.relu, accelerator=accelerator)

    def selection(self, workspace: int = DEFAULT_WORKSPACE, *, accelerator: bool = False) -> Selection:
        """Return the selecting fold that a workspace leaves room for."""
        return Selection.of(self.tile, self.sk, self.topk, workspace, accelerator=accelerator)

    def loss_tile(self, topk: int | None = None, *, accelerator: bool = False) -> LossTile:
        """Return the slab of the loss, which selects topk keys, or nothing."""
        shape = self.np, self.np_k, self.hn, topk
        return LossTile.of(self.b, self.sq, self.tile, self.sk, *shape, accelerator=accelerator)

    def attention_tile(self, *, accelerator: bool = False) -> AttentionTile:
        """Return the tile of the walk that attends to topk keys a row."""
        shape = self.sq, self.sk, self.topk, self.np, self.np_k, self.hn, self.v_dim
        gathered = gathers(self.sk, self.topk, self.np, self.np_k)
        sizes = self.compute_itemsize, self.itemsize
        return AttentionTile.of(gathered, *shape, *sizes, shared=False, accelerator=accelerator)

    def slab_selection(self, workspace: int = DEFAULT_WORKSPACE) -> SlabSelection:
        """Return the selecting fold of the Triton kernels that a workspace leaves room for."""
        shape = self.b, self.sq, self.sk, self.heads, self.dim, self.topk, self.compute_itemsize
        return SlabSelection.of(*shape, workspace, relu=self.relu)

    def sifted_selection(self, workspace: int = DEFAULT_WORKSPACE) -> SiftedSelection | None:
        """Return the fold that keeps no scores, or None where no call of these sizes has it.

        One whose keys are bounded by tensors has the other, whatever its sizes.
        """
        if not self.relu or self.itemsize != 2:
            return None
        return SiftedSelection.of(self.sq, self.sk, self.heads, self.dim, self.topk, workspace)

    def bill(
        self,
        path: str,
        *,
        causal: bool = False,
        scale: float = 1.0,
        workspace: int = DEFAULT_WORKSPACE,
        accelerator: bool = False,
        backend: str = "eager",
    ) -> Bill:
        """Return what a path allocates: one of PATHS, SELECTING, SELECTED, LOSSES or ATTENDING.

        A mask or a scale costs the other paths bytes of its own; headfold's scratch has room for them in any case. Only
        a selection grows with its workspace. What selects is not differentiated: its training peak is its forward.
        accelerator: whether torch takes scratch of its own from the allocator that is billed, as on CUDA.
        backend: one of BACKENDS, of our paths: the walk over PyTorch tiles, or the kernels.
        """
        if path in OURS:
            scratch = self.scratch(path, workspace=workspace, accelerator=accelerator, backend=backend)
            return self._our_bill(path, scratch)
        if path in (*LOSSES, *ATTENDING):
            return self._dense_bill(path, causal=causal, scale=scale, accelerator=accelerator)
        if path not in (*PATHS, *SELECTING):
            known = ", ".join((*PATHS, *SELECTING, SELECTED, *LOSSES, *ATTENDING))
            raise ValueError(f"IndexerGeometry.bill: path must be one of {known}, got {path!r}.")
        size = self.compute_itemsize
        shape = (self.b, self.sq, self.sk, self.heads, self.dim)
        call = bills.Call(*shape, self.itemsize, size, self.relu, causal, scaled=scale != 1.0)
        if path == "per-head loop":
            return bills.loop(call)
        scored = bills.materialized(call)
        if path == "materialized":
            return scored
        # torch.topk gives values in the scores' dtype and int64 indices, beside the whole score matrix.
        kept = self.b * self.sq * min(self.topk, self.sk) * (size + 8)
        peak = max(scored.forward, self.scores_bytes + kept)
        return Bill(peak, 0, peak)

    def scratch(
        self, path: str, *, workspace: int = DEFAULT_WORKSPACE, accelerator: bool = False, backend: str = "eager"
    ) -> Scratch:
        """Return what one of OURS takes beside its results and gradients; arguments as in `bill`."""
        if backend not in BACKENDS:
            raise ValueError(f"IndexerGeometry.scratch: backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
        if path in (*LOSSES, *ATTENDING):
            self._need_attention(path)
        if backend == "triton":
            return self._kernel_scratch(path, workspace)
        if path == "headfold top-k":
            selecting = self.selection(workspace, accelerator=accelerator).scratch_bytes
            return Scratch(selecting, selecting)
        if path == "headfold loss":
            slab = self.loss_tile(accelerator=accelerator)
            return Scratch(slab.forward_bytes, slab.backward_bytes)
        if path == "headfold attention":
            walk = self.attention_tile(accelerator=accelerator)
            return Scratch(walk.forward_bytes, walk.backward_bytes, self._attention_sums)
        tile = self.tile if path == "headfold" else self.gather_tile(accelerator=accelerator)
        return Scratch(tile.forward_bytes, tile.backward_bytes, self.accumulator_bytes)

    def _kernel_scratch(self, path: str, workspace: int) -> Scratch:
        size, ranged = self.compute_itemsize, self.dtype == "float16"
        if path == "headfold":
            call = ScoreTile(self.b, self.sq, self.sk, self.heads, self.dim, size, self.relu)
            return Scratch(call.forward_bytes, call.backward_bytes, call.sums_bytes(self.itemsize))
        if path == "headfold top-k":
            sifted = self.sifted_selection(workspace)
            selecting = max(x.scratch_bytes for x in (self.slab_selection(workspace), sifted) if x is not None)
            return Scratch(selecting, selecting)
        if path == SELECTED:
            kind = {"relu": self.relu, "ranged": ranged, "exact": self.itemsize > 2}
            dk = tile_of_scores(self.sq, self.sk, self.topk, self.heads, self.dim, size, **kind)
            return Scratch(dk.forward_bytes, dk.backward_bytes, self.accumulator_bytes)
        if path == "headfold loss":
            shape = self.b, self.sq, self.sk, self.heads, self.dim, self.np, size
            slab = LossSlab.of(*shape, None, relu=self.relu)
            return Scratch(slab.forward_bytes, slab.backward_bytes)
        forward = ScatterTile.of_picks(self.b * self.sq, self.sk, self.topk).settled_bytes
        widths = self.np, self.np_k, self.hn, self.v_dim, size
        kinds = {"ranged": ranged, "exact": self.itemsize > 2}
        walk = ScatterTile.of_attention(self.sq, self.sk, self.topk, *widths, shared=False, **kinds)
        backward = walk.backward_bytes + self.np * size
        return Scratch(forward, backward, self._attention_sums)

    @property
    def _attention_sums(self) -> int:
        """Bytes of the sums of one batch element's dk and dv that half-precision ones are cast from."""
        size = self.compute_itemsize
        return size * self.key_value_elements // max(1, self.b) if self.itemsize < size else 0

    def _our_bill(self, path: str, scratch: Scratch) -> Bill:
        if path == "headfold top-k":
            peak = self.indices_bytes + scratch.forward
            return Bill(peak, 0, peak)
        size = self.compute_itemsize
        if path == "headfold loss":
            held = self.inputs_bytes // self.itemsize * size
            return Bill(size + scratch.forward, held, size + held + max(scratch.backward, self._returned_bytes))
        if path == "headfold attention":
            result, gradients = self.attended_bytes, self.attention_bytes
        else:
            result = self.scores_bytes if path == "headfold" else self.selected_bytes
            gradients = self.gradients_bytes
        backward = gradients + scratch.sums + scratch.backward
        return Bill(result + scratch.forward, 0, result + max(scratch.forward, backward))

    @property
    def _returned_bytes(self) -> int:
        """Bytes of a loss's backward: it returns each gradient beside the held one, and casts it a block at a time."""
        size, alive, peak = self.compute_itemsize, 0, 0
        sizes = (self.q_elements, self.sq), (self.weights_elements, self.sq), (self.k_elements, self.sk)
        for elements, rows in sizes if self.b else ():
            alive += elements * self.itemsize
            if elements and self.itemsize < size:
                step = min(rows, max(1, MIB * rows // (4 * elements * size)))
                peak = max(peak, alive + elements // rows * step * size)
        return max(alive, peak)

    def _dense_bill(self, path: str, *, causal: bool, scale: float, accelerator: bool) -> Bill:
        self._need_attention(path)
        shape = self.b, self.sq, self.sk, self.topk, self.np, self.hn, self.v_dim
        dense = dense_bills.Dense(*shape, self.itemsize, self.compute_itemsize, causal)
        if path == "materialized loss":
            return dense_bills.full_loss(self.bill("materialized", causal=causal, scale=scale), dense)
        return dense_bills.dense_attention(dense, accelerator=accelerator)

    def _need_attention(self, path: str) -> None:
        if self.np == 0:
            raise ValueError(f"IndexerGeometry.bill: {path} needs np, np_k, hn and v_dim, got none.")

    def forward_flops(self, *, causal: bool = False) -> int:
        """FLOPs of the scores: two per multiply-add of the product and of the fold over heads."""
        return self._flops(1, causal)

    @property
    def backward_products(self) -> int:
        """Products that the backward is credited with: logits again, u and dk; without an activation the last two.

        They are the algorithm's. With an activation the kernels run four: each of the two that have a gradient to
        write makes the logits for itself.
        """
        return 3 if self.relu else 2

    def backward_flops(self, *, causal: bool = False) -> int:
        """FLOPs of all three gradients: those of `backward_products` products, whichever backend runs them."""
        return self._flops(self.backward_products, causal)

    def _flops(self, products: int, causal: bool) -> int:
        offset = self.sk - self.sq if causal else None
        return score_flops(
            self.b, self.sq, self.sk, self.heads, self.dim, products=products, relu=self.relu, offset=offset
        )
