"""Calls of Megatron-Core's DSA functions, and a float64 reference of what they mean, for tests of the drop-in."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

DSA = "megatron.core.transformer.experimental_attention_variant.dsa"
ALONE = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
SCALE, TOPK, COEFFICIENT = 0.3, 7, 0.7
NAMES = ("q", "weights", "k", "query", "key")


@dataclass(frozen=True)
class Call:
    """One call: who may see what, and the options of the loss."""

    kind: str
    sparse: bool = False
    relu: bool = True
    valid: bool = False
    per_token: bool = False
    b: int = 2
    sq: int = 26
    dtype: torch.dtype = torch.float32
    np_k: int = 1

    def __str__(self) -> str:
        parts = [self.kind, "sparse" if self.sparse else "dense", "relu" if self.relu else "linear"]
        parts += ["valid"] if self.valid else []
        parts += ["per token"] if self.per_token else []
        parts += ["heads"] if self.np_k > 1 else []
        parts += [] if self.dtype == torch.float32 else [str(self.dtype).removeprefix("torch.")]
        return "-".join(parts)

    @property
    def sk(self) -> int:
        return 2 * self.sq if self.kind == "positions" else self.sq

    def inputs(self, *, heads: int = 16, np: int = 4) -> dict[str, Tensor]:
        """Return q, weights, k, query and np_k key heads, rounded to the dtype."""
        generator = torch.Generator().manual_seed(7)

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        sq, sk, b = self.sq, self.sk, self.b
        return {
            "q": make(sq, b, heads, 12),
            "weights": make(sq, b, heads) / 8,
            "k": make(sk, b, 12),
            "query": make(sq, b, np, 20),
            "key": make(sk, b, self.np_k, 20),
        }

    def visibility(self) -> dict[str, Tensor]:
        """Return mask or bounds, as Megatron's layers pass them."""
        rows = torch.arange(self.sq)
        if self.kind == "causal":
            return {"varlen_starts": torch.zeros_like(rows), "varlen_ends": rows + 1}
        if self.kind == "packed":  # three sequences, the last row padding
            starts = torch.tensor([0, 9, 10]).repeat_interleave(torch.tensor([9, 1, self.sq - 10]))
            ends = rows + 1
            ends[-1] = starts[-1]
            return {"varlen_starts": starts, "varlen_ends": ends}
        if self.kind == "positions":  # this rank's rows are every other position; keys arrive in another order
            order = torch.randperm(self.sk, generator=torch.Generator().manual_seed(3))
            return {"varlen_starts": rows // 3, "varlen_ends": 2 * rows + 1, "key_positions": order}
        if self.kind == "mask":
            mask = torch.zeros(self.b, self.sq, self.sk)
            mask = mask.masked_fill(
                torch.rand(mask.shape, generator=torch.Generator().manual_seed(5)) < 0.3, -torch.inf
            )
            mask[:, 4] = -torch.inf
            mask[0, :, :3] = -torch.inf
            return {"mask": mask}
        return {}

    def valid_rows(self) -> Tensor | None:
        if not self.valid:
            return None
        rows = torch.arange(self.sq) % 5 != 2
        return rows if self.kind == "packed" else torch.stack([rows, rows.flip(0)])

    def seen(self, *, selecting: bool = False) -> Tensor:
        """Return bool [b, sq, sk]: what the loss and attention see, or the selection."""
        given = self.visibility()
        if "mask" in given:
            return given["mask"] == 0
        shape, t = (self.b, self.sq, self.sk), torch.arange(self.sk)
        if not given:
            return (
                torch.ones(shape, dtype=torch.bool)
                if selecting
                else (t <= torch.arange(self.sq)[:, None]).expand(shape)
            )
        place = given.get("key_positions", t)
        return ((place >= given["varlen_starts"][:, None]) & (place < given["varlen_ends"][:, None])).expand(shape)


LOSSES = [
    Call(*options)
    for options in product(
        ("causal", "packed", "positions", "mask", "none"), (False, True), (True, False), (False, True), (False, True)
    )
]
ATTENTION = [Call(kind, dtype=dtype) for kind in ("causal", "packed", "positions", "mask", "none") for dtype in
             (torch.float32, torch.bfloat16)]  # fmt: skip


def leaves(inputs: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Detach the inputs; those named require gradients."""
    return {name: x.detach().clone().requires_grad_(name in names) for name, x in inputs.items()}


def gradients(x: dict[str, Tensor], *names: str) -> list[Tensor]:
    """Return the gradients of the leaves that have one, those named or all."""
    return [x[name].grad for name in names or x if x[name].grad is not None]  # type: ignore[misc]


def run_loss(
    module: Any, call: Call, inputs: dict[str, Tensor], group: Any = ALONE, given: dict[str, Tensor] | None = None
) -> list[Tensor]:
    """Return indices, loss, dq, dweights and dk of FusedDSAIndexerLoss, with another factor on the loss."""
    x = leaves(inputs, ("q", "weights", "k"))
    given = call.visibility() if given is None else given
    key = x["key"].expand(-1, -1, x["query"].shape[2], -1) if x["key"].shape[2] == 1 else x["key"]
    indices, loss = module.FusedDSAIndexerLoss.apply(
        x["q"],
        x["weights"],
        x["k"],
        x["query"],
        key,
        SCALE,
        TOPK,
        COEFFICIENT,
        given.get("mask"),
        call.sparse,
        group,
        given.get("varlen_starts"),
        given.get("varlen_ends"),
        given.get("key_positions"),
        call.valid_rows(),
        call.per_token,
        call.relu,
    )
    (3 * loss).backward()
    return [indices, loss.detach(), *gradients(x, "q", "weights", "k")]


def shuffled_loss(module: Any, call: Call, inputs: dict[str, Tensor], seed: int) -> list[Tensor]:
    """Return loss, dq, dweights and dk of run_loss with every sum, forward and backward, taken in a shuffled order."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(n: int) -> Tensor:
        return torch.randperm(n, generator=generator)

    heads, width = (shuffled(n) for n in inputs["q"].shape[2:])
    other, wide = (shuffled(n) for n in inputs["query"].shape[2:])
    given, keys = call.visibility(), torch.arange(call.sk)
    if given:  # without bounds and mask the loss is causal in the order of its keys
        keys = shuffled(call.sk)
    if "mask" in given:
        given["mask"] = given["mask"][..., keys]
    elif given:
        given["key_positions"] = given.get("key_positions", torch.arange(call.sk))[keys]
    x = {
        "q": inputs["q"][:, :, heads][..., width],
        "weights": inputs["weights"][..., heads],
        "k": inputs["k"][keys][..., width],
        "query": inputs["query"][:, :, other][..., wide],
        "key": (inputs["key"] if call.np_k == 1 else inputs["key"][:, :, other])[keys][..., wide],
    }
    _, loss, dq, dweights, dk = run_loss(module, call, x, given=given)
    back, across = heads.argsort(), width.argsort()
    return [loss, dq[:, :, back][..., across], dweights[..., back], dk[keys.argsort()][..., across]]


def true_scores(call: Call, x: dict[str, Tensor]) -> Tensor:
    """Return float64 scores [b, sq, sk], of whatever a row may see."""
    logits = torch.einsum("sbhd,tbd->bsht", x["q"], x["k"])
    logits = logits.relu() if call.relu else logits
    return torch.einsum("bsht,sbh->bst", logits, x["weights"])


def true_choice(call: Call, scores: Tensor) -> Tensor:
    """Return the selection of the scores, ties to the smallest key (the smallest position, where keys have one)."""
    hidden = ~call.seen(selecting=True)
    masked = scores.detach().masked_fill(hidden, -torch.inf)
    order = call.visibility().get("key_positions", torch.arange(call.sk)).argsort()
    best, indices = masked[..., order].sort(dim=-1, descending=True, stable=True)
    return order[indices].masked_fill(best == -torch.inf, -1)[..., : min(TOPK, call.sk)]


def true_loss(call: Call, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return what run_loss returns, in float64, from the definition."""
    x = leaves({name: tensor.double() for name, tensor in inputs.items()}, ("q", "weights", "k"))
    scores = true_scores(call, x)
    indices = true_choice(call, scores)
    hidden = ~call.seen()
    if call.sparse:
        chosen = torch.zeros(*scores.shape[:2], call.sk + 1, dtype=torch.bool)
        hidden = hidden | ~chosen.scatter(-1, indices % (call.sk + 1), True)[..., : call.sk]
    nothing = hidden.all(-1, keepdim=True)
    logits = torch.einsum("sbnh,tbnh->bnst", x["query"], x["key"].expand(-1, -1, x["query"].shape[2], -1)) * SCALE
    mass = logits.masked_fill(hidden[:, None], -torch.inf).masked_fill(nothing[:, None], 0).softmax(-1).sum(1)
    target = (mass / mass.sum(-1, keepdim=True)).masked_fill(hidden, 0)
    student = scores.masked_fill(hidden, -torch.inf).masked_fill(nothing, 0).log_softmax(-1).masked_fill(hidden, 0)
    rows = (torch.xlogy(target, target) - target * student).sum(-1)
    valid = call.valid_rows()
    valid = torch.ones_like(rows, dtype=torch.bool) if valid is None else valid.expand(rows.shape)
    loss = rows[valid].sum() * COEFFICIENT / (1 if call.per_token else valid.sum())
    (3 * loss).backward()
    return [indices, loss.detach(), *gradients(x, "q", "weights", "k")]
