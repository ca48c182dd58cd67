from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import CASES, Case
from headfold import KeyRange, index_scores
from headfold.lanes.budget import spend_all
from headfold.lanes.paths import per_head_loop
from headfold.tiles import MIB

NEG_INF = float("-inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def gradients(scores: Tensor, inputs: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scores, inputs, g.to(scores.dtype))


def leaves(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.requires_grad_() for x in case.inputs(dtype) if x is not None]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.d > 1], ids=str)  # at d=1 a row of dk is one number: all luck
def test_scores_and_gradients_stay_within_the_error_budget(case: Case, dtype: torch.dtype) -> None:
    spent = spend_all(case.inputs(dtype), case.incoming(), **case.call())
    assert {name: s for name, s in spent.items() if not s.kept} == {}


def test_the_budget_goes_red_when_a_score_is_off_by_a_part_in_a_million() -> None:
    from headfold.lanes.budget import spend

    truth = torch.randn(4, 64, dtype=torch.float64)
    base = truth.float()
    off = base.clone()
    off[2, 7] += truth[2].abs().max() * 1e-6
    assert spend(base, truth, [base]).kept
    spent = spend(off, truth, [base])
    assert not spent.kept
    assert spent.row == (2,)


def test_the_budget_goes_red_when_a_score_is_infinite_where_the_truth_is_not() -> None:
    from headfold.lanes.budget import spend

    truth = torch.ones(2, 3, dtype=torch.float64)
    got = truth.clone()
    got[1, 1] = NEG_INF
    assert not spend(got, truth, [truth]).kept


def test_one_order_of_sums_would_fail_the_materialised_path_itself() -> None:
    from headfold import materialized
    from headfold.contract import score_call
    from headfold.lanes.budget import DEFAULTS, spend

    def dk(dtype: torch.dtype, shuffled: bool = False) -> Tensor:
        q, weights, k = (x.to(dtype) for x in Case(200, 200, h=2, d=8).inputs(torch.float32) if x is not None)
        call = score_call("test", q, weights, k.requires_grad_(), **DEFAULTS)
        generator = torch.Generator().manual_seed(0)
        scores = materialized.reordered(call, generator) if shuffled else materialized.index_scores(call)
        return torch.autograd.grad(scores, k, Case(200, 200).incoming().to(dtype))[0]

    one_order = spend(dk(torch.float32, shuffled=True), dk(torch.float64), [dk(torch.float32)])
    assert not one_order.kept


@pytest.mark.parametrize("case", [c for c in CASES if c.h * c.d < 300], ids=str)
def test_float64_agrees_with_the_materialised_path_to_rounding(case: Case) -> None:
    ours, theirs = leaves(case, torch.float64), leaves(case, torch.float64)
    mine = index_scores(ours[0], ours[1] if case.weighted else None, ours[-1], **case.call())
    weights = theirs[1] if case.weighted else None
    oracle = index_scores(theirs[0], weights, theirs[-1], **case.call(), impl="materialized")
    torch.testing.assert_close(mine, oracle, rtol=1e-12, atol=1e-12)
    for x, y in zip(gradients(mine, ours, case.incoming()), gradients(oracle, theirs, case.incoming()), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_few_heads_and_many_rows_keep_the_budget(seed: int) -> None:
    case = Case(2000, 64, h=4, d=16)
    spent = spend_all(case.inputs(torch.float32, seed), case.incoming(seed))
    assert {name: s for name, s in spent.items() if not s.kept} == {}


@pytest.mark.parametrize("visible", ["all", "causal", "window", "ragged", "bias"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck_of_the_op_that_ships(visible: str, activation: str | None, weighted: bool) -> None:
    case = Case(5, 7, b=2, h=3, d=4, visible=visible, activation=activation, weighted=weighted, scale=0.5)
    inputs = leaves(case, torch.float64)

    def visible_scores(*x: Tensor) -> Tensor:
        scores = index_scores(x[0], x[1] if weighted else None, x[-1], **case.call())
        return scores[scores.detach().isfinite()]

    assert torch.autograd.gradcheck(visible_scores, inputs)


@pytest.mark.parametrize("layout", ["bshd", "thd"])
def test_layouts_are_the_same_call(layout: str) -> None:
    case = Case(29, 31, b=1 if layout == "thd" else 2, h=5, d=12)
    inputs = leaves(case)
    keys = KeyRange.sliding(29, 31, 9)
    expected = index_scores(*inputs, keys=keys)
    moved = [x[:, 0] if layout == "thd" else x.transpose(0, 1) for x in inputs]
    scores = index_scores(*moved, keys=keys, layout=layout)
    assert torch.equal(scores, expected)
    g = case.incoming().masked_fill(~expected.isfinite(), 0)
    assert all(map(torch.equal, gradients(scores, inputs, g), gradients(expected, inputs, g)))


@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
def test_gradients_come_back_in_the_strides_of_their_inputs(layout: str) -> None:
    inputs = leaves(Case(6, 7, b=2, h=3, d=4))
    moved = [x.detach().transpose(0, 1).contiguous().requires_grad_() for x in inputs] if layout == "bshd" else inputs
    grads = torch.autograd.grad(index_scores(*moved, layout=layout).sum(), moved)
    assert all(g.stride() == x.stride() for g, x in zip(grads, moved, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_float32_unless_inputs_are_float64_and_gradients_have_their_inputs_dtypes(
    dtype: torch.dtype,
) -> None:
    q, _, k = (x if x is None else x.requires_grad_() for x in Case(6, 7).inputs(dtype))
    weights = torch.randn(6, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    assert q is not None
    assert k is not None
    scores = index_scores(q, weights, k)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [g.dtype for g in gradients(scores, [q, weights, k], torch.ones(1, 6, 7))] == [dtype, torch.bfloat16, dtype]


@pytest.mark.parametrize("needed", [{0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2}])
def test_any_subset_of_gradients_equals_its_part_of_all_three(needed: set[int]) -> None:
    case = Case(20, 21, h=3, d=8, visible="causal")
    everything = leaves(case)
    full = gradients(index_scores(*everything, causal=True), everything, case.incoming())
    some = [x.detach().requires_grad_(i in needed) for i, x in enumerate(everything)]
    index_scores(*some, causal=True).backward(case.incoming().float())
    for i, x in enumerate(some):
        assert (x.grad is None) == (i not in needed)
        assert x.grad is None or torch.equal(x.grad, full[i])


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0), (3, 3)])
@pytest.mark.parametrize("b", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_length_axes_give_empty_scores_and_zero_gradients(
    sizes: tuple[int, int], b: int, dtype: torch.dtype
) -> None:
    inputs = leaves(Case(*sizes, b=b, h=2, d=3), dtype)
    scores = index_scores(*inputs, causal=True)
    assert scores.shape == (b, *sizes)
    grads = torch.autograd.grad(scores.sum(), inputs)
    assert all(g.shape == x.shape for g, x in zip(grads, inputs, strict=True))
    assert scores.numel() > 0 or not any(g.any() for g in grads)


def test_rows_with_an_empty_range_score_minus_infinity_and_get_no_gradient() -> None:
    inputs = leaves(Case(4, 6, h=2, d=3))
    start = torch.tensor([0, 3, 6, 2], dtype=torch.int32)
    end = torch.tensor([6, 3, 9, 1], dtype=torch.int32)
    scores = index_scores(*inputs, keys=KeyRange(start, end))
    assert scores[0, 0].isfinite().all()
    assert (scores[0, 1:] == NEG_INF).all()
    scores[0].nan_to_num(neginf=0).sum().backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad[0].any()
    assert not inputs[0].grad[1:].any()


def test_a_bias_row_of_minus_infinity_hides_even_nan_and_infinite_logits() -> None:
    q, weights, k = leaves(Case(3, 4, h=2, d=3))
    with torch.no_grad():
        k[1] = float("nan")
        k[2] = float("inf")
    bias = torch.zeros(1, 3, 4)
    bias[:, :, 1:3] = NEG_INF
    scores = index_scores(q, weights, k, bias=bias)
    assert (scores[..., 1:3] == NEG_INF).all()
    assert scores[..., [0, 3]].isfinite().all()


def test_nan_logits_propagate() -> None:
    q, weights, k = leaves(Case(3, 4, h=2, d=3))
    with torch.no_grad():
        k[1] = float("nan")
    scores = index_scores(q, weights, k)
    assert scores[..., 1].isnan().all()
    assert scores[..., [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("visible", ["causal", "window", "ragged", "bias"])
def test_a_nan_gradient_at_an_invisible_key_is_ignored(visible: str) -> None:
    case = Case(20, 21, b=2, h=3, d=8, visible=visible)
    inputs = leaves(case)
    scores = index_scores(*inputs, **case.call())
    hidden = scores.detach() == NEG_INF
    assert hidden.any()
    clean, dirty = case.incoming().masked_fill(hidden, 0), case.incoming().masked_fill(hidden, float("nan"))
    expected = gradients(scores, inputs, clean)
    assert all(map(torch.equal, gradients(index_scores(*inputs, **case.call()), inputs, dirty), expected))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_weights_of_either_sign_count_with_it(sign: float) -> None:
    q, weights, k = leaves(Case(6, 7, h=3, d=5))
    scores = index_scores(q, sign * weights.abs(), k)
    assert (sign * scores >= 0).all()
    assert (scores != 0).any()


@pytest.mark.parametrize("activation", ["relu", None])
def test_strided_and_stride_0_inputs_are_read_as_they_are(activation: str | None) -> None:
    q = torch.randn(5, 2, 3, 16)[..., ::2]
    k = torch.randn(1, 2, 8).expand(9, 2, 8)
    weights = torch.randn(3, 2, 5).permute(2, 1, 0)
    plain = [x.contiguous().requires_grad_() for x in (q, weights, k)]
    strided = [x.detach().requires_grad_() for x in (q, weights, k)]
    g = torch.randn(2, 5, 9)
    expected, scores = (index_scores(*x, activation=activation) for x in (plain, strided))
    torch.testing.assert_close(scores, expected)
    for x, y in zip(gradients(scores, strided, g), gradients(expected, plain, g), strict=True):
        torch.testing.assert_close(x, y)


def test_an_expanded_incoming_gradient_is_read_as_it_is() -> None:
    for activation in ("relu", None):
        inputs = leaves(Case(30, 31, h=3, d=5))
        one = torch.ones(()).expand(1, 30, 31)
        scores = index_scores(*inputs, activation=activation)
        expected = gradients(scores, inputs, one.contiguous())
        for x, y in zip(gradients(index_scores(*inputs, activation=activation), inputs, one), expected, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[12]], ids=str)
def test_results_are_bitwise_equal_across_runs_and_workspaces(case: Case) -> None:
    def run(workspace: int | None) -> list[Tensor]:
        inputs = leaves(case)
        scores = index_scores(*inputs, **case.call(), workspace=workspace)
        return [scores.detach(), *gradients(scores, inputs, case.incoming())]

    first = run(None)
    for workspace in (None, 16 * MIB, 512 * MIB):
        assert all(map(torch.equal, run(workspace), first))


def test_index_arithmetic_past_two_to_the_31() -> None:
    sq, sk, h = 4096, 16500, 32
    assert sq * sk * h > 2**31
    q, weights, k = torch.randn(sq, 1, h, 1), torch.randn(sq, 1, h), torch.randn(sk, 1, 1)
    scores = index_scores(q, weights, k)
    expected = per_head_loop(q[-3:], weights[-3:], k)
    torch.testing.assert_close(scores[:, -3:], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_index_arithmetic_where_the_scores_alone_pass_two_to_the_31() -> None:
    sq, sk = 32768, 65600
    q, weights, k = torch.randn(sq, 1, 1, 2), torch.randn(sq, 1, 1), torch.randn(sk, 1, 2)
    scores = index_scores(q, weights, k)
    torch.testing.assert_close(scores[:, -3:], per_head_loop(q[-3:], weights[-3:], k))


def test_the_seed_loop_computes_the_same_scores() -> None:
    q, weights, k = leaves(Case(20, 30, b=2, h=3, d=8))
    for causal in (False, True):
        expected = index_scores(q, weights, k, causal=causal, scale=0.5)
        torch.testing.assert_close(per_head_loop(q, weights, k, causal, 0.5), expected)
