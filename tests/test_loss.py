from __future__ import annotations

import itertools
import math
import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cases import Case
from headfold import IndexerLoss, KeyRange, UnsupportedError, index_topk, indexer_loss, ops
from headfold.backends import eager
from headfold.backends.eager import teacher, walks
from headfold.contract import attention_of, score_call
from headfold.lanes.budget import DEFAULTS
from headfold.lanes.measure import allocator_peak
from headfold.lanes.residency import LEAST_SHARE, SMALL_CHANGE
from headfold.lanes.syncfree import no_data_reads
from headfold.loss_tiles import LossTile
from headfold.tiles import DEFAULT_WORKSPACE, MIB, Tile

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NEG_INF, NAN = float("-inf"), float("nan")
SOFTMAX_SCALE = 0.35
# Mask kinds x support x activation x row mask x reduction. h=32 makes slabs of 64 rows, so 70 rows are two.
VISIBLE = ["all", "causal", "window", "ragged", "ratio", "bias"]
SUPPORTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense and selected": {"topk": 9},
    "sparse": {"topk": 9, "sparse": True},
    "sparse beyond all keys": {"topk": 70, "sparse": True},
}


def attention(case: Case, np: int = 4, np_k: int = 2, hn: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = (case.sq, case.b, np, hn), (case.sk, case.b, np_k, hn)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def some_rows(case: Case) -> Tensor:
    return torch.rand(case.b, case.sq, generator=torch.Generator().manual_seed(11)) < 0.6


def leaves(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.requires_grad_() for x in case.inputs(dtype) if x is not None]


def loss_of(inputs: list[Tensor], beside: list[Tensor], **call: Any) -> IndexerLoss:
    q, weights, k = inputs
    return indexer_loss(q, weights, k, *beside, **{"softmax_scale": SOFTMAX_SCALE, **call})


def with_gradients(inputs: list[Tensor], beside: list[Tensor], **call: Any) -> list[Tensor]:
    """Loss and gradients; inputs are taken as fresh leaves."""
    fresh = [x.detach().requires_grad_() for x in inputs]
    loss = loss_of(fresh, beside, **call).loss
    return [loss.detach(), *torch.autograd.grad(loss, fresh)]


def assert_near(ours: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    """Off by at most the tolerance, relative to the largest true value of each tensor."""
    for x, y in zip(ours, truth, strict=True):
        assert x.isfinite().all()
        assert float((x.double() - y).abs().max()) <= tolerance * float(y.abs().max()), (x, y)


def plan_of(inputs: list[Tensor], beside: list[Tensor], topk: int | None = None) -> LossTile:
    q, _, k, query, key = (x.transpose(0, 1) for x in (*inputs, *beside))
    return eager.loss_plan(q, k, query, key, True, topk)


def nbytes(*tensors: Tensor | None) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors if x is not None)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("activation", ["relu", None], ids=["relu", "linear"])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("visible", VISIBLE)
def test_every_combination_agrees_with_full_tensors_under_autograd(
    visible: str, support: str, activation: str | None, masked: bool
) -> None:
    case = Case(70, 61, b=2, h=32, d=8, visible=visible, activation=activation, scale=0.5)
    mask = some_rows(case) if masked else None
    for reduction, (dtype, tolerance) in itertools.product(
        ("mean", "sum"), ((torch.float64, 1e-11), (torch.float32, 5e-6))
    ):
        call = {**case.call(), **SUPPORTS[support], "row_mask": mask, "reduction": reduction}
        inputs, beside = leaves(case, dtype), attention(case, dtype=dtype)
        ours = with_gradients(inputs, beside, **call)
        wide = [x.double() for x in inputs], [x.double() for x in beside]
        assert_near(ours, with_gradients(*wide, impl="materialized", **call), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(131, 1603, h=32, d=16, visible="causal"),
        Case(40, 900, h=64, d=16, visible="bias"),
        Case(9, 5000, h=2, d=8, scale=0.25),
        Case(150, 150, h=2, d=8, visible="causal"),  # few heads: zeros tie at the cut
    ],
    ids=str,
)
@pytest.mark.parametrize("sparse", [False, True])
def test_slabs_of_many_tiles_and_long_rows_agree_too(case: Case, sparse: bool, dtype: torch.dtype) -> None:
    inputs, beside = leaves(case, dtype), attention(case, dtype=dtype)
    call = {**case.call(), "topk": 40, "sparse": sparse}
    ours = with_gradients(inputs, beside, **call)
    wide = [x.double() for x in inputs], [x.double() for x in beside]
    truth = with_gradients(*wide, impl="materialized", **call)
    assert_near(ours, truth, 1e-11 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("impl", ["eager", "materialized"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_row_is_what_the_definition_says(impl: str, sparse: bool) -> None:
    case, topk = Case(6, 7, h=3, d=4, visible="ragged"), 3
    inputs, beside = leaves(case, torch.float64), attention(case, np=4, np_k=2, hn=5, dtype=torch.float64)
    (q, weights, k), (query, key) = ([x[:, 0].tolist() for x in group] for group in (inputs, beside))
    total = 0.0

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    for s in range(6):
        support = [t for t in range(7) if s % 3 <= t < (s * 7) % 9 - 1]
        score = {t: sum(w * max(0.0, dot(a, k[t])) for a, w in zip(q[s], weights[s], strict=True)) for t in support}
        if sparse:
            support = sorted(support, key=lambda t: (-score[t], t))[:topk]
        mass = dict.fromkeys(support, 0.0)
        for j in range(4):
            logit = {t: SOFTMAX_SCALE * dot(query[s][j], key[t][j // 2]) for t in support}
            norm = sum(map(math.exp, logit.values()))
            for t in support:
                mass[t] += math.exp(logit[t]) / norm
        norm = sum(math.exp(score[t]) for t in support)
        for t in support:
            p = mass[t] / sum(mass.values())
            total += p * (math.log(p) - math.log(math.exp(score[t]) / norm))
    got = loss_of(inputs, beside, topk=topk, sparse=sparse, impl=impl, **case.call())
    assert float(got.loss.detach()) == pytest.approx(total / 6, rel=1e-12)
    summed = loss_of(inputs, beside, topk=topk, sparse=sparse, impl=impl, reduction="sum", **case.call())
    assert float(summed.loss.detach()) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("visible", ["all", "causal", "ragged", "bias"])
@pytest.mark.parametrize("support", ["dense", "sparse"])
@pytest.mark.parametrize("activation", ["relu", None])
def test_gradcheck_of_the_op_that_ships(visible: str, support: str, activation: str | None) -> None:
    case = Case(5, 7, b=2, h=3, d=4, visible=visible, activation=activation, scale=0.5)
    inputs, beside = leaves(case, torch.float64), attention(case, hn=3, dtype=torch.float64)
    topk = {} if support == "dense" else {"topk": 3, "sparse": True}
    assert torch.autograd.gradcheck(lambda *x: loss_of(list(x), beside, **topk, **case.call()).loss, inputs)


def test_weights_of_none_are_ones() -> None:
    case = Case(20, 21, h=3, d=8, visible="causal")
    (q, weights, k), beside = leaves(case, torch.float64), attention(case, dtype=torch.float64)
    expected = with_gradients([q, torch.ones_like(weights), k], beside, causal=True)
    loss = indexer_loss(q, None, k, *beside, softmax_scale=SOFTMAX_SCALE, causal=True).loss
    assert_near([loss.detach(), *torch.autograd.grad(loss, [q, k])], [expected[0], expected[1], expected[3]], 1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_results_and_values_near_the_truth(dtype: torch.dtype) -> None:
    case = Case(40, 41, b=2, h=8, d=16, visible="causal")
    inputs, beside = leaves(case, dtype), attention(case, dtype=dtype)
    result = loss_of(inputs, beside, topk=5, causal=True)
    assert result.indices is not None
    assert (result.indices.dtype, result.indices.shape) == (torch.int32, (2, 40, 5))
    assert (result.loss.dtype, result.loss.shape) == (torch.float64 if dtype == torch.float64 else torch.float32, ())
    ours = with_gradients(inputs, beside, causal=True)
    assert [x.dtype for x in ours[1:]] == [dtype] * 3
    truth = with_gradients([x.double() for x in inputs], [x.double() for x in beside], impl="materialized", causal=True)
    assert_near(ours[:1], truth[:1], 5e-6)
    assert_near(ours[1:], truth[1:], 5e-6 + torch.finfo(dtype).eps)


def test_attention_may_have_another_dtype_than_the_indexer() -> None:
    case = Case(20, 21, h=3, d=8)
    inputs, beside = leaves(case), attention(case, dtype=torch.bfloat16)
    wide = with_gradients(inputs, [x.float() for x in beside])
    assert all(map(torch.equal, with_gradients(inputs, beside), wide))


@pytest.mark.parametrize("layout", ["bshd", "thd"])
def test_layouts_are_the_same_call(layout: str) -> None:
    case = Case(29, 31, b=1 if layout == "thd" else 2, h=5, d=12)
    inputs, beside = leaves(case), attention(case)
    call: dict[str, Any] = {"keys": KeyRange.sliding(29, 31, 9), "topk": 4, "row_mask": some_rows(case)}
    expected = loss_of(inputs, beside, **call)
    moved, others = ([x[:, 0] if layout == "thd" else x.transpose(0, 1) for x in group] for group in (inputs, beside))
    got = loss_of(moved, others, layout=layout, **call)
    assert torch.equal(got.loss, expected.loss)
    assert got.indices is not None
    assert expected.indices is not None
    assert torch.equal(got.indices, expected.indices)
    grads = torch.autograd.grad(expected.loss, inputs)
    assert all(map(torch.equal, torch.autograd.grad(got.loss, inputs), grads))


def test_any_strides_serve() -> None:
    case = Case(29, 31, b=2, h=5, d=12)
    inputs, beside = leaves(case), attention(case)
    expected = with_gradients(inputs, beside, causal=True)
    turned = [x.detach().transpose(0, -1).contiguous().transpose(0, -1) for x in (*inputs, *beside)]
    ours = with_gradients(turned[:3], turned[3:], causal=True)
    assert_near(ours, [x.double() for x in expected], 1e-6)


@pytest.mark.parametrize("np_k", [1, 2, 3, 6])
def test_heads_of_query_share_the_heads_of_key_in_order(np_k: int) -> None:
    case = Case(70, 31, b=2, h=32, d=8)
    inputs, (query, key) = leaves(case, torch.float64), attention(case, np=6, np_k=np_k, dtype=torch.float64)
    ours = with_gradients(inputs, [query, key], causal=True)
    all_heads = with_gradients(inputs, [query, key.repeat_interleave(6 // np_k, 2)], causal=True)
    assert_near(ours, all_heads, 1e-13)
    oracle = with_gradients(inputs, [query, key], causal=True, impl="materialized")
    assert_near(ours, oracle, 1e-11)


def test_an_expanded_key_is_one_head_and_is_never_copied() -> None:
    case = Case(33, 3000, h=4, d=16)
    inputs, (query, key) = leaves(case), attention(case, np=64, np_k=1, hn=32)
    expanded = key.expand(-1, -1, 64, -1)
    one, many = [query, key], [query, expanded]
    assert all(map(torch.equal, with_gradients(inputs, many), with_gradients(inputs, one)))
    peaks = [allocator_peak(partial(with_gradients, inputs, beside), CPU).peak for beside in (one, many)]
    assert peaks[0] == peaks[1] < expanded.numel() * 4


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (2, 2)]),
    st.sampled_from(VISIBLE),
    st.integers(0, 45),
    st.booleans(),
)
def test_ragged_sizes(
    sq: int, sk: int, b: int, h: int, d: int, heads: tuple[int, int], visible: str, topk: int, sparse: bool
) -> None:
    case = Case(sq, sk, b=b, h=h, d=d, visible=visible)
    inputs, beside = leaves(case, torch.float64), attention(case, *heads, hn=d, dtype=torch.float64)
    call = {**case.call(), "topk": topk, "sparse": sparse, "row_mask": some_rows(case)}
    ours, oracle = loss_of(inputs, beside, **call), loss_of(inputs, beside, impl="materialized", **call)
    assert ours.indices is not None
    assert oracle.indices is not None
    assert torch.equal(ours.indices, oracle.indices)
    grads = [torch.autograd.grad(x.loss, inputs) for x in (ours, oracle)]
    for x, y in zip((ours.loss, *grads[0]), (oracle.loss, *grads[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("visible", ["all", "causal", "ragged", "bias"])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_selection_is_that_of_index_topk(visible: str, sparse: bool, dtype: torch.dtype) -> None:
    case = Case(300, 1700, b=2, h=8, d=32, visible=visible)
    q, weights, k = ((x * 1.5).round() for x in case.inputs(dtype) if x is not None)  # sums are exact, and tie
    got = loss_of([q, weights, k], attention(case, dtype=dtype), topk=64, sparse=sparse, **case.call())
    assert got.indices is not None
    assert torch.equal(got.indices, index_topk(q, weights, k, 64, **case.call()).indices)


def test_without_topk_nothing_is_selected() -> None:
    case = Case(5, 7)
    assert loss_of(leaves(case), attention(case)).indices is None


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("support", ["dense", "sparse"])
@pytest.mark.parametrize("how", ["range", "static", "bias", "topk"])
def test_rows_without_support_add_nothing_and_no_nan(how: str, support: str, reduction: str) -> None:
    case = Case(70, 31, b=2, h=32, d=8)
    inputs, beside = leaves(case), attention(case)
    call: dict[str, Any] = {"reduction": reduction, "topk": 5, "sparse": support == "sparse"}
    bias = torch.zeros(2, 70, 31)
    bias[:, :66] = NEG_INF
    ways: dict[str, dict[str, Any]] = {
        "range": {"keys": KeyRange(end=torch.where(torch.arange(70) < 66, 0, 31).int())},
        "static": {"keys": KeyRange(offset=-67)},
        "bias": {"bias": bias},
        "topk": {"topk": 0, "sparse": True},
    }
    call |= ways[how]
    loss, dq, dweights, dk = with_gradients(inputs, beside, **call)
    seen = {"range": 66, "static": 67, "bias": 66, "topk": 70}[how]
    assert all(x.isfinite().all() for x in (loss, dq, dweights, dk))
    assert not dq[:seen].any()
    assert not dweights[:seen].any()
    some = [x[seen:] for x in inputs[:2]] + inputs[2:]
    rest = {k: v for k, v in call.items() if k not in ("keys", "bias")}
    if how == "static":
        rest["keys"] = KeyRange(offset=0)
    alone = with_gradients(some, [beside[0][seen:], beside[1]], **rest)
    factor = 1.0 if reduction == "sum" or how == "topk" else (70 - seen) / 70
    assert (loss == 0) == (how == "topk")
    assert (dk == 0).all() == (how == "topk")
    for x, y in zip((loss, dq[seen:], dweights[seen:], dk), alone, strict=True):
        torch.testing.assert_close(x, factor * y, rtol=1e-5, atol=1e-8)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("impl", ["eager", "materialized"])
def test_with_no_row_that_counts_the_loss_is_zero(reduction: str, impl: str) -> None:
    case = Case(9, 11, b=2)
    call: dict[str, Any] = {"row_mask": torch.zeros(2, 9, dtype=torch.bool), "reduction": reduction, "impl": impl}
    assert all((x == 0).all() for x in with_gradients(leaves(case), attention(case), **call))


def test_a_row_that_does_not_count_may_hold_anything_in_its_query() -> None:
    case = Case(9, 11)
    inputs, (query, key) = leaves(case), attention(case)
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 3] = False
    clean = with_gradients(inputs, [query, key], row_mask=mask)
    query[3] = NAN
    assert all(map(torch.equal, with_gradients(inputs, [query, key], row_mask=mask), clean))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_probabilities_that_underflow_add_nothing(dtype: torch.dtype) -> None:
    case = Case(20, 21, h=3, d=8, scale=40.0)  # both the teacher's and the student's
    inputs, beside = leaves(case, dtype), attention(case, dtype=dtype)
    call: dict[str, Any] = {"scale": case.scale, "causal": True, "softmax_scale": 400.0}
    ours = with_gradients(inputs, beside, **call)
    wide = [x.double() for x in inputs], [x.double() for x in beside]
    assert_near(ours, with_gradients(*wide, impl="materialized", **call), 1e-11 if dtype == torch.float64 else 1e-4)


def test_keys_beyond_the_static_bound_are_not_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fill = teacher.Teacher.fill

    def watched(self: teacher.Teacher, mass: Tensor, *args: Any) -> None:
        seen.append(mass.shape[1])
        fill(self, mass, *args)

    monkeypatch.setattr(teacher.Teacher, "fill", watched)
    case = Case(200, 200, h=32, d=8)
    loss_of(leaves(case), attention(case), keys=KeyRange(offset=-64))
    assert seen == [64, 128, 136]  # of slabs of 64 rows; the first is skipped


def test_a_nan_score_is_a_nan_loss() -> None:
    case = Case(9, 11)
    inputs = leaves(case)
    with torch.no_grad():
        inputs[0][4] = NAN
    loss, dq, *_ = with_gradients(inputs, attention(case))
    assert loss.isnan()
    assert dq[4].isnan().all()
    assert dq[:4].isfinite().all()


def test_backward_scales_what_forward_made() -> None:
    case = Case(20, 21, h=3, d=8)
    inputs, beside = leaves(case), attention(case)
    plain = with_gradients(inputs, beside)[1:]
    loss = loss_of(inputs, beside).loss
    for factor in (3.0, 0.0, -0.5):  # the graph is kept, so what is held must not have been scaled in place
        scaled = torch.autograd.grad(loss, inputs, torch.tensor(factor), retain_graph=True)
        assert all(torch.equal(x, factor * y) for x, y in zip(scaled, plain, strict=True))


def test_half_precision_gradients_are_scaled_before_they_are_cast() -> None:
    case = Case(64, 65, h=3, d=8)
    inputs, beside = leaves(case, torch.float16), attention(case)
    tiny = 2.0**-20
    grads = torch.autograd.grad(tiny * loss_of(inputs, beside).loss * 2.0**20, inputs)
    assert all(map(torch.equal, grads, with_gradients(inputs, beside)[1:]))
    small = [x.half().float() for x in torch.autograd.grad(tiny * loss_of(inputs, beside).loss, inputs)]
    assert not torch.equal(small[0] * 2.0**20, grads[0].float())  # a cast before the factor would have lost this much


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_three_gradients_are_held(dtype: torch.dtype) -> None:
    case = Case(60, 70, b=2, h=8, d=16)
    inputs, beside = leaves(case, dtype), attention(case, dtype=dtype)
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss_of(inputs, beside, topk=4, sparse=True, bias=torch.zeros(1, 60, 70))
    assert [x.shape for x in saved] == [x.transpose(0, 1).shape for x in inputs]
    size = 8 if dtype == torch.float64 else 4
    forward = allocator_peak(lambda: loss_of(inputs, beside).loss, CPU)
    gradients = sum(x.numel() for x in inputs) * size
    assert forward.left == gradients + size
    backward = allocator_peak(lambda: torch.autograd.grad(forward.result, inputs), CPU)
    assert backward.peak - nbytes(*inputs) - size <= (SMALL_CHANGE if size > dtype.itemsize else 0)


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_is_formed(quiet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(60, 70, b=2, h=8, d=256)
    inputs, beside = leaves(case), attention(case)
    expected = loss_of(inputs, beside, topk=4)
    monkeypatch.setattr(eager.BackwardWalk, "slab", None)
    for off in (False, True):
        some = [x.detach() for x in inputs] if off else inputs

        def run(some: list[Tensor] = some, off: bool = off) -> IndexerLoss:
            if off:
                return loss_of(some, beside, topk=4)
            with quiet():
                return loss_of(some, beside, topk=4)

        peak = allocator_peak(run, CPU)
        assert peak.left == nbytes(*peak.result)
        assert peak.peak <= peak.left + plan_of(inputs, beside, 4).forward_bytes
        assert torch.equal(peak.result.loss, expected.loss)
        assert not peak.result.loss.requires_grad


@pytest.mark.parametrize("needed", [{0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2}])
def test_any_subset_of_gradients_equals_its_part_of_all_three(needed: set[int]) -> None:
    case = Case(20, 21, h=3, d=8, visible="causal")
    everything, beside = leaves(case), attention(case)
    full = with_gradients(everything, beside, causal=True)[1:]
    some = [x.detach().requires_grad_(i in needed) for i, x in enumerate(everything)]
    peak = allocator_peak(lambda: loss_of(some, beside, causal=True).loss, CPU)
    assert peak.left == nbytes(*(x for i, x in enumerate(everything) if i in needed)) + 4
    peak.result.backward()
    for i, x in enumerate(some):
        assert (x.grad is None) == (i not in needed)
        assert x.grad is None or torch.equal(x.grad, full[i])


def test_query_and_key_receive_no_gradient() -> None:
    case = Case(20, 21, h=3, d=8)
    inputs, beside = leaves(case), [x.requires_grad_() for x in attention(case)]
    loss_of(inputs, beside).loss.backward()
    assert all(x.grad is None for x in beside)
    assert not loss_of([x.detach() for x in inputs], beside).loss.requires_grad


SIZES = [
    Case(200, 300, b=2, h=16, d=32),
    Case(130, 800, b=2, h=32, d=32, visible="causal"),
    Case(70, 900, h=32, d=128, visible="bias"),
    Case(5, 20_000, h=4, d=16, visible="ragged"),
    Case(90, 90, h=8, d=8, visible="ragged"),
]


@pytest.mark.parametrize("topk", [None, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_planned_bytes_are_measured_bytes(case: Case, dtype: torch.dtype, topk: int | None) -> None:
    inputs, beside = leaves(case, dtype), attention(case, np=8, np_k=2, hn=64, dtype=dtype)
    plan = plan_of(inputs, beside, topk)
    selection = 0 if topk is None else 4 * case.b * case.sq * topk
    size = plan.tile.size
    gradients = sum(x.numel() for x in inputs) * size
    call = {**case.call(), "topk": topk, "sparse": topk is not None, "row_mask": some_rows(case)}
    loss_of(inputs, beside, **call)
    training = allocator_peak(lambda: loss_of(inputs, beside, **call), CPU)
    planned = selection + gradients + plan.backward_bytes
    assert LEAST_SHARE * planned <= training.peak <= planned
    assert training.left == selection + gradients + size
    with torch.no_grad():
        quiet = allocator_peak(lambda: loss_of(inputs, beside, **call), CPU)
    planned = selection + plan.forward_bytes
    assert LEAST_SHARE * planned <= quiet.peak <= planned


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("topk", [None, 64, 2048])
def test_the_workspace_is_enough(topk: int | None, dtype: str) -> None:
    size = 4 if dtype == "float32" else 8
    for sk in (1, 512, 2048, 8192, 32_768, 131_072):
        tile = Tile.of(4096, sk, 32, 128, size)
        for np, np_k, hn in ((16, 16, 64), (128, 1, 576), (64, 8, 128)):
            plan = LossTile.of(1, 4096, tile, sk, np, np_k, hn, topk)
            assert plan.backward_bytes <= (16 * MIB if size == 4 and sk <= 32_768 else DEFAULT_WORKSPACE)


@pytest.mark.parametrize("sparse", [False, True])
def test_nothing_of_the_size_of_rows_times_keys_exists(sparse: bool) -> None:
    case = Case(2048, 2048, b=2, h=4, d=16)
    inputs, beside = leaves(case), attention(case, np=2, np_k=2, hn=16)
    peak = allocator_peak(lambda: loss_of(inputs, beside, topk=64, sparse=sparse, workspace=16 * MIB), CPU)
    gradients, selection = nbytes(*inputs), 4 * 2 * 2048 * 64
    assert peak.peak <= gradients + selection + 16 * MIB < 2 * 2048 * 2048 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_the_run_or_the_workspace(dtype: torch.dtype) -> None:
    case = Case(130, 900, h=32, d=16, visible="causal")
    inputs, beside = leaves(case, dtype), attention(case, dtype=dtype)
    call: dict[str, Any] = {"causal": True, "topk": 100, "sparse": True}
    expected = with_gradients(inputs, beside, **call)
    least = plan_of(inputs, beside, 100).backward_bytes
    for workspace in (least, 48 * MIB, 512 * MIB, None):
        assert all(map(torch.equal, with_gradients(inputs, beside, workspace=workspace, **call), expected))
    with pytest.raises(ValueError, match=f"indexer_loss: workspace must be at least {least} bytes"):
        loss_of(inputs, beside, workspace=least - 1, **call)
    with torch.no_grad():
        assert torch.equal(loss_of(inputs, beside, workspace=least - 1, **call).loss, expected[0])


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("b", [0, 2])
@pytest.mark.parametrize("impl", ["eager", "materialized"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_zero_length_axes(sizes: tuple[int, int], b: int, impl: str, reduction: str) -> None:
    case = Case(*sizes, b=b, h=2, d=3)
    inputs, beside = leaves(case), attention(case)
    result = loss_of(inputs, beside, topk=3, sparse=True, reduction=reduction, impl=impl)
    assert float(result.loss.detach()) == 0
    assert result.indices is not None
    assert result.indices.shape == (b, sizes[0], 3)
    assert (result.indices == -1).all()
    for x, grad in zip(inputs, torch.autograd.grad(result.loss, inputs), strict=True):
        assert x.shape == grad.shape
        assert not grad.any()


def op_arguments(case: Case, *, grad: bool, topk: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
    q, weights, k = case.inputs(dtype)
    assert q is not None
    assert k is not None
    call = score_call("test", q, weights, k, **{**DEFAULTS, **case.call()})
    query, key = attention(case, dtype=dtype)
    query, key = attention_of("test", query, key, call, "sbhd")
    inputs = [x.detach().requires_grad_(grad) for x in (call.q, call.weights, call.k) if x is not None]
    ranges = call.start, call.end, call.bias, some_rows(case), call.offset, call.ratio, call.relu, call.scale
    return (*inputs, query, key, *ranges, SOFTMAX_SCALE, topk, topk is not None, True, "eager")


@pytest.mark.parametrize("topk", [None, 4])
@pytest.mark.parametrize("visible", ["all", "causal", "ragged", "bias"])
def test_opcheck_of_the_walk(visible: str, topk: int | None) -> None:
    arguments = op_arguments(Case(9, 11, b=2, h=3, d=4, visible=visible), grad=True, topk=topk)
    torch.library.opcheck(ops.indexer_loss, (*arguments, True, True, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck_of_other_dtypes_and_of_the_scaling(dtype: torch.dtype) -> None:
    case = Case(9, 11, b=2, h=3, d=4)
    torch.library.opcheck(ops.indexer_loss, (*op_arguments(case, grad=True, dtype=dtype), True, True, True))
    q, weights, k = (x.detach().float().transpose(0, 1) for x in leaves(case))
    arguments = torch.tensor(2.0), q, weights, k, dtype, torch.float16
    torch.library.opcheck(ops.indexer_loss_backward, arguments)


@pytest.mark.parametrize("topk", [None, 4])
@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_undecorated_bodies_read_no_data(visible: str, topk: int | None, dtype: torch.dtype) -> None:
    case = Case(70, 61, b=2, h=32, d=8, visible=visible)
    *arguments, _ = op_arguments(case, grad=False, topk=topk, dtype=dtype)
    with no_data_reads():
        loss, _, *gradients = eager.indexer_loss(*arguments, needs=(True, True, True), reduce=lambda x: None)
        for gradient in gradients:
            assert gradient is not None
            eager.scaled(loss, gradient, dtype)


@pytest.mark.parametrize("visible", ["all", "causal", "ragged", "bias"])
def test_compiles_with_fullgraph_and_gives_the_same_bits(visible: str) -> None:
    torch._dynamo.reset()
    case = Case(9, 11, b=2, h=3, d=4, visible=visible)
    inputs, beside = leaves(case), attention(case)
    call = {**case.call(), "topk": 4, "row_mask": some_rows(case)}
    expected = loss_of(inputs, beside, **call)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(inputs, beside, **call)
    assert torch.equal(compiled.loss, expected.loss)
    assert expected.indices is not None
    assert compiled.indices is not None
    assert torch.equal(compiled.indices, expected.indices)
    grads = torch.autograd.grad(expected.loss, inputs, torch.tensor(2.0))
    assert all(map(torch.equal, torch.autograd.grad(compiled.loss, inputs, torch.tensor(2.0)), grads))


def test_compiles_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 14):
        case = Case(n, n + 3, b=2, h=3, d=4)
        inputs, beside = leaves(case), attention(case)
        loss = compiled(inputs, beside, causal=True, topk=4).loss
        expected = with_gradients(inputs, beside, causal=True, topk=4)
        assert all(map(torch.equal, [loss, *torch.autograd.grad(loss, inputs)], expected))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # inductor's own imports
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    case = Case(9, 11, b=2, h=3, d=4)
    inputs, beside = leaves(case), attention(case)
    expected = with_gradients(inputs, beside, causal=True)
    loss = torch.compile(lambda *x: loss_of(list(x), beside, causal=True).loss * 2, fullgraph=True)(*inputs)
    torch.testing.assert_close([loss, *torch.autograd.grad(loss, inputs)], [2 * x for x in expected])


def test_checkpoints_and_autocast_give_the_same_gradients() -> None:
    case = Case(20, 21, h=3, d=8)
    inputs, beside = leaves(case), attention(case)
    expected = with_gradients(inputs, beside)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, with_gradients(inputs, beside), expected))
    for reentrant in (False, True):
        fresh = [x.detach().requires_grad_() for x in inputs]
        loss = checkpoint(lambda *x: loss_of(list(x), beside).loss, *fresh, use_reentrant=reentrant)
        assert isinstance(loss, Tensor)
        loss.backward()
        assert all(torch.equal(x.grad, y) for x, y in zip(fresh, expected[1:], strict=True) if x.grad is not None)
        assert all(x.grad is not None for x in fresh)


def test_the_bodies_run_with_autocast_off(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    for owner, name in ((walks._Scratch, "product"), (teacher.Teacher, "fill")):
        plain: Any = getattr(owner, name)

        def watched(*args: Any, plain: Any = plain) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return plain(*args)

        monkeypatch.setattr(owner, name, watched)
    case = Case(4, 5, h=2, d=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(leaves(case), attention(case))
    assert seen
    assert not any(seen)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # forward mode's own imports
def test_it_is_differentiable_once_and_in_reverse() -> None:
    case = Case(4, 5, h=2, d=3)
    inputs, beside = leaves(case), attention(case)
    grads = torch.autograd.grad(loss_of(inputs, beside).loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"headfold: indexer_loss can be differentiated once"):
        grads[0].sum().backward()
    with pytest.raises(UnsupportedError, match="indexer_loss: differentiates in reverse mode only"):
        torch.func.jvp(lambda q: loss_of([q, *inputs[1:]], beside).loss, (inputs[0],), (inputs[0],))
    oracle = loss_of(inputs, beside, impl="materialized").loss
    assert torch.autograd.grad(oracle, inputs, create_graph=True)[0].requires_grad


def test_flops_count_the_products() -> None:
    case = Case(20, 30, b=2, h=4, d=16)
    inputs, beside = leaves(case), attention(case, np=3, np_k=1, hn=8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss_of(inputs, beside)
    assert counter.get_total_flops() == 2 * 2 * 20 * 30 * (4 * (16 + 1) + 3 * 8)


def _rank(rank: int, world: int, folder: str) -> None:
    """One of two processes, each with half of the attention heads."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = {}
    for name, call in GROUPED.items():
        inputs, (query, key) = leaves(SPLIT, torch.float64), attention(SPLIT, np=4, np_k=4, dtype=torch.float64)
        mine = slice(2 * rank, 2 * rank + 2)
        local = [query[:, :, mine], key[:, :, mine]]
        results[name] = with_gradients(inputs, local, group=dist.group.WORLD, **SPLIT.call(), **call)
        if name == "eager dense":
            results["alone"] = with_gradients(inputs, local, **SPLIT.call(), **call)
            loss = loss_of(inputs, local, group=dist.group.WORLD, **SPLIT.call(), **call).loss
            grads = torch.autograd.grad(loss, inputs, create_graph=True)
            try:
                grads[0].sum().backward()
            except RuntimeError as refusal:
                assert "indexer_loss can be differentiated once" in str(refusal)  # noqa: PT017
            else:
                raise AssertionError("differentiated twice")
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


SPLIT = Case(70, 61, b=2, h=32, d=8, visible="ragged")
GROUPED: dict[str, dict[str, Any]] = {
    "eager dense": {},
    "eager sparse": {"topk": 9, "sparse": True},
    "materialized dense": {"impl": "materialized"},
}


def test_two_processes_with_half_of_the_heads_each_agree_with_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    inputs, beside = leaves(SPLIT, torch.float64), attention(SPLIT, np=4, np_k=4, dtype=torch.float64)
    for name, call in GROUPED.items():
        one = with_gradients(inputs, beside, **SPLIT.call(), **call)
        assert_near(first[name], one, 1e-12)
        assert all(map(torch.equal, first[name], second[name]))
    one = with_gradients(inputs, beside, **SPLIT.call())
    assert float((first["alone"][0] - one[0]).abs()) > 1e-3 * float(one[0].abs())


def test_a_group_that_cannot_sum_is_refused(tmp_path: Path) -> None:
    case = Case(4, 5, h=2, d=3)
    with pytest.raises(
        ValueError, match=r"indexer_loss: group must be an initialised process group .* not initialised"
    ):
        loss_of(leaves(case), attention(case), group=object())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        everyone = dist.group.WORLD
        ours = with_gradients(leaves(case), attention(case), group=everyone)
        assert all(map(torch.equal, ours, with_gradients(leaves(case), attention(case))))
        with pytest.raises(TypeError, match=r"indexer_loss: group must be an initialised process group .* got str"):
            loss_of(leaves(case), attention(case), group="tp")
        some = dist.new_group([0])
        assert some is not None
        dist.destroy_process_group(some)
        with pytest.raises(ValueError, match="destroyed or never registered"):
            loss_of(leaves(case), attention(case), group=some)
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match="not initialised"):
        loss_of(leaves(case), attention(case), group=everyone)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            {"key": torch.zeros(5, 1, 3, 8)},
            ValueError,
            r"query's heads must be a multiple of key's, got np = 4, np_k = 3",
        ),
        ({"key": torch.zeros(5, 1, 2, 7)}, ValueError, "key must have query's width hn = 8, got 7"),
        ({"key": torch.zeros(6, 1, 2, 8)}, ValueError, r"key must have k's batch and length \[1, 5\], got \[1, 6\]"),
        (
            {"query": torch.zeros(3, 1, 4, 8)},
            ValueError,
            r"query must have q's batch and length \[1, 4\], got \[1, 3\]",
        ),
        ({"query": torch.zeros(4, 1, 0, 8)}, ValueError, "query and key need at least one head and one channel"),
        ({"query": torch.zeros(4, 4, 8)}, ValueError, r"query must be \[sq, b, np, hn\], got shape \[4, 4, 8\]"),
        ({"key": torch.zeros(5, 2, 8)}, ValueError, r"key must be \[sk, b, np_k, hn\], got shape"),
        ({"query": torch.zeros(4, 1, 4, 8).half()}, TypeError, "key must have query's dtype torch.float16, got"),
        ({"query": torch.zeros(4, 1, 4, 8).int()}, TypeError, "query must be float16, bfloat16, float32 or float64"),
        ({"query": torch.zeros(4, 1, 4, 8, device="meta")}, ValueError, "query must be on q's device cpu, got meta"),
        ({"softmax_scale": None}, TypeError, "softmax_scale must be a Python number, got NoneType"),
        (
            {"row_mask": torch.ones(4, dtype=torch.bool)},
            ValueError,
            r"row_mask must be \[b, sq\] = \[1, 4\], got \[4\]",
        ),
        ({"row_mask": torch.ones(4, 1, dtype=torch.bool)}, ValueError, r"row_mask must be \[b, sq\] = \[1, 4\], got"),
        ({"row_mask": torch.ones(1, 4)}, TypeError, "row_mask must be bool, got torch.float32"),
        ({"row_mask": [True] * 4}, TypeError, "row_mask must be a tensor or None, got list"),
        ({"row_mask": torch.ones(1, 4, dtype=torch.bool, device="meta")}, ValueError, "row_mask must be on q's device"),
        ({"sparse": True}, ValueError, "sparse=True needs topk, got topk=None"),
        ({"sparse": "yes"}, ValueError, "sparse must be one of True, False, got 'yes'"),
        ({"topk": -1}, ValueError, "topk must be at least 0, got -1"),
        ({"topk": 2.0}, TypeError, "topk must be an int, got float"),
        ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum', got 'none'"),
        ({"workspace": 10}, ValueError, "workspace must be at least"),
        ({"impl": "fused"}, ValueError, "impl must be one of"),
    ],
)
def test_a_breach_is_one_sentence(change: dict[str, Any], error: type[Exception], said: str) -> None:
    case = Case(4, 5, h=2, d=3)
    query, key = attention(case)
    call = {"query": query, "key": key, "softmax_scale": 1.0, **change}
    q, weights, k = leaves(case)
    with pytest.raises(error, match="indexer_loss: " + said):
        indexer_loss(q, weights, k, call.pop("query"), call.pop("key"), **call)
