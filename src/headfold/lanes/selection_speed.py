"""The selection's speed lane: what keeping topk keys costs beside scoring, a decode step, and scores of a selection."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from headfold.geometry import SELECTED, SELECTING
from headfold.lanes import measure
from headfold.lanes.paths import IndexerPath, headfold, headfold_selected, headfold_topk, materialized_topk
from headfold.lanes.problem import Problem
from headfold.lanes.record import FAIL, PASS, Column, Lane, Row, Track, no_track
from headfold.lanes.speed import skipped

COLUMNS = (
    Column("path", "path"),
    Column("phase", "phase"),
    Column("seconds", "median", "seconds"),
    Column("fastest", "fastest", "seconds"),
    Column("slowest", "slowest", "seconds"),
    Column("share", "of matrix-product rate", "ratio"),
    Column("products", "products counted", "number"),
    Column("speedup", "x materialised", "ratio"),
    Column("target", "target"),
    Column("verdict", "verdict"),
    Column("note", "note"),
)
SCORES, SELECT, DECODE = "scores, for comparison", "selection", "decode step"
FORWARD, BACKWARD = "selected scores, forward", "selected scores, backward"
# A decode step takes microseconds to milliseconds: each reading is the median of so many.
STEPS = 20
# Stated for two CPU cores, float32, b=1, h=32, d=128, topk=2048, sq=2048, sk=16384; judged only when asked for.
MOST_OVER_SCORES = 1.4
LEAST_SPEEDUP = 3.0
MOST_OVER_FORWARD = 3.2

Readings = dict[tuple[str, str], list[float]]


def selection_speed(
    problem: Problem,
    device: torch.device,
    *,
    rounds: int = 5,
    targets: bool = False,
    workspace: int | None = None,
    track: Track[Any] = no_track,
) -> Lane:
    """Time every way to select that fits, interleaved, beside our scores of the same rows: ratios within a round."""
    g = problem.geometry
    lane = Lane("selection speed", "What does keeping topk keys a row cost in time?", COLUMNS)
    product = measure.MatrixProduct(device, getattr(torch, g.dtype))
    runs: dict[tuple[str, str], Callable[[], float]] = {}
    lone = Problem(g.with_(sq=1), problem.causal, problem.scale)
    for path, phase, at in (
        (headfold(g, device, workspace), SCORES, problem),
        (materialized_topk(g, device), SELECT, problem),
        (headfold_topk(g, device, workspace), SELECT, problem),
        (materialized_topk(g, device), DECODE, lone),
        (headfold_topk(g, device, workspace), DECODE, lone),
    ):
        unfit = skipped(at, path, device)
        if unfit is None:
            runs[path.name, phase] = _forward(at, path, device, 1 if at is problem else STEPS)
        else:
            lane.rows.append({**unfit, "phase": phase})
    selected: _Selected | None = None
    unfit = skipped(problem, headfold_selected(g, device, workspace), device)
    if unfit is None:
        selected = _Selected(problem, device, workspace)
    else:
        lane.rows.append(unfit)
    readings: Readings = {}
    rates: list[float] = []
    for _ in track(range(rounds), "selection speed, rounds"):
        rates.append(product.rate())
        for key, run in runs.items():
            readings.setdefault(key, []).append(run())
        for key, taken in (selected.run() if selected else {}).items():
            readings.setdefault(key, []).append(taken)
    lane.rows += [_row(problem, key, taken, readings, rates) for key, taken in readings.items()]
    if targets:
        for row in lane.rows:
            _judge(row)
    lane.notes = [
        f"{rounds} interleaved rounds on {torch.get_num_threads()} threads; the {measure.RATE_SIZE}³ product ran at "
        f"{statistics.median(rates) / 1e9:.0f} GFLOP/s (median; {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f}). "
        f"A decode step is one row against all {g.sk:,} keys, the median of {STEPS}.",
        "Selected scores are those of the keys that index_topk selects.",
    ]
    return lane


def _forward(problem: Problem, path: IndexerPath, device: torch.device, repeats: int) -> Callable[[], float]:
    inputs = problem.tensors(device)

    def run() -> float:
        def call() -> Any:
            return path(inputs, problem.causal, problem.scale)

        return statistics.median(measure.seconds(call, device) for _ in range(repeats))

    return run


class _Selected:
    """Times selected scores, forward and backward."""

    def __init__(self, problem: Problem, device: torch.device, workspace: int | None) -> None:
        g, self.problem, self.device = problem.geometry, problem, device
        indices = headfold_topk(g, device, workspace)(problem.tensors(device), problem.causal, problem.scale)
        self.path = headfold_selected(g, device, workspace, indices)
        self.leaves = problem.tensors(device, grad=True)
        self.g = self.path.incoming(problem, device)

    def run(self) -> dict[tuple[str, str], float]:
        """Return seconds of one forward and one backward."""
        scores: list[torch.Tensor] = []

        def forward() -> None:
            scores.append(self.path(self.leaves, self.problem.causal, self.problem.scale))

        def backward() -> Any:
            return torch.autograd.grad(scores.pop(), self.leaves, self.g)

        return {
            (SELECTED, FORWARD): measure.seconds(forward, self.device),
            (SELECTED, BACKWARD): measure.seconds(backward, self.device),
        }


def _flops(problem: Problem, path: str, phase: str) -> int:
    g = problem.geometry
    if path == SELECTED:
        picked = g.with_(sk=g.topk)
        return picked.backward_flops() if phase == BACKWARD else picked.forward_flops()
    return g.with_(sq=1).forward_flops() if phase == DECODE else g.forward_flops(causal=problem.causal)


def _row(problem: Problem, key: tuple[str, str], taken: list[float], readings: Readings, rates: list[float]) -> Row:
    path, phase = key
    flops = _flops(problem, path, phase)
    row: Row = {
        "path": path,
        "phase": phase,
        "seconds": statistics.median(taken),
        "fastest": min(taken),
        "slowest": max(taken),
        "share": statistics.median(flops / t / rate for t, rate in zip(taken, rates, strict=True)),
        "products": problem.geometry.backward_products if phase == BACKWARD else 1,
    }

    def times(other: tuple[str, str]) -> float:
        return statistics.median(a / b for a, b in zip(taken, readings[other], strict=True))

    upstream = SELECTING[0], phase
    if path == SELECTING[1] and upstream in readings:
        row["speedup"] = 1 / times(upstream)
    if (path, phase) == (SELECTING[1], SELECT):
        row["over_scores"] = times(("headfold", SCORES))
        row["note"] = f"{row['over_scores']:.2f} of our own scores"
    if phase == BACKWARD:
        row["over_forward"] = times((SELECTED, FORWARD))
        row["note"] = f"{row['over_forward']:.2f} of its forward"
    return row


def _judge(row: Row) -> None:
    claims = []
    if "over_scores" in row:
        claims.append((row["over_scores"] <= MOST_OVER_SCORES, f"<= {MOST_OVER_SCORES:g} of scoring alone"))
    if "speedup" in row and row["phase"] == SELECT:
        claims.append((row["speedup"] >= LEAST_SPEEDUP, f">= {LEAST_SPEEDUP:g}x materialised + topk"))
    if "over_forward" in row:
        claims.append((row["over_forward"] <= MOST_OVER_FORWARD, f"<= {MOST_OVER_FORWARD:g} of its forward"))
    if claims:
        row["target"] = "; ".join(text for _, text in claims)
        row["verdict"] = PASS if all(met for met, _ in claims) else FAIL
