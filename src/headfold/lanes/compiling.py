"""doctor --compile: every kernel at every row of the tile table, compiled for chips that are not here, and judged."""

from __future__ import annotations

import functools
import os
from contextlib import closing
from pathlib import Path
from typing import Any

from headfold import backends
from headfold.contract import UnsupportedError, one_of
from headfold.lanes.processes import answers
from headfold.lanes.record import FAIL, PASS, Column, Lane, Row, Track, no_track

COLUMNS = (
    Column("kernel", "kernel"),
    Column("arch", "for"),
    Column("warps", "warps", "number"),
    Column("stages", "stages", "number"),
    Column("registers", "registers a thread", "number"),
    Column("spilled", "spilled bytes", "number"),
    Column("shared", "shared memory", "bytes"),
    Column("programs", "programs a core", "number"),
    Column("matrix", "matrix instructions"),
    Column("verdict", "verdict"),
    Column("note", "note"),
)
BEGIN, END = "<!-- compiled -->\n", "<!-- end -->"


# Kernels for each of the processes that compile, at least, and processes at most.
SHARE, WORKERS = 8, 8


def compiled(
    archs: tuple[str, ...] = (),
    *,
    first: int | None = None,
    workers: int | None = None,
    track: Track[Any] = no_track,
) -> Lane:
    """Compile for architectures, all when none is named.

    A row fails when a kernel does not compile, spills (more than its specimen allows, which is a few numbers outside of
    loops with products), needs more shared memory than its chip has, has to use the tensor cores and does not, or lets
    no two instructions of a product overlap.

    Args:
        archs: as the table of tiles names them.
        first: only so many kernels of each.
        workers: processes that compile at once; by the CPU's cores and the number of kernels when None.
        track: wraps the compilations, for a progress bar.
    """
    compiling = _compiler()
    for arch in archs:
        one_of("doctor", "--arch", arch, tuple(compiling.TARGETS))
    lane = Lane("compile", "Does every kernel compile to what its chip can run well?", COLUMNS)
    counts = {arch: len(_specimens(arch)[:first]) for arch in archs or tuple(compiling.TARGETS)}
    jobs = [(arch, i) for arch, count in counts.items() for i in range(count)]
    at_once = workers or max(1, min(WORKERS, os.cpu_count() or 1, len(jobs) // SHARE))
    with closing(answers(_row, jobs, at_once) if at_once > 1 else (_row(*job) for job in jobs)) as rows:
        for (arch, i), row in zip(track(jobs, "compile"), rows, strict=True):
            lane.rows.append(_died(arch, i) if row is None else row)
    lane.notes.append(f"Triton {compiling.VERSION}; no GPU is needed or used")
    return lane


def write(page: Path, lane: Lane) -> None:
    """Write the lane's table into a page, between its markers."""
    from tabulate import tabulate

    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"doctor: --page must have {BEGIN.strip()} and {END} to write between, got {page} without.")
    table = tabulate(lane.cells(), [column.title for column in lane.filled_columns()], "github", disable_numparse=True)
    page.write_text(f"{before}{BEGIN}\n{table}\n\n{'; '.join(lane.notes)}.\n{END}{after}", encoding="utf-8")


def _compiler() -> Any:
    if not backends.HAS_TRITON:
        raise UnsupportedError("doctor: --compile needs Triton, which is not installed here.")
    if backends.load("triton").INTERPRETED:
        raise UnsupportedError("doctor: --compile needs Triton's compiler, got TRITON_INTERPRET=1. Unset it.")
    from headfold.backends.triton import compiling

    return compiling


def _died(arch: str, index: int) -> Row:
    note = "the process that compiled it died, as for lack of memory"
    return {"kernel": _specimens(arch)[index].name, "arch": arch, "verdict": FAIL, "note": note}


@functools.cache
def _specimens(arch: str) -> list[Any]:
    from headfold.backends.triton.specimens import specimens

    return list(specimens(arch))


def _row(arch: str, index: int) -> Row:
    compiling, specimen = _compiler(), _specimens(arch)[index]
    row: Row = {"kernel": specimen.name, "arch": arch, "warps": specimen.num_warps, "stages": specimen.num_stages}
    try:
        result = compiling.compile_specimen(specimen, arch)
    except Exception as error:  # noqa: BLE001 - ptxas, LLVM and Triton share no base type; the row fails and names it
        return {**row, "verdict": FAIL, "note": f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"}
    breaches = result.breaches(specimen, arch)
    return {
        **row,
        "registers": result.registers,
        "spilled": result.spilled,
        "shared": result.shared,
        "programs": result.programs_per_core(specimen, arch),
        "matrix": ", ".join(f"{count} {name}" for name, count in result.matrix.items()),
        "verdict": FAIL if breaches else PASS,
        "note": "; ".join(breaches),
    }
