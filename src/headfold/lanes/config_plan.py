"""The plan of a whole model of transformers: per layer, in all, and the longest context that fits. Runs nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from headfold.lanes.plan import DEVICES, GIB
from headfold.lanes.record import Column, Lane
from headfold.model_plan import ModelShape, longest, plan_model
from headfold.transformers_plan import from_config, stock_step

COLUMNS = (
    Column("what", "what"),
    Column("layers", "layers"),
    Column("stock_prefill", "prefill, stock", "bytes"),
    Column("headfold_prefill", "prefill, headfold", "bytes"),
    Column("stock_training", "training, stock", "bytes"),
    Column("headfold_training", "training, headfold", "bytes"),
)


def config_plan(
    path: Path, *, tokens: int = 4096, b: int = 1, dtype: str | None = None, memory: int | None = None
) -> Lane:
    """Bill a configuration file at a context, and find the longest contexts that fit.

    Args:
        path: config.json.
        tokens: context of one sequence.
        b: batch size.
        dtype: of activations, None for the file's.
        memory: bytes of a device; None takes those that people have.

    Raises: ValueError for a file that cannot be read or does not say what is needed.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model: needs a configuration of transformers in JSON, got {path}: {error}.") from error
    prefill = from_config(tree, str(path), b=b, dtype=dtype)
    training = replace(prefill, training=True)
    bills = [plan_model(model, tokens, stock=stock_step) for model in (prefill, training)]
    layers = [[layer for stage in bill.stages for layer in stage.layers] for bill in bills]
    lane = Lane("plan", f"What does attention of {path} cost at {tokens:,} tokens, b={b}, {prefill.dtype}?", COLUMNS)
    counts = Counter(layer.computes for layer in prefill.layers)
    for computes in sorted(counts, reverse=True):
        place = next(i for i, layer in enumerate(prefill.layers) if layer.computes == computes)
        forward, step = layers[0][place], layers[1][place]
        what = "a layer with an indexer" if computes else "a layer that reuses a selection"
        peaks = {"stock_prefill": forward.stock.peak, "headfold_prefill": forward.headfold.peak}
        peaks |= {"stock_training": step.stock.peak, "headfold_training": step.headfold.peak}
        lane.rows.append({"what": what, "layers": counts[computes], **peaks})
    totals = {f"{way}_{when}": getattr(bill, way) for bill, when in zip(bills, ("prefill", "training"), strict=True)
              for way in ("stock", "headfold")}  # fmt: skip
    lane.rows.append({"what": "the model", "layers": len(prefill.layers), **totals})
    lane.notes += [
        "A layer's bytes are its peak beyond what goes in and out; the model's include that, and in training what "
        "every layer holds for backward. Weights, optimiser, projections and feed-forward layers are not billed.",
        "Stock is sdpa's plain path, as on a CPU; it has no loss of indexers, which training on headfold includes.",
        *_longest(prefill, training, DEVICES if memory is None else {f"{memory / GIB:g} GiB": memory}),
    ]
    return lane


def _longest(prefill: ModelShape, training: ModelShape, devices: dict[str, int]) -> list[str]:
    lines = []
    for name, size in devices.items():
        found = [longest(model, size, stock=stock_step) for model in (prefill, training)]
        lines.append(
            f"{name}: the longest context is {found[0].stock:,} tokens stock and {found[0].headfold:,} on headfold in "
            f"prefill, {found[1].stock:,} and {found[1].headfold:,} in training."
        )
    return lines
