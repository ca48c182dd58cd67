"""Specimens of the gathered kernels: every row of the table, at its widest d, as its ordinary call would launch it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton.language as tl

from headfold.backends.triton import (
    attention_backward,
    attention_gradients,
    attention_kernels,
    gathered,
    gathered_kernels,
    picks,
)
from headfold.backends.triton.attention_cuts import channel_blocks
from headfold.backends.triton.compiling import WIDE_PRODUCT, Specimen
from headfold.backends.triton.operands import streamed
from headfold.backends.triton.products import NARROWEST, pieces
from headfold.backends.triton.table import KINDS, Row, rows_of, tile

# Integers that no call promises to be multiples of 16.
ANY_VALUE = "sq sk topk words offset first_row first_pick last_pick span group count rows total_head".split()
ONES = "q_step k_step v_step g_step i_step w_head dq_step dw_head out_step total_key".split()
KERNELS: dict[str, Any] = {
    "selected_scores": gathered_kernels.score_picks,
    "selected_rows": gathered_kernels.query_gradients_of_picks,
    "selected_keys": gathered_kernels.spread_key_gradients,
    "attention": attention_kernels.attend,
    "attention_rows": attention_gradients.row_gradients,
    "attention_keys": attention_gradients.spread_gradients,
    "attention_masked": attention_gradients.masked_gradients,
}
POINTERS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
# Heads that a row of the table stands for where it takes any.
MOST = 128
# Widths of the keys of absorbed latent attention, and of those of their channels that are the values.
ABSORBED, LATENT = 576, 512


def specimens(arch: str) -> Iterator[Specimen]:
    """Yield the gathered kernels of an architecture; those of half precision use tensor cores."""
    yield from _scatters()
    for row in rows_of(arch):
        if row.kernel in KERNELS:
            for dtype in KINDS:
                h = min(row.h, MOST)
                if not row.takes(dtype) or tile(row.kernel, arch, dtype, row.d, h) is not row:
                    continue
                yield gathered_specimen(row, dtype)
                if row.kernel == "attention_masked":
                    yield gathered_specimen(row, dtype, values=True)
                elif row.d == ABSORBED and dtype.itemsize == 2:
                    own = tile(f"apart_{row.kernel}", arch, dtype, row.d, h)
                    yield gathered_specimen(own._replace(kernel=row.kernel), dtype, apart=True)


def gathered_specimen(
    row: Row, dtype: torch.dtype, *, h: int = 0, d: int = 0, values: bool = False, apart: bool = False
) -> Specimen:
    """Return a kernel with the tile of a row; h, d: heads (of one key head) and their width, the row's own when 0.

    values: whether gradients of values are meant, where those are a kernel of their own.   apart: whether the values
    of absorbed latent attention are a tensor of their own, as wide as the keys, and not the first channels of those.
    """
    h, d = h or min(row.h, MOST), d or row.d
    attends = row.kernel.startswith("attention")
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    constants: dict[str, Any] = {
        "BH": min(row.rows, max(NARROWEST, 1 << (h - 1).bit_length())),
        "BN": row.keys,
        "STAGES": row.stages,
        "SCALE": 1.0 if dtype == torch.float64 else None,
        "ACC": wide,
        "UPCAST": False,
        "PRECISION": "ieee",
        "RANGED": dtype == torch.float16,
    }
    if attends:
        constants |= _attention_constants(row, dtype, h, d, shared=d == ABSORBED and not apart)
        if values:
            constants["VALUES"] = True
    else:
        d0, d1 = pieces(d)
        constants |= {"H": h, "D": d, "D0": d0, "D1": d1, "RELU": True, "RATIO": 1, "STATIC": True}
        constants |= {"SIZE": streamed(d), "STREAM": dtype.itemsize > 2}
        constants |= {"BLOCKS": gathered.PICK_BLOCKS, "start": None, "end": None, "bias": None}
    name, compute = POINTERS[dtype], "fp64" if wide == tl.float64 else "fp32"
    pointers = dict.fromkeys("query key value q k w g dq dw out".split(), name)
    pointers |= dict.fromkeys("top share mean dkeys dvalues spread sums".split(), compute)
    pointers |= {"indices": "i32", "picks": "i32"}
    if attends:
        pointers |= {"bitmap": "i32", "total": compute}
        if row.kernel == "attention":
            constants["lse"] = None
    else:
        pointers |= {"w": compute, "out": compute, "g": compute, "dw": compute}
    for scale in ("reach", "largest"):
        if dtype == torch.float16:
            pointers[scale] = "fp32"
        else:
            constants[scale] = None
    kind = " values" if values else " apart" if apart else ""
    label = f"{row.kernel} {str(dtype).removeprefix('torch.')} h={h} d={d}{kind}"
    matrix = dtype.itemsize == 2
    narrow = row.keys < WIDE_PRODUCT
    sizes = row.warps, row.stages
    found = _described(label, KERNELS[row.kernel], pointers, constants, *sizes, matrix=matrix, narrow=narrow)
    return replace(found, registers=row.registers)


def _attention_constants(row: Row, dtype: torch.dtype, h: int, d: int, *, shared: bool) -> dict[str, Any]:
    v = LATENT if shared else d
    keys, values = channel_blocks(d), channel_blocks(v)
    named = {f"D{n}": x for n, x in keys.items()} | {f"V{n}": x for n, x in values.items()}
    constants: dict[str, Any] = {**named, "H": h, "GROUP": h, "D": d, "V": v, "SIZE": streamed(max(d, v)), "sink": None}
    constants |= {
        "REUSE": shared,
        "SHARED": shared,
        "STREAM": dtype.itemsize > 2,
        "MERGED": shared and dtype != torch.float16,
    }
    if constants["MERGED"]:
        constants["dvalues"] = None
    heads = min(row.rows, 1 << (h - 1).bit_length())
    return constants | {"HEADS": heads, "BM": row.rows, "SCAN": attention_backward.SCANNED, "VALUES": False}


def _scatters() -> Iterator[Specimen]:
    pointers = dict.fromkeys("picks bitmap indices before places".split(), "i32")
    pointers |= dict.fromkeys("sums g total spread dsink top share mean".split(), "fp32")
    absent: dict[str, Any] = dict.fromkeys(("start", "end", "bias", "largest"))
    settled = {**absent, "RATIO": 1, "STATIC": True, "SCALE": None, "ACC": tl.float32}
    settled |= {"BLOCK": picks.BLOCK, "COMPARED": picks.COMPARED}
    picked = dict.fromkeys(("dscores", "broken", "q", "w")) | {"H": 0, "D": 1}
    yield _described("settle", picks._settle, pointers, settled | picked, 4, 1, matrix=False)
    everywhere = {"picks": None, "sums": None, "H": MOST, "D": 128}
    inputs = {"dscores": "fp32", "broken": "i32", "q": "bf16", "w": "bf16"}
    yield _described("settle at all keys", picks._settle, pointers | inputs, settled | everywhere, 4, 1, matrix=False)
    yield _described("rank", picks._rank, pointers, {"BLOCK": picks.BLOCK}, 4, 1, matrix=False)
    collected = {"WIDTH": 128, "CHANNELS": picks.CHANNELS}
    yield _described("collect", picks._collect, pointers, collected, 4, 1, matrix=False)
    sinks = {"H": 128, "ROWS": attention_backward.SINK_ROWS, "HEADS": attention_backward.SINK_HEADS}
    yield _described(
        "sinks", attention_gradients.sink_gradients, pointers | {"sink": "bf16"}, sinks, 4, 1, matrix=False
    )


def _described(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int,
    *,
    matrix: bool,
    narrow: bool = False,
) -> Specimen:
    """Return a specimen, given its pointers and constants; strides are multiples of 16, the innermost ones 1."""
    constants = {n: x for n, x in {**dict.fromkeys(ONES, 1), **constants}.items() if n in kernel.arg_names}
    types = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument in pointers:
            types[argument] = f"*{pointers[argument]}:16"
        elif argument == "scale":
            types[argument] = "fp32"
        else:
            types[argument] = "i32" if argument in ANY_VALUE else "i32:16"
    return Specimen(name, kernel, types, constants, warps, max(1, stages), matrix, narrow)
