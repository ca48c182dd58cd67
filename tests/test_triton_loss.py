from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from headfold import IndexerLoss, indexer_loss, loss_slabs
from headfold.attention_contract import attention_of
from headfold.backends import load
from headfold.backends.triton.loss_specimens import KERNELS, WIDEST, specimens
from headfold.backends.triton.score_specimens import DTYPES
from headfold.backends.triton.table import TABLE
from headfold.contract import score_call
from headfold.lanes.measure import allocator_peak
from headfold.lanes.residency import LEAST_SHARE, SMALL_CHANGE
from headfold.loss_slabs import LossSlab
from headfold.tiles import MIB
from on_device import DEVICE, Case, launches_leave_nothing

pytestmark = [
    pytest.mark.skipif(
        DEVICE.type == "cpu" and not load("triton").INTERPRETED,
        reason="without a GPU the kernels need Triton's interpreter, TRITON_INTERPRET=1 before Triton is imported",
    ),
    # What is made of hidden keys is dropped, whatever it is; numpy, which interprets it, remarks on infinities.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
SOFTMAX_SCALE = 0.35
SLOW = partial(pytest.param, marks=pytest.mark.slow)
# Every kind of mask, dense and sparse, with the other choices spread over them.
COMBINATIONS: list[tuple[str, dict[str, Any], str | None, bool, str]] = [
    ("all", {}, "relu", False, "mean"),
    ("causal", {"topk": 70, "sparse": True}, "relu", False, "mean"),
    ("window", {"topk": 3, "sparse": True}, None, False, "mean"),
    ("ragged", {"topk": 9, "sparse": True}, "relu", True, "mean"),
    ("ratio", {}, "relu", False, "sum"),
    ("bias", {}, None, True, "mean"),
    ("per batch", {"topk": 0, "sparse": True}, "relu", False, "mean"),
]
MORE: list[tuple[str, dict[str, Any], str | None, bool, str]] = [
    ("all", {"topk": 9, "sparse": True}, "relu", True, "sum"),
    ("causal", {"topk": 9}, None, True, "mean"),
    ("window", {}, "relu", True, "sum"),
    ("ragged", {"topk": 9}, "relu", False, "mean"),
    ("bias", {"topk": 9, "sparse": True}, "relu", False, "sum"),
]


def attention(case: Case, np: int = 3, np_k: int = 1, hn: int = 16, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = (case.sq, case.b, np, hn), (case.sk, case.b, np_k, hn)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def leaves(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return case.leaves(dtype)


def some_rows(case: Case) -> Tensor:
    return (torch.rand(case.b, case.sq, generator=torch.Generator().manual_seed(11)) < 0.6).to(DEVICE)


def loss_of(inputs: list[Tensor], beside: list[Tensor], **call: Any) -> IndexerLoss:
    q, weights, k = inputs
    return indexer_loss(q, weights, k, *beside, **{"softmax_scale": SOFTMAX_SCALE, "impl": "triton", **call})


def with_gradients(inputs: list[Tensor], beside: list[Tensor], **call: Any) -> tuple[list[Tensor], Tensor | None]:
    fresh = [x.detach().requires_grad_() for x in inputs]
    loss, indices = loss_of(fresh, beside, **call)
    return [loss.detach(), *torch.autograd.grad(loss, fresh)], indices


def assert_near(ours: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    for x, y in zip(ours, truth, strict=True):
        assert x.isfinite().all()
        assert float((x.double() - y).abs().max()) <= tolerance * float(y.abs().max()), (x, y)


def truth_of(inputs: list[Tensor], beside: list[Tensor], **call: Any) -> tuple[list[Tensor], Tensor | None]:
    wide = [x.double() for x in inputs], [x.double() for x in beside]
    return with_gradients(*wide, **{**call, "impl": "materialized"})


def body(case: Case, *, needs: bool, reduce: Any = None, beside: list[Tensor] | None = None, **options: Any) -> Any:
    """The undecorated body on a call of the public op."""
    call = {"causal": False, "keys": None, "bias": None, "activation": "relu", "scale": 1.0, **case.call()}
    checked = score_call("test", *[x.detach() for x in leaves(case)], **call, layout="sbhd", workspace=None)
    query, key = beside or attention(case)
    query, key = attention_of("test", query, key, checked, "sbhd")
    ranges = checked.start, checked.end, checked.bias, None, checked.offset, checked.ratio, checked.relu, checked.scale
    topk, sparse = options.get("topk"), options.get("sparse", False)
    rest = SOFTMAX_SCALE, topk, sparse, True
    return load("triton").indexer_loss(*checked.inputs, query, key, *ranges, *rest, needs=(needs,) * 3, reduce=reduce)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("visible", "support", "activation", "masked", "reduction"), [*COMBINATIONS, *(SLOW(*x) for x in MORE)]
)
def test_kernels_agree_with_full_tensors_under_autograd(
    visible: str, support: dict[str, Any], activation: str | None, masked: bool, reduction: str
) -> None:
    case = Case(18, 37, b=2, h=3, d=16, visible=visible, activation=activation, scale=0.5)
    call = {**case.call(), **support, "row_mask": some_rows(case) if masked else None, "reduction": reduction}
    inputs, beside = leaves(case), attention(case)
    ours, indices = with_gradients(inputs, beside, **call)
    truth, expected = truth_of(inputs, beside, **call)
    assert_near(ours, truth, 1e-11)
    assert (indices is None) == (expected is None)
    if indices is not None and expected is not None:
        assert torch.equal(indices, expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, SLOW(torch.float16)], ids=str)
def test_narrow_dtypes_are_near_the_truth(dtype: torch.dtype) -> None:
    case = Case(18, 37, h=3, d=16, visible="causal", scale=0.5)
    inputs, beside = leaves(case, dtype), attention(case, hn=40, dtype=dtype)
    call = {**case.call(), "topk": 9, "sparse": dtype == torch.float32}
    ours, _ = with_gradients(inputs, beside, **call)
    truth, _ = truth_of(inputs, beside, **call)
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype, dtype]
    assert_near(ours[:1], truth[:1], 5e-6)
    assert_near(ours[1:], truth[1:], 5e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("np", "np_k", "hn"), [(6, 2, 80), (4, 4, 17), (4, 1, 192)])
def test_heads_of_query_share_the_heads_of_key_and_any_width_serves(np: int, np_k: int, hn: int) -> None:
    case = Case(9, 20, b=2, h=2, d=16, visible="causal")
    inputs, beside = leaves(case), attention(case, np, np_k, hn)
    ours, _ = with_gradients(inputs, beside, causal=True)
    truth, _ = truth_of(inputs, beside, causal=True)
    assert_near(ours, truth, 1e-11)
    if np_k == 1:
        expanded = [beside[0], beside[1].expand(-1, -1, np, -1)]
        again, _ = with_gradients(inputs, expanded, causal=True)
        assert all(map(torch.equal, again, ours))


def test_splits_of_the_keys_are_joined() -> None:
    case = Case(3, loss_slabs.SPLIT_KEYS + 70, h=2, d=16, visible="causal")
    inputs, beside = leaves(case), attention(case, np=2)
    beside[1][0] *= 40  # maxima that differ between splits
    call = case.call()
    assert_near(with_gradients(inputs, beside, **call)[0], truth_of(inputs, beside, **call)[0], 1e-11)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("visible", [SLOW("all"), "ratio"])
def test_slabs_of_few_rows_give_what_one_slab_gives(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(18, 37, b=2, h=2, d=16, visible=visible)
    beside = attention(case, np=2)
    reduced: list[tuple[torch.Size, bool]] = []

    def reduce(mass: Tensor) -> None:
        reduced.append((mass.shape, mass.is_contiguous()))
        mass *= 2  # as two ranks with the same heads

    options: dict[str, Any] = {"beside": beside, "topk": 5, "sparse": visible == "ratio"}
    whole = body(case, needs=True, reduce=reduce, **options)
    assert len(reduced) == 1
    monkeypatch.setattr(loss_slabs, "_SLAB_BYTES", 20 * 64 * 17 + 9000)
    monkeypatch.setattr(loss_slabs, "_PRODUCT_ROWS", 16)
    reduced.clear()
    parted = body(case, needs=True, reduce=reduce, **options)
    assert len(reduced) == 4
    assert all(dense for _, dense in reduced)
    assert_near([x for x in parted if x.is_floating_point()], [x for x in whole if x.is_floating_point()], 1e-13)
    assert torch.equal(parted[1], whole[1])
    assert torch.equal(parted[2], whole[2])  # dq: a row does not depend on its slab
    alone = body(case, needs=True, **options)
    assert_near([alone[0]], [whole[0]], 1e-14)


def test_hidden_keys_reach_nothing_and_seen_ones_do() -> None:
    case = Case(9, 20, h=2, d=16, visible="bias")
    call = case.call()
    call["bias"][:, :, 7] = float("-inf")
    inputs, beside = leaves(case), attention(case)
    expected, _ = with_gradients(inputs, beside, **call)
    beside[1][7] = float("nan")
    ours, _ = with_gradients(inputs, beside, **call)
    assert all(map(torch.equal, ours, expected))
    beside[1][8] = float("nan")
    assert loss_of(inputs, beside, **call).loss.isnan()


def test_repeats_are_bitwise_equal_and_no_gradient_is_formed_unasked() -> None:
    case = Case(9, 20, b=2, h=2, d=16, visible="ragged")
    first, second = (body(case, needs=True, topk=4, sparse=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    alone = body(case, needs=False, topk=4, sparse=True)
    assert torch.equal(alone[0], first[0])
    assert torch.equal(alone[1], first[1])
    assert alone[2:] == (None, None, None)


@pytest.mark.parametrize("options", [SLOW({}), {"topk": 3, "sparse": True}], ids=["dense", "sparse"])
def test_gradcheck_runs_through_the_kernels(options: dict[str, Any]) -> None:
    case = Case(4, 7, h=2, d=16, visible="causal", scale=0.5)
    inputs, beside = leaves(case), attention(case, np=2)
    run = lambda *x: loss_of(list(x), beside, causal=True, **options).loss  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_axes_may_be_empty(shape: tuple[int, int]) -> None:
    case = Case(*shape, h=2, d=16)
    inputs, beside = leaves(case), attention(case)
    ours, indices = with_gradients(inputs, beside, topk=2)
    assert float(ours[0]) == 0
    assert not any(x.any() for x in ours[1:])
    assert indices is not None
    assert indices.shape == (1, shape[0], 2)


@pytest.mark.parametrize("options", [SLOW({}), {"topk": 64, "sparse": True}], ids=["dense", "sparse"])
def test_measured_bytes_are_the_planned_ones(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(20, 300, h=2, d=16)
    beside = attention(case, np=1)
    monkeypatch.setattr(loss_slabs, "_SLAB_BYTES", 90_000)
    plan = LossSlab.of(1, 20, 300, 2, 16, 1, 8, options.get("topk"), relu=True)
    assert plan.rows == 16
    with launches_leave_nothing():
        measured = allocator_peak(partial(body, case, needs=True, beside=beside, **options), DEVICE)
    held = sum(x.untyped_storage().nbytes() for x in measured.result if x is not None)
    inputs = 8 * (20 * 2 * 16 + 20 * 2 + 300 * 16)  # made within
    scratch = measured.peak - held - inputs
    assert LEAST_SHARE * plan.backward_bytes <= scratch <= plan.backward_bytes + 4096 < SMALL_CHANGE


@pytest.mark.parametrize("sk", [64, 1000, 4096, 32768])
@pytest.mark.parametrize("topk", [None, 2048])
@pytest.mark.parametrize("b", [1, 8])
def test_a_plan_fits_16_mib_at_the_usual_size(b: int, topk: int | None, sk: int) -> None:
    plan = LossSlab.of(b, 4096, sk, 32, 128, 128, 4, topk, relu=True)
    assert plan.backward_bytes <= 16 * MIB
    assert plan.rows * plan.batches >= 16
    assert plan.rows % 16 == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_tile_of_the_teacher_has_a_specimen(arch: str) -> None:
    names = {x.name for x in specimens(arch)}
    rows = [row for row in TABLE if row.kernel in KERNELS and row.arch in (arch, "*")]
    assert {row.kernel for row in rows} == set(KERNELS)
    for row in rows:
        assert {f"{row.kernel} {dtype} hn={min(row.d, WIDEST)}" for dtype in DTYPES[row.dtype]} <= names
    assert {f"{kernel}_kernel float32" for kernel in ("compare", "mark_seen", "mark_selected", "join")} <= names
