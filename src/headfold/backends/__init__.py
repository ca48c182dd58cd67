"""Which implementation a call gets."""

from __future__ import annotations

from headfold.contract import one_of

RULE = "PyTorch tiles run every dtype and width on any device"
IMPLEMENTATIONS = ("auto", "eager", "materialized")


def choose(op: str, impl: str) -> str:
    """Return "eager" or "materialized". "auto" is never the materialised path."""
    one_of(op, "impl", impl, IMPLEMENTATIONS)
    return "eager" if impl == "auto" else impl
