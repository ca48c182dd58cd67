"""doctor --compile: every kernel at every row of the tile table, compiled for chips that are not here, and judged."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from headfold import backends
from headfold.contract import UnsupportedError, one_of
from headfold.lanes.record import FAIL, PASS, Column, Lane, Track, no_track

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


@dataclass(frozen=True)
class _Job:
    arch: str
    specimen: Any


def compiled(archs: tuple[str, ...] = (), *, first: int | None = None, track: Track[_Job] = no_track) -> Lane:
    """Compile for architectures, all when none is named; first: only so many specimens of each.

    A row fails when a kernel does not compile, spills, needs more shared memory than its chip has, or has to use the
    tensor cores and does not.
    """
    compiling = _compiler()
    for arch in archs:
        one_of("doctor", "--arch", arch, tuple(compiling.TARGETS))
    from headfold.backends.triton.specimens import specimens

    lane = Lane("compile", "Does every kernel compile to what its chip can run well?", COLUMNS)
    jobs = [_Job(arch, x) for arch in archs or tuple(compiling.TARGETS) for x in islice(specimens(arch), first)]
    for job in track(jobs, "compile"):
        lane.rows.append(_row(compiling, job))
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


def _row(compiling: Any, job: _Job) -> dict[str, Any]:
    specimen, arch = job.specimen, job.arch
    row = {"kernel": specimen.name, "arch": arch, "warps": specimen.num_warps, "stages": specimen.num_stages}
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
