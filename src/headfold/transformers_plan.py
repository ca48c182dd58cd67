"""What a model of transformers holds: its configuration file as a model, and its own PyTorch path. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from headfold.model_plan import Call, LayerShape, ModelShape, Step

# The model types that share the scorer, by how their layers are told apart.
_EVERY_LAYER = {"deepseek_v32", "axk2"}
_INDEXER_TYPES = {"glm_moe_dsa", "hy_v4", "mistral_large4", "mistral_large4_text"}
_LAYER_TYPES = {"dots3_note", "dots3_note_text"}
MODEL_TYPES = _EVERY_LAYER | _INDEXER_TYPES | _LAYER_TYPES
_NEEDED = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "index_n_heads", "index_head_dim", "index_topk",
)  # fmt: skip


def from_config(tree: Mapping[str, Any], source: str, *, b: int = 1, dtype: str | None = None) -> ModelShape:
    """Read a configuration of transformers: its indexed layers. Sliding and full layers beside them are left out.

    Args:
        tree: the file's mapping; of a composite model its text_config is read.
        source: its name, for sentences.
        b: batch size.
        dtype: of activations; None takes the file's, or bfloat16.

    Raises: ValueError for a model type that is not covered, or naming what is missing or no size.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"{source}: must hold a mapping, got {type(tree).__name__}.")
    nested = tree.get("text_config")
    found: Mapping[str, Any] = {**tree, **nested} if isinstance(nested, Mapping) else tree
    kind = found.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"{source}: model_type must be one of {', '.join(sorted(MODEL_TYPES))}, got {kind!r}.")
    sizes = {name: _size(found, name, source) for name in _NEEDED}
    heads = sizes["num_attention_heads"]
    full = LayerShape(
        heads=sizes["index_n_heads"],
        dim=sizes["index_head_dim"],
        topk=sizes["index_topk"],
        np=heads,
        np_k=heads,  # the latent is expanded to a key for every head
        hn=sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"],
        v_dim=sizes["v_head_dim"],
        trains=True,
        shared_value=False,
    )
    shared = replace(full, computes=False)
    computing = _computing(found, kind, sizes["num_hidden_layers"], source)
    layers = tuple(full if computes else shared for computes in computing)
    given = found.get("dtype") or found.get("torch_dtype") or "bfloat16"
    return ModelShape(layers, b=b, dtype=dtype or str(given), training=False, hidden=sizes["hidden_size"])


def stock_step(layer: LayerShape, call: Call) -> Step:
    """Return what transformers 5.23 takes with sdpa on a CPU: the scorer, then attention under a mask.

    Its indexer has no loss, so that a training step is billed without one. Counts of what its code holds at its peaks,
    which tests hold to measurements: in units of I = [b, sq, h, sk], A = [b, np, sq, sk] and P = [b, sq, sk], all
    float32. A fused attention of an accelerator takes less than sdpa's plain one.
    """
    pairs = 4 * call.b * call.sq * call.sk
    inner, outer = layer.heads * pairs, call.np * pairs
    heads = call.b * call.np * call.itemsize
    channels = layer.hn * (call.sq + call.sk) + layer.v_dim * call.sk
    # sdpa's plain path scales copies of query and key, in float32 for half precision, and casts value.
    copies = heads * channels if call.itemsize >= 4 else 4 * call.b * call.np * channels
    attention = Step(9 * outer // 4 + 7 * pairs // 4 + copies, 0, 0)
    if call.training:
        held = outer + pairs // 2 + copies
        attention = Step(9 * outer // 4 + 7 * pairs // 4 + copies, held, 3 * outer + pairs // 2 + copies)
    if not layer.computes:
        return attention
    queries = 4 * call.b * call.sq * layer.heads * layer.dim
    spread = layer.dim * pairs if call.b > 1 else 0  # torch.matmul repeats the keys for every row of a batch
    return attention._replace(forward=max(2 * inner + spread + queries, attention.forward))


def _computing(found: Mapping[str, Any], kind: str, layers: int, source: str) -> list[bool]:
    """Return for each indexed layer whether it selects for itself, by the rules of its configuration class."""
    if kind in _EVERY_LAYER:
        return [True] * layers
    if kind in _LAYER_TYPES:
        types = found.get("layer_types")
        if types is None:
            sliding = found.get("use_sliding_window", True)
            types = ["sliding" if sliding and i >= 2 and i % 4 != 1 else "indexed_attention" for i in range(layers)]
        # Files from before layer types had their names say "full_attention" for indexed layers.
        indexed = [True for name in types if name in ("indexed_attention", "full_attention")]
        if not indexed:
            raise ValueError(f"{source}: layer_types must hold an indexed layer, got none.")
        return indexed
    types = found.get("indexer_types") or found.get("index_topk_pattern")
    if types is None and kind == "hy_v4":
        return [i == 0 or (i - 1) % 4 == 0 for i in range(layers)]
    if types is None:
        every = max(1, _whole(found, "index_topk_freq", 1, source))
        offset = _whole(found, "index_skip_topk_offset", 2, source)
        return [max(i - offset + 1, 0) % every == 0 for i in range(layers)]
    if len(types) != layers or not set(types) <= {"full", "shared", "F", "S"}:
        raise ValueError(f'{source}: indexer_types must hold "full" or "shared" for {layers} layers, got {types!r}.')
    return [name in ("full", "F") for name in types]


def left_out(tree: Mapping[str, Any], model: ModelShape) -> int:
    """Return how many layers of a configuration a model read from it leaves out."""
    nested = tree.get("text_config")
    found = {**tree, **nested} if isinstance(nested, Mapping) else tree
    return int(found["num_hidden_layers"]) - len(model.layers)


def _whole(found: Mapping[str, Any], name: str, default: int, source: str) -> int:
    value = found.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{source}: {name} must be an integer of at least 0, got {value!r}.")
    return value


def _size(found: Mapping[str, Any], name: str, source: str) -> int:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{source}: {name} must be an integer of at least 1, got {value!r}.")
    return value
