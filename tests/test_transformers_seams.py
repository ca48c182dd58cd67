"""Where a model's parts meet: dtypes, compiled decoding, encoders beside the text, and seams of other versions."""

from __future__ import annotations

import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CompileConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.axk2 import modeling_axk2

from headfold import UnsupportedError
from headfold.integrations.patching import PatchError
from headfold.integrations.transformers import MODEL_TYPES, apply, patches, register
from headfold.lanes.budget import spend
from test_transformers_patches import identities
from tiny_models import GROUPED_NAMES, NAMES, build, config_of, in_float64, one_thread, padding_of, step, tokens

__all__ = ["one_thread"]
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["deepseek_v32", "hy_v4"])
def test_half_precision_keeps_the_error_budget_beside_stock(name: str, dtype: torch.dtype) -> None:
    """One layer: further ones could select otherwise for what the first one rounds."""
    model, ids = build(name, num_hidden_layers=1, mlp_layer_types=["dense"], **indexers(name)).to(dtype), tokens(2, 41)
    mask = padding_of(ids, "left")
    bases = []
    for kind in ["eager"] if name == "hy_v4" else ["eager", "sdpa"]:
        model.set_attn_implementation(kind)
        bases += [step(model, ids, mask, uncounted=rows) for rows in range(2)]
    with apply(model):
        got = step(model, ids, mask)
    with in_float64(name):
        truth = step(model.double(), ids, mask)
    assert got["logits"].dtype == dtype
    for entry in got:
        # The loss is float32, of logits that are not.
        given = [found[entry].to(dtype).flatten() for found in (got, *bases)]
        spent = spend(given[0], truth[entry].flatten(), given[1:])
        assert spent.kept, (entry, spent)


def indexers(name: str) -> dict[str, Any]:
    return {"indexer_types": ["full"]} if name == "hy_v4" else {}


@pytest.mark.parametrize("name", [*NAMES, *GROUPED_NAMES])
def test_autocast_trains_as_stock_does_under_it(name: str) -> None:
    """Rotary parts leave query and key in two dtypes there."""
    model, ids = build(name).train(), tokens(2, 33)

    def loss() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        taken = out.indexer_losses.total.detach() if hasattr(out, "indexer_losses") else 0.0
        return float(out.loss.detach() - taken)

    stock = loss()
    with apply(model):
        assert loss() == pytest.approx(stock, rel=0.02)
    if MODEL_TYPES[name].keys_are_scored:
        with apply(model, indexer_loss_coeff=1.0):
            assert loss() == pytest.approx(stock, rel=0.02)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_generates_what_its_own_full_forward_says(dtype: torch.dtype) -> None:
    model, ids = build("glm_moe_dsa").to(dtype), tokens(2, 19)
    mask = padding_of(ids, "left")
    assert mask is not None
    with apply(model), torch.no_grad():
        made = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        mask = torch.cat([mask, torch.ones_like(made[:, 19:])], 1)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=made, attention_mask=mask, position_ids=places, use_cache=False).logits[:, 18:-1]
    chosen = logits.gather(-1, made[:, 19:, None]).squeeze(-1)
    assert (chosen >= logits.amax(-1) - 0.05 * logits.float().std()).all()
    assert len(set(made[0, 19:].tolist())) > 2


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_trains_indexers_as_float64_does(dtype: torch.dtype) -> None:
    model, ids = build("deepseek_v32", num_hidden_layers=1, mlp_layer_types=["dense"]).to(dtype).train(), tokens(2, 33)
    found = []
    for kind in (dtype, torch.float64):
        exact = in_float64("deepseek_v32") if kind == torch.float64 else torch.enable_grad()
        with exact, apply(model.to(kind), indexer_loss_coeff=1.0, sparse=False):
            grads = step(model, ids, None)
            loss = model(input_ids=ids).indexer_losses.total
        found.append((float(loss.detach()), {n: x for n, x in grads.items() if "indexer" in n}))
    (loss, grads), (wanted, truth) = found
    assert abs(loss - wanted) < 0.03 * wanted
    for name, x in grads.items():
        assert x.dtype == dtype
        angle = torch.nn.functional.cosine_similarity(x.double().flatten(), truth[name].flatten(), 0)
        assert angle > 0.98, (name, angle)


def compiled(backend: str) -> Any:
    """What `generate` compiles with for a static cache, on every device."""
    found: Any = CompileConfig(fullgraph=True, backend=backend, mode=None, dynamic=False)  # type: ignore[arg-type]
    found._compile_all_devices = True
    return found


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own, in its compiler
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_static_cache_decodes_in_one_compiled_graph(backend: str) -> None:
    model, ids = build("deepseek_v32", num_hidden_layers=2, mlp_layer_types=["dense"] * 2), tokens(2, 19)
    run: dict[str, Any] = {"attention_mask": padding_of(ids, "left"), "max_new_tokens": 6, "do_sample": False}
    run["cache_implementation"] = "static"
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with apply(model):
        plain = model.generate(ids, **run, disable_compile=True)
        made = model.generate(ids, **run, compile_config=compiled(backend))
    counted = torch._dynamo.utils.counters
    torch.compiler.reset()
    assert torch.equal(made, plain)
    assert counted["stats"]["unique_graphs"] == 1
    assert not counted["graph_break"]


def test_an_encoder_beside_the_text_runs_on_sdpa_under_the_same_name() -> None:
    made = {}
    for kind in ("sdpa", "headfold"):
        torch.manual_seed(0)
        with register("mistral_large4"):
            model = transformers.MistralLarge4ForConditionalGeneration._from_config(
                config_of("mistral_large4_text"), attn_implementation=kind
            ).eval()
        tower = next(m for m in model.modules() if type(m).__name__ == "PixtralVisionModel")
        assert tower.config._attn_implementation == kind
        pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            made[kind] = tower(pixels, image_sizes=torch.tensor([[16, 16]])).last_hidden_state
    assert torch.equal(made["headfold"], made["sdpa"])


def audio_config(attention: str) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model("dots3_note_audio_encoder", **sizes, adapter_input_size=16)
    config._attn_implementation = attention
    return config


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_gets_the_mask_of_sdpa(padded: bool) -> None:
    config, embeds = audio_config("headfold"), torch.randn(2, 9, 16)
    patches.register_names()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = not padded
    ours: Any = create_bidirectional_mask(config, embeds, mask)
    config._attn_implementation = "sdpa"
    sdpa: Any = create_bidirectional_mask(config, embeds, mask)
    assert (ours is None) == (sdpa is None) == (not padded)
    assert ours is None or torch.equal(ours, sdpa)


def test_a_decoder_that_is_not_covered_is_refused_under_the_name_of_ours() -> None:
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    patches.register_names()
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="headfold")
    with pytest.raises(UnsupportedError, match=r"serves deepseek_v32, .*, got llama"):
        model(input_ids=tokens(1, 5))
    seen = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    with pytest.raises(UnsupportedError, match="got llama"):
        model(input_ids=tokens(1, 5), attention_mask=seen)


def other(*_: Any, **__: Any) -> Tensor:
    raise AssertionError


@pytest.mark.parametrize("call", [apply, lambda model: register("axk2")], ids=["apply", "register"])
@pytest.mark.parametrize("place", ["attention", "mask"])
def test_a_seam_that_takes_something_else_is_refused_with_what_was_found(place: str, call: Any) -> None:
    model = build("axk2")
    before = identities(model)
    owner, name = (modeling_axk2, "eager_attention_forward") if place == "attention" else (patches, "sdpa_mask")
    with (
        mock.patch.object(owner, name, other),
        pytest.raises(PatchError, match=rf"{name} must take \(.*\), got \(\*_, \*\*__\)"),
    ):
        call(model)
    assert identities(model) == before


def test_pools_whose_selection_is_handed_on_otherwise_are_refused() -> None:
    model = build("glm5_next_text")
    attention = type(model.model.language_model.layers[1].self_attn)
    with (
        mock.patch.object(attention, "build_attention_mask_from_topk", other),
        pytest.raises(PatchError, match=r"build_attention_mask_from_topk must take \(self, topk_indices"),
    ):
        apply(model)


OLD = """
import sys, types
old = types.ModuleType("transformers")
old.__version__ = "4.57.0"
sys.modules["transformers"] = old
try:
    import headfold.integrations.transformers
except ImportError as error:
    sys.stdout.write(str(error))
"""


def test_a_version_that_lacks_what_is_imported_is_named_at_import() -> None:
    done = subprocess.run([sys.executable, "-c", OLD], capture_output=True, text=True, check=True)
    assert done.stdout == "headfold.integrations.transformers: needs transformers >= 5.23, < 5.24, got 4.57.0."


@pytest.mark.parametrize("name", NAMES)
def test_names_of_whole_models_and_of_their_text_are_one(name: str) -> None:
    with register(name.removesuffix("_text")) as one:
        found = str(one.status())
    with register(name) as two:
        assert str(two.status()) == found
