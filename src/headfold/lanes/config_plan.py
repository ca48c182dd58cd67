"""The plan of a whole model of transformers: per layer, in all, and the longest context that fits. Runs nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from headfold.lanes.model_plan import model_lane
from headfold.lanes.plan import DEVICES
from headfold.lanes.record import Lane
from headfold.megatron_plan import Plan
from headfold.model_plan import ModelShape, Parallel, longest
from headfold.transformers_plan import from_config, left_out, stock_step


def config_plan(
    path: Path, *, tokens: int = 4096, b: int = 1, dtype: str | None = None, memory: int | None = None
) -> list[Lane]:
    """Bill a configuration file at a context, in prefill and in training, and find the longest contexts that fit.

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
    beside = left_out(tree, prefill)
    lanes = []
    for model in (prefill, replace(prefill, training=True)):
        plan = Plan(model, Parallel(), tokens)
        lane = model_lane(plan, tokens, stock=stock_step, name="transformers", memory=memory)
        lane.notes.append(
            "transformers runs sdpa's plain path here, as on a CPU, and has no loss of indexers, which training on "
            "headfold includes. What decoding caches is not billed."
        )
        if beside:
            lane.notes.append(
                f"{beside} of {beside + len(model.layers)} layers have no indexer, sliding ones: they are not billed, "
                "and layers are counted without them."
            )
        if memory is None:
            lane.notes += _longest(model)
        lanes.append(lane)
    return lanes


def _longest(model: ModelShape) -> list[str]:
    lines = []
    for name, size in DEVICES.items():
        found = longest(model, size, stock=stock_step)
        lines.append(f"{name}: the longest context is {found.stock:,} tokens stock and {found.headfold:,} on headfold.")
    return lines
