"""selected_scores by kernels, on a GPU or under Triton's interpreter on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headfold import KeyRange, scatter_tiles, selected_scores
from headfold.backends import load
from headfold.contract import score_call
from headfold.lanes.budget import DEFAULTS, spend_all
from headfold.lanes.syncfree import no_data_reads
from headfold.scatter_tiles import DenseTile, ScatterTile
from headfold.tiles import MIB
from on_device import DEVICE, Case, drawn, there

triton = pytest.importorskip("triton", reason="Triton is not installed")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
QUICK = [torch.bfloat16, torch.float32]
WAYS = ("picks", "dense")  # how dk is made
NEG_INF, NAN = float("-inf"), float("nan")
CASES = [
    Case(5, 41, b=2, h=3, d=80, visible="causal"),
    Case(4, 70, h=70, d=16, visible="ragged"),
    Case(4, 41, b=2, h=5, d=33, visible="bias", scale=3.0),
    Case(5, 31, h=4, d=48, visible="window", activation=None),
    Case(5, 31, h=1, d=192, visible="ratio", weighted=False),
]
# The rest, beyond the first case's and a dtype or two of each, are slow ones.
EACH = [
    pytest.param(case, dtype, dense, id=f"{case}-{dtype}-{WAYS[dense]}", marks=[] if quick else [pytest.mark.slow])
    for n, case in enumerate(CASES)
    for dtype in DTYPES
    for dense in (False, True)
    for quick in [n == 0 or dtype in QUICK[: max(1, 3 - n) - (not dense)]]
]


def some_indices(case: Case, topk: int, seed: int = 0) -> Tensor:
    """Any keys, in any order, with duplicates and -1 among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, case.sk, (case.b, case.sq, topk), generator=generator, dtype=torch.int32).to(DEVICE)


def leaves(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return case.leaves(dtype)


def scores_at(inputs: list[Tensor], indices: Tensor, **call: Any) -> Tensor:
    q, *weights, k = inputs
    return selected_scores(q, weights[0] if weights else None, k, indices, **{"impl": "triton", **call})


def outcome(inputs: list[Tensor], indices: Tensor, g: Tensor, **call: Any) -> list[Tensor]:
    scores = scores_at(inputs, indices, **call)
    return [scores, *torch.autograd.grad(scores, inputs, g.to(scores.dtype))]


def incoming(indices: Tensor, seed: int = 1) -> Tensor:
    return drawn(*indices.shape, seed=seed, dtype=torch.float64)


@pytest.fixture(params=[False, True], ids=WAYS)
def dense(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Make dk one way, then the other."""
    chosen: bool = request.param
    monkeypatch.setattr(scatter_tiles, "meets_every_key", lambda *_, **__: chosen)
    return chosen


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small shapes into many blocks of rows, slabs and spans of picks."""
    monkeypatch.setattr(scatter_tiles, "_SETTLED_BYTES", 1500)
    monkeypatch.setattr(scatter_tiles, "_SLAB_BYTES", 1100)
    monkeypatch.setattr(scatter_tiles, "_LEAST_SPAN", 5)
    monkeypatch.setattr(scatter_tiles, "_DENSE_BYTES", 1000)
    monkeypatch.setattr(scatter_tiles, "_PART_ROWS", 3)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("case", "dtype", "dense"), EACH, indirect=["dense"])
def test_scores_and_gradients_stay_within_the_error_budget(case: Case, dtype: torch.dtype, dense: bool) -> None:
    indices = some_indices(case, 23)
    spent = spend_all(case.inputs(dtype), incoming(indices), indices, impl="triton", **case.call())
    assert {name: s for name, s in spent.items() if not s.kept} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.slow
@pytest.mark.usefixtures("dense")
def test_many_rows_that_select_the_same_keys_keep_the_budget(dtype: torch.dtype) -> None:
    case = Case(70, 12, h=2, d=16)
    orders = [torch.randperm(12, generator=torch.Generator().manual_seed(n))[:9] for n in range(70)]
    indices = torch.stack(orders).to(DEVICE)
    spent = spend_all(case.inputs(dtype), incoming(indices[None]), indices[None], impl="triton")
    assert {name: s for name, s in spent.items() if not s.kept} == {}


def test_weights_wider_than_queries_have_gradients_as_exact_as_they_are() -> None:
    case = Case(4, 90, h=3, d=32)
    q, weights, k = leaves(case, torch.bfloat16)
    wide, indices = weights.detach().float().requires_grad_(), some_indices(case, 60)
    g = incoming(indices)
    spent = spend_all([q, wide, k], g, indices, impl="triton")
    assert spent["dweights"].kept
    assert spent["dq"].kept


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("activation", ["relu", None])
def test_blocks_slabs_and_spans_sum_to_the_same(activation: str | None, dense: bool) -> None:
    case = Case(9, 21, b=2, h=33, d=16, visible="causal", activation=activation)
    inputs, indices = leaves(case, torch.float64), some_indices(case, 17)
    q, _, k = (x.transpose(0, 1) for x in inputs)
    tile = load("triton").gather_tile_of(q, k, indices, activation == "relu")
    assert isinstance(tile, DenseTile) == dense
    if dense:
        assert 1 < tile.rows < 9
        assert tile.parts == (1 if activation is None else 8)
    else:
        assert 1 <= tile.rows < tile.block < 9
        assert tile.span < 17
    g = incoming(indices)
    for x, y in zip(
        outcome(inputs, indices, g, **case.call()),
        outcome(inputs, indices, g, impl="eager", **case.call()),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dense", [False], indirect=True)
def test_more_rows_than_a_word_tells_apart(dense: bool) -> None:
    case = Case(67, 5, h=1, d=16)
    inputs, indices = leaves(case, torch.float64), some_indices(case, 4)
    tile = ScatterTile.of(67, 5, 4, 16, 8, beside=8)
    assert tile.rows == 67
    g = incoming(indices)
    for x, y in zip(outcome(inputs, indices, g), outcome(inputs, indices, g, impl="eager"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("visible", ["ragged", "bias"])
def test_gradcheck_through_the_kernels(visible: str, activation: str | None) -> None:
    case = Case(2, 4, h=2, d=16, visible=visible, activation=activation, scale=0.3)
    indices = some_indices(case, 5)

    def visible_scores(*x: Tensor) -> Tensor:
        scores = scores_at(list(x), indices, **case.call())
        return scores[scores.detach().isfinite()]

    assert torch.autograd.gradcheck(visible_scores, leaves(case, torch.float64), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_equal_picks_whose_gradients_cancel_keep_the_budget(dtype: torch.dtype) -> None:
    case = Case(12, 4, h=3, d=16)
    indices = torch.arange(4, dtype=torch.int32, device=DEVICE).repeat(1, 12, 2)
    half = drawn(1, 12, 4, seed=2)
    spent = spend_all(case.inputs(dtype), torch.cat([half, half * -0.99], -1), indices, impl="triton")
    assert {name: s for name, s in spent.items() if not s.kept} == {}


@pytest.mark.usefixtures("dense")
def test_equal_picks_all_count() -> None:
    case = Case(2, 3, h=2, d=16)
    inputs = leaves(case, torch.float64)
    indices = torch.tensor([[[1] * 70, [1, 2, -1] * 23 + [0]]], dtype=torch.int64, device=DEVICE)
    g = incoming(indices)
    for x, y in zip(outcome(inputs, indices, g), outcome(inputs, indices, g, impl="eager"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("activation", ["relu", None])
def test_nan_in_what_nobody_selected_or_may_see_reaches_no_result(activation: str | None) -> None:
    q, weights, k = inputs = leaves(Case(3, 5, h=2, d=16))
    with torch.no_grad():
        k[0] = k[4] = NAN
    indices = torch.tensor([[[1, 2, -1], [3, -1, -1], [4, 1, 2]]], device=DEVICE)
    keys = there(KeyRange(end=torch.tensor([5, 5, 4], dtype=torch.int32)))
    scores = scores_at(inputs, indices, keys=keys, activation=activation)
    assert scores[0, 2].isneginf().tolist() == [True, False, False]
    g = torch.full_like(scores, NAN).masked_fill(scores.isfinite(), 1)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(scores, [q, weights, k], g))


@pytest.mark.filterwarnings("ignore:.*invalid value:RuntimeWarning")  # NumPy's, under the interpreter
@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [NAN, float("inf"), NEG_INF])
def test_nan_and_infinity_of_a_selected_key_propagate_as_in_eager(value: float, dtype: torch.dtype) -> None:
    inputs = leaves(case := Case(4, 6, h=3, d=16), dtype)
    with torch.no_grad():
        inputs[2][2, 0, 1] = value
    indices = some_indices(case, 5)
    # 1 is one half-precision number, 1.7 is two, of which the first would be rounded up.
    g = incoming(indices).float().masked_fill(indices == 2, 1.7).masked_fill(indices < 0, 0)
    g[:, 0].masked_fill_(indices[:, 0] == 2, 1)
    ours, theirs = outcome(inputs, indices, g), outcome(inputs, indices, g, impl="eager")
    near = 1e-5 if dtype == torch.float32 else 0.05
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, rtol=near, atol=near)


@pytest.mark.filterwarnings("ignore:.*invalid value:RuntimeWarning")
@pytest.mark.usefixtures("dense", "small_slabs")
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("of", ["q", "weights"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_query_that_is_not_finite_reaches_no_key_that_it_did_not_select(
    value: float, of: str, activation: str | None
) -> None:
    q, weights, k = leaves(Case(5, 80, h=3, d=16))
    indices = torch.tensor([3, 7, 70]).repeat(1, 5, 1).to(DEVICE)
    indices[0, 2] = torch.tensor([5, 70, -1])
    g = incoming(indices).float()
    g[0, 2, 0] = 0
    without = indices.index_fill(1, torch.tensor([2], device=DEVICE), -1)
    *_, expected = outcome([q, weights, k], without, g.masked_fill(without < 0, 0), activation=activation)
    with torch.no_grad():
        (q if of == "q" else weights)[2] = value
    *_, dk = outcome([q, weights, k], indices, g.masked_fill(indices < 0, 0), activation=activation)
    assert not dk[5].isfinite().all()
    assert not dk[70].isfinite().all()
    others = [t for t in range(80) if t not in (5, 70)]
    assert torch.equal(dk[others], expected[others])


def test_an_index_beyond_the_keys_is_as_one_that_may_not_be_seen() -> None:
    inputs, indices = leaves(Case(1, 3, h=1, d=16)), torch.tensor([[[0, 3, 2**31 - 1]]], device=DEVICE)
    assert scores_at(inputs, indices).isneginf().tolist() == [[[False, True, True]]]


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("size", [1e-7, 1e5])
@pytest.mark.parametrize("activation", ["relu", None])
def test_float16_gradients_do_not_leave_its_range_on_the_way(size: float, activation: str | None) -> None:
    case = Case(3, 9, h=3, d=16, activation=activation)
    q, weights, k = (x.detach() for x in leaves(case, torch.float16))
    # One of them is that much smaller in the result, so that dq and dk are float16 numbers again.
    inputs = [x.requires_grad_() for x in (q, (weights.float() / size).requires_grad_(), k)]
    indices = some_indices(case, 7)
    g = incoming(indices) * size
    spent = spend_all(inputs, g, indices, impl="triton", activation=activation)
    assert {name: s for name, s in spent.items() if not s.kept} == {}


@pytest.mark.usefixtures("dense")
def test_strides_and_index_dtypes_change_nothing() -> None:
    case = Case(5, 30, b=2, h=4, d=16, visible="bias")
    inputs, indices, call = leaves(case), some_indices(case, 10), case.call()
    g = incoming(indices)
    expected = outcome(inputs, indices, g, **call)
    odd = [torch.stack([x, x], dim=-1)[..., 0] for x in inputs]
    moved = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    bias = call.pop("bias")
    for other, some, added in (
        (odd, indices.long(), bias.mT.contiguous().mT),
        (moved, indices.mT.contiguous().mT, torch.stack([bias, bias], -1)[..., 1]),
    ):
        scores = scores_at(other, some, bias=added, **call)
        assert torch.equal(scores, expected[0])
        grads = torch.autograd.grad(scores, inputs, g.mT.contiguous().mT.float())
        assert all(map(torch.equal, grads, expected[1:]))


def test_a_bias_and_a_range_of_one_batch_element_stand_for_all() -> None:
    case = Case(3, 8, b=2, h=2, d=16)
    inputs, indices = leaves(case), some_indices(case, 6)
    bias = drawn(1, 3, 8).masked_fill(torch.arange(8, device=DEVICE) == 3, NEG_INF)
    start, end = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([1, 0, 4], [3, 8, 7]))
    keys = KeyRange(start, end)
    g = incoming(indices)
    for x, y in zip(
        outcome(inputs, indices, g, bias=bias, keys=keys),
        outcome(inputs, indices, g, bias=bias, keys=keys, impl="eager"),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_slabs", "dense")
def test_runs_and_workspaces_give_the_same_bits() -> None:
    case = Case(6, 20, h=4, d=16)
    inputs, indices = leaves(case, torch.bfloat16), some_indices(case, 14)
    g = incoming(indices)
    expected = outcome(inputs, indices, g)
    for workspace in (None, 4 * MIB, 20 * MIB):
        assert all(map(torch.equal, outcome(inputs, indices, g, workspace=workspace), expected))


@pytest.mark.parametrize("needed", [{0}, {1}, {2}])
@pytest.mark.parametrize("activation", ["relu", None])
def test_any_gradient_can_be_asked_for_alone(needed: set[int], activation: str | None) -> None:
    case = Case(3, 9, h=3, d=16, activation=activation)
    everything, indices = leaves(case), some_indices(case, 6)
    g = incoming(indices).float()
    every = torch.autograd.grad(scores_at(everything, indices, activation=activation), everything, g)
    some = [x.detach().requires_grad_(i in needed) for i, x in enumerate(everything)]
    wanted = [x for x in some if x.requires_grad]
    grads = torch.autograd.grad(scores_at(some, indices, activation=activation), wanted, g)
    assert all(map(torch.equal, grads, [every[i] for i in sorted(needed)]))


@pytest.mark.parametrize("sizes", [(0, 5, 3), (5, 0, 3), (5, 4, 0)])
@pytest.mark.parametrize("b", [0, 2])
def test_zero_length_axes_score_nothing(sizes: tuple[int, int, int], b: int) -> None:
    sq, sk, topk = sizes
    inputs = leaves(Case(sq, sk, b=b, h=2, d=16))
    nothing = torch.full((b, sq, topk), -1, device=DEVICE)
    scores, *grads = outcome(inputs, nothing, torch.ones(b, sq, topk, device=DEVICE))
    assert scores.shape == (b, sq, topk)
    assert scores.isneginf().all()
    assert all((grad == 0).all() for grad in grads)


def test_a_key_axis_beyond_two_to_the_31_elements_is_reached() -> None:
    last = 2**24 + 4  # times 128 channels: zeros that are never touched take no memory of the machine
    k = torch.zeros(last + 1, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    k[last] = 1
    q = torch.ones(1, 1, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    scores = selected_scores(q, None, k, torch.tensor([[[0, last]]], device=DEVICE), impl="triton")
    assert scores.tolist() == [[[0.0, 128.0]]]


@pytest.mark.parametrize("sk", [4096, 131_072, 1 << 20])
@pytest.mark.parametrize("topk", [1, 64, 2048])
@pytest.mark.parametrize("size", [4, 8])
def test_16_mib_are_enough_for_any_number_of_picks(sk: int, topk: int, size: int) -> None:
    assert ScatterTile.of(4096, sk, topk, 128, size, beside=size, held=4).backward_bytes <= 16 * MIB


@pytest.mark.parametrize("sk", [1, 100, 4096, 30_000, 131_072])
@pytest.mark.parametrize("h", [1, 32, 128])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("size", [4, 8])
def test_16_mib_are_enough_for_dscores_at_all_keys(sk: int, h: int, relu: bool, size: int) -> None:
    tile = DenseTile.of(4096, sk, h, 128, size, relu=relu)
    assert tile.backward_bytes <= 16 * MIB
    assert 1 <= tile.parts <= 8


def test_dk_is_made_of_dscores_at_all_keys_where_few_are_visible_a_pick() -> None:
    rule = scatter_tiles.meets_every_key
    assert rule(4096, 2048, 32, 128, exact=False)
    assert rule(87_000, 2048, 32, 128, exact=False)
    assert not rule(88_000, 2048, 32, 128, exact=False)
    assert not rule(40_000, 2048, 128, 128, exact=False)
    assert not rule(24_000, 2048, 32, 32, exact=False)
    assert rule(8192, 2048, 32, 128, exact=True)
    assert not rule(8193, 2048, 32, 128, exact=True)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the interpreter's launches")
@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("dense", [True], indirect=True)
def test_a_slab_takes_two_launches(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    case = Case(9, 60, h=3, d=16)
    q, weights, k = leaves(case)
    indices = some_indices(case, 17)
    scores = scores_at([q.detach(), weights.detach(), k], indices)
    launched: list[Any] = []
    launch: Any = GridExecutor.__call__

    def counted(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(kernel)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    scores.backward(torch.ones_like(scores))
    rows = DenseTile.of(9, 60, 3, 16, 4, relu=True).rows
    assert 1 < rows < 9
    assert len(launched) == 2 * -(-9 // rows)


def test_the_bodies_read_no_data() -> None:
    case = Case(3, 9, b=2, h=3, d=16, visible="causal")
    call = score_call("test", *case.inputs(torch.bfloat16), **{**DEFAULTS, **case.call()})  # type: ignore[arg-type]
    indices, kernels = some_indices(case, 5), load("triton")
    with no_data_reads():
        scores = kernels.selected_scores(*call.inputs, indices, *call.options)
        g = torch.ones_like(scores)
        kernels.selected_scores_backward(g, *call.inputs, indices, *call.options, (True, True, True))
