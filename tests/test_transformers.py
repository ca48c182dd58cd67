from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import MethodType
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, StaticCache
from transformers.masking_utils import bidirectional_mask_function, sliding_window_causal_mask_function
from transformers.monkey_patching import get_patch_mapping

from headfold import UnsupportedError
from headfold.integrations.patching import PatchError
from headfold.integrations.transformers import apply, register
from headfold.integrations.transformers.masks import visible_keys
from headfold.lanes.budget import spend
from headfold.lanes.measure import allocator_peak, in_fresh_process, process_peak
from headfold.model_plan import plan_model
from headfold.transformers_plan import from_config, stock_step
from tiny_models import NAMES, build, config_of, far_apart, in_float64, one_thread, padding_of, step, tokens

__all__ = ["one_thread"]
PADDING = ("none", "left", "right")


@pytest.mark.parametrize("side", PADDING)
@pytest.mark.parametrize("name", NAMES)
def test_patched_and_stock_are_one_model_in_float64(name: str, side: str) -> None:
    model, ids = build(name).double(), tokens(2, 41)
    mask = padding_of(ids, side)
    with in_float64(name):
        stock = step(model, ids, mask)
        with apply(model):
            patched = step(model, ids, mask)
        with apply(model, attention=False):
            scorer_alone = step(model, ids, mask)
    assert len(stock) > 40
    assert not any("indexer" in entry for entry in stock)
    assert not far_apart(patched, stock, 1e-11)
    assert not far_apart(scorer_alone, stock, 1e-11)


@pytest.mark.parametrize("side", PADDING)
@pytest.mark.parametrize("name", NAMES)
def test_patched_keeps_the_error_budget_beside_eager_and_sdpa(name: str, side: str) -> None:
    ids = tokens(2, 41)
    mask = padding_of(ids, side)
    model = build(name)
    kinds = ["eager"] if name == "hy_v4" else ["eager", "sdpa"]  # hy_v4 has no sdpa
    bases = []
    for kind in kinds:
        model.set_attn_implementation(kind)
        # Beside rows that do not count, sums over the batch and products are rounded otherwise.
        bases += [step(model, ids, mask, uncounted=rows) for rows in range(4)]
    with apply(model):
        got = step(model, ids, mask)
    with in_float64(name):
        truth = step(model.double(), ids, mask)
    got, truth, *bases = (rows(x) for x in (got, truth, *bases))
    for entry, x in got.items():
        spent = spend(x, truth[entry], [base[entry] for base in bases])
        assert spent.kept, (entry, spent)


def rows(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flatten results to rows; vectors of a few numbers, lucky in one layer or another, are one row over the layers."""
    joined: dict[str, list[Tensor]] = {}
    for name, x in result.items():
        entry = re.sub(r"\.\d+\.", ".", name) if x.dim() == 1 else name
        joined.setdefault(entry, []).append(x.flatten())
    return {entry: torch.cat(parts) for entry, parts in joined.items()}


def packed_positions(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("name", NAMES)
def test_packed_positions_keep_sequences_apart(name: str) -> None:
    model, ids = build(name).double(), tokens(2, 41)
    positions = packed_positions(17, 3, 21).expand(2, -1)
    with in_float64(name):
        stock = step(model, ids, None, position_ids=positions)
        with apply(model):
            patched = step(model, ids, None, position_ids=positions)
            together = step(model, ids, None)
            other = ids.clone()
            other[:, :20] = ids[:, :20].flip(1)
            elsewhere = step(model, other, None, position_ids=positions)
    assert not far_apart(patched, stock, 1e-11)
    assert far_apart({"logits": patched["logits"]}, {"logits": together["logits"]}, 1e-3)
    last = patched["logits"].view(2, 41, -1)[:, 20:], elsewhere["logits"].view(2, 41, -1)[:, 20:]
    torch.testing.assert_close(*last, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_a_bool_mask_of_the_callers_hides_what_it_hides_in_stock(name: str) -> None:
    model, ids = build(name, attention="eager" if name == "hy_v4" else "sdpa").double(), tokens(2, 30)
    causal = torch.ones(30, 30, dtype=torch.bool).tril()
    mask = causal & (torch.rand(2, 1, 30, 30, generator=torch.Generator().manual_seed(5)) < 0.7) | torch.eye(30).bool()
    additive = torch.zeros(2, 1, 30, 30).double().masked_fill(~mask, torch.finfo(torch.float64).min)
    with in_float64(name), torch.no_grad():
        stock = model(input_ids=ids, attention_mask=additive if name == "hy_v4" else mask, use_cache=False).logits
        with apply(model):
            patched = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            with pytest.raises(UnsupportedError, match=r"dtype bool, got torch\.float64"):
                model(input_ids=ids, attention_mask=additive, use_cache=False)
    torch.testing.assert_close(patched, stock, rtol=0, atol=1e-10)


def cache_of(model: Any, kind: str, longest: int) -> Any:
    config = model.config.get_text_config()
    return StaticCache(config, max_cache_len=longest) if kind == "static" else transformers.DynamicCache(config=config)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_cached_decode_agrees_with_one_full_forward(name: str, kind: str) -> None:
    model, ids = build(name).double(), tokens(2, 30)
    mask = padding_of(ids, "left")
    assert mask is not None
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with in_float64(name), torch.no_grad(), apply(model):
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cache, parts = cache_of(model, kind, 37), []
        for first, end in [(0, 14), (14, 21), *((i, i + 1) for i in range(21, 30))]:
            part = {"attention_mask": mask[:, :end], "position_ids": positions[:, first:end]}
            parts.append(model(input_ids=ids[:, first:end], past_key_values=cache, use_cache=True, **part).logits)
    kept = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[kept], whole[kept], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [None, "static"])
@pytest.mark.parametrize("name", NAMES)
def test_generated_tokens_are_those_of_stock(name: str, kind: str | None) -> None:
    model, ids = build(name), tokens(2, 19)
    mask = padding_of(ids, "left")
    run = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "cache_implementation": kind}
    stock = model.generate(ids, **run)
    with apply(model):
        patched = model.generate(ids, **run)
        beams = model.generate(ids, **{**run, "max_new_tokens": 3}, num_beams=2) if kind is None else None
    assert torch.equal(patched, stock)
    assert len(set(stock[0, 19:].tolist())) > 2
    if beams is not None:
        assert torch.equal(beams, model.generate(ids, **{**run, "max_new_tokens": 3}, num_beams=2))


def tied(name: str) -> Any:
    """A model whose scores are all exactly zero: every key of a row ties."""
    model = build(name).double()
    for entry, parameter in model.named_parameters():
        if "weights_proj" in entry:
            torch.nn.init.zeros_(parameter)
    return model


@torch.no_grad()
def decoding_differs(model: Any, ids: Tensor) -> float:
    whole = model(input_ids=ids, use_cache=False).logits
    cache, first = transformers.DynamicCache(config=model.config.get_text_config()), ids.shape[1] - 6
    model(input_ids=ids[:, :first], past_key_values=cache, use_cache=True)
    rows = [
        model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
        for i in range(first, len(ids[0]))
    ]
    return float((torch.cat(rows, 1) - whole[:, first:]).abs().max())


def test_ties_go_to_the_smallest_key_so_that_decode_agrees_with_its_own_prefill() -> None:
    model, ids = tied("deepseek_v32"), tokens(1, 60)
    with in_float64("deepseek_v32"):
        assert decoding_differs(model, ids) > 1e-3
        with apply(model):
            assert decoding_differs(model, ids) < 1e-10


class Largest(TorchDispatchMode):
    """The largest storage, in elements, that any op returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements, self.op = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                elements = x.untyped_storage().nbytes() // x.element_size()
                if elements > self.elements:
                    self.elements, self.op = elements, str(func)
        return result


@contextmanager
def largest() -> Iterator[Largest]:
    with Largest() as mode:
        yield mode


@pytest.mark.parametrize("name", NAMES)
def test_no_op_of_the_model_makes_a_tensor_of_queries_by_keys(name: str) -> None:
    model, s = build(name), 390  # 390 · 390 elements are more than all that grows with the length alone
    ids = tokens(1, s)
    mask = torch.ones_like(ids)
    mask[:, :9] = 0
    with largest() as stock, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert stock.elements >= 16 * s * s, stock.op
    with apply(model):
        for given in (mask, None):
            with largest() as patched:
                step(model, ids, given)
            assert patched.elements < s * s, patched.op
    model.train()
    for stage in ("indexer", "joint"):
        with apply(model, indexer_loss_coeff=1.0, stage=stage), largest() as trained:
            step(model, ids, mask)
        assert trained.elements < s * s, trained.op


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_nothing(name: str) -> None:
    model, ids = build(name).double(), tokens(2, 33)
    with in_float64(name), apply(model):
        model.train()
        plain = step(model, ids, None)
        model.activation_checkpointing_enable()
        checkpointed = step(model, ids, None)
    assert not far_apart(checkpointed, plain, 1e-14)


def test_the_scorers_peak_falls_eightfold() -> None:
    model = build("deepseek_v32", num_hidden_layers=1, index_n_heads=32, mlp_layer_types=["dense"])
    indexer = model.model.layers[0].self_attn.indexer
    s = 1024
    hidden, latent = torch.randn(1, s, 40), torch.randn(1, s, 28)
    places = torch.arange(s)[None]
    turns = model.model.rotary_emb(hidden, places)
    causal = torch.ones(1, s, s, dtype=torch.bool).tril()

    def run() -> Any:
        with torch.no_grad():
            return indexer(hidden, latent, turns, causal, places)

    stock = allocator_peak(run, torch.device("cpu")).peak
    with apply(model, attention=False, workspace=16 << 20):
        patched = allocator_peak(run, torch.device("cpu")).peak
    assert stock > 2 * 4 * 32 * s * s
    assert patched * 8 < stock, (patched, stock)


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


def test_a_patched_model_compiles_as_one_graph() -> None:
    model, ids = build("glm_moe_dsa", mlp_layer_types=["dense"] * 4), tokens(2, 20)
    mask = padding_of(ids, "left")
    with apply(model), torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        whole: Any = torch.compile(model, fullgraph=True, backend="eager")
        compiled = whole(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.compiler.reset()
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


def test_a_copy_of_a_patched_model_runs_on_its_own_indexers() -> None:
    model, ids = build("glm_moe_dsa").train(), tokens(1, 20)
    with apply(model, indexer_loss_coeff=1.0):
        copy = deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert all(loss > 1e-3 for loss in copy(input_ids=ids).indexer_losses.layers.values())
        assert all(loss == 0 for loss in model(input_ids=ids).indexer_losses.layers.values())


def test_what_stands_for_a_mask_moves_between_devices() -> None:
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[0, :3] = False
    mask = visible_keys(2, 12, 12, mask_function=sliding_window_causal_mask_function(4), attention_mask=padding)
    moved = mask.to("cpu")[:, 0, :, :]
    assert mask.keys.start is not None
    assert moved.keys.start is not None
    assert mask.keys.start[0].tolist() == [0, 0, 0, *range(9)]
    assert torch.equal(moved.keys.start, mask.keys.start)
    assert moved.bias is not None
    assert moved.bias[0, 5].tolist() == [-torch.inf] * 3 + [0.0] * 9
    assert moved.bias.stride(1) == 0
    assert mask.to("meta").keys.start.device.type == "meta"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("use_vmap", "causal", "found"), [(True, True, "caller's"), (False, False, "a mask of both directions")]
)
def test_masks_that_are_no_range_are_refused(use_vmap: bool, causal: bool, found: str) -> None:
    config = config_of("axk2")
    config.is_causal = causal
    with pytest.raises(UnsupportedError, match=found):
        visible_keys(1, 4, 4, use_vmap=use_vmap, config=config)


def test_an_encoder_s_mask_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="a mask of both directions"):
        visible_keys(1, 4, 4, mask_function=bidirectional_mask_function, config=config_of("axk2"))


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


def forward_peak(patched: bool, s: int) -> int:
    """Bytes of the process for one forward of one layer with 32 indexer heads, in a fresh process."""
    torch.set_num_threads(1)
    sizes = {"num_hidden_layers": 1, "index_n_heads": 32, "mlp_layer_types": ["dense"]}
    model = build("deepseek_v32", attention="sdpa", **sizes)  # type: ignore[arg-type]
    if patched:
        apply(model)

    def run() -> None:
        with torch.no_grad():
            model(input_ids=tokens(1, s), use_cache=False, logits_to_keep=1)

    with torch.no_grad():
        model(input_ids=tokens(1, 64), use_cache=False)
    return process_peak(run)


@pytest.mark.slow
def test_the_process_s_peak_of_a_forward_falls_as_planned() -> None:
    s = 4096
    stock, patched = (in_fresh_process(forward_peak, patched, s) for patched in (False, True))
    config = config_of("deepseek_v32", num_hidden_layers=1, index_n_heads=32, mlp_layer_types=["dense"]).to_dict()
    bill = plan_model(from_config(config, "config", dtype="float32"), s, stock=stock_step)
    assert 0.8 * (bill.stock - bill.headfold) <= stock - patched <= 1.25 * (bill.stock - bill.headfold)
    assert patched * 8 < stock
