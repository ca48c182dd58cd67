"""Index reuse: which layers select and which read another layer's selection, and the carrier of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from headfold.contract import at_least
from headfold.keyrange import KeyRange
from headfold.selection import TopK
from headfold.selection_record import SelectionRecord

INDEXER_TYPES = {"full": True, "F": True, "shared": False, "S": False}


class Stage(NamedTuple):
    """What the layers of one pipeline stage do.

    computes: layers that select for themselves.   reuses: layers that read a selection.
    waits: those of them whose source is before the stage.   needs: that source, or None; its selection has to be handed
    in.   hands: the layer whose selection the next stage needs, or None; it may be one that was handed in.
    """

    computes: tuple[int, ...]
    reuses: tuple[int, ...]
    waits: tuple[int, ...]
    needs: int | None
    hands: int | None


@dataclass(frozen=True)
class ReuseSchedule:
    """Which layers of a whole model compute a selection, and which reuse that of the latest computing layer before.

    Layers count from 0 over the whole model, on every pipeline stage: Megatron's layer_number is the index + 1.

    Args:
        computing: one bool a layer; True computes, False reuses.

    Raises: TypeError for anything but bools; ValueError for no layers, or a first layer that reuses.
    """

    computing: tuple[bool, ...]

    def __post_init__(self) -> None:
        """Refuse a schedule in which a layer has nothing to reuse."""
        op = "ReuseSchedule"
        if not isinstance(self.computing, tuple) or not all(isinstance(full, bool) for full in self.computing):
            raise TypeError(f"{op}: computing must be a tuple of bools, got {self.computing!r}.")
        if not self.computing:
            raise ValueError(f"{op}: computing must name at least one layer, got none.")
        if not self.computing[0]:
            raise ValueError(
                f"{op}: layer 0 must compute, got one that reuses. Give the schedule of the whole model; a pipeline "
                "stage that starts on a reuse layer takes IndexReuse(schedule, handed=...)."
            )

    @classmethod
    def explicit(cls, computing: Iterable[bool]) -> ReuseSchedule:
        """Take one bool a layer: True computes, False reuses."""
        return cls(tuple(computing))

    @classmethod
    def every(cls, layers: int, n: int, *, offset: int = 0) -> ReuseSchedule:
        """Every n-th layer computes, and so do all layers before the offset.

        Args:
            layers: layers of the model.
            n: Megatron's dsa_indexer_topk_freq; 1 means that every layer computes.
            offset: Megatron's dsa_indexer_skip_topk_offset: the number (from 1) of the first computing layer of the
                period; 0 means 1.

        Source: megatron-core 0.19.2, is_dsa_skip_topk_layer. transformers' index_topk_freq and index_skip_topk_offset
        mean the same but for offset 0, where its first layer would reuse.
        """
        op = "ReuseSchedule.every"
        at_least(op, "layers", layers, 1)
        at_least(op, "n", n, 1)
        at_least(op, "offset", offset, 0)
        first = max(offset, 1) - 1
        return cls(tuple(layer <= first or (layer - first) % n == 0 for layer in range(layers)))

    @classmethod
    def from_indexer_types(cls, indexer_types: Iterable[str]) -> ReuseSchedule:
        """Read transformers' config.indexer_types ("full", "shared") or a pattern such as "FSSF".

        Source: transformers 5.23.0, GlmMoeDsaConfig.
        """
        types = tuple(indexer_types)
        for layer, name in enumerate(types):
            if name not in INDEXER_TYPES:
                known = ", ".join(map(repr, INDEXER_TYPES))
                raise ValueError(
                    f"ReuseSchedule.from_indexer_types: layer {layer} must be one of {known}, got {name!r}."
                )
        return cls(tuple(INDEXER_TYPES[name] for name in types))

    def __len__(self) -> int:
        return len(self.computing)

    def computes(self, layer: int) -> bool:
        """Whether a layer computes its selection."""
        return self.computing[self._known("computes", layer)]

    def source(self, layer: int) -> int:
        """Return the layer whose selection this one uses: itself, or the latest computing layer before it."""
        layer = self._known("source", layer)
        while not self.computing[layer]:
            layer -= 1
        return layer

    def stage(self, first: int, end: int) -> Stage:
        """Return what the layers first to end - 1 do when they are one pipeline stage (or one virtual chunk of it).

        Args:
            first: first layer of the stage.
            end: one past its last layer.
        """
        self._known("stage", first)
        at_least("ReuseSchedule.stage", "end", end, first + 1)
        self._known("stage", end - 1)
        layers = range(first, end)
        waits = tuple(layer for layer in layers if self.source(layer) < first)
        return Stage(
            computes=tuple(layer for layer in layers if self.computing[layer]),
            reuses=tuple(layer for layer in layers if not self.computing[layer]),
            waits=waits,
            needs=self.source(first) if waits else None,
            hands=self.source(end) if end < len(self) and not self.computing[end] else None,
        )

    def _known(self, method: str, layer: int) -> int:
        at_least(f"ReuseSchedule.{method}", "layer", layer, 0)
        if layer >= len(self):
            raise ValueError(
                f"ReuseSchedule.{method}: layer must be below the schedule's {len(self)} layers, got {layer}."
            )
        return layer


class IndexReuse:
    """The selections of one forward pass of one micro-batch, by the layer that made them.

    Make one where the forward pass starts, hand it down the layers, and drop it: it holds nothing global, and what it
    keeps goes when it goes. Every layer makes the same call, `select`. Activation recomputation runs layers again in
    backward, in another order: a reuse layer reads by its source, not by what ran last, and a computing layer gets
    back what it selected in the forward pass, bit for bit, without scoring again. Reentrant and non-reentrant
    checkpointing keep the carrier alive as long as they may need it.

    No tensor data is read on the host, as CUDA graph capture demands, and a pass compiles with fullgraph=True.
    Checkpoints inside the compiled function need
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True; what is recomputed there is the
    compiler's choice, and it may be the selection.

    Args:
        schedule: of the whole model.
        handed: the selection that the previous pipeline stage handed over, with its layer; see `hand_over`. One from
            another process has the layer's static range, or is bound to this stage's tensors by
            `SelectionRecord.rebind`.

    Memory: the selections, 4 · b · sq · topk bytes a computing layer for int32 indices (and their scores where compute
    returns them), until it is dropped.

    Raises: TypeError or ValueError for a handed-over selection that names no computing layer.
    """

    def __init__(self, schedule: ReuseSchedule, *, handed: SelectionRecord | None = None) -> None:
        self.schedule = schedule
        self._kept: dict[int, SelectionRecord] = {}
        self._handed = handed
        self._replaying = False
        if handed is not None:
            _source_of("IndexReuse", "handed", handed, schedule)

    @classmethod
    def replay(cls, schedule: ReuseSchedule, records: Iterable[SelectionRecord]) -> IndexReuse:
        """Return a carrier that serves every layer from records and never computes.

        A layer whose source has no record raises. Records that were loaded have the range in tensors of their own:
        bind them with `SelectionRecord.rebind`.

        Args:
            schedule: of the whole model.
            records: selections of computing layers, each with its layer.
        """
        reuse = cls(schedule)
        reuse._replaying = True
        for record in records:
            layer = _source_of("IndexReuse.replay", "records", record, schedule)
            if layer in reuse._kept:
                raise ValueError(f"IndexReuse.replay: records must hold a layer once, got layer {layer} twice.")
            reuse._kept[layer] = record
        return reuse

    def select(
        self,
        layer: int,
        compute: Callable[[], TopK] | None = None,
        *,
        b: int,
        sq: int,
        sk: int,
        topk: int,
        keys: KeyRange | None = None,
    ) -> TopK:
        """Return the layer's selection: its own, computed once a pass, or its source's.

        Args:
            layer: 0-based index in the whole model.
            compute: makes the selection of a computing layer, under no_grad and at most once; not called for a layer
                that reuses. What else a training step needs of the indexer (its loss) is made outside, on every run.
            b: batch size of this call; 1 for layout thd.
            sq: query rows of this call.
            sk: keys of this call.
            topk: selection width of this call.
            keys: range of this call, as given to `index_topk`; KeyRange.causal(sq, sk) for causal=True.

        Returns:
            TopK(indices [b, sq, topk], scores alike or None).

        Raises: ValueError when the source's selection is not here, was made for other rows, keys, width or range, or
        when a layer computes a second time in one forward pass.
        """
        op = f"IndexReuse.select, layer {layer}"
        source = self.schedule.source(layer)
        record = self._kept.get(source)
        if source == layer and not self._replaying:
            if record is None:
                record = self._compute(op, layer, compute, sk, keys)
                record.check(op, b=b, sq=sq, sk=sk, topk=topk, keys=keys)
                self._kept[layer] = record
            elif not _recomputing():
                raise ValueError(
                    f"{op}: a carrier lives for one forward pass, got a second selection outside of backward. Make an "
                    "IndexReuse for each pass, or IndexReuse.replay(schedule, reuse.records()) to run this one again."
                )
        if record is None:
            record = self._handed_over("IndexReuse.select", layer, source)
        record.check(op, b=b, sq=sq, sk=sk, topk=topk, keys=keys)
        return TopK(record.indices, record.scores)

    def records(self) -> tuple[SelectionRecord, ...]:
        """Return the selections made in this pass, by layer: to save, to compare, to replay."""
        return tuple(self._kept[layer] for layer in sorted(self._kept))

    def hand_over(self, first: int) -> SelectionRecord | None:
        """Return the selection that a next pipeline stage needs, None when it starts on a computing layer.

        It may be one that was handed to this stage. Sending it is the caller's: its indices, beside the activations;
        the other side makes a SelectionRecord of them with the same layer, sk and range.

        Args:
            first: first layer of the next stage.

        Raises: ValueError when it is not here.
        """
        source = self.schedule.source(first)
        if source == first:
            return None
        record = self._kept.get(source)
        return self._handed_over("IndexReuse.hand_over", first, source) if record is None else record

    def _compute(
        self, op: str, layer: int, compute: Callable[[], TopK] | None, sk: int, keys: KeyRange | None
    ) -> SelectionRecord:
        if compute is None:
            raise ValueError(f"{op}: compute must be given for a layer that computes, got None.")
        if self._handed is not None and self._handed.layer == layer:
            raise ValueError(
                f"{op}: handed must come from a layer before this stage, got the selection of this layer itself. "
                "Layers count from 0: Megatron's layer_number - 1."
            )
        # A checkpoint counts what its first run saves for backward, and the second run does not come here.
        with torch.no_grad():
            indices, scores = compute()
        return SelectionRecord(indices, sk, keys, scores, layer)

    def _handed_over(self, op: str, layer: int, source: int) -> SelectionRecord:
        if self._handed is not None and self._handed.layer == source:
            return self._handed
        kept = ", ".join(str(known) for known in sorted(self._kept)) or "none"
        handed = "none" if self._handed is None else str(self._handed.layer)
        what = f"needs its record of layer {source}" if self._replaying else f"reuses the selection of layer {source}"
        way = (
            "Give a record of every computing layer."
            if self._replaying
            else "Run that layer before it, or give IndexReuse(schedule, handed=...) what the stage before handed over."
        )
        raise ValueError(f"{op}: layer {layer} {what}, got selections of layers: {kept}; handed over: {handed}. {way}")


def _source_of(op: str, name: str, record: SelectionRecord, schedule: ReuseSchedule) -> int:
    if not isinstance(record, SelectionRecord):
        raise TypeError(f"{op}: {name} must be a SelectionRecord, got {type(record).__name__}.")
    layer = record.layer
    if layer is None or layer >= len(schedule) or not schedule.computes(layer):
        raise ValueError(f"{op}: {name} must name a layer that computes in the schedule, got layer {layer}.")
    return layer


def _recomputing() -> bool:
    """Whether autograd is running backward on this thread, as it does whenever a checkpoint runs a layer again."""
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1
