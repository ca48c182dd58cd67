"""What the compile lane compiles of the selection without scores in memory: what calls of usual sizes launch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from headfold.backends.triton.again import again_kernel
from headfold.backends.triton.compiling import Specimen
from headfold.backends.triton.launches import constants_of
from headfold.backends.triton.sampling import pivots_kernel, sample_kernel
from headfold.backends.triton.score_specimens import DTYPES, POINTERS
from headfold.backends.triton.select_rows import select_rows_kernel
from headfold.backends.triton.sift import KEYS
from headfold.backends.triton.sifted import (
    AGAIN_REGISTERS,
    again_constants,
    pivots_constants,
    sample_constants,
    select_constants,
    selecting_row,
)
from headfold.backends.triton.table import tile
from headfold.sift_tiles import STRIDE

# Heads and widths of calls, and keys.
SHAPES = ((32, 128), (64, 128), (32, 64), (64, 64))
LENGTHS = (32768, 131072, 1 << 19)
# Numbers by whose values nothing is specialised.
ODD = ("sq", "sk", "rows", "topk", "capacity", "offset", "room", "abreast", "ordered")
ROWS = ("scores_row", "line_row", "lists_row", "indices_row", "results_row")
# Bytes that a thread keeps out of its registers, of which it has fewer the more warps there are: a few numbers while
# rows are sifted, once for all keys, and more while they are cut.
ASIDE = {4: 24, 8: 640}
CAUSAL = {"RATIO": 1, "HAS_OFFSET": True}


def specimens(arch: str) -> Iterator[Specimen]:
    """Yield the specimens of an architecture; that of h=32, d=128 in bfloat16 comes first."""
    for h, d in SHAPES:
        for dtype in DTYPES["half"]:
            row = tile("sifted_scores", arch, getattr(torch, dtype), d, h)
            if row.keys != KEYS or h > row.rows:
                continue
            exact = "tf32" if dtype == "float16" else "ieee"
            shared = constants_of(row, *CAUSAL.values(), True, h, d, exact, torch.float32, False)
            label, assembly = f"{dtype} h={h} d={d}", arch.startswith("sm_")
            more = {"UNIFORM": True, "ASSEMBLY": assembly}
            constants = {**select_constants(shared, 2048), **more}
            rows = _specimen(f"select rows {label}", select_rows_kernel, dtype, constants, matrix=True)
            yield replace(rows, registers=row.registers, aside=ASIDE[row.warps] if row.registers else 0)
            if d == 128:
                constants = again_constants(shared, selecting_row(arch, row.warps), 2048)
                again = _specimen(f"select again {label}", again_kernel, dtype, constants, matrix=True)
                yield replace(again, registers=AGAIN_REGISTERS)
    for sk in LENGTHS:
        constants = {**CAUSAL, **pivots_constants(sk // STRIDE)}
        yield _specimen(f"pivots sk={sk}", pivots_kernel, "bfloat16", constants)
    yield _specimen("sample d=128", sample_kernel, "bfloat16", sample_constants(128))


def _specimen(label: str, kernel: Any, dtype: str, constants: dict[str, Any], *, matrix: bool = False) -> Specimen:
    constants = {**dict.fromkeys(("q_channel", "weights_head", "k_channel"), 1), **constants}
    warps, stages = constants["num_warps"], constants.get("num_stages", 1)
    constants = {name: x for name, x in constants.items() if name in kernel.arg_names}
    types = dict.fromkeys(("turns", "queue", "counts", "pivots", "count", "indices"), "*i32:16")
    types |= dict.fromkeys(("scores", "lines", "bits", "results"), POINTERS["float32"])
    types |= dict.fromkeys(("q", "weights", "k", "out"), POINTERS[dtype])
    types |= {"entries": "*i16:16", "found": "*i64:16", "left": "*i32", "scale": "fp64"}
    types |= dict.fromkeys((*ODD, *ROWS), "i32")
    if kernel is sample_kernel:
        types["count"] = "i32"
    taken = {name: types.get(name, "i32:16") for name in kernel.arg_names if name not in constants}
    return Specimen(label, kernel, taken, constants, warps, stages, matrix)
