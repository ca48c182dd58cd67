"""The error budget: the one tolerance rule, shared by lanes and tests.

error(ours, truth) <= 2 · (error(materialised path in the same dtype, truth) + eps · max|truth|), row by row.

The materialised path's error is the largest over eight orders of its sums: a single order is often lucky in a short
row, and in float64 the truth is itself one of them. Held to one order alone, the materialised path with its sums
shuffled breaks its own budget (a test shows it). Attention whose softmax is nearly one of a few picks is too much even
for eight: gradients are what its terms leave of each other, and a ninth order breaks the budget as often as ours. Of
the orders of selected scores four are made of gathered keys, the other way to write them, and four are gathered from
the score matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headfold import materialized, materialized_attention
from headfold.attention import _attend
from headfold.attention_contract import AttentionCall, attention_call
from headfold.contract import ScoreCall, score_call
from headfold.scores import index_scores
from headfold.selected import selected_scores

Inputs = Sequence[Tensor | None]
Attend = Callable[[AttentionCall], tuple[Tensor, Tensor]]
# A row is one query of scores, dq and dweights, and one key of dk; of attention one query or key with all its heads.
ROW_AXES = {"scores": 1, "dq": 2, "dweights": 1, "dk": 1}
ROW_AXES |= {"out": 2, "lse": 1, "dquery": 2, "dkey": 2, "dvalue": 2, "dsink": 1}
ATTENTION_INPUTS = ("query", "key", "value", "sink")
ORDERS = 8
DEFAULTS: dict[str, Any] = {
    "causal": False,
    "keys": None,
    "bias": None,
    "activation": "relu",
    "scale": 1.0,
    "layout": "sbhd",
    "workspace": None,
}
ATTENTION_DEFAULTS: dict[str, Any] = {
    "v_dim": None,
    "causal": False,
    "keys": None,
    "layout": "bshd",
    "workspace": None,
}


@dataclass(frozen=True)
class Spent:
    """How much of the budget the worst row used.

    share: its error over its budget, at most 1 when kept.   error: that row's error relative to its largest true value.
    row: its place.   mismatched: entries whose NaN or infinity differs from the truth.
    """

    share: float
    error: float
    row: tuple[int, ...]
    mismatched: int

    @property
    def kept(self) -> bool:
        """Whether every row stayed inside its budget."""
        return self.share <= 1 and self.mismatched == 0


def spend(got: Tensor, truth: Tensor, bases: Sequence[Tensor], axes: int = 1) -> Spent:
    """Compare a result with the float64 truth, beside the materialised path's own error in the same dtype.

    Args:
        got: ours.
        truth: float64.
        bases: the materialised path's results, in got's dtype.
        axes: how many trailing axes make up a row.
    """
    eps = torch.finfo(got.dtype).eps
    got, truth = got.double(), truth.double()
    settled = truth.isfinite()
    same = torch.where(settled, got.isfinite(), (got == truth) | (got.isnan() & truth.isnan()))
    if got.numel() == 0:
        return Spent(0.0, 0.0, (), 0)

    largest = torch.where(settled, truth, 0).abs().flatten(-axes).amax(-1)
    error = _row_error(torch.where(same, got, truth), truth, axes)
    budget = row_budget(truth, bases, eps, axes)
    share = torch.where(error == 0, 0.0, error / budget)
    worst = int(share.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), share.shape))
    relative = float(error[place] / largest[place]) if largest[place] > 0 else float(error[place])
    return Spent(float(share[place]), relative, place, int((~same).sum()))


def row_budget(truth: Tensor, bases: Sequence[Tensor], eps: float, axes: int = 1) -> Tensor:
    """Return what each row may be off by, given the float64 truth, the materialised path's results and their eps."""
    largest = torch.where(truth.isfinite(), truth, 0).abs().flatten(-axes).amax(-1)
    return 2 * (torch.stack([_row_error(base, truth, axes) for base in bases]).amax(0) + eps * largest)


def _row_error(x: Tensor, truth: Tensor, axes: int) -> Tensor:
    return torch.where(truth.isfinite(), x.double() - truth, 0).abs().flatten(-axes).amax(-1)


def score_budget(q: Tensor, weights: Tensor, k: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    """Return float64 scores [b, sq, sk] and the error budget [b, sq] of scores in the inputs' dtype."""
    shuffle = torch.Generator(q.device).manual_seed(0)
    oracle = {**call, "impl": "materialized"}
    with torch.no_grad():
        truth = index_scores(q.double(), weights.double(), k.double(), **_wide(oracle))
        bases = [index_scores(q, weights, k, **oracle)]
        bases += [_reordered(call, shuffle, q, weights, k) for _ in range(ORDERS - 1)]
    return truth, row_budget(truth, bases, torch.finfo(bases[0].dtype).eps)


def spend_all(inputs: Inputs, g: Tensor, indices: Tensor | None = None, **call: Any) -> dict[str, Spent]:
    """Hold scores and gradients to the budget, given q, weights (or None) and k already in their dtype.

    g: dL/dscores.   indices: [b, sq, topk] to hold selected_scores at them; None holds index_scores.   call: further
    arguments.
    """
    shuffle = torch.Generator(g.device).manual_seed(0)

    def scorer(call: dict[str, Any]) -> Callable[..., Tensor]:
        return partial(index_scores, **call) if indices is None else partial(_selected, indices, call)

    oracle = {**call, "impl": "materialized"}
    truth = _scores_and_grads(scorer(_wide(oracle)), [x if x is None else x.double() for x in inputs], g)
    others: list[Callable[..., Tensor]] = [partial(_reordered, call, shuffle)]
    if indices is not None:
        others = [partial(_reordered_at, indices, call, shuffle, gathered) for gathered in (True, False)]
    orders = [scorer(oracle), *(others * ORDERS)[: ORDERS - 1]]
    bases = [_scores_and_grads(order, inputs, g) for order in orders]
    return _spend_each(_scores_and_grads(scorer(call), inputs, g), truth, bases)


def spend_attention(
    inputs: Inputs,
    g: Tensor,
    indices: Tensor,
    *,
    gathered: bool | None = None,
    backend: str = "eager",
    attend: Attend | None = None,
    **call: Any,
) -> dict[str, Spent]:
    """Hold sparse attention to the budget, given query, key, value (or None) and sink (or None) in their dtype.

    g: dL/dout, batch-first [b, sq, np, v_dim].   gathered: which walk, None as the shape says.   backend: whose.
    attend: another one to hold.   call: softmax_scale and further arguments, layout bshd.
    """
    shuffle = torch.Generator(g.device).manual_seed(0)
    options = {**ATTENTION_DEFAULTS, **call}

    def run(attend: Attend, inputs: Inputs) -> dict[str, Tensor]:
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        query, key, value, sink = leaves
        assert query is not None
        assert key is not None
        out, lse = attend(attention_call("budget", query, key, value, indices, sink=sink, **options))
        present = {f"d{name}": x for name, x in zip(ATTENTION_INPUTS, leaves, strict=True) if x is not None}
        grads = torch.autograd.grad(out, list(present.values()), g.to(out.dtype))
        named = dict(zip(present, grads, strict=True))
        return {"out": out.detach(), "lse": lse.detach().transpose(1, 2), **named}

    truth = run(materialized_attention.sparse_attention, [x if x is None else x.double() for x in inputs])
    bases = [run(materialized_attention.sparse_attention, inputs)]
    shuffled = partial(materialized_attention.reordered, generator=shuffle)
    bases += [run(shuffled, inputs) for _ in range(ORDERS - 1)]
    ours = partial(_attend, with_lse=True, gathered=gathered, backend=backend)
    return _spend_each(run(attend or ours, inputs), truth, bases)


def _spend_each(
    got: dict[str, Tensor], truth: dict[str, Tensor], bases: Sequence[dict[str, Tensor]]
) -> dict[str, Spent]:
    return {name: spend(got[name], truth[name], [base[name] for base in bases], ROW_AXES[name]) for name in got}


def _selected(indices: Tensor, call: dict[str, Any], q: Tensor, weights: Tensor | None, k: Tensor) -> Tensor:
    return selected_scores(q, weights, k, indices, **call)


def _reordered(
    call: dict[str, Any], generator: torch.Generator, q: Tensor, weights: Tensor | None, k: Tensor
) -> Tensor:
    return materialized.reordered(_checked(call, q, weights, k), generator)


def _reordered_at(
    indices: Tensor,
    call: dict[str, Any],
    generator: torch.Generator,
    gathered: bool,
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
) -> Tensor:
    """Selected scores in a shuffled order: gathered from the score matrix, or made of gathered keys."""
    checked = _checked(call, q, weights, k)
    if gathered:
        return materialized.gathered(checked, indices, generator)
    return materialized.at_indices(materialized.reordered(checked, generator), indices)


def _checked(call: dict[str, Any], q: Tensor, weights: Tensor | None, k: Tensor) -> ScoreCall:
    return score_call("budget", q, weights, k, **{**DEFAULTS, **{n: x for n, x in call.items() if n in DEFAULTS}})


def _wide(call: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, Tensor) else x for name, x in call.items()}


def _scores_and_grads(scorer: Callable[..., Tensor], inputs: Inputs, g: Tensor) -> dict[str, Tensor]:
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    scores = scorer(*leaves)
    present = {f"d{name}": x for name, x in zip(("q", "weights", "k"), leaves, strict=True) if x is not None}
    grads = torch.autograd.grad(scores, list(present.values()), g.to(scores.dtype))
    return {"scores": scores.detach(), **dict(zip(present, grads, strict=True))}
