"""tune: the tiles of one kernel, compiled, judged and timed on the device at hand; prints the row for the table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from headfold import backends, scatter_tiles
from headfold.contract import UnsupportedError, one_of
from headfold.lanes.every_op import Inputs, make_inputs
from headfold.lanes.processes import answers
from headfold.lanes.record import FAIL, PASS, Column, Lane, Row, Track, no_track
from headfold.loss_slabs import LossSlab
from headfold.tiles import blocks

if TYPE_CHECKING:
    from headfold.backends.triton.table import Row as Tile

COLUMNS = (
    Column("rows", "rows", "number"),
    Column("keys", "keys", "number"),
    Column("warps", "warps", "number"),
    Column("stages", "stages", "number"),
    Column("uniform", "uniform bounds"),
    Column("cap", "registers at most", "number"),
    Column("registers", "registers a thread", "number"),
    Column("shared", "shared memory", "bytes"),
    Column("seconds", "median", "seconds"),
    Column("low", "20 % took less than", "seconds"),
    Column("high", "20 % took more than", "seconds"),
    Column("times", "x the table's", "ratio"),
    Column("verdict", "verdict"),
    Column("note", "note"),
)
DTYPES = ("float16", "bfloat16", "float32", "float64")
# What is timed: enough rows and keys to fill a device, topk picks of each row where a kernel gathers.
ROWS, KEYS, TOPK = 8192, 8192, 1024
# Rows and keys of the call whose slabs the teacher is timed on.
LOSS_ROWS = 4096
# What is launched to have it compiled, rows and keys, and by how many processes at most.
FEW, WORKERS = 1024, 8
WARPS = 4, 8
# Stages of a pipelined loop. Operands of four bytes and more leave room in shared memory for few.
STAGES = {"half": (2, 3, 4), "float32": (1, 2), "float64": (1, 2)}
# Results of one product that a warp may hold: fewer do not pay, more do not fit registers.
FEWEST, MOST = 128, 4096
NARROWEST = 16  # rows and keys of a matrix instruction
# Width of a head with values of its own at most, and channels of a wider one that are of positions and no values.
WIDEST, POSITIONS = 256, 64


@dataclass(frozen=True)
class Kernel:
    """What a kernel's tiles may be, and the call in which it is timed.

    rows, keys: candidates.   call: runs it, given the package of kernels and the inputs.   of_heads: whether rows are
    heads of one query row, so that more than there are would be the same tile.   beside: what else the call runs, at
    the table's own tiles.   bounded: whether the row says where its loop's bounds come from.
    """

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    call: Callable[[Any, Inputs], Callable[[], Any]]
    of_heads: bool = False
    beside: str = ""
    bounded: bool = False


def candidates(kernel: str, now: Tile, heads: int) -> list[Tile]:
    """Return tiles to try, the table's own first: every choice of sizes, warps and stages that may fit a chip.

    now: the row that the call has.   heads: of one key head.
    """
    chosen = KERNELS[kernel]
    most = max(NARROWEST, 1 << (heads - 1).bit_length())
    rows = [r for r in chosen.rows if not chosen.of_heads or r <= most]
    grid = product(rows, chosen.keys, WARPS, STAGES.get(now.dtype, STAGES["half"]))
    found = [now._replace(rows=r, keys=k, warps=w, stages=s) for r, k, w, s in grid]
    if chosen.bounded:
        found.insert(0, now._replace(uniform=not now.uniform))
    return [now, *(x for x in found if x != now and FEWEST <= x.rows * x.keys // x.warps <= MOST)]


def tune(
    kernel: str,
    device: torch.device,
    *,
    dtype: str,
    heads: int,
    dim: int,
    workers: int | None = None,
    track: Track[Any] = no_track,
) -> Lane:
    """Search the tiles of a kernel for one shape of call, and say which row the table should have.

    A candidate has to pass what the compile lane asks, but for tensor cores, before it is timed: no spill, the chip's
    shared memory, products whose instructions overlap. The table's own row is timed anyway. Times are the medians of
    triton.testing.do_bench, which clears the L2 cache between runs. Where one more program of a candidate would fit a
    core if its threads had fewer registers, it is tried with so many at most too.

    Args:
        kernel: its name in the table of tiles.
        device: a CUDA device.
        dtype: of the inputs.
        heads: of the indexer, or of the attention, where all share one key head.
        dim: width of a head of either.
        workers: processes that compile candidates at once; None for half the CPU's cores, and no more than 8. They
            are gone before anything is timed.
        track: wraps what is compiled, and then what is timed, for a progress bar.

    Raises: UnsupportedError without Triton; ValueError for an unknown kernel or dtype.
    """
    one_of("tune", "--kernel", kernel, tuple(KERNELS))
    one_of("tune", "--dtype", dtype, DTYPES)
    if not backends.HAS_TRITON:
        raise UnsupportedError("tune: needs Triton, which is not installed here.")
    kernels = backends.load("triton")
    if kernels.INTERPRETED:
        raise UnsupportedError("tune: needs Triton's compiler, got TRITON_INTERPRET=1. Unset it.")
    from headfold.backends.triton.table import arch_of, tile

    arch = arch_of(device)
    now = tile(kernel, arch, getattr(torch, dtype), dim, heads)
    lane = Lane("tune", f"Which tile is fastest for {kernel}, {dtype}, h={heads}, d={dim} on {arch}?", COLUMNS)
    search = Search(arch, dtype, heads, dim, device)
    at_once = workers or max(1, min(WORKERS, (os.cpu_count() or 2) // 2))
    tried: list[tuple[Tile, Row]] = []
    jobs = [(x, x == now) for x in candidates(kernel, now, heads)]
    with closing(answers(search.compiled, jobs, at_once)) as compiled:
        for (candidate, _), found in zip(track(jobs, f"compile {kernel}"), compiled, strict=True):
            tried += [(candidate, _died(candidate))] if found is None else found
    call = KERNELS[kernel].call(kernels, search.inputs(ROWS, KEYS))
    for candidate, row in track(tried, f"time {kernel}"):
        lane.rows.append(row if "verdict" in row else search.timed(candidate, row, call))
    _rank(lane, now, arch)
    lane.notes.append(
        f"Timed at b=1, {ROWS} rows, {KEYS} keys, topk {TOPK}"
        + (f"; the call also runs {KERNELS[kernel].beside}." if KERNELS[kernel].beside else ".")
    )
    return lane


@dataclass(frozen=True)
class Search:
    """The shape of call that tiles are tried for; sent to the processes that compile them."""

    arch: str
    dtype: str
    heads: int
    dim: int
    device: torch.device

    def inputs(self, rows: int, keys: int) -> Inputs:
        """Return operands of so many rows and keys of one batch element."""
        sizes = {"b": 1, "sq": rows, "sk": keys, "topk": TOPK, "heads": self.heads, "key_heads": 1}
        dtype = getattr(torch, self.dtype)
        made = make_inputs(self.device, dtype, h=self.heads, d=self.dim, hn=self.dim, **sizes)
        # A selection has no duplicates: what is picked twice takes a slower way.
        order = torch.rand(1, rows, keys, device=self.device).argsort(-1)[..., :TOPK]
        return made._replace(indices=order.to(torch.int32))

    def compiled(self, candidate: Tile, anyway: bool = False) -> list[tuple[Tile, Row]]:
        """Return what became of a tile, and of the same with fewer registers where one more program would fit then.

        What can be timed has been launched once, so that Triton's cache holds it, and has no verdict yet.   anyway:
        whether what the compile lane would not take is launched too.
        """
        row, fewer = self._judged(candidate, anyway=anyway)
        found = [(candidate, row)]
        if fewer is not None:
            capped = candidate._replace(registers=fewer)
            found.append((capped, self._judged(capped)[0]))
        return found

    def _judged(self, candidate: Tile, *, anyway: bool = False) -> tuple[Row, int | None]:
        from headfold.backends.triton import compiling

        row = _sizes(candidate)
        specimen = specimen_of(candidate, self.dtype, self.heads, self.dim)
        try:
            found = compiling.compile_specimen(specimen, self.arch)
            row |= {"registers": found.registers, "shared": found.shared}
            breaches = [x for x in found.breaches(specimen, self.arch) if not x.startswith("has no ")]
            row |= {"note": "; ".join(breaches)} if breaches else {}
            if breaches and not anyway:
                return {**row, "verdict": ""}, None
            self._launch(candidate)
        except Exception as error:  # noqa: BLE001 - a compiler or launch raises any type; this tile's row names it, and the next is tried
            return {**row, "verdict": "", "note": _named(error)}, None
        capped = compiling.TARGETS[self.arch].backend == "cuda"  # elsewhere the compiler takes no such limit
        return row, found.registers_for_one_more(specimen, self.arch) if capped else None

    def _launch(self, candidate: Tile) -> None:
        call = KERNELS[candidate.kernel].call(backends.load("triton"), self.inputs(FEW, FEW))
        with _in_use(candidate, self.device):
            call()
            torch.cuda.synchronize(self.device)

    def timed(self, candidate: Tile, row: Row, call: Callable[[], Any]) -> Row:
        """Return a tile's row with what a call took; one that does not run is an answer, not a broken contract."""
        from triton.testing import do_bench

        try:
            with _in_use(candidate, self.device):
                call()
                median, low, high = (x / 1e3 for x in do_bench(call, quantiles=[0.5, 0.2, 0.8]))
        except Exception as error:  # noqa: BLE001 - drivers and Triton's launcher raise any type; this tile's row names it, and the next is timed
            return {**row, "verdict": "", "note": _named(error)}
        return {**row, "seconds": median, "low": low, "high": high, "verdict": PASS}


def _sizes(candidate: Tile) -> Row:
    row: Row = {name: getattr(candidate, name) for name in ("rows", "keys", "warps", "stages")}
    if KERNELS[candidate.kernel].bounded:
        row["uniform"] = "yes" if candidate.uniform else "no"
    if candidate.registers is not None:
        row["cap"] = candidate.registers
    return row


def _died(candidate: Tile) -> Row:
    return {**_sizes(candidate), "verdict": "", "note": "the process that compiled it died, as for lack of memory"}


@contextmanager
def _in_use(candidate: Tile, device: torch.device) -> Iterator[None]:
    """Put a tile before the table, and its kernels before what the rules would choose."""
    from headfold.backends.triton import table

    masked = mock.patch.object(scatter_tiles, "masks_keys", return_value=False)
    dense = mock.patch.object(scatter_tiles, "meets_every_key", return_value=False)
    with table.trying(candidate), masked, dense, torch.cuda.device(device), torch.no_grad():
        yield


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _rank(lane: Lane, now: Tile, arch: str) -> None:
    """Sort the rows by time, compare them with the table's, and name the row that the table should have."""
    first = lane.rows[0]
    lane.rows.sort(key=lambda row: row.get("seconds", float("inf")))
    best = lane.rows[0]
    if "seconds" not in best:
        first["verdict"] = FAIL
        lane.notes.append("No candidate ran: the table stays as it is.")
        return
    if "seconds" in first:
        for row in lane.rows:
            if "seconds" in row:
                row["times"] = row["seconds"] / first["seconds"]
    sizes = {name: best[name] for name in ("rows", "keys", "warps", "stages")}
    chosen = now._replace(arch=arch, **sizes, registers=best.get("cap"), uniform=best.get("uniform") != "no")
    said = "The table's own is the fastest" if best is first else "The table's new row, before the one it has"
    lane.notes.append(f"{said}: {written(chosen)}")


def written(row: Tile) -> str:
    """Write a row as the table does."""
    from headfold.backends.triton.table import ANY

    def one(value: Any) -> str:
        return "ANY" if value == ANY else f'"{value}"' if isinstance(value, str) else str(value)

    given = row._asdict()
    for name, default in reversed(row._field_defaults.items()):
        if given[name] != default:
            break
        del given[name]
    return f"Row({', '.join(map(one, given.values()))}),"


def specimen_of(candidate: Tile, dtype: str, heads: int, dim: int) -> Any:
    """Return the kernel of a row as the call would have it compiled."""
    from headfold.backends.triton import gathered_specimens, loss_specimens, score_specimens

    if candidate.kernel in score_specimens.KERNELS:
        return score_specimens.score_specimen(candidate, dtype, heads, dim)
    if candidate.kernel in loss_specimens.KERNELS:
        return loss_specimens.teacher_specimen(candidate, dtype, dim, marked=True)
    return gathered_specimens.gathered_specimen(candidate, getattr(torch, dtype), h=heads, d=dim)


EVERY_KEY: tuple[Any, ...] = (None, None, None, None, 1, True, 1.0)  # start, end, bias, offset, ratio, relu, scale


def _scored(needs: tuple[bool, bool, bool] | None) -> Callable[[Any, Inputs], Callable[[], Any]]:
    def call(kernels: Any, x: Inputs) -> Callable[[], Any]:
        if needs is None:
            return lambda: kernels.index_scores(x.q, x.weights, x.k, *EVERY_KEY)
        g = torch.ones_like(kernels.index_scores(x.q, x.weights, x.k, *EVERY_KEY))
        return lambda: kernels.index_scores_backward(g, x.q, x.weights, x.k, *EVERY_KEY, needs)

    return call


def _selected(needs: tuple[bool, bool, bool] | None) -> Callable[[Any, Inputs], Callable[[], Any]]:
    def call(kernels: Any, x: Inputs) -> Callable[[], Any]:
        arguments = x.q, x.weights, x.k, x.indices, *EVERY_KEY
        if needs is None:
            return lambda: kernels.selected_scores(*arguments)
        g = torch.ones_like(kernels.selected_scores(*arguments))
        return lambda: kernels.selected_scores_backward(g, *arguments, needs)

    return call


def _attended(needs: tuple[bool, bool, bool, bool] | None) -> Callable[[Any, Inputs], Callable[[], Any]]:
    def call(kernels: Any, x: Inputs) -> Callable[[], Any]:
        width = x.value.shape[-1]
        # Absorbed latent attention: values are the first channels of the keys.
        value, v_dim = (None, width - POSITIONS) if width > WIDEST else (x.value, width)
        arguments = x.query, x.key, value, None, x.indices, None, None, None, 1, width**-0.5, v_dim, True
        if needs is None:
            return lambda: kernels.sparse_attention(*arguments, False)
        g = torch.ones_like(x.query[..., :v_dim])
        return lambda: kernels.sparse_attention_backward(g, *arguments, needs)

    return call


def _taught(_: Any, x: Inputs) -> Callable[[], Any]:
    """Slabs as the loss has them: programs of a few hundred rows fill a device in other numbers than those of all."""
    from headfold.backends.triton.teacher import fill_mass
    from headfold.contract import compute_dtype

    query, key = x.query[:, :LOSS_ROWS], x.key[:, :LOSS_ROWS]
    (b, rows, heads, width), keys = query.shape, key.shape[1]
    dtype = compute_dtype(query.dtype)
    h, d = x.q.shape[2:]
    slab = LossSlab.of(b, rows, keys, h, d, heads, dtype.itemsize, None, relu=True)
    mass = torch.empty(b, slab.rows, slab.width, dtype=dtype, device=query.device)
    marks = torch.ones_like(mass, dtype=torch.uint8)
    sums = torch.empty(slab.sums, dtype=dtype, device=query.device)

    def run() -> None:
        for first, end in blocks(rows, slab.rows):
            some, marked = mass[:, : end - first], marks[:, : end - first]
            fill_mass(some, sums, query[:, first:end], key, marked, None, None, None, 1, keys, width**-0.5)

    return run


# Not "attention_masked": whether it runs at all is the shape's choice.
SETTLING = "what settles the picks"
SLABS = f"both by the slabs of a loss at {LOSS_ROWS} rows and keys"
SCATTER = f"{SETTLING} and adds up the gradients of their keys"
KERNELS = {
    "scores": Kernel((64, 128, 256), (32, 64, 128), _scored(None), bounded=True),
    "query_gradients": Kernel((32, 64, 128), (32, 64, 128), _scored((True, True, False)), bounded=True),
    "key_gradients": Kernel((32, 64, 128), (32, 64, 128), _scored((False, False, True))),
    "selected_scores": Kernel((16, 32, 64), (32, 64, 128), _selected(None), of_heads=True),
    "selected_rows": Kernel((16, 32, 64), (32, 64, 128), _selected((True, True, False)), of_heads=True),
    "selected_keys": Kernel((16, 32, 64), (32, 64, 128), _selected((False, False, True)), True, SCATTER),
    "attention": Kernel((16, 32, 64), (32, 64, 128), _attended(None), True, SETTLING),
    "attention_rows": Kernel((16, 32, 64), (32, 64), _attended((True, False, False, False)), True, SETTLING),
    "attention_keys": Kernel((16, 32, 64), (16, 32, 64), _attended((False, True, True, False)), True, SCATTER),
    "teacher sums": Kernel((64, 128), (32, 64, 128), _taught, beside=f"teacher mass, {SLABS}"),
    "teacher mass": Kernel((64, 128), (32, 64, 128), _taught, beside=f"teacher sums, {SLABS}"),
}
