"""index_topk without scores in memory: rows whose best keys are listed as they are scored, and then cut."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from headfold.backends.triton.again import again_kernel
from headfold.backends.triton.launch import launch
from headfold.backends.triton.launches import Slab
from headfold.backends.triton.products import is_near
from headfold.backends.triton.replay import do
from headfold.backends.triton.sampling import pivots_kernel, sample_kernel
from headfold.backends.triton.scores import fill_scores
from headfold.backends.triton.select import ORDERS, TILES, Row, network
from headfold.backends.triton.select_rows import select_rows_kernel
from headfold.backends.triton.sift import KEYS
from headfold.backends.triton.table import arch_of
from headfold.backends.triton.turns import COUNTERS, LEFT
from headfold.sift_tiles import CAPACITY, DEVIATIONS, FITTING, LISTS, ROOM, STRIDE, SiftedSelection
from headfold.triton_tiles import Kept, cdiv, padded, power_of_two

ORDER = {"BOTTOM": ORDERS[torch.float32].bottom, "TOP": ORDERS[torch.float32].top}
# Warps that cut a row, and places of each of its lists that their threads hold: first ones, others. Of 32 lists a
# thread of 128 has so 32 and 8, as `cut_lists` takes them.
_WARPS, _HELD, _REST = 4, 128, 32
# Registers of a thread of programs that select again: left to the compiler, some chips' get half of them, and spill.
AGAIN_REGISTERS = 255
SAMPLED_ROWS = 16


class Lists:
    """Scratch of a plan: memory for samples, lists, and rows that are selected from again, one after the other."""

    def __init__(self, plan: SiftedSelection, device: torch.device) -> None:
        def integers(count: int) -> Tensor:
            return torch.empty(count, dtype=torch.int32, device=device)

        self.plan = plan
        self.memory = torch.empty(plan.lists_bytes, dtype=torch.uint8, device=device)
        self.counts, self.pivots = integers(plan.rows * LISTS), integers(plan.pivots * 4)
        self.count, self.turns = integers(plan.pivots), integers(plan.turns)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return every buffer."""
        return self.memory, self.counts, self.pivots, self.count, self.turns

    def numbers(self, begin: int, count: int, dtype: torch.dtype) -> Tensor:
        """View so many numbers of the memory from a byte on."""
        return self.memory[begin : begin + count * dtype.itemsize].view(dtype)


def sifted_plan(call: Slab, topk: int, workspace: int, in_order: bool) -> SiftedSelection | None:
    """Return the fold of a call, or None where the kernels do not take it, or slabs of scores take less time.

    They take half precision, keys in a range known beforehand, and all heads at once.
    """
    (_, sq, h, d), sk = call.q.shape, call.k.shape[1]
    if call.q.dtype.itemsize != 2 or any(x is not None for x in (call.start, call.end, call.bias)):
        return None
    plan = SiftedSelection.of(sq, sk, h, d, topk, workspace, in_order=in_order)
    if plan is None:
        return None
    row = call.row("sifted_scores")
    fits = h <= row.rows and plan.rows % (row.rows // power_of_two(h)) == 0
    return plan if fits and row.keys == KEYS and is_near(call.k, row.keys) else None


def fold(indices: Tensor, scores: Tensor | None, call: Slab, lists: Lists) -> None:
    """Write indices and scores [b, sq, topk] of a call that has a `sifted_plan`, in order if that is."""
    plan, (b, sq) = lists.plan, call.q.shape[:2]
    with torch.cuda.device_of(call.q):
        for batch in range(b):
            q, weights, k = (None if x is None else x[batch : batch + 1] for x in (call.q, call.weights, call.k))
            assert q is not None
            assert k is not None
            one = call._replace(q=q, weights=weights, k=k)
            for first in range(0, sq, plan.pivots):
                last = min(sq, first + plan.pivots)
                some = one.rows(first, last)
                results = indices[batch, first:last], None if scores is None else scores[batch, first:last]
                _find_pivots(some, lists)
                _select(*results, some, lists)
                _select_again(*results, some, lists)


def _limit(call: Slab, rows: int) -> int:
    """Return how many keys the last of so many rows sees."""
    sk = call.k.shape[1]
    return sk if call.offset is None else max(0, min(sk, (rows + call.offset) // call.ratio))


def _find_pivots(call: Slab, lists: Lists) -> None:
    """Write the pivots of every row of a call."""
    plan, (_, sk, d), sq = lists.plan, call.k.shape, call.q.shape[1]
    count = plan.sampled
    keys = lists.numbers(0, count * d, call.k.dtype).view(1, count, d)
    sampled = _limit(call, sq) > FITTING
    if sampled:
        grid = (cdiv(count, SAMPLED_ROWS),)
        launch(sample_kernel, grid, keys, call.k, count, d, *call.k.stride()[1:], **sample_constants(d))
    first = 0
    while first < sq:
        rows = plan.sampled_rows(sq - first, functools.partial(_limit, call.rows(first, sq)))
        some = call.rows(first, first + rows)
        width = plan.width(_limit(some, rows))
        apart = padded(max(1, width))
        slab = lists.numbers(plan.sample_bytes, rows * apart, torch.float32).view(1, rows, apart)
        if sampled:
            # A row sees of STRIDE keys one at most: a causal bound of as many times the ratio, rounded up.
            offset = None if some.offset is None else some.offset + (STRIDE - 1) * call.ratio
            rest = None, None, None, offset, STRIDE * call.ratio, True, call.scale
            fill_scores(slab[..., :width], some.q, some.weights, keys[:, :width], *rest)
        launch(
            pivots_kernel,
            (rows,),
            slab,
            lists.pivots[4 * first :],
            lists.count[first:],
            sk,
            plan.topk,
            some.offset or 0,
            apart,
            RATIO=call.ratio,
            HAS_OFFSET=call.offset is not None,
            **pivots_constants(count),
        )
        first += rows


def sample_constants(d: int) -> dict[str, int]:
    """Return the constants of `sample_kernel` for keys of so many channels."""
    return {"D": d, "WIDTH": power_of_two(d), "STEP": SAMPLED_ROWS, "STRIDE": STRIDE, "num_warps": 4}


def pivots_constants(count: int) -> dict[str, Any]:
    """Return the constants of `pivots_kernel` for a sample of so many keys, beside those of its bound."""
    sample = max(512, power_of_two(count))
    warps = max(4, min(16, sample // 512))
    sizes = {"SAMPLE": sample, "WIDE": 32 * warps, "num_warps": warps}
    return {"FITTING": FITTING, "STRIDE": STRIDE, "DEVIATIONS": DEVIATIONS, **ORDER, **sizes}


def _select(indices: Tensor, results: Tensor | None, call: Slab, lists: Lists) -> None:
    """Write the best keys of rows [rows, topk], whose pivots are found, unless their samples were very wrong."""
    plan, (sq, sk) = lists.plan, (call.q.shape[1], call.k.shape[1])
    scores = lists.numbers(0, plan.places, torch.float32)
    entries = lists.numbers(4 * plan.places, plan.places, torch.int16)
    constants = select_constants(call.constants(call.row("sifted_scores"), relu=True), plan.topk)
    assembly = call.q.is_cuda and torch.version.hip is None
    blocks, abreast = cdiv(sq, constants["ROWS"]), plan.rows // constants["ROWS"]
    used = COUNTERS.value + 4 * cdiv(blocks, 2)  # a kernel is compiled once, for queues that are aligned
    do(_clear, lists.turns[: used + blocks])
    tables = lists.turns, lists.turns[used:], scores, entries, lists.counts, lists.pivots, lists.count, indices, results
    sizes = sq, sk, plan.topk, call.offset or 0, ROOM, abreast, int(plan.in_order), call.scale
    strides = ROOM * LISTS, indices.stride(0), _row_of(results), *_strides(call)
    arguments = *tables, *_tensors(call), *sizes, *strides
    launch(select_rows_kernel, (2 * blocks,), *arguments, UNIFORM=True, ASSEMBLY=assembly, **constants)


def _clear(x: Tensor) -> None:
    x.zero_()


def _select_again(indices: Tensor, results: Tensor | None, call: Slab, lists: Lists) -> None:
    """Write the best keys of the rows that are left."""
    plan, (_, sk, _), width = lists.plan, call.k.shape, padded(call.k.shape[1])
    programs = plan.programs
    lines = lists.numbers(0, programs * width, torch.float32)
    found = lists.numbers(4 * programs * width, programs * CAPACITY, torch.int64)
    begin = 4 * programs * width + 8 * programs * CAPACITY
    bits = lists.numbers(begin, programs * plan.topk, torch.float32) if plan.in_order else None
    sizes = call.q.shape[1], sk, plan.topk, CAPACITY, call.offset or 0
    strides = width, indices.stride(0), _row_of(results), *_strides(call)
    row = call.row("sifted_scores")
    few = selecting_row(arch_of(indices.device), row.warps)
    more = again_constants(call.constants(row, relu=True), few, plan.topk)
    more |= {"maxnreg": AGAIN_REGISTERS} if torch.version.hip is None else {}
    scratch = lists.turns[LEFT.value :], lists.count, lines, found, bits
    arguments = *scratch, indices, results, *_tensors(call), *sizes, call.scale, *strides
    launch(again_kernel, (programs,), *arguments, **more)


def _row_of(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _tensors(call: Slab) -> tuple[Tensor | None, ...]:
    return call.q, call.weights, call.k


def _strides(call: Slab) -> tuple[int, ...]:
    weights = (0, 0) if call.weights is None else call.weights.stride()[1:]
    return *call.q.stride()[1:], *weights, *call.k.stride()[1:]


def select_constants(shared: dict[str, Any], topk: int) -> dict[str, Any]:
    """Return the constants of `select_rows_kernel`, given those that the score kernels share."""
    warps = shared["num_warps"]
    scoring = {name: x for name, x in shared.items() if name not in ("RELU", "KEYS", "FIRST", "SECOND")}
    wide, together = 32 * _WARPS, max(1, min(shared["ROWS"], warps // _WARPS))
    held = {"HELD": _HELD * LISTS // wide, "REST": _REST * LISTS // wide, "TOGETHER": together, "WIDE": wide}
    return {**scoring, **held, **sort_constants(topk, warps)}


def selecting_row(arch: str, warps: int) -> Row:
    """Return the sizes of selecting programs that have so many warps."""
    rows = [row for row in TILES if row.arch in (arch, "*") and row.sk > FITTING]
    return next((row for row in rows if row.warps == warps), rows[0])


def sort_constants(topk: int, warps: int) -> dict[str, Any]:
    """Return the constants of `order_kernel` for rows of so many keys."""
    return {**ORDER, **network(Kept(1, 0, topk, topk, 4).block, warps), "num_warps": warps}


def again_constants(shared: dict[str, Any], row: Row, topk: int) -> dict[str, Any]:
    """Return the constants of `again_kernel`, given those that the score kernels share, and sizes of selecting ones."""
    left = "RELU", "FIRST", "SECOND", "maxnreg"
    sizes = {"SAMPLE": row.sample, "DEEP": row.deep, "HELD": row.held, "WIDE": 32 * row.warps}
    kept = {name: x for name, x in shared.items() if name not in left}
    sorting = {name: x for name, x in sort_constants(topk, row.warps).items() if name != "LANES"}
    return {**kept, **ORDER, **sizes, **sorting}
