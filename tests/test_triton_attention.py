"""sparse_attention by kernels, on a GPU or under Triton's interpreter on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from headfold import Attention, KeyRange, scatter_tiles
from headfold.attention import _attend
from headfold.backends import load
from headfold.lanes.budget import spend_attention
from headfold.lanes.measure import allocator_peak
from headfold.lanes.residency import LEAST_SHARE
from headfold.lanes.syncfree import no_data_reads
from headfold.tiles import MIB
from on_device import DEVICE, drawn, launches_leave_nothing, there
from test_attention import Heads as AnywhereHeads
from test_attention import assert_same, checked, public, results

triton = pytest.importorskip("triton", reason="Triton is not installed")
attention_backward = import_module("headfold.backends.triton.attention_backward")
attention_cuts = import_module("headfold.backends.triton.attention_cuts")
picks = import_module("headfold.backends.triton.picks")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
QUICK = [torch.bfloat16, torch.float32]
NEG_INF, NAN = float("-inf"), float("nan")
kernels = partial(public, impl="triton")


@dataclass(frozen=True)
class Heads(AnywhereHeads):
    """A call whose tensors are on the device."""

    __str__ = AnywhereHeads.__str__

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor | None]:
        moved: list[Tensor | None] = there(super().inputs(dtype, seed))
        return moved

    def indices(self, seed: int = 0) -> Tensor:
        return super().indices(seed).to(DEVICE)

    def incoming(self, seed: int = 1) -> Tensor:
        return super().incoming(seed).to(DEVICE)

    def call(self) -> dict[str, Any]:
        moved: dict[str, Any] = there(super().call())
        return moved


CASES = [
    Heads(5, 40, 23, heads=4, dim=32, sinks=True, visible="causal"),
    Heads(4, 20, 20, heads=6, key_heads=2, dim=80, v=48, visible="ragged"),
    Heads(2, 30, 40, heads=34, dim=192, v=24, sinks=True, visible="window"),
    Heads(2, 30, 11, b=2, heads=2, key_heads=2, dim=24, v=136, visible="per batch"),
]
# The rest, beyond the first case's and a dtype or two of each, are slow ones.
EACH = [
    pytest.param(case, dtype, id=f"{case}-{dtype}", marks=[pytest.mark.slow] if n and dtype not in quick else [])
    for n, case in enumerate(CASES)
    for quick in [QUICK[: max(1, 3 - n)]]
    for dtype in DTYPES
]
LATENT = replace(Heads(2, 70, 66, heads=20, dim=576), v=0)


@pytest.fixture(params=["scattered", "masked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take one way to the gradients of keys, whatever the shape."""
    masked = request.param == "masked"
    if masked and DEVICE.type == "cuda":
        pytest.skip("compiled kernels have no masked way for exact products, which never take it")
    monkeypatch.setattr(scatter_tiles, "masks_keys", lambda *_, **__: masked)
    return str(request.param)


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small shapes into many blocks of rows, slabs and spans of picks."""
    for name in ("_SETTLED_BYTES", "_ATTENTION_SETTLED_BYTES", "_MASKED_BYTES"):
        monkeypatch.setattr(scatter_tiles, name, 700)
    monkeypatch.setattr(scatter_tiles, "_ATTENTION_SLAB_BYTES", 1600)
    monkeypatch.setattr(scatter_tiles, "_LEAST_SPAN", 5)


def spent(case: Heads, dtype: torch.dtype, g: Tensor | None = None, **call: Any) -> dict[str, Any]:
    g = case.incoming() if g is None else g
    return spend_attention(case.inputs(dtype), g, case.indices(), backend="triton", **{**case.call(), **call})


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("case", "dtype"), EACH)
def test_results_and_gradients_stay_within_the_error_budget(case: Heads, dtype: torch.dtype) -> None:
    assert {name: s for name, s in spent(case, dtype).items() if not s.kept} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_absorbed_latent_attention_keeps_the_budget(dtype: torch.dtype) -> None:
    query, key, *_ = LATENT.inputs(dtype)
    call = {**LATENT.call(), "v_dim": 512}
    g = drawn(1, 2, 20, 512, seed=1, dtype=torch.float64)
    of_each = spend_attention([query, key, None, None], g, LATENT.indices(), backend="triton", **call)
    assert {name: s for name, s in of_each.items() if not s.kept} == {}


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_large_logits_keep_the_budget(scale: float) -> None:
    case = Heads(4, 90, 80, heads=2, dim=32, v=32, sinks=True)
    assert {n: s for n, s in spent(case, torch.float32, softmax_scale=scale).items() if not s.kept} == {}


@pytest.mark.parametrize("v", [0, 16])
@pytest.mark.parametrize("size", [1e-5, 300.0])
def test_float16_gradients_do_not_leave_its_range_on_the_way(size: float, v: int) -> None:
    case = Heads(3, 300, 250, heads=3, dim=16, v=v)
    assert {n: s for n, s in spent(case, torch.float16, case.incoming() * size).items() if not s.kept} == {}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "case",
    [
        Heads(2, 4, 5, heads=2, key_heads=2, dim=16, v=3, sinks=True, visible="ragged"),
        Heads(2, 4, 5, heads=2, dim=16, sinks=True),
    ],
    ids=str,
)
def test_gradcheck_through_the_kernels(case: Heads) -> None:
    indices = case.indices()
    assert torch.autograd.gradcheck(
        lambda *x: kernels(case, list(x), indices).out, case.leaves(torch.float64), fast_mode=True
    )


@pytest.mark.usefixtures("small_slabs", "way")
@pytest.mark.parametrize(
    "case",
    [
        Heads(5, 21, 17, b=2, heads=4, key_heads=2, dim=16, v=24, sinks=True, visible="causal"),
        Heads(5, 21, 17, heads=3, dim=24, visible="ragged"),
    ],
    ids=str,
)
def test_blocks_slabs_and_spans_are_dense_masked_attention(case: Heads) -> None:
    leaves, indices, g = case.leaves(torch.float64), case.indices(), case.incoming()
    oracle = results(public(case, leaves, indices, impl="materialized"), leaves, g)
    assert_same(results(kernels(case, leaves, indices), leaves, g), oracle)


@pytest.mark.usefixtures("way")
def test_more_heads_than_a_block_holds_give_the_same() -> None:
    case = Heads(2, 30, 20, heads=70, dim=32)
    leaves, indices, g = case.leaves(torch.float64), case.indices(), case.incoming()
    oracle = results(public(case, leaves, indices, impl="eager"), leaves, g)
    assert_same(results(kernels(case, leaves, indices), leaves, g), oracle)


def test_more_keys_than_one_pass_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picks, "BLOCK", 2)
    case = Heads(2, 150, 40, heads=2, dim=16, v=16)
    leaves, indices, g = case.leaves(torch.float64), case.indices(), case.incoming()
    oracle = results(public(case, leaves, indices, impl="eager"), leaves, g)
    assert_same(results(kernels(case, leaves, indices), leaves, g), oracle)


@pytest.mark.parametrize(
    ("shape", "masked"),
    [
        ((4096, 1024, 64, 8, 128), True),
        ((2048, 256, 16, 16, 64), True),
        ((131_072, 1024, 64, 8, 128), False),
        ((4096, 2048, 128, 1, 576), False),
    ],
)
def test_keys_meet_masked_rows_where_that_costs_less(shape: tuple[int, int, int, int, int], masked: bool) -> None:
    assert scatter_tiles.masks_keys(*shape, exact=False) == masked
    assert not scatter_tiles.masks_keys(*shape, exact=True)


def test_duplicates_count_once_and_minus_one_not_at_all() -> None:
    case = Heads(2, 6, 5, heads=2, dim=16, v=16)
    leaves, g = case.leaves(), case.incoming()
    once = torch.tensor([[[4, 1, 2, -1, -1], [5, 0, -1, -1, -1]]], device=DEVICE)
    again = torch.tensor([[[4, 1, -1, 4, 2], [5, 5, 0, 5, 0]]], device=DEVICE)
    ours = [results(kernels(case, leaves, indices), leaves, g) for indices in (once, again)]
    for x, y in zip(*ours, strict=True):
        torch.testing.assert_close(x, y)


def test_which_of_equal_picks_counts_does_not_change() -> None:
    case = Heads(2, 9, 150, heads=2, dim=16, v=16)
    leaves, indices, g = case.leaves(), case.indices(), case.incoming()
    expected = results(kernels(case, leaves, indices), leaves, g)
    assert all(map(torch.equal, results(kernels(case, leaves, indices), leaves, g), expected))
    first = torch.full_like(indices, -1)
    for row, keys in enumerate(indices[0].tolist()):
        for place, t in enumerate(keys):
            if t not in keys[:place]:
                first[0, row, place] = t
    assert all(map(torch.equal, results(kernels(case, leaves, first), leaves, g), expected))


@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_without_a_key_is_zeros_and_has_no_gradient(sinks: bool) -> None:
    case = Heads(3, 6, 4, heads=2, dim=16, v=16, sinks=sinks)
    leaves = case.leaves()
    indices = torch.tensor([[[-1, -1, -1, -1], [3, 4, 5, 3], [0, 1, -1, -1]]], device=DEVICE)
    keys = there(KeyRange(end=torch.tensor([6, 3, 6], dtype=torch.int32)))
    attention = kernels(case, leaves, indices, keys=keys)
    assert attention.out[0, :2].eq(0).all()
    assert attention.out[0, 2].ne(0).all()
    expected = leaves[3].detach().unsqueeze(1).expand(-1, 2) if sinks else torch.full((2, 2), NEG_INF, device=DEVICE)
    assert torch.equal(attention.lse[0, :, :2], expected)
    dq, dk, dv, *rest = torch.autograd.grad(attention.out, leaves, drawn(1, 3, 2, 16))
    assert dq[0, :2].eq(0).all()
    assert dk[0, 2:].eq(0).all()
    assert dv[0, 2:].eq(0).all()
    assert all(x.isfinite().all() for x in rest)


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    case = Heads(3, 6, 3, heads=2, dim=16, v=16)
    leaves, indices = case.leaves(), case.indices()
    sink = torch.full((2,), NEG_INF, device=DEVICE, requires_grad=True)
    with_sink = kernels(replace(case, sinks=True), [*leaves, sink], indices)
    assert all(map(torch.equal, with_sink, kernels(case, leaves, indices)))
    assert torch.autograd.grad(with_sink.out.sum(), sink)[0].eq(0).all()


@pytest.mark.parametrize("v", [0, 16])
def test_nan_in_what_nobody_selected_or_may_see(v: int) -> None:
    case = Heads(3, 6, 3, heads=2, dim=16, v=v)
    leaves = case.leaves()
    with torch.no_grad():
        for x in leaves[1:]:
            x[0, 0] = x[0, 4] = x[0, 5] = NAN
    indices = torch.tensor([[[1, 2, -1], [3, -1, -1], [4, 1, 2]]], device=DEVICE)
    keys = there(KeyRange(end=torch.tensor([6, 6, 4], dtype=torch.int32)))
    attention = kernels(case, leaves, indices, keys=keys)
    assert attention.lse.isfinite().all()
    assert all(x.isfinite().all() for x in results(attention, leaves, torch.ones(1, 3, 2, case.v_dim, device=DEVICE)))


@pytest.mark.filterwarnings("ignore:.*invalid value:RuntimeWarning")  # NumPy's, under the interpreter
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_of_what_is_selected_propagates(place: int) -> None:
    case = Heads(2, 4, 3, heads=2, dim=16, v=16)
    leaves, indices = case.leaves(), torch.tensor([[[0, 1, 2], [2, 3, -1]]], device=DEVICE)
    with torch.no_grad():
        leaves[place][0, 0, 0, 0] = NAN
    attention = kernels(case, leaves, indices)
    out = attention.out[0]
    assert out[0, 0].isnan().any()
    assert out[1].isfinite().all()
    if place < 2:
        assert out[0, 0].isnan().all()
        assert attention.lse[0, 0, 0].isnan()


@pytest.mark.parametrize("layout", ["sbhd", "thd"])
def test_layouts_are_the_same_call(layout: str) -> None:
    case = Heads(4, 11, 7, b=1 if layout == "thd" else 2, heads=4, key_heads=2, dim=24, v=16, sinks=True)
    leaves, indices, g = case.leaves(), case.indices(), case.incoming()
    keys = there(KeyRange.sliding(4, 11, 9))
    expected = results(kernels(case, leaves, indices, keys=keys), leaves, g)
    moved = [x[0] if layout == "thd" else x.transpose(0, 1).contiguous() for x in leaves[:3]]
    out, lse = kernels(case, [*moved, leaves[3]], indices, keys=keys, layout=layout)
    assert out.is_contiguous()
    back = out.unsqueeze(0) if layout == "thd" else out.transpose(0, 1)
    assert all(map(torch.equal, results(Attention(back, lse), leaves, g), expected))


def test_strides_index_dtypes_and_expanded_heads_change_nothing() -> None:
    case = Heads(3, 12, 7, b=2, heads=4, key_heads=2, dim=16, v=24, sinks=True)
    leaves, indices = case.leaves(), case.indices()
    g = case.incoming().float()
    expected = results(kernels(case, leaves, indices), leaves, g)
    odd = [torch.stack([x, x], dim=-1)[..., 0] for x in leaves]
    moved = [x.transpose(-1, 0).contiguous().transpose(-1, 0) if x.dim() == 4 else x for x in leaves]
    for other, some in ((odd, indices.long()), (moved, indices.mT.contiguous().mT)):
        again = results(kernels(case, other, some), leaves, g.mT.contiguous().mT)
        assert all(map(torch.equal, again, expected))
    one = replace(case, key_heads=1)
    leaves = one.leaves()
    wide = [leaves[0], *(x.expand(-1, -1, 4, -1) for x in leaves[1:3]), leaves[3]]
    narrow = results(kernels(one, leaves, indices), leaves, g)
    assert_same(results(kernels(one, wide, indices), leaves, g), narrow, 1e-6)


@pytest.mark.parametrize("needed", [{0}, {1}, {2}, {3}])
def test_any_gradient_can_be_asked_for_alone(needed: set[int]) -> None:
    case = Heads(3, 9, 6, heads=4, key_heads=2, dim=16, v=16, sinks=True)
    everything, indices, g = case.leaves(), case.indices(), case.incoming()
    every = results(kernels(case, everything, indices), everything, g)[2:]
    some = [x.detach().requires_grad_(i in needed) for i, x in enumerate(everything)]
    wanted = [x for x in some if x.requires_grad]
    grads = results(kernels(case, some, indices), wanted, g)[2:]
    assert all(map(torch.equal, grads, [every[i] for i in sorted(needed)]))


@pytest.mark.parametrize("sizes", [(0, 5, 3), (3, 0, 2), (3, 4, 0)])
@pytest.mark.parametrize("sinks", [False, True])
def test_zero_length_axes(sizes: tuple[int, int, int], sinks: bool) -> None:
    case = Heads(*sizes, b=2, heads=2, dim=16, v=16, sinks=sinks)
    leaves, indices, g = case.leaves(), torch.full((2, case.sq, case.topk), -1, device=DEVICE), case.incoming()
    assert_same(
        results(kernels(case, leaves, indices), leaves, g),
        results(public(case, leaves, indices, impl="materialized"), leaves, g),
        0.0,
    )


@pytest.mark.parametrize(
    ("dtype", "v"),
    [
        (torch.float16, 0),
        (torch.bfloat16, 64),
        *(pytest.param(x, v, marks=pytest.mark.slow) for x in QUICK for v in (0, 64)),
    ],
)
def test_planned_bytes_are_measured_bytes(dtype: torch.dtype, v: int) -> None:
    case = Heads(3, 300, 100, heads=2, dim=64, v=v, sinks=True)
    leaves, indices = case.leaves(dtype), case.indices()
    call = checked(case, leaves, indices)
    plan = load("triton").attention_tile_of(call.query, call.key, call.value, call.indices, call.v_dim, True)

    def run() -> Attention:
        return _attend(call, with_lse=True, backend="triton")

    run()
    with launches_leave_nothing():
        forward = allocator_peak(run, DEVICE)
    sizes = sum(x.nbytes for x in forward.result)
    assert LEAST_SHARE * (sizes + plan.forward_bytes) <= forward.peak <= sizes + plan.forward_bytes
    assert forward.left == sizes, "something besides the results is held for backward"
    g = case.incoming().to(dtype)
    with launches_leave_nothing():
        backward = allocator_peak(lambda: torch.autograd.grad(forward.result.out, leaves, g), DEVICE)
    cast = 4 * case.sk * (case.dim + case.v) if dtype.itemsize < 4 else 0
    planned = sum(x.nbytes for x in leaves) + cast + plan.backward_bytes
    assert LEAST_SHARE * planned <= backward.peak <= planned


@pytest.mark.parametrize("size", [4, 8])
def test_the_default_workspace_is_enough_for_published_models(size: int) -> None:
    for sk, topk, channels, heads in ((131_072, 2048, 576, 128), (2048, 256, 16 * 128, 16)):
        tile = scatter_tiles.ScatterTile.of(4096, sk, topk, channels, size, held=heads * (3 * size + 4), attention=True)
        assert tile.backward_bytes <= 48 * MIB


def test_the_bodies_read_no_data() -> None:
    case = Heads(3, 9, 5, b=2, heads=4, key_heads=2, dim=16, v=16, sinks=True, visible="ragged")
    leaves = [x.detach() for x in case.leaves(torch.bfloat16)]
    call, bodies = checked(case, leaves, case.indices()), load("triton")
    with no_data_reads():
        out, _ = bodies.sparse_attention(*call.inputs, *call.options, True, True)
        needs = True, True, True, True
        bodies.sparse_attention_backward(torch.ones_like(out), *call.inputs, *call.options, True, needs)


def test_keys_that_are_read_through_registers_take_a_smaller_tile_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    query, wide = torch.zeros(1, 2, 4, 64, dtype=torch.bfloat16), torch.zeros(1, 8, 2, 80, dtype=torch.bfloat16)
    key, within, later = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16), wide[..., :64], wide[..., 3:67]
    for arch, sizes in (("sm_90", [64, 64, 32, 32]), ("sm_100", [64] * 4)):
        monkeypatch.setattr(attention_cuts, "arch_of", lambda device, arch=arch: arch)
        values = key, within, later, key.transpose(2, 3).contiguous().transpose(2, 3)
        assert [attention_cuts.cut("attention", query, key, value)["BN"] for value in values] == sizes
        exact = attention_cuts.cut("attention", query.float(), key.float(), later.float())
        assert exact["BN"] == attention_cuts.cut("attention", query.float(), key.float(), None)["BN"] < 32
