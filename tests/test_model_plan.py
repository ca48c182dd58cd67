from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from headfold.integrations import megatron
from headfold.lanes.measure import allocator_peak
from headfold.lanes.model_plan import megatron_plan
from headfold.megatron_plan import from_arguments, stock_step
from headfold.model_plan import (
    Call,
    LayerShape,
    ModelShape,
    Parallel,
    Step,
    headfold_step,
    longest,
    plan_model,
)
from headfold.tiles import MIB

CPU = torch.device("cpu")
LAYER = LayerShape(heads=16, dim=64, topk=128, np=8, np_k=1, hn=64, v_dim=48, trains=True)
WIDE = LayerShape(heads=4, dim=32, topk=64, np=16, np_k=1, hn=96, v_dim=64, trains=True)
# The adapters round bounds to int32 and make their loss's factor; the walks' own small change is in their bills.
SMALL = MIB // 4
CASES = {
    "indexer heads": (LAYER, 1, 448, torch.bfloat16),
    "attention heads": (WIDE, 1, 384, torch.bfloat16),
    "attention heads, b=2, float32": (WIDE, 2, 256, torch.float32),
}


def measured(layer: LayerShape, b: int, s: int, dtype: torch.dtype) -> dict[str, int]:
    """Peaks of the loss and of attention, forward, held and backward, in the installed Megatron-Core as it stands."""
    from megatron.core.transformer.experimental_attention_variant import dsa

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    generator = torch.Generator().manual_seed(0)
    q, weights, k = make(s, b, layer.heads, layer.dim), make(s, b, layer.heads), make(s, b, layer.dim)
    query, key = make(s, b, layer.np, layer.hn), make(s, b, 1, layer.hn)
    starts, ends = torch.zeros(s, dtype=torch.int64), torch.arange(1, s + 1)
    group = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    shared = key.detach().expand(-1, -1, layer.np, -1)
    rest = layer.hn**-0.5, layer.topk, 1.0, None, True, group, starts, ends
    forward = allocator_peak(lambda: dsa.FusedDSAIndexerLoss.apply(q, weights, k, query.detach(), shared, *rest), CPU)
    indices, loss = forward.result
    backward = allocator_peak(loss.backward, CPU)
    call = query, key, indices, layer.hn**-0.5, layer.v_dim, None, starts, ends
    attention = allocator_peak(lambda: dsa._unfused_absorbed_dsa_fn(*call), CPU)
    incoming = torch.ones_like(attention.result)
    out = incoming.nbytes
    through = allocator_peak(lambda: attention.result.backward(incoming), CPU)
    return {
        "loss forward": forward.peak,
        "loss held": forward.left,
        "loss backward": forward.left + backward.peak,
        "attention forward": attention.peak - out,
        "attention held": attention.left - out,
        "attention backward": attention.left - out + through.peak,
    }


@pytest.mark.parametrize("name", CASES)
def test_the_stock_bill_is_what_megatron_core_takes(name: str) -> None:
    pytest.importorskip("megatron.core")
    layer, b, s, dtype = CASES[name]
    found = measured(layer, b, s, dtype)
    call = Call(b, s, s, layer.np, dtype.itemsize, True)
    attention, whole = stock_step(replace(layer, computes=False), call), stock_step(layer, call)
    keys = "attention forward", "attention held", "attention backward"
    forward, held, backward = (found[key] for key in keys)
    both = max(forward, found["loss forward"]), held, max(backward, held + found["loss backward"])
    for planned, peaks in ((attention, (forward, held, backward)), (whole, both)):
        for figure, peak in zip(planned, peaks, strict=True):
            assert 0.8 * figure <= peak <= figure, (planned, peaks)


@pytest.mark.parametrize("name", ["indexer heads", "attention heads"])
def test_the_bill_of_headfold_is_what_the_patched_layer_takes(name: str) -> None:
    pytest.importorskip("megatron.core")
    layer, b, s, dtype = CASES[name]
    with megatron.apply():
        found = measured(layer, b, s, dtype)
    call = Call(b, s, s, layer.np, dtype.itemsize, True)
    planned = headfold_step(layer, call)
    gradients = found["loss held"]
    forward = max(found["loss forward"], gradients + found["attention forward"])
    backward = max(gradients + found["attention backward"], found["loss backward"])
    for figure, peak in zip(planned, (forward, gradients, backward), strict=True):
        assert 0.8 * figure <= peak <= figure + SMALL, (planned, forward, gradients, backward)


def flat_stock(layer: LayerShape, call: Call) -> Step:
    """A path whose step is easy to add up: a byte a pair of row and key, held, and as much again while it works."""
    pairs = call.b * call.sq * call.sk
    return Step(2 * pairs, pairs, 3 * pairs)


def test_stages_hold_their_layers_and_the_micro_batches_in_flight() -> None:
    model = ModelShape((LAYER,) * 4, dtype="float32")
    bill = plan_model(model, 64, parallel=Parallel(pipeline=2), stock=flat_stock)
    inputs, pairs = bill.stages[0].layers[0].inputs, 64 * 64
    one = 2 * (inputs + pairs)
    assert [stage.in_flight for stage in bill.stages] == [2, 1]
    assert [stage.first for stage in bill.stages] == [0, 2]
    assert bill.stages[1].stock == inputs + pairs + inputs + 3 * pairs
    assert bill.stages[0].stock == bill.stages[1].stock + one
    assert bill.stock == bill.stages[0].stock


def test_recomputed_layers_hold_their_hidden_states_alone() -> None:
    model = ModelShape((LAYER,) * 3, dtype="float32", recompute=True, hidden=10)
    bill = plan_model(model, 64, stock=flat_stock)
    assert bill.stock == bill.stages[0].layers[0].inputs + 3 * 64 * 64 + 2 * 64 * 10 * 4


def test_a_forward_pass_holds_nothing_between_layers() -> None:
    bill = plan_model(ModelShape((LAYER,) * 3, dtype="float32", training=False), 64, stock=flat_stock)
    assert bill.stock == bill.stages[0].layers[0].inputs + 3 * 64 * 64
    assert bill.stages[0].layers[0].headfold.backward == 0


def test_inputs_are_those_of_one_device() -> None:
    model = ModelShape((LAYER, replace(LAYER, computes=False, trains=False)), b=3, dtype="bfloat16")
    alone = plan_model(model, 64, stock=flat_stock).stages[0].layers
    split = plan_model(model, 64, parallel=Parallel(tensor=2, context=4), stock=flat_stock).stages[0].layers
    key = 3 * 64 * 64
    assert alone[1].inputs == 2 * (3 * 64 * 8 * (64 + 48) + key)
    assert split[1].inputs == 2 * (3 * 16 * 4 * (64 + 48) + key)
    indexer = 3 * 64 * 16 * 64 + 3 * 64 * 16
    assert alone[0].inputs - alone[1].inputs == 2 * (indexer + key)
    assert split[0].inputs - split[1].inputs == 2 * (indexer // 4 + key)


def test_the_longest_context_fits_and_one_token_more_does_not() -> None:
    model, memory = ModelShape((LAYER,) * 2), 300 * MIB
    parallel = Parallel(tensor=2)
    found = longest(model, memory, parallel=parallel, stock=stock_step)
    assert 0 < found.stock < found.headfold
    for tokens, way in ((found.stock, "stock"), (found.headfold, "headfold")):
        peaks = [getattr(plan_model(model, n, parallel=parallel, stock=stock_step), way) for n in (tokens, tokens + 1)]
        assert peaks[0] <= memory < peaks[1]


def test_nothing_fits_in_no_memory() -> None:
    assert longest(ModelShape((LAYER,)), 0, stock=stock_step) == (0, 0)


def test_what_does_not_split_is_refused() -> None:
    model = ModelShape((LAYER,) * 3)
    with pytest.raises(ValueError, match=r"pipeline must divide the layers, got 2 stages for 3"):
        plan_model(model, 8, parallel=Parallel(pipeline=2), stock=stock_step)
    with pytest.raises(ValueError, match=r"tensor must divide np = 8 attention heads, got 3"):
        plan_model(model, 8, parallel=Parallel(tensor=3), stock=stock_step)
    with pytest.raises(ValueError, match=r"LayerShape: np must be a multiple of np_k, got 8 and 3"):
        replace(LAYER, np_k=3)
    with pytest.raises(ValueError, match=r"LayerShape: dim must be an integer of at least 1, got 0"):
        replace(LAYER, dim=0)
    with pytest.raises(ValueError, match=r"Parallel: context must be an integer of at least 1, got 0"):
        Parallel(context=0)
    with pytest.raises(ValueError, match=r"ModelShape: layers must hold at least one layer"):
        ModelShape(())
    with pytest.raises(ValueError, match=r"ModelShape: dtype must be one of .*, got 'fp8'"):
        ModelShape((LAYER,), dtype="fp8")


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
        "dsa_indexer_topk_freq": 3,
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
    assert plan.model == ModelShape((own, own, shared, shared, own, shared), 2, "bfloat16", recompute=True, hidden=640)
    assert plan.parallel == Parallel(2, 3, 2)
    assert plan.tokens == 4096


def test_layers_that_share_are_those_of_megatron() -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.transformer.experimental_attention_variant.dsa import is_dsa_skip_topk_layer

    model = from_arguments(ARGUMENTS, "a.yaml").model
    assert [layer.computes for layer in model.layers] == [not is_dsa_skip_topk_layer(n, 2, 3) for n in range(1, 7)]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": ({"dsa_indexer_top_k": 4}, r"a\.yaml: dsa arguments must be among .*, got dsa_indexer_top_k\."),
    "misspelt elsewhere": ({"indexer_heads": 4}, r"got indexer_heads\."),
    "missing": ({"dsa_indexer_topk": None}, r"a\.yaml: needs dsa_indexer_topk \(selected keys\), got a file without\."),
    "no size": ({"num_layers": "61"}, r"a\.yaml: num_layers must be an integer of at least 1, got '61'\."),
    "no number": ({"dsa_indexer_loss_coeff": "x"}, r"a\.yaml: dsa_indexer_loss_coeff must be a number, got 'x'\."),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_file_gets_wrong_is_named(name: str) -> None:
    change, sentence = WRONG[name]
    with pytest.raises(ValueError, match=sentence):
        from_arguments({**ARGUMENTS["language_model"], **change}, "a.yaml")


def test_the_command_bills_every_kind_of_layer_and_the_longest_context(tmp_path: Path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump(ARGUMENTS))
    lane = megatron_plan(path, tokens=600, b=1, memory=64 * MIB)
    plan = from_arguments(ARGUMENTS, "a.yaml")
    model = replace(plan.model, b=1)
    bill = plan_model(model, 600, parallel=plan.parallel, stock=stock_step)
    assert [row["layers"] for row in lane.rows] == ["0-1, 4", "0-1, 4", "2-3, 5", "2-3, 5", *["largest stage"] * 2]
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


def test_planning_imports_no_torch() -> None:
    import subprocess

    code = "import sys; sys.modules['torch'] = None; import importlib.util as u, types; " + (
        "p = types.ModuleType('headfold'); p.__path__ = [sys.argv[1]]; sys.modules['headfold'] = p; "
        "import headfold.megatron_plan"
    )
    import headfold

    root = headfold.__path__[0]
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
