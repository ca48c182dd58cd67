"""The large-shape lane: measured peaks beside planned ones, per path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headfold.lanes import measure
from headfold.lanes.paths import IndexerPath, rebuilt, scoring, selecting
from headfold.lanes.problem import Problem, incoming
from headfold.lanes.record import FAIL, PASS, SKIP, Column, Lane, Row, Track, no_track, show_bytes
from headfold.tiles import MIB

COLUMNS = (
    Column("path", "path"),
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
    process: bool = True,
    with_loop: bool = True,
    track: Track[Any] = no_track,
) -> Lane:
    """Measure every way to score that fits, forward and through backward, and hold it to the plan.

    Args:
        problem: the tensors.
        device: where.
        workspace: headfold's; None measures both the default and 16 MiB (or the smallest that works, if larger).
        process: whether to repeat each CPU row in a fresh process and read that process's own peak.
        with_loop: whether the per-head loop runs too.
        track: wraps the list of paths, for a progress bar.
    """
    lane = Lane("residency", "Do the measured peaks equal the planned ones?", COLUMNS)
    paths = scoring(problem.geometry, workspace, with_loop=with_loop)
    return _fill(lane, problem, paths, device, process=process, track=track)


def selection_residency(
    problem: Problem,
    device: torch.device,
    *,
    workspace: int | None = None,
    process: bool = True,
    track: Track[Any] = no_track,
) -> Lane:
    """Measure every way to select topk keys a row, and our scores of what was selected; arguments as in residency."""
    lane = Lane("selection residency", "And when only topk keys a row are kept?", COLUMNS)
    paths = selecting(problem.geometry, device, workspace)
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
            "Process peak: growth of the resident set of a fresh process over the same call. For headfold at most "
            f"planned + {show_bytes(PROCESS_SLACK)} of slack for library scratch outside the allocator; for the other "
            "paths, whose many tensors of many sizes also scatter the heap, it is information."
        )
    return lane


def _counter(device: torch.device) -> str:
    return "the CUDA allocator's peak counter" if device.type == "cuda" else "the CPU allocator's events"


def _measure(problem: Problem, path: IndexerPath, phase: str, device: torch.device, *, process: bool) -> list[Row]:
    bill = path.bill(problem, device)
    planned = bill.forward if phase == FORWARD else bill.training
    row: Row = {"path": path.name, "phase": phase, "planned": planned}
    given = problem.geometry.inputs_bytes + path.result_bytes(problem)  # dL/dscores is as large as the result
    needed = planned + given + PROCESS_SLACK
    free = measure.free_memory(device)
    if needed > free:
        note = f"needs {needed:,} bytes ({show_bytes(needed)}) with inputs and slack, {show_bytes(free)} are free"
        return [{**row, "verdict": SKIP, "note": note}]
    if phase == FORWARD:
        run = prepare_forward(problem, path, device)
        _warm(problem, path, device)
        peak = measure.allocator_peak(run, device)
        rows = [_judge({**row, "measured": peak.peak}, problem, path)]
    else:
        rows = _training_rows(row, problem, path, device, bill.held)
    if process:
        rows[0] = _with_process(rows[0], problem, path)
    return rows


def _training_rows(row: Row, problem: Problem, path: IndexerPath, device: torch.device, held: int) -> list[Row]:
    _warm(problem, path, device)
    inputs = problem.tensors(device, grad=True)
    g = incoming(problem, device, kept=path.kept)
    forward = measure.allocator_peak(lambda: path(inputs, problem.causal, problem.scale), device)
    scores = [forward.result]
    kept = forward.left - scores[0].nbytes
    backward = measure.allocator_peak(lambda: torch.autograd.grad(scores[0], inputs, g), device)
    measured = max(forward.peak, forward.left + backward.peak)
    held_row: Row = {"path": path.name, "phase": HELD, "planned": held, "measured": kept}
    return [_judge({**row, "measured": measured}, problem, path), _judge(held_row, problem, path)]


def prepare_forward(problem: Problem, path: IndexerPath, device: torch.device) -> Callable[[], Tensor]:
    """Make the inputs and return the forward call on them."""
    inputs = problem.tensors(device)
    return lambda: path(inputs, problem.causal, problem.scale)


def _warm(problem: Problem, path: IndexerPath, device: torch.device) -> None:
    """Run the path once at a small shape, so that what a library allocates for good is not counted."""
    g = problem.geometry.with_(b=1, sq=min(16, problem.geometry.sq), sk=min(16, problem.geometry.sk))
    small = Problem(g, problem.causal, problem.scale)
    inputs, warming = small.tensors(device, grad=path.trains), rebuilt(path.family, g, device, path.workspace)
    result = warming(inputs, small.causal, small.scale)
    if path.trains:
        torch.autograd.grad(result, inputs, incoming(small, device, kept=path.kept))


def _judge(row: Row, problem: Problem, path: IndexerPath) -> Row:
    planned, measured = row["planned"], row["measured"]
    row["ratio"] = measured / planned if planned else None
    row["verdict"] = PASS
    if measured > planned:
        row |= {"verdict": FAIL, "note": f"{measured - planned:,} bytes above planned"}
    elif measured < LEAST_SHARE * planned - FEW_BYTES:
        row |= {"verdict": FAIL, "note": f"below {LEAST_SHARE} of planned"}
    if path.ours and row["phase"] != HELD:
        g = problem.geometry
        gradients = g.gradients_bytes + g.accumulator_bytes if row["phase"] == TRAINING else 0
        row["beyond_results"] = measured - path.result_bytes(problem) - gradients
        row["bound"] = path.workspace_bytes + SMALL_CHANGE
        said = f"{show_bytes(max(0, row['beyond_results']))} beyond results"
        if row["beyond_results"] > row["bound"]:
            row["verdict"] = FAIL
            said = f"{row['beyond_results'] - row['bound']:,} bytes above workspace and results"
        row["note"] = f"{row['note']}; {said}" if "note" in row else said
    return row


def _with_process(row: Row, problem: Problem, path: IndexerPath) -> Row:
    threads = torch.get_num_threads()
    peak = measure.in_fresh_process(process_row, problem, path.family, path.workspace, row["phase"], threads)
    row["process"] = peak
    if path.ours:
        row["process_bound"] = row["planned"] + PROCESS_SLACK
    if peak is None:
        said = "the fresh process did not survive"
        row |= {"verdict": FAIL, "note": f"{row['note']}; {said}" if "note" in row else said}
    elif "process_bound" in row and peak > row["process_bound"]:
        said = f"process {peak - row['process_bound']:,} bytes above its bound"
        row |= {"verdict": FAIL, "note": f"{row['note']}; {said}" if "note" in row else said}
    return row


def process_row(problem: Problem, family: str, workspace: int | None, phase: str, threads: int) -> int:
    """In a fresh process: make the inputs, warm up, and return the peak of the resident set over the call."""
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    path = rebuilt(family, problem.geometry, device, workspace)
    _warm(problem, path, device)
    if phase == FORWARD:
        return measure.process_peak(prepare_forward(problem, path, device))
    inputs, g = problem.tensors(device, grad=True), incoming(problem, device, kept=path.kept)

    def train() -> None:
        torch.autograd.grad(path(inputs, problem.causal, problem.scale), inputs, g)

    return measure.process_peak(train)
