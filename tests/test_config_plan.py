from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from headfold.cli import app
from headfold.integrations.transformers import apply
from headfold.integrations.transformers.masks import visible_keys
from headfold.lanes.config_plan import config_plan
from headfold.lanes.measure import allocator_peak
from headfold.model_plan import plan_model
from headfold.transformers_plan import MODEL_TYPES, from_config, stock_step
from tiny_models import NAMES, build, config_of, one_thread

__all__ = ["one_thread"]
CPU = torch.device("cpu")
UNBILLED = 2 << 20  # the projections of a model this narrow, and what they give


def written(name: str, folder: Path, **changes: Any) -> Path:
    """Save a configuration as transformers does."""
    config_of(name, **changes).save_pretrained(folder)
    return folder / "config.json"


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_configuration_has_the_indexers_of_its_model(name: str, tmp_path: Path) -> None:
    shape = from_config(json.loads(written(name, tmp_path).read_text()), "config.json")
    model = build(name)
    attentions = [m for m in model.modules() if hasattr(m, "kv_b_proj")]
    indexed = [m for m in attentions if getattr(m, "sliding_window", None) is None]
    assert [layer.computes for layer in shape.layers] == [m.indexer is not None for m in indexed]
    assert {layer.np for layer in shape.layers} == {m.num_heads for m in indexed}
    assert {layer.hn for layer in shape.layers} == {m.qk_head_dim for m in indexed}


def test_patterns_that_files_leave_out_are_those_of_the_classes() -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
    sizes |= {"v_head_dim": 4, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "num_hidden_layers": 11}
    for kind, more in [("glm_moe_dsa", {"index_topk_freq": 3, "index_skip_topk_offset": 3}), ("hy_v4", {})]:
        config = {"glm_moe_dsa": transformers.GlmMoeDsaConfig, "hy_v4": transformers.HYV4Config}[kind]
        wanted = [name == "full" for name in config(num_hidden_layers=11, **more).indexer_types]
        shape = from_config({"model_type": kind, **sizes, **more}, "config.json")
        assert [layer.computes for layer in shape.layers] == wanted
    layers = list(transformers.Dots3NoteTextConfig(num_hidden_layers=11).layer_types or ())
    shape = from_config({"model_type": "dots3_note", **sizes}, "config.json")
    assert len(shape.layers) == layers.count("indexed_attention")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["stock", "headfold"])
@pytest.mark.parametrize(("np", "heads"), [(8, 1), (2, 8)])
def test_a_layers_peaks_are_the_planned_ones(np: int, heads: int, kind: str, dtype: str, tmp_path: Path) -> None:
    s = 1024
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "mlp_layer_types": ["dense"], "num_attention_heads": np}
    sizes |= {"num_key_value_heads": np, "index_n_heads": heads, "index_topk": 64}
    tree = json.loads(written("deepseek_v32", tmp_path, **sizes).read_text())
    model = build("deepseek_v32", attention="sdpa", **sizes).to(getattr(torch, dtype))
    hidden, places = torch.randn(1, s, 40).to(model.dtype), torch.arange(s)[None]
    turns = model.model.rotary_emb(hidden, places)
    mask: Any = torch.ones(1, 1, s, s, dtype=torch.bool).tril()
    if kind == "headfold":
        apply(model)
        mask = visible_keys(1, s, s)

    def run() -> Any:
        return model.model.layers[0].self_attn(hidden, turns, mask)[0]

    for training in (False, True):
        shape = from_config(tree, "config.json", dtype=dtype)
        layers = tuple(replace(layer, trains=False) for layer in shape.layers)
        shape = replace(shape, training=training, layers=layers)
        layer = plan_model(shape, s, stock=stock_step).stages[0].layers[0]
        step = getattr(layer, kind)
        with torch.set_grad_enabled(training):
            forward = allocator_peak(run, CPU)
        assert 0.8 * (step.forward + layer.inputs) <= forward.peak <= step.forward + layer.inputs + UNBILLED
    backward = forward.left + allocator_peak(forward.result.sum().backward, CPU).peak
    assert 0.8 * (step.backward + layer.inputs) <= backward <= step.backward + layer.inputs + UNBILLED


def test_the_command_bills_a_model_and_finds_what_fits(tmp_path: Path) -> None:
    path = written("glm_moe_dsa", tmp_path)
    prefill, training = config_plan(path, tokens=2048, memory=1 << 30)
    assert [(row["layers"], row["path"]) for row in prefill.rows] == [
        ("0-1", "transformers"), ("0-1", "headfold"), ("2-3", "transformers"), ("2-3", "headfold"),
        ("largest stage", "transformers"), ("largest stage", "headfold"),
    ]  # fmt: skip
    shape = from_config(json.loads(path.read_text()), "config.json")
    stock, patched = prefill.rows[-2:]
    assert stock["total"] == plan_model(shape, 2048, stock=stock_step).stock
    assert training.rows[-2]["total"] > stock["total"] > 8 * patched["total"]
    assert training.rows[-1]["total"] > patched["total"]
    for way, row in (("stock", stock), ("headfold", patched)):
        bills = [getattr(plan_model(shape, row["longest"] + more, stock=stock_step), way) for more in (0, 1)]
        assert bills[0] <= 1 << 30 < bills[1]
    done = CliRunner().invoke(app, ["plan", "--model", str(path), "--tokens", "2048", "--memory", "1", "--json"])
    assert done.exit_code == 0
    assert [lane["rows"][-2]["total"] for lane in json.loads(done.stdout)["lanes"]] == [
        lane.rows[-2]["total"] for lane in (prefill, training)
    ]


def test_the_plan_says_what_it_leaves_out(tmp_path: Path) -> None:
    (full, _), (some, _) = (config_plan(written(name, tmp_path)) for name in ("axk2", "dots3_note_text"))
    assert any("What decoding caches is not billed" in note for note in full.notes)
    assert not any("have no indexer" in note for note in full.notes)
    assert any(note.startswith("2 of 4 layers have no indexer") for note in some.notes)
    assert any(note.startswith("H200 141 GB: the longest context is") for note in some.notes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "llama"}, "model_type must be one of axk2, .*, got 'llama'"),
        ({"index_topk": None}, "index_topk must be an integer of at least 1, got None"),
        ({"hidden_size": True}, "hidden_size must be an integer of at least 1, got True"),
        (
            {"indexer_types": None, "index_skip_topk_offset": None},
            "index_skip_topk_offset must be an integer .* got None",
        ),
        ({"indexer_types": None, "index_topk_freq": "2"}, "index_topk_freq must be an integer of at least 0, got '2'"),
        ({"indexer_types": ["full"]}, r'indexer_types must hold "full" or "shared" for 4 layers, got \[\'full\'\]'),
    ],
)
def test_a_file_that_does_not_say_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    tree = json.loads(written("glm_moe_dsa", tmp_path).read_text()) | change
    with pytest.raises(ValueError, match=sentence):
        from_config(tree, "config.json")
    assert len(MODEL_TYPES) == 8


def test_no_file_and_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for path in (tmp_path / "none.json", tmp_path / "broken.json"):
        with pytest.raises(ValueError, match="needs a configuration of transformers in JSON, got"):
            config_plan(path)


def test_the_command_refuses_what_does_not_go_together(tmp_path: Path) -> None:
    path = str(written("axk2", tmp_path))
    for more in (["--memory", "1"], ["--model", path, "--preset", "glm-5"], ["--model", path, "--causal"]):
        result = CliRunner().invoke(app, ["plan", *more])
        assert isinstance(result.exception, ValueError), more
