"""What the compile lane compiles: every row of the table, as a call of that row's widest d would launch it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from headfold.backends.triton.backward import key_gradients, query_gradients
from headfold.backends.triton.compiling import WIDE_PRODUCT, Specimen
from headfold.backends.triton.folding import fold_heads, unfold_heads
from headfold.backends.triton.forward import score_slab
from headfold.backends.triton.launches import constants_of
from headfold.backends.triton.products import ACCUMULATORS
from headfold.backends.triton.table import Row, rows_of, tile

KERNELS: dict[str, Any] = {
    "scores": score_slab,
    "biased_scores": score_slab,
    "query_gradients": query_gradients,
    "key_gradients": key_gradients,
    "key_sums": key_gradients,
}
DTYPES = {"half": ("bfloat16", "float16")} | {x: (x,) for x in ("bfloat16", "float16", "float32", "float64")}
POINTERS = {"bfloat16": "*bf16:16", "float16": "*fp16:16", "float32": "*fp32:16", "float64": "*fp64:16"}
WIDEST = 256
# Numbers of heads of a row's specimen: the first that has the row.
HEADS = (32, 16, 8, 4, 2, 1, 64, 128)
# The innermost strides, which are 1 in every layout.
DENSE = ("out_key", "q_channel", "k_channel", "dq_channel", "dk_channel", "weights_head", "dweights_head", "g_key")


def specimens(arch: str) -> Iterator[Specimen]:
    """Yield the score kernels' specimens of an architecture; those of h=32, d=128 in bfloat16 come first."""
    rows = {kernel: [row for row in rows_of(arch) if row.kernel == kernel] for kernel in KERNELS}
    yielded = set()
    for found in (_usual(arch, rows), _others(arch)):
        for specimen in found:
            if specimen.name not in yielded:
                yielded.add(specimen.name)
                yield specimen
    for row in rows_of(arch):
        if row.kernel == "fold":
            yield from _fold_specimens(row)


def _usual(arch: str, rows: dict[str, list[Row]]) -> Iterator[Specimen]:
    """Specimens of h=32, d=128 in bfloat16, and of every row at its widest d."""
    yield from (_called(arch, kernel, "bfloat16", 32, 128) for kernel in ("scores", "query_gradients", "key_gradients"))
    for kernel, own in rows.items():
        for row in own:
            d = min(row.d, WIDEST)
            for dtype in DTYPES[row.dtype]:
                h = next(h for h in HEADS if h <= row.rows and tile(kernel, arch, getattr(torch, dtype), d, h) is row)
                yield score_specimen(row, dtype, h, d)
                if kernel == "key_gradients":
                    yield _called(arch, "key_sums", dtype, h, d)


def _others(arch: str) -> Iterator[Specimen]:
    """Specimens of other widths and heads, with ranges and a bias, each at the row that such a call has."""
    yield _called(arch, "scores", "bfloat16", 4, 128)
    yield _called(arch, "scores", "bfloat16", 32, 80, ranged=True)
    yield from (_called(arch, "biased_scores", "bfloat16", h, 128) for h in (1, 4))
    yield _called(arch, "biased_scores", "bfloat16", 32, 80, ranged=True)
    for kernel in ("query_gradients", "key_gradients"):
        yield _called(arch, kernel, "bfloat16", 32, 80, ranged=True, biased=True)
        yield from (_called(arch, kernel, dtype, 1, 128) for dtype in DTYPES["half"])
        yield from (_called(arch, kernel, "bfloat16", h, d) for h, d in ((4, 128), (8, 64), (1, 256)))
    for kernel in KERNELS:
        yield _called(arch, kernel, "bfloat16", 128, 128)


def _called(
    arch: str, kernel: str, dtype: str, h: int, d: int, *, ranged: bool = False, biased: bool = False
) -> Specimen:
    row = tile(kernel, arch, getattr(torch, dtype), d, h)
    return score_specimen(row._replace(kernel=kernel), dtype, min(h, row.rows), d, ranged=ranged, biased=biased)


def score_specimen(row: Row, dtype: str, h: int, d: int, *, ranged: bool = False, biased: bool = False) -> Specimen:
    """Return the kernel of `row` with its tile, on inputs of a dtype; ranged, biased: with these.

    "key_sums" adds to sums of rows of which some may be broken, as selected scores do.
    """
    kernel, marked = KERNELS[row.kernel], row.kernel == "key_sums"
    biased |= row.kernel == "biased_scores"
    compute = torch.float64 if dtype == "float64" else torch.float32
    half, two_bytes = dtype == "float16", dtype in DTYPES["half"]
    # What a launch passes, so that what is compiled here is what runs.
    launched = constants_of(row, 1, True, True, h, d, "tf32" if half else "ieee", compute, False)
    constants: dict[str, Any] = {
        **dict.fromkeys(DENSE, 1),
        **launched,
        "ADD": marked,
        "SCAN": 256,
        "WIDE": half,
        "UNIFORM": row.uniform,
        "WHOLE": two_bytes and not biased and launched["ROWS"] <= row.whole,
        "EVEN": two_bytes and not ranged and launched["ROWS"] <= row.whole,
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
        + (" biased" if biased and kernel is not score_slab else "")
    )
    # Exact float32 and float64 products have no use for tensor cores, or hardly any.
    return _specimen(label, kernel, types, constants, row, matrix=two_bytes)


def _fold_specimens(row: Row) -> Iterator[Specimen]:
    shape = {"H": 32, "D": 128, "WIDTH": 128, "ROWS": row.rows, "ACC": ACCUMULATORS[torch.float32]}
    pointers = dict.fromkeys(("q", "weights", "dq", "dweights"), POINTERS["bfloat16"])
    pointers |= {"out": POINTERS["float32"], "u": POINTERS["float32"], "sq": "i32"}
    for kernel in (fold_heads, unfold_heads):
        constants = dict.fromkeys(DENSE, 1) | shape
        yield _specimen(kernel.__name__ + " bfloat16 h=32 d=128", kernel, pointers, constants, row, matrix=False)


def _specimen(
    label: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], row: Row, *, matrix: bool
) -> Specimen:
    names = kernel.arg_names
    # Keys are the long side of products but of those of resident queries.
    narrow = (row.rows if kernel is query_gradients else row.keys) < WIDE_PRODUCT
    constants = {name: value for name, value in constants.items() if name in names}
    taken = {name: types.get(name, "i32:16") for name in names if name not in constants}
    return Specimen(label, kernel, taken, constants, row.warps, max(1, row.stages), matrix, narrow, row.registers)
