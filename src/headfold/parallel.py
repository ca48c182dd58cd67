"""What runs over several processes: one sum over a group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor


def summing(op: str, group: Any) -> Callable[[Tensor], None] | None:
    """Return what sums a tensor over the group in place, or None without a group; refuse a group that cannot."""
    if group is None:
        return None
    need = f"{op}: group must be an initialised process group that this process belongs to"
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{need}, got one while torch.distributed is not initialised. Call init_process_group first.")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{need}, got {type(group).__name__}.")
    try:
        member = dist.get_rank(group) >= 0
    except (RuntimeError, ValueError):
        raise ValueError(f"{need}, got one that was destroyed or never registered.") from None
    if not member:
        raise ValueError(f"{need}, got one of other processes.")
    return partial(_sum, group)


def _sum(group: Any, x: Tensor) -> None:
    dist.all_reduce(x, group=group)
