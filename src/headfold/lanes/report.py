"""prove: every lane on one problem, one verdict, and a report on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from headfold.lanes import figures, measure
from headfold.lanes.capture import capture
from headfold.lanes.parity import parity
from headfold.lanes.plan import describe, plan
from headfold.lanes.problem import Problem
from headfold.lanes.record import Lane, Track, no_track, show_facts
from headfold.lanes.residency import residency, selection_residency, training_residency
from headfold.lanes.selection_parity import selection_parity
from headfold.lanes.selection_speed import selection_speed
from headfold.lanes.speed import speed
from headfold.lanes.training_parity import training_parity
from headfold.lanes.training_paths import trained
from headfold.lanes.training_speed import training_speed
from headfold.presets import LONG_SHAPES, SHAPES
from headfold.tiles import DEFAULT_WORKSPACE

CAPTIONS = {
    "bytes.svg": "Planned peak of a training step by sequence length",
    "peaks.svg": "Measured beside planned peaks",
    "time.svg": "Time beside the matrix-product rate",
}


def prove(
    problem: Problem, device: torch.device, *, rounds: int = 3, full: bool = False, track: Track[Any] = no_track
) -> list[Lane]:
    """Run plan, parity, residency and speed of scores, of selection where topk is given, and of training; then capture.

    `full` adds the residency of the seed's full shape, and of selections from 16384 and 65536 keys.
    """
    selects = problem.geometry.topk > 0
    training = trained(problem)
    lanes = [plan(problem.geometry, causal=problem.causal), parity(problem, device, track=track)]
    if selects:
        lanes.append(selection_parity(problem, device, track=track))
    lanes.append(training_parity(training, device, track=track))
    lanes.append(residency(problem, device, track=track))
    if full:
        # One workspace, and no loop: it fits but takes minutes (`headfold residency --full` has both).
        large = residency(Problem(SHAPES["full"]), device, workspace=DEFAULT_WORKSPACE, with_loop=False, track=track)
        large.name, large.question = "residency, full shape", f"And at {describe(SHAPES['full'])}?"
        lanes.append(large)
    if selects:
        lanes.append(selection_residency(problem, device, track=track))
    if full:
        lanes += long_selections(device, track=track)
    # In this process, for the time that a fresh one for each row takes: big rows have their own above.
    lanes.append(training_residency(training, device, workspace=DEFAULT_WORKSPACE, process=False, track=track))
    lanes.append(speed(problem, device, rounds=rounds, track=track))
    if selects:
        lanes.append(selection_speed(problem, device, rounds=rounds, track=track))
    lanes.append(training_speed(training, device, rounds=rounds, track=track))
    for lane in lanes:
        if lane.name.startswith("training"):
            lane.notes.append(f"Measured at {describe(training.geometry)}, scale {training.scale:.4g}.")
    lanes.append(capture(device, track=track))
    return lanes


def long_selections(
    device: torch.device, *, workspace: int | None = DEFAULT_WORKSPACE, process: bool = True, track: Track[Any]
) -> list[Lane]:
    """Measure selections from contexts whose score matrix would be a gibibyte, and half of one."""
    lanes = []
    for shape in LONG_SHAPES:
        lane = selection_residency(Problem(shape), device, workspace=workspace, process=process, track=track)
        lane.name, lane.question = f"selection residency, {shape.sk} keys", f"And at {describe(shape)}?"
        lanes.append(lane)
    return lanes


def write(folder: Path, problem: Problem, lanes: list[Lane], device: torch.device) -> None:
    """Write report.json, report.md and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw(folder, problem.geometry, {lane.name: lane for lane in lanes})
    facts = measure.environment(device)
    (folder / "report.json").write_text(json.dumps(to_json(problem, lanes, facts), indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(problem, lanes, facts, drawn), encoding="utf-8")


def to_json(problem: Problem, lanes: list[Lane], facts: dict[str, Any]) -> dict[str, Any]:
    """Return everything that was measured, with where it was."""
    return {
        "passed": all(lane.passed for lane in lanes),
        "geometry": {**vars(problem.geometry), "causal": problem.causal, "scale": problem.scale},
        "source": problem.source,
        "environment": facts,
        "lanes": [lane.to_json() for lane in lanes],
    }


def _markdown(problem: Problem, lanes: list[Lane], facts: dict[str, Any], drawn: list[Path]) -> str:
    verdict = "kept" if all(lane.passed for lane in lanes) else "BROKEN"
    parts = [f"# headfold: contract {verdict}", f"{describe(problem.geometry)}; {problem.source}."]
    parts.append(", ".join(f"{name} {value}" for name, value in show_facts(facts).items()))
    parts += [f"![{CAPTIONS[path.name]}]({path.name})" for path in drawn]
    for lane in lanes:
        parts.append(f"## {lane.name}: {lane.verdict}\n\n{lane.question}")
        parts.append(
            tabulate(
                lane.cells(),
                [column.title for column in lane.filled_columns()],
                tablefmt="github",
                disable_numparse=True,
            )
        )
        parts.append("\n".join(f"- {note}" for note in lane.notes))
    return "\n\n".join(parts) + "\n"
