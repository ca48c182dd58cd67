"""The selection's gradient lane: sets against float64 on both sides of the cut, order, bits, and selected scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headfold.geometry import IndexerGeometry
from headfold.keyrange import KeyRange
from headfold.lanes.budget import score_budget, spend_all
from headfold.lanes.long_rows import CROWDED, SIZES, TOPK, long_rows, seen
from headfold.lanes.parity import checked_width, gradcheck_cases, gradcheck_row
from headfold.lanes.paths import least_workspace
from headfold.lanes.problem import Problem
from headfold.lanes.record import FAIL, PASS, Column, Lane, Row, Track, no_track, show_bytes
from headfold.scores import index_scores
from headfold.selected import selected_scores
from headfold.selection import index_topk
from headfold.tiles import MIB

COLUMNS = (
    Column("check", "check"),
    Column("dtype", "dtype"),
    Column("result", "result"),
    Column("share", "share of budget used", "ratio"),
    Column("row", "worst row"),
    Column("verdict", "verdict"),
    Column("note", "note"),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROWS, KEYS = 32, 1024
# Enough of both that the smallest workspace selects several times where a larger one selects once.
REPEATED_ROWS, REPEATED_KEYS = 64, 4096
WORKSPACES = (16 * MIB, 64 * MIB, 512 * MIB)  # and the smallest that works, where fewest keys wait at a time
REPEATS = 20
NEG_INF = float("-inf")


def selection_parity(
    problem: Problem, device: torch.device, *, impl: str = "auto", track: Track[Any] = no_track
) -> Lane:
    """Check what is selected, in which order and with which bits, and the gradients of the scores of a selection."""
    lane = Lane("selection parity", "Are the selected keys the best ones, in one order, bit for bit?", COLUMNS)
    for dtype in track(DTYPES, "selection, sets and budgets"):
        tensors = _tensors(problem, device, dtype)
        topk = max(1, min(problem.geometry.topk, tensors[2].shape[0] // 2))
        # The first row sees half of topk keys, and so ends in -1.
        short = KeyRange(offset=topk // 2 - 1)
        cases: dict[str, dict[str, Any]] = {"every key": {}, "causal": {"causal": True}, "short rows": {"keys": short}}
        for name, call in cases.items():
            options: dict[str, Any] = {"scale": problem.scale, "impl": impl, **call}
            lane.rows += [_sets(name, tensors, topk, options), _order(name, tensors, topk, options)]
        lane.rows += _budget(tensors, topk, {"scale": problem.scale, "impl": impl, "keys": short})
    tensors = _tensors(problem, device, getattr(torch, problem.geometry.dtype), REPEATED_ROWS, REPEATED_KEYS)
    lane.rows.append(_bits(tensors, max(1, min(problem.geometry.topk, len(tensors[2]) // 8)), impl, track))
    if device.type == "cuda" and impl != "eager":
        for dtype in (torch.bfloat16, torch.float16):
            tensors = long_rows(device, dtype, SIZES)
            long: dict[str, Any] = {"keys": seen(SIZES), "impl": impl}
            lane.rows += [_order("long rows", tensors, TOPK, long), _repeated(tensors, long, track)]
    for name, call in track(list(gradcheck_cases(device).items()), "gradcheck of selected scores, float64"):
        lane.rows.append(_gradcheck(name, call, device, impl))
    lane.notes = [
        "Sets: float64 scores of the same tensors say where the cut is. A selected key may score below it, and one "
        "left out above it, by no more than the error budgets of the two scores that were compared; a share of 1 is "
        "all of that.",
        "Order: the indices are those of a stable descending sort of index_scores, ties to the smaller key, -1 where "
        "a row runs out, equal to the last place.",
        "Budgets of selected scores: four of the eight orders are made of gathered keys, four are gathered from the "
        "score matrix. Short rows: the first sees half of topk keys, so it ends in -1.",
        f"Tensors: {problem.source}; at most {ROWS} rows and {KEYS} keys of them, topk at most half of the keys; "
        f"for the bits {REPEATED_ROWS} and {REPEATED_KEYS}, topk at most an eighth.",
        f"Long rows, on a GPU: {SIZES}, topk {TOPK}, of a causal bound; in the last {CROWDED} rows the best keys are "
        "so spaced that one list gets them all and is too short, and these rows are selected from again.",
    ]
    return lane


def _tensors(
    problem: Problem, device: torch.device, dtype: torch.dtype, rows: int = ROWS, keys: int = KEYS
) -> list[Tensor]:
    q, weights, k = problem.tensors(device, dtype)
    return [q[-rows:], weights[-rows:], k[-keys:]]


def _named(check: str, tensors: list[Tensor], result: str) -> Row:
    return {"check": check, "dtype": str(tensors[0].dtype).removeprefix("torch."), "result": result}


def _sets(name: str, tensors: list[Tensor], topk: int, call: dict[str, Any]) -> Row:
    q, weights, k = tensors
    indices = index_topk(q, weights, k, topk, **call).indices
    truth, budget = score_budget(q, weights, k, **{option: value for option, value in call.items() if option != "impl"})
    share, place, miscounted = beyond_the_cut(indices, truth, budget)
    row = {**_named(f"sets, {name}", tensors, f"top {topk}"), "share": share, "row": str(list(place))}
    if miscounted:
        row["note"] = f"{miscounted} rows with a repeated, invisible or missing key"
    return {**row, "verdict": PASS if share <= 1 and not miscounted else FAIL}


def beyond_the_cut(indices: Tensor, truth: Tensor, budget: Tensor) -> tuple[float, tuple[int, ...], int]:
    """Hold a selection to the true cut of each row.

    Args:
        indices: [b, sq, topk], -1 where a row ran out.
        truth: float64 scores [b, sq, sk].
        budget: [b, sq], how far each score of a row may be from the truth.

    Returns:
        The worst row's distance beyond the cut as a share of two budgets, its place, and how many rows hold a repeated
        or invisible key, or not as many keys as they see.
    """
    topk, sk = indices.shape[-1], truth.shape[-1]
    best = truth.sort(dim=-1, descending=True).values
    cut = best[..., min(topk, sk) - 1 : min(topk, sk)]
    chosen = torch.zeros(*truth.shape[:2], sk + 1, dtype=torch.int32, device=truth.device)
    chosen.scatter_add_(-1, indices.long().remainder(sk + 1), torch.ones_like(indices, dtype=torch.int32))
    chosen = chosen[..., :sk]  # -1 fell into the last column
    visible = truth != NEG_INF
    wanted = visible.sum(-1).clamp(max=topk)
    bad = (chosen > 1).any(-1) | ((chosen > 0) & ~visible).any(-1) | (chosen.sum(-1) != wanted)
    below = torch.where((chosen > 0) & visible, cut - truth, 0).clamp(min=0)
    above = torch.where((chosen == 0) & visible, truth - cut, 0).clamp(min=0)
    beyond = torch.maximum(below, above).amax(-1)
    share = torch.where(beyond == 0, 0.0, beyond / (2 * budget))
    worst = int(share.argmax())
    return float(share.flatten()[worst]), divmod(worst, share.shape[1]), int(bad.sum())


def _order(name: str, tensors: list[Tensor], topk: int, call: dict[str, Any]) -> Row:
    q, weights, k = tensors
    indices = index_topk(q, weights, k, topk, **call).indices
    best, order = torch.sort(index_scores(q, weights, k, **call) + 0.0, dim=-1, descending=True, stable=True)
    order = order.masked_fill(best == NEG_INF, -1)[..., :topk]
    wrong = (indices != order).any(-1)
    row = _named(f"order, {name}", tensors, f"top {topk}")
    if not bool(wrong.any()):
        return {**row, "verdict": PASS}
    return {**row, "verdict": FAIL, "note": f"{int(wrong.sum())} of {wrong.numel()} rows differ"}


def _budget(tensors: list[Tensor], topk: int, call: dict[str, Any]) -> list[Row]:
    q, weights, k = tensors
    indices = index_topk(q, weights, k, topk, **call).indices
    generator = torch.Generator(q.device).manual_seed(1)
    g = torch.randn(indices.shape, generator=generator, device=q.device)
    return [
        {
            **_named("selected scores, budget", tensors, result),
            "share": spent.share,
            "row": str(list(spent.row)),
            "verdict": PASS if spent.kept else FAIL,
        }
        for result, spent in spend_all(tensors, g, indices, **call).items()
    ]


def _bits(tensors: list[Tensor], topk: int, impl: str, track: Track[Any]) -> Row:
    """Select and differentiate again and again, at four workspaces, and compare every bit."""
    q, weights, k = (x.detach().requires_grad_() for x in tensors)
    (sq, b, h, d), dtype = q.shape, str(q.dtype).removeprefix("torch.")
    least = least_workspace(IndexerGeometry(b, sq, len(k), h, d, topk, dtype), q.device, impl)

    def run(workspace: int) -> list[Tensor]:
        selected = index_topk(q, weights, k, topk, causal=True, with_scores=True, impl=impl, workspace=workspace)
        scores = selected_scores(q, weights, k, selected.indices, causal=True, impl=impl, workspace=workspace)
        grads = torch.autograd.grad(scores, [q, weights, k], torch.ones_like(scores))
        assert selected.scores is not None
        return [selected.indices, selected.scores, scores.detach(), *grads]

    workspaces = [least, *(max(least, given) for given in WORKSPACES), *[WORKSPACES[1]] * REPEATS]
    expected = run(WORKSPACES[1])
    differing = sum(
        not all(torch.equal(_bits_of(x), _bits_of(y)) for x, y in zip(run(workspace), expected, strict=True))
        for workspace in track(workspaces, "selection, repeats")
    )
    said = f"bits, {REPEATS} repeats and workspaces of {show_bytes(least)}, 16, 64 and 512 MiB"
    row = _named(said, tensors, "indices, scores, gradients")
    if differing:
        return {**row, "verdict": FAIL, "note": f"{differing} of {len(workspaces)} runs differ"}
    return {**row, "verdict": PASS}


def _repeated(tensors: list[Tensor], call: dict[str, Any], track: Track[Any]) -> Row:
    """Select again and again from long rows, in order and in none, and compare every bit."""
    q, weights, k = tensors
    row, differing = _named(f"bits, {REPEATS} repeats of long rows", tensors, f"top {TOPK}"), 0
    for in_order in (True, False):
        expected = index_topk(q, weights, k, TOPK, with_scores=True, sorted=in_order, **call)
        for _ in track(range(REPEATS), "selection, long rows"):
            got = index_topk(q, weights, k, TOPK, with_scores=True, sorted=in_order, **call)
            assert got.scores is not None
            assert expected.scores is not None
            same = torch.equal(got.indices, expected.indices)
            differing += not (same and torch.equal(_bits_of(got.scores), _bits_of(expected.scores)))
    if differing:
        return {**row, "verdict": FAIL, "note": f"{differing} of {2 * REPEATS} runs differ"}
    return {**row, "verdict": PASS}


def _bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _gradcheck(name: str, call: dict[str, Any], device: torch.device, impl: str) -> Row:
    # Duplicates, -1, and keys that some rows may not see.
    generator = torch.Generator(device).manual_seed(0)
    indices = torch.randint(-1, 7, (2, 5, 6), generator=generator, device=device)

    def scores(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
        return selected_scores(q, weights, k, indices, impl=impl, **call)

    return gradcheck_row(f"selected scores, gradcheck, {name}", scores, device, checked_width(impl))
