"""The score kernels: against float64 truth and its error budget, on a GPU or under Triton's interpreter on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headfold import KeyRange, index_scores, ops
from headfold.contract import score_call
from headfold.lanes.budget import DEFAULTS, spend_all
from headfold.lanes.syncfree import no_data_reads
from on_device import CASES, DEVICE, Case, drawn, there

pytest.importorskip("triton", reason="Triton is not installed")
from headfold.backends import eager, triton
from headfold.backends.triton import launches, products, table
from headfold.backends.triton.launch import launch

NEG_INF = float("-inf")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not triton.INTERPRETED,
    reason="needs a GPU, or TRITON_INTERPRET=1 before Triton is imported",
)
SMALL = [case for case in CASES if case.d >= 16 and case.sk < 300]
WIDTHS = [17, 64, 80, 96, 128, 192, 256]


def leaves(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return case.leaves(dtype)


def overspent(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    spent = spend_all(case.inputs(dtype), case.incoming(), **case.call(), impl="triton")
    return {name: s for name, s in spent.items() if not s.kept}


def both(inputs: list[Tensor], g: Tensor, **call: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return scores and gradients of the kernels and of the materialised path, on the same leaves."""
    results = []
    for impl in ("triton", "materialized"):
        scores = index_scores(*inputs, **call, impl=impl)
        results.append([scores.detach(), *torch.autograd.grad(scores, inputs, g.to(scores.dtype))])
    return results[0], results[1]


def assert_agree(inputs: list[Tensor], g: Tensor, **call: Any) -> None:
    for x, y in zip(*both(inputs, g, **call), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_float32_stays_within_the_error_budget(case: Case) -> None:
    assert overspent(case, torch.float32) == {}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[3], SMALL[7], SMALL[9]], ids=str)
def test_half_precision_stays_within_the_error_budget(case: Case, dtype: torch.dtype) -> None:
    assert overspent(case, dtype) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sk", [2048, 8192])
def test_long_rows_stay_within_the_error_budget(sk: int, dtype: torch.dtype) -> None:
    assert overspent(Case(5, sk, h=4, d=16), dtype) == {}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.d >= 16 and c.sk >= 300], ids=str)
def test_long_shapes_stay_within_the_error_budget(case: Case, dtype: torch.dtype) -> None:
    assert overspent(case, dtype) == {}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_float64_agrees_with_the_materialised_path(case: Case) -> None:
    q, *_ = inputs = leaves(case)
    weighted = inputs if case.weighted else [q, torch.ones_like(q[..., 0]), inputs[-1]]
    assert_agree([x.detach().requires_grad_() for x in weighted], case.incoming(), **case.call())


@pytest.mark.parametrize("d", WIDTHS)
def test_every_width_is_read_whole_and_alone(d: int) -> None:
    case = Case(5, 70, h=3, d=d, visible="causal")
    assert_agree(leaves(case), case.incoming(), causal=True)


@pytest.mark.parametrize("h", [1, 2, 12, 33, 130, 300])
@pytest.mark.parametrize("activation", ["relu", None])
def test_any_number_of_heads(h: int, activation: str | None) -> None:
    case = Case(5, 9, b=2, h=h, d=16)
    bias = drawn(2, 5, 9)
    bias[0, 1, 2:] = NEG_INF
    assert_agree(leaves(case), case.incoming(), bias=bias, activation=activation, scale=0.37)


# All of the Jacobian takes a launch an element: the fast mode looks at it along random directions.
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("visible", ["causal", "ragged", "bias"])
@pytest.mark.parametrize("activation", ["relu", None])
def test_gradcheck_runs_through_the_kernels(visible: str, activation: str | None, fast: bool) -> None:
    case = Case(3, 4, h=2, d=16, visible=visible, activation=activation, scale=0.5)

    def visible_scores(*x: Tensor) -> Tensor:
        scores = index_scores(*x, **case.call(), impl="triton")
        return scores[scores.detach().isfinite()]

    assert torch.autograd.gradcheck(visible_scores, leaves(case), fast_mode=fast)


@pytest.mark.parametrize("activation", ["relu", None])
def test_strided_inputs_and_gradients_are_read_as_they_are(activation: str | None) -> None:
    q = drawn(6, 2, 3, 48, seed=0, dtype=torch.float64)[..., ::3]
    k = drawn(1, 2, 16, seed=1, dtype=torch.float64).expand(9, 2, 16)
    weights = drawn(3, 2, 6, seed=2, dtype=torch.float64).permute(2, 1, 0)
    inputs = [x.detach().requires_grad_() for x in (q, weights, k)]
    for g in (torch.ones((), device=DEVICE).expand(2, 6, 9), torch.randn(9, 6, 2, device=DEVICE).permute(2, 1, 0)):
        assert_agree(inputs, g, activation=activation)


@pytest.mark.parametrize("layout", ["bshd", "thd"])
def test_layouts_are_the_same_call_and_gradients_keep_strides(layout: str) -> None:
    case = Case(9, 11, b=1 if layout == "thd" else 2, h=3, d=16)
    keys = there(KeyRange.sliding(9, 11, 4))
    inputs = leaves(case)
    moved = [x.detach()[:, 0] if layout == "thd" else x.detach().transpose(0, 1) for x in inputs]
    moved = [x.requires_grad_() for x in moved]
    scores = index_scores(*moved, keys=keys, layout=layout, impl="triton")
    assert torch.equal(scores, index_scores(*inputs, keys=keys, impl="triton"))
    grads = torch.autograd.grad(scores[scores.isfinite()].sum(), moved)
    assert all(g.stride() == torch.empty_like(x).stride() for g, x in zip(grads, moved, strict=True))


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("b", [0, 2])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.usefixtures("poisoned")
def test_zero_length_axes_give_empty_scores_and_zero_gradients(
    sizes: tuple[int, int], b: int, activation: str | None
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = leaves(Case(*sizes, b=b, h=2, d=16), dtype)
        scores = index_scores(*inputs, causal=True, activation=activation, impl="triton")
        assert scores.shape == (b, *sizes)
        assert not any(g.any() for g in torch.autograd.grad(scores.sum(), inputs))


@pytest.mark.usefixtures("poisoned")
def test_rows_with_an_empty_range_score_minus_infinity_and_get_no_gradient() -> None:
    inputs = leaves(Case(4, 6, h=2, d=16), torch.float32)
    start, end = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 3, 6, 2], [6, 3, 9, 1]))
    scores = index_scores(*inputs, keys=KeyRange(start, end), impl="triton")
    assert scores[0, 0].isfinite().all()
    assert (scores[0, 1:] == NEG_INF).all()
    dq = torch.autograd.grad(scores, inputs[0], torch.ones_like(scores))[0]
    assert dq[0].any()
    assert not dq[1:].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
def test_nan_and_infinite_keys_show_where_they_are_seen_and_a_bias_hides_them() -> None:
    q, weights, k = (x.detach() for x in leaves(Case(3, 5, h=3, d=16), torch.float32))
    q, weights = q.abs(), weights.abs()
    k[1], k[2] = float("nan"), float("inf")
    scores = index_scores(q, weights, k, impl="triton")
    assert scores[..., 1].isnan().all()
    assert (scores[..., 2] == float("inf")).all()
    assert scores[..., [0, 3, 4]].isfinite().all()
    bias = torch.zeros(1, 3, 5, device=DEVICE)
    bias[:, :, 1:3] = NEG_INF
    scores = index_scores(q, weights, k, bias=bias, impl="triton")
    assert (scores[..., 1:3] == NEG_INF).all()
    assert scores[..., [0, 3, 4]].isfinite().all()


@pytest.mark.parametrize("visible", ["causal", "window", "ragged", "bias"])
def test_a_nan_gradient_at_an_invisible_key_is_ignored(visible: str) -> None:
    case = Case(20, 21, b=2, h=3, d=16, visible=visible)
    inputs = leaves(case, torch.float32)
    scores = index_scores(*inputs, **case.call(), impl="triton")
    hidden = scores.detach() == NEG_INF
    g = case.incoming().float()
    clean, dirty = (
        torch.autograd.grad(scores, inputs, g.masked_fill(hidden, x), retain_graph=True) for x in (0, float("nan"))
    )
    assert hidden.any()
    assert all(map(torch.equal, clean, dirty))


@pytest.mark.parametrize("kind", ["causal", "window"])
def test_tiles_that_no_row_of_a_block_sees_are_not_visited(kind: str) -> None:
    # A visited tile would multiply its zero gradients with NaN.
    sq = sk = 384
    q, weights, k = (x.detach() for x in leaves(Case(sq, sk, h=2, d=16), torch.float32))
    keys = there(KeyRange.sliding(sq, sk, 8) if kind == "window" else KeyRange.causal(sq, sk))
    q, k, weights = q[:256].clone(), k.clone(), weights[:256]
    start, end = (None if x is None else x[:256] for x in (keys.start, keys.end))
    keys = KeyRange(start, end, keys.offset, keys.ratio)
    k[320:] = float("nan")
    inputs = [x.requires_grad_() for x in (q, weights, k)]
    g = torch.ones(1, 256, sk, device=DEVICE)
    dq, dweights, _ = torch.autograd.grad(index_scores(*inputs, keys=keys, impl="triton"), inputs, g)
    assert dq.isfinite().all()
    assert dweights.isfinite().all()
    with torch.no_grad():
        k[320:] = 0
        q[:128] = float("nan")
    (dk,) = torch.autograd.grad(index_scores(*inputs, keys=keys, impl="triton"), [k], g)
    assert dk[192:].isfinite().all()
    assert dk[:64].isnan().any()


@pytest.mark.parametrize("needed", [{0}, {1}, {2}, {0, 2}, {1, 2}])
@pytest.mark.parametrize("activation", ["relu", None])
def test_any_subset_of_gradients_equals_its_part_of_all_three(needed: set[int], activation: str | None) -> None:
    case = Case(9, 21, h=3, d=16, visible="causal")
    everything = leaves(case, torch.float32)
    g = case.incoming().float()
    call: dict[str, Any] = {"causal": True, "activation": activation, "impl": "triton"}
    full = torch.autograd.grad(index_scores(*everything, **call), everything, g)
    some = [x.detach().requires_grad_(i in needed) for i, x in enumerate(everything)]
    index_scores(*some, **call).backward(g)
    for i, x in enumerate(some):
        assert (x.grad is None) == (i not in needed)
        assert x.grad is None or torch.equal(x.grad, full[i])


@pytest.mark.parametrize("case", [SMALL[4], SMALL[-1]], ids=str)
def test_results_are_bitwise_equal_across_runs_and_workspaces(case: Case) -> None:
    def run(workspace: int | None) -> list[Tensor]:
        inputs = leaves(case, torch.bfloat16)
        scores = index_scores(*inputs, **case.call(), workspace=workspace, impl="triton")
        return [scores.detach(), *torch.autograd.grad(scores, inputs, case.incoming().float())]

    assert all(map(torch.equal, run(512 << 20), run(None)))


def test_rows_shared_out_over_several_sums_are_the_same_gradient() -> None:
    case = Case(1100, 33, h=8, d=16, visible="causal")
    q, _, k = (x.transpose(0, 1) for x in leaves(case))
    assert triton.tile_of(q, k, True).parts == 2
    assert_agree(leaves(case), case.incoming(), causal=True)


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("visible", ["causal", "per batch", "bias"])
def test_a_slab_of_rows_is_its_part_of_the_call(visible: str, activation: str | None) -> None:
    case = Case(21, 41, b=2, h=3, d=16, visible=visible, activation=activation, scale=0.3)
    inputs: Any = case.inputs()
    call = score_call("test", *inputs, **{**DEFAULTS, **case.call()})
    g = case.incoming().float()
    arguments: tuple[Any, ...] = (*call.inputs, *call.options)
    whole = triton.index_scores(*arguments)
    dq, dweights, dk = triton.index_scores_backward(*(g, *arguments, (True, True, True)))
    assert call.weights is not None
    assert dk is not None
    parts = torch.full((2, 21, 41), float("nan"), device=DEVICE).transpose(0, 1).contiguous().transpose(0, 1)
    dqs, dws, dks = torch.empty_like(call.q), torch.empty_like(call.weights), torch.zeros_like(call.k)
    for rows in (slice(0, 8), slice(8, 16), slice(16, 21)):
        start, end, bias = (None if x is None else x[:, rows] for x in (call.start, call.end, call.bias))
        offset = None if call.offset is None else call.offset + rows.start
        rest: tuple[Any, ...] = (start, end, bias, offset, call.ratio, call.relu, call.scale)
        some = call.q[:, rows], call.weights[:, rows], call.k
        triton.fill_scores(parts[:, rows], *some, *rest)
        gradients: Any = (g[:, rows], *some, *rest, dqs[:, rows], dws[:, rows], dks)
        triton.add_gradients(*gradients)
    torch.testing.assert_close(parts, whole)
    for x, y in zip((dqs, dws, dks), (dq, dweights, dk), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", None])
def test_offsets_past_two_to_the_31_elements(activation: str | None) -> None:
    # Storage that is never touched takes no memory: rows lie 2**31 elements apart, channels 2**23.
    far = torch.empty(2**32 + 2**29, dtype=torch.float16, device=DEVICE)
    q = far.as_strided((2, 1, 2, 16), (2**31, 1, 16, 1))
    k = far.as_strided((3, 1, 16), (2**31, 1, 2**24), 1024)
    weights = far.as_strided((2, 1, 2), (2**31, 1, 8), 4096)
    make = torch.Generator().manual_seed(0)
    near = [torch.randn(x.shape, generator=make).half().to(DEVICE) for x in (q, weights, k)]
    for x, y in zip((q, weights, k), near, strict=True):
        x.copy_(y)
    g = torch.ones(1, 2, 3, device=DEVICE)
    results = []
    for inputs in ((q, weights, k), near):
        q, weights, k = (x.detach().requires_grad_() for x in inputs)
        scores = index_scores(q, weights, k, activation=activation, impl="triton")
        call = score_call("test", q, weights, k, **{**DEFAULTS, "activation": activation})
        dq, dweights = (torch.empty(x.shape, device=DEVICE) for x in near[:2])
        dk = torch.zeros(1, 3, 16, device=DEVICE)
        outs = dq.transpose(0, 1), dweights.transpose(0, 1), dk
        arguments: Any = (g, *call.inputs, *call.options, *outs)
        triton.add_gradients(*arguments)
        results.append([scores.detach(), dq, dweights, dk])
    assert all(map(torch.equal, *results))


def op_arguments(case: Case, *, grad: bool) -> tuple[Any, ...]:
    given: Any = case.inputs()
    call = score_call("test", *given, **{**DEFAULTS, **case.call()})
    inputs = [None if x is None else x.detach().requires_grad_(grad) for x in call.inputs]
    return (*inputs, *call.options, "triton")


@pytest.mark.parametrize("activation", ["relu", None])
def test_opcheck(activation: str | None) -> None:
    case = Case(4, 5, b=2, h=3, d=16, visible="ragged", activation=activation)
    torch.library.opcheck(ops.index_scores, op_arguments(case, grad=True))
    g = case.incoming().float()
    torch.library.opcheck(ops.index_scores_backward, (g, *op_arguments(case, grad=False), True, True, True))


def test_it_compiles_with_fullgraph_and_gives_the_same_bits() -> None:
    torch._dynamo.reset()
    case = Case(4, 5, b=2, h=3, d=16)
    inputs = leaves(case, torch.float32)
    scores = index_scores(*inputs, causal=True, impl="triton")
    compiled = torch.compile(index_scores, fullgraph=True, backend="aot_eager")(*inputs, causal=True, impl="triton")
    assert torch.equal(compiled, scores)
    g = case.incoming().float()
    expected = torch.autograd.grad(scores, inputs, g)
    assert all(map(torch.equal, torch.autograd.grad(compiled, inputs, g), expected))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter itself reads data")
@pytest.mark.parametrize("case", [SMALL[3], SMALL[7], SMALL[-1]], ids=str)
def test_the_undecorated_bodies_never_read_data(case: Case) -> None:
    *arguments, _ = op_arguments(case, grad=False)
    g = case.incoming().float()
    with no_data_reads():
        triton.index_scores(*arguments)
        triton.index_scores_backward(*(g, *arguments, (True, True, True)))


def test_a_workspace_that_is_too_small_names_the_smallest_that_works() -> None:
    inputs = leaves(Case(20, 30, h=2, d=16), torch.float32)
    q, _, k = (x.transpose(0, 1) for x in inputs)
    least = triton.tile_of(q, k, relu=False).backward_bytes
    assert least == 2 * 20 * 16 * 4
    with pytest.raises(ValueError, match=f"workspace must be at least {least} bytes"):
        index_scores(*inputs, activation=None, workspace=least - 1, impl="triton")
    index_scores(*inputs, activation=None, workspace=least, impl="triton").sum().backward()
    index_scores(*inputs, workspace=0, impl="triton").sum().backward()


def test_at_the_published_width_the_smallest_workspace_is_at_most_16_mib() -> None:
    from headfold.score_tiles import MIB, ScoreTile

    for b, sq, sk in ((1, 4096, 4096), (8, 4096, 4096), (1, 65536, 24000), (1, 512, 16384), (1, 131072, 131072)):
        for relu in (True, False):
            assert ScoreTile(b, sq, sk, 32, 128, 4, relu).backward_bytes <= 16 * MIB


def test_auto_on_a_cpu_stays_eager() -> None:
    q, weights, k = (x.detach().cpu() for x in leaves(Case(5, 6, h=2, d=16)))
    assert torch.equal(index_scores(q, weights, k), index_scores(q, weights, k, impl="eager"))
    assert eager.index_scores is not triton.index_scores


@pytest.mark.parametrize(("offset", "ratio"), [(None, 1), (-8, 1), (61, 1), (300, 4)])
@pytest.mark.parametrize(("h", "dtype"), [(2, torch.float32), (33, torch.float32), (32, torch.bfloat16)])
def test_bounds_told_from_row_numbers_are_those_of_the_rows(
    h: int, dtype: torch.dtype, offset: int | None, ratio: int
) -> None:
    # A tile of keys ends within the rows of a program: at 61 the third row is the first that sees all 64.
    inputs = leaves(Case(21, 130, h=h, d=16, visible="all"), dtype)
    keys = KeyRange(None, None, offset, ratio)
    g = torch.ones(1, 21, 130, device=DEVICE)

    def run() -> list[Tensor]:
        scores = index_scores(*inputs, keys=keys, impl="triton")
        return [scores.detach(), *torch.autograd.grad(scores, inputs, g)]

    arch = table.arch_of(DEVICE)
    rows = [table.tile(kernel, arch, dtype, 16, h)._replace(arch=arch) for kernel in ("scores", "query_gradients")]
    results = []
    for uniform in (True, False):
        scores, gradients = (row._replace(uniform=uniform) for row in rows)
        with table.trying(scores), table.trying(gradients):
            results.append(run())
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
    assert (results[0][0] > NEG_INF).any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("held", [float("inf"), float("nan")])
@pytest.mark.parametrize("sk", [64, 100])
def test_rows_that_see_no_key_get_no_gradient_whatever_the_keys_hold(sk: int, held: float) -> None:
    q, weights, k = (x.detach() for x in leaves(Case(70, sk, h=2, d=16, visible="all"), torch.bfloat16))
    inputs = [x.requires_grad_() for x in (q, weights, torch.full_like(k, held))]
    end = torch.zeros(1, 70, dtype=torch.int32, device=DEVICE)
    for keys in (KeyRange(None, end, None, 1), KeyRange(None, None, -100, 1)):
        scores = index_scores(*inputs, keys=keys, impl="triton")
        gradients = torch.autograd.grad(scores, inputs, torch.ones_like(scores))
        assert scores.isneginf().all()
        assert all(x.count_nonzero() == 0 for x in gradients)


@pytest.mark.parametrize("visible", ["causal", "ragged", "all"])
@pytest.mark.parametrize(("h", "d", "sk"), [(32, 16, 200), (64, 80, 192), (160, 16, 130)])
def test_tiles_that_are_read_whole_score_as_others(
    h: int, d: int, sk: int, visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(5, sk, b=2, h=h, d=d, visible=visible)
    whole: list[bool] = []

    def noted(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        whole.append(bool(constants.get("WHOLE", constants.get("EVEN"))))
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(launches, "launch", noted)
    inputs = [x.requires_grad_() for x in case.inputs(torch.bfloat16) if x is not None]

    def run() -> list[Tensor]:
        scores = index_scores(*inputs, **case.call(), impl="triton")
        return [scores.detach(), *torch.autograd.grad(scores, inputs, torch.ones_like(scores))]

    expected = index_scores(*inputs, **case.call(), impl="eager").detach()
    got = run()
    assert whole[0] is True
    monkeypatch.setattr(launches, "is_near", lambda *_: False)
    whole.clear()
    again = run()
    assert not any(whole)
    for x, y in zip(got, again, strict=True):
        assert torch.equal(x, y)
    largest = float(expected[expected > NEG_INF].abs().max())
    torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-4 * largest)


def test_a_start_beyond_all_keys_hides_them() -> None:
    q, weights, k = (x for x in Case(4, 300, h=64, d=16).inputs(torch.float16) if x is not None)
    start = torch.tensor([0, 0, 0, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    keys = KeyRange(start, torch.full_like(start, 300))
    scores = index_scores(q, weights, k, keys=keys, impl="triton")
    assert torch.equal(scores[0, 3], torch.full_like(scores[0, 3], NEG_INF))
    assert scores[0, :3].isfinite().all()


@pytest.mark.parametrize(("row", "near"), [(2**31 // 64 - 1, True), (2**31 // 64, False)])
def test_what_is_near_fits_32_bits(row: int, near: bool) -> None:
    k = torch.empty(1, dtype=torch.bfloat16, device="meta").as_strided((1, 2, 16), (1, row, 1))
    assert products.is_near(k, 64) is near
    assert not products.is_near(k.float(), 64)


def test_tf32_follows_torchs_switches_new_and_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    switch = torch.backends.cuda.matmul
    before = switch.allow_tf32
    names = ["allow_tf32"]
    if hasattr(switch, "fp32_precision"):
        names.append("fp32_precision")  # the older switch raises when it is read after this one was set
    try:
        for name in names:
            for said, value in (("tf32", True), ("ieee", False)):
                setattr(switch, name, said if name == "fp32_precision" else value)
                assert products.precision(torch.float32) == said
                assert products.precision(torch.bfloat16) == products.precision(torch.float64) == "ieee"
    finally:
        switch.allow_tf32 = before
