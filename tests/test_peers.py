"""Peers: each agrees with float64, and each that is left out is named."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headfold.lanes import peers
from headfold.lanes.peers import Absent, Peer, installed_peers

CPU = torch.device("cpu")
TOPK = 5
PACKAGES = {
    "megatron-core": "megatron.core.transformer.experimental_attention_variant.dsa",
    "attn-gym": "attn_gym.sparse",
    "transformers": "transformers.models.deepseek_v32.modeling_deepseek_v32",
}
NAMES = {
    "megatron-core _compute_index_scores": "megatron-core",
    "megatron-core fused_qk_topk_naive": "megatron-core",
    "attn-gym lightning_indexer, reference": "attn-gym",
    "transformers DeepseekV4IndexerScorer": "transformers",
    "transformers DeepseekV32Indexer": "transformers",
}
# b, sq, sk, h, d; 12 · 20 is no square, so a scale that was forgotten shows.
SHAPES = [(1, 24, 24, 4, 128), (2, 24, 24, 4, 128), (2, 7, 7, 12, 20), (2, 9, 24, 4, 16)]


def is_installed(package: str) -> bool:
    """Whether pip knows the package here."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Draw q [sq, b, h, d], weights [sq, b, h] of both signs, and k [sk, b, d], rounded to their dtype."""
    b, sq, sk, h, d = shape
    draw = torch.Generator().manual_seed(0)
    shapes = (sq, b, h, d), (sq, b, h), (sk, b, d)
    return tuple(torch.randn(shape, generator=draw).to(dtype) for shape in shapes)


def truth_of(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
    """Scores [b, sq, sk] in float64."""
    logits = torch.einsum("sbhd,tbd->sbht", q.double(), k.double())
    return torch.einsum("sbh,sbht->bst", weights.double(), logits.relu())


def peer_named(name: str) -> Peer:
    """The found peer of that name, or a skip where its package is not installed."""
    if not is_installed(NAMES[name]):
        pytest.skip(f"{NAMES[name]} is not installed")
    return next(peer for peer in installed_peers(CPU, TOPK).found if peer.name == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_peer_agrees_with_float64(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Scores hold to 1e-5 of the row's largest; selected keys are worth what the best keys are worth."""
    peer, (q, weights, k) = peer_named(name), inputs(shape, dtype)
    if name.startswith("attn-gym") and q.shape[0] != k.shape[0]:
        with pytest.raises(ValueError, match="as many keys as query rows, got sq=9, sk=24"):
            peer.prepare(q, weights, k)
        return
    result, truth = peer.forward(*peer.prepare(q, weights, k)), truth_of(q, weights, k)
    scores, indices = peer.scores(result), peer.indices(result)
    assert scores is not None or indices is not None
    assert (indices is not None) == (peer.computes == "scores + top-k")
    scale = truth.abs().amax(-1, keepdim=True)
    if scores is not None:
        assert scores.shape == truth.shape
        assert ((scores - truth).abs() <= 1e-5 * scale).all()
    if indices is not None:
        rows = indices.long().sort(-1).values
        assert (rows.diff(dim=-1) > 0).all(), "a key was selected twice"
        # Values, not indices: keys that tie at the cut may stand in for one another.
        kept = truth.gather(-1, rows).sort(-1, descending=True).values
        assert ((kept - truth.topk(min(TOPK, truth.shape[-1])).values).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize("name", NAMES)
def test_trains_is_what_autograd_says(name: str) -> None:
    """Where it trains, the gradients are those of float64."""
    peer, leaves = peer_named(name), [x.requires_grad_() for x in inputs((2, 6, 6, 4, 16))]
    result = peer.forward(*peer.prepare(*leaves))
    scores = peer.scores(result)
    assert peer.trains == (scores is not None and scores.requires_grad)
    if scores is not None and peer.trains:
        got = torch.autograd.grad(scores.square().sum(), leaves)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        want = torch.autograd.grad(truth_of(*exact).square().sum(), exact)
        for mine, true in zip(got, want, strict=True):
            assert (mine - true).abs().max() <= 1e-5 * true.abs().max()


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, though it may have two calls."""

    def missing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    expected = tuple(Absent(package, "not installed") for package in PACKAGES)
    assert installed_peers(CPU, TOPK) == ((), expected)


def test_without_topk_the_selecting_calls_are_named() -> None:
    """Only scorers are left, and each selecting call says what it needs."""
    found, absent = installed_peers(CPU)
    assert {peer.computes for peer in found} <= {"scores"}
    told = " ".join(reason for _, reason in absent if "give topk" in reason)
    for name in ("fused_qk_topk_naive", "lightning_indexer", "DeepseekV32Indexer"):
        full = next(known for known in NAMES if name in known)
        assert (full in told) == is_installed(NAMES[full])


def test_a_device_that_a_package_does_not_serve_is_named() -> None:
    """The reason holds the devices that it does serve."""
    if not is_installed("attn-gym"):
        pytest.skip("attn-gym is not installed")
    reasons = dict(installed_peers(torch.device("mps"), TOPK).absent)
    assert reasons["attn-gym"] == "attn-gym lightning_indexer, reference runs on cpu and cuda, not on mps"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_thing", "version 9.9 does not import standin_peer: No module named 'no_such_thing'"),
        ("", "version 9.9 has no score in standin_peer"),
        ("def score(k, q): ...", "version 9.9: score takes (k, q), the call here needs (q, k)"),
    ],
)
def test_a_package_that_changed_is_named(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its version: no import, no attribute, other parameters."""
    (tmp_path / "standin_peer.py").write_text(source)
    (tmp_path / "standin_peer-9.9.dist-info").mkdir()
    (tmp_path / "standin_peer-9.9.dist-info" / "METADATA").write_text("Name: standin-peer\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "standin_peer", raising=False)
    seam = peers._Seam("standin-peer", "standin_peer", "score", ("q", "k"), peers._megatron_scores)
    monkeypatch.setattr(peers, "_seams", lambda: (seam,))
    assert installed_peers(CPU) == ((), (Absent("standin-peer", reason),))


def cold(program: str) -> str:
    """What a program prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_lane_imports_none_of_the_packages() -> None:
    """So that the command starts as fast without --peers as before."""
    packages = {"megatron", "attn_gym", "transformers"}
    assert cold(f"import sys, headfold.lanes.peers; print({packages} & set(sys.modules))") == "set()"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_by_itself(package: str) -> None:
    """In a process of its own; `pytest -rP` shows the seconds."""
    if not is_installed(package):
        pytest.skip(f"{package} is not installed")
    program = (
        "import importlib, time, torch; start = time.perf_counter(); "
        f"importlib.import_module({PACKAGES[package]!r}); print(time.perf_counter() - start)"
    )
    seconds = float(cold(program))
    sys.stdout.write(f"{package}: {seconds:.2f} s to import after torch\n")
    assert seconds > 0
