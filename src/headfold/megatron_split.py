"""How Megatron-Core splits layers over pipeline stages, as its arguments say it. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Each argument by the name of Megatron's configuration, and by that of its command line where the two differ.
_FIRST = "num_layers_in_first_pipeline_stage", "decoder_first_pipeline_num_layers"
_LAST = "num_layers_in_last_pipeline_stage", "decoder_last_pipeline_num_layers"
_EMBEDDING, _LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"
_LAYOUT = "pipeline_model_parallel_layout"
_VIRTUAL = (
    "virtual_pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
)
_LETTERS = {"E": "embedding", "L": "loss", "t": "decoder", "m": "mtp"}


def layers_of_stages(found: Mapping[str, Any], layers: int, pipeline: int, source: str) -> tuple[int, ...]:
    """Return how many of the layers each stage has.

    Args:
        found: arguments by name.
        layers: of the model.
        pipeline: number of stages.
        source: name of the file, for sentences.

    Raises: ValueError for a split that Megatron refuses, and for interleaved stages.
    """
    for name in _VIRTUAL:
        if pipeline > 1 and found.get(name) not in (None, 1):
            raise ValueError(
                f"{source}: {name} must be left out, got {found[name]!r}. An interleaved schedule holds more "
                "micro-batches than are planned here; without it the plan is that of the plain schedule."
            )
    first, last = (_given(found, names, source) for names in (_FIRST, _LAST))
    extra = [name for name in (_EMBEDDING, _LOSS) if found.get(name)]
    uneven = [names[0] for names, given in ((_FIRST, first), (_LAST, last)) if given is not None]
    if found.get(_LAYOUT) is not None:
        if uneven or extra:
            raise ValueError(f"{source}: {_LAYOUT} and {', '.join(uneven + extra)} exclude each other, got both.")
        return _of_layout(found[_LAYOUT], layers, pipeline, source)
    if uneven and extra:
        raise ValueError(f"{source}: {', '.join(uneven)} and {', '.join(extra)} exclude each other, got both.")
    if uneven:
        return _around(first, last, layers, pipeline, source)
    each, left = divmod(layers + len(extra), pipeline)
    if left:
        raise ValueError(
            f"{source}: num_layers must divide over pipeline_model_parallel_size = {pipeline} stages, got {layers}"
            f"{f' and {len(extra)} for {chr(32).join(extra)}' if extra else ''}. Megatron splits unevenly by "
            f"{_FIRST[0]}, {_LAST[0]}, {_EMBEDDING}, {_LOSS} or {_LAYOUT}."
        )
    counts = [each] * pipeline
    counts[0] -= _EMBEDDING in extra
    counts[-1] -= _LOSS in extra
    return tuple(counts)


def _given(found: Mapping[str, Any], names: tuple[str, str], source: str) -> int | None:
    """Return a count of layers under either of its names."""
    name = next((name for name in names if found.get(name) is not None), names[0])
    value = found.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{source}: {name} must be an integer of at least 1, got {value!r}.")
    return value


def _around(first: int | None, last: int | None, layers: int, pipeline: int, source: str) -> tuple[int, ...]:
    """Split what the first and last stage leave evenly over the others."""
    ends = [count for count in (first, last) if count is not None]
    others = pipeline - len(ends)
    rest = layers - sum(ends)
    if others < 0 or rest < 0 or (rest % others if others else rest):
        raise ValueError(
            f"{source}: {_FIRST[0]} and {_LAST[0]} must leave layers that divide over the other stages, got {first} "
            f"and {last} of {layers} layers over {pipeline} stages."
        )
    middle = [rest // others] * others if others else []
    return (*([] if first is None else [first]), *middle, *([] if last is None else [last]))


def _of_layout(layout: Any, layers: int, pipeline: int, source: str) -> tuple[int, ...]:
    """Count the decoder layers of a layout such as "Et*3|(tt|)*29,m|L", or of lists of layer names."""
    stages = _parsed(layout) if isinstance(layout, str) else layout
    if not isinstance(stages, list) or not all(
        isinstance(stage, list) and all(isinstance(x, str) and x.strip().lower() in _LETTERS.values() for x in stage)
        for stage in stages
    ):
        raise ValueError(
            f"{source}: {_LAYOUT} must be stages of {', '.join(_LETTERS)} with | between them, or lists of "
            f"{', '.join(_LETTERS.values())}, got {layout!r}."
        )
    if len(stages) != pipeline:
        raise ValueError(
            f"{source}: {_LAYOUT} must have one stage for each of pipeline_model_parallel_size = {pipeline} devices, "
            f"got {len(stages)}. More than one a device is an interleaved schedule, which is not planned here."
        )
    counts = tuple(sum(x.strip().lower() == "decoder" for x in stage) for stage in stages)
    if sum(counts) != layers:
        raise ValueError(f"{source}: {_LAYOUT} must hold num_layers = {layers} decoder layers, got {sum(counts)}.")
    return counts


def _parsed(layout: str) -> list[list[str]] | None:
    """Read a layout of letters: (xy)*n and x*n repeat, commas say nothing; None where something else is in it."""
    text = layout.replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(repeated, lambda m: m[1] * int(m[2]), text)
    if not set(text) <= {*_LETTERS, "|"}:
        return None
    return [[_LETTERS[letter] for letter in stage] for stage in text.split("|")]
