"""The gradient lane of what trains: the indexer loss against full tensors, and sparse attention's error budgets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from headfold.geometry import ATTENDING, IndexerGeometry
from headfold.keyrange import KeyRange
from headfold.lanes.budget import spend_attention
from headfold.lanes.parity import checked_width
from headfold.lanes.paths import backend_of, spread_indices
from headfold.lanes.problem import Problem, normal
from headfold.lanes.record import FAIL, PASS, Column, Lane, Row, Track, no_track
from headfold.lanes.training_paths import attention_tensors
from headfold.loss import indexer_loss

COLUMNS = (
    Column("check", "check"),
    Column("dtype", "dtype"),
    Column("result", "result"),
    Column("share", "share of budget used", "ratio"),
    Column("error", "relative error", "ratio"),
    Column("verdict", "verdict"),
    Column("note", "note"),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of the largest true value of each result; half-precision gradients are cast once, and so are off by a rounding.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 5e-6,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}
ROWS, KEYS, TOPK = 70, 61, 9
ATTENTION_ROWS, ATTENTION_KEYS, ATTENTION_TOPK = 48, 160, 40
RESULTS = ("loss", "dq", "dweights", "dk")


def training_parity(
    problem: Problem, device: torch.device, *, impl: str = "auto", track: Track[Any] = no_track
) -> Lane:
    """Check the loss in every combination of its options, and attention by gathering and by masking."""
    lane = Lane("training parity", "Do the loss and the attention keep the contract of full tensors?", COLUMNS)
    g = problem.geometry
    checks = {**_loss_gradchecks(device, impl), **_attention_gradchecks(device, impl)}
    for name, (call, inputs) in track(list(checks.items()), "gradcheck of what trains, float64"):
        lane.rows.append(_gradcheck(name, call, inputs))
    for dtype in track(DTYPES, "training, losses and budgets"):
        lane.rows += _losses(problem, device, dtype, impl)
        if impl != "materialized":
            lane.rows += _attention(g, device, dtype, impl)
    lane.notes = [
        f"Losses: loss, dq, dweights and dk against float64 full tensors under autograd, by at most {1e-11:g} of the "
        f"largest true value in float64, {5e-6:g} in float32, one rounding in half precision; {ROWS} rows, {KEYS} "
        f"keys, topk {TOPK}. Each row is the worst over ReLU or none, all rows or some, mean or sum, in "
        "every pair; half precision is causal.",
        "Attention: budget as of scores, the materialised path's own error being the largest over eight orders of its "
        f"sums; {ATTENTION_ROWS} rows, {ATTENTION_KEYS} keys, topk {ATTENTION_TOPK}, causal.",
    ]
    return lane


def _gradcheck(name: str, call: Callable[..., Any], inputs: list[Tensor]) -> Row:
    row: Row = {"check": f"gradcheck, {name}", "dtype": "float64"}
    try:
        gradcheck(call, inputs)
    except GradcheckError as error:
        return {**row, "verdict": FAIL, "note": str(error).splitlines()[0]}
    return {**row, "verdict": PASS}


def _made(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [normal(shape, device, "float64", seed).requires_grad_() for seed, shape in enumerate(shapes)]


def _loss_gradchecks(device: torch.device, impl: str) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    d, hn = checked_width(impl), 3 if impl != "triton" else checked_width(impl)
    inputs = _made(device, (5, 2, 3, d), (5, 2, 3), (7, 2, d))
    query, key = (x.detach() for x in _made(device, (5, 2, 4, hn), (7, 2, 2, hn)))

    def checked(**call: Any) -> Callable[..., Any]:
        def loss(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
            return indexer_loss(q, weights, k, query, key, softmax_scale=0.6, impl=impl, **call).loss

        return loss

    return {
        "loss": (checked(), inputs),
        "causal loss": (checked(causal=True), inputs),
        "loss over a selection": (checked(causal=True, topk=3, sparse=True), inputs),
        "summed loss, no activation": (checked(activation=None, reduction="sum"), inputs),
    }


def _attention_gradchecks(device: torch.device, impl: str) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    from headfold.attention import sparse_attention

    found: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {}
    for heads, key_heads in ((4, 1), (4, 4)):
        g = IndexerGeometry(2, 5, 7, 1, 1, 3, np=heads, np_k=key_heads, hn=3, v_dim=2)
        shapes = (5, 2, heads, 3), (7, 2, key_heads, 3), (7, 2, key_heads, 2), (heads,)
        indices = spread_indices(g, device)

        def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, indices: Tensor = indices) -> Any:
            return sparse_attention(q, k, v, indices, softmax_scale=0.6, sink=sink, causal=True, impl=impl)

        found[f"attention, np={heads}, np_k={key_heads}, sink"] = attend, _made(device, *shapes)
    return found


def _losses(problem: Problem, device: torch.device, dtype: torch.dtype, impl: str) -> list[Row]:
    g = problem.geometry
    q, weights, k = problem.tensors(device, dtype)
    query, key, _ = attention_tensors(g, device)
    inputs = [q[-ROWS:], weights[-ROWS:], k[-KEYS:]]
    beside = [x.to(dtype) for x in (query[-ROWS:], key[-KEYS:])]
    (rows, b), sk = inputs[0].shape[:2], inputs[2].shape[0]
    bias = normal((1, rows, sk), device, "float32", 9)
    counted = normal((b, rows), device, "float32", 10) < 0.5
    ranges: dict[str, dict[str, Any]] = {
        "every key": {},
        "causal": {"causal": True},
        "sliding window": {"keys": KeyRange.sliding(rows, sk, 20, device=device)},
        "bias": {"bias": bias.masked_fill(bias > 1, float("-inf")).to(dtype)},
    }
    supports: dict[str, dict[str, Any]] = {"dense": {}, "sparse": {"topk": TOPK, "sparse": True}}
    if dtype.itemsize < 4:
        ranges = {"causal": ranges["causal"]}
    # Half of the eight combinations, in which every pair of options stands in every way.
    options = ("relu", None, "mean"), ("relu", counted, "sum"), (None, None, "sum"), (None, counted, "mean")
    found = []
    for (range_, visible), (support, selecting) in itertools.product(ranges.items(), supports.items()):
        worst = -1.0, RESULTS[0], 0.0
        for activation, mask, reduction in options:
            call = {**visible, **selecting, "activation": activation, "row_mask": mask, "reduction": reduction}
            call |= {"scale": (g.heads * g.dim) ** -0.5, "softmax_scale": g.hn**-0.5}
            for name, share, error in _loss_errors(inputs, beside, call, impl):
                worst = max(worst, (share, name, error))
        share, name, error = worst
        row: Row = {"check": f"loss, {range_}, {support}", "dtype": str(dtype).removeprefix("torch."), "result": name}
        found.append({**row, "share": share, "error": error, "verdict": PASS if share <= 1 else FAIL})
    return found


def _loss_errors(
    inputs: list[Tensor], beside: list[Tensor], call: dict[str, Any], impl: str
) -> list[tuple[str, float, float]]:
    ours = _with_gradients(inputs, beside, **call, impl=impl)
    wide = [[x.double() for x in tensors] for tensors in (inputs, beside)]
    if call.get("bias") is not None:
        call = {**call, "bias": call["bias"].double()}
    truth = _with_gradients(*wide, **call, impl="materialized")
    found = []
    for name, x, y in zip(RESULTS, ours, truth, strict=True):
        largest = float(y.abs().max())
        error = float((x.double() - y).abs().max()) / largest if largest else float(x.double().abs().max())
        # NaN is no number: it has to break the budget.
        share = error / TOLERANCES[x.dtype] if error == error else float("inf")
        found.append((name, share, error))
    return found


def _with_gradients(inputs: list[Tensor], beside: list[Tensor], **call: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    q, weights, k = leaves
    query, key = beside
    loss = indexer_loss(q, weights, k, query, key, **call).loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _attention(g: IndexerGeometry, device: torch.device, dtype: torch.dtype, impl: str) -> list[Row]:
    topk, name = min(ATTENTION_TOPK, g.sk), str(dtype).removeprefix("torch.")
    small = g.with_(b=1, sq=min(ATTENTION_ROWS, g.sq), sk=min(ATTENTION_KEYS, g.sk), topk=topk)
    inputs = [x.to(dtype).transpose(0, 1) for x in attention_tensors(small, device)]
    sink = normal((g.np,), device, "float32", 11).to(dtype)
    incoming = normal((1, small.sq, g.np, g.v_dim), device, g.dtype, 12)
    call: dict[str, Any] = {"softmax_scale": g.hn**-0.5, "causal": True}
    found = []
    backend = backend_of(ATTENDING[1], small.with_(dtype=name), device, impl)
    walks = {"gathered": True, "masked": False} if backend == "eager" else {"kernels": True}
    for walk, gathered in walks.items():
        options = {"gathered": gathered, "backend": backend, **call}
        spent = spend_attention([*inputs, sink], incoming, spread_indices(small, device), **options)
        for result, part in spent.items():
            row: Row = {"check": f"attention, {walk}", "dtype": name, "result": result}
            verdict = PASS if part.kept else FAIL
            found.append({**row, "share": part.share, "error": part.error, "verdict": verdict})
    return found
