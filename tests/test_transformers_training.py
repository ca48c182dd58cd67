from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from headfold import UnsupportedError
from headfold.integrations.transformers import IndexerLosses, apply
from headfold.integrations.transformers.layers import attend
from headfold.integrations.transformers.training import _share
from tiny_models import NAMES, build, far_apart, in_float64, one_thread, padding_of, step, tokens

__all__ = ["one_thread"]
COEFF = 0.7


class Seen:
    """What indexers and attentions of one pass were given, by layer."""

    def __init__(self) -> None:
        self.indexers: dict[int, Any] = {}
        self.attentions: dict[int, tuple[Tensor, Tensor, float]] = {}

    def before_indexer(self, indexer: Any, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(type(indexer).forward).bind(indexer, *args, **kwargs)
        self.indexers[indexer.layer_idx] = indexer, bound.arguments

    def attend(self, module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.attentions[module.layer_idx] = query.detach(), key.detach(), kwargs["scaling"]
        return attend(module, query, key, *args, **kwargs)


@contextmanager
def watching(model: Any) -> Iterator[Seen]:
    seen = Seen()
    indexers = [m for m in model.modules() if hasattr(m, "weights_proj")]
    handles = [m.register_forward_pre_hook(seen.before_indexer, with_kwargs=True) for m in indexers]
    AttentionInterface.register("headfold", seen.attend)
    yield seen
    AttentionInterface.register("headfold", attend)
    for handle in handles:
        handle.remove()


def scores_of(indexer: Any, arguments: dict[str, Any], visible: Tensor) -> Tensor:
    """Stock's own scores [b, s, t] before its top-k, with their graph to the indexer's parameters."""
    caught: list[Tensor] = []
    topk = Tensor.topk

    def catch(scores: Tensor, *args: Any, **kwargs: Any) -> Any:
        caught.append(scores)
        return topk(scores, *args, **kwargs)

    given = {name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    with mock.patch.object(Tensor, "topk", catch):
        inspect.unwrap(type(indexer).forward)(**{**given, "attention_mask": visible})
    return caught[0]


def direct_loss(seen: Seen, layer: int, kept: Tensor, sparse: bool) -> Tensor:
    """The loss of one layer by its definition, on full matrices."""
    indexer, arguments = seen.indexers[layer]
    query, key, scale = seen.attentions[layer]
    s = kept.shape[1]
    visible = torch.ones(s, s, dtype=torch.bool).tril() & kept[:, None]
    scores = scores_of(indexer, arguments, visible)
    support = visible
    if sparse:
        chosen = scores.detach().topk(min(indexer.index_topk, s), -1).indices
        support = visible & torch.zeros_like(visible).scatter(-1, chosen, True)
    logits = (query @ key.transpose(-1, -2) * scale).masked_fill(~support[:, None], -torch.inf)
    mass = torch.nan_to_num(logits.softmax(-1)).sum(1)
    teacher = mass / mass.sum(-1, keepdim=True).clamp(min=1e-300)
    student = scores.masked_fill(~support, -1e9).log_softmax(-1)
    terms = torch.where(teacher > 0, teacher * (teacher.clamp(min=1e-300).log() - student), 0)
    return terms.sum(-1)[kept].sum() / kept.sum()


STAGES = [("joint", None), ("joint", False), ("indexer", None), ("indexer", True)]


@pytest.mark.parametrize(("stage", "sparse"), STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_indexers_get_the_gradients_of_a_direct_computation_and_only_they(
    name: str, stage: str, sparse: bool | None
) -> None:
    model, ids = build(name).double().train(), tokens(2, 29)
    mask = padding_of(ids, "left" if stage == "joint" else "right")
    assert mask is not None
    narrow = stage == "joint" if sparse is None else sparse
    with in_float64(name):
        with apply(model):
            plain = step(model, ids, mask)
        with apply(model, indexer_loss_coeff=COEFF, stage=stage, sparse=sparse), watching(model) as seen:
            trained = step(model, ids, mask)
        losses = {layer: direct_loss(seen, layer, mask.bool(), narrow) for layer in seen.indexers}
        total = COEFF * torch.stack(list(losses.values())).sum()
        parameters = {n: p for n, p in model.named_parameters() if "indexer" in n}
        grads = torch.autograd.grad(total, list(parameters.values()))
    wanted = dict(zip(parameters, grads, strict=True))
    assert all(x.abs().max() > 0 for x in wanted.values())
    got = {n: x for n, x in trained.items() if "indexer" in n}
    assert not far_apart(got, wanted, 1e-10)
    rest = {n: x for n, x in trained.items() if n not in got and n not in ("loss", "logits")}
    if stage == "indexer":
        assert not rest
    else:
        assert not far_apart(trained | {}, {**plain, **wanted, "loss": plain["loss"] + total.detach()}, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_warm_up_attends_to_every_visible_key_and_the_other_stages_to_the_selected(name: str) -> None:
    model, every, ids = build(name).double(), build(name, index_topk=64).double(), tokens(2, 29)
    mask = padding_of(ids, "left")
    assert mask is not None

    def logits(model: Any) -> Tensor:
        out: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        return out.detach()

    with in_float64(name):
        dense, narrow = logits(every), logits(model)
        found = {}
        for stage, sparse in STAGES:
            with apply(model.train(), indexer_loss_coeff=COEFF, stage=stage, sparse=sparse):
                found[stage, sparse] = logits(model)
                evaluated = logits(model.eval())
            torch.testing.assert_close(evaluated, narrow, rtol=0, atol=1e-10)
    assert (dense - narrow).abs().max() > 0.1
    for case, x in found.items():
        torch.testing.assert_close(x, dense if case == ("indexer", None) else narrow, rtol=0, atol=1e-10)


@pytest.mark.parametrize("stage", ["joint", "indexer"])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_on_and_off_agree(name: str, stage: str) -> None:
    model, ids = build(name).double().train(), tokens(2, 29)
    with in_float64(name), apply(model, indexer_loss_coeff=COEFF, stage=stage):
        plain = step(model, ids, None)
        model.activation_checkpointing_enable()
        checkpointed = step(model, ids, None)
        assert not far_apart(checkpointed, plain, 1e-14)
        model.activation_checkpointing_disable()
        model.activation_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(UnsupportedError, match="use_reentrant=False, got True"):
            step(model, ids, None)


@pytest.mark.parametrize("name", NAMES)
def test_losses_come_by_layer_and_by_pass(name: str) -> None:
    model, ids = build(name).train(), tokens(2, 25)
    layers = {m.layer_idx for m in model.modules() if hasattr(m, "weights_proj")}
    with apply(model, indexer_loss_coeff=COEFF):
        one, two = (model(input_ids=x, labels=x) for x in (ids, ids.flip(1)))
        other = model(input_ids=ids)
        with torch.no_grad():
            evaluated = model.eval()(input_ids=ids, labels=ids)
            generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    with apply(model.train(), indexer_loss_coeff=COEFF, add_to_loss=False):
        apart = model(input_ids=ids, labels=ids)
    assert set(one.indexer_losses.layers) == layers
    assert all(loss.requires_grad for loss in one.indexer_losses.layers.values())
    parts = [float(loss.detach()) for loss in one.indexer_losses.layers.values()]
    assert all(0 < part < 10 for part in parts)
    totals = [float(out.indexer_losses.total.detach()) for out in (one, two, apart)]
    assert math.isclose(totals[0], COEFF * sum(parts), rel_tol=1e-6)
    assert totals[0] != totals[1]
    assert math.isclose(float(one.loss.detach()), float(apart.loss.detach()) + totals[2], rel_tol=1e-6)
    assert other.loss is None
    assert set(other.indexer_losses.layers) == layers
    assert not hasattr(evaluated, "indexer_losses")
    assert math.isclose(float(evaluated.loss), float(apart.loss.detach()), rel_tol=1e-5)
    assert generated.shape == (2, 28)


def test_a_short_run_brings_the_loss_down() -> None:
    model, ids = build("glm_moe_dsa").train(), tokens(4, 40)
    kept = {n: p.clone() for n, p in model.named_parameters() if "indexer" not in n}
    with apply(model, indexer_loss_coeff=1.0, stage="indexer"):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        seen = []
        for _ in range(40):
            optimizer.zero_grad()
            losses = model(input_ids=ids).indexer_losses
            losses.total.backward()
            optimizer.step()
            seen.append([float(x.detach()) for x in losses.layers.values()])
    assert all(last < 0.6 * first for first, last in zip(seen[0], seen[-1], strict=True)), (seen[0], seen[-1])
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)


def test_accumulated_passes_weigh_the_loss_of_indexers_as_one_batch_does() -> None:
    """Trainer adds up passes whose losses are shares of the step's: each is told the labels of all of them."""
    model, ids = build("glm_moe_dsa").double().train(), tokens(4, 21)
    labels = ids.clone()
    labels[2:, 3:9] = -100
    items = (labels[:, 1:] != -100).sum()
    with in_float64("glm_moe_dsa"), apply(model, indexer_loss_coeff=COEFF):
        own, parts = [], []
        for rows in (slice(0, 2), slice(2, 4)):
            own.append(model(input_ids=ids[rows], labels=labels[rows]).indexer_losses)
            out = model(input_ids=ids[rows], labels=labels[rows], num_items_in_batch=items)
            parts.append(out.indexer_losses)
            out.loss.backward()
            shifted = {"labels": labels[rows], "shift_labels": labels[rows, 1:], "num_items_in_batch": int(items)}
            given = IndexerLosses(COEFF, out.indexer_losses.layers, _share(shifted))
            assert torch.equal(given.total, out.indexer_losses.total)
    counts = [int((labels[rows, 1:] != -100).sum()) for rows in (slice(0, 2), slice(2, 4))]
    grads = {n: p.grad for n, p in model.named_parameters() if "indexer" in n and p.grad is not None}
    wanted = own[0].total * counts[0] / items + own[1].total * counts[1] / items
    for loss, count in zip(parts, counts, strict=True):
        assert float(loss.share) == pytest.approx(count / int(items))
    assert sum(float(loss.total.detach()) for loss in parts) == pytest.approx(float(wanted.detach()))
    parameters = {n: p for n, p in model.named_parameters() if n in grads}
    direct = dict(zip(parameters, torch.autograd.grad(wanted, list(parameters.values())), strict=True))
    assert not far_apart(grads, direct, 1e-6)  # shares are float32


def test_a_loss_that_nobody_would_get_is_refused() -> None:
    model, ids = build("glm_moe_dsa").train(), tokens(1, 9)
    with apply(model, indexer_loss_coeff=1.0):
        for part in (model.model, model.forward):
            with pytest.raises(
                UnsupportedError, match=r"calls of the model that was given to apply, got a call of a part"
            ):
                part(input_ids=ids)
        assert model.model.eval()(input_ids=ids).last_hidden_state.shape == (1, 9, 40)
    without = pytest.raises(UnsupportedError, match="needs a model that has one, got GlmMoeDsaModel")
    with apply(model.train().model, indexer_loss_coeff=1.0), without:
        model(input_ids=ids, labels=ids)
    with apply(model.model, indexer_loss_coeff=1.0, add_to_loss=False):
        assert set(model.model(input_ids=ids).indexer_losses.layers) == {0, 1}


def test_an_error_in_a_pass_leaves_no_carrier_behind() -> None:
    model, ids = build("axk2").train(), tokens(1, 9)
    with apply(model, indexer_loss_coeff=1.0):
        broken = mock.patch.object(type(model.model.norm), "forward", side_effect=RuntimeError("broken"))
        with broken, pytest.raises(RuntimeError, match="broken"):
            model(input_ids=ids)
        assert set(model(input_ids=ids).indexer_losses.layers) == {0, 1, 2, 3}


def test_what_training_cannot_do_is_refused() -> None:
    model, ids = build("axk2").train(), tokens(1, 9)
    with apply(model, indexer_loss_coeff=1.0):
        with pytest.raises(UnsupportedError, match="needs return_dict=True, got a tuple"):
            model(input_ids=ids, return_dict=False)
        with pytest.raises(UnsupportedError, match="or none, got one with a row per query"):
            model(input_ids=ids, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool).tril())
