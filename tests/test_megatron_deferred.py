"""Scores that are computed when they are read: what can be asked of them, and what is refused."""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headfold.integrations import megatron
from headfold.integrations.megatron.deferred import Deferred, offered
from headfold.lanes.measure import allocator_peak
from megatron_cases import ALONE, COEFFICIENT, DSA, SCALE, TOPK, Call

SHAPE = 2, 3, 4


class Recipe:
    """Scores of known values, and how often they were made."""

    def __init__(self) -> None:
        self.source, self.made = torch.ones(2), 0

    def __call__(self) -> Tensor:
        self.made += 1
        return torch.arange(24.0).view(SHAPE) * self.source[0]

    def offer(self, *, now: bool = False) -> Tensor:
        return offered(self, SHAPE, self.source, None, now=now)


READS: dict[str, Callable[[Tensor], Any]] = {
    "operator": lambda x: x + 0,
    "function": lambda x: torch.maximum(x, x),
    "list": lambda x: torch.cat([x])[..., :],
    "op of the dispatcher": lambda x: torch.ops.aten.add.Tensor(x, 0),
    "view": lambda x: x[:],
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "copy": copy.deepcopy,
    "values": lambda x: torch.tensor(x.tolist()),
    "keyword": lambda x: torch.add(input=x, other=0),
    "out": lambda x: torch.neg(torch.neg(x), out=x),
}


@pytest.mark.parametrize("read", READS)
def test_whatever_reads_gets_the_scores(read: str) -> None:
    recipe = Recipe()
    scores = recipe.offer()
    assert (scores.shape, scores.dim(), scores.dtype, scores.device.type) == (SHAPE, 3, torch.float32, "cpu")
    assert not scores.requires_grad
    assert recipe.made == 0
    found = READS[read](scores)
    assert type(found) is Tensor
    assert torch.equal(found, torch.arange(24.0).view(SHAPE))
    assert float(scores[1, 2, 3]) == 23
    assert recipe.made == 1


def test_past_python_they_are_read_too() -> None:
    scores = Recipe().offer()
    with torch._C.DisableTorchFunctionSubclass():
        assert type(scores * 1) is Tensor


def test_they_survive_saving() -> None:
    file = io.BytesIO()
    torch.save(Recipe().offer(), file)
    file.seek(0)
    assert torch.equal(torch.load(file), torch.arange(24.0).view(SHAPE))


def test_what_is_written_to_them_stays() -> None:
    scores = Recipe().offer()
    same = scores
    scores[0, 0, 0] = 7
    scores += 1
    assert float(same[0, 0, 0]) == 8


def test_a_source_that_changed_is_refused_and_one_that_changes_later_is_not() -> None:
    recipe = Recipe()
    early, late = recipe.offer(), recipe.offer()
    early.sum()
    recipe.source += 1
    assert float(early[0, 0, 1]) == 1
    with pytest.raises(
        RuntimeError, match=r"must be read before q, weights, k or mask is changed in place.*keep_scores"
    ):
        late.sum()


def test_what_autograd_records_is_computed_at_once() -> None:
    recipe = Recipe()
    recipe.source.requires_grad_()
    scores = recipe.offer()
    assert scores.requires_grad
    with torch.no_grad():
        unrecorded = recipe.offer()
    assert isinstance(unrecorded, Deferred)
    assert not (unrecorded * 1).requires_grad
    assert type(Recipe().offer(now=True)) is Tensor


def test_inference_tensors_are_read_too() -> None:
    with torch.inference_mode():
        scores = Recipe().offer()
    assert float(scores[1, 2, 3]) == 23


def test_unread_scores_take_nothing() -> None:
    recipe = Recipe()
    assert allocator_peak(recipe.offer, torch.device("cpu")).peak == 0


@pytest.mark.parametrize("call", [Call("causal"), Call("positions", True)], ids=str)
def test_the_loss_that_reads_them_is_right(call: Call) -> None:
    pytest.importorskip("megatron.core")
    dsa: Any = importlib.import_module(DSA)
    if not hasattr(dsa, "dsa_masking"):
        pytest.skip("needs megatron-core 0.19")
    x, given = call.inputs(), call.visibility()
    query, key = x["query"], x["key"].expand(-1, -1, 4, -1)
    rest = x["q"], x["weights"], x["k"], query, key, TOPK, SCALE, COEFFICIENT, None, call.sparse, ALONE
    indices, loss = dsa.fwd_fused_indexer_loss_naive(*rest, **given)
    with megatron.apply():
        ours, found = dsa.fwd_fused_indexer_loss_naive(*rest, **given)
    assert torch.equal(ours, indices)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
