"""SelectionRecord: one selection with what it was made for, checked at every reading, and kept in a file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headfold.contract import DTYPES, at_least
from headfold.keyrange import KeyRange

FORMAT, VERSION = "headfold.selection", "1"
INDEX_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class SelectionRecord:
    """A selection and the call it was made for: what a reuse layer reads, a file holds and a comparison compares.

    Args:
        indices: int32 or int64 [b, sq, topk], score-descending, -1 where a row ran out of keys.
        sk: number of keys it was selected from.
        keys: the range that the rows saw; None means every key. A call with causal=True saw KeyRange.causal(sq, sk). A
            bias is not recorded.
        scores: [b, sq, topk], or None.
        layer: 0-based index of the layer that selected, or None.

    Memory: it refers to the tensors that it is given.

    Raises: TypeError or ValueError for tensors that do not fit one another.
    """

    indices: Tensor
    sk: int
    keys: KeyRange | None = None
    scores: Tensor | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no reader could use, by dtypes and shapes alone."""
        op = "SelectionRecord"
        if not isinstance(self.indices, Tensor) or self.indices.dtype not in INDEX_DTYPES:
            got = self.indices.dtype if isinstance(self.indices, Tensor) else type(self.indices).__name__
            raise TypeError(f"{op}: indices must be an int32 or int64 tensor, got {got}.")
        if self.indices.dim() != 3:
            raise ValueError(f"{op}: indices must be [b, sq, topk], got shape {list(self.indices.shape)}.")
        at_least(op, "sk", self.sk, 0)
        if self.layer is not None:
            at_least(op, "layer", self.layer, 0)
        if self.scores is not None and not isinstance(self.scores, Tensor):
            raise TypeError(f"{op}: scores must be a tensor or None, got {type(self.scores).__name__}.")
        if self.scores is not None and (self.scores.dtype not in DTYPES or self.scores.shape != self.indices.shape):
            raise ValueError(
                f"{op}: scores must be floating and shaped as indices, {list(self.indices.shape)}, "
                f"got {self.scores.dtype} {list(self.scores.shape)}."
            )
        if self.keys is None:
            return
        if not isinstance(self.keys, KeyRange):
            raise TypeError(f"{op}: keys must be a KeyRange or None, got {type(self.keys).__name__}.")
        b, sq, _ = self.indices.shape
        for name, bound in (("start", self.keys.start), ("end", self.keys.end)):
            if bound is not None and bound.shape not in ((sq,), (b, sq)):
                raise ValueError(
                    f"{op}: keys.{name} must be [sq] = [{sq}] or [b, sq] = [{b}, {sq}], got {list(bound.shape)}."
                )

    def check(self, op: str, *, b: int, sq: int, sk: int, topk: int, keys: KeyRange | None) -> None:
        """Raise one sentence unless this selection was made for such a call.

        No tensor data is read, so it runs while a CUDA graph is captured and while torch.compile traces. Ranges match
        when their static ints are equal and their tensors are the same memory (while compiling, the same object):
        equal values in other tensors could only be told from different ones by reading both, so they are refused.
        Make the range once a forward pass and give it to every layer, or bind an equal one with `rebind`. A tensor
        that was written to in between is not noticed.

        Args:
            op: how the sentence starts.
            b: batch size of the call; 1 for layout thd.
            sq: its query rows.
            sk: its keys.
            topk: its selection width.
            keys: its range; None means every key.

        Raises: ValueError naming what differs.
        """
        own_b, own_sq, own_topk = self.indices.shape
        pairs = (("b", b, own_b), ("sq", sq, own_sq), ("sk", sk, self.sk), ("topk", topk, own_topk))
        for name, wanted, own in pairs:
            if wanted != own:
                raise ValueError(
                    f"{op}: needs a selection for {name} = {wanted}, got the {self._name} for {name} = {own}. A "
                    "selection serves only the rows and keys that it was made for."
                )
        difference = _difference(self.keys, keys)
        if difference is not None:
            raise ValueError(
                f"{op}: keys must be the range that the {self._name} was made with, got {difference}. Make the range "
                "once a forward pass and give it to every layer, or bind an equal one with SelectionRecord.rebind."
            )

    def rebind(self, keys: KeyRange | None) -> SelectionRecord:
        """Return this selection bound to `keys`, an equal range in other tensors: one that was loaded or received.

        This compares values, so it waits for the device: call it once when a selection arrives, never in a forward
        pass.

        Args:
            keys: the range that calls will give.

        Raises: ValueError when a row's bounds differ.
        """
        op = "SelectionRecord.rebind"
        bound = dataclasses.replace(self, keys=keys)
        if _static(self.keys) != _static(keys):
            raise ValueError(
                f"{op}: keys must equal the range of the {self._name}, got {_difference(self.keys, keys)}."
            )
        for name, default in (("start", 0), ("end", self.sk)):
            mine, theirs = (self._values(range_, name, default) for range_ in (self.keys, keys))
            differing = int((mine != theirs).sum())
            if differing:
                raise ValueError(f"{op}: keys.{name} must equal the {self._name}'s, got {differing} rows that differ.")
        return bound

    def save(self, path: Path | str) -> None:
        """Write this selection to a safetensors file, with its range, layer and sk.

        Args:
            path: file to write; one that exists is replaced.

        Raises: ValueError when it cannot be written; ModuleNotFoundError without safetensors.
        """
        op = "SelectionRecord.save"
        safetensors = _safetensors(op)
        keys = self.keys or KeyRange()
        found = {"indices": self.indices, "scores": self.scores, "start": keys.start, "end": keys.end}
        # Copies, because safetensors refuses tensors that share memory, as a range's two bounds may.
        tensors = {
            name: x.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, x in found.items()
            if x is not None
        }
        numbers = {"sk": self.sk, "layer": self.layer, "offset": keys.offset, "ratio": keys.ratio}
        metadata = {name: str(number) for name, number in numbers.items() if number is not None}
        try:
            safetensors.torch.save_file(tensors, Path(path), {"format": FORMAT, "version": VERSION, **metadata})
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{op}: path must be a file that can be written, got {path} ({error}).") from error

    @classmethod
    def load(cls, path: Path | str, *, device: torch.device | str = "cpu") -> SelectionRecord:
        """Read what `save` wrote, bit for bit, checking every index on the way.

        Args:
            path: file to read.
            device: where the tensors go.

        Raises: ValueError in one sentence for a file that is missing, malformed or of another version;
        ModuleNotFoundError without safetensors.
        """
        op, path = "SelectionRecord.load", Path(path)
        safetensors = _safetensors(op)
        if not path.is_file():
            raise ValueError(f"{op}: path must be a safetensors file, got {path}, which is not a file.")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{op}: {path.name} must be a safetensors file, got one that does not open.") from error
        if metadata.get("format") != FORMAT or "indices" not in tensors:
            raise ValueError(
                f"{op}: {path.name} must be a file of SelectionRecord.save, "
                f"got one that holds {', '.join(sorted(tensors)) or 'nothing'}."
            )
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"{op}: {path.name} must have version {VERSION} of its format, "
                f"got {metadata.get('version')!r}. Save it again with this headfold."
            )
        sk, layer, offset, ratio = (_whole(op, path, metadata, name) for name in ("sk", "layer", "offset", "ratio"))
        try:
            keys = KeyRange(tensors.get("start"), tensors.get("end"), offset, 1 if ratio is None else ratio)
            if sk is None:
                raise ValueError("metadata sk must be given, got none")
            plain = offset is None and keys.start is None and keys.end is None
            record = cls(tensors["indices"], sk, None if plain else keys, tensors.get("scores"), layer)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{op}: {path.name} must hold one whole selection: {error}") from error
        outside = int(((record.indices < -1) | (record.indices >= sk)).sum())
        if outside:
            raise ValueError(
                f"{op}: indices in {path.name} must be from -1 to sk - 1 = {sk - 1}, got {outside} others."
            )
        return record.to(device)

    def to(self, device: torch.device | str) -> SelectionRecord:
        """Return this selection with every tensor on a device; what is there already is not copied."""
        keys = self.keys
        if keys is not None:
            start, end = (None if x is None else x.to(device) for x in (keys.start, keys.end))
            keys = keys if start is keys.start and end is keys.end else dataclasses.replace(keys, start=start, end=end)
        scores = None if self.scores is None else self.scores.to(device)
        return dataclasses.replace(self, indices=self.indices.to(device), keys=keys, scores=scores)

    @property
    def _name(self) -> str:
        return "selection" if self.layer is None else f"selection of layer {self.layer}"

    def _values(self, keys: KeyRange | None, name: str, default: int) -> Tensor:
        """One bound of every row [b, sq] as ops read it: clamped to the keys that there are."""
        bound = None if keys is None else getattr(keys, name)
        shape = self.indices.shape[:2]
        return torch.full(shape, default) if bound is None else bound.cpu().clamp(0, self.sk).expand(shape)


def _static(keys: KeyRange | None) -> tuple[int | None, int]:
    return (None, 1) if keys is None or keys.offset is None else (keys.offset, keys.ratio)


def _difference(own: KeyRange | None, given: KeyRange | None) -> str | None:
    """Say in what the given range is not known to be the own one; None when it is the same."""
    if _static(own) != _static(given):
        (offset, ratio), (other, other_ratio) = _static(own), _static(given)
        return f"offset = {other}, ratio = {other_ratio} where the selection's are {offset} and {ratio}"
    own, given = own or KeyRange(), given or KeyRange()
    for name, mine, theirs in (("start", own.start, given.start), ("end", own.end, given.end)):
        if mine is None and theirs is None:
            continue
        if mine is None or theirs is None:
            given_one, own_one = ("no", "one") if theirs is None else ("one", "none")
            return f"{given_one} {name} where the selection has {own_one}"
        if not _same_memory(mine, theirs):
            return f"another tensor for {name}"
    return None


def _same_memory(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if torch.compiler.is_compiling():  # addresses are not known while tracing
        return False
    # Checkpointing detaches its inputs: a new object over the same memory.
    placed = a.device == b.device and a.data_ptr() == b.data_ptr()
    return placed and a.shape == b.shape and a.stride() == b.stride()


def _whole(op: str, path: Path, metadata: dict[str, str], name: str) -> int | None:
    text = metadata.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{op}: metadata {name} of {path.name} must be a whole number, got {text!r}.") from None


def _safetensors(op: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{op}: needs {error.name}, which is not installed. Install it with pip install 'headfold[cli]'."
        ) from error
    return safetensors
