"""Where scratch comes from: torch's allocator, or bytes that the steps of a walk use one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from headfold.loss_slabs import PIECE


class Allocator:
    """Torch's allocator."""

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a dense tensor of any values."""
        return torch.empty(shape, dtype=dtype, device=device)

    @contextmanager
    def step(self) -> Iterator[None]:
        """What is allocated meanwhile is not used afterwards."""
        yield


class Arena(Allocator):
    """Bytes of a device, all allocated at once.

    size: what the largest step takes, and `PIECE` for each of its tensors.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.used = 0

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a dense tensor of any values in bytes that nothing else of this step or of those around it uses."""
        size = dtype.itemsize
        for n in shape:
            size *= n
        end = self.used + size
        if end > self.bytes.numel():
            raise RuntimeError(f"a step takes more than its {self.bytes.numel()} bytes of scratch: {end}")
        piece = self.bytes[self.used : end].view(dtype).view(shape)
        self.used = -(-end // PIECE) * PIECE
        return piece

    @contextmanager
    def step(self) -> Iterator[None]:
        """What is allocated meanwhile is not used afterwards, and its bytes are the next step's."""
        used = self.used
        try:
            yield
        finally:
            self.used = used


FRESH = Allocator()
