"""Measure what Megatron-Core's DSA functions take as they come and on headfold, for the table of docs/megatron.md.

    python docs/measure_megatron.py     # measures, writes docs/results/megatron.json; needs megatron-core 0.19
    python docs/regenerate.py           # writes it into the page

Peaks are torch's allocator events on a CPU, beyond what is alive before the call and, for the scorer, its output.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from headfold.integrations import megatron
from headfold.lanes.measure import allocator_peak, environment

CPU = torch.device("cpu")
OUT = Path(__file__).parent / "results" / "megatron.json"
SHAPE = {"b": 1, "s": 1024, "h": 32, "d": 64, "np": 8, "hn": 64, "v": 48, "topk": 256}


def calls(dsa: Any) -> dict[str, tuple[Callable[[], object], int]]:
    """Return each call as Megatron's layers make it, and the bytes of its output where those do not count."""
    b, s, h, d, np, hn, v, topk = SHAPE.values()
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    q, weights, k = make(s, b, h, d), make(s, b, h), make(s, b, d)
    query, key, value = make(s, b, np, hn), make(s, b, np, hn), make(s, b, np, v)
    latent = make(s, b, 1, hn)
    bounds = torch.zeros(s, dtype=torch.int64), torch.arange(1, s + 1)
    group = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    seen = {"varlen_starts": bounds[0], "varlen_ends": bounds[1]}
    with torch.no_grad():
        indices = dsa.fused_qk_topk_naive(q, k, weights, topk, **seen)[1]

    def loss() -> None:
        rest = query.detach(), key.detach(), hn**-0.5, topk, 1.0, None, True, group, *bounds
        dsa.FusedDSAIndexerLoss.apply(q, weights, k, *rest)[1].backward()
        q.grad = weights.grad = k.grad = None

    def score() -> Tensor:
        with torch.no_grad():
            scores: Tensor = dsa._compute_index_scores(q, weights, k)
        return scores

    def select() -> Tensor:
        with torch.no_grad():
            found: Tensor = dsa.fused_qk_topk_naive(q, k, weights, topk, **seen)[1]
        return found

    def attend() -> None:
        dsa.unfused_dsa_fn(query, key, value, indices, hn**-0.5, **seen).sum().backward()
        query.grad = key.grad = value.grad = None

    def absorb() -> None:
        dsa._unfused_absorbed_dsa_fn(query, latent, indices, hn**-0.5, v, **seen).sum().backward()
        query.grad = latent.grad = None

    return {
        "`FusedDSAIndexerLoss`, forward and backward": (loss, 0),
        "`_compute_index_scores`, beyond its output": (score, 4 * b * s * s),
        "`fused_qk_topk_naive`, scores dropped": (select, 0),
        "`_unfused_absorbed_dsa_fn`, forward and backward": (absorb, 0),
        "`unfused_dsa_fn`, forward and backward": (attend, 0),
    }


def main() -> None:
    """Measure both ways and write what was found."""
    torch.set_num_threads(1)
    dsa = importlib.import_module("megatron.core.transformer.experimental_attention_variant.dsa")
    ways: dict[str, Callable[[], Any]] = {"stock": nullcontext, "headfold": megatron.apply}
    rows: list[dict[str, Any]] = [{"call": name} for name in calls(dsa)]
    for way, patch in ways.items():
        with patch():
            for row, (call, output) in zip(rows, calls(dsa).values(), strict=True):
                row[way] = allocator_peak(call, CPU).peak - output
    version = importlib.import_module("megatron.core").__version__
    found = {"environment": environment(CPU) | {"megatron-core": version}, "shape": SHAPE, "rows": rows}
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
