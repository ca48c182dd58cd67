"""The speed lane: seconds per path, beside the machine's own matrix-product rate, round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from headfold.geometry import IndexerGeometry
from headfold.lanes import measure
from headfold.lanes.paths import IndexerPath, headfold, loop, materialized
from headfold.lanes.problem import Problem
from headfold.lanes.record import FAIL, PASS, SKIP, Column, Lane, Row, Track, no_track, show_bytes

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
SWEEP_COLUMNS = (
    Column("shape", "shape"),
    Column("dtype", "dtype"),
    Column("ours", "headfold fwd + bwd", "seconds"),
    Column("theirs", "materialised fwd + bwd", "seconds"),
    Column("speedup", "x materialised", "ratio"),
    Column("bytes_saved", "peak bytes saved", "bytes"),
    Column("note", "note"),
)
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
CAUSAL, HALF = "causal forward", "bfloat16 forward"
# Stated for two CPU cores, float32, b=1, sq=sk=4096, h=32, d=128, and judged only when asked for.
TARGETS = {
    FORWARD: ("share", 0.75, "forward >= 0.75 of the matrix-product rate"),
    BACKWARD: ("share", 0.72, "backward >= 0.72 of the matrix-product rate"),
    CAUSAL: ("of_forward", 0.6, "causal <= 0.6 of full"),
    HALF: ("of_forward", 1.15, "bfloat16 <= 1.15 of float32"),
}
SPEEDUP_TARGET = 4.0


def speed(
    problem: Problem,
    device: torch.device,
    *,
    rounds: int = 5,
    targets: bool = False,
    peers: bool = False,
    workspace: int | None = None,
    track: Track[Any] = no_track,
) -> Lane:
    """Time every path that fits, interleaved: each round times the matrix product and then each path once.

    Shares and speed-ups are medians of ratios taken within a round, so that a machine that slows down slows both sides.
    """
    lane = Lane("speed", "What does each path cost in time?", COLUMNS)
    g = problem.geometry
    product = measure.MatrixProduct(device, getattr(torch, g.dtype))
    runners: dict[str, Callable[[], dict[str, float]]] = {}
    for path in (materialized(g, device), loop(g, device), headfold(g, device, workspace)):
        unfit = skipped(problem, path, device)
        if unfit is None:
            runners[path.name] = _runner(problem, path, device, extra=path.family == "headfold")
        else:
            lane.rows.append(unfit)
    if peers:
        found, absent = _peer_runners(problem, device)
        runners.update(found)
        lane.notes.extend(absent)
    readings: dict[tuple[str, str], list[float]] = {}
    rates: list[float] = []
    for _ in track(range(rounds), "speed, rounds"):
        rates.append(product.rate())
        for name, run in runners.items():
            for phase, taken in run().items():
                readings.setdefault((name, phase), []).append(taken)
    lane.rows.extend(_row(name, phase, taken, rates, readings, problem) for (name, phase), taken in readings.items())
    if targets:
        _judge(lane.rows)
    multiplied = str(product.dtype).removeprefix("torch.")
    lane.notes += [
        f"{rounds} interleaved rounds on {torch.get_num_threads()} threads; the {measure.RATE_SIZE}³ {multiplied} "
        f"matrix product ran at {statistics.median(rates) / 1e9:.0f} GFLOP/s (median; {min(rates) / 1e9:.0f} to "
        f"{max(rates) / 1e9:.0f}).",
        f"Shares count the products of the algorithm, one forward and {g.backward_products} backward, whatever a path "
        "runs: with an activation the walk over tiles runs as many, the kernels make the logits once more.",
    ]
    if not targets:
        lane.notes.append("Speed is information here, not part of a verdict; headfold speed --targets judges it.")
    return lane


def skipped(problem: Problem, path: IndexerPath, device: torch.device) -> Row | None:
    """Return the row of a path that does not fit in memory and is not started, or None."""
    needed = path.bill(problem, device).training + path.inputs_bytes(problem.geometry) + path.result_bytes(problem)
    free = measure.free_memory(device)
    if needed <= free:
        return None
    note = f"needs {needed:,} bytes ({show_bytes(needed)}) with inputs, {show_bytes(free)} are free"
    return {"path": path.name, "phase": BOTH, "verdict": SKIP, "note": note}


def _runner(
    problem: Problem, path: IndexerPath, device: torch.device, *, extra: bool
) -> Callable[[], dict[str, float]]:
    inputs = problem.tensors(device)
    leaves = [x.detach().requires_grad_() for x in inputs]
    halves = [x.bfloat16() for x in inputs]
    g = path.incoming(problem, device)

    def call(tensors: Sequence[Tensor], causal: bool) -> Tensor:
        return path(tensors, causal, problem.scale)

    def run() -> dict[str, float]:
        taken = {FORWARD: measure.seconds(lambda: call(inputs, problem.causal), device)}
        if extra and not problem.causal:
            taken[CAUSAL] = measure.seconds(lambda: call(inputs, True), device)
        if extra and problem.geometry.dtype == "float32":
            taken[HALF] = measure.seconds(lambda: call(halves, problem.causal), device)
        scores: list[Tensor] = []
        train = measure.seconds(lambda: scores.append(call(leaves, problem.causal)), device)
        taken[BACKWARD] = measure.seconds(lambda: torch.autograd.grad(scores.pop(), leaves, g), device)
        taken[BOTH] = train + taken[BACKWARD]
        return taken

    return run


def _peer_runners(
    problem: Problem, device: torch.device
) -> tuple[dict[str, Callable[[], dict[str, float]]], list[str]]:
    from headfold.lanes.peers import installed_peers

    inputs = problem.tensors(device)
    peers = installed_peers(device, topk=min(problem.geometry.topk, problem.geometry.sk) or None)
    runners: dict[str, Callable[[], dict[str, float]]] = {}
    for peer in peers.found:
        prepared = peer.prepare(*inputs)

        def run(peer: Any = peer, prepared: Any = prepared) -> dict[str, float]:
            with torch.no_grad():
                return {f"forward ({peer.computes})": measure.seconds(lambda: peer.forward(*prepared), device)}

        runners[f"{peer.name} {peer.version}"] = run
    return runners, [f"Not compared: {name}, {reason}." for name, reason in peers.absent]


def _row(
    name: str,
    phase: str,
    taken: list[float],
    rates: list[float],
    readings: dict[tuple[str, str], list[float]],
    problem: Problem,
) -> Row:
    g, causal = problem.geometry, problem.causal or phase == CAUSAL
    forward, backward = g.forward_flops(causal=causal), g.backward_flops(causal=causal)
    counted = {BACKWARD: (g.backward_products, backward), BOTH: (1 + g.backward_products, forward + backward)}
    products, flops = counted.get(phase, (1, forward))
    row: Row = {
        "path": name,
        "phase": phase,
        "seconds": statistics.median(taken),
        "fastest": min(taken),
        "slowest": max(taken),
        "share": statistics.median(flops / t / rate for t, rate in zip(taken, rates, strict=True)),
        "products": products,
    }
    baseline = readings.get(("materialized", FORWARD if phase.startswith("forward (") else phase))
    if baseline is not None and name != "materialized":
        row["speedup"] = statistics.median(b / t for b, t in zip(baseline, taken, strict=True))
    if baseline is not None and (name, phase) == ("headfold", BOTH):
        ceiling = statistics.median(b * rate / flops for b, rate in zip(baseline, rates, strict=True))
        row["note"] = f"its products alone, at the matrix-product rate, would be {ceiling:.2f}x"
    if name == "headfold" and phase in (CAUSAL, HALF):
        full = readings[(name, FORWARD)]
        row["of_forward"] = statistics.median(t / f for t, f in zip(taken, full, strict=True))
        row["note"] = f"{row['of_forward']:.2f} of the plain forward"
    return row


def _judge(rows: list[Row]) -> None:
    for row in rows:
        if row["path"] != "headfold" or "seconds" not in row:
            continue
        claims = []
        if row["phase"] in TARGETS:
            key, bound, text = TARGETS[row["phase"]]
            claims.append((row[key] >= bound if key == "share" else row[key] <= bound, text))
        if row["phase"] in (FORWARD, BOTH) and "speedup" in row:
            claims.append((row["speedup"] >= SPEEDUP_TARGET, f">= {SPEEDUP_TARGET:g}x the materialised path"))
        if claims:
            row["target"] = "; ".join(text for _, text in claims)
            row["verdict"] = PASS if all(met for met, _ in claims) else FAIL


def sweep(device: torch.device, *, rounds: int = 3, track: Track[Any] = no_track) -> Lane:
    """Show where headfold starts to pay, forward and backward: by sequence length, heads and dtype."""
    lane = Lane("speed sweep", "Where does headfold start to pay?", SWEEP_COLUMNS)
    shapes = [IndexerGeometry(1, s, s, 32, 128) for s in (64, 128, 256, 512, 1024, 2048)]
    shapes += [IndexerGeometry(1, 1024, 1024, h, 128) for h in (1, 4, 16, 64)]
    shapes += [IndexerGeometry(1, 1024, 1024, 32, 128, dtype=dtype) for dtype in ("bfloat16", "float16", "float64")]
    for g in track(shapes, "speed, sweep"):
        lane.rows.append(_sweep_row(g, device, rounds))
    paying = [row for row in lane.rows if row.get("speedup", 0) > 1]
    lane.notes.append(
        f"headfold is faster in {len(paying)} of {len(lane.rows)} shapes, and smaller wherever bytes are saved."
    )
    return lane


def _sweep_row(g: IndexerGeometry, device: torch.device, rounds: int) -> Row:
    problem = Problem(g)
    row: Row = {"shape": f"s={g.sq}, h={g.heads}, d={g.dim}", "dtype": g.dtype}
    row["bytes_saved"] = g.bill("materialized").training - g.bill("headfold").training
    paths = headfold(g, device), materialized(g, device)
    for path in paths:
        unfit = skipped(problem, path, device)
        if unfit is not None:
            return {**row, "note": unfit["note"]}
    ours, theirs = (_runner(problem, path, device, extra=False) for path in paths)
    ours(), theirs()
    pairs = [(ours()[BOTH], theirs()[BOTH]) for _ in range(rounds)]
    row["ours"] = statistics.median(a for a, _ in pairs)
    row["theirs"] = statistics.median(b for _, b in pairs)
    row["speedup"] = statistics.median(b / a for a, b in pairs)
    return row
