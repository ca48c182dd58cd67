"""A model out of Megatron's arguments: what is read, what is refused, and that its splits are Megatron's own."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from headfold.lanes.model_plan import megatron_plan
from headfold.megatron_plan import from_arguments, stock_step
from headfold.megatron_split import layers_of_stages
from headfold.model_plan import LayerShape, ModelShape, Parallel, Recompute, longest, plan_model
from headfold.tiles import MIB

pytestmark = [
    pytest.mark.filterwarnings("ignore:Apex is not installed:UserWarning"),
    pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning"),
]
LAYER = LayerShape(heads=16, dim=64, topk=128, np=8, np_k=1, hn=64, v_dim=48, trains=True)

ARGUMENTS: dict[str, Any] = {
    "language_model": {
        "num_layers": 6,
        "hidden_size": 640,
        "num_attention_heads": 8,
        "kv_lora_rank": 48,
        "qk_pos_emb_head_dim": 16,
        "dsa_indexer_n_heads": 16,
        "dsa_indexer_head_dim": 64,
        "dsa_indexer_topk": 128,
        "dsa_indexer_topk_freq": 2,
        "dsa_indexer_skip_topk_offset": 2,
        "dsa_indexer_loss_coeff": 0.01,
        "dsa_indexer_scoring_relu": False,
        "recompute_granularity": "full",
    },
    "model_parallel": {
        "tensor_model_parallel_size": 2,
        "context_parallel_size": 3,
        "pipeline_model_parallel_size": 2,
        "bf16": True,
    },
    "micro_batch_size": 2,
    "seq_length": 4096,
}


def test_arguments_are_read_nested_or_flat() -> None:
    parts = [part for part in ARGUMENTS.values() if isinstance(part, dict)]
    flat = {f"--{name.replace('_', '-')}": value for part in parts for name, value in part.items()}
    flat |= {name: value for name, value in ARGUMENTS.items() if not isinstance(value, dict)}
    plan = from_arguments(ARGUMENTS, "a.yaml")
    assert from_arguments(flat, "a.yaml") == plan
    own = replace(LAYER, relu=False)
    shared = replace(own, computes=False, trains=False)
    layers = own, own, shared, own, shared, own
    assert plan.model == ModelShape(layers, 2, "bfloat16", recompute=Recompute("layers", 1), hidden=640)
    assert plan.parallel == Parallel(2, 3, 2, (3, 3))
    assert plan.tokens == 4096


def test_layers_that_share_are_those_of_megatron() -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.transformer.experimental_attention_variant.dsa import is_dsa_skip_topk_layer

    model = from_arguments(ARGUMENTS, "a.yaml").model
    assert [layer.computes for layer in model.layers] == [not is_dsa_skip_topk_layer(n, 2, 2) for n in range(1, 7)]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": ({"dsa_indexer_top_k": 4}, r"a\.yaml: dsa arguments must be among .*, got dsa_indexer_top_k\."),
    "misspelt elsewhere": ({"indexer_heads": 4}, r"got indexer_heads\."),
    "missing": ({"dsa_indexer_topk": None}, r"a\.yaml: needs dsa_indexer_topk \(selected keys\), got a file without\."),
    "no size": ({"num_layers": "61"}, r"a\.yaml: num_layers must be an integer of at least 1, got '61'\."),
    "no number": ({"dsa_indexer_loss_coeff": "x"}, r"a\.yaml: dsa_indexer_loss_coeff must be a number, got 'x'\."),
    "no flag": ({"dsa_indexer_scoring_relu": "no"}, r"dsa_indexer_scoring_relu must be true or false, got 'no'\."),
    "no dtype": ({"params_dtype": "torch.int8"}, r"params_dtype must be bfloat16, float16 or .*, got 'torch.int8'\."),
    "no width": ({"hidden_size": None}, r"needs hidden_size, which recomputed layers hold, got a file without\."),
    "granularity": ({"recompute_granularity": "half"}, r"recompute_granularity must be full .*, got 'half' and None\."),
    "method": ({"recompute_method": "blocks"}, r"recompute_method uniform or block, got 'full' and 'blocks'\."),
    "interleaved": (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3},
        r"virtual_pipeline_model_parallel_size must be left out, got 3\. An interleaved schedule",
    ),
    "interleaved by layers": (
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3},
        r"num_layers_per_virtual_pipeline_stage must be left out, got 3\.",
    ),
    "interleaved layout": (
        {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tt|tt|tL"},
        r"one stage for each of pipeline_model_parallel_size = 2 devices, got 4\.",
    ),
    "uneven": (
        {"num_layers": 61, "pipeline_model_parallel_size": 4},
        r"num_layers must divide over pipeline_model_parallel_size = 4 stages, got 61\. Megatron splits unevenly by "
        r"num_layers_in_first_pipeline_stage, .* or pipeline_model_parallel_layout\.",
    ),
    "uneven all the same": (
        {"pipeline_model_parallel_size": 4, "account_for_loss_in_pipeline_split": True},
        r"stages, got 6 and 1 for account_for_loss_in_pipeline_split\.",
    ),
    "ends that leave too few": (
        {
            "pipeline_model_parallel_size": 3,
            "decoder_first_pipeline_num_layers": 4,
            "num_layers_in_last_pipeline_stage": 4,
        },
        r"must leave layers that divide over the other stages, got 4 and 4 of 6 layers over 3 stages\.",
    ),
    "ends that leave an odd one": (
        {"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 1},
        r"must leave layers that divide over the other stages, got 1 and None of 6 layers over 3 stages\.",
    ),
    "no end": ({"decoder_last_pipeline_num_layers": 0}, r"decoder_last_pipeline_num_layers must be .*, got 0\."),
    "ends and embedding": (
        {"num_layers_in_first_pipeline_stage": 1, "account_for_embedding_in_pipeline_split": True},
        r"num_layers_in_first_pipeline_stage and account_for_embedding_in_pipeline_split exclude each other, got",
    ),
    "ends and layout": (
        {"decoder_first_pipeline_num_layers": 1, "pipeline_model_parallel_layout": "Et*6L"},
        r"pipeline_model_parallel_layout and num_layers_in_first_pipeline_stage exclude each other, got both\.",
    ),
    "letters": ({"pipeline_model_parallel_layout": "Et*6X"}, r"must be stages of E, L, t, m with .*, got 'Et\*6X'\."),
    "names": ({"pipeline_model_parallel_layout": [["decoders"]]}, r"or lists of embedding, loss, .*, got \[\['dec"),
    "layers of a layout": (
        {"pipeline_model_parallel_layout": "Et*5L"},
        r"must hold num_layers = 6 decoder .*, got 5\.",
    ),
    "a stage that reuses": (
        {"pipeline_model_parallel_size": 3},
        r"every pipeline stage must start on a computing layer, got stage 2 of 3, which starts on layer 3 and would "
        r"reuse layer 2's selection\. Choose another split",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_file_gets_wrong_is_named(name: str) -> None:
    change, sentence = WRONG[name]
    with pytest.raises(ValueError, match=sentence):
        from_arguments({**ARGUMENTS["language_model"], **change}, "a.yaml")


def read(**change: Any) -> Any:
    return from_arguments({**ARGUMENTS["language_model"], **change}, "a.yaml")


def test_what_the_file_leaves_out_is_megatrons_default() -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    config = MLATransformerConfig(num_layers=6, hidden_size=640, num_attention_heads=8)
    layer = read(kv_lora_rank=None, qk_pos_emb_head_dim=None, dsa_indexer_scoring_relu=None).model.layers[0]
    assert layer.v_dim == config.kv_lora_rank
    assert layer.hn == config.kv_lora_rank + config.qk_pos_emb_head_dim
    assert layer.relu == config.dsa_indexer_scoring_relu
    assert read().model.dtype == str(config.params_dtype).removeprefix("torch.")
    assert not read(dsa_indexer_loss_coeff=None).model.layers[0].trains
    assert read(recompute_granularity=None).model.recompute == Recompute()


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert isinstance(yaml.safe_load("1e-2"), str)
    assert read(dsa_indexer_loss_coeff="1e-2").model.layers[0].trains
    assert not read(dsa_indexer_loss_coeff="0").model.layers[0].trains


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        ({"params_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"params_dtype": "float16"}, "float16"),
        ({"params_dtype": "torch.half"}, "float16"),
        ({"params_dtype": "torch.float32", "bf16": True}, "bfloat16"),
        ({"fp16": True}, "float16"),
        ({"bf16": False}, "float32"),
    ],
    ids=str,
)
def test_dtypes_are_read_as_they_are_written(change: dict[str, Any], dtype: str) -> None:
    assert read(**change).model.dtype == dtype


RECOMPUTED = [
    ({"recompute_granularity": None, "recompute_activations": True}, Recompute("attention")),
    ({"recompute_granularity": "selective"}, Recompute("attention")),
    ({"recompute_granularity": "selective", "recompute_modules": ["mlp", "core_attn"]}, Recompute("attention")),
    ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, Recompute()),
    ({"recompute_method": "uniform", "recompute_num_layers": 2}, Recompute("layers", 2)),
    ({"recompute_method": "block", "recompute_num_layers": 4}, Recompute("first", 4)),
]


@pytest.mark.parametrize(("change", "recompute"), RECOMPUTED, ids=str)
def test_what_runs_again_is_read(change: dict[str, Any], recompute: Recompute) -> None:
    assert read(**change).model.recompute == recompute


def test_hidden_states_are_shared_where_megatron_shares_them() -> None:
    assert not read().model.shares_hidden
    assert read(sequence_parallel=True).model.shares_hidden
    assert read(distribute_saved_activations=True).model.shares_hidden


def test_what_the_bill_leaves_out_is_said() -> None:
    (stock,) = read().notes
    assert "absorbed attention, with no fused kernel" in stock
    change = {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]}
    notes = read(dsa_kernel_backend="cudnn", mtp_num_layers=1, **change).notes
    assert len(notes) == 4
    for part in ("dsa_kernel_backend=cudnn", "mtp_num_layers=1", "mla_up_proj"):
        assert any(part in note for note in notes)


SPLITS: list[tuple[int, int, dict[str, Any]]] = [
    (6, 1, {}),
    (60, 4, {}),
    (61, 4, {"num_layers_in_first_pipeline_stage": 16, "num_layers_in_last_pipeline_stage": 13}),
    (61, 4, {"num_layers_in_first_pipeline_stage": 1}),
    (61, 4, {"num_layers_in_last_pipeline_stage": 13}),
    (5, 2, {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 2}),
    (61, 62, {"account_for_loss_in_pipeline_split": True}),
    (15, 4, {"account_for_embedding_in_pipeline_split": True}),
    (62, 4, {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}),
]
LAYOUTS: list[tuple[int, int, Any]] = [
    (61, 17, "Et*3|(tt|tttttt|)*7,tt|L"),
    (4, 3, "E|t*4|L"),
    (9, 5, "Ett|(tt|)*2,ttt|mL"),
    (3, 2, [["embedding", "decoder"], ["decoder", " Decoder", "loss"]]),
]


@pytest.mark.parametrize(("layers", "pipeline", "change"), SPLITS, ids=str)
def test_splits_are_those_of_megatron(layers: int, pipeline: int, change: dict[str, Any]) -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=layers, hidden_size=8, num_attention_heads=2, pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32, **change,
    )  # fmt: skip
    theirs = tuple(get_num_layers_to_build(config, pp_rank=rank) for rank in range(pipeline))
    assert layers_of_stages(change, layers, pipeline, "a.yaml") == theirs
    names = {"num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
             "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers"}  # fmt: skip
    flags = {names.get(name, name): value for name, value in change.items()}
    assert layers_of_stages(flags, layers, pipeline, "a.yaml") == theirs


@pytest.mark.parametrize(("layers", "pipeline", "layout"), LAYOUTS, ids=str)
def test_layouts_are_read_as_megatron_reads_them(layers: int, pipeline: int, layout: Any) -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    theirs = PipelineParallelLayerLayout(layout, pipeline)
    counts = tuple(theirs.get_num_layers_to_build(pp_rank=rank) for rank in range(pipeline))
    given = {"pipeline_model_parallel_layout": layout}
    assert layers_of_stages(given, sum(counts), pipeline, "a.yaml") == counts
    assert sum(counts) == layers


@pytest.mark.parametrize(("every", "offset"), [(1, 0), (2, 0), (2, 2), (3, 2), (4, 3), (6, 1)], ids=str)
@pytest.mark.parametrize("pipeline", [1, 2, 3, 4, 6, 12])
def test_stages_that_reuse_are_refused_where_megatron_refuses_them(every: int, offset: int, pipeline: int) -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
        _validate_dsa_index_share_pipeline_split as validate,
    )

    sharing = {"dsa_indexer_topk_freq": every, "dsa_indexer_skip_topk_offset": offset}
    config: Any = SimpleNamespace(experimental_attention_variant="dsa", **sharing)
    refused = False
    for stage in range(pipeline):
        try:
            validate(config, range(stage * 12 // pipeline, (stage + 1) * 12 // pipeline))
        except RuntimeError:
            refused = True
    sentence = pytest.raises(ValueError, match="must start on a computing layer") if refused else nullcontext()
    with sentence:
        read(num_layers=12, pipeline_model_parallel_size=pipeline, **sharing)


def test_the_command_bills_every_kind_of_layer_and_the_longest_context(tmp_path: Path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump(ARGUMENTS))
    lane = megatron_plan(path, tokens=600, b=1, memory=64 * MIB)
    plan = from_arguments(ARGUMENTS, "a.yaml")
    model = replace(plan.model, b=1)
    bill = plan_model(model, 600, parallel=plan.parallel, stock=stock_step)
    assert [row["layers"] for row in lane.rows] == ["0-1, 3, 5", "0-1, 3, 5", "2, 4", "2, 4", *["largest stage"] * 2]
    first = bill.stages[0].layers[0]
    assert [lane.rows[0][key] for key in ("forward", "held", "backward", "inputs")] == [*first.stock, first.inputs]
    assert [lane.rows[1][key] for key in ("forward", "held", "backward", "inputs")] == [*first.headfold, first.inputs]
    assert [row["total"] for row in lane.rows[-2:]] == [bill.stock, bill.headfold]
    assert tuple(row["longest"] for row in lane.rows[-2:]) == longest(
        model, 64 * MIB, parallel=plan.parallel, stock=stock_step
    )


@pytest.mark.parametrize("text", ["a: [", "- 1", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"needs a YAML file, got .*args\.yaml|must hold a mapping of Megatron's arguments"
    ):
        megatron_plan(path)
