"""Time the kernels on the GPU at hand, as JSON lines: what docs/kernels.md says was measured.

    python docs/measure_kernels.py > docs/results/kernels_h100.jsonl

Every row has the median of seven runs and their range in milliseconds, and the peak of what the call allocates; one
with a rate says how many products it counts. A run is five calls in a row, and what one of them took: a single call
would count the time that the host takes to launch it, which a stream of work hides. The first row is the device's own:
its rate at an 8192³ bfloat16 product.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

import headfold

RUNS, CALLS = 7, 5


def milliseconds(run: Callable[[], Any]) -> list[float]:
    """Time a call on the device, warm."""
    run()
    run()
    taken = []
    for _ in range(RUNS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(CALLS):
            run()
        last.record()
        torch.cuda.synchronize()
        taken.append(first.elapsed_time(last) / CALLS)
    return sorted(taken)


def measured(call: str, shape: str, run: Callable[[], Any], flops: float = 0.0, products: int = 1) -> None:
    """Write one row.   flops: of one product; products: of the algorithm, whatever the kernels run."""
    row: dict[str, Any] = {"call": call, "shape": shape}
    try:
        taken = milliseconds(run)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        median = statistics.median(taken)
        row |= {"ms": round(median, 3), "fastest": round(taken[0], 3), "slowest": round(taken[-1], 3)}
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        if flops:
            row |= {"tflops": round(products * flops / median / 1e9, 1), "products": products}
    except torch.OutOfMemoryError as error:
        row["out_of_memory"] = str(error).split(". ")[0]
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()
    torch.cuda.empty_cache()


def normal(*shape: int) -> Tensor:
    """Return bfloat16 numbers."""
    return torch.randn(shape, device="cuda").bfloat16()


def indexer(b: int, sq: int, sk: int, h: int, d: int) -> list[Tensor]:
    """Return q, weights and k that require gradients."""
    return [x.requires_grad_() for x in (normal(sq, b, h, d), normal(sq, b, h), normal(sk, b, d))]


def trained(call: str, shape: str, forward: Callable[[], Tensor], leaves: list[Tensor], flops: float = 0.0) -> None:
    """Write a row of a forward, and one of its backward."""
    measured(f"{call}, forward", shape, lambda: forward().detach(), flops)
    try:
        out = forward()
    except torch.OutOfMemoryError:
        return
    g = torch.randn_like(out)
    measured(f"{call}, backward", shape, lambda: torch.autograd.grad(out, leaves, g, retain_graph=True), flops, 3)


def long_context() -> None:
    """Measure scores and selection at 32768 positions."""
    q, weights, k = (x.detach() for x in indexer(1, 32768, 32768, 32, 128))
    half, shape = 32768**2 * 32 * 128.0, "b=1 s=32768 h=32 d=128"
    measured("index_scores, causal", shape, lambda: headfold.index_scores(q, weights, k, causal=True), half)
    measured("index_topk 2048, causal", shape, lambda: headfold.index_topk(q, weights, k, 2048, causal=True), half)


def gathered() -> None:
    """Measure attention over absorbed latent keys, and scores at its selection."""
    query, key = (normal(4096, 1, np, 576).requires_grad_() for np in (128, 1))
    indices = torch.rand(1, 4096, 4096, device="cuda").tril_().topk(2048, -1).indices.int()

    def attend() -> Any:
        call: dict[str, Any] = {"softmax_scale": 576**-0.5, "v_dim": 512, "causal": True}
        return headfold.sparse_attention(query, key, None, indices, **call)

    trained("sparse_attention", "s=4096 topk=2048 np=128 np_k=1 hn=576 v_dim=512", attend, [query, key])
    q, weights, k = indexer(1, 4096, 4096, 32, 128)

    def score() -> Tensor:
        return headfold.selected_scores(q, weights, k, indices, causal=True)

    trained("selected_scores", "s=4096 topk=2048 h=32 d=128", score, [q, weights, k])


def main() -> None:
    """Measure everything."""
    a, b = normal(8192, 8192), normal(8192, 8192)
    properties = torch.cuda.get_device_properties(0)
    facts = {"device": properties.name, "torch": torch.__version__, "triton": triton.__version__}
    facts |= {"cuda": torch.version.cuda or torch.version.hip, "memory_bytes": properties.total_memory}
    sys.stdout.write(json.dumps(facts) + "\n")
    measured("matrix product", "8192^3", lambda: a @ b, 2 * 8192**3)

    full = 2 * 8 * 4096**2 * 32 * 128.0
    for impl, causal in (("triton", False), ("triton", True), ("materialized", False)):
        leaves = indexer(8, 4096, 4096, 32, 128)

        def scores(leaves: list[Tensor] = leaves, impl: str = impl, causal: bool = causal) -> Tensor:
            q, weights, k = leaves
            return headfold.index_scores(q, weights, k, causal=causal, impl=impl)

        name = f"index_scores, {impl}{', causal' if causal else ''}"
        trained(name, "b=8 s=4096 h=32 d=128", scores, leaves, full / 2 if causal else full)

    long_context()
    for np, np_k, hn, s in ((16, 16, 64, 2048), (64, 64, 128, 4096), (128, 1, 256, 4096)):
        for impl in ("triton", "materialized") if np_k > 1 else ("triton",):
            leaves, query, key = indexer(1, s, s, 32, 128), normal(s, 1, np, hn), normal(s, 1, np_k, hn)

            def loss(leaves: list[Tensor] = leaves, query: Tensor = query, key: Tensor = key, impl: str = impl) -> Any:
                q, weights, k = leaves
                call = {"softmax_scale": query.shape[3] ** -0.5, "scale": 1 / 64, "causal": True, "impl": impl}
                found = headfold.indexer_loss(q, weights, k, query, key, **call)
                return torch.autograd.grad(found.loss, leaves)

            measured(f"indexer_loss with gradients, {impl}", f"s={s} h=32 d=128 np={np} np_k={np_k} hn={hn}", loss)

    for np, np_k, hn, s, topk in ((16, 1, 64, 2048, 256), (16, 16, 64, 2048, 256), (64, 8, 128, 4096, 1024)):
        leaves = [x.requires_grad_() for x in (normal(s, 1, np, hn), normal(s, 1, np_k, hn), normal(s, 1, np_k, hn))]
        indices = torch.rand(1, s, s, device="cuda").tril_().topk(topk, -1).indices.int()

        def attend(leaves: list[Tensor] = leaves, indices: Tensor = indices) -> Any:
            query, key, value = leaves
            scale = query.shape[3] ** -0.5
            return headfold.sparse_attention(query, key, value, indices, softmax_scale=scale, causal=True)

        trained("sparse_attention", f"s={s} topk={topk} np={np} np_k={np_k} hn={hn}", attend, leaves)
    gathered()


if __name__ == "__main__":
    main()
