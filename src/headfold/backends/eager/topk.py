"""index_topk by tiles: a fold that keeps the best keys of every row and never holds all scores.

A row block's scores arrive tile by tile and wait as candidates beside the best so far. When the workspace has no room
for more, the best of both go back to the front. Candidates are totally ordered and no two of a row are alike, so what
is kept does not depend on how many may wait, which is the only thing here that the workspace moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headfold.backends.eager.scratch import NEG_INF, Visible, batch_element, head
from headfold.backends.eager.walks import ForwardWalk, tile_of
from headfold.contract import compute_dtype
from headfold.tiles import Selection, blocks

LARGEST = 2**31 - 1
NOTHING = -(2**63)
# Packed scores of -inf, whatever their key, lie below this.
SELECTABLE = ((-8388608 ^ LARGEST) + 1) << 32


class PackedCandidates:
    """Candidates of float32 scores, packed into one int64 each: order-preserving score bits over LARGEST - key."""

    def __init__(self, plan: Selection, device: torch.device) -> None:
        rows, self.kept, keys = plan.tile.rows, plan.kept, plan.tile.keys
        self.packed = torch.empty(rows, self.kept + plan.chunk, dtype=torch.int64, device=device)
        self.best = torch.empty(rows * self.kept, dtype=torch.int64, device=device)
        self.place = torch.empty_like(self.best)
        self.nothing = torch.empty(rows * self.kept, dtype=torch.bool, device=device)
        self.sign = torch.empty(rows * keys, dtype=torch.int32, device=device)

    def start(self, rows: int) -> None:
        """Forget every candidate."""
        self.packed[:rows, : self.kept] = NOTHING

    def add(self, scores: Tensor, first_key: int, at: int) -> None:
        """Let a tile of scores [rows, keys] wait, `at` keys behind the kept ones. Overwrites the scores."""
        rows, keys = scores.shape
        scores += 0.0  # -0.0 + 0.0 is 0.0
        scores.nan_to_num_(nan=float("nan"), posinf=float("inf"), neginf=NEG_INF)  # one NaN, the positive one
        bits = scores.view(torch.int32)
        halves = self.packed.view(torch.int32).unflatten(1, (-1, 2))
        low, high = halves[:rows, self.kept + at : self.kept + at + keys].unbind(2)
        sign = torch.bitwise_right_shift(bits, 31, out=head(self.sign, rows, keys))
        torch.bitwise_xor(bits, sign.bitwise_and_(LARGEST), out=high)
        low.copy_(
            torch.arange(LARGEST - first_key, LARGEST - first_key - keys, -1, dtype=torch.int32, device=low.device)
        )

    def reduce(self, rows: int, waiting: int, *, last: bool) -> None:
        """Bring the best of the kept and the waiting to the front, in order if it is for the last time."""
        best, place = head(self.best, rows, self.kept), head(self.place, rows, self.kept)
        torch.topk(self.packed[:rows, : self.kept + waiting], self.kept, sorted=last, out=(best, place))
        self.packed[:rows, : self.kept] = best

    def write(self, rows: int, indices: Tensor, scores: Tensor | None) -> None:
        """Write what was kept into indices [rows, kept] and scores: -1 and -inf where there was nothing to keep."""
        best, place = head(self.best, rows, self.kept), head(self.place, rows, self.kept)
        best.copy_(self.packed[:rows, : self.kept])
        nothing = torch.lt(best, SELECTABLE, out=head(self.nothing, rows, self.kept))
        torch.bitwise_and(best, 0xFFFFFFFF, out=place)
        indices.copy_(place.neg_().add_(LARGEST).masked_fill_(nothing, -1))
        if scores is not None:
            best.bitwise_right_shift_(32)
            sign = torch.bitwise_right_shift(best, 31, out=place).bitwise_and_(LARGEST)
            scores.view(torch.int32).copy_(best.bitwise_xor_(sign))
            scores.masked_fill_(nothing, NEG_INF)


class SortedCandidates:
    """Candidates of float64 scores, which leave no room for a key beside them: a stable sort keeps ties in order."""

    def __init__(self, plan: Selection, device: torch.device) -> None:
        rows, self.kept, width = plan.tile.rows, plan.kept, plan.kept + plan.chunk
        self.scores = torch.empty(rows, width, dtype=torch.float64, device=device)
        self.keys = torch.empty(rows, width, dtype=torch.int32, device=device)
        self.values = torch.empty(rows * width, dtype=torch.float64, device=device)
        self.places = torch.empty(rows * width, dtype=torch.int64, device=device)
        self.best = torch.empty(rows * self.kept, dtype=torch.int32, device=device)
        self.nothing = torch.empty(rows * self.kept, dtype=torch.bool, device=device)

    def start(self, rows: int) -> None:
        """Forget every candidate."""
        self.scores[:rows, : self.kept] = NEG_INF

    def add(self, scores: Tensor, first_key: int, at: int) -> None:
        """Let a tile of scores [rows, keys] wait, `at` keys behind the kept ones."""
        rows, keys = scores.shape
        span = slice(self.kept + at, self.kept + at + keys)
        self.scores[:rows, span] = scores
        self.keys[:rows, span] = torch.arange(first_key, first_key + keys, dtype=torch.int32, device=scores.device)

    def reduce(self, rows: int, waiting: int, *, last: bool) -> None:
        """Bring the best of the kept and the waiting to the front, in order."""
        width = self.kept + waiting
        values, places = head(self.values, rows, width), head(self.places, rows, width)
        torch.sort(self.scores[:rows, :width], dim=1, stable=True, descending=True, out=(values, places))
        best = head(self.best, rows, self.kept)
        torch.gather(self.keys[:rows, :width], 1, places[:, : self.kept], out=best)
        self.keys[:rows, : self.kept] = best
        self.scores[:rows, : self.kept] = values[:, : self.kept]

    def write(self, rows: int, indices: Tensor, scores: Tensor | None) -> None:
        """Write what was kept into indices [rows, kept] and scores: -1 and -inf where there was nothing to keep."""
        kept = self.scores[:rows, : self.kept]
        nothing = torch.eq(kept, NEG_INF, out=head(self.nothing, rows, self.kept))
        indices.copy_(self.keys[:rows, : self.kept])
        indices.masked_fill_(nothing, -1)
        if scores is not None:
            scores.copy_(kept).add_(0.0)


def selection_plan(q: Tensor, k: Tensor, relu: bool, topk: int, workspace: int) -> Selection:
    """Return the fold of a call over batch-first q [b, sq, h, d] and k [b, sk, d]."""
    accelerator = q.device.type != "cpu"
    return Selection.of(tile_of(q, k, relu), k.shape[1], topk, workspace, accelerator=accelerator)


def index_topk(
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    bias: Tensor | None,
    offset: int | None,
    ratio: int,
    relu: bool,
    scale: float,
    topk: int,
    with_scores: bool,
    index_dtype: torch.dtype,
    workspace: int,
    in_order: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Indices [b, sq, topk] of a checked, batch-first call always in the total order, and their scores."""
    b, sq, sk = q.shape[0], q.shape[1], k.shape[1]
    indices = torch.full((b, sq, topk), -1, dtype=index_dtype, device=q.device)
    scores = torch.full((b, sq, topk), NEG_INF, dtype=compute_dtype(q.dtype), device=q.device) if with_scores else None
    plan = selection_plan(q, k, relu, topk, workspace)
    tile = plan.tile
    if plan.kept == 0:
        return indices, scores
    with torch.autocast(q.device.type, enabled=False):
        walk = ForwardWalk(tile, q, scale)
        candidates = (PackedCandidates if tile.size == 4 else SortedCandidates)(plan, q.device)
        for i in range(b):
            visible = Visible.of(i, sk, start, end, bias, offset, ratio)
            for row in blocks(sq, tile.rows):
                if visible.limit(row[1] - 1) == 0:
                    continue
                rows, waiting = row[1] - row[0], 0
                candidates.start(rows)
                for _, key, tile_scores in walk.tiles(q[i], batch_element(weights, i), k[i], visible, row):
                    if waiting + key[1] - key[0] > plan.chunk:
                        candidates.reduce(rows, waiting, last=False)
                        waiting = 0
                    candidates.add(tile_scores, key[0], waiting)
                    waiting += key[1] - key[0]
                candidates.reduce(rows, waiting, last=True)
                span = slice(*row), slice(plan.kept)
                candidates.write(rows, indices[i][span], None if scores is None else scores[i][span])
    return indices, scores
