from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headfold import IndexerGeometry, KeyRange, index_scores, index_topk, triton_tiles
from headfold.lanes.measure import allocator_peak
from headfold.tiles import DEFAULT_WORKSPACE, MIB
from headfold.triton_tiles import Kept, SlabSelection
from on_device import DEVICE, Case, launches_leave_nothing, there

pytest.importorskip("triton", reason="Triton is not installed")
from headfold.backends import triton as kernels
from headfold.backends.triton import select as selecting
from headfold.backends.triton import topk as topk_kernels
from headfold.backends.triton.launches import Slab
from headfold.backends.triton.select import Scratch, finish, keep, rounds
from headfold.backends.triton.table import arch_of

NEG_INF, INF, NAN = float("-inf"), float("inf"), float("nan")
DTYPES = [torch.float32, torch.float64]
CASES = [
    Case(6, 90, h=3, d=16, visible="causal"),
    Case(5, 41, b=3, h=7, d=33, visible="window", scale=0.25),
    Case(5, 41, b=2, h=8, d=16, visible="ragged"),
    Case(5, 41, b=2, h=8, d=16, visible="per batch"),
    Case(6, 12, b=2, h=8, d=16, visible="ratio"),
    Case(5, 41, b=2, h=8, d=16, visible="bias", activation=None, scale=-0.5),
]


def in_order(scores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Indices and scores by a stable sort, in which NaN comes first; -1 and -inf where a row runs out."""
    best, order = torch.sort(scores + 0.0, dim=-1, descending=True, stable=True)
    order = order.masked_fill(best == NEG_INF, -1)
    short = max(0, topk - scores.shape[-1])
    order = torch.nn.functional.pad(order[..., :topk], (0, short), value=-1)
    return order, torch.nn.functional.pad(best[..., :topk], (0, short), value=NEG_INF)


def selected(
    slab: Tensor,
    topk: int,
    capacity: int = 32,
    start: Tensor | None = None,
    end: Tensor | None = None,
    *,
    in_order: bool = True,
    held: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run the kernels on a slab [b, rows, sk], with little room to wait, into results full of what nobody selects.

    held: keys of a row that is cut at once; capacity, where that is more.
    """
    shape, rows = (*slab.shape[:2], topk + 1), slab.shape[0] * slab.shape[1]
    lists = selecting.row_of(arch_of(slab.device), slab.shape[2]).warps
    scratch = Scratch(Kept(rows, rows, topk, max(topk, capacity, lists), slab.itemsize, in_order), slab.device)
    behind = []
    for name, buffer in vars(scratch).items():
        if isinstance(buffer, Tensor):
            longer = buffer.new_full((buffer.numel() + 1000,), -77)
            setattr(scratch, name, longer[: buffer.numel()])
            behind.append(longer[buffer.numel() :])
    indices = torch.full(shape, -77, dtype=torch.int64, device=slab.device)
    scores = torch.full(shape, -77.0, dtype=slab.dtype, device=slab.device)
    results = indices[..., :topk], scores[..., :topk]
    with mock.patch.object(triton_tiles, "_HELD", held):
        keep(slab, *results, start, end, None, 1, scratch, 0)
    finish(*results, slab.dtype, scratch)
    assert all((buffer == -77).all() for buffer in behind)
    assert (indices[..., topk:] == -77).all()
    assert (scores[..., topk:] == -77).all()
    return results


def assert_in_order(slab: Tensor, topk: int, got: tuple[Tensor, Tensor]) -> None:
    # On a CPU: on a GPU torch's own sort tells NaN of one sign from NaN of the other in float64.
    indices, scores = in_order(slab.cpu(), topk)
    got = got[0].cpu(), got[1].cpu()
    assert torch.equal(got[0], indices)
    torch.testing.assert_close(got[1], scores, rtol=0, atol=0, equal_nan=True)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, 1e-45, -1e-45, NEG_INF, INF, NAN]), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(0, 9),
    st.data(),
    st.sampled_from(DTYPES),
)
def test_any_row_follows_the_total_order(
    row: list[float], topk: int, capacity: int, data: st.DataObject, dtype: torch.dtype
) -> None:
    slab = torch.tensor([[row]], dtype=dtype)
    flipped = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))))
    slab = torch.where(slab.isnan() & flipped, -slab, slab)  # NaN of either sign
    bounds = data.draw(st.none() | st.tuples(st.integers(-2, len(row) + 2), st.integers(-2, len(row) + 2)))
    start = end = None
    if bounds is not None:
        start, end = (torch.tensor([[x]], dtype=torch.int32, device=DEVICE) for x in bounds)
        t = torch.arange(len(row))
        slab[..., (t < bounds[0]) | (t >= bounds[1])] = NEG_INF
    got = selected(slab.to(DEVICE), topk, capacity, start, end)
    assert_in_order(slab, topk, got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capacity", [3, 32])
def test_zeros_and_nan_of_either_sign_are_one(dtype: torch.dtype, capacity: int) -> None:
    row = [-0.0, 0.0, NAN, 1e-45, -0.0, INF, NAN, NEG_INF, -1.0, NAN, 0.0, -0.0, -1e-45, -INF]
    slab = torch.tensor([[row]], dtype=dtype, device=DEVICE)
    slab[..., [2, 9]] = torch.tensor(NAN, dtype=dtype).copysign(torch.tensor(-1.0, dtype=dtype)).to(DEVICE)
    assert slab[..., 2].signbit().all()
    assert not slab[..., 6].signbit().any()
    got = selected(slab, 14, 14)
    assert got[0].tolist() == [[[2, 6, 9, 5, 3, 0, 1, 4, 10, 11, 12, 8, -1, -1]]]
    for topk in (1, 2, 3, 6, 8):
        assert_in_order(slab, topk, selected(slab, topk, capacity))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_hold_one_nan_and_one_zero_however_they_were_selected(dtype: torch.dtype) -> None:
    # 40 of each lie above both pivots, between them, or are cut at once.
    nan = torch.tensor(NAN, dtype=dtype)
    for value in (nan.copysign(torch.tensor(-1.0, dtype=dtype)), torch.tensor(-0.0, dtype=dtype)):
        slab = torch.full((1, 1, 640), -1.0, dtype=dtype)
        slab[..., ::16] = value
        one = selected(slab[..., 0:1].to(DEVICE), 1, 1)[1].cpu()
        bits = torch.int32 if dtype == torch.float32 else torch.int64
        for topk, capacity in ((20, 60), (40, 60), (40, 640)):
            for in_order in (True, False):
                _, scores = selected(slab.to(DEVICE), topk, capacity, in_order=in_order)
                assert (scores.cpu().view(bits) == one.view(bits)).all()
                assert one.isnan().all() or not one.signbit().any()


def rows_that_mislead(kind: str, dtype: torch.dtype) -> Tensor:
    """A row of 640 scores, of which the sample sees every tenth."""
    x = torch.rand(640, generator=torch.Generator().manual_seed(0), dtype=dtype)
    sampled = torch.arange(640) % 10 == 0
    if kind == "sample too low":
        x[~sampled] += 10
    elif kind == "sample too high":
        x[sampled] += 10
    elif kind == "plateau":
        x = (x * 3).floor()
    elif kind == "one value":
        x.zero_()
    elif kind == "crowded":
        x[sampled] = torch.linspace(-1e30, 1e30, 64, dtype=dtype)
    elif kind == "best left out":
        best = torch.cat([torch.nonzero(sampled)[:17], torch.nonzero(~sampled)[:215]])
        x[~sampled] -= 1
        x[best] += 10
    elif kind == "mostly NaN":
        x[torch.nonzero(sampled)[:40]] = NAN
    elif kind == "falling":
        x = x.sort(descending=True).values
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        "even",
        "sample too low",
        "sample too high",
        "best left out",
        "plateau",
        "one value",
        "crowded",
        "falling",
        "mostly NaN",
    ],
)
def test_a_misleading_sample_costs_time_and_nothing_else(kind: str, dtype: torch.dtype) -> None:
    slab = rows_that_mislead(kind, dtype).view(1, 1, -1).to(DEVICE)
    # With few to keep, one pivot lies above any sample.
    few = kind not in ("sample too low", "best left out", "mostly NaN")
    topk, capacity = (12, 40) if few else (200, 260)
    ordered = selected(slab, topk, capacity)
    assert_in_order(slab, topk, ordered)
    for one, other in zip(selected(slab, topk, capacity, in_order=False), ordered, strict=True):
        assert torch.equal(one.nan_to_num().sort(-1).values, other.nan_to_num().sort(-1).values)


# Its list is too short for the best and what is near the cut, or for the best alone.
@pytest.mark.parametrize("topk", [100, 200])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_warp_that_finds_nearly_all_has_too_short_a_list(last: bool, topk: int, dtype: torch.dtype) -> None:
    warps = selecting.row_of(arch_of(DEVICE), 1280).warps
    warp = torch.arange(1280) // 32 % warps
    slab = torch.rand(1, 2, 1280, generator=torch.Generator().manual_seed(0), dtype=dtype)
    slab[..., warp == (warps - 1 if last else 0)] += 1
    assert_in_order(slab, topk, selected(slab.to(DEVICE), topk, 260))


def test_a_list_may_be_longer_than_sixteen_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    few = (tile._replace(held=256, deep=256) if tile.arch == "cpu" else tile for tile in selecting.TILES)
    monkeypatch.setattr(selecting, "TILES", tuple(few))
    slab = torch.rand(1, 1, 150_000, generator=torch.Generator().manual_seed(0))
    topk = 34_000 * selecting.row_of(arch_of(DEVICE), 150_000).warps
    best, _ = selected(slab.to(DEVICE), min(topk, 140_000), 148_000, in_order=False)
    assert torch.equal(best.cpu().sort().values, slab.topk(best.shape[-1]).indices.sort().values)


@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
@pytest.mark.parametrize("topk", [12, 30, 61])
def test_neighbours_that_their_leading_bits_put_wrong_change_places(order: str, topk: int) -> None:
    # The ends leave a float 2^-19 of itself to tell it by: what lies between are 60 neighbours and one plateau.
    near = 1 + torch.arange(60) * 2.0**-23
    near[40:44] = near[40]
    if order != "rising":
        near = (
            near.flip(0) if order == "falling" else near[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
        )
    slab = torch.cat([torch.tensor([-3e38]), near, torch.tensor([3e38])]).view(1, 1, -1).to(DEVICE)
    assert_in_order(slab, topk, selected(slab, topk, 62))


@pytest.mark.parametrize("topk", [9, 300, 511])
@pytest.mark.parametrize("some", [0, 100])
def test_a_plateau_is_put_in_order_of_its_keys(some: int, topk: int) -> None:
    # Kept in the order of threads, equal scores are far from their places.
    slab = torch.zeros(1, 2, 700)
    slab[..., torch.randperm(700, generator=torch.Generator().manual_seed(0))[:some]] = torch.rand(some)
    assert_in_order(slab, topk, selected(slab.to(DEVICE), topk, 700))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("topk", [12, 100])
def test_a_row_that_sees_few_keys_among_many(topk: int, dtype: torch.dtype) -> None:
    slab = torch.full((1, 2, 700), NEG_INF, dtype=dtype)
    slab[..., ::11] = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=dtype)
    assert_in_order(slab, topk, selected(slab.to(DEVICE), topk, 120))


def test_there_is_room_for_more_than_is_wanted() -> None:
    # Else no sample tells a pivot with no fewer above it, and no more than there is room for.
    for sk in (8192, 65536, 262144):
        for topk in (1, 2048, 3000, 4096, 8192, 65536):
            plan = Kept.of(1, sk, topk, 4)
            assert plan.capacity == sk or plan.capacity >= 1.8 * topk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("topk", "values"), [(1, 1000), (70, 2)])
@pytest.mark.parametrize("capacity", [300, 700])  # too few, and enough to be cut at once
def test_what_is_not_held_is_cut_as_what_is(
    topk: int, values: int, capacity: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = tuple(tile._replace(held=16 // dtype.itemsize) for tile in selecting.TILES)
    monkeypatch.setattr(selecting, "TILES", tiles)
    slab = torch.randint(values, (1, 3, 690), generator=torch.Generator().manual_seed(topk)).to(DEVICE, dtype) - 3
    assert_in_order(slab, topk, selected(slab, topk, capacity))


def test_no_two_threads_hold_one_pair_of_neighbours() -> None:
    # One of them would store it while the other may not have read it yet.
    for block in (8, 64, 256, 1024):
        for warps in {tile.order_warps for tile in selecting.TILES}:
            assert selecting.network(block, warps)["PAIRS"] >= 64 * warps


@pytest.mark.parametrize("warps", [2, 4, 8])
def test_warps_exchange_as_lanes_do(warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = tuple(tile._replace(order_warps=warps) for tile in selecting.TILES)
    monkeypatch.setattr(selecting, "TILES", tiles)
    slab = torch.randn(1, 1, 700, generator=torch.Generator().manual_seed(warps)).mul(50).round().to(DEVICE)
    assert selecting.network(256, warps)["LANES"] == 4 + warps.bit_length() > 5
    assert_in_order(slab, 500, selected(slab, 500, 700))


def test_more_than_two_blocks_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tiles, "_SORTED", 8)
    slab = torch.randn(1, 1, 90, generator=torch.Generator().manual_seed(0)).mul(4).round().to(DEVICE)
    assert Kept(1, 1, 70, 70, 4).blocks == 10
    assert_in_order(slab, 70, selected(slab, 70))


@pytest.mark.parametrize("blocks", [2, 4, 6, 10, 16, 22])
def test_the_rounds_sort_any_blocks(blocks: int) -> None:
    def meet(one: int, period: int, apart: int) -> bool:
        skipped = apart % period
        in_turn = one >= skipped and (one - skipped) // apart % 2 == 0
        return in_turn and one // (2 * period) == (one + apart) // (2 * period)

    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        row = torch.randint(0, 2, (blocks,), generator=generator).tolist()  # what sorts 0 and 1 sorts everything
        for period, apart in rounds(blocks):
            for one in range(blocks - apart):
                if meet(one, period, apart):
                    row[one], row[one + apart] = max(row[one], row[one + apart]), min(row[one], row[one + apart])
        assert row == sorted(row, reverse=True)


@pytest.mark.parametrize("first", [0, 5])
def test_strides_and_what_lies_behind_a_row(first: int) -> None:
    whole = torch.full((2, 3, 80), NAN, device=DEVICE)
    slab = whole[:, :, first : first + 68].transpose(0, 1)
    slab.copy_(torch.randn(3, 2, 68, generator=torch.Generator().manual_seed(0)) - 10)
    assert_in_order(slab, 6, selected(slab, 6))


def test_offsets_pass_two_to_the_31() -> None:
    far = 2**31 + 64
    slab = torch.empty(far + 64, device=DEVICE).as_strided((1, 2, 64), (0, far, 1))
    slab.copy_(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)))
    assert_in_order(slab, 3, selected(slab, 3))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in CASES), *((CASES[0], dtype) for dtype in (torch.bfloat16, torch.float64))],
    ids=str,
)
def test_selection_is_a_stable_sort_of_the_scores(case: Case, dtype: torch.dtype) -> None:
    call: dict[str, Any] = {**case.call(), "impl": "triton"}
    q, weights, k = (x if x is None else (x * 1.5).round() for x in case.inputs(dtype))
    assert q is not None
    assert k is not None
    got = index_topk(q, weights, k, 7, with_scores=True, **call)
    assert got.scores is not None
    indices, scores = in_order(index_scores(q, weights, k, **call), 7)
    assert torch.equal(got.indices, indices.int())
    assert torch.equal(got.scores, scores)
    eager = index_topk(q, weights, k, 7, **{**call, "impl": "eager"})
    assert torch.equal(got.indices, eager.indices)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sq", "sk", "topk"), [(9, 5, 3), (4, 6, 9), (40, 3, 8)])
def test_places_without_a_key_are_written_whatever_memory_held(
    sq: int, sk: int, topk: int, dtype: torch.dtype, in_order: bool
) -> None:
    q, weights, k = Case(sq, sk, b=2, h=3, d=16, visible="causal").inputs(dtype)
    assert q is not None
    assert k is not None
    call: dict[str, Any] = {"causal": True, "with_scores": True}
    expected = index_topk(q, weights, k, topk, impl="eager", **call)
    least = kernels.selection_plan(q.transpose(0, 1), k.transpose(0, 1), True, topk, 0)
    if sq > least.least:  # rows that see nothing are in no slab
        assert next(least.slabs(2, sq, lambda row: max(0, row + 1 + sk - sq))).row > 0
    torch.use_deterministic_algorithms(mode=True)  # what is allocated is filled: with NaN, or the largest integer
    try:
        assert (torch.empty(3, dtype=torch.int32, device=DEVICE) == 2**31 - 1).all()
        got = index_topk(q, weights, k, topk, impl="triton", sorted=in_order, workspace=least.scratch_bytes, **call)
    finally:
        torch.use_deterministic_algorithms(mode=False)
    missing = expected.indices < 0
    assert missing.any()
    assert got.scores is not None
    assert torch.equal(got.indices < 0, missing)
    assert (got.scores[missing] == NEG_INF).all()
    assert torch.equal(got.indices.sort(-1).values, expected.indices.sort(-1).values)


def test_topk_of_every_size_and_index_dtype() -> None:
    q, weights, k = ((x * 1.5).round() for x in Case(2, 11, h=2, d=16).inputs() if x is not None)
    for topk in (0, 1, 11, 14):
        got = index_topk(q, weights, k, topk, impl="triton", index_dtype=torch.int64)
        assert got.scores is None
        assert got.indices.dtype == torch.int64
        assert torch.equal(got.indices, in_order(index_scores(q, weights, k, impl="triton"), topk)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("topk", "sk"), [(1, 40), (9, 40), (30, 20), (35, 40)])
def test_without_an_order_the_same_keys_are_selected_with_what_is_missing_last(
    topk: int, sk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_tiles, "_SORTED", 8)  # 35 are more than two blocks of the network
    rows = 3
    q, weights, k = ((x * 1.5).round() for x in Case(rows, sk, h=1, d=16).inputs(dtype) if x is not None)
    bias = torch.zeros(1, rows, sk, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=DEVICE)
    bias[0, 0] = float("-inf")
    bias[0, -1, : sk // 2] = float("-inf")
    call: dict[str, Any] = {"bias": bias, "causal": True, "with_scores": True, "impl": "triton"}
    expected = index_topk(q, weights, k, topk, **call)
    got = index_topk(q, weights, k, topk, sorted=False, **call)
    again = index_topk(q, weights, k, topk, sorted=False, **call)
    assert torch.equal(got.indices, again.indices)
    assert got.scores is not None
    assert expected.scores is not None
    back = got.indices.masked_fill(got.indices < 0, sk).argsort(-1)
    order = expected.indices.masked_fill(expected.indices < 0, sk).argsort(-1)
    for one, other in zip(got, expected, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one.gather(-1, back), other.gather(-1, order))
    assert torch.equal(got.indices < 0, expected.indices < 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_too_long_to_be_cut_at_once_share_room(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small_slabs(monkeypatch, 2)
    monkeypatch.setattr(triton_tiles, "_HELD", 0)
    monkeypatch.setattr(triton_tiles, "_CAPACITIES", ((None, 1, 80),))
    monkeypatch.setattr(triton_tiles, "_KEPT_BYTES", 500 * dtype.itemsize)
    q, weights, k = (x for x in Case(10, 200, b=2, h=64, d=16).inputs(dtype) if x is not None)
    workspace = 2000 * dtype.itemsize
    plan = kernels.selection_plan(q.transpose(0, 1), k.transpose(0, 1), True, 9, workspace)
    assert 0 < plan.kept.room < plan.kept.rows < 20
    assert plan.kept.held == plan.kept.capacity < 200
    for causal in (True, False):  # rows that see few keys are in slabs of their own
        call: dict[str, Any] = {"causal": causal, "with_scores": True, "workspace": workspace, "impl": "triton"}
        expected = in_order(index_scores(q, weights, k, causal=causal, impl="triton"), 9)
        got = index_topk(q, weights, k, 9, **call)
        assert torch.equal(got.indices, expected[0].int())
        assert torch.equal(torch.as_tensor(got.scores), expected[1])
        free = index_topk(q, weights, k, 9, sorted=False, **call)
        assert torch.equal(free.indices.sort(-1).values, got.indices.sort(-1).values)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("b", [0, 2])
def test_zero_length_axes_select_nothing(sizes: tuple[int, int], b: int) -> None:
    q, weights, k = (x for x in Case(*sizes, b=b, h=2, d=16).inputs() if x is not None)
    indices, _ = index_topk(q, weights, k, 3, impl="triton")
    assert indices.shape == (b, sizes[0], 3)
    assert (indices == -1).all()


def small_slabs(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Let slabs of this few rows do, so that small calls take several."""
    monkeypatch.setattr(triton_tiles, "_ROWS", rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_selected_does_not_depend_on_the_workspace_or_the_run(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slabs(monkeypatch, 2)
    q, weights, k = (x for x in Case(5, 70, b=2, h=64, d=16, visible="causal").inputs(dtype) if x is not None)
    least = kernels.selection_plan(q.transpose(0, 1), k.transpose(0, 1), True, 6, 0).scratch_bytes
    plan = kernels.selection_plan(q.transpose(0, 1), k.transpose(0, 1), True, 6, least)
    assert len(list(plan.slabs(2, 5, lambda row: 66 + row))) == 6
    expected = index_topk(q, weights, k, 6, causal=True, with_scores=True, impl="triton")
    for workspace in (least, None):
        again = index_topk(q, weights, k, 6, causal=True, with_scores=True, impl="triton", workspace=workspace)
        assert torch.equal(again.indices, expected.indices)
        assert again.scores is not None
        assert expected.scores is not None
        assert torch.equal(again.scores, expected.scores)
    with pytest.raises(ValueError, match=f"index_topk: workspace must be at least {least} bytes .*, got {least - 1}"):
        index_topk(q, weights, k, 6, impl="triton", workspace=least - 1)


@pytest.mark.parametrize(
    ("dtype", "topk", "activation", "in_order"),
    [
        (torch.float32, 20, "relu", True),
        (torch.float32, 20, "relu", False),
        (torch.float32, 20, None, True),
        (torch.float64, 5, "relu", True),
        (torch.float64, 5, "relu", False),
    ],
)
def test_a_planned_byte_is_an_allocated_byte(
    dtype: torch.dtype, topk: int, activation: str | None, in_order: bool
) -> None:
    q, weights, k = (x for x in Case(2, 3000, h=1, d=16).inputs(dtype) if x is not None)
    keys = there(KeyRange(end=torch.full((2,), 40, dtype=torch.int32)))

    call: dict[str, Any] = {"keys": keys, "with_scores": True, "activation": activation, "sorted": in_order}

    def run() -> Any:
        return index_topk(q, weights, k, topk, impl="triton", **call)

    run()
    with launches_leave_nothing():
        peak = allocator_peak(run, DEVICE)
    sizes = q.transpose(0, 1), k.transpose(0, 1), activation is not None, topk, 64 * MIB
    planned = kernels.selection_plan(*sizes, in_order)
    results = sum(x.untyped_storage().nbytes() for x in peak.result)
    geometry = IndexerGeometry(1, 2, 3000, 1, 16, topk, str(dtype).removeprefix("torch."), activation is not None)
    bill = geometry.bill("headfold top-k", backend="triton").forward
    if in_order:  # as a bill has it
        assert geometry.slab_selection() == planned
        assert bill == geometry.indices_bytes + planned.scratch_bytes
    assert geometry.indices_bytes + planned.scratch_bytes <= bill
    assert 0.8 * planned.scratch_bytes <= peak.peak - results <= planned.scratch_bytes + 4096


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 9),
    st.integers(0, 5000),
    st.integers(0, 200_000),
    st.integers(0, 3000),
    st.sampled_from([4, 8]),
    st.sampled_from([0, MIB, 16 * MIB, 64 * MIB, 512 * MIB]),
    st.none() | st.tuples(st.integers(-2000, 5000), st.sampled_from([1, 4])),
    st.booleans(),
    st.booleans(),
)
@example(1, 20000, 20000, 8, 4, 64 * MIB, (0, 1), True, True)  # padding decides how many rows fit
@example(1, 5000, 5000, 4096, 4, 64 * MIB, None, True, True)  # fewer rows wait than there would be room for
def test_slabs_cover_every_row_once_within_the_workspace(
    b: int,
    sq: int,
    sk: int,
    topk: int,
    size: int,
    workspace: int,
    bound: tuple[int, int] | None,
    relu: bool,
    in_order: bool,
) -> None:
    plan = SlabSelection.of(b, sq, sk, 8, 64, topk, size, workspace, relu=relu, in_order=in_order)
    least = SlabSelection.of(b, sq, sk, 8, 64, topk, size, 0, relu=relu)
    assert plan.scratch_bytes <= max(workspace, least.scratch_bytes)
    assert plan.least == least.least

    def limit(row: int) -> int:
        return sk if bound is None else max(0, min(sk, (row + 1 + bound[0]) // bound[1]))

    seen = []
    for part in plan.slabs(b, sq, limit):
        rows = (part.batch_end - part.batch) * (part.row_end - part.row)
        assert part.width == limit(part.row_end - 1) > 0
        assert part.row % plan.least == 0
        assert 0 < rows <= plan.kept.rows
        assert rows <= plan.kept.room <= plan.kept.rows or part.width <= plan.kept.held
        assert rows * triton_tiles.padded(part.width) <= plan.elements
        seen += [(i, row) for i in range(part.batch, part.batch_end) for row in (part.row, part.row_end - 1)]
        assert all(limit(row) <= part.width for row in (part.row, part.row_end - 1))
    covered = sum((part.batch_end - part.batch) * (part.row_end - part.row) for part in plan.slabs(b, sq, limit))
    blind = sum(limit(row) == 0 for row in range(sq)) * b
    assert b * sq - blind <= covered <= b * sq
    assert len(set(seen)) >= len(seen) // 2


def taken_by_cuda(size: int) -> int:
    """Return the bytes that torch's CUDA allocator takes for a buffer: it parts no block to save 1 MiB or less."""
    size = -(-size // 512) * 512
    segment = 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
    return size if size <= MIB or segment - size > MIB else segment


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("topk", [64, 512, 2048, 8192])
@pytest.mark.parametrize("sk", [2048, 4097, 8192, 32768, 65536, 262144])
def test_the_default_workspace_holds_what_the_allocator_takes_too(sk: int, topk: int, size: int) -> None:
    for sq, in_order in product((128, 4096, 32768), (True, False)):
        plan = SlabSelection.of(8, sq, sk, 64, 128, topk, size, DEFAULT_WORKSPACE, in_order=in_order)
        scratch = [x for x in selecting.Scratch(plan.kept, torch.device("meta")).tensors() if x is not None]
        wanted = [plan.elements * size, *(x.numel() * x.itemsize for x in scratch)]
        assert sum(wanted) == plan.scratch_bytes
        assert sum(map(taken_by_cuda, wanted)) <= DEFAULT_WORKSPACE


def test_a_call_of_full_size_launches_what_its_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    for name in ("fill_scores", "keep", "finish"):
        monkeypatch.setattr(topk_kernels, name, lambda *_, name=name: launched.append(name))
    q, k = torch.empty(1, 32768, 32, 128, device="meta"), torch.empty(1, 32768, 128, device="meta")
    call: list[Any] = [q, None, k, None, None, None, 0, 1, True, 1.0, 2048, False, torch.int32, DEFAULT_WORKSPACE]
    monkeypatch.setattr(topk_kernels, "replay", lambda run, *_: run())
    monkeypatch.setattr(Slab, "row", lambda *_: None)
    topk_kernels.index_topk(*call)
    said = (Path(__file__).parents[1] / "docs" / "kernels_selection.md").read_text()
    said = " ".join(said.split())
    count = launched.count
    assert count("fill_scores") == count("keep")
    assert f"hold are {count('keep')} launches of two kernels and {count('finish')} of the third" in said
    plan = kernels.selection_plan(q, k, True, 2048, DEFAULT_WORKSPACE)
    free = kernels.selection_plan(q, k, True, 2048, DEFAULT_WORKSPACE, False)
    room, lines = (plan.kept.room * plan.kept.room_bytes, plan.kept.rows * plan.kept.line_bytes)
    slab, room, lines, larger = (round(x / MIB) for x in (4 * plan.elements, room, lines, 4 * free.elements))
    assert f"{slab} MiB hold scores, {room} MiB the room of {plan.kept.room} rows and {lines} MiB what waits" in said
    assert f"in no order {larger} MiB hold scores" in said
    assert f"{4 * plan.elements // (4 * 32768)} at 32768 keys" in said


def test_at_full_size_slabs_are_few_and_the_least_workspace_is_small() -> None:
    plan = SlabSelection.of(1, 32768, 32768, 32, 128, 2048, 4, 64 * MIB)
    assert plan.scratch_bytes <= 64 * MIB
    assert len(list(plan.slabs(1, 32768, lambda row: row + 1))) < 100
    for sk in (4096, 32768, 262144):
        assert SlabSelection.of(1, 32768, sk, 32, 128, 2048, 4, 0).scratch_bytes <= 16 * MIB
    decoding = SlabSelection.of(10**6, 1, 8, 32, 128, 1, 4, 64 * MIB)
    assert max(part.batch_end - part.batch for part in decoding.slabs(10**6, 1, lambda row: 8)) == 65535
    assert selecting.row_of("sm_90", 32768).sample == 2048


def test_the_compile_lane_has_the_kernels_and_they_compile_without_a_spill() -> None:
    code = """
from headfold.backends.triton.compiling import compile_specimen
from headfold.backends.triton.select_specimens import specimens
from headfold.backends.triton.specimens import specimens as every
found = list(specimens("sm_90"))
assert {x.name for x in found} < {x.name for x in every("sm_90")}
print(len(found), compile_specimen(found[0], "sm_90").breaches(found[0], "sm_90"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "22 []\n"
