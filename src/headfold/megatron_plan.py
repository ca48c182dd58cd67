"""What a Megatron-Core model of DSA layers holds: its argument file as a model, and its own PyTorch path. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from headfold.megatron_split import layers_of_stages
from headfold.model_plan import NOTHING, Call, LayerShape, ModelShape, Parallel, Recompute, Step

# What the arguments say of an indexer; those that change no byte are known too, so that a misspelt one is told apart.
_INDEXER = {
    "dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk", "dsa_indexer_topk_freq",
    "dsa_indexer_skip_topk_offset", "dsa_indexer_loss_coeff", "dsa_indexer_use_sparse_loss", "dsa_indexer_scoring_relu",
    "dsa_indexer_rope_interleaved", "dsa_indexer_rotate_activation", "dsa_indexer_k_norm_epsilon",
    "dsa_indexer_k_norm_fp32", "dsa_kernel_backend",
}  # fmt: skip
_NEEDED = {
    "num_layers": "layers",
    "num_attention_heads": "attention heads",
    "dsa_indexer_n_heads": "indexer heads",
    "dsa_indexer_head_dim": "indexer width",
    "dsa_indexer_topk": "selected keys",
}


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
_ABSORBED = "Stock is the PyTorch path of megatron-core 0.19.2 alone: absorbed attention, with no fused kernel."


class Plan(NamedTuple):
    """A model, how it is split, the context that it is trained on (None where the file does not say), and remarks."""

    model: ModelShape
    parallel: Parallel
    tokens: int | None
    notes: tuple[str, ...] = ()


def from_arguments(tree: Mapping[str, Any], source: str) -> Plan:
    """Read Megatron's arguments, flat or nested (language_model, model_parallel), with or without their dashes.

    Args:
        tree: the file's mapping.
        source: its name, for sentences.

    Raises: ValueError naming what is missing, misspelt, no size, or a split or recomputation that is not planned.
    """
    found = dict(_flat(tree, source))
    for name in found:
        if (name.startswith("dsa_") or "indexer" in name) and name not in _INDEXER:
            raise ValueError(f"{source}: dsa arguments must be among {', '.join(sorted(_INDEXER))}, got {name}.")
    missing = [f"{name} ({what})" for name, what in _NEEDED.items() if found.get(name) is None]
    if missing:
        raise ValueError(f"{source}: needs {', '.join(missing)}, got a file without.")

    def size(name: str, default: int, least: int = 1) -> int:
        value = found.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{source}: {name} must be an integer of at least {least}, got {value!r}.")
        return value

    def flag(name: str, default: bool) -> bool:
        value = found.get(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{source}: {name} must be true or false, got {value!r}.")
        return default if value is None else value

    latent = size("kv_lora_rank", 512)
    layer = LayerShape(
        heads=size("dsa_indexer_n_heads", 1),
        dim=size("dsa_indexer_head_dim", 1),
        topk=size("dsa_indexer_topk", 1),
        np=size("num_attention_heads", 1),
        np_k=1,
        hn=latent + size("qk_pos_emb_head_dim", 64, 0),
        v_dim=latent,
        relu=flag("dsa_indexer_scoring_relu", True),
    )
    coefficient = _number(found, "dsa_indexer_loss_coeff", source)
    every, offset = size("dsa_indexer_topk_freq", 1), max(1, size("dsa_indexer_skip_topk_offset", 0, 0))
    computing = [max(number - offset, 0) % every == 0 for number in range(1, size("num_layers", 1) + 1)]
    shared = replace(layer, computes=False)
    own = replace(layer, trains=coefficient > 0)
    recompute = _recompute(found, size("recompute_num_layers", 1), source)
    if recompute.what in ("layers", "first") and found.get("hidden_size") is None:
        raise ValueError(f"{source}: needs hidden_size, which recomputed layers hold, got a file without.")
    model = ModelShape(
        layers=tuple(own if computes else shared for computes in computing),
        b=size("micro_batch_size", 1),
        dtype=_dtype(found, source),
        recompute=recompute,
        hidden=size("hidden_size", 0, 0),
        shares_hidden=flag("sequence_parallel", False) or flag("distribute_saved_activations", False),
    )
    tensor, context, pipeline = (
        size(f"{way}_parallel_size", 1) for way in ("tensor_model", "context", "pipeline_model")
    )
    stages = layers_of_stages(found, len(computing), pipeline, source)
    _starts(stages, computing, source)
    tokens = None if found.get("seq_length") is None else size("seq_length", 1)
    return Plan(model, Parallel(tensor, context, pipeline, stages), tokens, tuple(_notes(found)))


def stock_step(layer: LayerShape, call: Call) -> Step:
    """Return what megatron-core 0.19.2 takes with no fused backend: FusedDSAIndexerLoss, then absorbed attention.

    Coefficients are counts of the tensors that its code holds at its peaks, and tests hold them to measurements: in
    units of I = [sq, b, h, sk], A = [b, np, sq, sk] and P = [b, sq, sk], all float32.
    """
    pairs = 4 * call.b * call.sq * call.sk
    inner, outer = layer.heads * pairs, call.np * pairs
    picks = 8 * call.b * call.sq * min(layer.topk, call.sk)
    attention = _stock_attention(layer, call, outer, pairs, picks)
    if not layer.computes:
        return attention
    queries = call.b * call.sq * layer.heads * layer.dim
    scoring = 2 * inner + pairs // 4 + (queries // 2 if call.itemsize < 4 else 0)
    if not (layer.trains and call.training):
        return attention._replace(forward=max(scoring, attention.forward))
    copied = call.np * call.b * call.sk * layer.hn * call.itemsize if call.b > 1 else 0
    forward = max(scoring, 4 * outer + outer // 4 + 4 * pairs + copied)
    backward = max(
        3 * inner + inner // 4 + queries * call.itemsize + 3 * pairs // 2, 4 * outer + outer // 4 + 13 * pairs // 4
    )
    return Step(max(forward, attention.forward), attention.held, max(attention.backward, attention.held + backward))


def _stock_attention(layer: LayerShape, call: Call, outer: int, pairs: int, picks: int) -> Step:
    """Absorbed attention with a dense [b, np, sq, sk] softmax, under autograd."""
    half = call.itemsize < 4
    queries, keys = 4 * call.b * call.np * call.sq * layer.hn, 4 * call.b * call.sk * layer.hn
    cast = queries + keys if half else 0
    copied = call.np * (keys + call.b * call.sk * layer.v_dim * call.itemsize) if call.b > 1 else 0
    if not call.training:
        return Step(picks + 4 * outer + outer // 4 + 5 * pairs // 2 + cast + copied, 0, 0)
    held = 13 * outer // 4 if half else 15 * outer // 4
    held += cast + copied
    forward = 27 * outer // 4 + 11 * pairs // 8 + cast + copied
    spread = (17 * outer // 4 if half else 15 * outer // 4) + keys
    return Step(picks + max(forward, held), picks + held, picks + held + spread)


def _flat(tree: Mapping[str, Any], source: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        raise ValueError(f"{source}: must hold a mapping of Megatron's arguments, got {type(tree).__name__}.")
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, source)
        else:
            yield str(key).lstrip("-").replace("-", "_"), value


def _dtype(found: Mapping[str, Any], source: str) -> str:
    for name in ("bf16", "fp16"):
        if found.get(name):
            return _DTYPES[name]
    given = found.get("params_dtype")
    dtype = str("float32" if given is None else given).removeprefix("torch.")
    dtype = _DTYPES.get(dtype, dtype)
    if dtype not in _DTYPES.values():
        raise ValueError(f"{source}: params_dtype must be bfloat16, float16 or float32, got {given!r}.")
    return dtype


def _number(found: Mapping[str, Any], name: str, source: str) -> float:
    """Return a number, 0 where there is none; YAML reads 1e-2 as text."""
    value = found.get(name)
    try:
        if isinstance(value, bool):
            raise TypeError
        return 0.0 if value is None else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{source}: {name} must be a number, got {value!r}.") from None


def _recompute(found: Mapping[str, Any], layers: int, source: str) -> Recompute:
    """Read what runs again in backward."""
    granularity = found.get("recompute_granularity")
    if granularity is None and found.get("recompute_activations"):
        granularity = "selective"
    if granularity is None:
        return NOTHING
    if granularity == "selective":
        modules = found.get("recompute_modules")
        return Recompute("attention" if modules is None or "core_attn" in modules else "nothing")
    method = found.get("recompute_method")
    if granularity != "full" or method not in (None, "uniform", "block"):
        raise ValueError(
            f"{source}: recompute_granularity must be full or selective, and recompute_method uniform or block, got "
            f"{granularity!r} and {method!r}."
        )
    return Recompute("first" if method == "block" else "layers", layers)


def _starts(stages: tuple[int, ...], computing: list[bool], source: str) -> None:
    """Refuse what Megatron refuses: a stage whose first layer reuses the selection of a layer on another stage."""
    first = 0
    for i, count in enumerate(stages):
        if count and not computing[first]:
            own = max(n for n in range(first) if computing[n])
            raise ValueError(
                f"{source}: every pipeline stage must start on a computing layer, got stage {i + 1} of {len(stages)}, "
                f"which starts on layer {first + 1} and would reuse layer {own + 1}'s selection. Choose another split, "
                "dsa_indexer_topk_freq or dsa_indexer_skip_topk_offset: Megatron refuses this one too."
            )
        first += count


def _notes(found: Mapping[str, Any]) -> Iterator[str]:
    """Say what of the file the bill leaves out."""
    yield _ABSORBED
    if found.get("dsa_kernel_backend") not in (None, "none"):
        yield f"What the kernels of dsa_kernel_backend={found['dsa_kernel_backend']} take is not billed."
    if found.get("mtp_num_layers"):
        yield f"Layers of multi-token prediction (mtp_num_layers={found['mtp_num_layers']}) are not billed."
    if found.get("recompute_granularity") == "selective" and "mla_up_proj" in (found.get("recompute_modules") or ()):
        yield "recompute_modules: mla_up_proj lets go of attention's inputs as well, which the bill holds."
