"""index_topk without scores in memory: groups of rows whose best keys are listed as they are scored, and then cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headfold.backends.triton.again import again_kernel
from headfold.backends.triton.keep import keep_sifted_kernel
from headfold.backends.triton.launch import launch
from headfold.backends.triton.launches import Slab
from headfold.backends.triton.order import order_kernel
from headfold.backends.triton.products import is_near
from headfold.backends.triton.sampling import pivots_kernel, sample_kernel
from headfold.backends.triton.scores import fill_scores
from headfold.backends.triton.select import ORDERS, TILES, Row, network, row_of
from headfold.backends.triton.sift import KEYS, sift_kernel
from headfold.backends.triton.table import arch_of
from headfold.sift_tiles import CAPACITY, DEVIATIONS, FITTING, LISTS, ROOM, STRIDE, SiftedSelection
from headfold.triton_tiles import Kept, cdiv, padded, power_of_two

ORDER = {"BOTTOM": ORDERS[torch.float32].bottom, "TOP": ORDERS[torch.float32].top}
# Of programs that cut a row's lists: places that a thread holds, threads, warps.
CUT = {"HELD": 32, "WIDE": 128, "num_warps": 4}
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
        self.count = integers(plan.pivots)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return every buffer."""
        return self.memory, self.counts, self.pivots, self.count

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
    row = call.row("scores")
    # A tile's rows behind the last one of a group are scored and may be listed: there is memory for whole tiles.
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
                for row in range(0, last - first, plan.rows):
                    _select(*results, some, lists, row)
                _select_again(*results, some, lists)


def _limit(call: Slab) -> int:
    """Return how many keys the last row sees."""
    sq, sk = call.q.shape[1], call.k.shape[1]
    return sk if call.offset is None else max(0, min(sk, (sq + call.offset) // call.ratio))


def _find_pivots(call: Slab, lists: Lists) -> None:
    """Write the pivots of every row of a call."""
    plan, (_, sk, d), sq = lists.plan, call.k.shape, call.q.shape[1]
    count, apart = plan.sampled, padded(plan.sampled)
    keys = lists.numbers(0, count * d, call.k.dtype).view(1, count, d)
    sampled = _limit(call) > FITTING
    if sampled:
        grid = (cdiv(count, SAMPLED_ROWS),)
        launch(sample_kernel, grid, keys, call.k, count, d, *call.k.stride()[1:], **sample_constants(d))
    for first in range(0, sq, plan.sample_rows):
        some = call.rows(first, min(sq, first + plan.sample_rows))
        rows = some.q.shape[1]
        slab = lists.numbers(plan.sample_bytes, rows * apart, torch.float32).view(1, rows, apart)
        if sampled:
            # A row sees of STRIDE keys one at most: a causal bound of as many times the ratio, rounded up.
            width = min(count, cdiv(_limit(some), STRIDE))
            offset = None if some.offset is None else some.offset + (STRIDE - 1) * call.ratio
            rest = None, None, None, offset, STRIDE * call.ratio, True, call.scale
            fill_scores(slab[..., :width], some.q, some.weights, keys[:, :width], *rest)
        launch(
            pivots_kernel,
            (rows,),
            slab,
            lists.pivots[4 * first :],
            sk,
            plan.topk,
            some.offset or 0,
            apart,
            RATIO=call.ratio,
            HAS_OFFSET=call.offset is not None,
            **pivots_constants(count),
        )


def sample_constants(d: int) -> dict[str, int]:
    """Return the constants of `sample_kernel` for keys of so many channels."""
    return {"D": d, "WIDTH": power_of_two(d), "STEP": SAMPLED_ROWS, "STRIDE": STRIDE, "num_warps": 4}


def pivots_constants(count: int) -> dict[str, Any]:
    """Return the constants of `pivots_kernel` for a sample of so many keys, beside those of its bound."""
    sample = max(512, power_of_two(count))
    warps = max(4, min(16, sample // 512))
    sizes = {"SAMPLE": sample, "WIDE": 32 * warps, "num_warps": warps}
    return {"FITTING": FITTING, "STRIDE": STRIDE, "DEVIATIONS": DEVIATIONS, **ORDER, **sizes}


def _select(indices: Tensor, results: Tensor | None, call: Slab, lists: Lists, first: int) -> None:
    """Write the best keys of a group of rows from `first` on, whose pivots are found, unless their samples were wrong.

    indices, results: of all rows of the call, [rows, topk].
    """
    plan, sk = lists.plan, call.k.shape[1]
    end = min(call.q.shape[1], first + plan.rows)
    rows, group = end - first, call.rows(first, end)
    indices, results = indices[first:end], None if results is None else results[first:end]
    scores = lists.numbers(0, plan.places, torch.float32)
    entries = lists.numbers(4 * plan.places, plan.places, torch.int16)
    tables, count = (scores, entries, lists.counts, lists.pivots[4 * first :]), lists.count[first:]

    constants = sift_constants(call.constants(call.row("scores"), relu=True))
    assembly = call.q.is_cuda and torch.version.hip is None
    arguments = *tables, *_tensors(group), rows, sk, group.offset or 0, ROOM, call.scale, *_strides(group)
    grid = (cdiv(rows, constants["ROWS"]),)
    launch(sift_kernel, grid, *arguments, UNIFORM=True, ASSEMBLY=assembly, **constants)

    # What waits to be sorted lies where the lists' scores did: the best of a row in that row's memory.
    waiting, apart = (scores, ROOM * LISTS) if plan.in_order else (results, _row_of(results))
    sizes = sk, plan.topk, ROOM, ROOM * LISTS, indices.stride(0), apart
    launch(keep_sifted_kernel, (rows,), *tables, count, indices, waiting, *sizes, **ORDER, **CUT)
    if plan.in_order:
        warps = row_of(arch_of(indices.device), 1).order_warps
        strides = apart, 0, indices.stride(0), 0, _row_of(results)
        arguments = scores.view(torch.int32), count, indices, results, plan.topk, *strides
        launch(order_kernel, (rows, 1, 1), *arguments, **sort_constants(plan.topk, warps))


def _select_again(indices: Tensor, results: Tensor | None, call: Slab, lists: Lists) -> None:
    """Write the best keys of all rows whose samples were wrong."""
    plan, (_, sk, _), width = lists.plan, call.k.shape, padded(call.k.shape[1])
    programs = plan.programs
    lines = lists.numbers(0, programs * width, torch.float32)
    found = lists.numbers(4 * programs * width, programs * CAPACITY, torch.int64)
    begin = 4 * programs * width + 8 * programs * CAPACITY
    bits = lists.numbers(begin, programs * plan.topk, torch.float32) if plan.in_order else None
    sizes = call.q.shape[1], sk, plan.topk, CAPACITY, call.offset or 0
    strides = width, indices.stride(0), _row_of(results), *_strides(call)
    row = call.row("scores")
    few = selecting_row(arch_of(indices.device), row.warps)
    more = again_constants(call.constants(row, relu=True), few, plan.topk)
    more |= {"maxnreg": AGAIN_REGISTERS} if torch.version.hip is None else {}
    arguments = lists.count, lines, found, bits, indices, results, *_tensors(call), *sizes, call.scale, *strides
    launch(again_kernel, (programs,), *arguments, **more)


def _row_of(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _tensors(call: Slab) -> tuple[Tensor | None, ...]:
    return call.q, call.weights, call.k


def _strides(call: Slab) -> tuple[int, ...]:
    weights = (0, 0) if call.weights is None else call.weights.stride()[1:]
    return *call.q.stride()[1:], *weights, *call.k.stride()[1:]


def sift_constants(shared: dict[str, Any]) -> dict[str, Any]:
    """Return those of the constants that the score kernels share that `sift_kernel` takes."""
    return {name: x for name, x in shared.items() if name not in ("RELU", "KEYS", "FIRST", "SECOND")}


def selecting_row(arch: str, warps: int) -> Row:
    """Return the sizes of selecting programs that have so many warps."""
    rows = [row for row in TILES if row.arch in (arch, "*") and row.sk > FITTING]
    return next((row for row in rows if row.warps == warps), rows[0])


def sort_constants(topk: int, warps: int) -> dict[str, Any]:
    """Return the constants of `order_kernel` for rows of so many keys."""
    return {"TOP": ORDER["TOP"], **network(Kept(1, 0, topk, topk, 4).block, warps), "num_warps": warps}


def again_constants(shared: dict[str, Any], row: Row, topk: int) -> dict[str, Any]:
    """Return the constants of `again_kernel`, given those that the score kernels share, and sizes of selecting ones."""
    left = "RELU", "FIRST", "SECOND", "maxnreg"
    sizes = {"SAMPLE": row.sample, "DEEP": row.deep, "HELD": row.held, "WIDE": 32 * row.warps}
    kept = {name: x for name, x in shared.items() if name not in left}
    sorting = {name: x for name, x in sort_constants(topk, row.warps).items() if name != "LANES"}
    return {**kept, **ORDER, **sizes, **sorting}
