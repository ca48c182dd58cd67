"""Which calls the kernels get, and what a call that they cannot run is told."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from headfold import UnsupportedError, backends
from on_device import DEVICE

CUDA = torch.device("cuda")


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.setattr(backends, "TRITON_WIDTHS", {"op": (16, 256)})


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("op", "device", "dtype", "widths", "expected", "why"),
    [
        ("op", CUDA, torch.bfloat16, (128,), "triton", "cuda, bfloat16"),
        ("op", CUDA, torch.float16, (16, 256), "triton", "16 to 256"),
        ("op", CUDA, torch.float32, (80,), "triton", "float32"),
        ("op", CUDA, torch.float64, (80,), "eager", "not for float64"),
        ("op", CUDA, torch.float32, (15,), "eager", "16 to 256, not 15"),
        ("op", CUDA, torch.float32, (128, 257), "eager", "not 128, 257"),
        ("op", torch.device("cpu"), torch.float32, (128,), "eager", "not on cpu"),
        ("other", CUDA, torch.float32, (128,), "eager", "other has no kernel"),
    ],
)
def test_auto_follows_the_rule(
    op: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...], expected: str, why: str
) -> None:
    got, said = backends.automatic(op, device, dtype, *widths)
    assert got == expected
    assert why in said


@pytest.mark.usefixtures("known")
def test_auto_without_triton_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    assert backends.automatic("op", CUDA, torch.bfloat16, 128) == ("eager", "Triton is not installed")
    with pytest.raises(UnsupportedError, match=r"op: .*needs Triton, which is not installed"):
        backends.choose("op", "triton", torch.ones(2, 16))


@pytest.mark.usefixtures("known")
def test_float64_asks_for_a_triton_that_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("headfold.backends.triton")
    x = torch.ones(1, 16, device=DEVICE, dtype=torch.float64)
    assert backends.choose("op", "triton", x) == "triton"
    monkeypatch.setattr(triton, "FLOAT64", False)
    monkeypatch.setattr(triton, "VERSION", "3.4.0")
    with pytest.raises(UnsupportedError, match=r"op: .*float64 needs Triton >= 3\.5, .*, got 3\.4\.0\. Use impl="):
        backends.choose("op", "triton", x)
    assert backends.choose("op", "triton", x.float()) == "triton"


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("op", "x", "widths", "said"),
    [
        ("other", torch.ones(1, 16, device=DEVICE), (), "other: has no Triton kernel"),
        ("op", torch.ones(1, 16, device="meta"), (), "op: .*needs a CUDA or ROCm tensor .*got one on meta"),
        ("op", torch.ones(1, 15, device=DEVICE), (), "op: .*needs widths from 16 to 256, got 15"),
        ("op", torch.ones(1, 16, device=DEVICE), (300,), "op: .*got 300"),
    ],
)
def test_an_explicit_choice_works_or_says_the_way_out(op: str, x: Any, widths: tuple[int, ...], said: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.raises(UnsupportedError, match=said + r'.*Use impl="eager"'):
        backends.choose(op, "triton", x, *widths)


@pytest.mark.parametrize("op", ["index_scores", "selected_scores", "indexer_loss"])
def test_more_batch_elements_than_a_grid_has_are_refused_or_left_to_eager(op: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    x = torch.empty(65536, 0, 1, 16, device=DEVICE)
    with pytest.raises(UnsupportedError, match=rf'{op}: impl="triton" needs b <= 65535, got 65536. Use impl="eager"'):
        backends.choose(op, "triton", x)
    assert backends.choose(op, "triton", x[1:]) == "triton"
    got, said = backends.automatic(op, CUDA, torch.bfloat16, 16, batch=65536)
    assert (got, said) == ("eager", "kernels take up to 65535 batch elements, not 65536")


def test_without_the_interpreter_a_cpu_tensor_is_refused() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import os
os.environ.pop("TRITON_INTERPRET", None)
import torch
from headfold import UnsupportedError, backends
backends.TRITON_WIDTHS["op"] = (16, 256)
try:
    backends.choose("op", "triton", torch.ones(1, 16))
except backends.UnsupportedError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "needs a CUDA or ROCm tensor" in done.stdout
