"""The strides lane: what is read where no vector load can be, as views of wider tensors are, is read all the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from headfold.lanes.every_op import IMPLS, MASKS, OPS, Inputs, calls, make_inputs, name_of, nearly
from headfold.lanes.record import FAIL, PASS, Column, Lane, Row, Track, no_track

COLUMNS = (
    Column("op", "op"),
    Column("backend", "backend"),
    Column("dtype", "dtype"),
    Column("width", "width", "number"),
    Column("differing", "results that differ, by what lies apart"),
    Column("verdict", "verdict"),
)
INDEXER = ("q", "weights", "k")
READ = {"indexer_loss": (*INDEXER, "query", "key"), "sparse_attention": ("query", "key", "value")}
# What gathers rows is also run with one tensor apart at a time: a compiler may take each of them another way.
GATHERS = "selected_scores", "sparse_attention"


def strides(
    device: torch.device,
    *,
    impls: Sequence[str] = IMPLS,
    dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16),
    widths: Sequence[int] = (64, 128),
    track: Track[Any] = no_track,
) -> Lane:
    """Run every op on dense tensors, then on all of them apart, and compare results."""
    lane = Lane("strides", "Are tensors whose rows begin anywhere read as dense ones are?", COLUMNS)
    wanted = [call for call in calls(impls) if call[0] not in MASKS]
    for (op, impl), dtype, width in track(list(product(wanted, dtypes, widths)), "strides"):
        found = _differing(op, impl, make_inputs(device, dtype, sq=40, sk=170, topk=100, d=width, hn=width))
        row: Row = {"op": op, "backend": impl, "dtype": name_of(dtype), "width": width, "differing": found}
        lane.rows.append({**row, "verdict": FAIL if found else PASS})
    lane.notes = [
        "A tensor that lies apart begins one element into a wider one, so that kernels are compiled anew for it; its "
        "results may differ by a rounding of the largest.",
    ]
    return lane


def apart(inputs: Inputs, *names: str) -> Inputs:
    """Return the same numbers, those of some tensors with a zero before every row of the last axis."""
    moved: dict[str, Tensor] = {name: pad(getattr(inputs, name), (1, 0))[..., 1:] for name in names}
    return inputs._replace(**moved)


def _differing(op: str, impl: str, dense: Inputs) -> str:
    expected, read = OPS[op](dense, impl), READ.get(op, INDEXER)
    found = []
    for names in (read, *((name,) for name in read if op in GATHERS)):
        results = OPS[op](apart(dense, *names), impl)
        differing = [i for i, (x, y) in enumerate(zip(results, expected, strict=True)) if not nearly(x, y)]
        if differing:
            found.append(f"{' and '.join(names)}: {differing}")
    return "; ".join(found)
