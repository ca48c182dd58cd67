"""The large-shape lane: measured peaks beside planned ones, per path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from headfold.lanes import measure
from headfold.lanes.paths import IndexerPath, Make, scoring, selecting
from headfold.lanes.problem import Problem
from headfold.lanes.record import FAIL, PASS, SKIP, Column, Lane, Row, Track, no_track, show_bytes
from headfold.lanes.training_paths import attending, losses
from headfold.tiles import MIB

COLUMNS = (
    Column("path", "path"),
    Column("backend", "backend"),
    Column("phase", "phase"),
    Column("planned", "planned", "bytes"),
    Column("measured", "measured", "bytes"),
    Column("ratio", "measured / planned", "ratio"),
    Column("process", "process peak", "bytes"),
    Column("verdict", "verdict"),
    Column("note", "note"),
)
LEAST_SHARE = 0.8
SMALL_CHANGE = MIB
# At shapes of a few keys, scratch that a call turns out not to need is most of the plan.
FEW_BYTES = 64 * 1024
# What a process may take beyond the allocator's peak: matrix-library scratch, page tables and interpreter growth.
PROCESS_SLACK = 64 * MIB
FORWARD, TRAINING, HELD = "forward", "forward + backward", "held for backward"


def residency(
    problem: Problem,
    device: torch.device,
    *,
    workspace: int | None = None,
    impl: str = "auto",
    process: bool = True,
    with_loop: bool = True,
    with_materialized: bool = True,
    track: Track[Any] = no_track,
) -> Lane:
    """Measure every way to score that fits, forward and through backward, and hold it to the plan.

    Args:
        problem: the tensors.
        device: where.
        workspace: headfold's; None measures both the default and 16 MiB (or the smallest that works, if larger).
        impl: headfold's.
        process: whether each CPU row runs in a fresh process, and that process's own peak is read too.
        with_loop: whether the per-head loop runs too.
        with_materialized: whether the materialised path runs too.
        track: wraps the list of paths, for a progress bar.
    """
    lane = Lane("residency", "Do the measured peaks equal the planned ones?", COLUMNS)
    others = {"with_loop": with_loop, "with_materialized": with_materialized}
    paths = scoring(problem.geometry, device, workspace, impl=impl, **others)
    return _fill(lane, problem, paths, device, process=process, track=track)


def selection_residency(
    problem: Problem,
    device: torch.device,
    *,
    workspace: int | None = None,
    impl: str = "auto",
    process: bool = True,
    track: Track[Any] = no_track,
) -> Lane:
    """Measure every way to select topk keys a row, and our scores of what was selected; arguments as in residency."""
    lane = Lane("selection residency", "And when only topk keys a row are kept?", COLUMNS)
    paths = selecting(problem.geometry, device, workspace, impl=impl)
    return _fill(lane, problem, paths, device, process=process, track=track)


def training_residency(
    problem: Problem,
    device: torch.device,
    *,
    workspace: int | None = None,
    impl: str = "auto",
    process: bool = True,
    track: Track[Any] = no_track,
) -> Lane:
    """Measure the loss and, where topk is given, attention over a selection; arguments as in residency."""
    lane = Lane("training residency", "And what does training take?", COLUMNS)
    g = problem.geometry
    paths = losses(g, device, workspace, impl=impl) + (attending(g, device, workspace, impl=impl) if g.topk else [])
    return _fill(lane, problem, paths, device, process=process, track=track)


def _fill(
    lane: Lane, problem: Problem, paths: list[IndexerPath], device: torch.device, *, process: bool, track: Track[Any]
) -> Lane:
    process = process and device.type == "cpu"
    rows = [(path, phase) for path in paths for phase in (FORWARD, TRAINING) if phase == FORWARD or path.trains]
    for path, phase in track(rows, lane.name):
        lane.rows.extend(_measure(problem, path, phase, device, process=process))
    lane.notes = [
        f"Bytes beyond the inputs, results included, counted by {_counter(device)}. "
        f"A row passes if {LEAST_SHARE} · planned <= measured <= planned.",
        f"headfold rows also hold the contract: measured - results <= workspace + {show_bytes(SMALL_CHANGE)}.",
    ]
    if process:
        lane.notes.append(
            "Process peak: growth of the resident set over the same call, in a fresh process. For headfold at most "
            f"planned + {show_bytes(PROCESS_SLACK)} of slack for library scratch outside the allocator; for the other "
            "paths, whose many tensors of many sizes also scatter the heap, it is information."
        )
    return lane


def _counter(device: torch.device) -> str:
    return "the CUDA allocator's peak counter" if device.type == "cuda" else "the CPU allocator's events"


def _measure(problem: Problem, path: IndexerPath, phase: str, device: torch.device, *, process: bool) -> list[Row]:
    bill = path.bill(problem, device)
    planned = bill.forward if phase == FORWARD else bill.training
    row: Row = {"path": path.name, "backend": path.backend, "phase": phase, "planned": planned}
    given = path.inputs_bytes(problem.geometry) + path.result_bytes(problem)  # its gradient is as large as the result
    needed = planned + given + PROCESS_SLACK
    free = measure.free_memory(device)
    if needed > free:
        note = f"needs {needed:,} bytes ({show_bytes(needed)}) with inputs and slack, {show_bytes(free)} are free"
        return [{**row, "verdict": SKIP, "note": note}]
    if process:
        call = problem, path.make, path.workspace, phase, torch.get_num_threads()
        found = measure.in_fresh_process(process_row, *call)
        if found is None:
            return [{**row, "verdict": FAIL, "note": "the fresh process did not survive"}]
        measured, peak = found
    else:
        _warm(problem, path, device)
        measured, peak = Call(problem, path, phase, device).follow(), None
    rows = [_judge({**row, "measured": measured.peak, "process": peak}, problem, path)]
    if phase == TRAINING:
        held = {**row, "phase": HELD, "planned": bill.held, "measured": measured.held}
        rows.append(_judge(held, problem, path))
    return rows


class Measured(NamedTuple):
    """Bytes beyond the inputs: the peak of one call, and what it holds for backward beside its result."""

    peak: int
    held: int


class Call:
    """A path's inputs, made once, and the call that is measured."""

    def __init__(self, problem: Problem, path: IndexerPath, phase: str, device: torch.device) -> None:
        self.problem, self.path, self.device = problem, path, device
        self.inputs = path.inputs(problem, device, grad=phase == TRAINING)
        self.g = path.incoming(problem, device) if phase == TRAINING else None

    def run(self) -> None:
        """Call the path once, through backward where it trains."""
        result = [self._forward()]
        if self.g is not None:
            torch.autograd.grad(result.pop(), self.inputs, self.g)

    def follow(self) -> Measured:
        """Run and follow the allocator."""
        forward = measure.allocator_peak(self._forward, self.device)
        result = [forward.result]
        held = forward.left - result[0].nbytes
        if self.g is None:
            return Measured(forward.peak, held)
        backward = measure.allocator_peak(lambda: torch.autograd.grad(result[0], self.inputs, self.g), self.device)
        return Measured(max(forward.peak, forward.left + backward.peak), held)

    def _forward(self) -> Tensor:
        return self.path(self.inputs, self.problem.causal, self.problem.scale)


def _warm(problem: Problem, path: IndexerPath, device: torch.device) -> None:
    """Run the path once at a small shape, so that what a library allocates for good is not counted."""
    g = problem.geometry.with_(b=1, sq=min(16, problem.geometry.sq), sk=min(16, problem.geometry.sk))
    small = Problem(g, problem.causal, problem.scale)
    Call(small, path.make(g, device, path.workspace), TRAINING if path.trains else FORWARD, device).follow()


def _judge(row: Row, problem: Problem, path: IndexerPath) -> Row:
    planned, measured = row["planned"], row["measured"]
    row["ratio"] = measured / planned if planned else None
    row["verdict"] = PASS
    if measured > planned:
        row |= {"verdict": FAIL, "note": f"{measured - planned:,} bytes above planned"}
    elif measured < LEAST_SHARE * planned - FEW_BYTES:
        row |= {"verdict": FAIL, "note": f"below {LEAST_SHARE} of planned"}
    if path.ours and row["phase"] != HELD:
        gradients = path.gradients_bytes(problem.geometry) if row["phase"] == TRAINING else 0
        row["beyond_results"] = measured - path.result_bytes(problem) - gradients
        row["bound"] = path.workspace_bytes + SMALL_CHANGE
        said = f"{show_bytes(max(0, row['beyond_results']))} beyond results"
        if row["beyond_results"] > row["bound"]:
            row["verdict"] = FAIL
            said = f"{row['beyond_results'] - row['bound']:,} bytes above workspace and results"
        row["note"] = f"{row['note']}; {said}" if "note" in row else said
        if row["process"] is not None:
            row["process_bound"] = planned + PROCESS_SLACK
            if row["process"] > row["process_bound"]:
                said = f"process {row['process'] - row['process_bound']:,} bytes above its bound"
                row |= {"verdict": FAIL, "note": f"{row['note']}; {said}"}
    return row


def process_row(problem: Problem, make: Make, workspace: int | None, phase: str, threads: int) -> tuple[Measured, int]:
    """In a fresh process: make the inputs, warm up, and read allocator and resident set.

    Following the allocator takes memory of its own, which grows with the number of calls into it: where the process
    peak is judged it is read off a run of its own, else off the same run, for the time that this saves.
    """
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    path = make(problem.geometry, device, workspace)
    _warm(problem, path, device)
    call = Call(problem, path, phase, device)
    if path.ours:
        peak = measure.process_peak(call.run)
        return call.follow(), peak
    found: list[Measured] = []
    peak = measure.process_peak(lambda: found.append(call.follow()))
    return found[0], peak
