from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from cases import CASES, Case
from headfold import KeyRange, UnsupportedError, index_scores, ops
from headfold.backends import eager
from headfold.backends.eager import walks
from headfold.contract import score_call
from headfold.lanes.budget import DEFAULTS
from headfold.lanes.syncfree import no_data_reads

SMALL = [
    Case(9, 11, b=2, h=3, d=4, visible=v, activation=a)
    for v in ("all", "causal", "ragged", "bias")
    for a in ("relu", None)
]


def leaves(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.requires_grad_() for x in case.inputs(dtype) if x is not None]


def op_arguments(case: Case, *, grad: bool) -> tuple[Any, ...]:
    q, weights, k = case.inputs()
    assert q is not None
    assert k is not None
    call = score_call("test", q, weights, k, **{**DEFAULTS, **case.call()})
    inputs = [x.detach().requires_grad_(grad) for x in (call.q, call.weights, call.k) if x is not None]
    return (*inputs, call.start, call.end, call.bias, call.offset, call.ratio, call.relu, call.scale, "eager")


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_opcheck_forward(case: Case) -> None:
    torch.library.opcheck(ops.index_scores, op_arguments(case, grad=True))


@pytest.mark.parametrize("case", SMALL[:2], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    q, weights, k, *rest = op_arguments(case, grad=True)
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, weights, k)]
    torch.library.opcheck(ops.index_scores, (*inputs, *rest))


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
def test_opcheck_backward(needs: tuple[bool, bool, bool]) -> None:
    case = SMALL[2]
    arguments = (case.incoming().float(), *op_arguments(case, grad=False), *needs)
    torch.library.opcheck(ops.index_scores_backward, arguments)


@pytest.mark.parametrize("case", [*SMALL, CASES[0]], ids=str)
def test_the_undecorated_bodies_never_read_data(case: Case) -> None:
    *arguments, _ = op_arguments(case, grad=False)
    g = case.incoming().float()
    with no_data_reads():
        eager.index_scores(*arguments)
        eager.index_scores_backward(*(g, *arguments, (True, True, True)))


@pytest.mark.parametrize("make", ["causal", "positions", "packed", "sliding", "and"])
def test_ranges_are_made_and_checked_without_reading_data(make: str) -> None:
    cu, positions = torch.tensor([0, 3, 9]), torch.arange(9)
    q, weights, k = (x for x in Case(9, 9, h=2, d=3).inputs())
    assert q is not None
    assert k is not None
    with no_data_reads():
        keys = {
            "causal": lambda: KeyRange.causal(9, 9),
            "positions": lambda: KeyRange.at_positions(positions),
            "packed": lambda: KeyRange.packed(cu, cu, total_q=9),
            "sliding": lambda: KeyRange.sliding(9, 9, 4),
            "and": lambda: KeyRange.at_positions(positions) & KeyRange.sliding(9, 9, 4),
        }[make]()
        score_call("test", q, weights, k, **{**DEFAULTS, "keys": keys})


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_compiles_with_fullgraph_and_gives_the_same_bits(case: Case) -> None:
    torch._dynamo.reset()
    inputs = leaves(case)
    scores = index_scores(*inputs, **case.call())
    compiled = torch.compile(index_scores, fullgraph=True, backend="aot_eager")(*inputs, **case.call())
    assert torch.equal(compiled, scores)
    g = case.incoming().float()
    expected = torch.autograd.grad(scores, inputs, g)
    assert all(map(torch.equal, torch.autograd.grad(compiled, inputs, g), expected))


def test_compiles_with_dynamic_shapes_and_a_range_made_inside() -> None:
    torch._dynamo.reset()

    def scored(q: Tensor, weights: Tensor, k: Tensor, cu: Tensor) -> Tensor:
        packed = KeyRange.packed(cu, cu, total_q=q.shape[0]) & KeyRange.causal(q.shape[0], k.shape[0])
        return index_scores(q, weights, k, keys=packed, layout="thd").relu()

    compiled = torch.compile(scored, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 14):
        q, weights, k = (x.detach()[:, 0].requires_grad_() for x in leaves(Case(n, n, h=2, d=3)))
        cu = torch.tensor([0, 4, n])
        assert torch.equal(compiled(q, weights, k, cu), scored(q, weights, k, cu))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # inductor's own imports
def test_compiles_with_the_inductor_backend() -> None:
    torch._dynamo.reset()
    inputs = leaves(Case(9, 11, h=2, d=4))
    compiled = torch.compile(lambda *x: index_scores(*x, causal=True, scale=2.0).exp(), fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), index_scores(*inputs, causal=True, scale=2.0).exp())


@pytest.mark.parametrize("impl", ["eager", "materialized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_no_score(impl: str, dtype: torch.dtype) -> None:
    inputs = leaves(Case(20, 21, b=2, h=3, d=8), dtype)
    plain = index_scores(*inputs, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(index_scores(*inputs, impl=impl), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_no_gradient(dtype: torch.dtype) -> None:
    case = Case(20, 21, b=2, h=3, d=8)
    inputs, g = leaves(case, dtype), case.incoming().float()

    def run() -> list[Tensor]:
        return list(torch.autograd.grad(index_scores(*inputs), inputs, g))

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run()
    assert all(map(torch.equal, cast, plain))


def test_the_bodies_run_with_autocast_off(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    product = walks._Scratch.product

    def watched(self: walks._Scratch, q: Tensor, k: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return product(self, q, k)

    monkeypatch.setattr(walks._Scratch, "product", watched)
    inputs = leaves(Case(4, 5, h=2, d=3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.autograd.grad(index_scores(*inputs).sum(), inputs)
    assert seen == [False, False]


def test_no_grad_and_inference_mode_give_the_same_scores() -> None:
    inputs = leaves(Case(20, 21, h=3, d=8))
    expected = index_scores(*inputs)
    with torch.no_grad():
        assert torch.equal(index_scores(*inputs), expected)
    with torch.inference_mode():
        scores = index_scores(*inputs)
    assert torch.equal(scores, expected)
    assert not scores.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    inputs = leaves(Case(20, 21, h=3, d=8))
    g = Case(20, 21).incoming().float()
    expected = torch.autograd.grad(index_scores(*inputs, causal=True), inputs, g.tril(1))
    scores = checkpoint(lambda *x: index_scores(*x, causal=True), *inputs, use_reentrant=reentrant)
    assert isinstance(scores, Tensor)
    scores.backward(g.tril(1))
    assert all(torch.equal(x.grad, e) for x, e in zip(inputs, expected, strict=True) if x.grad is not None)
    assert all(x.grad is not None for x in inputs)


def test_nothing_head_shaped_is_saved_for_backward() -> None:
    inputs = leaves(Case(20, 21, h=3, d=8, visible="bias"))
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        index_scores(*inputs, **Case(20, 21, visible="bias").call())
    assert len(saved) == 4
    assert all(x.untyped_storage().nbytes() <= max(y.untyped_storage().nbytes() for y in inputs) for x in saved)


def test_double_backward_raises_a_sentence_of_ours() -> None:
    inputs = leaves(Case(4, 5, h=2, d=3))
    g = torch.randn(1, 4, 5, requires_grad=True)
    (dq,) = torch.autograd.grad(index_scores(*inputs), inputs[:1], g, create_graph=True)
    with pytest.raises(RuntimeError, match="headfold: index_scores can be differentiated once"):
        dq.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # forward mode's own imports
@pytest.mark.parametrize("dual", ["torch.func", "forward_ad"])
def test_forward_mode_is_refused_and_points_to_the_path_that_can(dual: str) -> None:
    q, weights, k = (x.detach() for x in leaves(Case(4, 5, h=2, d=3)))

    def tangent(impl: str) -> Tensor | None:
        if dual == "torch.func":
            moved: Tensor = torch.func.jvp(lambda x: index_scores(x, weights, k, impl=impl), (q,), (q,))[1]
            return moved
        with forward_ad.dual_level():
            scores = index_scores(forward_ad.make_dual(q, q), weights, k, impl=impl)
            found: Tensor | None = forward_ad.unpack_dual(scores).tangent
            return found

    with pytest.raises(UnsupportedError, match="reverse mode only"):
        tangent("eager")
    torch.testing.assert_close(tangent("materialized"), index_scores(q, weights, k))  # scores are linear along q


def test_the_materialised_path_can_be_differentiated_twice_as_the_sentence_says() -> None:
    inputs = leaves(Case(4, 5, h=2, d=3), torch.float64)
    assert torch.autograd.gradgradcheck(lambda *x: index_scores(*x, impl="materialized"), inputs)


def test_products_that_nobody_needs_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[bool, bool]] = []
    walk = eager.BackwardWalk.slab

    def watched(self: eager.BackwardWalk, *args: Any) -> None:
        counted.append((args[-3] is not None, args[-1] is not None))
        walk(self, *args)

    monkeypatch.setattr(eager.BackwardWalk, "slab", watched)
    q, weights, k = leaves(Case(4, 5, h=2, d=3))
    torch.autograd.grad(index_scores(q, weights.detach(), k.detach()).sum(), [q])
    torch.autograd.grad(index_scores(q.detach(), weights, k.detach()).sum(), [weights])
    torch.autograd.grad(index_scores(q.detach(), weights, k).sum(), [k])
    assert counted == [(True, False), (False, False), (False, True)]
