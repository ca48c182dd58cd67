"""The thread count of every test, and Triton's interpreter where no GPU would run its kernels."""

from __future__ import annotations

import atexit
import gc
import os
import warnings
from collections.abc import Iterator

import pytest
import torch

# Triton reads this where a kernel, or a function of its own language, is decorated: before its first import, which
# importing torch alone is not. On a GPU the same tests run the compiled kernels. Whoever set it already is obeyed, and
# processes that tests start get it from here.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def threads() -> None:
    # Fixed, since peaks and the order of sums depend on it: workers share the cores, and one alone takes two.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """Spare the collector what is alive between modules: every measured peak begins with a full collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def ordinary_end() -> None:
    """Let the collector see everything at the end: bindings complain of what is left."""
    atexit.register(gc.unfreeze)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN.

    On a GPU the mode that does so remarks on the oracle's own products and scatters, whose order is not the question.
    """
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*eterministic", category=UserWarning)
        yield
    torch.use_deterministic_algorithms(False)
