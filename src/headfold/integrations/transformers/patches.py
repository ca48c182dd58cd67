"""apply and register: which changes put a model, or models to be made, on headfold."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.monkey_patching import get_patch_mapping, register_patch_mapping, unregister_patch_mapping

from headfold.contract import number, one_of, workspace_bytes
from headfold.integrations.patching import Hook, Patch, PatchError, Replace, signature_of
from headfold.integrations.transformers.layers import attend, direct_forward, latent_forward
from headfold.integrations.transformers.masks import NAME, mask_for
from headfold.integrations.transformers.models import (
    BLOCKS,
    BUILD_MASK,
    COMPRESSED,
    DIRECT,
    FROM_SELECTION,
    LATENT,
    MODEL_TYPES,
    POOLED,
    REQUIRES,
    ModelType,
    check_indexer,
    model_type_of,
)
from headfold.integrations.transformers.pooled import (
    block_forward,
    compressed_forward,
    pooled_forward,
    selecting,
)
from headfold.integrations.transformers.training import STATE, LayerState, Training

STAGES = ("indexer", "joint")
FORWARDS: dict[str, Callable[..., Any]] = {
    LATENT: latent_forward,
    DIRECT: direct_forward,
    COMPRESSED: compressed_forward,
    POOLED: pooled_forward,
    BLOCKS: block_forward,
}
# What transformers asks every mask function for.
MASK = (
    "(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function, attention_mask=None, local_size=None, "
    "allow_is_causal_skip=True, allow_is_bidirectional_skip=False, use_vmap=False, device='cpu', **kwargs)"
)


def apply(
    model: PreTrainedModel,
    *,
    attention: bool | None = None,
    indexer_loss_coeff: float | None = None,
    stage: str = "joint",
    sparse: bool | None = None,
    add_to_loss: bool = True,
    workspace: int | None = None,
) -> Patch:
    """Put the indexers of a live model, and its attention, on headfold; return the Patch, applied, that undoes it.

    Parameters, buffers and state dict stay as they are. With an indexer_loss_coeff the indexers are trained: in
    training mode every forward pass makes the loss of every indexer, hands the losses out as `outputs.indexer_losses`
    and adds their sum, times the coefficient, to `outputs.loss`. They reach the indexers' parameters and nothing else.

    Args:
        model: of a covered type (`MODEL_TYPES`), alone or as the text model of a composite one.
        attention: whether attention too runs on headfold, without a mask of queries by keys; None means where the type
            allows it (all but deepseek_v4). False leaves the model's own attention, and the mask with it; the scorer
            alone no longer holds its heads.
        indexer_loss_coeff: factor of the indexers' loss; None trains none. Types whose indexers score groups of keys
            (deepseek_v4, glm5_next, qwen4_exp) are not trained.
        stage: "joint" trains the model on what it selects, and the indexers beside it; "indexer" freezes everything but
            the indexers, until undo.
        sparse: whether the loss compares over selected keys alone; None means stage == "joint". Stage "indexer" with
            sparse=False is the warm-up of the paper: attention sees every visible key in training mode.
        add_to_loss: False leaves `outputs.loss` alone.
        workspace: bytes of scratch of each call, 64 MiB when None.

    Raises: PatchError, before anything is changed, for a model type, version or class that this was not written for;
    ValueError or TypeError for arguments.
    """
    op = "transformers.apply"
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{op}: model must be a PreTrainedModel, got {type(model).__name__}.")
    one_of(op, "attention", attention, (None, True, False))
    one_of(op, "stage", stage, STAGES)
    one_of(op, "sparse", sparse, (None, True, False))
    workspace_bytes(op, workspace)
    model_type = model_type_of(op, model.config.get_text_config())
    REQUIRES.check()
    check_mask_function(op)
    model_type.check(op)
    attention = _attention(op, model_type, attention)
    attentions = [module for module in model.modules() if isinstance(module, model_type.attention)]
    indexers = [module for module in model.modules() if isinstance(module, model_type.indexer)]
    if not indexers:
        raise PatchError(f"{op}: model must have layers with an indexer, got none in {type(model).__name__}.")
    for indexer in indexers:
        check_indexer(op, model_type, indexer)
    training = None
    if indexer_loss_coeff is not None:
        number(op, "indexer_loss_coeff", indexer_loss_coeff)
        if not model_type.keys_are_scored:
            raise PatchError(
                f"{op}: training needs an indexer that scores keys, as attention weighs them, got "
                f"{model_type.indexer.__name__}, which scores groups of them."
            )
        if not attention:
            raise ValueError(f"{op}: training indexers needs attention=True, got False. Their teacher is made there.")
        sparse = stage == "joint" if sparse is None else sparse
        dense = stage == "indexer" and not sparse
        training = Training(float(indexer_loss_coeff), sparse, dense, add_to_loss, workspace)
    changes: list[Replace | Hook] = [_forward(model_type, indexer) for indexer in indexers]
    changes += [_state(module, LayerState(workspace, training)) for module in (*indexers, *attentions)]
    if attention:
        changes.append(Hook("names of the attention and its mask", register_names, lambda _: None))
        if model_type.signature == POOLED:
            changes += [_selects(module) for module in attentions]
        configs = {id(module.config): module.config for module in attentions}
        changes += [Replace(config, "_attn_implementation_internal", NAME) for config in configs.values()]
    if training is not None:
        changes += [_trainable(model, indexers, freeze=stage == "indexer"), _passes(model, training)]
    return Patch(f"headfold on {type(model).__name__}", tuple(changes), (REQUIRES,)).apply()


def register(*names: str) -> Patch:
    """Make models of covered types with indexers on headfold from now on; return the Patch, applied, that undoes it.

    `from_pretrained` and `from_config` then build them so; with attn_implementation="headfold" their attention runs on
    headfold too. Models that exist, and those that are made by calling a class, stay as they are.

    Args:
        names: model types, of the text or the whole model; all of `MODEL_TYPES` when none is given.

    Raises: PatchError, before anything is changed, for another name, version or class, or one that was registered.
    """
    op = "transformers.register"
    types = [model_type_of(op, name) for name in dict.fromkeys(names or MODEL_TYPES)]
    REQUIRES.check()
    check_mask_function(op)
    made: dict[str, type[nn.Module]] = {}
    for model_type in types:
        model_type.check(op)
        made[model_type.indexer.__name__] = _class(model_type)
        if model_type.signature == POOLED:
            made[model_type.attention.__name__] = _selecting_class(model_type.attention)
    # A name is looked for within the names of classes, too: DeepseekV4Indexer in DeepseekV4IndexerScorer.
    mapping = {f"^{name}$": replacement for name, replacement in made.items()}

    def check() -> None:
        taken = sorted(name for name in made if {name, f"^{name}$"} & set(get_patch_mapping()))
        if taken:
            raise PatchError(f"needs {', '.join(taken)} to have no patch mapping in transformers, got one.")

    def add() -> None:
        register_names()
        register_patch_mapping(mapping)

    hook = Hook(f"patch mapping of {', '.join(made)}", add, lambda _: unregister_patch_mapping(list(mapping)), check)
    return Patch("headfold in transformers", (hook,), (REQUIRES,)).apply()


def register_names() -> None:
    """Make the name "headfold" known as an attention and as its mask; it stays, and no model uses it unasked."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask_for)


def check_mask_function(op: str) -> None:
    """Refuse a transformers that asks mask functions for something else than this one gives."""
    found = re.sub(r"mask_function=<[^>]*>", "mask_function", signature_of(sdpa_mask))
    if found != MASK:
        raise PatchError(f"{op}: transformers.masking_utils.sdpa_mask must take {MASK}, got {found}.")


def _attention(op: str, model_type: ModelType, asked: bool | None) -> bool:
    """Return whether attention is put on headfold, refusing what a type cannot do."""
    if asked and model_type.own_attention:
        raise PatchError(
            f"{op}: attention must be None or False for {model_type.folder}, got True: {model_type.own_attention}."
        )
    if asked is False and model_type.signature == BLOCKS:
        raise PatchError(
            f"{op}: attention must be None or True for {model_type.folder}, got False: its indexer reads out of the "
            "mask which keys make a block, and a mask of queries by keys may hold other blocks in each row."
        )
    return not model_type.own_attention if asked is None else asked


def _forward(model_type: ModelType, indexer: nn.Module) -> Replace:
    # Read through the class, so that what another patch bound to the instance is not taken for it.
    forward = MethodType(FORWARDS[model_type.signature], indexer)
    return Replace(indexer, "forward", forward, f"(self, {model_type.signature[1:]}")


def _selects(attention: nn.Module) -> Replace:
    build: Any = selecting(getattr(type(attention), BUILD_MASK))
    return Replace(attention, BUILD_MASK, MethodType(build, attention), FROM_SELECTION)


def _class(model_type: ModelType) -> type[nn.Module]:
    indexer = model_type.indexer
    members = {
        "forward": FORWARDS[model_type.signature],
        "__module__": __name__,
        "__doc__": f"{indexer.__name__} on headfold.",
    }
    return type(f"Headfold{indexer.__name__}", (indexer,), members)


def _selecting_class(attention: type[nn.Module]) -> type[nn.Module]:
    members = {BUILD_MASK: selecting(getattr(attention, BUILD_MASK)), "__module__": __name__}
    return type(f"Headfold{attention.__name__}", (attention,), members)


def _state(module: nn.Module, state: LayerState) -> Hook:
    def check() -> None:
        if hasattr(module, STATE):
            raise PatchError(f"needs a {type(module).__name__} that is not on headfold yet, got one. Undo its patch.")

    def put() -> None:
        setattr(module, STATE, state)

    return Hook(f"state of {type(module).__name__} at {id(module):#x}", put, lambda _: delattr(module, STATE), check)


def _trainable(model: nn.Module, indexers: list[nn.Module], *, freeze: bool) -> Hook:
    """Let gradients reach the indexers, and freeze the rest where asked to."""

    def put() -> list[tuple[nn.Parameter, bool]]:
        before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        if freeze:
            model.requires_grad_(False)
        for indexer in indexers:
            indexer.requires_grad_(True)
        return before

    def back(before: list[tuple[nn.Parameter, bool]]) -> None:
        for parameter, required in before:
            parameter.requires_grad_(required)

    return Hook("gradients of indexers", put, back)


def _passes(model: nn.Module, training: Training) -> Hook:
    """Begin and end every forward pass with a carrier of its own."""

    def put() -> list[Any]:
        begin = model.register_forward_pre_hook(training.begin, with_kwargs=True)
        return [begin, model.register_forward_hook(training.end, with_kwargs=True, always_call=True)]

    def back(handles: list[Any]) -> None:
        for handle in handles:
            handle.remove()

    return Hook("forward hooks", put, back)
