"""Tiny random models of the covered types of transformers, and the stock package in float64 for the truth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor

from headfold.integrations.transformers import MODEL_TYPES

# 16 heads, so that scores of exactly zero, and with them ties, are rare.
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 40, "intermediate_size": 48, "moe_intermediate_size": 16, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 24, "q_lora_rank": 28, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10,
    "index_topk": 7, "index_head_dim": 20, "index_n_heads": 16, "initializer_range": 0.3, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MLPS = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_hidden_layers": 4}
SHARED = {"indexer_types": ["full", "full", "shared", "shared"]}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek_v32": ("DeepseekV32Config", "DeepseekV32ForCausalLM", {}),
    "glm_moe_dsa": ("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM", SHARED),
    "axk2": ("AXK2Config", "AXK2ForCausalLM", {"gated_norm_rank": 4}),
    "hy_v4": ("HYV4Config", "HYV4ForCausalLM", SHARED),
    "dots3_note_text": (
        "Dots3NoteTextConfig",
        "Dots3NoteForCausalLM",
        {
            "head_dim": 20, "sliding_window": 9, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2,
            "swa_q_lora_rank": 12, "swa_kv_lora_rank": 14, "swa_head_dim": 16, "swa_qk_nope_head_dim": 10,
            "swa_v_head_dim": 10, "shared_experts_intermediate_size": 16,
        },
    ),
    "mistral_large4_text": (
        "MistralLarge4TextConfig",
        "MistralLarge4ForConditionalGeneration",
        {**SHARED, "no_rope_layers": [1, 0, 1, 0], "kv_source_layers": [0, 1, 0, 1]},
    ),
}  # fmt: skip

NAMES = list(MODELS)
# Types whose indexers score groups of keys: compressed ones, pools, blocks.
COMMON: dict[str, Any] = {name: SIZES[name] for name in (
    "vocab_size", "hidden_size", "moe_intermediate_size", "num_attention_heads", "num_experts_per_tok",
    "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")}  # fmt: skip
INDEXER = {"index_n_heads": 16, "index_head_dim": 20, "index_topk": 4}
LAYERS = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"]}
GROUPED: dict[str, dict[str, Any]] = {
    "deepseek_v4": {
        **COMMON, **INDEXER, "num_hidden_layers": 3, "head_dim": 24, "num_key_value_heads": 1, "q_lora_rank": 28,
        "n_routed_experts": 4, "hc_mult": 2, "sliding_window": 9, "o_groups": 2, "o_lora_rank": 8,
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 3, "heavily_compressed_attention": 5},
        "partial_rotary_factor": 1 / 3, "mlp_layer_types": ["moe"] * 3,
    },
    "glm5_next_text": {
        **COMMON, **LAYERS, **INDEXER, "index_topk": 9, "index_kpool": 3, "num_key_value_heads": 4,
        "intermediate_size": 48, "n_routed_experts": 4, "kv_lora_rank": 24, "q_lora_rank": 28, "v_head_dim": 10,
        "qk_nope_head_dim": 12, "linear_head_dim": 8, "linear_num_heads": 2, "hc_mult": 2,
        "mlp_layer_types": ["dense", "sparse", "sparse"], "indexer_types": ["full", "full", "shared"],
    },
    "qwen4_exp_text": {
        **COMMON, **LAYERS, "head_dim": 16, "num_key_value_heads": 2, "num_experts": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "hc_count": 2,
        "hc_lowrank": 6, "shared_expert_intermediate_size": 16, "indexer_n_heads": 16, "indexer_kv_heads": 1,
        "indexer_head_dim": 20, "indexer_budget": 9, "indexer_compress_ratio": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
}  # fmt: skip
GROUPED_NAMES = list(GROUPED)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products lose by a second thread, and tenfold where others compute beside it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def grouped_config(name: str, **changes: Any) -> Any:
    sizes = {**GROUPED[name], **changes}
    if name == "deepseek_v4":
        return transformers.DeepseekV4Config(**sizes)
    if name == "qwen4_exp_text":
        return transformers.Qwen4ExpTextConfig(**sizes)
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 40}
    vision |= {"projection_intermediate_size": 8}
    return transformers.Glm5NextConfig(text_config=transformers.Glm5NextTextConfig(**sizes), vision_config=vision)


CLASSES = {
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "glm5_next_text": "Glm5NextForConditionalGeneration",
    "qwen4_exp_text": "Qwen4ExpForCausalLM",
}


def config_of(name: str, **changes: Any) -> Any:
    if name in GROUPED:
        return grouped_config(name, **changes)
    config, _, more = MODELS[name]
    sizes = {**SIZES, **MLPS, **more, **changes}
    if name == "mistral_large4_text":
        del sizes["q_lora_rank"]
        text = transformers.MistralLarge4TextConfig(**sizes)
        vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
        return transformers.MistralLarge4Config(text_config=text, vision_config=vision)
    return getattr(transformers, config)(**sizes)


def build(name: str, seed: int = 0, attention: str | None = None, **changes: Any) -> Any:
    """Return a model in eval mode, with random weights that none of its parts ignores."""
    config = config_of(name, **changes)
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[name] if name in GROUPED else MODELS[name][1])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms, sinks, scales: not left at what they start from
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.set_experts_implementation("eager")  # the grouped product takes no float64
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


class _Torch64(ModuleType):
    """torch, with float32 meaning float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def in_float64(name: str) -> Iterator[None]:
    """Make what a model's file computes in float32, whatever the model's dtype, float64."""
    with (
        mock.patch.object(MODEL_TYPES[name].module, "torch", _Torch64("torch")),
        mock.patch.object(Tensor, "float", Tensor.double),
    ):
        yield


def tokens(b: int, s: int, seed: int = 1) -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], (b, s), generator=torch.Generator().manual_seed(seed))


def padding_of(ids: Tensor, side: str) -> Tensor | None:
    if side == "none":
        return None
    mask = torch.ones_like(ids)
    mask[1, slice(None, 6) if side == "left" else slice(-6, None)] = 0
    return mask


def step(model: Any, ids: Tensor, mask: Tensor | None, *, uncounted: int = 0, **inputs: Any) -> dict[str, Tensor]:
    """Logits of real tokens, loss, and every gradient of one training step, beside sequences that do not count."""
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    labels = ids.masked_fill(~kept, -100)
    if uncounted:
        more = tokens(uncounted, ids.shape[1], seed=7)
        ids, labels = torch.cat([more, ids]), torch.cat([torch.full_like(more, -100), labels])
        mask = None if mask is None else torch.cat([torch.ones_like(more), mask])
    model.zero_grad(set_to_none=True)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, **inputs)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach()[uncounted:][kept], "loss": out.loss.detach()[None], **grads}


def far_apart(got: dict[str, Tensor], wanted: dict[str, Tensor], share: float) -> list[str]:
    """Names whose largest error exceeds a share of the largest value."""
    assert got.keys() == wanted.keys()
    return [
        f"{name} {float((got[name] - x).abs().max() / x.abs().max()):.1e}"
        for name, x in wanted.items()
        if not (got[name] - x).abs().max() <= share * x.abs().max()
    ]
