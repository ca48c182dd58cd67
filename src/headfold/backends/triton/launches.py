"""Launches of the score kernels on a slab: grids, tiles and constants, all told from shapes, dtypes and the device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headfold.backends.triton.backward import key_gradients, query_gradients
from headfold.backends.triton.folding import fold_heads, unfold_heads
from headfold.backends.triton.forward import score_slab
from headfold.backends.triton.launch import launch
from headfold.backends.triton.memory import FRESH, Allocator
from headfold.backends.triton.products import ACCUMULATORS, is_near, pieces, precision
from headfold.backends.triton.replay import do
from headfold.backends.triton.table import Row, arch_of, tile
from headfold.backends.triton.visible import bias_strides, bound_strides, rows_of
from headfold.contract import compute_dtype
from headfold.tiles import blocks
from headfold.triton_tiles import cdiv, power_of_two

# Programs that keep a large chip busy; a block of rows shares its keys out where there are fewer.
_PROGRAMS = 1056
# Tiles of keys that a program has at least, to be worth the load of its queries.
_TILES = 4
# Rows whose bounds are read at a time, to find those that see a block of keys.
_SCAN = 256


class Slab(NamedTuple):
    """Rows and heads of a call: q [b, rows, h, d], weights [b, rows, h], k [b, sk, d], and what the rows may see."""

    q: Tensor
    weights: Tensor | None
    k: Tensor
    start: Tensor | None
    end: Tensor | None
    bias: Tensor | None
    offset: int | None
    ratio: int
    scale: float

    def heads(self, first: int, end: int) -> Slab:
        """Return the slab of heads [first, end)."""
        if end - first == self.q.shape[2]:
            return self
        weights = None if self.weights is None else self.weights[:, :, first:end]
        return self._replace(q=self.q[:, :, first:end], weights=weights)

    def rows(self, first: int, end: int) -> Slab:
        """Return the slab of rows [first, end)."""
        return self._replace(
            q=self.q[:, first:end],
            weights=rows_of(self.weights, first, end),
            start=rows_of(self.start, first, end),
            end=rows_of(self.end, first, end),
            bias=rows_of(self.bias, first, end),
            offset=None if self.offset is None else self.offset + first,
        )

    def folded(self, q: Tensor) -> Slab:
        """Return the slab with its queries folded into one head q [b, rows, 1, d]."""
        return self._replace(q=q, weights=None)

    def row(self, kernel: str) -> Row:
        """Return the tile of a kernel on this slab."""
        if kernel == "scores" and self.bias is not None:
            kernel = "biased_scores"
        return tile(kernel, arch_of(self.q.device), self.q.dtype, self.q.shape[3], self.q.shape[2])

    def groups(self, kernel: str) -> list[tuple[int, int]]:
        """Return the (first, end) heads of each launch: no more than the rows of the kernel's tile."""
        h, most = self.q.shape[2], self.row(kernel).rows
        return [(0, h)] if h <= most else list(blocks(h, most))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the tensors in the order in which kernels take them."""
        return self.q, self.weights, self.k, self.start, self.end, self.bias

    def arguments(self) -> tuple[Any, ...]:
        """Return what every kernel takes after its results: tensors, sizes and the scale."""
        return *self.tensors(), self.q.shape[1], self.k.shape[1], self.offset or 0

    def strides(self) -> tuple[int, ...]:
        """Return the strides of those tensors, in their order."""
        bounds = *bound_strides(self.start), *bound_strides(self.end), *bias_strides(self.bias)
        return *self.q.stride(), *strides_of(self.weights, 3), *self.k.stride(), *bounds

    def constants(self, row: Row, relu: bool) -> dict[str, Any]:
        """Return the constants that the score kernels share, and the launch's own."""
        q, half = self.q, self.q.dtype == torch.float16
        exact = "tf32" if half else precision(self.k.dtype)
        bound = self.ratio, self.offset is not None
        return constants_of(row, *bound, relu, *q.shape[2:], exact, compute_dtype(q.dtype), q.device.type == "cpu")

    @property
    def wide(self) -> bool:
        """Whether gradients are multiplied in the accumulator's dtype.

        float16 has no range for them, and TF32 holds all of its bits; folded queries are in that dtype anyway.
        """
        return self.q.dtype == torch.float16 or self.q.dtype != self.k.dtype


@functools.cache  # a fold of many slabs asks once for each
def constants_of(
    row: Row, ratio: int, bounded: bool, relu: bool, h: int, d: int, exact: str, dtype: torch.dtype, upcast: bool
) -> dict[str, Any]:
    """Return the constants of a launch, which nobody may change.   exact: how float32 is multiplied."""
    heads, (first, second) = power_of_two(h), pieces(d)
    return {
        "RATIO": ratio,
        "HAS_OFFSET": bounded,
        "RELU": relu,
        "H": h,
        "D": d,
        "HEADS": heads,
        "FIRST": first,
        "SECOND": second,
        "ROWS": max(1, row.rows // heads),
        "KEYS": row.keys,
        "STAGES": row.stages,
        "PRECISION": exact,
        "ACC": ACCUMULATORS[dtype],
        "UPCAST": upcast,
        **row.options,
        "num_stages": row.stages,
    }


def launch_scores(out: Tensor, slab: Slab, *, relu: bool, add: bool = False) -> None:
    """Write out [b, rows, sk], or add to what other heads wrote there."""
    (b, sq, _, _), sk = slab.q.shape, slab.k.shape[1]
    if out.numel() == 0:
        return
    row = slab.row("scores")
    constants = slab.constants(row, relu)
    rows = cdiv(sq, constants["ROWS"])
    shares = max(1, min(cdiv(_PROGRAMS, b * rows), sk // (row.keys * _TILES)))
    per_program = cdiv(cdiv(sk, shares), row.keys) * row.keys
    strides = *out.stride(), *slab.strides()
    grid = rows, b, cdiv(sk, per_program)
    whole = slab.bias is None and constants["ROWS"] <= row.whole and is_near(slab.k, row.keys)
    arguments = *slab.arguments(), per_program, slab.scale, *strides
    launch(score_slab, grid, out, *arguments, ADD=add, WHOLE=whole, UNIFORM=row.uniform, **constants)


def launch_query_gradients(dq: Tensor | None, dweights: Tensor | None, g: Tensor, slab: Slab, *, relu: bool) -> None:
    """Write dq [b, rows, h, d] and dweights [b, rows, h]."""
    b, sq = slab.q.shape[:2]
    if b * sq == 0 or (dq is None and dweights is None):
        return
    row = slab.row("query_gradients")
    constants = slab.constants(row, relu)
    sk = slab.k.shape[1]
    even = constants["ROWS"] <= row.whole and sk > 0 and sk % row.keys == 0 and is_near(slab.k, row.keys)
    strides = *strides_of(dq, 4), *strides_of(dweights, 3), *g.stride(), *slab.strides()
    grid = cdiv(sq, constants["ROWS"]), b
    arguments = *slab.arguments(), slab.scale, *strides
    more = {"WIDE": slab.wide, "EVEN": even, "UNIFORM": row.uniform}
    launch(query_gradients, grid, dq, dweights, g, *arguments, **more, **constants)


def launch_key_gradients(
    dk: Tensor, g: Tensor, slab: Slab, *, relu: bool, add: bool, parts: int, memory: Allocator = FRESH
) -> None:
    """Write dk [b, sk, d], or add to it; through `parts` sums in the compute dtype where there is more than one."""
    b, sk, d = slab.k.shape
    if b * sk == 0:
        return
    if parts == 1:
        launch_key_sums(dk.unsqueeze(0), g, slab, relu=relu, add=add)
        return
    with memory.step():
        sums = empty(slab.k, parts, b, sk, d, memory=memory)
        launch_key_sums(sums, g, slab, relu=relu, add=False)
        do(_add_parts if add else _write_parts, dk, sums)


def _add_parts(dk: Tensor, sums: Tensor) -> None:
    """Add sums [parts, b, sk, d] to dk, the parts among themselves first."""
    dk.add_(_sum_of(sums))


def _write_parts(dk: Tensor, sums: Tensor) -> None:
    """Write the sum of sums [parts, b, sk, d] to dk."""
    dk.copy_(_sum_of(sums))


def _sum_of(parts: Tensor) -> Tensor:
    for part in parts[1:]:
        parts[0] += part
    return parts[0]


def launch_key_sums(
    sums: Tensor, g: Tensor, slab: Slab, *, relu: bool, add: bool, broken: Tensor | None = None
) -> None:
    """Write dk of each part of the rows to sums [parts, b, sk, d], none of them 0, or add to them.

    broken: int32 [1 + rows], see `key_gradients`.
    """
    row = slab.row("key_gradients" if broken is None else "key_sums")
    constants = {**slab.constants(row, relu), "ADD": add, "SCAN": _SCAN, "WIDE": slab.wide}
    strides = *sums.stride(), *g.stride(), *slab.strides()
    parts, b, sk, _ = sums.shape
    grid = cdiv(sk, row.keys), b, parts
    launch(key_gradients, grid, sums, g, broken, *slab.arguments(), slab.scale, *strides, **constants)


def launch_fold(out: Tensor, q: Tensor, weights: Tensor | None) -> None:
    """Write Σ_h weights · q [b, rows, 1, d] in the compute dtype; out's channels are dense."""
    b, sq = q.shape[:2]
    if b * sq > 0:
        constants = _fold_constants(q)
        strides = *out.stride()[:2], *q.stride(), *strides_of(weights, 3)
        launch(fold_heads, (cdiv(sq, constants["ROWS"]), b), out, q, weights, sq, *strides, **constants)


def launch_unfold(dq: Tensor | None, dweights: Tensor | None, u: Tensor, q: Tensor, weights: Tensor | None) -> None:
    """Write dq = weights · u and dweights = q · u, given u [b, rows, 1, d], whose channels are dense."""
    b, sq = q.shape[:2]
    if b * sq > 0:
        constants = _fold_constants(q)
        strides = *strides_of(dq, 4), *strides_of(dweights, 3), *u.stride()[:2], *q.stride(), *strides_of(weights, 3)
        grid = cdiv(sq, constants["ROWS"]), b
        launch(unfold_heads, grid, dq, dweights, u, q, weights, sq, *strides, **constants)


def empty(like: Tensor, *shape: int, memory: Allocator = FRESH) -> Tensor:
    """Allocate in the compute dtype."""
    return memory.empty(*shape, dtype=compute_dtype(like.dtype), device=like.device)


def strides_of(x: Tensor | None, count: int) -> tuple[int, ...]:
    """Return the strides of a tensor, or as many zeros."""
    return (0,) * count if x is None else x.stride()


def _fold_constants(q: Tensor) -> dict[str, Any]:
    dtype = compute_dtype(q.dtype)
    row = tile("fold", arch_of(q.device), dtype, q.shape[3], q.shape[2])
    return {
        "H": q.shape[2],
        "D": q.shape[3],
        "WIDTH": power_of_two(q.shape[3]),
        "ROWS": row.rows,
        "ACC": ACCUMULATORS[dtype],
        "num_warps": row.warps,
    }
