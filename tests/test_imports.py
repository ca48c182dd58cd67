from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import headfold

ROOT = Path(headfold.__file__).parent
# Each floor may import the floors before it, and modules of its own floor may not import one another unless they are
# one package.
FLOORS = [
    ["tiles", "bills", "flops", "score_tiles"],
    ["layout", "keyrange", "loss_tiles", "attention_tiles", "dense_bills", "scatter_tiles", "triton_tiles"],
    ["loss_slabs", "sift_tiles"],
    ["geometry"],
    ["contract", "presets", "parallel"],
    ["attention_contract"],
    ["model_plan", "megatron_split"],
    ["megatron_plan", "transformers_plan"],
    ["materialized", "backends"],
    ["ops", "materialized_attention", "materialized_loss"],
    ["scores", "attention", "selected", "loss", "selection", "selection_record", "mask"],
    ["reuse", "agreement"],
    ["integrations"],
    ["lanes"],
    ["shell"],
    ["gpu_commands"],
    ["cli"],
]


def floor_of(module: str) -> int:
    name = module.split(".")[0]
    return next(i for i, names in enumerate(FLOORS) if name in names)


def imported(path: Path) -> set[str]:
    """Modules of headfold that a file imports, anywhere in it, relative to the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("headfold"):
            inside = node.module.removeprefix("headfold").lstrip(".")
            found |= {inside} if inside else {alias.name for alias in node.names}
    return found


def modules() -> list[Path]:
    outer = ("__init__.py", "__main__.py")
    return [path for path in ROOT.rglob("*.py") if not (path.parent == ROOT and path.name in outer)]


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    relative = path.relative_to(ROOT).with_suffix("")
    own = relative.parts[0]
    for other in imported(path):
        assert other.split(".")[0] == own or floor_of(other) < floor_of(own), f"{relative} imports {other}"


def test_every_module_has_a_floor() -> None:
    names = {path.relative_to(ROOT).with_suffix("").parts[0] for path in modules()}
    assert names == {name for floor in FLOORS for name in floor}


def test_headfold_imports_and_scores_with_torch_alone() -> None:
    code = """
import sys
absent = "numpy transformers matplotlib rich typer triton safetensors tabulate humanize psutil"
for name in absent.split():
    sys.modules[name] = None
import torch, headfold
q, w, k = torch.randn(5, 1, 2, 4, requires_grad=True), torch.randn(5, 1, 2), torch.randn(6, 1, 4)
headfold.index_scores(q, w, k, causal=True).relu().sum().backward()
assert headfold.IndexerGeometry(1, 5, 6, 2, 4).bill("headfold").held == 0
print(q.grad.shape)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([5, 1, 2, 4])" in done.stdout


def test_importing_headfold_imports_no_extra() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import headfold
extras = ("rich", "typer", "matplotlib", "transformers", "triton", "numpy", "safetensors", "torch.utils.flop_counter")
print([name for name in extras if name in set(sys.modules) - before])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("first", ["headfold", "torch.utils.flop_counter"])
def test_torchs_counter_knows_the_formulas_whichever_is_imported_first(first: str) -> None:
    code = f"""
import importlib.util, inspect, torch
import {first}
import headfold
importlib.util.find_spec("torch.utils.flop_counter")  # which imports nothing
import torch.utils.flop_counter as counting
with counting.FlopCounterMode(display=False) as counter:
    headfold.index_scores(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3), torch.ones(5, 1, 4))
ops = torch.ops.headfold
both = ("index_scores", "sparse_attention", "selected_scores")
names = [*both, *(name + "_backward" for name in both), "index_topk", "indexer_loss"]
print(counter.get_total_flops(), all(getattr(ops, name) in counting.flop_registry for name in names))
print(type(counting.__loader__) is type(inspect.__loader__), type(counting.__spec__.loader) is type(inspect.__loader__))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(2 * 2 * 5 * 3 * (4 + 1)), "True", "True", "True"]


def test_the_public_names_are_these() -> None:
    public = "Agreement Attention IndexReuse IndexerGeometry IndexerLoss KeyRange ReuseSchedule SelectionRecord TopK"
    public += " UnsupportedError __version__ index_mask index_scores index_topk indexer_loss selected_scores"
    public += " selection_agreement sparse_attention update_index_mask_"
    assert set(headfold.__all__) == set(public.split())
    assert (ROOT / "py.typed").exists()
