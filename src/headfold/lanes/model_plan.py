"""The plan of a whole model: what each layer's sparse attention takes, stock and on headfold. Runs nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from headfold.lanes.record import Column, Lane, Row, show_bytes
from headfold.megatron_plan import Plan, from_arguments, stock_step
from headfold.model_plan import LayerBill, ModelBill, Recompute, Step, Stock, longest, plan_model

TOKENS = 4096  # where a file does not say
COLUMNS = (
    Column("layers", "layers"),
    Column("path", "path"),
    Column("forward", "forward peak", "bytes"),
    Column("held", "held for backward", "bytes"),
    Column("backward", "backward peak", "bytes"),
    Column("inputs", "in and out", "bytes"),
    Column("total", "a device holds", "bytes"),
    Column("longest", "longest context", "number"),
)


def read_megatron(path: Path) -> Plan:
    """Read a file of Megatron's arguments.

    Raises: ValueError where there is none, or it is not YAML.
    """
    import yaml

    try:
        with path.open(encoding="utf-8") as file:
            tree: Any = yaml.safe_load(file)
    except OSError as error:
        raise ValueError(f"--megatron: needs a file of arguments, got {path} ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--megatron: needs a YAML file, got {path}: {str(error).splitlines()[0]}.") from None
    return from_arguments(tree, str(path))


def megatron_plan(path: Path, *, tokens: int | None = None, b: int | None = None, memory: int | None = None) -> Lane:
    """Bill the model of an argument file, unpatched and patched.

    Args:
        path: the YAML file.
        tokens: context, the file's seq_length when None.
        b: micro-batch, the file's when None.
        memory: bytes of a device that attention and its indexer may take; None plans no longest context.
    """
    plan = read_megatron(path)
    if b is not None:
        plan = plan._replace(model=replace(plan.model, b=b))
    return model_lane(plan, tokens or plan.tokens or TOKENS, stock=stock_step, name="megatron-core", memory=memory)


def model_lane(plan: Plan, tokens: int, *, stock: Stock, name: str, memory: int | None) -> Lane:
    """Bill a model on both paths: its layers, its largest stage, and the longest context that fits."""
    model, parallel = plan.model, plan.parallel
    bill = plan_model(model, tokens, parallel=parallel, stock=stock)
    step = "a training step" if model.training else "a forward pass"
    size = f"{len(model.layers)} layers, b={model.b}, {tokens:,} tokens, {model.dtype}"
    lane = Lane("plan", f"What does sparse attention take in {step} of {size}?", COLUMNS)
    for layers, layer in _kinds(bill):
        for path, of in ((name, layer.stock), ("headfold", layer.headfold)):
            lane.rows.append(_row(layers, path, of, layer.inputs))
    reach = None if memory is None else longest(model, memory, parallel=parallel, stock=stock)
    for path, total, far in (
        (name, bill.stock, None if reach is None else reach.stock),
        ("headfold", bill.headfold, None if reach is None else reach.headfold),
    ):
        lane.rows.append({"layers": "largest stage", "path": path, "total": total, "longest": far})
    lane.notes = _notes(plan, bill, memory)
    return lane


def _kinds(bill: ModelBill) -> list[tuple[str, LayerBill]]:
    """Each kind of layer once, with the numbers (from 0) of those that are of it."""
    found: dict[LayerBill, list[int]] = {}
    for stage in bill.stages:
        for i, layer in enumerate(stage.layers, stage.first):
            found.setdefault(layer, []).append(i)
    return [(_numbers(layers), layer) for layer, layers in found.items()]


def _numbers(layers: list[int]) -> str:
    """Write numbers with runs joined, as in 0-3, 7."""
    runs: list[list[int]] = []
    for i in layers:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _row(layers: str, path: str, step: Step, inputs: int) -> Row:
    figures = {"forward": step.forward, "held": step.held, "backward": step.backward}
    return {"layers": layers, "path": path, **figures, "inputs": inputs}


def _kept(recompute: Recompute) -> str:
    """Say what layers keep between passes."""
    hidden = "the hidden states before them (they run again in backward)"
    return {
        "nothing": "layers keep all of this",
        "attention": "layers keep what goes in and out of attention (it runs again in backward)",
        "layers": f"layers keep, {recompute.layers} at a time, {hidden}",
        "first": f"the first {recompute.layers} layers of a stage keep {hidden}, the others all of this",
    }[recompute.what]


def _notes(plan: Plan, bill: ModelBill, memory: int | None) -> list[str]:
    parallel, stages = plan.parallel, bill.stages
    counts = sorted({len(stage.layers) for stage in stages})
    notes = [
        f"Tensor parallel {parallel.tensor}, context parallel {parallel.context}, pipeline parallel "
        f"{parallel.pipeline}: a device has {' or '.join(map(str, counts))} layers, and the first stage "
        f"{stages[0].in_flight} micro-batches in flight.",
        "Peaks and what is held are of one layer, beyond what goes in and out of its attention and indexer. Weights, "
        f"optimiser, projections and feed-forward layers are not billed. Between passes {_kept(plan.model.recompute)}.",
        *plan.notes,
    ]
    if memory is not None:
        notes.append(
            f"The longest context is the one whose bill is within {show_bytes(memory)} a device; below one token, 0."
        )
    return notes
