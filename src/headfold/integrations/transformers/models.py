"""The covered model types, and how each makes the operands of its scorer."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headfold.contract import UnsupportedError
from headfold.integrations.patching import PatchError, Requires, signature_of

REQUIRES = Requires("transformers", "transformers", "5.23", "5.24")
LATENT = "(hidden_states, q_resid, position_embeddings, attention_mask, position_ids, past_key_values=None)"
DIRECT = "(hidden_states, position_embeddings, attention_mask, position_ids, past_key_values=None)"
COMPRESSED = "(hidden_states, q_residual, position_ids, past_key_values, layer_idx)"
POOLED = "(hidden_states, q_resid, attention_mask, past_key_values)"
BLOCKS = "(hidden_states, position_embeddings, attention_mask, past_key_values)"
ATTENTION = "(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs)"
BUILD_MASK = "build_attention_mask_from_topk"
FROM_SELECTION = "(self, topk_indices, query_states, kv_length)"
KEPT = ("wq_b", "wk", "k_norm", "weights_proj", "n_heads", "head_dim", "index_topk", "softmax_scale", "layer_idx")
# What each scorer is made of, by the signature of its indexer's forward.
ATTRIBUTES = {
    LATENT: (*KEPT, "qk_rope_head_dim"),
    DIRECT: (*KEPT, "qk_rope_head_dim", "q_input_norm", "softmax_scaling"),
    POOLED: (*KEPT, "index_kpool", "index_kpool_always_select_tail", "index_kpool_compress_ape",
             "index_kpool_compress_gate"),
    COMPRESSED: ("compress_rate", "num_heads", "head_dim", "index_topk", "kv_proj", "gate_proj", "position_bias",
                 "kv_norm", "q_b_proj", "rotary_emb", "rope_layer_type", "scorer"),
    BLOCKS: ("index_n_heads", "index_head_dim", "block_topk", "compress_ratio", "token_budget", "index_qk_proj",
             "q_layernorm", "k_layernorm", "layer_idx"),
}  # fmt: skip


@dataclass(frozen=True)
class ModelType:
    """One model type of transformers.

    folder: of its modeling file.   prefix: of its class names.   rotary: the function that turns query and key, "" for
    none.   rotary_last: whether the turned channels are the last ones.   signature: of the indexer's forward.
    indexer_name: of its class, without the prefix.   own_attention: why attention stays the model's own, or "".
    """

    folder: str
    prefix: str
    rotary: str = "apply_rotary_pos_emb"
    rotary_last: bool = False
    signature: str = LATENT
    indexer_name: str = "Indexer"
    own_attention: str = ""

    @property
    def path(self) -> str:
        """Name of its modeling file's module."""
        return f"transformers.models.{self.folder}.modeling_{self.folder}"

    @property
    def module(self) -> Any:
        """Its modeling file."""
        return importlib.import_module(self.path)

    @property
    def indexer(self) -> type[nn.Module]:
        """The class of its indexer."""
        return self._class(self.indexer_name)

    @property
    def attention(self) -> type[nn.Module]:
        """The class of its attention."""
        return self._class("Attention")

    @property
    def keys_are_scored(self) -> bool:
        """Whether scores are of keys, as attention's weights are, and not of groups of them: what a loss compares."""
        return self.signature in (LATENT, DIRECT)

    @property
    def rotate(self) -> Any:
        """The function that turns query and key, as the file has it now."""
        return getattr(sys.modules[self.path], self.rotary)  # an import is nothing that compiles

    def check(self, op: str) -> None:
        """Refuse a file whose functions do not take what this calls them, and is called, with."""
        seams: list[tuple[str, Any, str]] = [
            (f"{self.indexer.__name__}.forward", self.indexer.forward, f"(self, {self.signature[1:]}"),
            (f"{self.path}.eager_attention_forward", getattr(self.module, "eager_attention_forward", None), ATTENTION),
        ]
        if self.signature == POOLED:
            build = getattr(self.attention, BUILD_MASK, None)
            seams.append((f"{self.attention.__name__}.{BUILD_MASK}", build, FROM_SELECTION))
        for label, target, needed in seams:
            found = signature_of(target)
            if found != needed:
                raise PatchError(f"{op}: {label} must take {needed}, got {found}.")

    def _class(self, name: str) -> type[nn.Module]:
        found: type[nn.Module] | None = getattr(self.module, self.prefix + name, None)
        if found is None:
            raise PatchError(f"needs {self.prefix + name} in {self.module.__name__}, got no such name.")
        return found


INTERLEAVED = "apply_rotary_pos_emb_interleave"
# By the model_type of the text configuration.
MODEL_TYPES = {
    "deepseek_v32": ModelType("deepseek_v32", "DeepseekV32"),
    "glm_moe_dsa": ModelType("glm_moe_dsa", "GlmMoeDsa", INTERLEAVED),
    "axk2": ModelType("axk2", "AXK2"),
    "hy_v4": ModelType("hy_v4", "HYV4", rotary_last=True),
    "dots3_note_text": ModelType("dots3_note", "Dots3NoteText", INTERLEAVED),
    "mistral_large4_text": ModelType("mistral_large4", "MistralLarge4Text", INTERLEAVED, signature=DIRECT),
    "deepseek_v4": ModelType(
        "deepseek_v4",
        "DeepseekV4",
        signature=COMPRESSED,
        own_attention="it reads a window of keys and compressed ones beside each other, under a mask that it extends",
    ),
    "glm5_next_text": ModelType("glm5_next", "Glm5NextText", "", signature=POOLED),
    "qwen4_exp_text": ModelType("qwen4_exp", "Qwen4ExpText", signature=BLOCKS, indexer_name="QSAIndexer"),
}
# Of models of several parts, whose text configurations have names of their own.
COMPOSITES = {name.removesuffix("_text"): name for name in MODEL_TYPES if name.endswith("_text")}


def model_type_of(op: str, config: Any) -> ModelType:
    """Return the type of a text configuration, or by its name, which may be that of the whole model.

    Raises: PatchError naming a type that is not covered.
    """
    name = config if isinstance(config, str) else getattr(config, "model_type", type(config).__name__)
    known = MODEL_TYPES.get(COMPOSITES.get(name, name))
    if known is None:
        raise PatchError(f"{op}: model type must be one of {', '.join(MODEL_TYPES)}, got {name!r}.")
    return known


def check_attention(config: Any) -> None:
    """Refuse a configuration whose causal attention does not run on headfold."""
    name = config.model_type
    known = MODEL_TYPES.get(COMPOSITES.get(name, name))
    if known is None or known.own_attention:
        served = ", ".join(name for name, model_type in MODEL_TYPES.items() if not model_type.own_attention)
        why = f", which keeps its own: {known.own_attention}" if known else ""
        raise UnsupportedError(f'attn_implementation="headfold" serves {served}, got {name}{why}.')


def check_indexer(op: str, model_type: ModelType, indexer: nn.Module) -> None:
    """Refuse an indexer that lacks what its scorer is made of."""
    missing = [name for name in ATTRIBUTES[model_type.signature] if not hasattr(indexer, name)]
    if missing:
        raise PatchError(f"{op}: {type(indexer).__name__} must have {', '.join(missing)}, got no such name.")


def operands(
    model_type: ModelType,
    indexer: Any,
    hidden: Tensor,
    latent: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    position_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [b, s, h, d], weights [b, s, h] and k [b, s, d] of a scorer of keys, as its own forward makes them.

    Args:
        model_type: of the indexer.
        indexer: the module.
        hidden: [b, s, hidden size], the layer's normalised input.
        latent: what queries are projected from: the attention's query latent, or hidden itself.
        position_embeddings: cosines and sines of the layer.
        position_ids: [1 or b, s]; read where queries are scaled by the logarithm of their position.
    """
    if model_type.signature == DIRECT:
        latent = indexer.q_input_norm(hidden)
    q = indexer.wq_b(latent).view(*hidden.shape[:2], indexer.n_heads, indexer.head_dim)
    k = indexer.wk(hidden)
    if model_type.signature == DIRECT:
        q = indexer.softmax_scaling(q, position_ids, head_dim_first=False)
    # Some keep the norm in float32 whatever the model has; the others have one dtype.
    k = indexer.k_norm(k.to(indexer.k_norm.weight.dtype)).to(k.dtype).unsqueeze(2)
    if getattr(indexer, "use_rope", True):
        cos, sin = position_embeddings
        turned = indexer.qk_rope_head_dim
        kept = indexer.head_dim - turned
        sizes = [kept, turned] if model_type.rotary_last else [turned, kept]
        at = int(model_type.rotary_last)
        q_parts, k_parts = list(q.split(sizes, -1)), list(k.split(sizes, -1))
        q_parts[at], k_parts[at] = model_type.rotate(q_parts[at], k_parts[at], cos, sin, unsqueeze_dim=2)
        q, k = torch.cat(q_parts, -1), torch.cat(k_parts, -1)
    return q, head_weights(indexer.weights_proj, hidden, indexer.n_heads), k.squeeze(2)


def head_weights(project: Any, hidden: Tensor, heads: int) -> Tensor:
    """Return the weights [b, s, h] of a scorer's heads, at least float32."""
    weights: Tensor = project(hidden.to(project.weight.dtype))
    scaled: Tensor = weights.to(torch.promote_types(weights.dtype, torch.float32)) * heads**-0.5
    return scaled
