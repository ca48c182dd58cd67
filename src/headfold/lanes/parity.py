"""The gradient lane: float64 gradcheck of the op that ships, then error budgets dtype by dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from headfold.keyrange import KeyRange
from headfold.lanes.budget import spend_all
from headfold.lanes.problem import Problem
from headfold.lanes.record import FAIL, PASS, Column, Lane, Row, Track, no_track
from headfold.layout import batch_first
from headfold.scores import index_scores

COLUMNS = (
    Column("check", "check"),
    Column("dtype", "dtype"),
    Column("result", "result"),
    Column("share", "share of budget used", "ratio"),
    Column("error", "relative error of that row", "ratio"),
    Column("row", "worst row"),
    Column("verdict", "verdict"),
    Column("note", "note"),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Query rows and keys of a capture or geometry that the budgets look at: the truth is materialised in float64.
ROWS = 192
# Channels of what is checked by finite differences: few, or the fewest that kernels take.
NARROW, NARROWEST_OF_KERNELS = 4, 16


def parity(problem: Problem, device: torch.device, *, impl: str = "auto", track: Track[Any] = no_track) -> Lane:
    """Check that forward and backward keep the contract, on small float64 inputs and on the problem's own tensors."""
    lane = Lane("parity", "Do forward and backward keep the contract of the materialised path?", COLUMNS)
    for name, call in track(list(gradcheck_cases(device).items()), "gradcheck, float64"):
        lane.rows.append(_gradcheck(name, call, device, impl))
    for dtype in track(DTYPES, "error budgets"):
        for name, inputs, call in _budget_cases(problem, device, dtype):
            lane.rows.extend(_budget(name, dtype, inputs, {**call, "impl": impl}))
    lane.notes = [
        "gradcheck compares analytic with finite-difference gradients of the shipped op at sq=5, sk=7, b=2, h=3, "
        f"d={checked_width(impl)}.",
        "Budget: error against float64 truth at most 2 · (the materialised path's own error in this dtype + eps · "
        "max|truth|), row by row, that error being the largest over eight orders of its sums; a share of 1 is all.",
        f"Tensors: {problem.source}; at most {ROWS} rows and keys of them.",
    ]
    return lane


def gradcheck_cases(device: torch.device) -> dict[str, dict[str, Any]]:
    """Options of every kind for a call with sq=5, sk=7."""
    bias = torch.zeros(1, 5, 7, dtype=torch.float64, device=device)
    bias[:, :, 2] = float("-inf")
    cu = torch.tensor([0, 2, 5], device=device), torch.tensor([0, 3, 7], device=device)
    return {
        "every key": {},
        "causal": {"causal": True},
        "sliding window": {"keys": KeyRange.sliding(5, 7, 3, device=device)},
        "packed": {"keys": KeyRange.packed(*cu, total_q=5)},
        "additive bias": {"bias": bias},
        "scale": {"scale": 0.125},
        "no activation": {"activation": None},
    }


def _gradcheck(name: str, call: dict[str, Any], device: torch.device, impl: str) -> Row:
    def scores(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
        return index_scores(q, weights, k, impl=impl, **call)

    return gradcheck_row(f"gradcheck, {name}", scores, device, checked_width(impl))


def checked_width(impl: str) -> int:
    """Return the channels at which an implementation's gradients are checked by finite differences."""
    return NARROWEST_OF_KERNELS if impl == "triton" else NARROW


def gradcheck_row(
    check: str, scorer: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device, d: int = NARROW
) -> Row:
    """Run gradcheck on what a scorer makes of small float64 q, weights and k of d channels, -inf left out."""
    generator = torch.Generator(device).manual_seed(0)

    def make(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        return x.requires_grad_()

    def visible_scores(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
        scores = scorer(q, weights, k)
        return torch.where(scores.detach().isneginf(), 0, scores)

    row: Row = {"check": check, "dtype": "float64", "result": "dq, dweights, dk"}
    try:
        gradcheck(visible_scores, (make(5, 2, 3, d), make(5, 2, 3), make(7, 2, d)))
    except GradcheckError as error:
        return {**row, "verdict": FAIL, "note": str(error).splitlines()[0]}
    return {**row, "verdict": PASS}


def _budget_cases(
    problem: Problem, device: torch.device, dtype: torch.dtype
) -> list[tuple[str, list[Tensor | None], dict[str, Any]]]:
    q, weights, k = problem.tensors(device, dtype)
    q, weights, k = q[-ROWS:], weights[-ROWS:], k[-ROWS:]
    base: dict[str, Any] = {"scale": problem.scale}
    cases: list[tuple[str, list[Tensor | None], dict[str, Any]]] = [
        ("every key", [q, weights, k], base),
        ("causal", [q, weights, k], {**base, "causal": True}),
        ("no activation", [q, weights, k], {**base, "activation": None}),
    ]
    swapped: list[Tensor | None] = [batch_first(x, "sbhd") for x in (q, weights, k)]
    cases.append(("layout bshd, unit weights", [swapped[0], None, swapped[2]], {**base, "layout": "bshd"}))
    return cases


def _budget(name: str, dtype: torch.dtype, inputs: list[Tensor | None], call: dict[str, Any]) -> list[Row]:
    q, _, k = inputs
    assert q is not None
    assert k is not None
    b, sq, sk = (q.shape[0], q.shape[1], k.shape[1]) if call.get("layout") == "bshd" else (q.shape[1], len(q), len(k))
    g = torch.randn(b, sq, sk, generator=torch.Generator(q.device).manual_seed(1), device=q.device)
    return [
        {
            "check": f"budget, {name}",
            "dtype": str(dtype).removeprefix("torch."),
            "result": result,
            "share": spent.share,
            "error": spent.error,
            "row": str(list(spent.row)),
            "verdict": PASS if spent.kept else FAIL,
        }
        for result, spent in spend_all(inputs, g, **call).items()
    ]
