"""The sanitizer lane: compute-sanitizer watches every op at small shapes, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from headfold.lanes.every_op import DTYPES, IMPLS, OPS, calls, make_inputs, name_of
from headfold.lanes.record import FAIL, PASS, SKIP, Column, Lane, Row, Track, no_track

COLUMNS = (
    Column("backend", "backend"),
    Column("dtype", "dtype"),
    Column("tool", "tool"),
    Column("seconds", "at most", "seconds"),
    Column("verdict", "verdict"),
    Column("note", "note"),
)
PROGRAM, TOOL = "compute-sanitizer", "memcheck"
STATUS = 86  # of a process in which it found something
SECONDS = 240.0


def sanitizer(
    device: torch.device,
    *,
    impls: Sequence[str] = IMPLS[1:],
    dtypes: Sequence[torch.dtype] = DTYPES,
    track: Track[Any] = no_track,
) -> Lane:
    """Run every op under compute-sanitizer, a process a dtype; a row that says so where it is not on PATH."""
    lane = Lane("sanitizer", f"Does {PROGRAM} find an access out of bounds?", COLUMNS)
    program = shutil.which(PROGRAM)
    for impl, dtype in track([(impl, dtype) for impl in impls for dtype in dtypes], "sanitizer"):
        row: Row = {"backend": impl, "dtype": name_of(dtype), "tool": TOOL, "seconds": SECONDS}
        if program is None:
            lane.rows.append({**row, "verdict": SKIP, "note": f"{PROGRAM} is not on PATH"})
        else:
            lane.rows.append({**row, **_watched(program, impl, name_of(dtype), device)})
    lane.notes = [f"Small shapes with odd sizes: {SMALL}. torch's allocator does not cache, so that bounds are real."]
    return lane


# Sizes that no tile divides.
SMALL = {"b": 2, "sq": 19, "sk": 45, "h": 3, "d": 80, "topk": 11, "heads": 4, "key_heads": 2, "hn": 24}


def exercise(impl: str, dtype: str, device: str) -> None:
    """Run every op once."""
    inputs = make_inputs(torch.device(device), getattr(torch, dtype), **SMALL)
    for op, _ in calls((impl,)):
        OPS[op](inputs, impl)
    if inputs.q.device.type == "cuda":
        torch.cuda.synchronize()


def _watched(program: str, impl: str, dtype: str, device: torch.device) -> Row:
    code = f"from headfold.lanes.sanitizer import exercise; exercise({impl!r}, {dtype!r}, {str(device)!r})"
    watch = [program, "--tool", TOOL, "--error-exitcode", str(STATUS)]
    command = [*watch, sys.executable, "-W", "ignore", "-c", code]
    # Torch would hand out parts of large blocks, inside which the tool sees no access as outside.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return {"verdict": FAIL, "note": f"took more than {SECONDS:g} seconds"}
    if done.returncode == 0:
        return {"verdict": PASS}
    said = [line.strip(" =") for line in (done.stdout + done.stderr).splitlines() if line.strip(" =")]
    first = next((line for line in said if "Invalid" in line or "Error" in line), said[-1] if said else "nothing")
    return {"verdict": FAIL, "note": f"exit status {done.returncode}: {first}"}
