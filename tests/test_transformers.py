from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import StaticCache
from transformers.masking_utils import bidirectional_mask_function, sliding_window_causal_mask_function

from headfold import UnsupportedError
from headfold.integrations.transformers import apply
from headfold.integrations.transformers.masks import visible_keys
from headfold.lanes.budget import spend
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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_cached_decode_agrees_with_one_full_forward(name: str, kind: str, side: str) -> None:
    model, ids = build(name).double(), tokens(2, 30)
    mask = padding_of(ids, side)
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


@pytest.mark.parametrize(("kind", "side"), [(None, "left"), ("static", "left"), (None, "right")])
@pytest.mark.parametrize("name", NAMES)
def test_generated_tokens_are_those_of_stock(name: str, kind: str | None, side: str) -> None:
    model, ids = build(name), tokens(2, 19)
    mask = padding_of(ids, side)
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


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_nothing(name: str) -> None:
    model, ids = build(name).double(), tokens(2, 33)
    with in_float64(name), apply(model):
        model.train()
        plain = step(model, ids, None)
        model.activation_checkpointing_enable()
        checkpointed = step(model, ids, None)
    assert not far_apart(checkpointed, plain, 1e-14)


def test_a_patched_model_compiles_as_one_graph() -> None:
    model, ids = build("glm_moe_dsa", mlp_layer_types=["dense"] * 4), tokens(2, 20)
    mask = padding_of(ids, "left")
    with apply(model), torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        whole: Any = torch.compile(model, fullgraph=True, backend="eager")
        compiled = whole(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.compiler.reset()
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


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
