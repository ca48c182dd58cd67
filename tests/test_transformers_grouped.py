"""Types whose indexers score groups of keys: compressed keys, pools, blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from headfold import UnsupportedError
from headfold.integrations.patching import PatchError
from headfold.integrations.transformers import MODEL_TYPES, apply, register
from test_transformers import cache_of, packed_positions
from test_transformers_memory import largest
from test_transformers_patches import identities
from tiny_models import GROUPED_NAMES, build, config_of, far_apart, in_float64, one_thread, padding_of, step, tokens

__all__ = ["one_thread"]
ATTENDING = [name for name in GROUPED_NAMES if not MODEL_TYPES[name].own_attention]


@pytest.fixture(params=GROUPED_NAMES)
def name(request: Any) -> Iterator[str]:
    """Every type, in float64."""
    with in_float64(request.param):
        yield request.param


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_patched_and_stock_are_one_model(name: str, side: str) -> None:
    model, ids = build(name).double(), tokens(2, 41)
    mask = padding_of(ids, side)
    stock = step(model, ids, mask)
    with apply(model):
        patched = step(model, ids, mask)
    assert len(stock) > 40
    assert not far_apart(patched, stock, 1e-11)
    if name == "glm5_next_text":
        with apply(model, attention=False):
            assert not far_apart(step(model, ids, mask), stock, 1e-11)
        with apply(model):
            model.config.text_config._attn_implementation = "sdpa"
            assert not far_apart(step(model, ids, mask), stock, 1e-11)
            model.config.text_config._attn_implementation = "headfold"


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_rows_that_see_no_group_or_one_are_those_of_stock(name: str, length: int) -> None:
    model, ids = build(name).double(), tokens(2, length)
    with torch.no_grad():
        stock = model(input_ids=ids, use_cache=False).logits
        with apply(model):
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, stock, rtol=0, atol=1e-11)


def test_packed_positions_are_those_of_stock(name: str) -> None:
    model, ids = build(name).double(), tokens(2, 41)
    positions = packed_positions(17, 3, 21).expand(2, -1)
    stock = step(model, ids, None, position_ids=positions)
    with apply(model):
        patched = step(model, ids, None, position_ids=positions)
        together = step(model, ids, None)
    assert not far_apart(patched, stock, 1e-11)
    if name != "glm5_next_text":  # it has no positions
        assert far_apart({"logits": patched["logits"]}, {"logits": together["logits"]}, 1e-3)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decode_agrees_with_one_full_forward_and_with_stock(name: str, side: str, kind: str) -> None:
    if kind == "static" and name == "deepseek_v4":
        pytest.skip("deepseek_v4 has no static cache")
    model, ids = build(name).double(), tokens(2, 30)
    mask = padding_of(ids, side)
    assert mask is not None
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def in_parts() -> Tensor:
        cache, parts = cache_of(model, kind, 37), []
        for first, end in [(0, 14), (14, 21), *((i, i + 1) for i in range(21, 30))]:
            part = {"attention_mask": mask[:, :end], "position_ids": positions[:, first:end]}
            parts.append(model(input_ids=ids[:, first:end], past_key_values=cache, use_cache=True, **part).logits)
        return torch.cat(parts, 1)

    kept = mask.bool()
    with torch.no_grad():
        stock = in_parts()
        with apply(model):
            patched = in_parts()
            whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(patched[kept], stock[kept], rtol=0, atol=1e-10)
    if (name, side) != ("deepseek_v4", "left"):  # there stock differs from itself
        torch.testing.assert_close(patched[kept], whole[kept], rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["none", "left"])
def test_generated_tokens_are_those_of_stock(name: str, side: str) -> None:
    model, ids = build(name).double(), tokens(2, 19)
    run = {"attention_mask": padding_of(ids, side), "max_new_tokens": 8, "do_sample": False}
    stock = model.generate(ids, **run)
    with apply(model):
        assert torch.equal(model.generate(ids, **run), stock)
    assert len(set(stock[0, 19:].tolist())) > 2


@pytest.mark.parametrize("kind", ATTENDING)
def test_no_op_makes_a_tensor_of_queries_by_keys(kind: str) -> None:
    few: dict[str, Any] = {"linear_num_heads": 1, "linear_head_dim": 4} if kind == "glm5_next_text" else {}
    model, s = build(kind, **few), 390  # 390 · 390 elements are more than all that grows with the length alone
    ids = tokens(1, s)
    mask = torch.ones_like(ids)
    mask[:, :9] = 0
    with apply(model), largest() as patched:
        step(model, ids, mask)
    assert patched.elements < s * s, patched.op


def test_the_scorer_of_compressed_keys_holds_no_heads() -> None:
    model, s = build("deepseek_v4"), 1200
    indexer = model.model.layers[0].self_attn.compressor.indexer
    inputs = torch.randn(1, s, 40), torch.randn(1, s, 28), torch.arange(s)[None], None, 0
    with largest() as stock:
        indexer(*inputs)
    assert stock.elements >= 16 * s * (s // 3)
    with apply(model), largest() as patched:
        indexer(*inputs)
    assert patched.elements < s * (s // 3), patched.op


@pytest.mark.parametrize("kind", GROUPED_NAMES)
def test_undo_restores_identity_and_the_state_dict_never_changes(kind: str) -> None:
    model = build(kind)
    before, state = identities(model), list(model.state_dict())
    with apply(model):
        assert identities(model) != before
        assert list(model.state_dict()) == state
    assert identities(model) == before


@pytest.mark.parametrize("kind", GROUPED_NAMES)
def test_registered_models_are_made_on_headfold(kind: str) -> None:
    ids, source = tokens(2, 20), build(kind)
    with torch.no_grad():
        stock = source(input_ids=ids).logits
    asked = {"attn_implementation": "headfold"} if kind in ATTENDING else {}
    with register(kind.removesuffix("_text")):
        made = type(source)._from_config(config_of(kind), **asked).eval()
        scorer_alone = type(source)._from_config(config_of(kind)).eval()
    assert {type(m).__name__ for m in made.modules()} >= {f"Headfold{MODEL_TYPES[kind].indexer.__name__}"}
    models = [made] if kind == "qwen4_exp_text" else [made, scorer_alone]
    for model in models:
        model.load_state_dict(source.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, stock, rtol=0, atol=1e-4)
    if kind == "qwen4_exp_text":
        with pytest.raises(UnsupportedError, match="got one with a row per query"):
            scorer_alone(input_ids=ids)


@pytest.mark.parametrize(
    ("kind", "arguments", "sentence"),
    [
        ("deepseek_v4", {"attention": True}, "attention must be None or False for deepseek_v4, got True"),
        ("qwen4_exp_text", {"attention": False}, "attention must be None or True for qwen4_exp, got False"),
        ("glm5_next_text", {"indexer_loss_coeff": 1.0}, "got Glm5NextTextIndexer, which scores groups of them"),
        ("deepseek_v4", {"indexer_loss_coeff": 1.0}, "got DeepseekV4Indexer, which scores groups of them"),
    ],
)
def test_what_a_type_cannot_do_is_refused(kind: str, arguments: dict[str, Any], sentence: str) -> None:
    model = build(kind)
    before = identities(model)
    with pytest.raises(PatchError, match=sentence):
        apply(model, **arguments)
    assert identities(model) == before


def test_a_mask_with_a_row_per_query_is_refused_where_it_says_what_a_block_is() -> None:
    model, ids = build("qwen4_exp_text"), tokens(1, 9)
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    with apply(model), pytest.raises(UnsupportedError, match="got one with a row per query"):
        model(input_ids=ids, attention_mask={"indexed_attention": mask, "linear_attention": None})


def test_an_attention_that_stays_the_model_s_own_is_refused_under_the_name_of_ours() -> None:
    model = transformers.DeepseekV4ForCausalLM._from_config(config_of("deepseek_v4"), attn_implementation="headfold")
    with pytest.raises(UnsupportedError, match="got deepseek_v4, which keeps its own: it reads a window"):
        model(input_ids=tokens(1, 9))
