"""Megatron-Core 0.17 and 0.18, where one of them comes first on the path: make test-earlier."""

from __future__ import annotations

import importlib
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from headfold.integrations import megatron
from headfold.integrations.megatron import earlier_loss
from headfold.integrations.megatron.deferred import Deferred
from headfold.integrations.megatron.earlier import EarlierIndexerLoss, filled
from headfold.integrations.megatron.earlier_loss import EarlierLoss
from headfold.lanes.measure import allocator_peak
from megatron_cases import ALONE, DSA, SCALE, TOPK, leaves

MASKS = ("causal", "none", "padding")
CASES = [(mask, sparse) for mask in MASKS for sparse in (False, True)]


def test_rows_that_see_too_few_keys_take_the_smallest_hidden_ones() -> None:
    hidden = torch.tensor([[[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]], dtype=torch.bool)
    bias = torch.zeros(1, 3, 6).masked_fill(hidden, -torch.inf)
    indices = torch.tensor([[[3, 0, -1, -1], [-1, -1, -1, -1], [5, 2, 1, 0]]]).repeat(2, 1, 1)
    expected = torch.tensor([[3, 0, 1, 2], [0, 1, 2, 3], [5, 2, 1, 0]])
    assert torch.equal(filled(indices.clone(), bias), expected.expand(2, -1, -1))
    assert torch.equal(filled(indices.clone(), bias.expand(2, -1, -1)), expected.expand(2, -1, -1))
    assert torch.equal(filled(indices.clone(), None), indices)


def earlier(given: dict[str, Tensor], *names: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of 0.17, a row a block, and its leaves; the key heads are expanded from one."""
    x = leaves(given, names)
    rest = None, None, SCALE, None, 1 << 21, bool(names) and torch.is_grad_enabled()
    return EarlierLoss.apply(*x.values(), *rest), x  # type: ignore[no-untyped-call]


def test_half_precision_gradients_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(earlier_loss, "_HELD", (1 << 21) // (4 * 2 * 26))  # a row a block
    names = "q", "weights", "k"
    given = {name: x.bfloat16() for name, x in inputs().items()}
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        loss, x = earlier({name: tensor.to(dtype) for name, tensor in given.items()}, *names)
        loss.backward()
        found.append([loss.detach(), *(x[name].grad for name in names)])
    for half, single in zip(*found, strict=True):
        assert isinstance(single, Tensor)
        assert torch.equal(half, single.to(half.dtype))


def test_nothing_but_the_loss_is_made_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs()
    with_gradient, _ = earlier(given, "q", "weights", "k")
    with_gradient.backward()
    monkeypatch.setattr(earlier_loss, "_through_softmax", lambda *_: pytest.fail("formed gradients"))
    with torch.no_grad():
        assert torch.equal(earlier(given, "q", "weights", "k")[0], with_gradient)
        call: Any = *leaves(given, ("q", "weights", "k")).values(), SCALE, TOPK, 1.0, None, False, ALONE
        torch.testing.assert_close(EarlierIndexerLoss(1 << 21).apply(*call)[1], with_gradient)
    assert torch.equal(earlier(given)[0], with_gradient)


def test_each_gradient_is_made_by_itself() -> None:
    loss, every = earlier(inputs(), "q", "weights", "k")
    loss.backward()
    for name in ("q", "weights", "k"):
        loss, x = earlier(inputs(), name)
        loss.backward()
        assert [n for n, tensor in x.items() if tensor.grad is not None] == [name]
        assert torch.equal(x[name].grad, every[name].grad)  # type: ignore[arg-type]


@pytest.fixture
def dsa() -> Any:
    module: Any = pytest.importorskip(DSA)
    if hasattr(module, "dsa_masking"):
        pytest.skip("needs megatron-core 0.17 or 0.18 first on the path")
    return module


def mask_of(name: str, s: int, b: int) -> Tensor | None:
    """The masks of this generation: causal [s, s], none, or padding [b, s, s] that a causal row can outrun."""
    if name == "causal":
        return torch.triu(torch.full((s, s), -torch.inf), diagonal=1)
    if name == "none":
        return None
    mask = torch.triu(torch.full((b, s, s), -torch.inf), diagonal=1)
    mask[1, :, :3] = -torch.inf
    mask[1, :3] = 0
    return mask


def inputs(s: int = 26, b: int = 2, np: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "q": (s, b, 16, 12),
        "weights": (s, b, 16),
        "k": (s, b, 12),
        "query": (s, b, np, 20),
        "key": (s, b, np, 20),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def run(module: Any, mask: Tensor | None, sparse: bool, given: dict[str, Tensor], group: Any = ALONE) -> list[Tensor]:
    x = leaves(given, ("q", "weights", "k"))
    indices, loss = module.FusedDSAIndexerLoss.apply(*x.values(), SCALE, TOPK, 0.7, mask, sparse, group)
    (3 * loss).backward()
    return [indices, loss.detach(), *(x[name].grad for name in ("q", "weights", "k"))]


@pytest.mark.parametrize(("mask", "sparse"), CASES)
def test_losses_and_gradients_agree(dsa: Any, mask: str, sparse: bool) -> None:
    given, hides = inputs(), mask_of(mask, 26, 2)
    upstream = run(dsa, hides, sparse, given)
    with megatron.apply(workspace=1 << 21) as patch:
        ours = run(dsa, hides, sparse, given)
        # Upstream's loss over our selection: keys that padding hides tie, and causal rows may see some of them.
        theirs = run(
            SimpleNamespace(FusedDSAIndexerLoss=patch.originals[f"{DSA}.FusedDSAIndexerLoss"]), hides, sparse, given
        )
    visible = torch.ones(2, 26, 26) if hides is None else (hides == 0).expand(2, 26, 26)
    same = [x[0].where(visible.gather(-1, x[0]) > 0, -1).sort(-1)[0] for x in (upstream, ours)]
    assert torch.equal(*same)
    assert torch.equal(ours[0], theirs[0])
    if mask != "padding":
        torch.testing.assert_close(theirs[1:], upstream[1:], rtol=2e-4, atol=2e-6, equal_nan=True)
    assert (ours[0] >= 0).all()
    assert ours[0].dtype == torch.int64
    if mask == "none" and sparse:  # some rows select future keys alone: upstream's loss is NaN, and so is ours
        assert theirs[1].isnan()
    for got, other in zip(ours[1:], theirs[1:], strict=True):
        assert got.dtype == other.dtype
        torch.testing.assert_close(got, other, rtol=2e-4, atol=2e-6, equal_nan=True)


def test_a_loss_in_blocks_of_rows_is_the_same(dsa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given, hides = inputs(), mask_of("causal", 26, 2)
    with megatron.apply(workspace=1 << 21):
        whole = run(dsa, hides, True, given)
        monkeypatch.setattr(earlier_loss, "_HELD", (1 << 21) // (4 * 2 * 26 * 5))  # five rows a block
        blocks = run(dsa, hides, True, given)
    for some, all_rows in zip(blocks, whole, strict=True):
        torch.testing.assert_close(some, all_rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", MASKS)
def test_scores_agree(dsa: Any, mask: str) -> None:
    given, hides = inputs(), mask_of(mask, 26, 2)
    rest = given["q"], given["k"], given["weights"], TOPK, hides
    scores, _ = dsa.fused_qk_topk_naive(*rest)
    with megatron.apply():
        ours, indices = dsa.fused_qk_topk_naive(*rest)
        plain = dsa._compute_index_scores(given["q"], given["weights"], given["k"])
    with megatron.apply(keep_scores=True):
        kept, same = dsa.fused_qk_topk_naive(*rest)
    torch.testing.assert_close(ours, scores, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(plain if hides is None else plain + hides, ours, rtol=0, atol=0)
    assert torch.equal(indices, same)
    assert isinstance(ours, Deferred)
    assert torch.equal(ours, kept)
    assert type(kept) is Tensor


def test_attention_agrees_and_a_row_without_a_key_is_nan(dsa: Any) -> None:
    given = inputs()
    value = torch.randn(26, 2, 4, 9)
    with megatron.apply():
        indices = run(dsa, mask_of("causal", 26, 2), True, given)[0]
    for chosen in (indices, indices.flip(1)):
        found = []
        for patched in (False, True):
            x = [tensor.clone().requires_grad_() for tensor in (given["query"], given["key"], value)]
            with megatron.apply() as patch:
                if not patched:
                    patch.undo()
                out = dsa.unfused_dsa_fn(*x, chosen, SCALE)
            if chosen is indices:
                out.square().sum().backward()
                found.append([out.detach(), *(tensor.grad for tensor in x)])
            else:
                found.append([out.detach()])
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert found[0][0].isnan().any()


def test_peaks_fall(dsa: Any) -> None:
    s, generator = 1024, torch.Generator().manual_seed(0)
    shapes = (s, 1, 32, 64), (s, 1, 32), (s, 1, 64)
    x = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    query, key = (torch.randn(s, 1, 8, 64, generator=generator) for _ in range(2))
    mask = mask_of("causal", s, 1)

    def step() -> None:
        dsa.FusedDSAIndexerLoss.apply(*x, query, key, 0.125, 256, 1.0, mask, True, ALONE)[1].backward()

    def score() -> Tensor:
        scores: Tensor = dsa._compute_index_scores(*(tensor.detach() for tensor in x))
        return scores

    cpu, output = torch.device("cpu"), 4 * s * s
    before = [allocator_peak(call, cpu).peak for call in (step, score)]
    with megatron.apply():
        after = [allocator_peak(call, cpu).peak for call in (step, score)]
    assert before[0] >= 4 * after[0], (before, after)
    assert before[1] - output >= 8 * (after[1] - output), (before, after)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module, given = importlib.import_module(DSA), inputs()
    for name in ("query", "key"):
        given[name] = given[name][:, :, 2 * rank : 2 * rank + 2]
    with megatron.apply():
        found = run(module, mask_of("causal", 26, 2), True, given, SimpleNamespace(tp=dist.group.WORLD))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_tensor_parallel_processes_agree_with_one(dsa: Any, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(200)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    one = run(dsa, mask_of("causal", 26, 2), True, inputs())
    assert all(map(torch.equal, first, second))
    for got, alone in zip(first[1:], one[1:], strict=True):
        torch.testing.assert_close(got, alone, rtol=2e-4, atol=2e-6)


def test_undo_restores_the_very_objects(dsa: Any) -> None:
    before = dict(vars(dsa))
    patch = megatron.apply()
    assert len(patch.status().replaced) == 4
    patch.undo()
    assert all(getattr(dsa, name) is value for name, value in before.items())
