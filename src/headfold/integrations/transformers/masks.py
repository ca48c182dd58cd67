"""What stands for a mask of queries by keys in a model on headfold: a range of keys per row, and padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from headfold.contract import UnsupportedError
from headfold.integrations.transformers.models import COMPOSITES, MODEL_TYPES, check_attention
from headfold.keyrange import KeyRange

NAME = "headfold"


class Selected(NamedTuple):
    """A selection in a mask's place, for attentions that make one of it: int32 [b, sq, n], -1 for none."""

    indices: Tensor


class VisibleKeys:
    """The keys that each row may see, in [b, sq] bounds and [b, sk] padding instead of [b, 1, sq, sk].

    Models index a mask by batch, head and row before they hand it on; all layers of a pass share this one, so that any
    index returns it as it is.

    keys: the range.   padding: bool [b, sk], false where a key is padding, or None.   rows: bool [b, sq], false for
    rows that are padding themselves, or None.   dtype: what a mask that is true where a key is seen has.
    """

    dtype = torch.bool

    def __init__(self, keys: KeyRange, sq: int, sk: int, padding: Tensor | None, rows: Tensor | None) -> None:
        self.keys, self.sq, self.sk, self.padding, self.rows = keys, sq, sk, padding, rows
        self._bias: Tensor | None = None

    def __getitem__(self, index: Any) -> VisibleKeys:
        return self

    def __and__(self, selected: Selected) -> Selected:
        """Narrow it to a selection, which holds nothing that it hides."""
        return selected

    def contiguous(self) -> VisibleKeys:
        """Return itself; `generate` asks every mask for it."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> VisibleKeys:
        """Move what it holds, as a tensor does; models spread over devices ask for it between layers."""
        start, end, padding, rows = (
            x if x is None else x.to(*args, **kwargs) for x in (self.keys.start, self.keys.end, self.padding, self.rows)
        )
        keys = KeyRange(start, end, self.keys.offset, self.keys.ratio)
        return VisibleKeys(keys, self.sq, self.sk, padding, rows)

    def own(self, device: torch.device) -> Tensor:
        """Return each row's own place among the keys, [1 or b, sq]."""
        if self.keys.end is not None:
            return self.keys.end.to(device).long() - 1
        return (torch.arange(self.sq, device=device) + (self.keys.offset or 0)).unsqueeze(0)

    @property
    def bias(self) -> Tensor | None:
        """[b, sq, sk] float32, -inf at padding, of stride 0 over rows: it holds [b, sk] numbers."""
        if self._bias is None and self.padding is not None:
            hidden = torch.zeros(self.padding.shape, device=self.padding.device)
            hidden = hidden.masked_fill_(~self.padding, -torch.inf)
            self._bias = hidden.unsqueeze(1).expand(-1, self.sq, -1)
        return self._bias

    def every_key(self, b: int, device: torch.device) -> Tensor:
        """Return the selection [b, sq, sk] of all keys but padding, int32, of stride 0 over rows."""
        keys = torch.arange(self.sk, dtype=torch.int32, device=device).expand(b, -1)
        if self.padding is not None:
            keys = keys.where(self.padding, -1)
        return keys.unsqueeze(1).expand(-1, self.sq, -1)


def mask_for(*, config: Any, mask_function: Callable[..., Any], **asked: Any) -> VisibleKeys | Tensor | None:
    """Answer transformers' call for a mask; registered as the mask of "headfold".

    Encoders beside a text model, which take its attention's name over and see keys on both sides, get sdpa's mask.

    Raises: UnsupportedError for a causal mask of a model type that is not covered; what `visible_keys` raises.
    """
    name = config.model_type
    if COMPOSITES.get(name, name) not in MODEL_TYPES and _both_ways(mask_function, config):
        mask: Tensor | None = sdpa_mask(config=config, mask_function=mask_function, **asked)
        return mask
    check_attention(config)
    return visible_keys(config=config, mask_function=mask_function, **asked)


def _both_ways(mask_function: Callable[..., Any], config: Any) -> bool:
    return mask_function is bidirectional_mask_function or not getattr(config, "is_causal", True)


def visible_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> VisibleKeys:
    """Make the mask that a text model asks for, without making it.

    The keys that a row sees must be those from some first one to its own: causal, sliding and packed masks are so. The
    first is found by bisection, mask_function being asked for [b, sq] pairs of a row and a key at a time.

    Args: those of transformers' mask functions. q_offset, kv_offset: absolute position of the first row and key.

    Memory: 8 · b · sq + b · sk bytes.

    Raises: UnsupportedError for masks that were composed by the caller, or that are not causal.
    """
    if use_vmap or _both_ways(mask_function, config):
        found = "a mask function of the caller's" if use_vmap else "a mask of both directions"
        raise UnsupportedError(
            f'attn_implementation="{NAME}" needs rows that see keys up to their own, got {found}. Give a bool mask '
            "[b, 1, sq, sk] instead."
        )
    sq, sk = q_length, kv_length
    rows = torch.arange(sq, device=device)
    own = (rows + (q_offset - kv_offset)).expand(batch_size, sq)  # each row's own place among the keys
    # The last row's key is among the keys, so that this bound holds where q_offset is a tensor that is not read here.
    static = isinstance(q_offset, int)
    offset = q_offset - kv_offset if isinstance(q_offset, int) else sk - sq
    start = None
    if mask_function is not causal_mask_function:
        start = _first(mask_function, own, kv_offset, sk).int()
    end = None if static else (own + 1).clamp(max=sk).int()
    padding = prepare_padding_mask(attention_mask, sk, kv_offset)
    kept = None
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + sk].to(device=device, dtype=torch.bool)
        kept = padding.gather(1, own)
    return VisibleKeys(KeyRange(start, end, offset), sq, sk, padding, kept)


def _first(mask_function: Callable[..., Any], own: Tensor, kv_offset: int, sk: int) -> Tensor:
    """Return the first key [b, sq] that each row sees, given that it sees its own and none that it sees is apart."""
    batch = torch.arange(own.shape[0], device=own.device)[:, None]
    head = batch.new_zeros(())
    row = own[:1] + kv_offset
    low, high = torch.zeros_like(own), own.contiguous()
    for _ in range(sk.bit_length()):
        middle = (low + high) // 2
        seen = mask_function(batch, head, row, middle + kv_offset)
        low, high = torch.where(seen, low, (middle + 1).minimum(high)), torch.where(seen, middle, high)
    return high
