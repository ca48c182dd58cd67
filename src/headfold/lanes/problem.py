"""Problem: the tensors that every lane works on, made from a geometry or read from a capture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headfold.contract import DTYPES, compute_dtype
from headfold.geometry import IndexerGeometry
from headfold.layout import AXES, LAYOUTS, batch_first

NAMES = ("q", "weights", "k")


@dataclass(frozen=True)
class Problem:
    """Where q, weights and k come from.

    geometry: their shape.   causal, scale: arguments of the call.   path: the capture they are read from; None makes
    random ones.
    """

    geometry: IndexerGeometry
    causal: bool = False
    scale: float = 1.0
    path: Path | None = None
    source: str = "standard normal q and k, normal weights of either sign, seed 0"

    def tensors(self, device: torch.device, dtype: torch.dtype | None = None, *, grad: bool = False) -> list[Tensor]:
        """Return fresh q, weights and k in layout sbhd on a device, rounded to `dtype` (the geometry's when None)."""
        dtype = dtype or getattr(torch, self.geometry.dtype)
        found = _random(self.geometry, device, dtype) if self.path is None else _read(self.path)[0]
        return [x.to(device, dtype).requires_grad_(grad) for x in found]


def normal(shape: Sequence[int], device: torch.device, dtype: str, seed: int = 1) -> Tensor:
    """Return fixed normal numbers in the compute dtype of inputs of `dtype`."""
    generator = torch.Generator(device).manual_seed(seed)
    made = compute_dtype(getattr(torch, dtype))
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=made)


def _random(g: IndexerGeometry, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = (g.sq, g.b, g.heads, g.dim), (g.sq, g.b, g.heads), (g.sk, g.b, g.dim)
    made = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    return [torch.randn(shape, generator=generator, device=device, dtype=made).to(dtype) for shape in shapes]


def from_file(path: Path, option: str = "--inputs") -> Problem:
    """Read a capture: a safetensors file with q, weights and k, and metadata layout, causal, scale, topk and source.

    Metadata defaults: layout "sbhd", causal "false", scale "1.0", topk "0". `option` is what the user gave it as.

    Raises: ValueError naming what is missing or malformed.
    """
    tensors, metadata = _read(path, option)
    q, weights, k = tensors
    (sq, b, heads, dim), sk = q.shape, k.shape[0]
    if weights.shape != (sq, b, heads) or tuple(k.shape) != (sk, b, dim):
        raise ValueError(
            f"{option}: q, weights and k in {path.name} must agree in b, sq, h and d, "
            f"got (as sbhd) q {list(q.shape)}, weights {list(weights.shape)}, k {list(k.shape)}."
        )
    if k.dtype != q.dtype:
        raise ValueError(f"{option}: k in {path.name} must have q's dtype {q.dtype}, got {k.dtype}.")
    if metadata.get("layout") == "thd":
        raise ValueError(
            f"{option}: {path.name} must have layout sbhd or bshd, got thd: it does not say where sequences end."
        )
    causal = metadata.get("causal", "false")
    if causal not in ("true", "false"):
        raise ValueError(f'{option}: metadata causal of {path.name} must be "true" or "false", got {causal!r}.')
    geometry = IndexerGeometry(
        b,
        sq,
        sk,
        heads,
        dim,
        int(_number(option, path, metadata, "topk", 0)),
        dtype=str(q.dtype).removeprefix("torch."),
    )
    source = f"{path.name}: {metadata.get('source', 'no source given')}"
    if weights.dtype != q.dtype:
        source += f" (weights cast from {weights.dtype} to {q.dtype})"
    return Problem(geometry, causal == "true", _number(option, path, metadata, "scale", 1.0), path, source)


def _number(option: str, path: Path, metadata: dict[str, str], name: str, default: float) -> float:
    text = metadata.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{option}: metadata {name} of {path.name} must be a number of at least 0, got {text!r}.")
    return value


def _read(path: Path, option: str = "--inputs") -> tuple[list[Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{option}: needs a safetensors file, got {path}, which is not a file.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            present = set(file.keys())
            missing = [name for name in NAMES if name not in present]
            if missing:
                raise ValueError(
                    f"{option}: {path.name} must hold tensors q, weights and k, "
                    f"got {', '.join(sorted(present)) or 'none'} (missing {', '.join(missing)})."
                )
            tensors = [file.get_tensor(name) for name in NAMES]
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{option}: {path.name} must be a safetensors file, got one that does not open ({error})."
        ) from error
    layout = metadata.get("layout", "sbhd")
    if layout not in LAYOUTS:
        raise ValueError(
            f"{option}: metadata layout of {path.name} must be one of {', '.join(LAYOUTS)}, got {layout!r}."
        )
    for name, x in zip(NAMES, tensors, strict=True):
        axes = AXES[layout][name]
        if x.dim() != axes.count(",") + 1:
            raise ValueError(f"{option}: {name} in {path.name} must be {axes}, got shape {list(x.shape)}.")
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{option}: {name} in {path.name} must be a floating dtype of at least 16 bits, got {x.dtype}."
            )
    return [batch_first(x, layout).transpose(0, 1) for x in tensors], metadata
