"""The speed lane of what trains: the loss beside its products and full tensors, attention beside dense attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headfold.backends import eager
from headfold.geometry import IndexerGeometry
from headfold.lanes import measure
from headfold.lanes.paths import IndexerPath, spread_indices
from headfold.lanes.problem import Problem
from headfold.lanes.products import products_of
from headfold.lanes.record import FAIL, PASS, Column, Lane, Row, Track, no_track
from headfold.lanes.speed import skipped
from headfold.lanes.training_paths import (
    attention_tensors,
    headfold_attention,
    headfold_loss,
    materialized_attention,
    materialized_loss,
)

COLUMNS = (
    Column("path", "path"),
    Column("phase", "phase"),
    Column("seconds", "median", "seconds"),
    Column("fastest", "fastest", "seconds"),
    Column("slowest", "slowest", "seconds"),
    Column("target", "target"),
    Column("verdict", "verdict"),
    Column("note", "note"),
)
LOSS, PRODUCTS, FUSED = "loss, forward + backward", "its products alone", "scaled_dot_product_attention"
# Stated for two CPU cores, float32, at the shape "train": ours over each, or each over ours.
MOST_OVER_PRODUCTS = 2.0
LEAST_LOSS_SPEEDUP = 2.5
MOST_OVER_FUSED = 0.7
MOST_OVER_UNFUSED = 0.6

Readings = dict[tuple[str, str], list[float]]


def training_speed(
    problem: Problem,
    device: torch.device,
    *,
    rounds: int = 5,
    targets: bool = False,
    workspace: int | None = None,
    track: Track[Any] = no_track,
) -> Lane:
    """Time the loss and the attention, each through backward, interleaved with what they are compared to.

    Attention runs with one key head and with the problem's own number, since the walk is chosen by it.
    """
    lane = Lane("training speed", "What do the loss and the attention cost in time?", COLUMNS)
    g = problem.geometry
    runs: dict[tuple[str, str], Callable[[], None]] = {}

    def add(path: IndexerPath, at: Problem, phase: str) -> None:
        unfit = skipped(at, path, device)
        if unfit is None:
            runs[path.name, phase] = _trained(at, path, device)
        else:
            lane.rows.append({**unfit, "phase": phase})

    for path in (materialized_loss(g, device), headfold_loss(g, device, workspace)):
        add(path, problem, LOSS)
    count = 0
    if device.type == "cpu":
        runs[PRODUCTS, LOSS], count = products_of(_loss_body(problem, device))
    attended = sorted({1, g.np_k}) if g.topk else []
    for key_heads in attended:
        at = Problem(g.with_(np_k=key_heads), problem.causal, problem.scale)
        phase = _phase(key_heads)
        for path in (materialized_attention(at.geometry, device), headfold_attention(at.geometry, device, workspace)):
            add(path, at, phase)
        runs[FUSED, phase] = _fused(at, device)
    readings: Readings = {}
    for _ in track(range(rounds), "training speed, rounds"):
        for key, run in runs.items():
            readings.setdefault(key, []).append(measure.seconds(run, device))
    lane.rows += [_row(key, taken, readings) for key, taken in readings.items()]
    if targets:
        _judge(lane.rows, g)
    lane.notes = [
        f"{rounds} interleaved rounds on {torch.get_num_threads()} threads; ratios are medians of ratios in a round.",
        f"{FUSED} is torch's own, with a dense boolean mask that is made beforehand.",
    ]
    if count:
        lane.notes.append(f"The loss's own {count:,} matrix products, with their shapes and strides, run in its order.")
    return lane


def _phase(key_heads: int) -> str:
    return f"attention, np_k={key_heads}, forward + backward"


def _trained(problem: Problem, path: IndexerPath, device: torch.device) -> Callable[[], None]:
    inputs, g = path.inputs(problem, device, grad=True), path.incoming(problem, device)

    def run() -> None:
        torch.autograd.grad(path(inputs, problem.causal, problem.scale), inputs, g)

    return run


def _loss_body(problem: Problem, device: torch.device) -> Callable[[], Any]:
    """Return the op body that the loss runs, on the problem's tensors."""
    g = problem.geometry
    query, key, _ = attention_tensors(g, device)
    q, weights, k, query, key = (x.transpose(0, 1) for x in (*problem.tensors(device), query, key))
    offset = g.sk - g.sq if problem.causal else None
    ranges = None, None, None, None, offset, 1, True, problem.scale, g.hn**-0.5
    rest = ranges, (None, False, True)
    return partial(eager.indexer_loss, q, weights, k, query, key, *rest[0], *rest[1], needs=(True, True, True))


def _fused(problem: Problem, device: torch.device) -> Callable[[], None]:
    g = problem.geometry
    inputs = [x.requires_grad_() for x in attention_tensors(g, device)]
    chosen = torch.zeros(g.b, g.sq, g.sk, dtype=torch.bool, device=device)
    chosen.scatter_(2, spread_indices(g, device).long().clamp(min=0), True)
    if problem.causal:
        chosen &= torch.ones(g.sq, g.sk, dtype=torch.bool, device=device).tril(g.sk - g.sq)
    incoming = torch.randn(g.b, g.np, g.sq, g.v_dim, device=device).to(inputs[0].dtype)

    def heads(x: Tensor) -> Tensor:
        return x.permute(1, 2, 0, 3).repeat_interleave(g.np // x.shape[2], 1)

    def run() -> None:
        query, key, value = map(heads, inputs)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=chosen.unsqueeze(1))
        torch.autograd.grad(out, inputs, incoming)

    return run


def _row(key: tuple[str, str], taken: list[float], readings: Readings) -> Row:
    path, phase = key
    row: Row = {
        "path": path,
        "phase": phase,
        "seconds": statistics.median(taken),
        "fastest": min(taken),
        "slowest": max(taken),
    }
    if path.startswith("headfold"):
        others = {other: times for (other, at), times in readings.items() if at == phase and other != path}
        row["over"] = {
            other: statistics.median(t / u for t, u in zip(taken, times, strict=True))
            for other, times in others.items()
        }
        row["note"] = "; ".join(f"{ratio:.2f} of {other}" for other, ratio in row["over"].items())
    return row


def _judge(rows: list[Row], g: IndexerGeometry) -> None:
    for row in rows:
        claims = []
        for other, ratio in row.get("over", {}).items():
            if row["phase"] == LOSS:
                most = MOST_OVER_PRODUCTS if other == PRODUCTS else 1 / LEAST_LOSS_SPEEDUP
            elif row["phase"] == _phase(1) and other == FUSED:
                most = MOST_OVER_FUSED
            elif row["phase"] == _phase(g.np_k) and g.np_k == g.np and other != FUSED:
                most = MOST_OVER_UNFUSED
            else:
                continue
            claims.append((ratio <= most, f"<= {most:g} of {other}"))
        if claims:
            row["target"] = "; ".join(text for _, text in claims)
            row["verdict"] = PASS if all(met for met, _ in claims) else FAIL
