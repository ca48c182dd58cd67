"""The covered model types, and how each makes the operands of its scorer."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headfold.integrations.patching import PatchError, Requires

REQUIRES = Requires("transformers", "transformers", "5.23", "5.24")
LATENT = "(hidden_states, q_resid, position_embeddings, attention_mask, position_ids, past_key_values=None)"
DIRECT = "(hidden_states, position_embeddings, attention_mask, position_ids, past_key_values=None)"
ATTRIBUTES = (
    "wq_b", "wk", "k_norm", "weights_proj", "n_heads", "head_dim", "qk_rope_head_dim", "index_topk", "softmax_scale",
    "layer_idx",
)  # fmt: skip


@dataclass(frozen=True)
class ModelType:
    """One model type of transformers.

    folder: of its modeling file.   prefix: of its class names.   rotary: the function that turns query and key.
    rotary_last: whether the turned channels are the last ones.   signature: of the indexer's forward.
    """

    folder: str
    prefix: str
    rotary: str
    rotary_last: bool = False
    signature: str = LATENT

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
        return self._class("Indexer")

    @property
    def attention(self) -> type[nn.Module]:
        """The class of its attention."""
        return self._class("Attention")

    def _class(self, name: str) -> type[nn.Module]:
        found: type[nn.Module] | None = getattr(self.module, self.prefix + name, None)
        if found is None:
            raise PatchError(f"needs {self.prefix + name} in {self.module.__name__}, got no such name.")
        return found


# By the model_type of the text configuration.
MODEL_TYPES = {
    "deepseek_v32": ModelType("deepseek_v32", "DeepseekV32", "apply_rotary_pos_emb"),
    "glm_moe_dsa": ModelType("glm_moe_dsa", "GlmMoeDsa", "apply_rotary_pos_emb_interleave"),
    "axk2": ModelType("axk2", "AXK2", "apply_rotary_pos_emb"),
    "hy_v4": ModelType("hy_v4", "HYV4", "apply_rotary_pos_emb", rotary_last=True),
    "dots3_note_text": ModelType("dots3_note", "Dots3NoteText", "apply_rotary_pos_emb_interleave"),
    "mistral_large4_text": ModelType(
        "mistral_large4", "MistralLarge4Text", "apply_rotary_pos_emb_interleave", signature=DIRECT
    ),
}


def model_type_of(op: str, config: Any) -> ModelType:
    """Return the type of a text configuration.

    Raises: PatchError naming a type that is not covered.
    """
    name = getattr(config, "model_type", type(config).__name__)
    if name not in MODEL_TYPES:
        raise PatchError(f"{op}: model type must be one of {', '.join(MODEL_TYPES)}, got {name!r}.")
    return MODEL_TYPES[name]


def check_indexer(op: str, indexer: nn.Module) -> None:
    """Refuse an indexer that lacks what its scorer is made of."""
    missing = [name for name in ATTRIBUTES if not hasattr(indexer, name)]
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
    """Return q [b, s, h, d], weights [b, s, h] and k [b, s, d] of a scorer, as its own forward makes them.

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
        rotate = getattr(sys.modules[model_type.path], model_type.rotary)  # an import is nothing that compiles
        q_parts[at], k_parts[at] = rotate(q_parts[at], k_parts[at], cos, sin, unsqueeze_dim=2)
        q, k = torch.cat(q_parts, -1), torch.cat(k_parts, -1)
    weights = indexer.weights_proj(hidden.to(indexer.weights_proj.weight.dtype))
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32)) * indexer.n_heads**-0.5
    return q, weights, k.squeeze(2)
