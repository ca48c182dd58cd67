from __future__ import annotations

import ast
import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import headfold as package
from headfold import index_scores
from headfold.flops import visible_pairs
from headfold.geometry import ATTENDING, BACKENDS, ITEMSIZE, LOSSES, OURS, PATHS, IndexerGeometry
from headfold.lanes import paths, training_paths
from headfold.lanes.measure import allocator_peak
from headfold.lanes.plan import plan
from headfold.lanes.problem import Problem
from headfold.lanes.residency import LEAST_SHARE
from headfold.presets import PRESETS, SHAPES, find_preset, parse_shape

CPU = torch.device("cpu")
Shape = tuple[int, int, int, int, int]
FULL = IndexerGeometry(8, 4096, 4096, 32, 128)
MAKERS: dict[str, paths.Make] = {
    "materialized": paths.materialized,
    "per-head loop": paths.loop,
    "headfold": paths.headfold,
    **training_paths.MAKERS,
}
# b, sq, sk, h, d: few heads and many, more rows than keys and fewer, keys or channels wider than everything else.
MEASURED: list[Shape] = [
    (1, 64, 128, 4, 32),
    (2, 64, 32, 4, 32),
    (1, 128, 64, 16, 64),
    (2, 96, 160, 16, 8),
    (2, 40, 300, 1, 128),
    (1, 300, 40, 8, 128),
    (1, 1, 256, 4, 32),
    (2, 8, 8, 2, 256),
]

TRAINED = [
    IndexerGeometry(1, 256, 256, 4, 16, 64, np=8, np_k=8, hn=32, v_dim=32),
    IndexerGeometry(2, 96, 160, 2, 8, 32, np=4, np_k=1, hn=24, v_dim=16),
    IndexerGeometry(2, 64, 200, 8, 32, 200, np=2, np_k=2, hn=64, v_dim=64),
    IndexerGeometry(1, 200, 64, 4, 16, 16, np=1, np_k=1, hn=64, v_dim=128),
]


def peaks(problem: Problem, path: str) -> dict[str, int]:
    """Measure each part of a path's bill."""
    score = MAKERS[path](problem.geometry, CPU, None)
    with torch.no_grad():
        tensors = score.inputs(problem, CPU)
        forward = allocator_peak(lambda: score(tensors, problem.causal, problem.scale), CPU).peak
    leaves, g = score.inputs(problem, CPU, grad=True), score.incoming(problem, CPU)
    trained = allocator_peak(lambda: score(leaves, problem.causal, problem.scale), CPU)
    scores = [trained.result]
    backward = allocator_peak(lambda: torch.autograd.grad(scores[0], leaves, g), CPU)
    return {
        "forward": forward,
        "held": trained.left - scores[0].nbytes,
        "training": max(trained.peak, trained.left + backward.peak),
    }


def misses(problem: Problem, path: str) -> dict[str, tuple[int, int]]:
    """Return planned and measured bytes where they break the rule."""
    bill = problem.geometry.bill(path, causal=problem.causal, scale=problem.scale)
    pairs = {name: (getattr(bill, name), measured) for name, measured in peaks(problem, path).items()}
    return {name: pair for name, pair in pairs.items() if not LEAST_SHARE * pair[0] <= pair[1] <= pair[0]}


@pytest.fixture(autouse=True, scope="module")
def warm() -> Iterator[None]:
    """Let the libraries allocate what they keep for good; spare the collector the heap at every measurement."""
    for path in (*PATHS, *LOSSES, *ATTENDING):
        peaks(Problem(IndexerGeometry(1, 8, 8, 2, 8, 4, np=2, np_k=1, hn=4, v_dim=4)), path)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("shape", MEASURED, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_bills_are_what_the_allocator_measures(path: str, shape: Shape, dtype: str) -> None:
    assert misses(Problem(IndexerGeometry(*shape, dtype=dtype)), path) == {}


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("g", TRAINED, ids=str)
@pytest.mark.parametrize("path", [*LOSSES, *ATTENDING])
def test_bills_of_training_are_what_the_allocator_measures(path: str, g: IndexerGeometry, dtype: str) -> None:
    for causal in (False, True):
        assert misses(Problem(g.with_(dtype=dtype), causal), path) == {}


@pytest.mark.parametrize("shape", [(2, 64, 48, 1, 16), (1, 48, 64, 4, 16), (1, 300, 40, 8, 128)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_bills_count_the_mask_and_the_scale(path: str, shape: Shape) -> None:
    for causal, scale in ((True, 1.0), (False, 0.5), (True, 0.5)):
        for dtype in ("bfloat16", "float32"):
            assert misses(Problem(IndexerGeometry(*shape, dtype=dtype), causal, scale), path) == {}


def test_the_seed_shape_has_the_seed_bytes() -> None:
    assert FULL.intermediate_bytes == 17_179_869_184
    assert FULL.scores_bytes == 512 << 20
    assert FULL.bill("materialized").forward == 32 << 30


def test_headfold_holds_nothing_and_stays_within_its_default_workspace_at_the_seed_shape() -> None:
    bill = FULL.bill("headfold")
    assert bill.held == 0
    assert bill.forward <= FULL.scores_bytes + (64 << 20)
    assert bill.training <= FULL.scores_bytes + FULL.gradients_bytes + (64 << 20)


def test_the_loop_holds_as_much_as_the_materialized_path_holds_of_the_head_axis() -> None:
    assert FULL.bill("per-head loop").held == FULL.intermediate_bytes


def test_bytes_of_inputs_selection_and_accumulator() -> None:
    g = IndexerGeometry(2, 3, 5, 7, 11, topk=4, dtype="bfloat16")
    assert g.inputs_bytes == 2 * (2 * 3 * 7 * 11 + 2 * 3 * 7 + 2 * 5 * 11)
    assert g.indices_bytes == 4 * 2 * 3 * 4
    assert g.accumulator_bytes == 4 * 5 * 11
    assert g.with_(dtype="float32").accumulator_bytes == 0


@given(st.integers(0, 12), st.integers(0, 12), st.one_of(st.none(), st.integers(-20, 20)), st.integers(1, 5))
def test_visible_pairs_counts_what_rows_see(sq: int, sk: int, offset: int | None, ratio: int) -> None:
    seen = sum(offset is None or t < (s + 1 + offset) // ratio for s in range(sq) for t in range(sk))
    assert visible_pairs(sq, sk, offset, ratio) == seen


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("sq", "sk"), [(24, 24), (9, 30), (30, 9)])
def test_flops_are_what_the_flop_counter_counts(sq: int, sk: int, causal: bool, relu: bool) -> None:
    g = IndexerGeometry(2, sq, sk, 3, 4, relu=relu)
    leaves = Problem(g).tensors(CPU, grad=True)
    counted = FlopCounterMode(display=False)
    with counted:
        scores = index_scores(*leaves, causal=causal, activation="relu" if relu else None)
    assert counted.get_total_flops() == g.forward_flops(causal=causal)
    with counted:
        torch.autograd.grad(scores, leaves, torch.ones_like(scores))
    assert counted.get_total_flops() == g.backward_flops(causal=causal)


def test_forward_flops_of_every_key_are_two_per_multiply_add() -> None:
    assert IndexerGeometry(2, 3, 5, 7, 11).forward_flops() == 2 * 2 * 3 * 5 * 7 * (11 + 1)


def test_geometry_and_presets_work_without_torch() -> None:
    code = f"""
import sys, types
sys.modules["torch"] = None
bare = types.ModuleType("headfold")
bare.__path__ = [{str(Path(package.__file__).parent)!r}]
sys.modules["headfold"] = bare
from headfold.presets import find_preset
print(find_preset("deepseek-v3.2").geometry(tokens=4096).bill("headfold").held)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


@pytest.mark.parametrize(
    "name", ["geometry", "bills", "tiles", "presets", "score_tiles", "scatter_tiles", "triton_tiles", "loss_slabs"]
)
def test_the_planner_imports_no_torch(name: str) -> None:
    tree = ast.parse((Path(package.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [module for module in imported if module.split(".")[0] == "torch"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_positive_numbers_and_a_source(name: str) -> None:
    preset = find_preset(name)
    numbers = {key: value for key, value in vars(preset).items() if isinstance(value, int)}
    assert len(numbers) == 10
    assert min(numbers.values()) > 0
    assert preset.indexers <= preset.layers
    assert "config" in preset.source or "Config" in preset.source


def test_there_are_six_presets_or_more() -> None:
    assert len(PRESETS) >= 6


def test_deepseek_v32_is_as_published() -> None:
    preset = PRESETS["deepseek-v3.2"]
    assert (preset.heads, preset.dim, preset.topk) == (64, 128, 2048)


def test_a_compressing_preset_has_fewer_keys_than_rows() -> None:
    g = PRESETS["deepseek-v4-flash"].geometry(b=2, tokens=4096, dtype="float32")
    attention = {"np": 64, "np_k": 64, "hn": 512, "v_dim": 512}
    assert g == IndexerGeometry(2, 4096, 1024, 64, 128, 512, "float32").with_(**attention)


@pytest.mark.parametrize(
    ("text", "geometry"),
    [
        ("full", FULL.with_(topk=2048)),
        ("prod", SHAPES["prod"]),
        ("sq=3,h=2,d=4", IndexerGeometry(1, 3, 3, 2, 4)),
        ("train", SHAPES["train"]),
        ("sq=3,h=2,d=4,np=4,hn=8", IndexerGeometry(1, 3, 3, 2, 4, np=4, np_k=4, hn=8, v_dim=8)),
        ("sq=3,h=2,d=4,np=4,np_k=1,hn=8,v_dim=6", IndexerGeometry(1, 3, 3, 2, 4, np=4, np_k=1, hn=8, v_dim=6)),
        (" b = 2, sq=3, sk=5, h=2, d=4, topk=1, dtype=float16", IndexerGeometry(2, 3, 5, 2, 4, 1, "float16")),
    ],
)
def test_shapes_parse(text: str, geometry: IndexerGeometry) -> None:
    assert parse_shape(text) == geometry


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("huge", "breaks at 'huge'"),
        ("", "breaks at ''"),
        ("sq=3,h=2,d=4,", "breaks at ''"),
        ("sq=3,sq=4,h=2,d=4", "breaks at 'sq=4'"),
        ("sq=3,h=2,d=4,width=5", "breaks at 'width=5'"),
        ("sq=3,d=4", "without h"),
        ("sq=3,h=two,d=4", "h needs a whole number, got 'two'"),
        ("sq=-3,h=2,d=4", "sq needs a whole number, got '-3'"),
        ("sq=3,h=0,d=4", "heads must be an integer of at least 1, got 0"),
        ("sq=3,h=2,d=4,dtype=int8", "dtype must be one of float16, bfloat16, float32, float64, got 'int8'"),
    ],
)
def test_a_shape_that_does_not_parse_says_where(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_shape(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"b": -1}, "b must be an integer of at least 0, got -1"),
        ({"sq": 1.5}, "sq must be an integer of at least 0, got 1.5"),
        ({"sk": True}, "sk must be an integer of at least 0, got True"),
        ({"heads": 0}, "heads must be an integer of at least 1, got 0"),
        ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
        ({"topk": -1}, "topk must be an integer of at least 0, got -1"),
        ({"dtype": "int8"}, "dtype must be one of .* got 'int8'"),
    ],
)
def test_a_geometry_that_no_call_has_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^IndexerGeometry: {said}"):
        FULL.with_(**change)


def test_a_bill_of_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"path must be one of materialized, .*headfold attention, got 'fused'"):
        FULL.bill("fused")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"np": 4}, "np_k must be an integer of at least 1 beside the rest of an attention, got 0"),
        ({"np": 4, "np_k": 3, "hn": 8, "v_dim": 8}, "np_k must divide np = 4, got 3"),
        ({"np": 4, "np_k": 2, "hn": 8, "v_dim": True}, "v_dim must be an integer"),
    ],
)
def test_a_broken_attention_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"IndexerGeometry: {said}"):
        FULL.with_(**changes)


@pytest.mark.parametrize("path", [*LOSSES, *ATTENDING])
def test_a_bill_without_an_attention_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=f"{path} needs np, np_k, hn and v_dim"):
        FULL.bill(path)


def test_dense_formulations_take_what_is_published_of_them() -> None:
    g = SHAPES["train"].with_(sq=8192, sk=8192, np=64, np_k=64, hn=128, v_dim=128)
    loss, attention = (g.bill(path, causal=True).training / g.logits_bytes for path in (LOSSES[0], ATTENDING[0]))
    assert 3 <= loss <= 4.25
    assert 3 <= attention <= 3.5
    assert g.bill("headfold loss").training < g.logits_bytes / 100


def test_the_plan_says_where_a_training_step_fits() -> None:
    fits = {row["path"]: row["fits"] for row in plan(FULL).rows}
    assert fits == {
        "materialized": "A100 / H100 80 GB and larger",
        "per-head loop": "RTX 4090 24 GB and larger",
        "headfold": "RTX 4090 24 GB and larger",
    }


def test_the_plan_says_whose_bytes_each_of_our_rows_has() -> None:
    g = SHAPES["train"].with_(dtype="bfloat16")
    rows = {backend: {row["path"]: row for row in plan(g, backend=backend).rows} for backend in BACKENDS}
    for backend, found in rows.items():
        assert {path: row["backend"] for path, row in found.items()} == {
            path: backend if path in OURS else "" for path in found
        }
    for path in OURS:
        planned = g.bill(path, accelerator=True, backend="triton")
        row = rows["triton"][path]
        assert (row["forward"], row["held"], row["training"]) == (planned.forward, planned.held, planned.training)
        assert row["forward"] != rows["eager"][path]["forward"]


def test_a_width_that_kernels_do_not_take_is_billed_as_the_walk_over_tiles() -> None:
    rows = {row["path"]: row["backend"] for row in plan(SHAPES["train"].with_(dim=8), backend="triton").rows}
    assert [rows[path] for path in OURS] == ["eager", "eager", "eager", "eager", "triton"]


def test_at_the_seed_shape_kernels_take_no_scratch_for_scores() -> None:
    g = FULL.with_(dtype="bfloat16")
    scratch = g.scratch("headfold", backend="triton")
    assert (scratch.forward, scratch.backward, scratch.sums) == (0, 0, 0)
    assert g.bill("headfold", backend="triton").training == g.scores_bytes + g.gradients_bytes
    assert g.with_(heads=128).scratch("headfold", backend="triton").sums == 4 * g.k_elements


def test_the_smallest_workspace_is_that_of_the_backend() -> None:
    g = FULL.with_(topk=2048)
    assert FULL.least_workspace(backend="triton") == 0
    for backend in BACKENDS:
        least = g.least_workspace(backend=backend)
        assert least == max(g.scratch(path, workspace=0, backend=backend).backward for path in OURS[:3]) <= 16 << 20
