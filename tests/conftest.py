"""One thread count for every test, and Triton's interpreter where no GPU would run its kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads this where a kernel, or a function of its own language, is decorated: before its first import, which
# importing torch alone is not. On a GPU the same tests run the compiled kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
