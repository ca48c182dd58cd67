from __future__ import annotations

import importlib
import multiprocessing
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headfold.integrations import megatron
from headfold.integrations.megatron.deferred import Deferred
from headfold.integrations.patching import PatchError
from headfold.lanes.budget import spend
from headfold.lanes.measure import allocator_peak
from megatron_cases import ALONE, ATTENTION, DSA, LOSSES, SCALE, Call, leaves, run_loss, shuffled_loss, true_loss

pytest.importorskip("megatron.core")
dsa: Any = importlib.import_module(DSA)
if not hasattr(dsa, "dsa_masking"):
    pytest.skip("needs megatron-core 0.19", allow_module_level=True)

CPU = torch.device("cpu")
TARGETS = (
    "_compute_index_scores",
    "fused_qk_topk_naive",
    "FusedDSAIndexerLoss",
    "unfused_dsa_fn",
    "_unfused_absorbed_dsa_fn",
)


def within(ours: Tensor, truth: Tensor, bases: list[Tensor], axes: int = 1) -> None:
    spent = spend(ours, truth, bases, axes)
    assert spent.kept, spent


@pytest.mark.parametrize(
    "call",
    [
        *LOSSES,
        Call("causal", True, np_k=4),
        Call("causal", True, dtype=torch.bfloat16),
        Call("mask", b=2, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_losses_selections_and_gradients_agree(call: Call) -> None:
    inputs = call.inputs()
    theirs, *upstream = run_loss(dsa, call, inputs)
    # On some CPUs dk of these 52 keys spends a little more than the budget of eight orders; of no other kind does it.
    others = 23 if call.kind == "positions" else 7
    orders = [upstream, *(shuffled_loss(dsa, call, inputs, seed) for seed in range(others))]
    with megatron.apply():
        indices, loss, *gradients = run_loss(dsa, call, inputs)
    true_indices, truth, *true_gradients = true_loss(call, inputs)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, theirs)
    assert torch.equal(indices, true_indices)
    assert loss.dtype == torch.float32
    within(loss.view(1), truth.view(1), [x[0].view(1) for x in orders])
    for i, (axes, got, true) in enumerate(zip((2, 1, 1), gradients, true_gradients, strict=True)):
        assert got.dtype == call.dtype
        within(got, true, [x[1 + i] for x in orders], axes)


@pytest.mark.parametrize(
    "call",
    [Call(kind, relu=relu) for kind in ("causal", "packed", "positions", "mask", "none") for relu in (True, False)],
    ids=str,
)
def test_scores_and_selections_agree(call: Call) -> None:
    inputs = call.inputs()
    rest = (inputs["q"], inputs["k"], inputs["weights"], 7)
    given = {**call.visibility(), "use_relu": call.relu}
    scores, indices = dsa.fused_qk_topk_naive(*rest, **given)
    with megatron.apply():
        ours, ours_indices = dsa.fused_qk_topk_naive(*rest, **given)
        plain = dsa._compute_index_scores(inputs["q"], inputs["weights"], inputs["k"], call.relu)
    with megatron.apply(keep_scores=True):
        kept, same = dsa.fused_qk_topk_naive(*rest, **given)
    for x in (ours, plain, kept):
        assert (x.shape, x.dtype) == (scores.shape, torch.float32)
    hidden = ~call.seen(selecting=True)
    assert torch.equal(ours == -torch.inf, hidden)
    torch.testing.assert_close(ours, scores, rtol=1e-5, atol=2e-6)
    # Bit for bit, but where keys arrive in another order: a CPU's product may then add up a key's channels otherwise.
    near = {"rtol": 1e-5, "atol": 2e-6} if call.kind == "positions" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(plain.masked_fill(hidden, -torch.inf), ours, **near)
    assert isinstance(ours, Deferred)
    assert type(kept) is Tensor
    assert torch.equal(ours, kept)
    assert torch.equal(ours_indices, indices)
    assert torch.equal(same, indices)


def test_wider_selections_than_keys_and_none_at_all_agree() -> None:
    call = Call("causal")
    inputs = call.inputs()
    for topk in (0, 1000):
        rest = (inputs["q"], inputs["k"], inputs["weights"], topk)
        indices = dsa.fused_qk_topk_naive(*rest, **call.visibility())[1]
        with megatron.apply():
            assert torch.equal(dsa.fused_qk_topk_naive(*rest, **call.visibility())[1], indices)


def test_a_finite_bias_moves_selections_as_upstream_and_is_refused_by_the_loss() -> None:
    call = Call("mask")
    inputs = call.inputs()
    mask = call.visibility()["mask"]
    mask = torch.where(mask == 0, torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)), mask)
    rest = (inputs["q"], inputs["k"], inputs["weights"], 7, mask)
    scores, indices = dsa.fused_qk_topk_naive(*rest)
    picked = torch.full((2, 26, 7), 3)
    with megatron.apply():
        ours, ours_indices = dsa.fused_qk_topk_naive(*rest)
        torch.testing.assert_close(ours, scores, rtol=1e-5, atol=2e-6)
        assert torch.equal(ours_indices, indices)
        query, key = inputs["query"], inputs["key"].expand(-1, -1, 4, -1)
        sentence = r"mask must hold 0 and -inf alone, got another value\. {}: undo the patch for it\."
        twice = (
            "Megatron-Core adds it twice in the forward pass of its loss and once in backward, which headfold does not"
        )
        with pytest.raises(ValueError, match=f"FusedDSAIndexerLoss: {sentence.format(twice)}"):
            dsa.FusedDSAIndexerLoss.apply(
                inputs["q"], inputs["weights"], inputs["k"], query, key, SCALE, 7, 1.0, mask, False, ALONE
            )
        without = "headfold attends to what was selected without a bias"
        with pytest.raises(ValueError, match=f"unfused_dsa_fn: {sentence.format(without)}"):
            dsa.unfused_dsa_fn(query, key, key, picked, SCALE, mask=mask)
        with pytest.raises(ValueError, match=f"_unfused_absorbed_dsa_fn: {sentence.format(without)}"):
            dsa._unfused_absorbed_dsa_fn(query, inputs["key"], picked, SCALE, 8, mask=mask)


def test_ties_go_to_the_smallest_key() -> None:
    q, weights, k = torch.ones(3, 1, 16, 4), torch.ones(3, 1, 16), torch.zeros(9, 1, 4)
    k[4] = 1
    bounds = {"varlen_starts": torch.zeros(3, dtype=torch.int64), "varlen_ends": torch.tensor([9, 6, 4])}
    upstream = dsa.fused_qk_topk_naive(q, k, weights, 4, **bounds)[1]
    with megatron.apply():
        indices = dsa.fused_qk_topk_naive(q, k, weights, 4, **bounds)[1]
        by_position = dsa.fused_qk_topk_naive(q, k, weights, 4, **bounds, key_positions=torch.arange(9).flip(0))[1]
    assert indices.tolist() == [[[4, 0, 1, 2], [4, 0, 1, 2], [0, 1, 2, 3]]]
    # Upstream keeps the one key that does not tie, and of those that do as many, whichever they are.
    for row, ours in zip(upstream[0].tolist(), indices[0].tolist(), strict=True):
        assert len(set(row)) == 4
        assert (4 in row) == (4 in ours)
    assert by_position.tolist() == [[[4, 8, 7, 6], [4, 8, 7, 6], [8, 7, 6, 5]]]


@pytest.mark.parametrize("call", ATTENTION, ids=str)
@pytest.mark.parametrize("absorbed", [False, True], ids=["heads", "absorbed"])
def test_attention_agrees(call: Call, absorbed: bool) -> None:
    inputs = call.inputs()
    rows = torch.rand(2, call.sq, call.sk, generator=torch.Generator().manual_seed(8))
    indices = rows.argsort(-1)[..., :7]  # keys that rows may see, and others
    indices[:, ::4, 5:] = -1
    given = {"query": inputs["query"], "key": inputs["key"]}
    if not absorbed:
        generator = torch.Generator().manual_seed(2)
        given["key"] = torch.randn(call.sk, 2, 4, 20, generator=generator).to(call.dtype)
        given["value"] = torch.randn(call.sk, 2, 4, 9, generator=generator).to(call.dtype)

    def run(module: Any, given: dict[str, Tensor], channels: Tensor | None = None) -> list[Tensor]:
        x = leaves(given, ("query", "key", "value"))
        if absorbed:
            out = module._unfused_absorbed_dsa_fn(x["query"], x["key"], indices, SCALE, 12, **call.visibility())
        else:
            out = module.unfused_dsa_fn(x["query"], x["key"], x["value"], indices, SCALE, **call.visibility())
        incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        out.backward(incoming if channels is None else incoming[..., channels])
        return [out.detach(), *(tensor.grad for tensor in x.values())]

    upstream = run(dsa, given)
    with megatron.apply():
        ours = run(dsa, given)
    truth = true_attention(call, given, indices, absorbed)
    orders = [shuffled(run, given, seed, absorbed) for seed in range(6)]
    for i, (got, theirs, true) in enumerate(zip(ours, upstream, truth, strict=True)):
        assert (got.shape, got.dtype) == (theirs.shape, theirs.dtype)
        within(got, true, [theirs, *(order[i] for order in orders)], 2)


def shuffled(run: Any, given: dict[str, Tensor], seed: int, absorbed: bool) -> list[Tensor]:
    """What upstream makes of channels in another order, put back in theirs; the first 12 may be values."""
    generator = torch.Generator().manual_seed(seed)
    first, rest = torch.randperm(12, generator=generator), torch.randperm(8, generator=generator) + 12
    order = torch.cat([first, rest])
    found: list[Tensor] = run(
        dsa, {**given, **{name: given[name][..., order] for name in ("query", "key")}}, first if absorbed else None
    )
    back = order.argsort()
    return [
        found[0][..., first.argsort()] if absorbed else found[0],
        found[1][..., back],
        found[2][..., back],
        *found[3:],
    ]


def true_attention(call: Call, given: dict[str, Tensor], indices: Tensor, absorbed: bool) -> list[Tensor]:
    """Output and gradients in float64, from the definition."""
    x = leaves({name: tensor.double() for name, tensor in given.items()}, ("query", "key", "value"))
    value = x["key"][..., :12] if absorbed else x["value"]
    chosen = torch.zeros(2, call.sq, call.sk + 1, dtype=torch.bool).scatter(-1, indices % (call.sk + 1), True)
    hidden = ~(chosen[..., : call.sk] & call.seen())
    logits = torch.einsum("sbnh,tbnh->bnst", x["query"], x["key"].expand(-1, -1, 4, -1)) * SCALE
    logits = logits.masked_fill(hidden[:, None], -torch.inf).masked_fill(hidden.all(-1)[:, None, :, None], 0)
    weights = logits.softmax(-1).masked_fill(hidden[:, None], 0)
    out = torch.einsum("bnst,tbnv->sbnv", weights, value.expand(-1, -1, 4, -1))
    out = out if absorbed else out.flatten(2)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(call.dtype).double())
    return [out.detach(), *(tensor.grad for tensor in x.values() if tensor.grad is not None)]


def test_attention_takes_packed_inputs_mixed_heads_and_other_indices() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(12, n, 8, generator=generator) for n in (4, 1, 4))
    indices = torch.randint(0, 12, (1, 12, 5), generator=generator).int()
    indices = indices.sort(-1)[0].where(torch.ones(1, 12, 5, dtype=torch.bool).cumsum(-1) < 5, -1)
    unique = torch.stack([torch.randperm(12, generator=generator)[:5] for _ in range(12)])[None].int()
    indices = torch.where(indices < 0, -1, unique)
    for other in (torch.int32, torch.int64, torch.int16):
        theirs = dsa.unfused_dsa_fn(query, key, value, indices.to(other), SCALE)
        with megatron.apply():
            ours = dsa.unfused_dsa_fn(query, key, value, indices.to(other), SCALE)
        assert ours.shape == theirs.shape == (12, 32)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with megatron.apply(), pytest.raises(NotImplementedError, match="unfused_dsa_fn: value must be a tensor, got None"):
        dsa.unfused_dsa_fn(query, key, None, indices, SCALE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scattering_is_that_of_megatron(dtype: torch.dtype) -> None:
    masking = dsa.dsa_masking
    indices = torch.tensor([[[3, 0, -1], [-1, -1, -1]], [[1, 1, -1], [4, 2, 0]]])
    start = torch.full((2, 2, 5), -torch.inf, dtype=dtype)
    start[0, 1, 2] = 0
    theirs, ours = start.clone(), start.clone()
    masking.scatter_topk_into_index_mask(theirs, indices)
    with megatron.apply():
        assert masking.scatter_topk_into_index_mask(ours, indices.short(), seq_chunk_size=1) is None
    assert torch.equal(ours, theirs)


def test_inputs_of_other_dtypes_are_taken_as_upstream_takes_them() -> None:
    call = Call("causal", sparse=True)
    inputs = call.inputs()
    for change in (
        {"q": torch.bfloat16},
        {"query": torch.float16},
        dict.fromkeys(("q", "k", "query", "key"), torch.float64),
    ):
        mixed = {name: x.to(change.get(name, x.dtype)) for name, x in inputs.items()}
        theirs = run_loss(dsa, call, mixed)
        with megatron.apply():
            ours = run_loss(dsa, call, mixed)
        assert torch.equal(ours[0], theirs[0])
        for got, other in zip(ours[1:], theirs[1:], strict=True):
            torch.testing.assert_close(
                got, other.to(got.dtype), rtol=2e-2 if got.dtype == torch.bfloat16 else 2e-4, atol=1e-5
            )


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_gives_the_same_gradients(reentrant: bool) -> None:
    call = Call("causal", sparse=True)
    inputs = call.inputs()
    bounds = call.visibility()

    def loss(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
        rest = SCALE, 7, 1.0, None, True, ALONE, bounds["varlen_starts"], bounds["varlen_ends"]
        value: Tensor = dsa.FusedDSAIndexerLoss.apply(q, weights, k, inputs["query"], inputs["key"], *rest)[1]
        return value

    with megatron.apply():
        found = []
        for recompute in (False, True):
            x = [inputs[name].clone().requires_grad_() for name in ("q", "weights", "k")]
            value = checkpoint(loss, *x, use_reentrant=reentrant) if recompute else loss(*x)
            value.backward()
            found.append([value.detach(), *(tensor.grad for tensor in x)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bad_arguments_are_named() -> None:
    call = Call("causal")
    inputs = call.inputs()
    rest = (inputs["q"], inputs["k"], inputs["weights"], 7)
    rows = torch.arange(26)
    with megatron.apply():
        with pytest.raises(ValueError, match="mask and varlen_starts exclude each other"):
            dsa.fused_qk_topk_naive(*rest, mask=torch.zeros(26, 26), varlen_starts=rows, varlen_ends=rows)
        with pytest.raises(ValueError, match="varlen_starts needs varlen_ends, got varlen_ends=None"):
            dsa.fused_qk_topk_naive(*rest, varlen_starts=rows)
        with pytest.raises(ValueError, match=r"query_valid_rows must be \[sq\] = \[26\].*, got \[3\]"):
            dsa.FusedDSAIndexerLoss.apply(
                *(inputs[name] for name in ("q", "weights", "k", "query", "key")), SCALE, 7, 1.0, None, False, ALONE,
                query_valid_rows=torch.ones(3),
            )  # fmt: skip
    with pytest.raises(TypeError, match="keep_scores must be True or False, got int"):
        megatron.apply(keep_scores=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="workspace must be at least 0 bytes, got -1"):
        megatron.apply(workspace=-1)


def test_undo_restores_the_very_objects_and_leaves_the_dispatch_table_alone() -> None:
    kernels = dsa.dsa_kernels
    before = {name: getattr(dsa, name) for name in TARGETS}
    scatter, table = dsa.dsa_masking.scatter_topk_into_index_mask, dict(vars(kernels))
    patch = megatron.apply()
    assert all(getattr(dsa, name) is not original for name, original in before.items())
    assert dict(vars(kernels)) == table
    assert set(patch.originals.values()) == {*before.values(), scatter}
    assert len(patch.status().replaced) == 6
    second = megatron.apply()
    assert len(second.status().shared) == len(patch.status().shared) == 6
    patch.undo()
    assert all(getattr(dsa, name) is not original for name, original in before.items())
    assert second.status().applied
    second.undo()
    assert all(getattr(dsa, name) is original for name, original in before.items())
    assert dsa.dsa_masking.scatter_topk_into_index_mask is scatter


def test_another_version_or_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    core = importlib.import_module("megatron.core")
    before = dict(vars(dsa))
    for version in ("0.16.2", "0.20.0"):
        monkeypatch.setattr(core, "__version__", version)
        with pytest.raises(PatchError, match=rf"megatron: needs megatron-core >= 0\.17, < 0\.20, got {version}\."):
            megatron.apply()
    monkeypatch.setattr(core, "__version__", "0.18.2")
    sentence = r"needs .*dsa\._compute_index_scores to take \(q, weights, k\), got \(q, weights, k, use_relu=True\)"
    with pytest.raises(PatchError, match=sentence):
        megatron.apply()
    assert dict(vars(dsa)) == before


def test_names_imported_by_value_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "borrowed", dsa.fused_qk_topk_naive, raising=False)
    with megatron.apply() as patch:
        assert patch.status().unreached == (f"{__name__}.borrowed",)


def test_peaks_of_the_loss_step_and_of_the_scorer_fall() -> None:
    s, h, d, heads, width = 1024, 32, 64, 8, 64
    generator = torch.Generator().manual_seed(0)
    q, weights, k = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in ((s, 1, h, d), (s, 1, h), (s, 1, d))
    )
    query, key = (
        torch.randn(s, 1, heads, width, generator=generator),
        torch.randn(s, 1, heads, width, generator=generator),
    )
    bounds = torch.zeros(s, dtype=torch.int64), torch.arange(1, s + 1)

    def step() -> None:
        rest = width**-0.5, 256, 1.0, None, True, ALONE, *bounds
        dsa.FusedDSAIndexerLoss.apply(q, weights, k, query, key, *rest)[1].backward()
        q.grad = weights.grad = k.grad = None

    def score() -> Tensor:
        with torch.no_grad():
            scores: Tensor = dsa._compute_index_scores(q, weights, k)
        return scores

    before = allocator_peak(step, CPU).peak, allocator_peak(score, CPU).peak
    with megatron.apply():
        after = allocator_peak(step, CPU).peak, allocator_peak(score, CPU).peak
    output = 4 * s * s
    assert before[0] >= 4 * after[0], (before, after)
    assert before[1] - output >= 8 * (after[1] - output), (before, after)


TP = Call("causal", sparse=True)
TP_CALLS = (TP, Call("packed", valid=True), Call("mask", per_token=True))


def _rank(rank: int, folder: str) -> None:
    """One of two tensor-parallel processes, each with half of the attention heads."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = []
    for call in TP_CALLS:
        inputs = call.inputs()
        inputs["query"] = inputs["query"][:, :, 2 * rank : 2 * rank + 2]
        for patched in (False, True):
            with megatron.apply() as patch:
                if not patched:
                    patch.undo()
                results.append(run_loss(dsa, call, inputs, SimpleNamespace(tp=dist.group.WORLD)))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_tensor_parallel_processes_agree_with_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(200)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for i, call in enumerate(TP_CALLS):
        with megatron.apply():
            one = run_loss(dsa, call, call.inputs())
        theirs, ours = first[2 * i], first[2 * i + 1]
        assert all(map(torch.equal, ours, second[2 * i + 1]))
        assert torch.equal(ours[0], one[0])
        for got, alone, upstream in zip(ours[1:], one[1:], theirs[1:], strict=True):
            torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(got, upstream, rtol=1e-4, atol=1e-6)
