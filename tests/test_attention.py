from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import headfold
from headfold import (
    Attention,
    KeyRange,
    UnsupportedError,
    attention_tiles,
    index_mask,
    materialized_attention,
    ops,
    sparse_attention,
)
from headfold.attention import _attend
from headfold.attention_contract import AttentionCall, attention_call
from headfold.attention_tiles import AttentionTile, gathers
from headfold.backends import eager
from headfold.lanes.budget import ATTENTION_DEFAULTS, spend_attention
from headfold.lanes.measure import allocator_peak
from headfold.lanes.residency import LEAST_SHARE, SMALL_CHANGE
from headfold.lanes.syncfree import no_data_reads
from headfold.tiles import DEFAULT_WORKSPACE, MIB

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NEG_INF = float("-inf")
NAN = float("nan")
WALKS = pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "masked"])


@dataclass(frozen=True)
class Heads:
    """A call of sparse_attention in layout bshd; v=0 reads the first 3/4 of the key's channels as values."""

    sq: int
    sk: int
    topk: int
    b: int = 1
    heads: int = 4
    key_heads: int = 1
    dim: int = 16
    v: int = 0
    sinks: bool = False
    visible: str = "all"

    def __str__(self) -> str:
        parts = [f"b{self.b}", f"q{self.sq}", f"k{self.sk}", f"top{self.topk}", f"h{self.heads}-{self.key_heads}"]
        parts += [f"d{self.dim}", f"v{self.v}" if self.v else "prefix", *(["sink"] if self.sinks else [])]
        return "-".join([*parts, self.visible])

    @property
    def v_dim(self) -> int:
        return self.v or max(1, 3 * self.dim // 4)

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(seed)

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        query = make(self.b, self.sq, self.heads, self.dim)
        key = make(self.b, self.sk, self.key_heads, self.dim)
        value = make(self.b, self.sk, self.key_heads, self.v) if self.v else None
        return [query, key, value, make(self.heads) if self.sinks else None]

    def leaves(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [x.requires_grad_() for x in self.inputs(dtype) if x is not None]

    def indices(self, seed: int = 0) -> Tensor:
        """Any keys, in any order, with duplicates and -1 among them, and a row of nothing but -1."""
        generator = torch.Generator().manual_seed(seed)
        shape = self.b, self.sq, self.topk
        indices = torch.randint(-1, self.sk, shape, generator=generator, dtype=torch.int32)
        indices[:, self.sq // 2] = -1
        return indices

    def incoming(self, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.b, self.sq, self.heads, self.v_dim, generator=generator, dtype=torch.float64)

    def call(self) -> dict[str, Any]:
        call: dict[str, Any] = {"softmax_scale": self.dim**-0.5, "v_dim": self.v_dim}
        rows = torch.arange(self.sq, dtype=torch.int32)
        if self.visible == "causal":
            call["causal"] = True
        elif self.visible == "window":
            call["keys"] = KeyRange.sliding(self.sq, self.sk, 7)
        elif self.visible == "ragged":  # some rows see nothing, some all
            call["keys"] = KeyRange(start=rows % 3, end=(rows * 7) % (self.sk + 2) - 1)
        elif self.visible == "per batch":
            ends = torch.stack([(rows + i) % (self.sk + 1) for i in range(self.b)])
            call["keys"] = KeyRange(end=ends.int(), offset=self.sk)
        return call

    def tile(self, gathered: bool, dtype: torch.dtype) -> AttentionTile:
        shape = self.sq, self.sk, self.topk, self.heads, self.key_heads, self.dim, self.v_dim
        sizes = max(4, dtype.itemsize), dtype.itemsize
        return AttentionTile.of(gathered, *shape, *sizes, shared=not self.v)


# The first crosses tiles of rows in both walks.
CASES = [
    Heads(300, 700, 90, heads=4, dim=32, sinks=True, visible="causal"),
    Heads(150, 500, 60, b=2, heads=8, key_heads=4, dim=24, v=16),
    Heads(37, 53, 23, b=2, heads=3, key_heads=3, dim=16, v=20, visible="causal"),
    Heads(53, 37, 40, b=2, heads=6, key_heads=3, dim=24, sinks=True, visible="causal"),
    Heads(33, 64, 9, heads=1, dim=32, v=8, visible="window"),
    Heads(40, 41, 17, b=2, heads=8, dim=16, sinks=True, visible="ragged"),
    Heads(40, 41, 17, b=2, heads=8, key_heads=8, dim=16, v=16, sinks=True, visible="per batch"),
]
SMALL = [
    Heads(4, 6, 5, b=b, heads=4, key_heads=kv, dim=3, v=v, sinks=sinks, visible=visible)
    for b, kv, v, sinks, visible in [
        (1, 1, 0, True, "causal"),
        (1, 1, 2, False, "ragged"),
        (2, 2, 5, True, "per batch"),
        (1, 2, 0, False, "all"),
        (1, 4, 3, True, "window"),
        (1, 4, 0, True, "all"),
    ]
]


def named(case: Heads, leaves: list[Tensor]) -> dict[str, Any]:
    """Put query, key and what there is of value and sink in their places."""
    rest = leaves[2:]
    value = rest.pop(0) if case.v else None
    return {"query": leaves[0], "key": leaves[1], "value": value, "sink": rest.pop(0) if case.sinks else None}


def checked(case: Heads, leaves: list[Tensor], indices: Tensor, **call: Any) -> AttentionCall:
    return attention_call(
        "test", indices=indices, **named(case, leaves), **{**ATTENTION_DEFAULTS, **case.call(), **call}
    )


def attended(case: Heads, leaves: list[Tensor], indices: Tensor, gathered: bool | None, **call: Any) -> Attention:
    return _attend(checked(case, leaves, indices, **call), with_lse=True, gathered=gathered)


def public(case: Heads, leaves: list[Tensor], indices: Tensor, **call: Any) -> Attention:
    arguments = {**named(case, leaves), "layout": "bshd", **case.call(), "return_lse": True, **call}
    result = sparse_attention(indices=indices, **arguments)
    assert isinstance(result, Attention)
    return result


def results(attention: Attention, leaves: list[Tensor], g: Tensor) -> list[Tensor]:
    return [*attention, *torch.autograd.grad(attention.out, leaves, g.to(attention.out.dtype))]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-11) -> None:
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("poisoned")
@WALKS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_stay_within_the_error_budget(case: Heads, dtype: torch.dtype, gathered: bool) -> None:
    spent = spend_attention(case.inputs(dtype), case.incoming(), case.indices(), gathered=gathered, **case.call())
    assert {name: s for name, s in spent.items() if not s.kept} == {}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small shapes into many blocks of rows and spans of keys."""
    monkeypatch.setattr(attention_tiles, "_SPAN_BYTES", 1 << 14)
    monkeypatch.setattr(attention_tiles, "_GATHERED_LOGITS", 1 << 14)
    monkeypatch.setattr(attention_tiles, "_MASKED_LOGITS", 1 << 15)


SPANNING = [
    Heads(60, 300, 250, heads=6, key_heads=2, dim=48, v=32, sinks=True),
    Heads(60, 300, 250, b=2, heads=4, dim=64, visible="ragged"),
]


@pytest.mark.usefixtures("poisoned", "small_tiles")
@WALKS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPANNING, ids=str)
def test_spans_of_keys_and_blocks_of_rows_keep_the_budget(case: Heads, dtype: torch.dtype, gathered: bool) -> None:
    tile = case.tile(gathered, dtype)
    assert tile.span < tile.width
    assert tile.rows < case.sq
    spent = spend_attention(case.inputs(dtype), case.incoming(), case.indices(), gathered=gathered, **case.call())
    assert {name: s for name, s in spent.items() if not s.kept} == {}


def test_the_first_case_crosses_blocks_of_rows() -> None:
    assert all(CASES[0].tile(gathered, torch.float32).rows < CASES[0].sq for gathered in (True, False))


@pytest.mark.parametrize("scale", [1.0, 8.0])
@WALKS
def test_large_logits_keep_the_budget(scale: float, gathered: bool) -> None:
    case = Heads(64, 300, 80, heads=4, dim=32, v=32, sinks=True)
    call = {**case.call(), "softmax_scale": scale}
    spent = spend_attention(case.inputs(), case.incoming(), case.indices(), gathered=gathered, **call)
    assert {name: s for name, s in spent.items() if not s.kept} == {}


@WALKS
def test_nearly_one_hot_rows_are_no_worse_than_in_another_order(gathered: bool) -> None:
    """Their gradients are what cancels: held to eight orders, a ninth breaks the budget too. Ours, no oftener."""
    ninth = partial(materialized_attention.reordered, generator=torch.Generator().manual_seed(1))
    broken = {"ours": 0, "ninth order": 0}
    for seed, topk, key_heads in itertools.product(range(2), (1, 3, 8), (1, 4)):
        case = Heads(24, 40, topk, heads=4, key_heads=key_heads, dim=16, v=16, sinks=True)
        for scale in (1.3, 30.0):
            held = case.inputs(seed=seed), case.incoming(seed + 50), case.indices(seed)
            call = {**case.call(), "softmax_scale": scale}
            for name, attend in (("ours", None), ("ninth order", ninth)):
                spent = spend_attention(*held, gathered=gathered, attend=attend, **call)
                broken[name] += sum(not s.kept for s in spent.values())
    assert broken["ninth order"] > 0, broken
    assert broken["ours"] <= 3 + 2 * broken["ninth order"], broken


@WALKS
@pytest.mark.parametrize("dim", [96, 128])
def test_a_scale_that_is_no_power_of_two_rounds_no_operand(dim: int, gathered: bool) -> None:
    case = Heads(40, 90, 30, heads=4, dim=dim, v=16, sinks=True)
    scaled = {**case.call(), "softmax_scale": 90 * dim**-0.5}
    spent = spend_attention(case.inputs(torch.bfloat16), case.incoming(), case.indices(), gathered=gathered, **scaled)
    assert spent["lse"].share < 0.8


@WALKS
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck_of_the_op_that_ships(case: Heads, gathered: bool) -> None:
    indices = case.indices()
    assert torch.autograd.gradcheck(
        lambda *x: attended(case, list(x), indices, gathered).out, case.leaves(torch.float64)
    )


@WALKS
@pytest.mark.parametrize("case", [*SMALL, *(c for c in CASES if c.sq < 100)], ids=str)
def test_both_walks_are_dense_masked_attention(case: Heads, gathered: bool) -> None:
    leaves, indices, g = case.leaves(torch.float64), case.indices(), case.incoming()
    oracle = results(public(case, leaves, indices, impl="materialized"), leaves, g)
    assert_same(results(attended(case, leaves, indices, gathered), leaves, g), oracle)


def test_it_is_torch_s_own_attention_under_the_mask_of_the_selection() -> None:
    case = Heads(20, 30, 9, b=2, heads=6, key_heads=2, dim=8, v=5)
    leaves, indices = case.leaves(torch.float64), case.indices()
    indices[:, 10, 0] = 4  # the row of -1: torch gives NaN or zeros there
    query, key, value = (x.transpose(1, 2) for x in leaves)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, index_mask(indices, 30).unsqueeze(1), scale=8**-0.5, enable_gqa=True
    )
    for impl in ("eager", "materialized"):
        torch.testing.assert_close(public(case, leaves, indices, impl=impl).out, theirs.transpose(1, 2))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_indices_and_shape_give_what_dense_attention_gives(data: st.DataObject) -> None:
    sq, sk, topk = (data.draw(st.integers(low, high)) for low, high in ((0, 5), (0, 7), (0, 9)))
    key_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    case = Heads(
        sq,
        sk,
        topk,
        b=data.draw(st.integers(0, 2)),
        heads=key_heads * group,
        key_heads=key_heads,
        dim=3,
        v=data.draw(st.sampled_from([0, 2])),
        sinks=data.draw(st.booleans()),
        visible=data.draw(st.sampled_from(["all", "causal", "ragged"])),
    )
    count = case.b * sq * topk
    flat = st.lists(st.integers(-1, sk - 1), min_size=count, max_size=count)
    indices = torch.tensor(data.draw(flat), dtype=torch.int64).view(case.b, sq, topk)
    leaves, g = case.leaves(torch.float64), case.incoming()
    oracle = results(public(case, leaves, indices, impl="materialized"), leaves, g)
    for gathered in (True, False):
        assert_same(results(attended(case, leaves, indices, gathered), leaves, g), oracle)


@WALKS
def test_duplicates_count_once_and_minus_one_not_at_all(gathered: bool) -> None:
    case = Heads(2, 6, 5, heads=2, dim=4, v=4)
    leaves, g = case.leaves(), case.incoming()
    once = torch.tensor([[[1, 4, 2, -1, -1], [0, 5, -1, -1, -1]]])
    again = torch.tensor([[[4, 1, -1, 4, 2], [5, 5, 0, 5, 0]]])
    ours = [results(attended(case, leaves, indices, gathered), leaves, g) for indices in (once, again)]
    assert all(map(torch.equal, *ours))
    alone = attended(case, leaves, once[:, :1, :3].expand(-1, 2, -1), gathered)
    torch.testing.assert_close(ours[0][0][:, 0], alone.out[:, 0])


@WALKS
@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_without_a_key_is_zeros_and_has_no_gradient(gathered: bool, sinks: bool) -> None:
    case = Heads(3, 6, 4, heads=2, dim=4, v=4, sinks=sinks)
    leaves = case.leaves()
    indices = torch.tensor([[[-1, -1, -1, -1], [3, 4, 5, 3], [0, 1, -1, -1]]])
    keys = KeyRange(end=torch.tensor([6, 3, 6], dtype=torch.int32))  # what row 1 selected, it may not see
    attention = attended(case, leaves, indices, gathered, keys=keys)
    assert attention.out[0, :2].eq(0).all()
    assert attention.out[0, 2].ne(0).all()
    expected = leaves[3].detach().unsqueeze(1).expand(-1, 2) if sinks else torch.full((2, 2), NEG_INF)
    assert torch.equal(attention.lse[0, :, :2], expected)
    g = torch.randn(1, 3, 2, 4)
    dq, dk, dv, *_ = torch.autograd.grad(attention.out, leaves, g)
    assert dq[0, :2].eq(0).all()
    assert dk[0, 2:].eq(0).all()
    assert dv[0, 2:].eq(0).all()


@WALKS
def test_a_sink_of_minus_infinity_is_no_sink(gathered: bool) -> None:
    case = Heads(4, 6, 3, heads=2, dim=4, v=4)
    leaves, indices = case.leaves(), case.indices()
    without = attended(case, leaves, indices, gathered)
    sink = torch.full((2,), NEG_INF)
    assert all(map(torch.equal, attended(replace(case, sinks=True), [*leaves, sink], indices, gathered), without))


@WALKS
def test_the_log_sum_exp_is_that_of_selected_logits_and_sink(gathered: bool) -> None:
    case = Heads(6, 9, 4, heads=2, dim=4, v=4, sinks=True)
    query, key, _, sink = leaves = case.leaves(torch.float64)
    indices = case.indices()
    lse = attended(case, leaves, indices, gathered).lse
    logits = torch.einsum("bshd,btd->bhst", query, key[:, :, 0]) * 0.5
    logits = logits.masked_fill(~index_mask(indices, 9).unsqueeze(1), NEG_INF)
    expected = torch.cat([logits, sink.view(1, 2, 1, 1).expand(-1, -1, 6, -1)], -1).logsumexp(-1)
    torch.testing.assert_close(lse, expected)
    assert not public(case, leaves, indices).lse.requires_grad
    assert not public(case, leaves, indices, impl="materialized").lse.requires_grad


@WALKS
def test_values_are_the_first_channels_of_keys(gathered: bool) -> None:
    case = Heads(30, 40, 12, b=2, heads=4, key_heads=2, dim=16)
    query, key = leaves = case.leaves()
    indices, g = case.indices(), case.incoming()
    shared = results(attended(case, leaves, indices, gathered), leaves, g)
    apart = replace(case, v=case.v_dim)
    value = key[..., : case.v_dim]
    separate = results(attended(apart, [query, key, value], indices, gathered), leaves, g)
    assert_same(shared, separate, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [16, 24])
@pytest.mark.parametrize("prefix", [True, False])
def test_an_expanded_key_is_one_head_and_is_never_copied(dtype: torch.dtype, heads: int, prefix: bool) -> None:
    case = Heads(10, 600, 20, heads=heads, dim=64, v=0 if prefix else 32)
    leaves, indices, g = case.leaves(dtype), case.indices(), case.incoming().to(dtype)
    one = results(public(case, leaves, indices), leaves, g)
    wide = [leaves[0], *(x.expand(-1, -1, heads, -1) for x in leaves[1:])]
    forward = allocator_peak(lambda: public(case, wide, indices), CPU)
    tile = case.tile(gathers(600, 20, heads, 1), dtype)
    sizes = sum(x.nbytes for x in one[:2])
    assert forward.peak <= sizes + tile.forward_bytes
    assert all(map(torch.equal, forward.result, one[:2]))
    backward = allocator_peak(lambda: torch.autograd.grad(forward.result.out, leaves, g), CPU)
    grads = sum(x.nbytes for x in leaves)
    assert backward.peak <= 2 * grads + tile.backward_bytes + sum(x.numel() * 4 for x in leaves[1:])
    assert backward.peak - tile.backward_bytes < heads * leaves[1].nbytes
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert_same(list(backward.result), one[2:], tolerance)


def test_a_key_expanded_beside_a_value_of_many_heads_stays_as_it_is() -> None:
    case = Heads(7, 9, 4, heads=4, key_heads=4, dim=4, v=4)
    query, key, value = case.leaves(torch.float64)
    wide, indices, g = key[:, :, :1].expand(-1, -1, 4, -1), case.indices(), case.incoming()
    leaves = [query, key, value]
    oracle = results(public(case, [query, wide, value], indices, impl="materialized"), leaves, g)
    assert_same(results(public(case, [query, wide, value], indices), leaves, g), oracle)


@pytest.mark.parametrize("layout", ["sbhd", "thd"])
def test_layouts_are_the_same_call(layout: str) -> None:
    case = Heads(29, 31, 11, b=1 if layout == "thd" else 2, heads=4, key_heads=2, dim=12, v=8, sinks=True)
    leaves, indices, g = case.leaves(), case.indices(), case.incoming()
    keys = KeyRange.sliding(29, 31, 9)
    expected = results(public(case, leaves, indices, keys=keys), leaves, g)
    moved = [x[0] if layout == "thd" else x.transpose(0, 1).contiguous() for x in leaves[:3]]
    out, lse = public(case, [*moved, leaves[3]], indices, keys=keys, layout=layout)
    assert out.shape == (*moved[0].shape[:-1], 8)
    assert out.is_contiguous()
    back = out.unsqueeze(0) if layout == "thd" else out.transpose(0, 1)
    assert all(map(torch.equal, results(Attention(back, lse), leaves, g), expected))


@WALKS
def test_strides_and_index_dtypes_change_nothing(gathered: bool) -> None:
    case = Heads(20, 30, 10, b=2, heads=4, key_heads=2, dim=8, v=6, sinks=True)
    leaves, indices = case.leaves(), case.indices()
    expected = attended(case, leaves, indices, gathered)
    odd = [torch.stack([x, x], dim=-1)[..., 0] for x in leaves]
    moved = [x.transpose(-1, 0).contiguous().transpose(-1, 0) if x.dim() == 4 else x for x in leaves]
    for other in (odd, moved):
        assert all(map(torch.equal, attended(case, other, indices, gathered), expected))
    for same in (indices.long(), indices.mT.contiguous().mT):
        assert all(map(torch.equal, attended(case, leaves, same, gathered), expected))
    g = case.incoming().float()
    everything = results(expected, leaves, g)
    assert all(
        map(torch.equal, results(attended(case, odd, indices, gathered), leaves, g.mT.contiguous().mT), everything)
    )


@WALKS
def test_nan_in_what_nobody_selected_or_may_see(gathered: bool) -> None:
    case = Heads(3, 6, 3, heads=2, dim=4, v=4)
    leaves = case.leaves()
    with torch.no_grad():
        for x in leaves[1:]:
            x[0, 0] = x[0, 4] = x[0, 5] = NAN
    indices = torch.tensor([[[1, 2, -1], [3, -1, -1], [4, 1, 2]]])  # -1 and duplicates stand on key 0's place
    keys = KeyRange(end=torch.tensor([6, 6, 4], dtype=torch.int32))
    attention = attended(case, leaves, indices, gathered, keys=keys)
    assert attention.lse.isfinite().all()
    if gathered:
        assert all(x.isfinite().all() for x in results(attention, leaves, torch.ones_like(attention.out)))
        return
    oracle = public(case, leaves, indices, keys=keys, impl="materialized")
    assert torch.equal(attention.out.isnan(), oracle.out.isnan())


@WALKS
def test_nan_of_a_selected_key_reaches_the_rows_that_selected_it(gathered: bool) -> None:
    case = Heads(2, 6, 2, heads=2, dim=4, v=4)
    leaves = case.leaves()
    with torch.no_grad():
        leaves[1][0, 2, 0, 1] = NAN
    attention = attended(case, leaves, torch.tensor([[[2, 1], [3, 1]]]), gathered)
    assert attention.out[0, 0].isnan().all()
    assert attention.lse[0, :, 0].isnan().all()
    assert attention.out[0, 1].isfinite().all()


@WALKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_runs_and_workspaces_give_the_same_bits(dtype: torch.dtype, gathered: bool) -> None:
    case = Heads(200, 500, 100, heads=8, key_heads=2, dim=32, v=32, sinks=True)
    leaves, indices, g = case.leaves(dtype), case.indices(), case.incoming()
    least = case.tile(gathered, dtype).backward_bytes
    expected = results(attended(case, leaves, indices, gathered), leaves, g)
    for workspace in [least, 16 * MIB, 512 * MIB, *[None] * 7]:
        again = results(attended(case, leaves, indices, gathered, workspace=workspace), leaves, g)
        assert all(map(torch.equal, again, expected))


def accumulators(case: Heads, dtype: torch.dtype) -> int:
    """Bytes of the float32 sums of one batch element's dk and dv, for half-precision inputs."""
    return 4 * case.sk * case.key_heads * (case.dim + case.v) if dtype.itemsize < 4 else 0


BIG = Heads(400, 1100, 150, b=2, heads=16, key_heads=4, dim=64, v=64, sinks=True)
MLA = Heads(12, 3000, 1500, heads=32, dim=576, visible="causal")


@WALKS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, BIG, MLA], ids=str)
def test_planned_bytes_are_measured_bytes(case: Heads, dtype: torch.dtype, gathered: bool) -> None:
    leaves, indices, tile = case.leaves(dtype), case.indices(), case.tile(gathered, dtype)
    g = case.incoming().to(dtype)
    call = checked(case, leaves, indices)
    _attend(call, with_lse=True, gathered=gathered)
    forward = allocator_peak(lambda: _attend(call, with_lse=True, gathered=gathered), CPU)
    sizes = sum(x.nbytes for x in forward.result)
    planned = sizes + tile.forward_bytes
    assert LEAST_SHARE * planned <= forward.peak <= planned
    assert forward.left == sizes, "something besides the results is held for backward"
    backward = allocator_peak(lambda: torch.autograd.grad(forward.result.out, leaves, g), CPU)
    planned = sum(x.nbytes for x in leaves) + accumulators(case, dtype) + tile.backward_bytes
    assert LEAST_SHARE * planned <= backward.peak <= planned
    assert backward.left == sum(x.nbytes for x in backward.result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [BIG, MLA], ids=str)
def test_beyond_results_a_call_takes_its_workspace_and_small_change(case: Heads, dtype: torch.dtype) -> None:
    leaves, indices = case.leaves(dtype), case.indices()
    forward = allocator_peak(lambda: public(case, leaves, indices, return_lse=True), CPU)
    assert forward.peak <= sum(x.nbytes for x in forward.result) + DEFAULT_WORKSPACE + SMALL_CHANGE
    g = case.incoming().to(dtype)
    backward = allocator_peak(lambda: torch.autograd.grad(forward.result.out, leaves, g), CPU)
    given = sum(x.nbytes for x in leaves) + accumulators(case, dtype)
    assert backward.peak <= given + DEFAULT_WORKSPACE + SMALL_CHANGE


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_24_mib_are_enough_for_published_models(dtype: torch.dtype, accelerator: bool) -> None:
    sizes = max(4, dtype.itemsize), dtype.itemsize
    for shape in [(4096, 131_072, 2048, 128, 1, 576, 512), (2048, 2048, 256, 16, 16, 64, 64)]:
        gathered = gathers(shape[1], shape[2], shape[3], shape[4])
        tile = AttentionTile.of(gathered, *shape, *sizes, shared=True, accelerator=accelerator)
        assert tile.backward_bytes <= 24 * MIB


@WALKS
@pytest.mark.parametrize("case", [SMALL[0], SMALL[2]], ids=str)
@pytest.mark.parametrize("needed", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}])
def test_any_subset_of_inputs_may_require_grad(case: Heads, needed: set[int], gathered: bool) -> None:
    everything, indices, g = case.leaves(), case.indices(), case.incoming()
    every = results(attended(case, everything, indices, gathered), everything, g)[2:]
    some = [x.detach().requires_grad_(i in needed) for i, x in enumerate(everything)]
    wanted = [x for x in some if x.requires_grad]
    grads = results(attended(case, some, indices, gathered), wanted, g)[2:]
    assert all(map(torch.equal, grads, [every[i] for i in sorted(needed)]))


def op_arguments(case: Heads, dtype: torch.dtype, *, grad: bool) -> tuple[Any, ...]:
    leaves = [x.detach().requires_grad_(grad) for x in case.leaves(dtype)]
    call = checked(case, leaves, case.indices())
    return (*call.inputs, *call.options)


@WALKS
@pytest.mark.parametrize("case", SMALL[:3], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(case: Heads, dtype: torch.dtype, gathered: bool) -> None:
    torch.library.opcheck(ops.sparse_attention, (*op_arguments(case, dtype, grad=True), gathered, True, "eager"))
    torch.library.opcheck(ops.sparse_attention, (*op_arguments(case, dtype, grad=False), gathered, False, "eager"))
    g = case.incoming().to(dtype)
    arguments = (g, *op_arguments(case, dtype, grad=False), gathered, True, "eager")
    for needs in ((True, True, case.v > 0, case.sinks), (True, False, False, False)):
        torch.library.opcheck(ops.sparse_attention_backward, (*arguments, *needs))


@WALKS
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_undecorated_bodies_read_no_data(case: Heads, dtype: torch.dtype, gathered: bool) -> None:
    arguments = op_arguments(case, dtype, grad=False)
    with no_data_reads():
        out, _ = eager.sparse_attention(*(*arguments, gathered, True))
        needs = True, True, case.v > 0, case.sinks
        eager.sparse_attention_backward(*(torch.ones_like(out), *arguments, gathered, needs))


@pytest.mark.parametrize("case", SMALL[:3], ids=str)
def test_it_compiles_autocasts_checkpoints_and_infers(case: Heads) -> None:
    torch._dynamo.reset()
    leaves, indices, g = case.leaves(), case.indices(), case.incoming()
    expected = results(public(case, leaves, indices), leaves, g)

    def run(*x: Tensor) -> Attention:
        return public(case, list(x), indices)

    def agrees(attention: Attention) -> bool:
        return all(map(torch.equal, results(attention, leaves, g), expected))

    assert agrees(torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves))
    assert agrees(checkpoint(run, *leaves, use_reentrant=False))
    with torch.autocast("cpu"):
        assert agrees(run(*leaves))
    with torch.inference_mode():
        assert all(map(torch.equal, run(*leaves), expected[:2]))
    with torch.no_grad():
        assert all(map(torch.equal, run(*leaves), expected[:2]))
        assert torch.equal(public_out(case, leaves, indices), expected[0])


def public_out(case: Heads, leaves: list[Tensor], indices: Tensor) -> Tensor:
    out = sparse_attention(indices=indices, **named(case, leaves), layout="bshd", **case.call())
    assert isinstance(out, Tensor)
    return out


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
def test_an_expanded_key_compiles() -> None:
    torch._dynamo.reset()
    case = Heads(7, 9, 4, heads=4, dim=4)
    query, key = leaves = case.leaves()
    indices, g = case.indices(), case.incoming().float()

    def run(query: Tensor, key: Tensor) -> Tensor:
        return public_out(case, [query, key.expand(-1, -1, 4, -1)], indices)

    expected = torch.autograd.grad(run(query, key), leaves, g)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(query, key)
    assert all(map(torch.equal, torch.autograd.grad(compiled, leaves, g), expected))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # forward mode's own imports
def test_it_is_differentiable_once_and_in_reverse() -> None:
    case = SMALL[2]
    leaves, indices = case.leaves(), case.indices()
    grads = torch.autograd.grad(public_out(case, leaves, indices).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"headfold: sparse_attention can be differentiated once"):
        grads[0].sum().backward()
    with pytest.raises(UnsupportedError, match="sparse_attention: differentiates in reverse mode only"):
        torch.func.jvp(lambda q: public_out(case, [q, *leaves[1:]], indices), (leaves[0],), (leaves[0],))


def test_only_inputs_are_held_for_backward() -> None:
    case = SMALL[2]
    leaves, indices, saved = case.leaves(), case.indices(), []

    def keep(x: Tensor) -> Tensor:
        saved.append(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        keys = case.call()["keys"]
        public(case, leaves, indices, keys=keys)
    assert set(saved) <= {
        x.untyped_storage().data_ptr() for x in (*leaves, indices, keys.start, keys.end) if x is not None
    }


@WALKS
def test_flops_are_those_of_the_products(gathered: bool) -> None:
    case = Heads(6, 10, 4, b=2, heads=4, key_heads=2, dim=8, v=6)
    leaves, indices, g = case.leaves(), case.indices(), case.incoming().float()
    with FlopCounterMode(display=False) as forward:
        out = attended(case, leaves, indices, gathered).out
    pairs = 2 * 6 * (4 if gathered else 10) * 4
    assert forward.get_total_flops() == 2 * pairs * (8 + 6)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out, leaves, g)
    assert backward.get_total_flops() == 2 * pairs * (3 * 8 + 2 * 6)


def test_gathering_pays_for_few_picks_of_few_key_heads() -> None:
    assert gathers(2048, 256, 16, 1)
    assert not gathers(2048, 256, 16, 16)
    assert gathers(131_072, 2048, 128, 1)
    assert not gathers(2048, 2048, 16, 1)


def test_an_index_past_the_keys_is_refused_by_torch_on_a_cpu() -> None:
    case = Heads(2, 3, 1)
    for gathered in (True, False):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            attended(case, case.leaves(), torch.full((1, 2, 1), 3), gathered)


Q, K, V = torch.ones(5, 2, 4, 3), torch.ones(7, 2, 2, 3), torch.ones(7, 2, 2, 6)
PICKS = torch.zeros(2, 5, 3, dtype=torch.int32)
BREACHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1]}, TypeError, "query must be a tensor, got list"),
    ({"query": Q[0]}, ValueError, r"query must be \[sq, b, np, hn\], got shape \[2, 4, 3\]"),
    ({"query": Q.int()}, TypeError, "query must be float16, bfloat16, float32 or float64, got torch.int32"),
    ({"query": Q[..., :0], "key": K[..., :0]}, ValueError, "query needs at least one head and one channel"),
    ({"key": K.double()}, TypeError, "key must have query's dtype torch.float32, got torch.float64. Cast one"),
    ({"key": K[:, :1]}, ValueError, "key must have query's batch size b = 2, got 1"),
    ({"key": K[..., :2]}, ValueError, "key must have query's width hn = 3, got 2"),
    ({"key": torch.ones(7, 2, 3, 3)}, ValueError, "key must have a number of heads that divides query's np = 4, got 3"),
    ({"key": K[:, :, :0]}, ValueError, "key must have a number of heads that divides query's np = 4, got 0"),
    ({"key": K.to("meta")}, ValueError, "key must be on query's device cpu, got meta"),
    ({"value": V.half()}, TypeError, "value must have query's dtype torch.float32, got torch.float16"),
    ({"value": V.to("meta")}, ValueError, "value must be on query's device cpu, got meta"),
    ({"value": V[:6]}, ValueError, r"value must have key's batch, keys and heads \[2, 7, 2\], got \[2, 6, 2\]"),
    ({"value": V[:, :, :1]}, ValueError, r"value must have key's batch, keys and heads \[2, 7, 2\], got \[2, 7, 1\]"),
    ({"value": V[..., :0]}, ValueError, "value needs at least one channel, got 0"),
    ({"value": None}, ValueError, "value=None reads values from key and needs v_dim, their width, got v_dim=None"),
    ({"value": None, "v_dim": 4}, ValueError, "v_dim must be at most key's width hn = 3 with value=None, got 4"),
    ({"value": None, "v_dim": 0}, ValueError, "v_dim must be at least 1, got 0"),
    ({"v_dim": 5}, ValueError, "v_dim must be value's width 6 or None, got 5"),
    ({"v_dim": 6.0}, TypeError, "v_dim must be an int, got float"),
    ({"sink": torch.ones(3)}, ValueError, r"sink must be \[np\] = \[4\], got \[3\]"),
    ({"sink": torch.ones(4).int()}, TypeError, "sink must be float16, bfloat16, float32 or float64, got torch.int32"),
    ({"sink": torch.ones(4, device="meta")}, ValueError, "sink must be on query's device cpu, got meta"),
    ({"indices": PICKS[0]}, ValueError, r"indices must be \[b, sq, topk\], got shape \[5, 3\]"),
    ({"indices": PICKS[:, :4]}, ValueError, r"indices must be \[b, sq, topk\] = \[2, 5, topk\], got \[2, 4, 3\]"),
    ({"indices": PICKS.float()}, TypeError, "indices must be int32 or int64, got torch.float32"),
    ({"indices": PICKS.to("meta")}, ValueError, "indices must be on query's device cpu, got meta"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a Python number, got str"),
    ({"layout": "bhsd"}, ValueError, "layout must be one of 'sbhd', 'bshd', 'thd', got 'bhsd'"),
    ({"causal": 1}, TypeError, "causal must be True or False, got int"),
    ({"causal": True, "keys": KeyRange.causal(5, 7)}, ValueError, "causal=True excludes keys, got both"),
    ({"keys": KeyRange(end=torch.zeros(4).int())}, ValueError, r"keys.end must be \[sq\] = \[5\] or \[b, sq\]"),
    ({"keys": KeyRange(end=torch.zeros(5).int().to("meta"))}, ValueError, "keys.end must be on query's device cpu"),
    ({"impl": "fused"}, ValueError, "impl must be one of 'auto', 'eager', 'triton', 'materialized', got 'fused'"),
    ({"workspace": 10}, ValueError, "workspace must be at least [0-9]+ bytes for this shape, got 10"),
    ({"workspace": -1}, ValueError, "workspace must be at least 0 bytes, got -1"),
    (
        {"query": Q[:, 0], "key": K[:, 0], "value": V[:, 0], "indices": PICKS[:1], "layout": "thd"},
        ValueError,
        r'layout "thd" needs keys=KeyRange.packed\(...\) to tell its sequences apart, got keys=None',
    ),
]


@pytest.mark.parametrize(("change", "error", "said"), BREACHES)
def test_a_breach_is_one_sentence(change: dict[str, Any], error: type[Exception], said: str) -> None:
    arguments = {"query": Q, "key": K, "value": V, "indices": PICKS, "softmax_scale": 1.0, **change}
    with pytest.raises(error, match="sparse_attention: " + said):
        sparse_attention(**arguments)


def test_the_smallest_workspace_that_is_named_works() -> None:
    case = Heads(20, 30, 10, heads=4, dim=8)
    leaves, indices = case.leaves(), case.indices()
    with pytest.raises(ValueError, match="at least") as caught:
        public(case, leaves, indices, workspace=0)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    public(case, leaves, indices, workspace=least).out.sum().backward()
    with pytest.raises(ValueError, match=str(least)):
        public(case, leaves, indices, workspace=least - 1)
    forward = case.tile(gathers(30, 10, 4, 1), torch.float32).forward_bytes
    assert forward < least
    with torch.no_grad():
        public(case, leaves, indices, workspace=forward)


def test_the_public_names() -> None:
    assert headfold.sparse_attention is sparse_attention
    assert Attention._fields == ("out", "lse")
