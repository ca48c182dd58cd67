"""The offsets lane: index arithmetic past 2³¹ elements, of what ops read and of what they write."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from headfold.lanes.every_op import (
    IMPLS,
    MASKS,
    OPS,
    Inputs,
    calls,
    differentiate,
    make_inputs,
    name_of,
    nearly,
    same_bits,
)
from headfold.lanes.record import FAIL, PASS, Column, Lane, Row, Track, no_track
from headfold.mask import index_mask
from headfold.scores import index_scores

COLUMNS = (
    Column("check", "check"),
    Column("backend", "backend"),
    Column("dtype", "dtype"),
    Column("found", "found"),
    Column("verdict", "verdict"),
)
FAR = 2**31
# Elements between two tensors that share storage; one row of any of them is smaller.
APART = 1 << 16
# sq · sk is just past FAR.
ROWS, KEYS = 65537, 32769
# Rows of the end that are compared with a call of those rows alone.
LAST = 16
EQUAL = "equal"


def offsets(
    device: torch.device,
    *,
    impls: Sequence[str] = IMPLS,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float64),
    far: int = FAR,
    rows: int = ROWS,
    keys: int = KEYS,
    track: Track[Any] = no_track,
) -> Lane:
    """Run every op on tensors whose rows lie up to `far` elements apart, and some with rows · keys results."""
    lane = Lane("offsets", f"Is what lies {far:,} elements away read and written as what lies near?", COLUMNS)
    for (op, impl), dtype in track(list(product(calls(impls), dtypes)), "offsets, read"):
        if op not in MASKS:
            found = _read_far(op, impl, dtype, device, far)
            lane.rows.append(_row(f"{op}, strides", impl, dtype, found))
    for impl in track(impls, "offsets, written"):
        found = _scores_far(impl, device, rows, keys)
        lane.rows.append(_row(f"index_scores, {rows} x {keys} scores", impl, torch.bfloat16, found))
    lane.rows.append(_row(f"index_mask, {rows} x {keys} entries", "", torch.bool, _mask_far(device, rows, keys)))
    lane.notes = [
        "Strides: each tensor is a view of one storage, the first axis beyond the batch spread over it; results and "
        "gradients equal those of the same numbers in dense tensors, but for a rounding of the largest: kernels are "
        "compiled anew for such strides.",
        f"Results: the last {LAST} rows of scores, dq and a mask that are larger than that equal those of a call of "
        "these rows alone; the numbers are small whole ones, so that no order of a sum rounds.",
    ]
    return lane


def _row(check: str, impl: str, dtype: torch.dtype, found: str) -> Row:
    row: Row = {"check": check, "backend": impl, "dtype": name_of(dtype), "found": found}
    return {**row, "verdict": PASS if found == EQUAL else FAIL}


def spread(inputs: Inputs, far: int) -> Inputs:
    """Return the same numbers in views of one storage, the last row or key of each `far` elements or more away."""
    floats = inputs[:-2]  # a sink has no rows, and indices are of another dtype
    storage = floats[0].new_empty(far + len(floats) * APART + APART)
    moved = []
    for i, x in enumerate(floats):
        stride = -(-far // max(1, x.shape[1] - 1))
        inner = x[:, 0].numel()
        if inner > APART or stride < len(floats) * APART:
            raise ValueError(f"spread: needs rows of at most {APART} elements, and fewer rows, got {list(x.shape)}.")
        strides = x[0, 0].numel(), stride, *x[0, 0].stride()
        view = storage.as_strided(x.shape, strides, i * APART)
        moved.append(view.copy_(x))
    return Inputs._make([*moved, inputs.sink, inputs.indices])


def _read_far(op: str, impl: str, dtype: torch.dtype, device: torch.device, far: int) -> str:
    near = make_inputs(device, dtype, sq=40, sk=70, topk=20)
    expected = OPS[op](near, impl)
    results = OPS[op](spread(near, far), impl)
    differing = [i for i, (x, y) in enumerate(zip(results, expected, strict=True)) if not nearly(x, y)]
    return f"results {differing} differ" if differing else EQUAL


def _whole(shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator, device=device).bfloat16()


def _scores_far(impl: str, device: torch.device, rows: int, keys: int) -> str:
    q, weights, k = (
        _whole(shape, device, i) for i, shape in enumerate([(rows, 1, 1, 16), (rows, 1, 1), (keys, 1, 16)])
    )

    def run(rows: slice) -> list[Tensor]:
        leaves = [q[rows].detach().requires_grad_(), weights[rows], k]
        scores, dq = differentiate(index_scores(*leaves, impl=impl), leaves[:1], ones=True)
        return [scores[:, -LAST:].clone(), dq[-LAST:].clone()]

    return EQUAL if all(map(same_bits, run(slice(None)), run(slice(-LAST, None)))) else "last rows differ"


def _mask_far(device: torch.device, rows: int, keys: int) -> str:
    generator = torch.Generator(device).manual_seed(0)
    indices = torch.randint(-1, keys, (1, rows, 8), generator=generator, device=device, dtype=torch.int32)
    last = index_mask(indices, keys)[:, -LAST:]
    return EQUAL if same_bits(last, index_mask(indices[:, -LAST:], keys)) else "last rows differ"
