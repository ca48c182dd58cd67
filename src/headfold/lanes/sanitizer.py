"""The sanitizer lane: compute-sanitizer watches every kernel at small shapes, where it is installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from headfold import backends
from headfold.lanes import measure
from headfold.lanes.every_op import IMPLS, OPS, calls, make_inputs, name_of
from headfold.lanes.long_rows import FEWER, TOPK, long_rows, seen
from headfold.lanes.record import FAIL, PASS, SKIP, Column, Lane, Row, Track, no_track
from headfold.loss import indexer_loss
from headfold.selection import index_topk

COLUMNS = (
    Column("backend", "backend"),
    Column("dtype", "dtype"),
    Column("tool", "tool"),
    Column("watched", "watched"),
    Column("seconds", "at most", "seconds"),
    Column("verdict", "verdict"),
    Column("note", "note"),
)
PROGRAM = "compute-sanitizer"
STATUS = 86  # of a process in which it found something
# Of compiling before anything is watched, and of each process that is; all rows run at once.
COMPILING, SECONDS = 50.0, 75.0
COMPILERS = 8
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
# float16 takes the kernels and tiles of bfloat16.
EVERY, PLANTED = "every kernel", "a planted fault"
WATCHES = (
    *(("memcheck", dtype, EVERY) for dtype in (HALF, SINGLE, DOUBLE)),
    *(("racecheck", dtype, EVERY) for dtype in (HALF, SINGLE)),
    ("memcheck", SINGLE, PLANTED),  # a tool that was told of no kernel would find nothing at all
)
# Sizes that no tile divides.
SMALL = {"b": 2, "sq": 19, "sk": 45, "h": 3, "d": 80, "topk": 11, "heads": 4, "key_heads": 2, "hn": 24}
# More keys than are sorted, or summed, by one program.
WIDE = {"b": 1, "sq": 3, "sk": 2061, "h": 2, "d": 16, "topk": 2050, "heads": 2, "key_heads": 1, "hn": 16}
WIDE_CALLS, LONG_CALLS = "many keys", "long rows"


def sanitizer(
    device: torch.device,
    *,
    impl: str = IMPLS[1],
    watches: Sequence[tuple[str, torch.dtype, str]] = WATCHES,
    track: Track[Any] = no_track,
) -> Lane:
    """Run every kernel under the tools of compute-sanitizer; rows that say so where it is not on PATH."""
    lane = Lane("sanitizer", f"Does {PROGRAM} find an access out of bounds, or a race?", COLUMNS)
    program = shutil.which(PROGRAM)
    rows: list[Row] = [
        {"backend": impl, "dtype": name_of(dtype), "tool": tool, "watched": watched, "seconds": SECONDS}
        for tool, dtype, watched in watches
    ]
    if program is None:
        lane.rows = [{**row, "verdict": SKIP, "note": f"{PROGRAM} is not on PATH"} for row in rows]
    else:
        if device.type == "cuda":
            compile_all(impl, sorted({row["dtype"] for row in rows}), device)
        with ThreadPoolExecutor(max_workers=max(1, len(rows))) as pool:
            found = pool.map(partial(_watched, program, device), rows)
            lane.rows = [{**row, **judged} for row, judged in track(list(zip(rows, found, strict=True)), "sanitizer")]
    lane.notes = [
        f"Small shapes with odd sizes, {SMALL}, many keys, {WIDE}, and long rows, {FEWER}: each kernel runs at least "
        "once.",
        "torch's allocator does not cache, so that bounds are real. Only our own kernels are watched, compiled "
        "beforehand. So initcheck is not among the tools: it would have to see what torch's kernels write.",
    ]
    return lane


def parts(impl: str) -> list[str]:
    """Return what `exercise` runs, by name."""
    return [*(op for op, _ in calls((impl,))), WIDE_CALLS, LONG_CALLS]


def exercise(impl: str, dtype: str, device: str, only: Sequence[str] = ()) -> None:
    """Run every op once, or only some of the parts."""
    make = partial(make_inputs, torch.device(device), getattr(torch, dtype))
    small, wide = make(**SMALL), make(**WIDE)
    for part in only or parts(impl):
        if part == LONG_CALLS:
            if small.q.dtype == HALF:  # others have no kernels for such rows
                q, weights, k = long_rows(small.q.device, HALF, FEWER)
                index_topk(q, weights, k, TOPK, keys=seen(FEWER), impl=impl)
            continue
        if part != WIDE_CALLS:
            OPS[part](small, impl)
            continue
        OPS["index_topk"](wide, impl)
        bias = torch.zeros(1, WIDE["sq"], WIDE["sk"], device=device)
        call: dict[str, Any] = {"softmax_scale": 0.1, "bias": bias, "layout": "bshd", "impl": impl}
        indexer_loss(wide.q, wide.weights, wide.k, wide.query, wide.key, **call)
    if small.q.device.type == "cuda":
        torch.cuda.synchronize()


def plant(device: str) -> None:
    """Launch a kernel that reads and writes beyond what it was given: only where a tool stops it."""
    from headfold.backends.triton.teacher import JOINED, join_kernel

    splits, count = 2, JOINED << 10
    join_kernel[(count // JOINED,)](torch.zeros(JOINED, device=device), splits, count, BLOCK=JOINED)
    torch.cuda.synchronize()


def compile_all(impl: str, dtypes: Sequence[str], device: torch.device) -> None:
    """Leave the kernels of every part in the compiler's cache; what fails or is late here compiles, watched, later."""
    end = time.monotonic() + COMPILING

    def one(dtype: str, part: str) -> None:
        left = end - time.monotonic()
        if left > 0:
            with suppress(Exception):  # whatever it is, the row that watches this part meets it again and says so
                measure.in_fresh_process(exercise, impl, dtype, str(device), (part,), seconds=left)

    with ThreadPoolExecutor(max_workers=COMPILERS) as pool:
        for part in parts(impl):
            for dtype in dtypes:
                pool.submit(one, dtype, part)


def kernel_names() -> list[str]:
    """Return the names of all kernels of ours."""
    backends.load("triton")
    from headfold.backends.triton.specimens import specimens

    return sorted({specimen.kernel.__name__ for specimen in specimens("sm_90")})


def _watched(program: str, device: torch.device, row: Row) -> Row:
    call = f"exercise({row['backend']!r}, {row['dtype']!r}, {str(device)!r})"
    if row["watched"] == PLANTED:
        call = f"plant({str(device)!r})"
    watch = [program, "--tool", row["tool"], "--error-exitcode", str(STATUS), "--target-processes", "application-only"]
    for name in kernel_names():
        watch += ["--kernel-name", f"kernel_substring={name}"]
    command = [*watch, sys.executable, "-W", "ignore", "-c", f"from headfold.lanes import sanitizer; sanitizer.{call}"]
    # The caller's variables stay: CUDA's paths, Triton's cache, the devices that are seen. One is added: without it
    # torch hands out parts of large blocks, inside which the tool sees no access as outside.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # A session of its own, since the tool's end alone would leave what it watches running.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    ) as running:
        try:
            printed, _ = running.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            return {"verdict": FAIL, "note": f"took more than {SECONDS:g} seconds"}
    return _judged(running.returncode, printed, planted=row["watched"] == PLANTED)


def _judged(status: int, printed: str, *, planted: bool) -> Row:
    said = [line.strip(" =") for line in printed.splitlines() if line.strip(" =")]
    found = next((line for line in said if "Invalid" in line), None)
    if planted:
        passed = status == STATUS and found is not None
        return {"verdict": PASS} if passed else {"verdict": FAIL, "note": f"exit status {status}: it was not found"}
    if status == 0:
        return {"verdict": PASS}
    first = found or next((line for line in said if "Error" in line), said[-1] if said else "nothing")
    return {"verdict": FAIL, "note": f"exit status {status}: {first}"}
