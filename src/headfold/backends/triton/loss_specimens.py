"""What the compile lane compiles of a loss: every row of the table, as a call of that row's widest head launches it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from headfold.backends.triton.compare import TINY, compare_kernel, mark_seen_kernel, mark_selected_kernel
from headfold.backends.triton.compiling import Specimen
from headfold.backends.triton.products import ACCUMULATORS
from headfold.backends.triton.score_specimens import DTYPES, POINTERS
from headfold.backends.triton.table import TABLE, Row
from headfold.backends.triton.teacher import JOINED, join_kernel, mass_kernel, sums_kernel, widths
from headfold.loss_slabs import SPLIT_KEYS

KERNELS: dict[str, Any] = {"teacher sums": sums_kernel, "teacher mass": mass_kernel}
ROWWISE: tuple[Any, ...] = (compare_kernel, mark_seen_kernel, mark_selected_kernel, join_kernel)
WIDEST = 576  # absorbed latent attention
BOUNDS = ("START", "END", "COUNTED")
# Counts of a slab, which need not be multiples of anything.
COUNTS = ("heads", "batches", "group", "rows", "n", "kept", "splits", "count", "offset")


def specimens(arch: str) -> Iterator[Specimen]:
    """Yield the specimens of an architecture."""
    for row in TABLE:
        if row.arch not in (arch, "*"):
            continue
        if row.kernel in KERNELS:
            hn = min(row.d, WIDEST)
            for dtype in DTYPES[row.dtype]:
                yield teacher_specimen(row, dtype, hn)
            if row.dtype == "half":
                yield teacher_specimen(row, "bfloat16", hn, marked=True)
                yield teacher_specimen(row, "bfloat16", 80 if hn == 128 else hn - 8)
        elif row.kernel == "compare":
            for dtype in ("float32", "float64"):
                yield from (_rowwise(kernel, row, dtype) for kernel in ROWWISE)


def teacher_specimen(row: Row, dtype: str, hn: int, *, marked: bool = False) -> Specimen:
    """Return a pass of the teacher with the tile of `row`, on heads of width hn; marked: its support by marks."""
    compute = "float64" if dtype == "float64" else "float32"
    constants = {
        "query_d": 1,
        "key_d": 1,
        "HN": hn,
        **widths(hn),
        "ROWS": row.rows,
        "KEYS": row.keys,
        "SPLIT": SPLIT_KEYS,
        "CAST": None,
        "ACC": ACCUMULATORS[getattr(torch, compute)],
        "PRECISION": "ieee",
    }
    types = {"QUERY": POINTERS[dtype], "KEY": POINTERS[dtype], "STATS": POINTERS[compute], "MASS": POINTERS[compute]}
    label = f"{row.kernel} {dtype} hn={hn}" + (" marked" if marked else "")
    absent = () if marked else ("MARKS",)
    # Exact float32 and float64 products have no use for tensor cores, or hardly any.
    return _specimen(label, KERNELS[row.kernel], types, constants, row, absent=absent, matrix=row.dtype == "half")


def _rowwise(kernel: Any, row: Row, dtype: str) -> Specimen:
    acc = ACCUMULATORS[getattr(torch, dtype)]
    block = JOINED if kernel is join_kernel else row.keys
    constants = {"BLOCK": block, "BACKWARD": True, "TINY": TINY[acc], "ACC": acc, "bias_t": 1}
    types = dict.fromkeys(("LOSSES", "SCORES", "MASS", "SHARE", "STATS", "BIAS"), POINTERS[dtype])
    types["INDICES"] = "*i32:16"
    return _specimen(f"{kernel.__name__} {dtype}", kernel, types, constants, row, matrix=False)


def _specimen(
    label: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    row: Row,
    *,
    absent: tuple[str, ...] = (),
    matrix: bool,
) -> Specimen:
    names = kernel.arg_names
    hidden = [name for name in names if name in BOUNDS or name.startswith(("start_", "end_", "counted_"))]
    constants = constants | {name: None if name in BOUNDS else 0 for name in hidden} | dict.fromkeys(absent)
    constants = {name: value for name, value in (constants | {"RATIO": 1}).items() if name in names}
    types = types | dict.fromkeys(COUNTS, "i32") | {"MARKS": "*u8:16", "factor": "fp64"}
    taken = {name: types.get(name, "i32:16") for name in names if name not in constants}
    return Specimen(label, kernel, taken, constants, row.warps, max(1, row.stages), matrix, registers=row.registers)
