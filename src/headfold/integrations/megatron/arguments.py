"""Megatron-Core's arguments as headfold takes them: dtypes, heads, bounds, masks, key positions, valid rows."""

from __future__ import annotations

import torch
from torch import Tensor

from headfold.keyrange import INT32, KeyRange
from headfold.tiles import MIB, blocks


def activation(use_relu: bool) -> str | None:
    """Name what stands between logits and weights."""
    return "relu" if use_relu else None


def together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Give tensors one dtype: their own, or float32, in which Megatron computes, for float64 and for several."""
    dtypes = {x.dtype for x in tensors}
    return tensors if len(dtypes) == 1 and torch.float64 not in dtypes else tuple(x.float() for x in tensors)


def four_axes(x: Tensor) -> Tensor:
    """View packed [t, np, hn] as [t, 1, np, hn]."""
    return x.unsqueeze(1) if x.dim() == 3 else x


def heads_once(x: Tensor) -> Tensor:
    """View heads that were expanded from one as that one, so that no cast or gather makes copies of it."""
    return x[:, :, :1] if x.stride(2) == 0 else x


def bounds(
    op: str,
    mask: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    positions: Tensor | None,
    device: torch.device,
) -> tuple[KeyRange | None, Tensor | None]:
    """Return the range of varlen bounds, and the order of keys in which it is one; None without either.

    Args:
        op: for sentences.
        mask: excludes bounds.
        starts: integer [sq]; row s sees the keys whose position p has starts[s] <= p < ends[s].
        ends: as starts.
        positions: integer [sk], position of each key, in any order; None means 0 to sk - 1.
        device: of the call.
    """
    if mask is not None and starts is not None:
        raise ValueError(f"{op}: mask and varlen_starts exclude each other, got both.")
    if starts is None:
        return None, None
    if ends is None:
        raise ValueError(f"{op}: varlen_starts needs varlen_ends, got varlen_ends=None.")
    starts, ends = starts.to(device), ends.to(device)
    if positions is None:
        return KeyRange(starts.clamp(0, INT32).int(), ends.clamp(0, INT32).int()), None
    ordered, order = positions.to(device).long().sort(stable=True)
    start, end = (torch.searchsorted(ordered, x.long()).int() for x in (starts, ends))
    return KeyRange(start, end), order


def additive(mask: Tensor | None) -> Tensor | None:
    """View a mask [sq, sk] or [b, sq, sk] as a bias."""
    if mask is None:
        return None
    mask = mask.detach()
    return mask.unsqueeze(0) if mask.dim() == 2 else mask


def hides_or_not(op: str, mask: Tensor | None, why: str) -> None:
    """Refuse a mask that holds anything but 0 and -inf, and say why.

    On an accelerator nothing is read back: the refusal is an assertion of the device, met when it gets there.
    """
    if mask is None or mask.numel() == 0:
        return
    need = f"{op}: mask must hold 0 and -inf alone, got another value. {why}: undo the patch for it."
    rows, keys = mask.shape[-2:]
    plain = torch.ones((), dtype=torch.bool, device=mask.device)
    for span in blocks(rows, max(1, MIB // max(1, keys))):
        block = mask[..., slice(*span), :]
        plain &= ((block == 0) | (block == float("-inf"))).all()
    if mask.device.type != "cpu":
        torch._assert_async(plain, need)
    elif not plain:
        raise ValueError(need)


def picks(indices: Tensor, device: torch.device) -> Tensor:
    """Return indices as headfold reads them: int32 or int64, on the device of the call."""
    indices = indices.to(device)
    return indices if indices.dtype in (torch.int32, torch.int64) else indices.long()


def in_order(indices: Tensor, order: Tensor | None) -> Tensor:
    """Map indices into ordered keys back to the keys as they came; -1 stays."""
    if order is None:
        return indices
    return torch.where(indices < 0, indices, order[indices.clamp(min=0).long()].to(indices.dtype))


def valid_rows(op: str, rows: Tensor | None, b: int, sq: int, device: torch.device) -> Tensor | None:
    """Return query_valid_rows, [sq], [1, sq] or [b, sq], as bool [b, sq]."""
    if rows is None:
        return None
    if rows.shape not in ((sq,), (1, sq), (b, sq)):
        raise ValueError(
            f"{op}: query_valid_rows must be [sq] = [{sq}], [1, {sq}] or [b, sq] = [{b}, {sq}], got {list(rows.shape)}."
        )
    return rows.to(device=device, dtype=torch.bool).expand(b, sq)
