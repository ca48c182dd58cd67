"""What the compile lane compiles: every row of the table, as a call of that row's widest d would launch it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from headfold.backends.triton.backward import key_gradients, query_gradients
from headfold.backends.triton.compiling import Specimen
from headfold.backends.triton.folding import fold_heads, unfold_heads
from headfold.backends.triton.forward import score_slab
from headfold.backends.triton.launches import WHOLE_ROWS, constants_of
from headfold.backends.triton.products import ACCUMULATORS
from headfold.backends.triton.table import ANY, Row, rows_of

KERNELS: dict[str, Any] = {"scores": score_slab, "query_gradients": query_gradients, "key_gradients": key_gradients}
DTYPES = {"half": ("bfloat16", "float16"), "float32": ("float32",), "float64": ("float64",)}
POINTERS = {"bfloat16": "*bf16:16", "float16": "*fp16:16", "float32": "*fp32:16", "float64": "*fp64:16"}
WIDEST = 256
HEADS = 32
# The innermost strides, which are 1 in every layout.
DENSE = ("out_key", "q_channel", "k_channel", "dq_channel", "dk_channel", "weights_head", "dweights_head", "g_key")


def specimens(arch: str) -> Iterator[Specimen]:
    """Yield the score kernels' specimens of an architecture; those of h=32, d=128 in bfloat16 come first."""
    rows = [row for row in rows_of(arch) if row.kernel in KERNELS]
    rows.sort(key=lambda row: (row.dtype != "half", row.d != 128, row.h != ANY))
    first = [row for row in rows if (row.dtype, row.d, row.h) == ("half", 128, ANY)]
    yield from (score_specimen(row, "bfloat16", HEADS, 128) for row in first)
    for row in rows:
        for dtype in DTYPES[row.dtype]:
            if row in first and dtype == "bfloat16":
                continue
            yield score_specimen(row, dtype, min(row.h, HEADS, row.rows), min(row.d, WIDEST))
    for row in rows:
        if row in first:
            yield score_specimen(row, "bfloat16", HEADS, 80, ranged=True, biased=row.kernel != "scores")
            yield score_specimen(row, "bfloat16", min(128, row.rows), 128)
            yield from (score_specimen(row, "bfloat16", 1, 128) for _ in range(row.kernel != "scores"))
        if (row.kernel, row.dtype, row.d, row.h) == ("scores", "half", 128, 16):
            yield score_specimen(row, "bfloat16", 4, 128)
            yield score_specimen(row, "bfloat16", HEADS, 80, ranged=True, biased=True)
        if row.kernel == "key_gradients":
            for dtype in DTYPES[row.dtype]:
                yield score_specimen(row, dtype, min(row.h, HEADS, row.rows), min(row.d, WIDEST), marked=True)
    for row in rows_of(arch):
        if row.kernel == "fold":
            yield from _fold_specimens(row)


def score_specimen(
    row: Row, dtype: str, h: int, d: int, *, ranged: bool = False, biased: bool = False, marked: bool = False
) -> Specimen:
    """Return a kernel with the tile of `row`, on inputs of a dtype; ranged, biased: with these.

    marked: adding to sums of rows of which some may be broken, as selected scores do.
    """
    kernel = KERNELS[row.kernel]
    compute = torch.float64 if dtype == "float64" else torch.float32
    half = dtype == "float16"
    # What a launch passes, so that what is compiled here is what runs.
    launched = constants_of(row, 1, True, True, h, d, "tf32" if half else "ieee", compute, False)
    constants: dict[str, Any] = {
        **dict.fromkeys(DENSE, 1),
        **launched,
        "ADD": marked,
        "SCAN": 256,
        "WIDE": half,
        "WHOLE": row.dtype == "half" and not biased and launched["ROWS"] <= WHOLE_ROWS,
        "EVEN": row.dtype == "half" and not ranged and launched["ROWS"] <= WHOLE_ROWS,
    }
    types = {"scale": "fp64", "sq": "i32", "sk": "i32", "offset": "i32", "per_program": "i32"}
    types |= dict.fromkeys(("q", "k", "weights", "dq", "dweights", "dk"), POINTERS[dtype])
    types |= {name: POINTERS[str(compute).removeprefix("torch.")] for name in ("out", "g", "bias")}
    types |= dict.fromkeys(("start", "end", "broken"), "*i32:16")
    if marked:
        types["dk"] = types["g"]
    if biased:
        constants["bias_key"] = 1
    absent = [] if ranged else ["start", "end"]
    absent += [] if biased else ["bias"]
    absent += [] if marked else ["broken"]
    hidden = [name for name in kernel.arg_names if name.split("_")[0] in absent]
    constants |= {name: None if name in absent else 0 for name in hidden}
    label = (
        f"{row.kernel} {dtype} h={h} d={d}"
        + (" ranged" if ranged else "")
        + (" biased" if biased else "")
        + (" marked" if marked else "")
    )
    # Exact float32 and float64 products have no use for tensor cores, or hardly any.
    return _specimen(label, kernel, types, constants, row, matrix=row.dtype == "half")


def _fold_specimens(row: Row) -> Iterator[Specimen]:
    shape = {"H": HEADS, "D": 128, "WIDTH": 128, "ROWS": row.rows, "ACC": ACCUMULATORS[torch.float32]}
    pointers = dict.fromkeys(("q", "weights", "dq", "dweights"), POINTERS["bfloat16"])
    pointers |= {"out": POINTERS["float32"], "u": POINTERS["float32"], "sq": "i32"}
    for kernel in (fold_heads, unfold_heads):
        constants = dict.fromkeys(DENSE, 1) | shape
        yield _specimen(kernel.__name__ + " bfloat16 h=32 d=128", kernel, pointers, constants, row, matrix=False)


def _specimen(
    label: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], row: Row, *, matrix: bool
) -> Specimen:
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    taken = {name: types.get(name, "i32:16") for name in names if name not in constants}
    return Specimen(label, kernel, taken, constants, row.warps, max(1, row.stages), matrix, registers=row.registers)
