"""Every specimen of every kernel, for the compile lane."""

from __future__ import annotations

from collections.abc import Iterator

from headfold.backends.triton import (
    gathered_specimens,
    loss_specimens,
    score_specimens,
    select_specimens,
    sift_specimens,
)
from headfold.backends.triton.compiling import Specimen

SOURCES = (
    score_specimens.specimens,
    select_specimens.specimens,
    sift_specimens.specimens,
    gathered_specimens.specimens,
    loss_specimens.specimens,
)


def specimens(arch: str) -> Iterator[Specimen]:
    """Yield what an architecture's rows of the table compile to."""
    for source in SOURCES:
        yield from source(arch)
