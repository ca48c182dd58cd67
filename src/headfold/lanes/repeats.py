"""The repeats lane: every op gives the same bits, run after run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

from headfold.lanes.every_op import DTYPES, IMPLS, MASKS, OPS, calls, make_inputs, name_of, same_bits
from headfold.lanes.record import FAIL, PASS, Column, Lane, Row, Track, no_track

COLUMNS = (
    Column("op", "op"),
    Column("backend", "backend"),
    Column("dtype", "dtype"),
    Column("results", "results"),
    Column("differing", "runs that differ"),
    Column("verdict", "verdict"),
)
REPEATS = 20


def repeats(
    device: torch.device,
    *,
    impls: Sequence[str] = IMPLS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    runs: int = REPEATS,
    track: Track[Any] = no_track,
) -> Lane:
    """Run every op, forward and backward, once and `runs` times more on the same tensors, and compare every bit."""
    lane = Lane("repeats", f"Are {runs} more runs of every op the same, bit for bit?", COLUMNS)
    for (op, impl), dtype in track(list(product(calls(impls), dtypes)), "repeats"):
        lane.rows.append(_row(op, impl, dtype, device, runs))
    lane.notes = [
        "Results are those of the op and all of its gradients, at b=2, sq=130, sk=300, h=8, d=64, topk=70, np=4, "
        "np_k=2, hn=64; indices hold duplicates and -1.",
    ]
    return lane


def _row(op: str, impl: str, dtype: torch.dtype, device: torch.device, runs: int) -> Row:
    inputs = make_inputs(device, dtype)
    expected = OPS[op](inputs, impl)
    differing = 0
    for _ in range(runs):
        differing += not all(map(same_bits, OPS[op](inputs, impl), expected))
    row: Row = {"op": op, "backend": "" if op in MASKS else impl, "dtype": name_of(dtype), "results": len(expected)}
    return {**row, "differing": differing, "verdict": FAIL if differing else PASS}
