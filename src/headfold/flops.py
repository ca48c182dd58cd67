"""FLOPs of what a row may see, as plain integers. No torch."""

from __future__ import annotations


def visible_pairs(sq: int, sk: int, offset: int | None = None, ratio: int = 1) -> int:
    """Count the (row, key) pairs within the static bound of a KeyRange: Σ_s clamp((s + 1 + offset) // ratio, 0, sk)."""
    if offset is None:
        return sq * sk
    first = max(0, min(sq, ratio - 1 - offset))
    full = max(first, min(sq, sk * ratio - 1 - offset))
    return _sum_of_floors(full + 1 + offset, ratio) - _sum_of_floors(first + 1 + offset, ratio) + (sq - full) * sk


def _sum_of_floors(n: int, ratio: int) -> int:
    """Return Σ_{0 <= x < n} x // ratio."""
    whole, rest = divmod(max(0, n), ratio)
    return ratio * whole * (whole - 1) // 2 + rest * whole


def score_flops(
    b: int,
    sq: int,
    sk: int,
    h: int,
    d: int,
    *,
    products: int,
    relu: bool = True,
    offset: int | None = None,
    ratio: int = 1,
) -> int:
    """Count the FLOPs of `products` matrix products over the visible pairs, and of the fold over heads.

    With ReLU every product runs over all heads and the logits are weighted and summed once. Without it the heads
    fold first, and a product runs over one folded head.
    """
    pairs = b * visible_pairs(sq, sk, offset, ratio)
    if relu:
        return 2 * pairs * h * (products * d + 1)
    return 2 * pairs * products * d + 2 * b * sq * h * d
