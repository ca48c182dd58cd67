"""The bill of a whole model: what its sparse attention holds, layer by layer, stock and on headfold. No torch.

    layer = LayerShape(heads=64, dim=128, topk=2048, np=128, np_k=1, hn=576, v_dim=512, trains=True)
    model = ModelShape((layer,) * 61, b=1, dtype="bfloat16")
    bill = plan_model(model, tokens=8192, parallel=Parallel(tensor=8), stock=stock_step)   # ModelBill
    bill.stages[0].headfold, bill.stages[0].stock                                          # peak bytes of a device
    longest(model, 80 << 30, parallel=Parallel(tensor=8), stock=stock_step)                # Longest(stock, headfold)

`stock` says what a layer takes without headfold: a function (LayerShape, Call) -> Step. Megatron-Core's is
`headfold.megatron_plan.stock_step`. What is billed is attention and its indexer: weights, optimiser, projections and
feed-forward layers are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headfold.attention_tiles import AttentionTile, gathers
from headfold.geometry import ITEMSIZE, IndexerGeometry
from headfold.loss_tiles import LossTile
from headfold.tiles import DEFAULT_WORKSPACE, MIB, blocks

LONGEST = 1 << 24  # no published model is trained on more positions


class Step(NamedTuple):
    """A training step of one layer, in bytes beyond its inputs and output.

    forward: peak of the forward pass.   held: kept from forward to backward.   backward: peak of the backward pass,
    what was held included; 0 where nothing is trained.
    """

    forward: int
    held: int
    backward: int

    @property
    def peak(self) -> int:
        """The larger of both passes."""
        return max(self.forward, self.backward)


@dataclass(frozen=True)
class LayerShape:
    """One attention layer and its indexer.

    Args:
        heads, dim, topk: of the indexer; a layer that reuses a selection has its width in topk all the same.
        np, np_k, hn, v_dim: attention heads, key heads, width of keys and of values.
        computes: whether the layer has an indexer of its own.
        trains: whether its indexer has a loss.
        shared_value: whether values are the first v_dim channels of keys (absorbed latent attention).
        relu: whether scores pass through ReLU.
        ratio: query positions per key of the indexer and of attention.
    """

    heads: int
    dim: int
    topk: int
    np: int
    np_k: int
    hn: int
    v_dim: int
    computes: bool = True
    trains: bool = False
    shared_value: bool = True
    relu: bool = True
    ratio: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes that no layer has."""
        for name in ("heads", "dim", "topk", "np", "np_k", "hn", "v_dim", "ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"LayerShape: {name} must be an integer of at least 1, got {value!r}.")
        if self.np % self.np_k:
            raise ValueError(f"LayerShape: np must be a multiple of np_k, got {self.np} and {self.np_k}.")


@dataclass(frozen=True)
class Parallel:
    """Over how many devices a model is split: attention heads, query rows, layers.

    stages: layers of each pipeline stage; () splits them evenly.
    """

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse sizes below one, and stages that are not as many."""
        for name in ("tensor", "context", "pipeline"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Parallel: {name} must be an integer of at least 1, got {value!r}.")
        if self.stages and len(self.stages) != self.pipeline:
            raise ValueError(
                f"Parallel: stages must name {self.pipeline} stages, as pipeline says, got {len(self.stages)}."
            )


class Recompute(NamedTuple):
    """What runs again in backward, so that it need not be held in between.

    what: "nothing"; "attention", of every layer and with its indexer, while what goes in and comes out stays; "layers",
    all of them, `layers` at a time, for which the hidden states before them stay; "first", the same for the first
    `layers` layers of a stage, one at a time, and nothing for the others.
    """

    what: str = "nothing"
    layers: int = 1


NOTHING = Recompute()


@dataclass(frozen=True)
class ModelShape:
    """The attention layers of a model, first to last.

    Args:
        layers: all layers; one without sparse attention is left out.
        b: micro-batch.
        dtype: of activations.
        training: whether a step runs backward.
        recompute: what runs again in backward.
        hidden: width of the hidden states that are held for it.
        shares_hidden: whether tensor-parallel devices each hold a part of those.
    """

    layers: tuple[LayerShape, ...]
    b: int = 1
    dtype: str = "bfloat16"
    training: bool = True
    recompute: Recompute = NOTHING
    hidden: int = 0
    shares_hidden: bool = False

    def __post_init__(self) -> None:
        """Refuse a model without layers, of an unknown dtype, or one that holds hidden states of no width."""
        if not self.layers:
            raise ValueError("ModelShape: layers must hold at least one layer, got none.")
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"ModelShape: dtype must be one of {', '.join(ITEMSIZE)}, got {self.dtype!r}.")
        kinds = "nothing", "attention", "layers", "first"
        if self.recompute.what not in kinds or self.recompute.layers < 1:
            raise ValueError(
                f"ModelShape: recompute must say one of {', '.join(kinds)} and at least 1 layer, got {self.recompute}."
            )
        if self.recompute.what in ("layers", "first") and self.hidden < 1:
            raise ValueError(f"ModelShape: recompute of layers needs hidden, at least 1, got {self.hidden}.")


class Call(NamedTuple):
    """What one device sees of a layer: batch, query rows, keys, attention heads, bytes of an element."""

    b: int
    sq: int
    sk: int
    np: int
    itemsize: int
    training: bool


Stock = Callable[[LayerShape, Call], Step]


class LayerBill(NamedTuple):
    """One layer on one device: what goes in and out, what of that is attention's, and a step on either path."""

    inputs: int
    attention: int
    stock: Step
    headfold: Step


class StageBill(NamedTuple):
    """One pipeline stage: its layers, the micro-batches that it holds at once, and peak bytes on either path."""

    first: int
    layers: tuple[LayerBill, ...]
    in_flight: int
    stock: int
    headfold: int


class ModelBill(NamedTuple):
    """All stages; the largest is what decides whether a model fits."""

    stages: tuple[StageBill, ...]

    @property
    def stock(self) -> int:
        """Bytes of the largest stage as the model comes."""
        return max(stage.stock for stage in self.stages)

    @property
    def headfold(self) -> int:
        """Bytes of the largest stage on headfold."""
        return max(stage.headfold for stage in self.stages)


class Longest(NamedTuple):
    """The longest context that fits, in tokens; 0 where not even one does."""

    stock: int
    headfold: int


def plan_model(
    model: ModelShape,
    tokens: int,
    *,
    parallel: Parallel | None = None,
    stock: Stock,
    workspace: int = DEFAULT_WORKSPACE,
) -> ModelBill:
    """Return the bill of a training step, or of a forward pass.

    Rows are split over context-parallel devices, and each gathers all keys; attention heads over tensor-parallel ones,
    each of which scores with all indexer heads; layers over pipeline stages, of which stage i holds pipeline - i
    micro-batches at once, as one-forward-one-backward schedules do.

    Args:
        model: its layers.
        tokens: context of one sequence.
        parallel: sizes; None means one device.
        stock: what a layer takes as it comes.
        workspace: headfold's, for each call.

    Raises: ValueError where heads or layers do not split so.
    """
    parallel = parallel or Parallel()
    counts = _splits(model, parallel)
    hidden = _hidden(model, tokens, parallel)
    known: dict[LayerShape, LayerBill] = {}
    stages, first = [], 0
    for i, count in enumerate(counts):
        layers = model.layers[first : first + count]
        for layer in layers:
            if layer not in known:
                known[layer] = _layer(model, layer, tokens, parallel, stock, workspace)
        bills = tuple(known[layer] for layer in layers)
        in_flight = parallel.pipeline - i if model.training else 1
        stock_peak, headfold_peak = (
            _stage([(bill, getattr(bill, way)) for bill in bills], in_flight, model, hidden)
            for way in ("stock", "headfold")
        )
        stages.append(StageBill(first, bills, in_flight, stock_peak, headfold_peak))
        first += count
    return ModelBill(tuple(stages))


def longest(
    model: ModelShape,
    memory: int,
    *,
    parallel: Parallel | None = None,
    stock: Stock,
    workspace: int = DEFAULT_WORKSPACE,
) -> Longest:
    """Return the longest contexts whose bills are within `memory` bytes a device, by bisection."""

    def bill(tokens: int) -> ModelBill:
        return plan_model(model, tokens, parallel=parallel, stock=stock, workspace=workspace)

    return Longest(
        _last(lambda tokens: bill(tokens).stock <= memory), _last(lambda tokens: bill(tokens).headfold <= memory)
    )


def headfold_step(layer: LayerShape, call: Call, workspace: int = DEFAULT_WORKSPACE) -> Step:
    """Return what a layer takes on headfold: selection with or without a loss, then attention."""
    picks = 8 * call.b * call.sq * min(layer.topk, call.sk)  # int64, as drop-ins hand them on
    attention = _attention(layer, call, picks)
    if not layer.computes:
        return attention
    g = _indexer(layer, call)
    if not (layer.trains and call.training):
        choosing = g.selection(workspace).scratch_bytes
        return attention._replace(forward=max(picks + choosing, attention.forward))
    slab = LossTile.of(call.b, call.sq, g.tile, call.sk, call.np, _key_heads(layer, call), layer.hn, g.topk)
    gradients = (g.q_elements + g.weights_elements + g.k_elements) * g.compute_itemsize
    held = gradients + picks
    selecting = gradients + picks + picks // 2 + slab.backward_bytes
    through_attention = attention.backward + gradients
    through_loss = held + g.gradients_bytes + MIB
    return Step(max(selecting, attention.forward + gradients), held, max(through_attention, through_loss))


def _attention(layer: LayerShape, call: Call, picks: int) -> Step:
    key_heads, size = _key_heads(layer, call), max(4, call.itemsize)
    topk = min(layer.topk, call.sk)
    gathered = gathers(call.sk, topk, call.np, key_heads)
    shape = call.sq, call.sk, topk, call.np, key_heads, layer.hn, layer.v_dim, size, call.itemsize
    tile = AttentionTile.of(gathered, *shape, shared=layer.shared_value)
    if not call.training:
        return Step(picks + tile.forward_bytes, 0, 0)
    keys = call.sk * key_heads * (layer.hn + (0 if layer.shared_value else layer.v_dim))
    gradients = (call.b * call.sq * call.np * layer.hn + call.b * keys) * call.itemsize
    sums = 4 * keys if call.itemsize < 4 else 0
    return Step(picks + tile.forward_bytes, picks, picks + gradients + sums + tile.backward_bytes)


def _indexer(layer: LayerShape, call: Call) -> IndexerGeometry:
    dtype = next(name for name, size in ITEMSIZE.items() if size == call.itemsize)
    return IndexerGeometry(
        call.b, call.sq, call.sk, layer.heads, layer.dim, min(layer.topk, call.sk), dtype, relu=layer.relu
    )


def _key_heads(layer: LayerShape, call: Call) -> int:
    """Key heads of one device: one stays whole where there are fewer than devices."""
    return max(1, layer.np_k * call.np // layer.np)


def _layer(
    model: ModelShape, layer: LayerShape, tokens: int, parallel: Parallel, stock: Stock, workspace: int
) -> LayerBill:
    sq, sk = -(-tokens // parallel.context), -(-tokens // layer.ratio)
    call = Call(model.b, sq, sk, layer.np // parallel.tensor, ITEMSIZE[model.dtype], model.training)
    g = _indexer(layer, call)
    key = call.sk * _key_heads(layer, call) * (layer.hn + (0 if layer.shared_value else layer.v_dim))
    attention = call.b * (call.sq * call.np * (layer.hn + layer.v_dim) + key) * call.itemsize
    inputs = attention + (g.inputs_bytes if layer.computes else 0)
    return LayerBill(inputs, attention, stock(layer, call), headfold_step(layer, call, workspace))


def _hidden(model: ModelShape, tokens: int, parallel: Parallel) -> int:
    """Bytes of the hidden states between two layers."""
    rows = -(-tokens // parallel.context)
    rows = -(-rows // parallel.tensor) if model.shares_hidden else rows
    return model.b * rows * model.hidden * ITEMSIZE[model.dtype]


def _stage(layers: Sequence[tuple[LayerBill, Step]], in_flight: int, model: ModelShape, hidden: int) -> int:
    """Return the peak of a stage: what earlier layers and micro-batches hold, and the layer that works."""
    if not model.training:
        return max((bill.inputs + step.peak for bill, step in layers), default=0)
    peak = before = 0
    for first, end, again in _runs(len(layers), model.recompute):
        before += hidden if again else 0
        inside = before
        for bill, step in layers[first:end]:
            peak = max(peak, inside + bill.inputs + step.peak)
            inside += bill.attention if model.recompute.what == "attention" else bill.inputs + step.held
        before = before if again else inside
    return peak + (in_flight - 1) * before


def _runs(layers: int, recompute: Recompute) -> list[tuple[int, int, bool]]:
    """Cut layers into runs [first, end) that run again as one in backward (True), or hold what they need (False)."""
    if recompute.what == "layers":
        return [(first, end, True) for first, end in blocks(layers, recompute.layers)]
    again = min(recompute.layers, layers) if recompute.what == "first" else 0
    return [*((i, i + 1, True) for i in range(again)), (again, layers, False)]


def _splits(model: ModelShape, parallel: Parallel) -> tuple[int, ...]:
    """Return the layers of each stage."""
    layers, stages = len(model.layers), parallel.stages
    if not stages and layers % parallel.pipeline:
        raise ValueError(f"plan_model: pipeline must divide the layers, got {parallel.pipeline} stages for {layers}.")
    if stages and (sum(stages) != layers or min(stages) < 0):
        raise ValueError(f"plan_model: stages must add up to {layers} layers, got {list(stages)}.")
    for layer in model.layers:
        if layer.np % parallel.tensor:
            raise ValueError(f"plan_model: tensor must divide np = {layer.np} attention heads, got {parallel.tensor}.")
    return stages or (layers // parallel.pipeline,) * parallel.pipeline


def _last(fits: Callable[[int], bool]) -> int:
    """Return the largest number of tokens up to LONGEST that fits, where fewer always fit when more do."""
    low, high = 0, 1
    while high <= LONGEST and fits(high):
        low, high = high, high * 2
    high = min(high, LONGEST + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
