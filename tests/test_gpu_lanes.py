"""The lanes of `headfold gpu`, as far as a CPU runs them, each of them seen to fail, and the job list as a whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from headfold import index_scores
from headfold.geometry import IndexerGeometry
from headfold.lanes import every_op, gpu, graphs, measure, offsets, repeats, sanitizer, strides
from headfold.lanes.capture import EQUAL
from headfold.lanes.every_op import DTYPES, OPS, Inputs, calls, make_inputs, same_bits
from headfold.lanes.parity import parity
from headfold.lanes.problem import Problem
from headfold.lanes.record import FAIL, PASS, SKIP, Column, Lane
from headfold.lanes.residency import SMALL_CHANGE
from headfold.lanes.selection_parity import selection_parity
from headfold.lanes.training_parity import training_parity
from on_device import DEVICE

CPU = torch.device("cpu")
EAGER = ("eager",)
NEAR = 1 << 16


def verdicts(lane: Lane) -> set[str]:
    return {row["verdict"] for row in lane.rows}


def test_every_op_is_called_on_every_backend_and_masks_once() -> None:
    found = calls(("eager", "triton"))
    assert len(found) == len(set(found)) == 7 * 2 + 2
    assert {name.split(",")[0] for name in OPS} == {
        "index_scores", "index_topk", "selected_scores", "index_mask", "update_index_mask_", "indexer_loss",
        "sparse_attention",
    }  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_every_op_returns_results_and_gradients_that_are_not_all_zero(op: str) -> None:
    results = OPS[op](make_inputs(CPU, torch.float64, sq=9, sk=20, topk=7), "eager")
    assert all(x.any() for x in results)
    assert len(results) == {"index_topk": 2, "index_mask": 2, "update_index_mask_": 1, "indexer_loss": 5}.get(
        op.split(", no order")[0], 6 if op == "sparse_attention" else 4
    )


def test_repeats_pass_and_one_run_that_differs_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "make_inputs", partial(make_inputs, sq=9, sk=20, topk=7))
    lane = repeats.repeats(CPU, impls=EAGER, dtypes=DTYPES[2:3], runs=2)
    assert verdicts(lane) == {PASS}
    assert len(lane.rows) == 9
    runs = iter(range(100))

    def once_off(x: Inputs, impl: str) -> list[Tensor]:
        return [torch.full((2,), float(next(runs) == 2))]

    monkeypatch.setitem(OPS, "index_topk", once_off)
    found = repeats.repeats(CPU, impls=EAGER, dtypes=DTYPES[2:3], runs=3)
    failed = [row for row in found.rows if row["verdict"] == FAIL]
    assert [(row["op"], row["differing"]) for row in failed] == [("index_topk", 1)]


def test_minus_zero_and_nan_are_bits_as_others() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))


def test_spread_tensors_hold_the_same_numbers_as_far_apart_as_asked() -> None:
    near = make_inputs(CPU, torch.float32, sq=9, sk=7)
    moved = offsets.spread(near, 1 << 22)
    for x, y in zip(moved, near, strict=True):
        assert torch.equal(x, y)
    for x in moved[:6]:
        assert x.stride(1) * (x.shape[1] - 1) >= 1 << 22
    with pytest.raises(ValueError, match="needs rows of at most 65536 elements"):
        offsets.spread(near, 1 << 10)


def test_offsets_pass_and_wrong_reads_and_writes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offsets, "APART", 1 << 13)

    def lane() -> Lane:
        return offsets.offsets(CPU, impls=EAGER, dtypes=DTYPES[2:3], far=1 << 23, rows=40, keys=33)

    passed = lane()
    assert verdicts(passed) == {PASS}
    assert len(passed.rows) == 9

    def strided(x: Inputs, impl: str) -> list[Tensor]:
        return [torch.tensor([float(x.q.stride(1) > NEAR)])]

    monkeypatch.setitem(OPS, "index_topk", strided)
    scores = index_scores
    monkeypatch.setattr(offsets, "index_scores", lambda *x, **call: scores(*x, **call) + (len(x[0]) > 20))
    monkeypatch.setattr(offsets, "index_mask", lambda indices, sk: torch.ones(1, *indices.shape[1:]) * indices.shape[1])
    assert [row["check"] for row in lane().rows if row["verdict"] == FAIL] == [
        "index_topk, strides", "index_scores, 40 x 33 scores", "index_mask, 40 x 33 entries",
    ]  # fmt: skip


def test_strides_pass_and_a_tensor_that_is_read_as_if_it_were_dense_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lane() -> Lane:
        return strides.strides(CPU, impls=EAGER, dtypes=DTYPES[2:3], widths=(16,))

    passed = lane()
    assert verdicts(passed) == {PASS}
    assert {row["op"] for row in passed.rows} == set(OPS) - {"index_mask", "update_index_mask_"}
    attend = OPS["sparse_attention"]

    def dense_values(x: Inputs, impl: str) -> list[Tensor]:
        value = x.value.as_strided(x.value.shape, x.value.contiguous().stride())
        return attend(x._replace(value=value), impl)

    monkeypatch.setitem(OPS, "sparse_attention", dense_values)
    failed = [row for row in lane().rows if row["verdict"] == FAIL]
    assert [row["op"] for row in failed] == ["sparse_attention"]
    assert "value: [0, 1, 2" in failed[0]["differing"]
    assert not failed[0]["differing"].startswith(("query:", "key:"))


def test_what_lies_apart_has_no_aligned_rows_and_the_same_numbers() -> None:
    dense = make_inputs(CPU, torch.float32, sq=9, sk=7)
    moved = strides.apart(dense, "q", "key")
    for x, y in zip(moved, dense, strict=True):
        assert torch.equal(x, y)
    assert all(n % 16 for x in (moved.q, moved.key) for n in x.stride())
    assert moved.weights is dense.weights


def test_a_step_makes_every_result_and_gradient() -> None:
    results = graphs.step(*make_inputs(CPU, torch.float32, sq=50, sk=60), impl="eager")
    assert len(results) == 2 + 4 + 5 + 4
    assert all(x.any() for x in results)


def test_graphs_judge_what_the_process_of_each_row_says(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"eager": EQUAL, "triton": None}
    monkeypatch.setattr(measure, "in_fresh_process", lambda run, impl, dtype, device: said[impl])
    rows = graphs.graphs(CPU, dtypes=DTYPES[:1]).rows
    assert [(row["backend"], row["verdict"]) for row in rows] == [("eager", PASS), ("triton", FAIL)]


@pytest.mark.parametrize(
    ("script", "verdict", "said"),
    [
        ("exit 0", PASS, ""),
        ("echo '========= Invalid __global__ read of size 4 bytes'; exit 86", FAIL, "86: Invalid __global__ read"),
        ("echo '========= Error: Race reported'; exit 86", FAIL, "86: Error: Race reported"),
        ("sleep 5", FAIL, "took more than 0.2 seconds"),
    ],
)
def test_the_sanitizer_is_run_and_believed(
    script: str, verdict: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / sanitizer.PROGRAM
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if "sleep" in script:
        monkeypatch.setattr(sanitizer, "SECONDS", 0.2)
    (row,) = sanitizer.sanitizer(CPU, watches=sanitizer.WATCHES[:1]).rows
    assert row["verdict"] == verdict
    assert said in row.get("note", "")


def test_the_sanitizer_has_to_find_what_is_planted() -> None:
    invalid = "========= Invalid __global__ write of size 4 bytes\n"
    assert sanitizer._judged(sanitizer.STATUS, invalid, planted=True)["verdict"] == PASS
    for status, printed in ((0, ""), (1, invalid), (sanitizer.STATUS, "========= Error: no device\n")):
        assert sanitizer._judged(status, printed, planted=True)["verdict"] == FAIL
    assert [watched for _, _, watched in sanitizer.WATCHES].count(sanitizer.PLANTED) == 1


def test_without_the_sanitizer_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    rows = sanitizer.sanitizer(CPU).rows
    assert [row["verdict"] for row in rows] == [SKIP] * 6
    assert {(row["tool"], row["dtype"]) for row in rows} > {("memcheck", "float64"), ("racecheck", "bfloat16")}
    assert all(row["note"] == "compute-sanitizer is not on PATH" for row in rows)


def test_the_sanitizer_is_told_each_kernel_and_ends_with_what_it_watches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    program = tmp_path / sanitizer.PROGRAM
    program.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/said\nsleep 60 &\necho $! > {tmp_path}/child\nwait\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sanitizer, "SECONDS", 0.5)
    (row,) = sanitizer.sanitizer(CPU, watches=sanitizer.WATCHES[:1]).rows
    assert (row["verdict"], row["note"]) == (FAIL, "took more than 0.5 seconds")
    said = (tmp_path / "said").read_text().split("\n")
    assert said[:2] == ["--tool", "memcheck"]
    assert {x.removeprefix("kernel_substring=") for x in said if "=" in x} == set(sanitizer.kernel_names())
    assert "sanitizer.exercise('triton', 'bfloat16', 'cpu')" in "".join(said)
    assert said.count("--kernel-name") == len(sanitizer.kernel_names()) == 31
    assert not alive(int((tmp_path / "child").read_text()))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may still wait for its parent."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_the_sanitizer_watches_runs() -> None:
    sanitizer.exercise("eager", "float64", "cpu")


def test_every_kernel_is_launched_under_the_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    if DEVICE.type != "cpu":
        pytest.skip("launches are listed, not run, which the interpreter alone allows")
    launched = set()

    def listed(kernel: Any, grid: object) -> Callable[..., None]:
        launched.add(kernel.fn.__name__)
        return lambda *_, **__: None

    monkeypatch.setattr(interpreter.InterpretedFunction, "__getitem__", listed)
    for dtype in {dtype for tool, dtype, _ in sanitizer.WATCHES if tool == "memcheck"}:
        sanitizer.exercise("triton", every_op.name_of(dtype), "cpu")
    assert launched == set(sanitizer.kernel_names())
    launched.clear()
    for part in sanitizer.parts("triton"):  # the parts that are compiled beforehand are all of it
        for name in ("bfloat16", "float32", "float64"):
            sanitizer.exercise("triton", name, "cpu", (part,))
    assert launched == set(sanitizer.kernel_names())


def test_the_jobs_cover_both_backends_and_every_promise() -> None:
    names = [job.name for job in (*gpu.memory_jobs(), *gpu.other_jobs())]
    assert len(names) == len(set(names))
    for impl in every_op.IMPLS:
        for part in (
            "parity",
            "selection parity",
            "training parity",
            "repeats",
            "offsets",
            "selection residency",
        ):
            assert f"{part}, {impl}" in names
        for dtype in gpu.DTYPES:
            assert f"residency, full shape, {dtype}, {impl}" in names
    assert {"graphs", "capture", "sanitizer", "strides, bfloat16, width 64"} < set(names)
    full = gpu.memory_jobs()[0].arguments[0].geometry
    assert full.intermediate_bytes == 16 << 30
    assert gpu.WORKSPACE + SMALL_CHANGE == 64 << 20


def small_lane(device: torch.device, *, verdict: str = PASS) -> Lane:
    return Lane("small", "?", (Column("verdict", "verdict"),), [{"verdict": verdict}])


def broken_lane(device: torch.device) -> Lane:
    raise RuntimeError("no kernel image\nand more")


@pytest.fixture
def few_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(run: Callable[..., Any], *args: Any, seconds: float) -> Any:
        assert seconds > 0
        return run(*args)

    monkeypatch.setattr(measure, "in_fresh_process", here)
    monkeypatch.setattr(gpu, "memory_jobs", lambda: [gpu.Job("one", small_lane)])
    failing = gpu.Job("two", small_lane, (), {"verdict": FAIL})
    monkeypatch.setattr(gpu, "other_jobs", lambda: [failing, gpu.Job("three", broken_lane)])


@pytest.mark.usefixtures("few_jobs")
def test_every_job_is_a_lane_and_an_error_fails_its_own(tmp_path: Path) -> None:
    lanes = gpu.gpu(CPU, workers=2)
    assert [(lane.name, lane.passed) for lane in lanes] == [("one", True), ("two", False), ("three", False)]
    assert lanes[2].rows[0]["note"] == "RuntimeError: no kernel image"
    facts = gpu.environment(CPU)
    gpu.write(tmp_path / "made" / "gpu.jsonl", lanes, facts)
    lines = [json.loads(line) for line in (tmp_path / "made" / "gpu.jsonl").read_text().splitlines()]
    assert lines[0]["passed"] is False
    assert {"device", "driver", "torch", "headfold", "python", "triton"} <= set(lines[0])
    assert [line["lane"] for line in lines[1:]] == ["one", "one", "two", "two", "three", "three"]


@pytest.mark.usefixtures("few_jobs")
def test_what_has_ended_is_told_at_once_and_what_has_not_fails(tmp_path: Path) -> None:
    told: list[tuple[str, list[bool]]] = []

    def ended(lane: Lane, lanes: list[Lane]) -> None:
        gpu.write(tmp_path / "gpu.jsonl", lanes, {})
        told.append((lane.name, [one.passed for one in lanes]))
        assert lane.notes[-1].startswith("Took ")
        first, *_ = (tmp_path / "gpu.jsonl").read_text().splitlines()
        assert json.loads(first) == {"passed": False}

    gpu.gpu(CPU, workers=1, ended=ended)
    assert told[0] == ("one", [True, False, False])
    assert sorted(name for name, _ in told) == ["one", "three", "two"]


def slow_lane(device: torch.device, note: str) -> Lane:
    """Start a process, as lanes do, and wait for it."""
    with subprocess.Popen(["sleep", "60"]) as sleeping:
        Path(note).write_text(str(sleeping.pid))
    return Lane("slow", "?", ())


def test_a_job_that_is_too_slow_fails_with_all_it_started_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    note = tmp_path / "pid"
    monkeypatch.setattr(gpu, "memory_jobs", lambda: [gpu.Job("slow", slow_lane, (), {"note": str(note)}, 2.0)])
    monkeypatch.setattr(gpu, "other_jobs", lambda: [gpu.Job("one", small_lane), gpu.Job("two", small_lane)])
    lanes = gpu.gpu(CPU, workers=2)
    assert [(lane.name, lane.passed) for lane in lanes] == [("slow", False), ("one", True), ("two", True)]
    assert lanes[0].rows[0]["note"] == "TimeoutError: took more than 2 seconds"
    assert not alive(int(note.read_text()))


@pytest.mark.usefixtures("few_jobs")
def test_a_job_that_would_begin_after_the_time_of_all_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SECONDS", 0.0)
    lanes = gpu.gpu(CPU)
    assert [lane.passed for lane in lanes] == [True, False, False]
    assert lanes[1].rows[0]["note"] == "TimeoutError: not begun: the lanes before it took all of the time"


def test_the_jobs_end_within_ten_minutes() -> None:
    assert gpu.MEMORY_SECONDS < gpu.SECONDS <= 570
    assert all(0 < job.seconds <= gpu.SECONDS - gpu.MEMORY_SECONDS for job in (*gpu.memory_jobs(), *gpu.other_jobs()))
    watching = next(job for job in gpu.other_jobs() if job.name == "sanitizer")
    assert watching.seconds > sanitizer.COMPILING + sanitizer.SECONDS


def test_a_machine_without_cuda_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from headfold import cli

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "gpu", lambda *_, **__: pytest.fail("started"))
    for arguments, said in ((["gpu"], "no CUDA or ROCm device"), (["gpu", "--device", "cpu"], "needs cuda or cuda:N")):
        monkeypatch.setattr(sys, "argv", ["headfold", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        assert (left.value.code, out, err.count("\n")) == (2, "", 1)
        assert said in err


@pytest.mark.slow
@pytest.mark.parametrize("lane", [parity, selection_parity, training_parity])
def test_parity_of_the_kernels_runs(lane: Callable[..., Lane], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(sys.modules[lane.__module__], "DTYPES", (torch.float32,))
    problem = Problem(IndexerGeometry(1, 8, 40, 2, 16, 9, "float32", np=2, np_k=1, hn=16, v_dim=16))
    found = lane(problem, CPU, impl="triton")
    assert [row for row in found.rows if row["verdict"] == FAIL] == []
