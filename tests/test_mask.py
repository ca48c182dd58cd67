"""index_mask and update_index_mask_: what they select, in place, within their bytes, and without reading data."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from headfold import index_mask, ops, tiles, update_index_mask_
from headfold.backends import eager
from headfold.contract import MASK_DTYPES
from headfold.lanes.measure import allocator_peak
from headfold.lanes.syncfree import no_data_reads
from headfold.tiles import MIB, Entries

CPU = torch.device("cpu")
NEG_INF = float("-inf")
INDEX_DTYPES = (torch.int32, torch.int64)
INDUCTOR_IMPORTS = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
BOTH = pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
EVERY = pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)

Rows = list[list[list[int]]]  # [b][sq][topk]


def by_hand(selections: Rows, sk: int) -> list[list[list[bool]]]:
    """Whether each key is selected, in plain Python."""
    return [[[t in row for t in range(sk)] for row in rows] for rows in selections]


def as_mask(selected: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    chosen = torch.tensor(selected, dtype=torch.bool).view(shape)
    return chosen if dtype == torch.bool else torch.where(chosen, 0.0, NEG_INF).to(dtype)


def empty_mask(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, False if dtype == torch.bool else NEG_INF, dtype=dtype)


@st.composite
def selections(draw: st.DrawFn) -> tuple[Rows, int]:
    b, sq, topk, sk = (draw(st.integers(0, most)) for most in (3, 4, 5, 6))
    entry = st.integers(-1, sk - 1)
    row = st.lists(entry, min_size=topk, max_size=topk)
    rows = st.lists(row, min_size=sq, max_size=sq)
    return draw(st.lists(rows, min_size=b, max_size=b)), sk


def tensor_of(rows: Rows, dtype: torch.dtype) -> Tensor:
    b = len(rows)
    sq = len(rows[0]) if b else 0
    topk = len(rows[0][0]) if sq else 0
    return torch.tensor(rows, dtype=dtype).view(b, sq, topk)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut selections into blocks of a few entries, so that small tests meet every border."""
    monkeypatch.setattr(tiles, "_ENTRIES_BYTES", 64)


@settings(deadline=None, max_examples=150)
@given(selections(), st.sampled_from(MASK_DTYPES), st.sampled_from(INDEX_DTYPES))
def test_the_mask_is_what_a_loop_in_python_says(case: tuple[Rows, int], dtype: torch.dtype, index: torch.dtype) -> None:
    rows, sk = case
    indices = tensor_of(rows, index)
    before = indices.clone()
    mask = index_mask(indices, sk, dtype=dtype)
    shape = (*indices.shape[:2], sk)
    assert mask.shape == shape
    assert mask.dtype == dtype
    assert torch.equal(mask, as_mask(by_hand(rows, sk), shape, dtype))
    assert torch.equal(indices, before)


@pytest.mark.usefixtures("small_blocks")
@EVERY
@pytest.mark.parametrize("shape", [(1, 9, 11), (3, 7, 5), (17, 1, 3), (2, 1, 40), (5, 3, 1)], ids=str)
def test_blocks_of_every_cut_give_the_same_mask(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    indices = torch.randint(-1, 13, shape, generator=torch.Generator().manual_seed(0))
    wanted = as_mask(by_hand(indices.tolist(), 13), (*shape[:2], 13), dtype)
    assert torch.equal(eager.index_mask(indices, 13, dtype), wanted)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.sampled_from(MASK_DTYPES), st.sampled_from(INDEX_DTYPES))
def test_updates_of_blocks_of_rows_add_up(data: st.DataObject, dtype: torch.dtype, index: torch.dtype) -> None:
    b, sq, sk = (data.draw(st.integers(1, most)) for most in (2, 5, 6))
    wanted = [[set[int]() for _ in range(sq)] for _ in range(b)]
    mask = empty_mask((b, sq, sk), dtype)
    for _ in range(data.draw(st.integers(1, 4))):
        first = data.draw(st.integers(0, sq))
        count, topk = data.draw(st.integers(0, sq - first)), data.draw(st.integers(0, 4))
        entry = st.lists(st.integers(-1, sk - 1), min_size=topk, max_size=topk)
        rows = [[data.draw(entry) for _ in range(count)] for _ in range(b)]
        indices = torch.tensor(rows, dtype=index).view(b, count, topk)
        assert update_index_mask_(mask, indices, first_row=first) is mask
        for i in range(b):
            for s in range(count):
                wanted[i][first + s] |= set(rows[i][s])
        selected = [[[t in keys for t in range(sk)] for keys in row] for row in wanted]
        assert torch.equal(mask, as_mask(selected, (b, sq, sk), dtype))


@BOTH
@EVERY
@pytest.mark.parametrize(
    ("row", "selected"),
    [
        ([0, -1, 2], {0, 2}),
        ([-1, 0], {0}),
        ([-1, -1, 0, -1], {0}),
        ([-1, -1, -1], set()),
        ([-1, 3], {3}),
        ([1, 1, 1], {1}),
        ([0, 0, -1, -1], {0}),
        ([3, 2, 1, 0], {0, 1, 2, 3}),
        ([-2, -(2**31)], set()),
        ([], set()),
    ],
    ids=str,
)
def test_corners_of_a_row(row: list[int], selected: set[int], dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    indices = torch.tensor(row, dtype=index_dtype).view(1, 1, -1)
    wanted = as_mask([t in selected for t in range(4)], (1, 1, 4), dtype)
    assert torch.equal(index_mask(indices, 4, dtype=dtype), wanted)


@EVERY
def test_key_0_stays_unmasked_when_a_later_update_holds_minus_one(dtype: torch.dtype) -> None:
    mask = empty_mask((1, 1, 4), dtype)
    for row in ([0, 1], [2, -1], [-1, -1]):
        update_index_mask_(mask, torch.tensor([[row]]))
    assert torch.equal(mask, as_mask([True, True, True, False], (1, 1, 4), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_updates_are_those_of_megatron_core(dtype: torch.dtype) -> None:
    pytest.importorskip("megatron.core")
    name = "megatron.core.transformer.experimental_attention_variant.dsa_masking"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports warn of packages that this function does not use
        theirs = importlib.import_module(name).scatter_topk_into_index_mask
    mask, expected = (empty_mask((2, 30, 40), dtype) for _ in range(2))
    for seed in range(3):
        indices = torch.randint(-1, 40, (2, 30, 5), generator=torch.Generator().manual_seed(seed))
        update_index_mask_(mask, indices)
        theirs(expected, indices)
    assert torch.equal(mask, expected)


@EVERY
def test_only_the_block_of_rows_is_written(dtype: torch.dtype) -> None:
    mask = empty_mask((2, 6, 5), dtype)
    update_index_mask_(mask, torch.full((2, 2, 3), 4), first_row=3)
    expected = empty_mask((2, 6, 5), dtype)
    expected[:, 3:5, 4] = 1 if dtype == torch.bool else 0
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("dtype", MASK_DTYPES[1:], ids=str)
def test_an_additive_mask_keeps_what_it_holds_elsewhere(dtype: torch.dtype) -> None:
    values = [-5.0, -0.25, 3.0, NEG_INF, -7.0, torch.finfo(dtype).min]
    mask = torch.tensor([[values]], dtype=dtype)
    update_index_mask_(mask, torch.tensor([[[1, 2, 3, -1]]]))
    assert torch.equal(mask, torch.tensor([[[-5.0, 0.0, 3.0, 0.0, -7.0, torch.finfo(dtype).min]]], dtype=dtype))
    assert not mask.signbit()[0, 0, 1]


VIEWS: dict[str, Any] = {
    "inner block": lambda big: big[:2, 2:8, 3:10],
    "every other": lambda big: big[:4:2, 1:13:2, ::2][..., :7],
    "transposed": lambda big: big.transpose(1, 2)[:2, :6, :7],
    "batch inside": lambda big: big.permute(1, 0, 2)[:2, :6, :7],
    "batch from rows": lambda big: big[0].unflatten(0, (2, 10))[:, :6, :7],
}


@EVERY
@pytest.mark.parametrize("name", VIEWS)
def test_a_mask_that_is_a_view_is_updated_in_place_and_nothing_beside_it(name: str, dtype: torch.dtype) -> None:
    big, plain = empty_mask((20, 20, 20), dtype), empty_mask((20, 20, 20), dtype)
    mask = VIEWS[name](big)
    indices = torch.randint(-1, 7, (2, 3, 4), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    update_index_mask_(mask, indices, first_row=2)
    wanted = index_mask(indices, 7, dtype=dtype)
    assert torch.equal(mask[:, 2:5], wanted)
    VIEWS[name](plain)[:, 2:5].copy_(wanted)
    assert torch.equal(big, plain)


@EVERY
def test_strided_and_expanded_indices_work_and_are_left_as_they_were(dtype: torch.dtype) -> None:
    for indices in (
        torch.randint(-1, 9, (3, 4, 10), dtype=torch.int64)[:, ::2, ::3],
        torch.randint(-1, 9, (4, 3, 5), dtype=torch.int32).permute(1, 2, 0),
        torch.randint(-1, 9, (1, 1, 6), dtype=torch.int64).expand(3, 4, 6),
        torch.randint(-1, 9, (3, 4, 1), dtype=torch.int64).expand(3, 4, 6),
    ):
        before = indices.clone()
        wanted = as_mask(by_hand(indices.tolist(), 9), (*indices.shape[:2], 9), dtype)
        assert torch.equal(index_mask(indices, 9, dtype=dtype), wanted)
        assert torch.equal(indices, before)


@EVERY
@pytest.mark.parametrize("sizes", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0), (0, 0, 0, 0)], ids=str)
def test_zero_length_axes(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    b, sq, topk, sk = sizes
    indices = torch.full((b, sq, topk), -1)
    mask = index_mask(indices, sk, dtype=dtype)
    assert torch.equal(mask, empty_mask((b, sq, sk), dtype))
    assert update_index_mask_(mask, indices) is mask


def test_a_mask_of_no_rows_may_begin_where_the_mask_ends() -> None:
    mask = empty_mask((1, 3, 4), torch.bool)
    update_index_mask_(mask, torch.zeros(1, 0, 2, dtype=torch.int32), first_row=3)
    assert not mask.any()


@pytest.mark.usefixtures("poisoned")
@EVERY
def test_it_runs_under_deterministic_algorithms_and_gives_the_same_bits(dtype: torch.dtype) -> None:
    indices = torch.randint(-1, 50, (2, 30, 70), generator=torch.Generator().manual_seed(2))
    mask = index_mask(indices, 50, dtype=dtype)
    shuffled = indices[..., torch.randperm(70, generator=torch.Generator().manual_seed(3))]
    assert torch.equal(mask, as_mask(by_hand(indices.tolist(), 50), (2, 30, 50), dtype))
    assert torch.equal(index_mask(shuffled, 50, dtype=dtype), mask)


def test_a_bool_mask_is_what_attention_takes() -> None:
    query, key, value = torch.randn(3, 1, 1, 4, 8, dtype=torch.float64)
    indices = torch.tensor([[[0, 2], [3, -1], [1, 0], [2, 2]]])
    attend = torch.nn.functional.scaled_dot_product_attention
    by_bool = attend(query, key, value, index_mask(indices, 4).unsqueeze(1))
    added = attend(query, key, value, index_mask(indices, 4, dtype=torch.float64).unsqueeze(1))
    torch.testing.assert_close(by_bool, added)
    torch.testing.assert_close(by_bool[0, 0, 1], value[0, 0, 3])


@EVERY
@pytest.mark.parametrize(
    "shape", [(1, 2100, 512), (2, 300, 300), (3000, 1, 700), (1, 1, 2_000_000), (3, 5, 7)], ids=str
)
def test_planned_bytes_are_measured_bytes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    b, sq, topk = shape
    sk = 256
    indices = torch.randint(-1, sk, shape, dtype=torch.int32)
    mask = index_mask(indices, sk, dtype=dtype)
    planned = Entries.of(b, sq, topk, dtype.itemsize).scratch_bytes
    assert planned <= 16 * MIB
    made = allocator_peak(lambda: index_mask(indices, sk, dtype=dtype), CPU)
    assert 0.8 * planned <= made.peak - mask.nbytes <= planned
    assert made.left == mask.nbytes
    updated = allocator_peak(lambda: update_index_mask_(mask, indices), CPU)
    assert 0.8 * planned <= updated.peak <= planned
    assert updated.left == 0


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 10**8), (10**6, 1, 2048), (1, 10**6, 2048), (10**6, 10**6, 1)])
def test_no_shape_needs_more_than_a_quarter_of_the_workspace(shape: tuple[int, int, int], size: int) -> None:
    plan = Entries.of(*shape, size)
    assert plan.scratch_bytes <= 16 * MIB
    assert plan.count == shape[0] * shape[1] * shape[2] or plan.scratch_bytes >= 4 * MIB


@pytest.mark.usefixtures("small_blocks")
@EVERY
def test_the_undecorated_bodies_read_no_data(dtype: torch.dtype) -> None:
    indices = torch.randint(-1, 9, (2, 5, 4), dtype=torch.int32)
    mask = empty_mask((2, 8, 9), dtype)
    with no_data_reads():
        made = eager.index_mask(indices, 9, dtype)
        eager.update_index_mask_(mask, indices, 2)
    assert torch.equal(made, mask[:, 2:7])


def test_the_checks_read_no_data() -> None:
    indices = torch.tensor([[[0, -1]]])
    mask = empty_mask((1, 1, 4), torch.bool)
    with no_data_reads():
        index_mask(indices, 4)
        update_index_mask_(mask, indices)


def public(indices: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return index_mask(indices, 9, dtype=mask.dtype), update_index_mask_(mask, indices, first_row=2)


def body(indices: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    eager.update_index_mask_(mask, indices, 2)
    return eager.index_mask(indices, 9, mask.dtype), mask


@INDUCTOR_IMPORTS
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16], ids=str)
@pytest.mark.parametrize("run", [public, body])
def test_it_compiles_with_fullgraph_and_gives_the_same_bits(run: Any, dtype: torch.dtype, backend: str) -> None:
    torch._dynamo.reset()
    indices = torch.randint(-1, 9, (2, 5, 4), generator=torch.Generator().manual_seed(4))
    mask, expected = empty_mask((2, 8, 9), dtype), empty_mask((2, 8, 9), dtype)
    compiled: Any = torch.compile(run, fullgraph=True, backend=backend)
    made, returned = compiled(indices, mask)
    wanted = run(indices, expected)
    assert torch.equal(made, wanted[0])
    assert torch.equal(mask, expected)
    assert torch.equal(returned, expected)


def test_it_compiles_with_symbolic_sizes_and_any_strides() -> None:
    torch._dynamo.reset()

    def both(indices: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        first_row = mask.shape[1] - indices.shape[1]
        return index_mask(indices, mask.shape[2]), update_index_mask_(mask, indices, first_row=first_row)

    compiled: Any = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for sq, sk, topk in ((5, 9, 3), (7, 11, 2), (2, 4, 5)):
        indices = torch.randint(-1, sk, (3, sq, topk), generator=torch.Generator().manual_seed(sq))
        mask, expected = (torch.zeros(3, sk, sq + 2).transpose(1, 2) for _ in range(2))
        made, _ = compiled(indices, mask)
        assert torch.equal(made, both(indices, expected)[0])
        assert torch.equal(mask, expected)


def test_autograd_notices_that_a_saved_mask_was_updated() -> None:
    x, mask = torch.ones(1, 1, 3, requires_grad=True), torch.zeros(1, 1, 3)
    y = (x * mask).sum()
    update_index_mask_(mask, torch.tensor([[[0]]]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@INDUCTOR_IMPORTS
def test_compiled_by_inductor_an_update_takes_the_bytes_of_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_ENTRIES_BYTES", MIB)
    torch._dynamo.reset()
    indices = torch.randint(-1, 2048, (1, 1024, 256), dtype=torch.int32)
    mask = empty_mask((1, 1024, 2048), torch.float32)
    compiled: Any = torch.compile(update_index_mask_, fullgraph=True)
    compiled(mask, indices)
    peak = allocator_peak(lambda: compiled(mask, indices), CPU)
    assert peak.peak <= Entries.of(1, 1024, 256, 4).scratch_bytes <= MIB


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("run", [public, body])
def test_it_traces_over_fake_tensors(run: Any, mode: Any) -> None:
    indices = torch.randint(-1, 9, (2, 5, 4), generator=torch.Generator().manual_seed(5))
    mask, expected = empty_mask((2, 8, 9), torch.float32), empty_mask((2, 8, 9), torch.float32)
    traced = make_fx(run, tracing_mode=mode)(indices, mask)
    assert torch.equal(mask, empty_mask((2, 8, 9), torch.float32)), "the trace wrote"
    other = indices.flip(0)
    made, _ = traced(other, mask)
    assert torch.equal(made, run(other, expected)[0])
    assert torch.equal(mask, expected)


@EVERY
def test_the_registered_ops_pass_opcheck(dtype: torch.dtype) -> None:
    indices = torch.tensor([[[0, -1, 2], [-1, -1, -1]]], dtype=torch.int32)
    torch.library.opcheck(ops.index_mask, (indices, 4, dtype))
    torch.library.opcheck(ops.update_index_mask_, (empty_mask((1, 5, 4), dtype), indices, 2))


def test_an_index_of_sk_or_more_is_torchs_own_error_on_a_cpu() -> None:
    with pytest.raises(RuntimeError, match="index 4 is out of bounds"):
        index_mask(torch.tensor([[[4]]]), 4)


I32 = torch.zeros(2, 3, 4, dtype=torch.int32)
MASK = torch.zeros(2, 5, 6)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"indices": [[[0]]]}, TypeError, "indices must be a tensor, got list."),
        ({"indices": I32.float()}, TypeError, "indices must be int32 or int64, got torch.float32."),
        ({"indices": I32.short()}, TypeError, "indices must be int32 or int64, got torch.int16."),
        ({"indices": I32[0]}, ValueError, "indices must be [b, sq, topk], got shape [3, 4]."),
        ({"sk": 2.0}, TypeError, "sk must be an int, got float."),
        ({"sk": True}, TypeError, "sk must be an int, got bool."),
        ({"sk": -1}, ValueError, "sk must be at least 0, got -1."),
        ({"dtype": torch.int32}, ValueError, "dtype must be one of torch.bool, torch.float16"),
        ({"dtype": "bool"}, ValueError, "got 'bool'."),
    ],
)
def test_a_breach_of_index_mask_is_one_sentence(change: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as raised:
        index_mask(**{"indices": I32, "sk": 6, **change})
    assert str(raised.value).startswith("index_mask: ")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"mask": [[[0.0]]]}, TypeError, "mask must be a tensor, got list."),
        ({"mask": MASK.int()}, TypeError, "mask must be bool, float16, bfloat16, float32 or float64, got torch.int32."),
        ({"mask": MASK[0]}, ValueError, "mask must be [b, sq, sk], got shape [5, 6]."),
        ({"mask": MASK[:1]}, ValueError, "mask must have the batch size b = 2 of indices, got 1."),
        ({"mask": MASK.to("meta")}, ValueError, "mask must be on indices's device cpu, got meta."),
        ({"mask": MASK.clone().requires_grad_()}, ValueError, "mask must not require grad"),
        ({"mask": MASK[:, :1].expand(2, 5, 6)}, ValueError, "mask must hold each entry at a place of its own"),
        ({"mask": MASK[:1].expand(2, 5, 6)}, ValueError, "strides [0, 6, 1]. Make it contiguous."),
        ({"mask": torch.zeros(50).as_strided((2, 5, 6), (20, 2, 1))}, ValueError, "strides [20, 2, 1]"),
        ({"indices": I32.float()}, TypeError, "indices must be int32 or int64, got torch.float32."),
        ({"indices": 3}, TypeError, "indices must be a tensor, got int."),
        ({"first_row": -1}, ValueError, "first_row must be at least 0, got -1."),
        ({"first_row": 1.0}, TypeError, "first_row must be an int, got float."),
        ({"first_row": 3}, ValueError, "within the mask's sq = 5 rows, got 3 rows from first_row = 3 on."),
    ],
)
def test_a_breach_of_an_update_is_one_sentence_and_writes_nothing(
    change: dict[str, Any], error: type[Exception], said: str
) -> None:
    call: dict[str, Any] = {"mask": torch.full((2, 5, 6), NEG_INF), "indices": I32, **change}
    before = call["mask"].detach().clone() if isinstance(call["mask"], Tensor) else None
    with pytest.raises(error) as raised:
        update_index_mask_(**call)
    assert str(raised.value).startswith("update_index_mask_: ")
    assert said in str(raised.value)
    if before is not None and before.device == CPU:
        assert torch.equal(call["mask"].detach(), before)


def test_an_expanded_axis_of_one_entry_is_no_overlap() -> None:
    mask = torch.zeros(1, 6, dtype=torch.bool).expand(1, 1, 6)
    update_index_mask_(mask, torch.tensor([[[5]]]))
    assert mask.sum() == 1


def test_a_mask_beyond_two_to_the_31_entries_is_reached() -> None:
    sk = 2**30
    mask = index_mask(torch.tensor([[[sk - 1], [-1], [-1]]]), sk)
    assert mask.numel() > 2**31
    update_index_mask_(mask, torch.tensor([[[sk - 2, -1]]]), first_row=2)
    assert [mask[0, 0, -1].item(), mask[0, 2, -2].item()] == [True, True]
    assert not mask[0, 2, 0]
    assert torch.count_nonzero(mask[0, :, :2]) == 0
