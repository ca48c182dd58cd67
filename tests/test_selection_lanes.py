from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headfold import TopK, index_topk
from headfold.bills import Bill
from headfold.geometry import SELECTED, SELECTING, IndexerGeometry
from headfold.lanes import measure, selection_parity, selection_speed
from headfold.lanes.measure import allocator_peak
from headfold.lanes.paths import headfold_topk, materialized_topk, spread_indices
from headfold.lanes.problem import Problem
from headfold.lanes.record import FAIL, PASS, SKIP, Lane
from headfold.lanes.residency import LEAST_SHARE, selection_residency
from headfold.lanes.selection_parity import beyond_the_cut
from headfold.tiles import MIB

CPU = torch.device("cpu")
TINY = Problem(IndexerGeometry(1, 32, 48, 2, 16, topk=8))
NEG_INF = float("-inf")


# b, sq, sk, h, d, topk
@pytest.mark.parametrize(
    "shape",
    [(1, 64, 4000, 4, 32, 100), (2, 96, 160, 16, 8, 200), (1, 1, 5000, 32, 64, 500), (1, 200, 3000, 1, 8, 2900)],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("workspace", [16 * MIB, 64 * MIB])
def test_planned_bytes_of_a_selection_are_measured_bytes(
    shape: tuple[int, int, int, int, int, int], dtype: str, workspace: int
) -> None:
    problem = Problem(IndexerGeometry(*shape, dtype=dtype), causal=True)
    workspace = max(workspace, problem.geometry.selection(0).scratch_bytes)
    tensors = problem.tensors(CPU)
    g = problem.geometry
    for path in (headfold_topk(g, CPU, workspace), materialized_topk(g, CPU)):
        path(tensors, True, 1.0)
        peak = allocator_peak(lambda path=path: path(tensors, True, 1.0), CPU).peak  # type: ignore[misc]
        planned = path.bill(problem, CPU).forward
        assert LEAST_SHARE * planned <= peak <= planned, path.name


@pytest.mark.parametrize("heads", [1, 4, 32, 64])
@pytest.mark.parametrize("topk", [2048, 16_384, 65_536])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_16_mib_select_from_any_number_of_heads_and_keys(heads: int, topk: int, dtype: str) -> None:
    g = IndexerGeometry(1, 4096, 131_072, heads, 128, topk=topk, dtype=dtype)
    assert g.selection(0).scratch_bytes <= 16 * MIB


def test_a_decode_step_allocates_for_one_row() -> None:
    g = IndexerGeometry(1, 1, 131_072, 64, 128, topk=2048)
    row_of_candidates = 8 * (g.sk + g.topk)
    assert g.bill("headfold top-k").forward < row_of_candidates + 12 * MIB


@pytest.mark.parametrize("topk", [0, 3, 8, 11])
def test_spread_indices_are_distinct_keys_and_padding(topk: int) -> None:
    indices = spread_indices(IndexerGeometry(2, 5, 8, 1, 1, topk=topk), CPU)
    assert indices.shape == (2, 5, topk)
    for row in indices.flatten(0, 1).tolist():
        kept = [t for t in row if t >= 0]
        assert len(set(kept)) == len(kept) == min(topk, 8)
        assert all(t < 8 for t in kept)


TRUTH = torch.tensor([[[5.0, 4.0, 3.0, 2.0, NEG_INF]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("indices", "share", "miscounted"),
    [
        ([0, 1], 0.0, 0),
        ([1, 0], 0.0, 0),
        ([0, 2], 0.5, 0),  # 3 is 1 below the cut of 4, and two budgets are 2
        ([1, 2], 0.5, 0),
        ([0, 3], 1.0, 0),
        ([2, 3], 1.0, 0),
        ([0, 0], 0.0, 1),
        ([0, 4], 0.0, 1),
        ([0, -1], 0.0, 1),
    ],
)
def test_a_selection_is_held_to_the_cut_on_both_sides(indices: list[int], share: float, miscounted: int) -> None:
    found = beyond_the_cut(torch.tensor([[indices]]), TRUTH, torch.ones(1, 1))
    assert found == (share, (0, 0), miscounted)


def test_rows_that_see_fewer_than_topk_want_all_they_see() -> None:
    assert beyond_the_cut(torch.tensor([[[0, 1, 2, 3, -1, -1]]]), TRUTH, torch.ones(1, 1)) == (0.0, (0, 0), 0)


def failed(lane: Lane) -> set[str]:
    return {row["check"] for row in lane.rows if row.get("verdict") == FAIL}


def test_the_lane_passes_and_names_what_it_checked() -> None:
    lane = selection_parity.selection_parity(TINY, CPU)
    assert failed(lane) == set()
    checks = {row["check"] for row in lane.rows}
    assert {"sets, causal", "order, every key", "selected scores, budget"} <= checks
    assert any("20 repeats" in check and "16, 64 and 512 MiB" in check for check in checks)


def test_the_smallest_workspace_folds_more_often_than_the_others() -> None:
    g = IndexerGeometry(1, selection_parity.REPEATED_ROWS, selection_parity.REPEATED_KEYS, 32, 128, topk=512)
    assert g.selection(g.least_workspace()).chunk < g.sk <= g.selection(16 * MIB).chunk


def broken(how: str) -> Any:
    calls = 0

    def select(q: Tensor, weights: Tensor, k: Tensor, topk: int, **call: Any) -> TopK:
        nonlocal calls
        calls += 1
        indices, scores = index_topk(q, weights, k, topk, **call)
        if how == "order":
            indices = indices.flip(-1)
        elif how == "sets":
            indices = (indices + 1).remainder(k.shape[0])
        elif how == "bits" and calls % 7 == 0 and scores is not None:
            scores = scores.nextafter(torch.tensor(9e9))
        return TopK(indices, scores)

    return select


@pytest.mark.parametrize(("how", "check"), [("order", "order, causal"), ("sets", "sets, every key"), ("bits", "bits")])
def test_a_broken_selection_fails_the_lane_and_is_named(how: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_parity, "DTYPES", (torch.float32,))
    monkeypatch.setattr(selection_parity, "index_topk", broken(how))
    lane = selection_parity.selection_parity(TINY, CPU)
    assert any(name.startswith(check) for name in failed(lane))
    assert not lane.passed


def test_a_plan_that_misses_a_selection_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = IndexerGeometry.bill

    def bill(self: IndexerGeometry, path: str, **options: Any) -> Bill:
        found = honest(self, path, **options)
        return Bill(int(0.9 * found.forward), 0, found.training) if path == SELECTING[1] else found

    problem = Problem(IndexerGeometry(1, 128, 2000, 8, 16, topk=64))
    assert selection_residency(problem, CPU, process=False).passed
    monkeypatch.setattr(IndexerGeometry, "bill", bill)
    lane = selection_residency(problem, CPU, process=False)
    assert {row["path"] for row in lane.rows if row["verdict"] == FAIL} == {
        "headfold top-k",
        "headfold top-k, 16 MiB workspace",
    }


def test_selections_that_do_not_fit_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_memory", lambda _: 1000)
    lane = selection_residency(TINY, CPU, process=False)
    assert {row["verdict"] for row in lane.rows} == {SKIP}
    assert all("bytes" in row["note"] for row in lane.rows)


def test_speed_times_selection_decode_and_selected_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RATE_SIZE", 64)
    lane = selection_speed.selection_speed(TINY, CPU, rounds=2)
    timed = {(row["path"], row["phase"]) for row in lane.rows}
    assert timed == {
        ("headfold", "scores, for comparison"),
        *((path, phase) for path in SELECTING for phase in ("selection", "decode step")),
        (SELECTED, "selected scores, forward"),
        (SELECTED, "selected scores, backward"),
    }
    assert all(row["fastest"] <= row["seconds"] <= row["slowest"] for row in lane.rows)
    assert not any("verdict" in row for row in lane.rows)


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        ({"phase": "selection", "over_scores": 1.39, "speedup": 3.1}, PASS),
        ({"phase": "selection", "over_scores": 1.41, "speedup": 3.1}, FAIL),
        ({"phase": "selection", "over_scores": 1.39, "speedup": 2.9}, FAIL),
        ({"phase": "selected scores, backward", "over_forward": 3.1}, PASS),
        ({"phase": "selected scores, backward", "over_forward": 3.3}, FAIL),
        ({"phase": "decode step", "speedup": 0.1}, None),
    ],
)
def test_targets_are_judged(row: dict[str, Any], verdict: str | None) -> None:
    selection_speed._judge(row)
    assert row.get("verdict") == verdict
