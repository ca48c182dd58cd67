"""The residency contract: beyond its results, a call takes its workspace and small change, and holds nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CASES, Case
from headfold import IndexerGeometry, index_scores
from headfold.lanes.measure import allocator_peak
from headfold.lanes.residency import LEAST_SHARE, SMALL_CHANGE
from headfold.tiles import DEFAULT_WORKSPACE, MIB

CPU = torch.device("cpu")
DTYPES = ["float16", "bfloat16", "float32", "float64"]
BIG = Case(300, 1100, b=2, h=32, d=64)


def geometry(case: Case, dtype: str) -> IndexerGeometry:
    return IndexerGeometry(case.b, case.sq, case.sk, case.h, case.d, dtype=dtype, relu=case.activation == "relu")


def inputs(case: Case, dtype: str) -> list[Tensor]:
    return [x.requires_grad_() for x in case.inputs(getattr(torch, dtype)) if x is not None]


def nbytes(*tensors: Tensor) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


@pytest.mark.parametrize("workspace", [None, 16 * MIB])
@pytest.mark.parametrize("visible", ["all", "causal", "ragged", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_results_a_call_takes_its_workspace_and_small_change(
    dtype: str, visible: str, workspace: int | None
) -> None:
    case = Case(BIG.sq, BIG.sk, b=2, h=32, d=64, visible=visible)
    q, weights, k = inputs(case, dtype)
    call: dict[str, Any] = {**case.call(), "workspace": workspace}
    g = case.incoming().to(torch.float64 if dtype == "float64" else torch.float32)
    forward = allocator_peak(lambda: index_scores(q, weights, k, **call), CPU)
    scores: Tensor = forward.result
    bound = (DEFAULT_WORKSPACE if workspace is None else workspace) + SMALL_CHANGE
    assert forward.peak - nbytes(scores) <= bound
    assert forward.left == nbytes(scores), "something besides the scores is held for backward"
    backward = allocator_peak(lambda: torch.autograd.grad(scores, [q, weights, k], g), CPU)
    results = nbytes(*backward.result) + geometry(case, dtype).accumulator_bytes
    assert backward.peak - results <= bound
    assert backward.left == nbytes(*backward.result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*[c for c in CASES if c.weighted], BIG], ids=str)
def test_planned_bytes_are_measured_bytes(case: Case, dtype: str) -> None:
    q, weights, k = inputs(case, dtype)
    call = case.call()
    g = case.incoming().to(torch.float64 if dtype == "float64" else torch.float32)
    index_scores(q, weights, k, **call)
    forward = allocator_peak(lambda: index_scores(q, weights, k, **call), CPU)
    bill = geometry(case, dtype).bill("headfold")
    assert LEAST_SHARE * bill.forward <= forward.peak <= bill.forward
    backward = allocator_peak(lambda: torch.autograd.grad(forward.result, [q, weights, k], g), CPU)
    measured = max(forward.peak, nbytes(forward.result) + backward.peak)
    assert LEAST_SHARE * bill.training <= measured <= bill.training
    assert forward.left == nbytes(forward.result)


@pytest.mark.parametrize("keep", [{0}, {1}, {2}])
def test_a_gradient_that_nobody_needs_is_not_allocated(keep: set[int]) -> None:
    leaves = [x.detach().requires_grad_(i in keep) for i, x in enumerate(inputs(BIG, "float32"))]
    wanted = [x for x in leaves if x.requires_grad]
    scores = index_scores(*leaves)
    g = BIG.incoming().float()
    peak = allocator_peak(lambda: torch.autograd.grad(scores, wanted, g), CPU)
    assert peak.peak - nbytes(*wanted) <= geometry(BIG, "float32").backward_scratch


def test_strides_do_not_change_the_bill() -> None:
    q, weights, k = (x.detach() for x in inputs(BIG, "float32"))
    g = BIG.incoming().float()

    def peaks(*x: Tensor) -> tuple[int, int]:
        leaves = [t.requires_grad_() for t in x]
        forward = allocator_peak(partial(index_scores, *leaves), CPU)
        return forward.peak, allocator_peak(partial(torch.autograd.grad, forward.result, leaves, g), CPU).peak

    plain = peaks(q, weights, k)
    assert (
        peaks(q.transpose(2, 3).contiguous().transpose(2, 3), weights, k.transpose(0, 1).contiguous().transpose(0, 1))
        == plain
    )
    assert peaks(q, weights, k.permute(0, 2, 1).contiguous().permute(0, 2, 1)) == plain


def test_the_widest_heads_fit_the_default_workspace() -> None:
    assert IndexerGeometry(1, 512, 512, 4, 3072).backward_scratch <= DEFAULT_WORKSPACE
    assert IndexerGeometry(1, 512, 512, 64, 512, dtype="float64").backward_scratch <= DEFAULT_WORKSPACE
