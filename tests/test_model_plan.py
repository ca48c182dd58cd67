from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from headfold.integrations import megatron
from headfold.lanes.measure import allocator_peak
from headfold.megatron_plan import stock_step
from headfold.model_plan import (
    Call,
    LayerShape,
    ModelShape,
    Parallel,
    Recompute,
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


def test_the_bill_of_an_untrained_indexer_is_what_a_selection_takes() -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.transformer.experimental_attention_variant import dsa

    layer, b, s, dtype = WIDE, 1, 1536, torch.bfloat16  # scores as large as what selects them
    generator = torch.Generator().manual_seed(0)
    shapes = (s, b, layer.heads, layer.dim), (s, b, layer.dim), (s, b, layer.heads)
    x = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    bounds = {"varlen_starts": torch.zeros(s, dtype=torch.int64), "varlen_ends": torch.arange(1, s + 1)}
    call = Call(b, s, s, layer.np, dtype.itemsize, True)
    narrow = replace(layer, trains=False, np=1, hn=1, v_dim=1)  # so that attention takes next to nothing
    stock, ours = (step(narrow, call._replace(np=1)).forward for step in (stock_step, headfold_step))
    assert ours > headfold_step(replace(narrow, computes=False), call._replace(np=1)).forward

    def select() -> torch.Tensor:
        _, indices = dsa.fused_qk_topk_naive(*x, layer.topk, **bounds)
        found: torch.Tensor = indices
        return found

    before = allocator_peak(select, CPU).peak
    with megatron.apply():
        after = allocator_peak(select, CPU).peak
    assert 0.8 * stock <= before <= stock + SMALL, (stock, before)
    assert 0.8 * ours <= after <= ours + SMALL, (ours, after)


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


def test_stages_need_not_be_even() -> None:
    model = ModelShape((LAYER,) * 3, dtype="float32")
    bill = plan_model(model, 64, parallel=Parallel(pipeline=3, stages=(2, 0, 1)), stock=flat_stock)
    inputs, pairs = bill.stages[0].layers[0].inputs, 64 * 64
    assert [(stage.first, len(stage.layers)) for stage in bill.stages] == [(0, 2), (2, 0), (2, 1)]
    assert bill.stages[0].stock == inputs + pairs + inputs + 3 * pairs + 2 * 2 * (inputs + pairs)
    assert [stage.stock for stage in bill.stages[1:]] == [0, inputs + 3 * pairs]
    with pytest.raises(ValueError, match=r"stages must add up to 3 layers, got \[2, 2\]"):
        plan_model(model, 64, parallel=Parallel(pipeline=2, stages=(2, 2)), stock=flat_stock)
    with pytest.raises(ValueError, match=r"stages must name 2 stages, as pipeline says, got 1"):
        Parallel(pipeline=2, stages=(3,))


HIDDEN, PAIRS = 64 * 10 * 4, 64 * 64
KEPT = {  # peak of a stage of five layers by what runs again, in inputs, pairs and hidden states
    Recompute(): (5, 4 + 3, 0),
    Recompute("layers", 1): (1, 3, 5),
    Recompute("layers", 2): (2, 1 + 3, 2),  # the second run of two; the last of one holds one hidden state more
    Recompute("layers", 9): (5, 4 + 3, 1),
    Recompute("first", 2): (3, 2 + 3, 2),
    Recompute("first", 9): (1, 3, 5),
}


@pytest.mark.parametrize("recompute", KEPT, ids=lambda r: f"{r.what} {r.layers}")
def test_what_runs_again_is_not_held(recompute: Recompute) -> None:
    model = ModelShape((LAYER,) * 5, dtype="float32", recompute=recompute, hidden=10)
    bill = plan_model(model, 64, stock=flat_stock)
    inputs, pairs, hidden = KEPT[recompute]
    assert bill.stock == inputs * bill.stages[0].layers[0].inputs + pairs * PAIRS + hidden * HIDDEN


def test_attention_that_runs_again_holds_what_goes_in_and_out() -> None:
    model = ModelShape((LAYER,) * 5, dtype="float32", recompute=Recompute("attention"))
    bill = plan_model(model, 64, stock=flat_stock)
    layer = bill.stages[0].layers[0]
    assert 0 < layer.attention < layer.inputs
    assert bill.stock == 4 * layer.attention + layer.inputs + 3 * PAIRS


def test_hidden_states_are_those_of_one_device() -> None:
    model = ModelShape((LAYER,) * 5, dtype="float32", recompute=Recompute("layers"), hidden=10)
    split = Parallel(tensor=2, context=4)
    whole, shared = (
        plan_model(replace(model, shares_hidden=shares), 64, parallel=split, stock=flat_stock)
        for shares in (False, True)
    )
    assert whole.stock - shared.stock == 5 * (16 - 8) * 10 * 4


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
    with pytest.raises(ValueError, match=r"recompute must say one of nothing, attention, .*, got .*'some'"):
        ModelShape((LAYER,), recompute=Recompute("some"))
    with pytest.raises(ValueError, match=r"recompute of layers needs hidden, at least 1, got 0"):
        ModelShape((LAYER,), recompute=Recompute("first"))


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
