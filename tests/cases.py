"""Inputs that the tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headfold import KeyRange


@dataclass(frozen=True)
class Case:
    """A call of index_scores in layout sbhd: sizes, and a name for the keys that rows may see."""

    sq: int
    sk: int
    b: int = 1
    h: int = 4
    d: int = 16
    visible: str = "all"
    activation: str | None = "relu"
    weighted: bool = True
    scale: float = 1.0

    def __str__(self) -> str:
        parts = [f"b{self.b}", f"q{self.sq}", f"k{self.sk}", f"h{self.h}", f"d{self.d}", self.visible]
        parts += [] if self.activation else ["linear"]
        parts += [] if self.weighted else ["unit"]
        return "-".join(parts)

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(seed)

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        q, weights, k = (
            make(self.sq, self.b, self.h, self.d),
            make(self.sq, self.b, self.h),
            make(self.sk, self.b, self.d),
        )
        return [q, weights if self.weighted else None, k]

    def incoming(self, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.b, self.sq, self.sk, generator=generator, dtype=torch.float64)

    def call(self) -> dict[str, Any]:
        call: dict[str, Any] = {"activation": self.activation, "scale": self.scale}
        rows = torch.arange(self.sq, dtype=torch.int32)
        if self.visible == "causal":
            call["causal"] = True
        elif self.visible == "window":
            call["keys"] = KeyRange.sliding(self.sq, self.sk, 5)
        elif self.visible == "ratio":
            call["keys"] = KeyRange(offset=3, ratio=4)
        elif self.visible == "ragged":  # some rows see nothing, some all
            call["keys"] = KeyRange(start=rows % 3, end=(rows * 7) % (self.sk + 2) - 1)
        elif self.visible == "per batch":
            ends = torch.stack([(rows + i) % (self.sk + 1) for i in range(self.b)])
            call["keys"] = KeyRange(end=ends.int(), offset=self.sk)
        elif self.visible == "bias":
            bias = torch.randn(self.b, self.sq, self.sk, generator=torch.Generator().manual_seed(3))
            bias[:, ::3, ::2] = float("-inf")
            bias[:, -1:] = float("-inf")
            call["bias"] = bias
        return call


# rows x keys of one tile at h=32 are 64 x 768: the first two cross tile borders both ways.
CASES = [
    Case(131, 1603, h=32, d=16, visible="causal"),
    Case(70, 800, b=2, h=32, d=8),
    Case(37, 53, b=2, h=3, d=80, visible="causal"),
    Case(53, 37, b=2, h=5, d=24, visible="causal"),
    Case(33, 64, h=1, d=32),
    Case(40, 48, h=16, d=1),
    Case(40, 41, b=3, h=7, d=33, visible="window", scale=0.25),
    Case(40, 41, b=2, h=8, d=16, visible="ragged"),
    Case(40, 41, b=2, h=8, d=16, visible="per batch"),
    Case(40, 12, b=2, h=8, d=16, visible="ratio"),
    Case(40, 41, b=2, h=8, d=16, visible="bias", scale=3.0),
    Case(40, 41, b=2, h=8, d=16, weighted=False),
    Case(131, 900, h=32, d=16, visible="causal", activation=None),
    Case(40, 41, b=2, h=8, d=16, visible="bias", activation=None, scale=-0.5),
]
