"""A kernel's specimen, written as what differs from the ordinary call: aligned pointers and strides, ints of 32 bits."""

from __future__ import annotations

from typing import Any

from headfold.backends.triton.compiling import Specimen

# Integers that no call promises to be multiples of 16.
ANY_VALUE = ("sk", "topk", "words", "offset", "first_row", "first_pick", "last_pick", "span", "group", "groups", "rows")


def described(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    *,
    warps: int,
    stages: int,
    matrix: bool = True,
) -> Specimen:
    """Return the specimen of a kernel, given the dtypes of its pointers and its constants, strides of 1 and None."""
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
    return Specimen(name, kernel, types, constants, warps, stages, matrix)
