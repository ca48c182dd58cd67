from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from types import MethodType
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.monkey_patching import get_patch_mapping

from headfold import UnsupportedError
from headfold.integrations.patching import PatchError
from headfold.integrations.transformers import apply, register
from tiny_models import NAMES, build, config_of, one_thread, tokens

__all__ = ["one_thread"]


def identities(model: Any) -> dict[str, object]:
    """All that a model's modules and configuration hold, by identity."""
    held: dict[str, object] = {
        f"{name}.{key}": id(x) for name, m in model.named_modules() for key, x in vars(m).items()
    }
    for name, m in model.named_modules():
        for table in (m._forward_hooks, m._forward_pre_hooks, m._parameters, m._buffers):
            held |= {f"{name}#{len(held)}": (key, id(x)) for key, x in table.items()}
        if hasattr(m, "config"):
            held |= {f"{name}.config.{key}": id(x) for key, x in vars(m.config).items()}
    return held


@pytest.mark.parametrize("name", NAMES)
def test_undo_restores_identity_and_the_state_dict_never_changes(name: str) -> None:
    model = build(name)
    before, state = identities(model), list(model.state_dict())
    required = [parameter.requires_grad for parameter in model.parameters()]
    patch = apply(model, indexer_loss_coeff=1.0, stage="indexer")
    assert identities(model) != before
    assert list(model.state_dict()) == state
    assert "forward" in str(patch.status())
    with pytest.raises(PatchError, match="not on headfold yet"):
        apply(model)
    patch.undo()
    assert identities(model) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    with apply(model):
        assert identities(model) != before
    assert identities(model) == before


def test_two_models_are_patched_apart() -> None:
    one, two, ids = build("glm_moe_dsa"), build("glm_moe_dsa", seed=1), tokens(1, 20)
    first, second = apply(one), apply(two)
    first.undo()
    assert one.config._attn_implementation == "sdpa"
    with torch.no_grad():
        patched = two(input_ids=ids).logits
        second.undo()
        torch.testing.assert_close(patched, two(input_ids=ids).logits, rtol=0, atol=1e-4)


def test_a_copy_of_a_patched_model_runs_on_its_own_indexers() -> None:
    model, ids = build("glm_moe_dsa").train(), tokens(1, 20)
    with apply(model, indexer_loss_coeff=1.0):
        copy = deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert all(loss > 1e-3 for loss in copy(input_ids=ids).indexer_losses.layers.values())
        assert all(loss == 0 for loss in model(input_ids=ids).indexer_losses.layers.values())


def test_other_model_types_are_refused_by_name() -> None:
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(PatchError, match=r"one of deepseek_v32, .*, got 'llama'"):
        apply(transformers.LlamaForCausalLM(config))
    for name in ("minimax_m3_vl", "llama"):
        with pytest.raises(PatchError, match=f"got '{name}'"):
            register(name)
    with pytest.raises(TypeError, match="must be a PreTrainedModel, got Linear"):
        apply(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_a_model_without_an_indexer_is_refused() -> None:
    with pytest.raises(PatchError, match="layers with an indexer, got none in Dots3NoteForCausalLM"):
        apply(build("dots3_note_text", layer_types=["sliding_attention"] * 4))


@pytest.mark.parametrize("call", [apply, lambda model: register()])
def test_another_version_is_refused_with_what_was_found(call: Any) -> None:
    model = build("axk2")
    before = identities(model)
    with (
        mock.patch.object(sys.modules["transformers"], "__version__", "5.24.0"),
        pytest.raises(PatchError, match=r"needs transformers >= 5.23, < 5.24, got 5.24.0"),
    ):
        call(model)
    assert identities(model) == before
    assert not get_patch_mapping()


def test_another_signature_is_refused_with_what_was_found() -> None:
    def forward(self: Any, hidden_states: Tensor, mask: Tensor) -> Tensor:
        return hidden_states

    model = build("axk2")
    before = identities(model)
    indexer = type(model.model.layers[0].self_attn.indexer)
    with mock.patch.object(indexer, "forward", forward):
        found = r"past_key_values=None\), got \(self, hidden_states, mask\)"
        with pytest.raises(PatchError, match=found):
            apply(model)
        with pytest.raises(PatchError, match=found):
            register("axk2")
    assert identities(model) == before
    model.model.layers[3].self_attn.indexer.forward = MethodType(forward, indexer)
    with pytest.raises(PatchError, match="got"):
        apply(model)


def test_an_indexer_without_a_part_of_its_scorer_is_refused() -> None:
    model = build("axk2")
    del model.model.layers[1].self_attn.indexer.k_norm
    with pytest.raises(PatchError, match="AXK2Indexer must have k_norm"):
        apply(model)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"stage": "warmup"}, "stage must be one of 'indexer', 'joint', got 'warmup'"),
        ({"sparse": 2}, "sparse must be one of None, True, False, got 2"),
        ({"workspace": -1}, "workspace must be at least 0 bytes, got -1"),
        ({"indexer_loss_coeff": "1"}, "indexer_loss_coeff must be a Python number, got str"),
        ({"indexer_loss_coeff": 1.0, "attention": False}, "needs attention=True, got False"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(arguments: dict[str, Any], sentence: str) -> None:
    model = build("axk2")
    before = identities(model)
    with pytest.raises((TypeError, ValueError), match=sentence):
        apply(model, **arguments)
    assert identities(model) == before


def test_dropout_is_refused() -> None:
    model = build("axk2", attention_dropout=0.1).train()
    with apply(model), pytest.raises(UnsupportedError, match=r"has no dropout, got 0.1"):
        model(input_ids=tokens(1, 9))


def indexers_of(model: Any) -> set[str]:
    return {type(m).__name__ for m in model.modules() if hasattr(m, "weights_proj")}


@pytest.mark.parametrize("name", NAMES)
def test_registered_models_are_made_on_headfold(name: str) -> None:
    ids, source = tokens(2, 20), build(name)
    with torch.no_grad():
        stock = source(input_ids=ids).logits
    with register(name):
        made = type(source)._from_config(config_of(name), attn_implementation="headfold").eval()
    (indexer,) = indexers_of(source)
    assert indexers_of(made) == {f"Headfold{indexer}"}
    made.load_state_dict(source.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(made(input_ids=ids).logits, stock, rtol=0, atol=1e-4)


def test_registered_models_are_loaded_on_headfold_until_undo(tmp_path: Path) -> None:
    ids, source = tokens(2, 20), build("glm_moe_dsa")
    source.save_pretrained(tmp_path)
    with register():
        both = type(source).from_pretrained(tmp_path, attn_implementation="headfold")
        scorer_alone = type(source).from_pretrained(tmp_path)
    plain = type(source).from_pretrained(tmp_path)
    assert indexers_of(both) == indexers_of(scorer_alone) == {"HeadfoldGlmMoeDsaIndexer"}
    assert indexers_of(plain) == {"GlmMoeDsaIndexer"}
    assert both.config._attn_implementation == "headfold"
    with torch.no_grad():
        stock = source(input_ids=ids).logits
        for model in (both, scorer_alone, plain):
            torch.testing.assert_close(model(input_ids=ids).logits, stock, rtol=0, atol=1e-4)
    with apply(both, indexer_loss_coeff=1.0):
        assert len(both.train()(input_ids=ids).indexer_losses.layers) == 2
    with torch.no_grad():
        torch.testing.assert_close(both.eval()(input_ids=ids).logits, stock, rtol=0, atol=1e-4)


def test_registering_twice_is_refused_and_undone() -> None:
    patch = register("glm_moe_dsa")
    with pytest.raises(PatchError, match="needs GlmMoeDsaIndexer to have no patch mapping"):
        register()
    patch.undo()
    assert not get_patch_mapping()
    with register():
        assert len(get_patch_mapping()) == 10
        assert isinstance(AutoModelForCausalLM.from_config(config_of("axk2")), transformers.AXK2ForCausalLM)
