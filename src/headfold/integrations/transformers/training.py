"""What a forward pass in training collects: the loss of every layer's indexer, in a carrier of that pass alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from headfold.contract import UnsupportedError
from headfold.integrations.transformers.masks import VisibleKeys
from headfold.loss import indexer_loss


@dataclass
class IndexerLosses:
    """The losses of the indexers in one forward pass, by layer; `outputs.indexer_losses` of a model in training.

    coeff: what the sum is multiplied by.   layers: the loss of each layer with an indexer, a scalar with its graph.
    share: of this pass in a step that accumulates several: its labels among `num_items_in_batch`, 1 where that is not
    given or there are no labels.
    """

    coeff: float
    layers: dict[int, Tensor] = field(default_factory=dict)
    share: Tensor | float = 1.0

    @property
    def total(self) -> Tensor:
        """The coefficient and the share times the sum over layers, on the device of the last one."""
        if not self.layers:
            raise ValueError("IndexerLosses: total needs a pass that ran an indexer, got none.")
        losses = list(self.layers.values())
        device = losses[-1].device
        share = self.share.to(device) if isinstance(self.share, Tensor) else self.share
        return self.coeff * share * torch.stack([loss.to(device) for loss in losses]).sum()


def _share(kwargs: Mapping[str, Any]) -> Tensor | float:
    """Return the share of a pass in its step, as the model's loss has it when it is told the step's labels."""
    items, labels, shifted = (kwargs.get(name) for name in ("num_items_in_batch", "labels", "shift_labels"))
    if shifted is None and labels is not None:
        shifted = labels[..., 1:]
    if items is None or shifted is None:
        return 1.0
    counted: Tensor = (shifted != -100).sum()
    return counted / (items.to(counted.device) if isinstance(items, Tensor) else items)


class Operands(NamedTuple):
    """What an indexer leaves for its attention, which has the teacher: a call of indexer_loss, but for that."""

    q: Tensor
    weights: Tensor
    k: Tensor
    visible: VisibleKeys
    topk: int
    scale: float


@dataclass
class Training:
    """How the indexers of a model are trained; one for all of its layers.

    coeff: of the loss.   sparse: whether the support is what was selected.   dense: whether attention sees every
    visible key, as when indexers warm up.   add: whether the model's loss includes this one.
    """

    coeff: float
    sparse: bool
    dense: bool
    add: bool
    workspace: int | None
    losses: IndexerLosses | None = None

    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Start a pass; a forward pre-hook of the model.

        Raises: UnsupportedError for reentrant checkpointing, which runs layers without a graph first.
        """
        if not model.training:
            return
        for layer in model.modules():
            run = getattr(layer, "_gradient_checkpointing_func", None)
            if getattr(layer, "gradient_checkpointing", False) and isinstance(run, partial):
                reentrant = run.keywords.get("use_reentrant", True)
                if reentrant:
                    raise UnsupportedError(
                        "headfold trains indexers under gradient checkpointing with use_reentrant=False, got "
                        f'{reentrant}. Call gradient_checkpointing_enable({{"use_reentrant": False}}).'
                    )
        self.losses = IndexerLosses(self.coeff)

    def end(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Hand the carrier out with the model's output; a forward hook of the model that also runs after an error."""
        losses, self.losses = self.losses, None
        if losses is None or output is None:
            return
        if not isinstance(output, ModelOutput):
            raise UnsupportedError(
                "headfold hands indexer losses out with the model's output, which needs return_dict=True, got a "
                f"{type(output).__name__}."
            )
        if self.add and not hasattr(output, "loss"):
            raise UnsupportedError(
                f"headfold adds indexer losses to the model's loss, which needs a model that has one, got "
                f"{type(model).__name__}. Apply it to the model that makes the loss, or give add_to_loss=False and add "
                "outputs.indexer_losses.total."
            )
        losses.share = _share(kwargs)
        output.indexer_losses = losses
        loss = getattr(output, "loss", None)
        if self.add and loss is not None and losses.layers:
            output.loss = loss + losses.total.to(loss.device)

    def add_layer(self, layer: int, operands: Operands, query: Tensor, key: Tensor, softmax_scale: float) -> None:
        """Make a layer's loss and collect it; query [b, s, np, hn], key [b, t, np, hn].

        A checkpoint makes it again in backward, in the graph of the pass that is over: it has to run, and it is not
        collected twice.

        Raises: UnsupportedError outside a pass of the model, whose output would have been the only way to the loss.
        """
        if self.losses is None and torch._C._current_graph_task_id() == -1:
            raise UnsupportedError(
                "headfold collects indexer losses in calls of the model that was given to apply, got a call of a part "
                "of it, or of its forward. Call that model, or part.eval() where nothing is trained."
            )
        visible = operands.visible
        loss = indexer_loss(
            operands.q,
            operands.weights,
            operands.k,
            query,
            key,
            softmax_scale=softmax_scale,
            topk=operands.topk if self.sparse else None,
            sparse=self.sparse,
            row_mask=visible.rows,
            keys=visible.keys,
            bias=visible.bias,
            scale=operands.scale,
            layout="bshd",
            workspace=self.workspace,
        ).loss
        if self.losses is not None:
            self.losses.layers[layer] = loss


@dataclass
class LayerState:
    """What a patched module carries: the workspace, how its model trains, and what its indexer leaves behind."""

    workspace: int | None = None
    training: Training | None = None
    left: Operands | None = None


STATE = "headfold"  # the attribute that holds it
PLAIN = LayerState()


def state_of(module: nn.Module) -> LayerState:
    """Return what a module carries; a class that was registered has nothing yet."""
    state: LayerState = getattr(module, STATE, PLAIN)
    return state
