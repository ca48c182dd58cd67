from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import CASES, Case
from headfold import KeyRange, index_scores, index_topk
from headfold.backends import eager
from headfold.lanes.measure import allocator_peak
from headfold.lanes.syncfree import no_data_reads
from headfold.tiles import MIB, Selection

NEG_INF = float("-inf")
NAN = float("nan")


def sorted_by_hand(scores: Tensor, topk: int) -> Tensor:
    """The total order in plain Python: NaN first, then score descending, ties to the smaller key; -inf never."""
    rows = []
    for row in scores.flatten(0, 1).tolist():
        kept = [t for t, score in enumerate(row) if score != NEG_INF]
        kept.sort(key=lambda t: (row[t] == row[t], -row[t] if row[t] == row[t] else 0.0, t))
        rows.append((kept + [-1] * topk)[:topk])
    return torch.tensor(rows, dtype=torch.int32).view(*scores.shape[:2], topk)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection_is_a_stable_sort_of_the_scores(case: Case, ties: bool, dtype: torch.dtype) -> None:
    q, weights, k = (x if x is None else (x * 1.5).round() if ties else x for x in case.inputs(dtype))
    assert q is not None
    assert k is not None
    best, order = torch.sort(index_scores(q, weights, k, **case.call()) + 0.0, dim=-1, descending=True, stable=True)
    order = order.masked_fill(best == NEG_INF, -1)
    for topk in (0, 1, 7, case.sk, case.sk + 3):
        indices, scores = index_topk(q, weights, k, topk, with_scores=True, **case.call())
        assert scores is not None
        assert torch.equal(indices[..., : case.sk], order[..., :topk].int())
        assert torch.equal(scores[..., : case.sk], best[..., :topk])
        assert (indices[..., case.sk :] == -1).all()
        assert (scores[..., case.sk :] == NEG_INF).all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(
            st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, NEG_INF, float("inf"), NAN, -NAN]), min_size=6, max_size=6
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 8),
    st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_ties_zeros_and_infinities_follow_the_total_order(
    rows: list[list[float]], topk: int, causal: bool, dtype: torch.dtype
) -> None:
    wanted = torch.tensor(rows, dtype=dtype)
    zeros = torch.zeros(len(rows), 1, 1, 2, dtype=dtype), None, torch.zeros(6, 1, 2, dtype=dtype)
    offset = 2 if causal else None
    indices, _ = index_topk(*zeros, topk, bias=wanted.unsqueeze(0), keys=KeyRange(offset=offset))
    if causal:
        wanted = wanted.masked_fill(~torch.ones(len(rows), 6, dtype=torch.bool).tril(2), NEG_INF)
    assert torch.equal(indices, sorted_by_hand(wanted.unsqueeze(0), topk))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nan_comes_first_whatever_its_sign(dtype: torch.dtype) -> None:
    bias = torch.tensor([[[0.0, NAN, float("inf"), -NAN, NEG_INF, 1.0]]], dtype=dtype)
    bias[0, 0, 3] = bias[0, 0, 3].abs().neg()
    zeros = torch.zeros(1, 1, 1, 2, dtype=dtype), None, torch.zeros(6, 1, 2, dtype=dtype)
    indices, scores = index_topk(*zeros, 6, bias=bias, with_scores=True)
    assert indices.tolist() == [[[1, 3, 2, 5, 0, -1]]]
    assert scores is not None
    assert scores[0, 0].isnan().tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_selected_does_not_depend_on_the_workspace_or_the_run(dtype: torch.dtype) -> None:
    case = Case(130, 5000, h=32, d=16, visible="causal")
    q, weights, k = ((x * 1.5).round() for x in case.inputs(dtype) if x is not None)
    least = Selection.of(eager.tile_of(q.transpose(0, 1), k.transpose(0, 1), True), 5000, 300, 0).scratch_bytes
    expected = index_topk(q, weights, k, 300, causal=True, with_scores=True)
    for workspace in (least, 32 * MIB, 512 * MIB, None):
        again = index_topk(q, weights, k, 300, causal=True, with_scores=True, workspace=workspace)
        assert torch.equal(again.indices, expected.indices)
        assert again.scores is not None
        assert expected.scores is not None
        assert torch.equal(again.scores, expected.scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_packed_sequences_select_within_themselves(dtype: torch.dtype) -> None:
    lengths_q, lengths_k = torch.tensor([0, 3, 3, 20]), torch.tensor([0, 8, 12, 40])
    keys = KeyRange.packed(lengths_q, lengths_k, total_q=22)
    q, weights, k = ((x * 1.5).round()[:, 0] for x in Case(22, 40, h=3, d=4).inputs(dtype) if x is not None)
    scores = index_scores(q, weights, k, keys=keys, layout="thd")
    indices = index_topk(q, weights, k, 9, keys=keys, layout="thd").indices
    assert torch.equal(indices, sorted_by_hand(scores, 9))
    assert (indices[0, 20:] == -1).all()
    assert indices[0, :3].max() < 8
    assert indices[0, 3:20][indices[0, 3:20] >= 0].min() >= 12


@pytest.mark.parametrize("h", [1, 4])
def test_blocks_of_fewer_rows_select_by_the_same_bits(h: int) -> None:
    q, weights, k = (x for x in Case(700, 6000, h=h, d=32).inputs() if x is not None)
    tile = eager.tile_of(q.transpose(0, 1), k.transpose(0, 1), True)
    assert Selection.of(tile, 6000, 3000, 0).tile.rows < tile.rows
    best, order = torch.sort(index_scores(q, weights, k) + 0.0, dim=-1, descending=True, stable=True)
    selected = index_topk(q, weights, k, 3000, with_scores=True)
    assert torch.equal(selected.indices, order[..., :3000].int())
    assert selected.scores is not None
    assert torch.equal(selected.scores, best[..., :3000])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("workspace", [16 * MIB, 64 * MIB])
def test_beyond_its_results_a_selection_takes_its_workspace(dtype: torch.dtype, workspace: int) -> None:
    q, weights, k = (x for x in Case(200, 9000, h=16, d=32).inputs(dtype) if x is not None)

    def select() -> Any:
        return index_topk(q, weights, k, 512, with_scores=True, workspace=workspace)

    select()
    peak = allocator_peak(select, torch.device("cpu"))
    results = sum(x.untyped_storage().nbytes() for x in peak.result)
    assert peak.peak - results <= workspace + MIB
    assert peak.left == results


def test_the_undecorated_body_reads_no_data() -> None:
    q, weights, k = (x.transpose(0, 1) for x in Case(70, 900, h=32, d=8).inputs() if x is not None)
    end = torch.full((1, 70), 800, dtype=torch.int32)
    for dtype in (torch.float32, torch.float64):
        inputs = q.to(dtype), weights.to(dtype), k.to(dtype)
        with no_data_reads():
            eager.index_topk(*inputs, None, end, None, 5, 1, True, 1.0, 30, True, torch.int64, 64 * MIB)


def test_it_compiles_with_fullgraph_and_is_not_differentiable() -> None:
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in Case(9, 11, h=2, d=4).inputs() if x is not None]
    q, weights, k = inputs
    expected = index_topk(q, weights, k, 4, causal=True, with_scores=True)
    compiled = torch.compile(index_topk, fullgraph=True, backend="aot_eager")(
        q, weights, k, 4, causal=True, with_scores=True
    )
    assert torch.equal(compiled.indices, expected.indices)
    assert expected.scores is not None
    assert not expected.scores.requires_grad


def test_index_dtype_and_the_materialised_oracle() -> None:
    q, weights, k = ((x * 1.5).round() for x in Case(20, 30, b=2, h=3, d=4).inputs() if x is not None)
    ours = index_topk(q, weights, k, 40, causal=True, index_dtype=torch.int64, with_scores=True)
    theirs = index_topk(q, weights, k, 40, causal=True, index_dtype=torch.int64, with_scores=True, impl="materialized")
    assert ours.indices.dtype == torch.int64
    assert torch.equal(ours.indices, theirs.indices)
    assert index_topk(q, weights, k, 4).scores is None
    for impl in ("eager", "materialized"):  # whose any order is the total one
        any_order = index_topk(q, weights, k, 40, causal=True, index_dtype=torch.int64, sorted=False, impl=impl)
        assert torch.equal(any_order.indices, ours.indices)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("b", [0, 2])
def test_zero_length_axes_select_nothing(sizes: tuple[int, int], b: int) -> None:
    q, weights, k = (x for x in Case(*sizes, b=b, h=2, d=3).inputs() if x is not None)
    indices, _ = index_topk(q, weights, k, 3)
    assert indices.shape == (b, sizes[0], 3)
    assert (indices == -1).all()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"topk": -1}, ValueError, "index_topk: topk must be at least 0, got -1"),
        ({"topk": 2.0}, TypeError, "index_topk: topk must be an int, got float"),
        (
            {"index_dtype": torch.int16},
            ValueError,
            "index_topk: index_dtype must be one of torch.int32, torch.int64, got",
        ),
        ({"workspace": 10}, ValueError, "index_topk: workspace must be at least"),
    ],
)
def test_a_breach_is_one_sentence(change: dict[str, Any], error: type[Exception], said: str) -> None:
    q, weights, k = (x for x in Case(4, 5, h=2, d=3).inputs() if x is not None)
    with pytest.raises(error, match=said):
        index_topk(q, weights, k, **{"topk": 2, **change})
