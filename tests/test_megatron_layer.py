"""DSAttention built from Megatron's own classes, trained and evaluated as it comes and on headfold."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headfold.integrations import megatron
from headfold.lanes.measure import allocator_peak
from megatron_cases import DSA

pytest.importorskip("megatron.core")
dsa: Any = importlib.import_module(DSA)
if not hasattr(dsa, "dsa_masking"):
    pytest.skip("needs megatron-core 0.19", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")
CPU = torch.device("cpu")


class Linear(nn.Linear):
    """What the layer specs inject, here without a tensor-parallel engine."""

    def __init__(self, width: int, out: int, *, bias: bool, **_: Any) -> None:
        super().__init__(width, out, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


def build_layer(group: Any) -> Any:
    """Build DSAttention from Megatron's classes: four absorbed heads, eight indexer heads."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    config = MLATransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, multi_latent_attention=True, q_lora_rank=32,
        kv_lora_rank=24, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=16, rope_type="rope", add_bias_linear=False,
        experimental_attention_variant="dsa", dsa_indexer_n_heads=8, dsa_indexer_head_dim=16, dsa_indexer_topk=12,
        dsa_indexer_loss_coeff=0.5, dsa_indexer_use_sparse_loss=True, dsa_indexer_rotate_activation=False,
        use_cpu_initialization=True,
    )  # fmt: skip
    parts = dsa.DSAIndexerSubmodules(
        linear_wq_b=Linear, linear_wk=Linear, k_norm=WrappedTorchNorm, linear_weights_proj=Linear
    )
    indexer = ModuleSpec(module=dsa.DSAIndexer, submodules=parts)
    torch.manual_seed(0)
    return dsa.DSAttention(
        config, dsa.DSAttentionSubmodules(indexer=indexer), layer_number=1, attn_mask_type=AttnMaskType.causal,
        attention_type="self", softmax_scale=0.2, pg_collection=ProcessGroupCollection(tp=group, cp=group),
    )  # fmt: skip


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process group of one; Megatron asks CUDA where to put what it logs."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Call:
    """One call of the layer, the same each time: its inputs, and the layer on them."""

    def __init__(self, layer: Any, s: int, b: int) -> None:
        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        generator = torch.Generator().manual_seed(1)
        self.layer = layer
        self.hidden, self.latent = make(s, b, 64), make(s, b, 32)
        self.query = make(s, b, 4, 32).requires_grad_()
        self.key, self.up = make(s, b, 1, 32), make(4, 16, 24)

    def __call__(self, recompute: bool = False) -> Tensor:
        out: Tensor = checkpoint(self.run, self.query, use_reentrant=True) if recompute else self.run(self.query)
        return out

    def run(self, query: Tensor) -> Tensor:
        from megatron.core.transformer.enums import AttnMaskType

        rest: dict[str, Any] = {"attn_mask_type": AttnMaskType.causal, "up_v_weight": self.up}
        out: Tensor = self.layer(query, self.key, None, None, self.hidden, self.latent, **rest)
        return out


def train(layer: Any, steps: int, recompute: bool = False) -> list[float]:
    """Train the layer's indexer and its query by its output and by the indexer loss; return both, step by step."""
    helper = dsa.DSAIndexerLossLoggingHelper
    call = Call(layer, 40, 2)
    optimizer = torch.optim.SGD([*layer.parameters(), call.query], lr=0.5)
    losses = []
    for _ in range(steps):
        helper.tracker.clear()
        loss = call(recompute).square().mean()
        loss.backward()
        losses += [float(loss.detach()), float(helper.tracker["values"][0])]
        optimizer.step()
        optimizer.zero_grad()
    helper.tracker.clear()
    return losses


def test_a_layer_of_megatron_trains_alike(alone: Any) -> None:
    theirs = train(build_layer(alone), 4)
    with megatron.apply():
        ours = train(build_layer(alone), 4)
    assert theirs[1] > theirs[3] > theirs[5] > theirs[7] > 0
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-5, atol=0)


@pytest.mark.parametrize("keep_scores", [True, False])
def test_a_recomputed_layer_trains_as_one_that_is_not(alone: Any, keep_scores: bool) -> None:
    with megatron.apply(keep_scores=keep_scores):
        once, twice = (train(build_layer(alone), 3, recompute=recompute) for recompute in (False, True))
    assert once == twice


def test_no_pass_of_a_recomputed_layer_holds_scores(alone: Any) -> None:
    s = 2048
    call, scores = Call(build_layer(alone), s, 1), 4 * s * s
    with megatron.apply(keep_scores=True):
        assert allocator_peak(lambda: call(recompute=True), CPU).peak > scores
    with megatron.apply():
        first = allocator_peak(lambda: call(recompute=True), CPU)
        second = allocator_peak(first.result.square().mean().backward, CPU)
    assert first.peak < scores
    assert second.peak < scores
    dsa.DSAIndexerLossLoggingHelper.tracker.clear()


@pytest.mark.parametrize("keep_scores", [True, False])
def test_a_layer_of_megatron_evaluates_alike(alone: Any, keep_scores: bool) -> None:
    call = Call(build_layer(alone).eval(), 40, 2)
    with torch.no_grad():
        theirs = call()
        with megatron.apply(keep_scores=keep_scores):
            ours = call()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_indexer_alone_returns_scores_that_can_be_read(alone: Any) -> None:
    call = Call(build_layer(alone), 40, 2)
    with torch.no_grad():
        scores, _ = call.layer.indexer.forward_with_scores(call.hidden, call.latent)
        with megatron.apply():
            ours, _ = call.layer.indexer.forward_with_scores(call.hidden, call.latent)
    torch.testing.assert_close(ours, scores, rtol=1e-5, atol=1e-5)
