from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from cases import CASES, Case
from headfold import IndexerGeometry, KeyRange, UnsupportedError, index_scores, index_topk, ops, selected_scores
from headfold.backends import eager
from headfold.contract import score_call
from headfold.geometry import SELECTED
from headfold.lanes.budget import DEFAULTS, spend_all
from headfold.lanes.measure import allocator_peak
from headfold.lanes.residency import LEAST_SHARE
from headfold.lanes.syncfree import no_data_reads
from headfold.tiles import MIB

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NEG_INF = float("-inf")
NAN = float("nan")
# At topk=300 and h=32, d=16 a tile holds 192 rows of picks: two blocks of rows. LONG spans blocks of picks too.
LONG = Case(9, 40_000, h=3, d=64)


def some_indices(case: Case, topk: int, seed: int = 0) -> Tensor:
    """Any keys, in any order, with duplicates and -1 among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, case.sk, (case.b, case.sq, topk), generator=generator, dtype=torch.int32)


def leaves(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.requires_grad_() for x in case.inputs(dtype) if x is not None]


def scores_at(inputs: list[Tensor], indices: Tensor, **call: Any) -> Tensor:
    q, weights, k = inputs
    return selected_scores(q, weights, k, indices, **call)


def at(scores: Tensor, indices: Tensor) -> Tensor:
    return scores.gather(-1, indices.long().clamp(min=0)).masked_fill(indices < 0, NEG_INF)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.d > 1], ids=str)  # at d=1 a row of dk is one number: all luck
def test_scores_and_gradients_stay_within_the_error_budget(case: Case, dtype: torch.dtype) -> None:
    indices = some_indices(case, 300 if case.sq > 100 else 23)
    g = torch.randn(indices.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spent = spend_all(case.inputs(dtype), g, indices, **case.call())
    assert {name: s for name, s in spent.items() if not s.kept} == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_rows_that_select_the_same_keys_keep_the_budget(dtype: torch.dtype) -> None:
    case = Case(2000, 64, h=8, d=32)
    indices = some_indices(case, 48)
    g = torch.randn(indices.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spent = spend_all(case.inputs(dtype), g, indices)
    assert {name: s for name, s in spent.items() if not s.kept} == {}


@pytest.mark.usefixtures("poisoned")
def test_picks_beyond_one_tile_are_summed_over_tiles() -> None:
    indices = some_indices(LONG, 20_000)
    q, _, k = (x.transpose(0, 1) for x in leaves(LONG))
    tile = eager.gather_tile_of(q, k, indices, True)
    assert tile.picks < 20_000
    mine, theirs = leaves(LONG, torch.float64), leaves(LONG, torch.float64)
    ours, oracle = scores_at(mine, indices), at(index_scores(*theirs), indices)
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)
    g = torch.randn(ours.shape, dtype=torch.float64).masked_fill(indices < 0, 0)
    for x, y in zip(torch.autograd.grad(ours, mine, g), torch.autograd.grad(oracle, theirs, g), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("h", "d"), [(3, 2), (64, 4), (200, 16)])
def test_more_heads_than_channels_and_picks(h: int, d: int) -> None:
    case, indices = Case(3, 5, h=h, d=d), torch.tensor([[[4], [0], [-1]]])
    mine, theirs = leaves(case, torch.float64), leaves(case, torch.float64)
    g = torch.ones(1, 3, 1, dtype=torch.float64)
    ours = torch.autograd.grad(scores_at(mine, indices), mine, g)
    oracle = torch.autograd.grad(at(index_scores(*theirs), indices), theirs, g)
    for x, y in zip(ours, oracle, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("topk", [1, 8, 16, 64, 2048])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("accelerator", [False, True])
def test_16_mib_are_enough_for_any_number_of_picks(topk: int, dtype: str, accelerator: bool) -> None:
    g = IndexerGeometry(1, 4096, 65_536, 32, 128, topk=topk, dtype=dtype)
    assert g.gather_tile(accelerator=accelerator).backward_bytes <= 16 * MIB


@pytest.mark.parametrize("value", [NAN, float("inf"), NEG_INF])
def test_nan_and_infinity_of_a_selected_key_propagate_as_in_the_score_matrix(value: float) -> None:
    case = Case(4, 6, h=2, d=3)
    q, weights, k = leaves(case)
    with torch.no_grad():
        k[2, 0, 1] = value
    indices = some_indices(case, 5)
    ours, oracle = scores_at([q, weights, k], indices), at(index_scores(q, weights, k), indices)
    torch.testing.assert_close(ours, oracle, equal_nan=True)
    g = torch.ones_like(ours).masked_fill(indices < 0, 0)
    rows = (indices == 2).any(-1)[0]  # only rows that selected it
    for x, y in zip(
        torch.autograd.grad(ours, [q, weights], g), torch.autograd.grad(oracle, [q, weights], g), strict=True
    ):
        torch.testing.assert_close(x[rows], y[rows], equal_nan=True)
        assert x[~rows].isfinite().all()


def test_a_key_axis_beyond_two_to_the_31_elements_is_reached() -> None:
    last = 2**24 + 4  # times 128 channels: zeros that are never touched take no memory of the machine
    k = torch.zeros(last + 1, 1, 128, dtype=torch.bfloat16)
    k[last] = 1
    q, weights = torch.ones(1, 1, 1, 128, dtype=torch.bfloat16), None
    assert k.numel() > 2**31
    indices, scores = index_topk(q, weights, k, 2, with_scores=True)
    assert indices.tolist() == [[[last, 0]]]
    assert scores is not None
    assert selected_scores(q, weights, k, torch.tensor([[[0, last]]])).tolist() == [[[0.0, 128.0]]]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_indices_give_what_the_score_matrix_gives(data: st.DataObject) -> None:
    sq, sk, topk = (data.draw(st.integers(low, high)) for low, high in ((0, 5), (1, 7), (0, 9)))
    case = Case(sq, sk, b=data.draw(st.integers(1, 2)), h=data.draw(st.integers(1, 3)), d=2, visible="causal")
    flat = st.lists(st.integers(-1, sk - 1), min_size=case.b * sq * topk, max_size=case.b * sq * topk)
    indices = torch.tensor(data.draw(flat), dtype=torch.int64).view(case.b, sq, topk)
    mine, theirs = leaves(case, torch.float64), leaves(case, torch.float64)
    ours, oracle = scores_at(mine, indices, causal=True), at(index_scores(*theirs, causal=True), indices)
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)
    g = torch.ones_like(ours).masked_fill(oracle.isneginf(), 0)
    for x, y in zip(torch.autograd.grad(ours, mine, g), torch.autograd.grad(oracle, theirs, g), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("visible", ["all", "causal", "ragged", "bias"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck_of_the_op_that_ships(visible: str, activation: str | None, weighted: bool) -> None:
    case = Case(5, 7, b=2, h=3, d=4, visible=visible, activation=activation, weighted=weighted, scale=0.5)
    indices = some_indices(case, 6)

    def visible_scores(*x: Tensor) -> Tensor:
        scores = selected_scores(x[0], x[1] if weighted else None, x[-1], indices, **case.call())
        return scores[scores.detach().isfinite()]

    assert torch.autograd.gradcheck(visible_scores, leaves(case, torch.float64))


def test_a_selection_scores_what_it_was_selected_by() -> None:
    q, weights, k = leaves(Case(40, 300, b=2, h=8, d=16))
    selection = index_topk(q, weights, k, 50, causal=True, with_scores=True)
    assert selection.scores is not None
    scores = selected_scores(q, weights, k, selection.indices, causal=True)
    assert torch.equal(scores.isneginf(), selection.scores.isneginf())
    torch.testing.assert_close(scores, selection.scores)


@pytest.mark.parametrize("layout", ["bshd", "thd"])
def test_layouts_are_the_same_call(layout: str) -> None:
    case = Case(29, 31, b=1 if layout == "thd" else 2, h=5, d=12)
    inputs, indices = leaves(case), some_indices(case, 11)
    keys = KeyRange.sliding(29, 31, 9)
    expected = scores_at(inputs, indices, keys=keys)
    moved = [x[:, 0] if layout == "thd" else x.transpose(0, 1) for x in inputs]
    scores = scores_at(moved, indices, keys=keys, layout=layout)
    assert torch.equal(scores, expected)
    g = torch.randn(expected.shape)
    ours, theirs = torch.autograd.grad(scores, inputs, g), torch.autograd.grad(expected, inputs, g)
    assert all(map(torch.equal, ours, theirs))


def test_strides_and_index_dtypes_change_nothing() -> None:
    case = Case(20, 30, b=2, h=4, d=8)
    q, weights, k = (x.detach() for x in leaves(case))
    indices = some_indices(case, 10)
    expected = selected_scores(q, weights, k, indices)
    assert torch.equal(selected_scores(q, weights, k, indices.long()), expected)
    assert torch.equal(selected_scores(q, weights, k, indices.mT.contiguous().mT), expected)
    odd = [torch.stack([x, x], dim=-1)[..., 0] for x in (q, weights, k)]
    assert torch.equal(scores_at(odd, indices), expected)
    one_row = indices[:, :1].expand(-1, 20, -1)
    assert torch.equal(selected_scores(q, weights, k, one_row), selected_scores(q, weights, k, one_row.contiguous()))


def test_nan_in_a_key_that_nobody_selected_or_may_see_reaches_no_gradient() -> None:
    q, weights, k = leaves(Case(3, 5, h=2, d=4))
    with torch.no_grad():
        k[0] = k[4] = NAN
    indices = torch.tensor([[[1, 2, -1], [3, -1, -1], [4, 1, 2]]])  # -1 stands on key 0's place; key 4 is not seen
    keys = KeyRange(end=torch.tensor([5, 5, 4], dtype=torch.int32))
    scores = selected_scores(q, weights, k, indices, keys=keys)
    assert scores[0, 2].isneginf().tolist() == [True, False, False]
    g = torch.full_like(scores, NAN).masked_fill(scores.isfinite(), 1)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(scores, [q, weights, k], g))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_runs_and_workspaces_give_the_same_bits(dtype: torch.dtype) -> None:
    case = Case(300, 900, h=16, d=32)
    inputs, indices = leaves(case, dtype), some_indices(case, 256)
    g = torch.randn(indices.shape)

    def run(workspace: int | None) -> list[Tensor]:
        scores = scores_at(inputs, indices, workspace=workspace)
        return [scores, *torch.autograd.grad(scores, inputs, g)]

    expected = run(None)
    for workspace in [16 * MIB, 512 * MIB, *[None] * 20]:
        assert all(map(torch.equal, run(workspace), expected))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "case", [*[c for c in CASES if c.weighted], Case(500, 3000, b=2, h=32, d=64), Case(5, 9, h=300, d=4)], ids=str
)
def test_planned_bytes_are_measured_bytes(case: Case, dtype: str) -> None:
    inputs = leaves(case, getattr(torch, dtype))
    indices = some_indices(case, 300 if case.sq > 100 else 23)
    relu = case.activation == "relu"
    plan = IndexerGeometry(case.b, case.sq, case.sk, case.h, case.d, indices.shape[2], dtype, relu).bill(SELECTED)
    g = torch.randn(indices.shape, dtype=torch.float64 if dtype == "float64" else torch.float32)
    call = case.call()
    scores_at(inputs, indices, **call)
    forward = allocator_peak(lambda: scores_at(inputs, indices, **call), CPU)
    assert LEAST_SHARE * plan.forward <= forward.peak <= plan.forward
    assert forward.left == forward.result.nbytes, "something besides the scores is held for backward"
    backward = allocator_peak(lambda: torch.autograd.grad(forward.result, inputs, g), CPU)
    measured = max(forward.peak, forward.result.nbytes + backward.peak)
    assert LEAST_SHARE * plan.training <= measured <= plan.training


@pytest.mark.parametrize("sizes", [(0, 5, 3), (5, 0, 3), (5, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("b", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_zero_length_axes_score_nothing(sizes: tuple[int, int, int], b: int, dtype: torch.dtype) -> None:
    sq, sk, topk = sizes
    inputs = leaves(Case(sq, sk, b=b, h=2, d=3), dtype)
    scores = scores_at(inputs, torch.full((b, sq, topk), -1))
    assert scores.shape == (b, sq, topk)
    assert scores.isneginf().all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(scores, inputs, torch.ones_like(scores)))


@pytest.mark.parametrize("needed", [{0}, {1}, {2}, {0, 1}, {1, 2}])
@pytest.mark.parametrize("activation", ["relu", None])
def test_any_subset_of_the_gradients_can_be_asked_for(needed: set[int], activation: str | None) -> None:
    case = Case(20, 30, h=4, d=8, activation=activation)
    everything, indices = leaves(case), some_indices(case, 10)
    g = torch.randn(indices.shape)
    every = torch.autograd.grad(scores_at(everything, indices, **case.call()), everything, g)
    some = [x.detach().requires_grad_(i in needed) for i, x in enumerate(everything)]
    wanted = [x for x in some if x.requires_grad]
    grads = torch.autograd.grad(scores_at(some, indices, **case.call()), wanted, g)
    assert all(map(torch.equal, grads, [every[i] for i in sorted(needed)]))


@pytest.mark.parametrize(("needed", "products"), [({0}, 2), ({1}, 1), ({2}, 2), ({0, 1, 2}, 3)])
def test_products_that_nobody_needs_are_skipped(needed: set[int], products: int) -> None:
    case = Case(20, 30, h=4, d=8)
    inputs, indices = (
        [x.detach().requires_grad_(i in needed) for i, x in enumerate(leaves(case))],
        some_indices(case, 10),
    )
    scores = scores_at(inputs, indices)
    wanted = [x for x in inputs if x.requires_grad]
    with profile() as watched:
        torch.autograd.grad(scores, wanted, torch.ones_like(scores))
    counts = {event.key: event.count for event in watched.key_averages()}
    assert counts.get("aten::bmm", 0) + counts.get("aten::baddbmm_", 0) == products


def op_arguments(dtype: torch.dtype, *, grad: bool) -> tuple[Any, ...]:
    case = Case(9, 11, b=2, h=3, d=4, visible="causal")
    call = score_call("test", *case.inputs(dtype), **{**DEFAULTS, **case.call()})  # type: ignore[arg-type]
    inputs = [None if x is None else x.detach().requires_grad_(grad) for x in call.inputs]
    return (*inputs, some_indices(case, 5), *call.options, "eager")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(ops.selected_scores, op_arguments(dtype, grad=True))
    g = torch.randn(2, 9, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(ops.selected_scores_backward, (g, *op_arguments(dtype, grad=False), *needs))


def test_the_undecorated_bodies_read_no_data() -> None:
    *arguments, _ = op_arguments(torch.bfloat16, grad=False)
    with no_data_reads():
        scores = eager.selected_scores(*arguments)
        eager.selected_scores_backward(*(torch.ones_like(scores), *arguments, (True, True, True)))


def test_it_compiles_autocasts_checkpoints_and_infers() -> None:
    torch._dynamo.reset()
    case = Case(9, 11, h=2, d=4)
    inputs, indices = leaves(case), some_indices(case, 4)
    g = torch.randn(indices.shape)
    expected = scores_at(inputs, indices, causal=True)
    grads = torch.autograd.grad(expected, inputs, g)

    def agrees(scores: Tensor) -> bool:
        return torch.equal(scores, expected) and all(map(torch.equal, torch.autograd.grad(scores, inputs, g), grads))

    compiled = torch.compile(scores_at, fullgraph=True, backend="aot_eager")
    assert agrees(compiled(inputs, indices, causal=True))
    assert agrees(checkpoint(scores_at, inputs, indices, causal=True, use_reentrant=False))
    with torch.autocast("cpu"):
        assert agrees(scores_at(inputs, indices, causal=True))
    with torch.inference_mode():
        assert torch.equal(scores_at(inputs, indices, causal=True), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # forward mode's own imports
def test_it_is_differentiable_once_and_in_reverse() -> None:
    inputs, indices = leaves(Case(4, 5, h=2, d=3)), torch.zeros(1, 4, 2, dtype=torch.int32)
    grads = torch.autograd.grad(scores_at(inputs, indices).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"headfold: selected_scores can be differentiated once"):
        grads[0].sum().backward()
    with pytest.raises(UnsupportedError, match="selected_scores: differentiates in reverse mode only"):
        torch.func.jvp(lambda q: scores_at([q, *inputs[1:]], indices), (inputs[0],), (inputs[0],))
    oracle = scores_at(inputs, indices, impl="materialized")
    assert torch.autograd.grad(oracle.sum(), inputs, create_graph=True)[0].requires_grad


def test_an_index_past_the_keys_is_refused_by_torch_on_a_cpu() -> None:
    inputs = leaves(Case(2, 3, h=1, d=4))
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        scores_at(inputs, torch.full((1, 2, 1), 3))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"indices": [1]}, TypeError, "selected_scores: indices must be a tensor, got list"),
        (
            {"indices": torch.zeros(1, 4, 2)},
            TypeError,
            "selected_scores: indices must be int32 or int64, got torch.float",
        ),
        (
            {"indices": torch.zeros(4, 2, dtype=torch.int32)},
            ValueError,
            r"selected_scores: indices must be \[b, sq, topk\], got shape \[4, 2\]",
        ),
        ({"indices": torch.zeros(1, 3, 2, dtype=torch.int32)}, ValueError, r"\[1, 4, topk\], got \[1, 3, 2\]"),
        (
            {"indices": torch.zeros(1, 4, 2, dtype=torch.int32, device="meta")},
            ValueError,
            "selected_scores: indices must be on q's device cpu, got meta",
        ),
        ({"workspace": 10}, ValueError, "selected_scores: workspace must be at least"),
        ({"impl": "fused"}, ValueError, "selected_scores: impl must be one of"),
    ],
)
def test_a_breach_is_one_sentence(change: dict[str, Any], error: type[Exception], said: str) -> None:
    q, weights, k = leaves(Case(4, 5, h=2, d=3))
    with pytest.raises(error, match=said):
        selected_scores(q, weights, k, **{"indices": torch.zeros(1, 4, 2, dtype=torch.int32), **change})
