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
from headfold.backends.triton.select import ORDERS, Row, network, row_of
from headfold.backends.triton.sift import KEYS, sift_kernel
from headfold.backends.triton.table import arch_of
from headfold.sift_tiles import CAPACITY, FITTING, LISTS, ROOM, STRIDE, SiftedSelection
from headfold.triton_tiles import Kept, cdiv, padded, power_of_two

ORDER = {"BOTTOM": ORDERS[torch.float32].bottom, "TOP": ORDERS[torch.float32].top}
# Of programs that cut a row's lists: places that a thread holds, threads, warps.
CUT = {"HELD": 32, "WIDE": 128, "num_warps": 4}
# Rows that are selected from again have the sizes of rows of so many keys, in which 256 threads share what is held, and
# as many registers as those may have: left to the compiler, some chips' get half of them, and spill.
AGAIN_KEYS, AGAIN_REGISTERS = 65536, 240
SAMPLED_ROWS = 16


class Lists:
    """Scratch of a plan: memory for samples, lists, and rows that are selected from again, one after the other."""

    def __init__(self, plan: SiftedSelection, device: torch.device) -> None:
        def numbers(count: int) -> Tensor:
            return torch.empty(count, dtype=torch.int32, device=device)

        self.plan = plan
        self.memory = torch.empty(plan.lists_bytes, dtype=torch.uint8, device=device)
        self.counts, self.pivots = numbers(plan.rows * LISTS), numbers(plan.pivots * 4)
        self.count, self.later = numbers(plan.rows), numbers(plan.rows)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return every buffer."""
        return self.memory, self.counts, self.pivots, self.count, self.later

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
    return plan if row.keys == KEYS and h <= row.rows and is_near(call.k, row.keys) else None


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
                _find_pivots(one.rows(first, last), lists)
                for row in range(first, last, plan.rows):
                    end = min(last, row + plan.rows)
                    beside = None if scores is None else scores[batch, row:end]
                    group = Group(indices[batch, row:end], beside, one.rows(row, end), lists)
                    group.select(lists.pivots[4 * (row - first) :])


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
        constants = {"D": d, "WIDTH": power_of_two(d), "STEP": SAMPLED_ROWS, "num_warps": 4}
        launch(sample_kernel, (cdiv(count, SAMPLED_ROWS),), keys, call.k, count, d, *call.k.stride()[1:], **constants)
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
            FITTING=FITTING,
            **ORDER,
            **sample_sizes(count),
        )


def sample_sizes(count: int) -> dict[str, int]:
    """Return the constants of `pivots_kernel` for a sample of so many keys."""
    sample = max(512, power_of_two(count))
    warps = max(4, min(16, sample // 512))
    return {"SAMPLE": sample, "WIDE": 32 * warps, "num_warps": warps}


class Group:
    """Rows that are selected from at a time: where their results [rows, topk] are written, and what they see."""

    def __init__(self, indices: Tensor, results: Tensor | None, call: Slab, lists: Lists) -> None:
        self.indices, self.results, self.call, self.lists = indices, results, call, lists
        self.plan, self.rows, self.sk = lists.plan, call.q.shape[1], call.k.shape[1]
        self.scores = lists.numbers(0, self.plan.places, torch.float32)
        # What waits to be sorted lies where the lists' scores did: the best of a row in that row's memory.
        self.beside, self.apart = results, 0 if results is None else results.stride(0)
        if self.plan.in_order:
            self.beside, self.apart = self.scores, ROOM * LISTS

    def select(self, pivots: Tensor) -> None:
        """Write the best keys of every row, given their pivots."""
        lists = self.lists
        tables = self.scores, lists.numbers(4 * self.plan.places, self.plan.places, torch.int16), lists.counts, pivots
        self._sift(tables)
        self._keep(tables)
        self._sort(self.beside, self.apart, lists.count)
        waiting, apart = self.beside, self.apart
        if self.plan.in_order:
            waiting, apart = lists.numbers(0, self.rows * self.plan.topk, torch.float32), self.plan.topk
        self._again(waiting, apart)
        self._sort(waiting, apart, lists.later)

    def _sift(self, tables: tuple[Tensor, ...]) -> None:
        row = self.call.row("scores")
        constants = sift_constants(self.call.constants(row, relu=True))
        assembly = self.call.q.is_cuda and torch.version.hip is None
        grid, sizes = (cdiv(self.rows, constants["ROWS"]),), (self.rows, self.sk, self.call.offset or 0, ROOM)
        arguments = *tables, *self._tensors, *sizes, self.call.scale, *self._strides
        launch(sift_kernel, grid, *arguments, UNIFORM=True, ASSEMBLY=assembly, **constants)

    def _keep(self, tables: tuple[Tensor, ...]) -> None:
        results = self.lists.count, self.indices, self.beside
        sizes = self.sk, self.plan.topk, ROOM, ROOM * LISTS, self.indices.stride(0), self.apart
        launch(keep_sifted_kernel, (self.rows,), *tables, *results, *sizes, **ORDER, **CUT)

    def _again(self, waiting: Tensor | None, apart: int) -> None:
        plan, lists, width = self.plan, self.lists, padded(self.sk)
        begin, programs = plan.waiting_bytes, plan.programs
        lines = lists.numbers(begin, programs * width, torch.float32)
        found = lists.numbers(begin + 4 * programs * width, programs * CAPACITY, torch.int64)
        results = lists.count, lists.later, lines, found, self.indices, waiting
        sizes = self.rows, self.sk, plan.topk, CAPACITY, self.call.offset or 0
        strides = width, self.indices.stride(0), apart, *self._strides
        constants = self.call.constants(self.call.row("scores"), relu=True)
        more = again_constants(constants, row_of(arch_of(self.indices.device), AGAIN_KEYS))
        more |= {"maxnreg": AGAIN_REGISTERS} if torch.version.hip is None else {}
        launch(again_kernel, (programs,), *results, *self._tensors, *sizes, self.call.scale, *strides, **more)

    def _sort(self, bits: Tensor | None, apart: int, count: Tensor) -> None:
        """Put rows in order that have any keys, if they are to be, and write their scores."""
        if not self.plan.in_order or bits is None:
            return
        topk, warps = self.plan.topk, row_of(arch_of(bits.device), 1).order_warps
        sizes = network(Kept(1, 0, topk, topk, 4).block, warps)
        strides = 0, self.indices.stride(0), 0, 0 if self.results is None else self.results.stride(0)
        results = bits.view(torch.int32), count, self.indices, self.results, topk, apart
        launch(order_kernel, (self.rows, 1, 1), *results, *strides, TOP=ORDER["TOP"], num_warps=warps, **sizes)

    @property
    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.call.q, self.call.weights, self.call.k

    @property
    def _strides(self) -> tuple[int, ...]:
        weights = (0, 0) if self.call.weights is None else self.call.weights.stride()[1:]
        return *self.call.q.stride()[1:], *weights, *self.call.k.stride()[1:]


def sift_constants(shared: dict[str, Any]) -> dict[str, Any]:
    """Return those of the constants that the score kernels share that `sift_kernel` takes."""
    return {name: x for name, x in shared.items() if name not in ("RELU", "KEYS", "FIRST", "SECOND")}


def again_constants(shared: dict[str, Any], row: Row) -> dict[str, Any]:
    """Return the constants of `again_kernel`, given those that the score kernels share, and sizes of selecting ones."""
    left = "RELU", "ROWS", "FIRST", "SECOND", "num_warps", "maxnreg"
    sizes = {"SAMPLE": row.sample, "DEEP": row.deep, "HELD": row.held, "WIDE": 32 * row.warps, "num_warps": row.warps}
    return {**{name: x for name, x in shared.items() if name not in left}, **ORDER, **sizes}
