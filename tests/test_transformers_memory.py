from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headfold.integrations.transformers import apply
from headfold.lanes.measure import allocator_peak, in_fresh_process, process_peak
from headfold.model_plan import plan_model
from headfold.transformers_plan import from_config, stock_step
from tiny_models import NAMES, build, config_of, one_thread, step, tokens

__all__ = ["one_thread"]


class Largest(TorchDispatchMode):
    """The largest storage, in elements, that any op returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements, self.op = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                elements = x.untyped_storage().nbytes() // x.element_size()
                if elements > self.elements:
                    self.elements, self.op = elements, str(func)
        return result


@contextmanager
def largest() -> Iterator[Largest]:
    with Largest() as mode:
        yield mode


@pytest.mark.parametrize("name", NAMES)
def test_no_op_of_the_model_makes_a_tensor_of_queries_by_keys(name: str) -> None:
    model, s = build(name), 390  # 390 · 390 elements are more than all that grows with the length alone
    ids = tokens(1, s)
    mask = torch.ones_like(ids)
    mask[:, :9] = 0
    with largest() as stock, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert stock.elements >= 16 * s * s, stock.op
    with apply(model):
        for given in (mask, None):
            with largest() as patched:
                step(model, ids, given)
            assert patched.elements < s * s, patched.op
    model.train()
    for stage in ("indexer", "joint"):
        with apply(model, indexer_loss_coeff=1.0, stage=stage), largest() as trained:
            step(model, ids, mask)
        assert trained.elements < s * s, trained.op


def test_the_scorers_peak_falls_eightfold() -> None:
    model = build("deepseek_v32", num_hidden_layers=1, index_n_heads=32, mlp_layer_types=["dense"])
    indexer = model.model.layers[0].self_attn.indexer
    s = 1024
    hidden, latent = torch.randn(1, s, 40), torch.randn(1, s, 28)
    places = torch.arange(s)[None]
    turns = model.model.rotary_emb(hidden, places)
    causal = torch.ones(1, s, s, dtype=torch.bool).tril()

    def run() -> Any:
        with torch.no_grad():
            return indexer(hidden, latent, turns, causal, places)

    stock = allocator_peak(run, torch.device("cpu")).peak
    with apply(model, attention=False, workspace=16 << 20):
        patched = allocator_peak(run, torch.device("cpu")).peak
    assert stock > 2 * 4 * 32 * s * s
    assert patched * 8 < stock, (patched, stock)


def forward_peak(patched: bool, s: int) -> int:
    """Bytes of the process for one forward of one layer with 32 indexer heads, in a fresh process."""
    torch.set_num_threads(1)
    sizes = {"num_hidden_layers": 1, "index_n_heads": 32, "mlp_layer_types": ["dense"]}
    model = build("deepseek_v32", attention="sdpa", **sizes)  # type: ignore[arg-type]
    if patched:
        apply(model)

    def run() -> None:
        with torch.no_grad():
            model(input_ids=tokens(1, s), use_cache=False, logits_to_keep=1)

    with torch.no_grad():
        model(input_ids=tokens(1, 64), use_cache=False)
    return process_peak(run)


@pytest.mark.slow
def test_the_process_s_peak_of_a_forward_falls_as_planned() -> None:
    s = 4096
    stock, patched = (in_fresh_process(forward_peak, patched, s) for patched in (False, True))
    config = config_of("deepseek_v32", num_hidden_layers=1, index_n_heads=32, mlp_layer_types=["dense"]).to_dict()
    bill = plan_model(from_config(config, "config", dtype="float32"), s, stock=stock_step)
    assert 0.8 * (bill.stock - bill.headfold) <= stock - patched <= 1.25 * (bill.stock - bill.headfold)
    assert patched * 8 < stock
