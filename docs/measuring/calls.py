"""How to make each call of ours ready, and those that it is compared with: rates, compiled, looped, captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor

import headfold
from headfold.flops import visible_pairs
from headfold.lanes.paths import per_head_loop
from measuring.rows import Absent, Place, Ready, Sizes, normal

# What scores: q, weights, k and whether it is causal -> [b, sq, sk].
Score = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
By = Callable[[Place], Score]


def lengths(x: Sizes) -> tuple[int, int]:
    """Return query rows and keys."""
    return (x["s"], x["s"]) if "s" in x else (x["sq"], x["sk"])


def product_flops(x: Sizes, causal: bool) -> float:
    """FLOPs of one matrix product over the heads, at what rows see."""
    sq, sk = lengths(x)
    return 2.0 * x.get("b", 1) * visible_pairs(sq, sk, sk - sq if causal else None) * x["h"] * x["d"]


def indexer(x: Sizes, dtype: torch.dtype, place: Place, *, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, weights and k."""
    b, (sq, sk), h, d = x.get("b", 1), lengths(x), x["h"], x["d"]
    shapes = (sq, b, h, d), (sq, b, h), (sk, b, d)
    q, weights, k = (normal(place, dtype, *shape).requires_grad_(grad) for shape in shapes)
    return q, weights, k


def picks(x: Sizes, place: Place) -> Tensor:
    """Return int32 indices [1, s, topk] of random keys that a row may see, and of others where it sees fewer."""
    order = torch.rand(1, x["s"], x["s"], device=place.device).tril_()
    return order.topk(x["topk"], -1).indices.int()


def product(x: Sizes, dtype: torch.dtype, place: Place) -> Ready:
    """Return the device's own: a square product of n."""
    a, b = normal(place, dtype, x["n"], x["n"]), normal(place, dtype, x["n"], x["n"])
    return Ready(lambda: a @ b, 2.0 * x["n"] ** 3)


def copy(x: Sizes, _: torch.dtype, place: Place) -> Ready:
    """Return the device's own: a copy within its memory."""
    a, b = (torch.zeros(x["bytes"], dtype=torch.uint8, device=place.device) for _ in range(2))
    return Ready(lambda: a.copy_(b), moved=2 * x["bytes"])


def ours(place: Place) -> Score:
    """Return our scores by the kernels."""
    return lambda q, weights, k, causal: headfold.index_scores(q, weights, k, causal=causal, impl=place.impl)


def materialized(_: Place) -> Score:
    """Return upstream's einsum over all heads."""
    return lambda q, weights, k, causal: headfold.index_scores(q, weights, k, causal=causal, impl="materialized")


def compiled(place: Place) -> Score:
    """Return upstream's einsum as torch.compile has it."""
    torch.compiler.reset()
    functorch.donated_buffer = False  # gradients are taken of one forward again and again
    run: Score = torch.compile(materialized(place), backend=place.compiler, dynamic=False)
    return run


def looped(_: Place) -> Score:
    """Return the loop over heads."""
    return per_head_loop


def forward(x: Sizes, dtype: torch.dtype, place: Place, *, by: By = ours, causal: bool = False) -> Ready:
    """Return scores without gradients."""
    inputs, score = indexer(x, dtype, place), by(place)
    return Ready(torch.no_grad()(lambda: score(*inputs, causal)), product_flops(x, causal))


def backward(x: Sizes, dtype: torch.dtype, place: Place, *, by: By = ours, causal: bool = False) -> Ready:
    """Return the gradients of scores, whose forward ran before; three products by the algorithm's count."""
    leaves, score = indexer(x, dtype, place, grad=True), by(place)
    return _gradients(score(*leaves, causal), leaves)._replace(flops=product_flops(x, causal), products=3)


def _gradients(out: Tensor, leaves: Sequence[Tensor]) -> Ready:
    g = torch.randn_like(out)
    return Ready(lambda: torch.autograd.grad(out, leaves, g, retain_graph=True))


def topk(x: Sizes, dtype: torch.dtype, place: Place, *, in_order: bool = True) -> Ready:
    """Return our selection."""
    q, weights, k = indexer(x, dtype, place)
    run = partial(headfold.index_topk, q, weights, k, x["topk"], causal=True, sorted=in_order, impl=place.impl)
    return Ready(run, product_flops(x, True))


def topk_of_scores(x: Sizes, dtype: torch.dtype, place: Place) -> Ready:
    """Return upstream's selection: torch.topk of the materialised scores."""
    inputs, score, kept = indexer(x, dtype, place), materialized(place), min(x["topk"], lengths(x)[1])
    return Ready(lambda: torch.topk(score(*inputs, True), kept).indices, product_flops(x, True))


def captured(x: Sizes, dtype: torch.dtype, place: Place, *, make: Callable[..., Ready] = topk) -> Ready:
    """Return a call captured once, whose replay is what the device alone takes; its memory is the graph's."""
    if place.device.type != "cuda":
        raise Absent(f"CUDA graphs need a CUDA device, this is a {place.device.type}")
    ready = make(x, dtype, place)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        ready.run()
    torch.cuda.current_stream().wait_stream(aside)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept.append(ready.run())

    def replay() -> Any:
        graph.replay()
        return kept

    return ready._replace(run=replay, allocates=False)


def loss(x: Sizes, dtype: torch.dtype, place: Place, *, impl: str = "") -> Ready:
    """Return the loss and its gradients, in one call.   impl: ours where it is not named."""
    leaves = indexer(x, dtype, place, grad=True)
    query, key = (normal(place, dtype, x["s"], 1, x[heads], x["hn"]) for heads in ("np", "np_k"))
    call: dict[str, Any] = {"softmax_scale": x["hn"] ** -0.5, "scale": 1 / 64, "causal": True}

    def run() -> Any:
        q, weights, k = leaves
        found = headfold.indexer_loss(q, weights, k, query, key, impl=impl or place.impl, **call)
        return torch.autograd.grad(found.loss, leaves)

    return Ready(run)


def _attention(x: Sizes, dtype: torch.dtype, place: Place, impl: str, grad: bool) -> tuple[Callable[[], Any], Any]:
    query = normal(place, dtype, x["s"], 1, x["np"], x["hn"]).requires_grad_(grad)
    key = normal(place, dtype, x["s"], 1, x["np_k"], x["hn"]).requires_grad_(grad)
    value = None if "v_dim" in x else normal(place, dtype, x["s"], 1, x["np_k"], x["hn"]).requires_grad_(grad)
    call: dict[str, Any] = {"softmax_scale": x["hn"] ** -0.5, "v_dim": x.get("v_dim"), "causal": True}
    run = partial(headfold.sparse_attention, query, key, value, picks(x, place), impl=impl or place.impl, **call)
    return run, [one for one in (query, key, value) if one is not None]


def attention(x: Sizes, dtype: torch.dtype, place: Place, *, impl: str = "") -> Ready:
    """Return attention over picks."""
    return Ready(_attention(x, dtype, place, impl, False)[0])


def attention_backward(x: Sizes, dtype: torch.dtype, place: Place, *, impl: str = "") -> Ready:
    """Return the gradients of attention over picks."""
    run, leaves = _attention(x, dtype, place, impl, True)
    return _gradients(run(), leaves)


def _selected(x: Sizes, dtype: torch.dtype, place: Place, impl: str, grad: bool) -> tuple[Callable[[], Any], Any]:
    q, weights, k = leaves = indexer(x, dtype, place, grad=grad)
    call: dict[str, Any] = {"causal": True, "impl": impl or place.impl}
    return partial(headfold.selected_scores, q, weights, k, picks(x, place), **call), leaves


def selected(x: Sizes, dtype: torch.dtype, place: Place, *, impl: str = "") -> Ready:
    """Return scores of picks."""
    return Ready(_selected(x, dtype, place, impl, False)[0])


def selected_backward(x: Sizes, dtype: torch.dtype, place: Place, *, impl: str = "") -> Ready:
    """Return the gradients of scores of picks."""
    run, leaves = _selected(x, dtype, place, impl, True)
    return _gradients(run(), leaves)
