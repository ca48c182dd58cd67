from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from headfold.bills import Bill
from headfold.geometry import IndexerGeometry
from headfold.lanes import figures, measure, report
from headfold.lanes import parity as parity_lane
from headfold.lanes.budget import Spent, spend
from headfold.lanes.measure import allocator_peak, in_fresh_process, process_peak
from headfold.lanes.parity import parity
from headfold.lanes.paths import headfold, per_head_loop
from headfold.lanes.problem import Problem, from_file
from headfold.lanes.record import FAIL, SKIP, Column, Lane, show, show_bytes
from headfold.lanes.residency import PROCESS_SLACK, residency
from headfold.lanes.speed import speed
from headfold.presets import SHAPES
from headfold.scores import index_scores

CPU = torch.device("cpu")
TINY = Problem(IndexerGeometry(1, 32, 32, 2, 16))
# What a layer of the published widths feeds its indexer, so that files of users are read as they come: 64 rows of 64
# heads and 3072 keys in bfloat16, hence 1.8 MB. Its own metadata says how it was made.
CAPTURE = Path(__file__).parent / "data" / "deepseek_v32_indexer.safetensors"
FIGURES = ["bytes.svg", "peaks.svg", "time.svg"]


# The attention of a problem that has none of its own.
SMALL_TRAIN = IndexerGeometry(1, 96, 96, 4, 16, 24, np=4, np_k=4, hn=16, v_dim=16)


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Lane]]:
    """Prove the captured tensors once, with everything that prove does, and write the report."""
    folder = tmp_path_factory.mktemp("report")
    problem = from_file(CAPTURE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "train", SMALL_TRAIN)
        lanes = report.prove(problem, CPU, rounds=1)
    report.write(folder, problem, lanes, CPU)
    return folder, lanes


def test_the_captured_tensors_pass(proof: tuple[Path, list[Lane]]) -> None:
    failed = [(lane.name, row) for lane in proof[1] for row in lane.rows if row.get("verdict") in (FAIL, SKIP)]
    assert failed == []


def test_the_capture_is_causal_deepseek_v32_with_its_own_scale() -> None:
    problem = from_file(CAPTURE)
    g = problem.geometry
    assert (g.heads, g.dim, g.topk, g.dtype) == (64, 128, 2048, "bfloat16")
    assert problem.causal
    assert problem.scale == 128**-0.5


def test_a_process_of_its_own_reads_every_peak_and_bounds_ours(proof: tuple[Path, list[Lane]]) -> None:
    rows = [row for row in lane_of(proof[1], "residency").rows if "process" in row]
    assert len(rows) == 8
    assert all(row["process"] > 0 for row in rows)
    assert [row["process_bound"] - row["planned"] for row in rows if "process_bound" in row] == [PROCESS_SLACK] * 4


def test_the_report_has_three_figures_that_parse(proof: tuple[Path, list[Lane]]) -> None:
    assert sorted(path.name for path in proof[0].glob("*.svg")) == FIGURES
    for name in FIGURES:
        root = ElementTree.parse(proof[0] / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_the_same_figure_is_the_same_file(proof: tuple[Path, list[Lane]], tmp_path: Path) -> None:
    problem = from_file(CAPTURE)
    figures.draw(tmp_path, problem.geometry, {lane.name: lane for lane in proof[1]})
    assert [(tmp_path / name).read_bytes() for name in FIGURES] == [(proof[0] / name).read_bytes() for name in FIGURES]


def test_the_json_report_holds_every_lane_and_where_it_was_measured(proof: tuple[Path, list[Lane]]) -> None:
    found = json.loads((proof[0] / "report.json").read_text(encoding="utf-8"))
    assert found["passed"] is True
    pairs = [[name, f"selection {name}", f"training {name}"] for name in ("parity", "residency", "speed")]
    assert [lane["name"] for lane in found["lanes"]] == ["plan", *itertools.chain(*pairs), "capture"]
    assert [len(lane["rows"]) for lane in found["lanes"]] == [len(lane.rows) for lane in proof[1]]
    assert {"headfold", "torch", "python", "cpu", "threads", "memory_bytes", "device"} <= set(found["environment"])
    assert found["source"].startswith(CAPTURE.name)
    assert found["geometry"]["causal"] is True


def test_the_markdown_report_has_the_verdict_every_lane_and_every_figure(proof: tuple[Path, list[Lane]]) -> None:
    text = (proof[0] / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# headfold: contract kept\n")
    for part in ("## plan", "## parity", "## residency", "## speed", "## capture", *FIGURES):
        assert part in text
    for row in lane_of(proof[1], "residency").rows:
        assert show_bytes(row["measured"]) in text


def lane_of(lanes: list[Lane], name: str) -> Lane:
    return next(lane for lane in lanes if lane.name == name)


def test_what_does_not_fit_is_not_started_and_names_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(IndexerGeometry(1, 128, 128, 16, 16))
    g = problem.geometry
    needed = g.bill("materialized").training + g.inputs_bytes + g.scores_bytes + PROCESS_SLACK
    monkeypatch.setattr(measure, "free_memory", lambda _: needed - 1)
    monkeypatch.setattr("headfold.lanes.paths.materialized", unstartable_training)
    lane = residency(problem, CPU, process=False)
    (skipped,) = (row for row in lane.rows if row["verdict"] == SKIP)
    assert (skipped["path"], skipped["phase"]) == ("materialized", "forward + backward")
    assert f"needs {needed:,} bytes" in skipped["note"]
    assert "measured" not in skipped
    assert lane.passed


def unstartable_training(*_: Any) -> Any:
    """Return the materialised path, whose scores of the problem itself may not be asked for under autograd."""
    from headfold.lanes.paths import IndexerPath

    def forward(q: torch.Tensor, weights: torch.Tensor, k: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
        assert not (q.requires_grad and len(q) == 128), "started"
        return index_scores(q, weights, k, causal=causal, scale=scale, impl="materialized")

    return IndexerPath("materialized", "materialized", forward, unstartable_training)


@pytest.mark.parametrize(("dtype", "multiplied"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_a_cpu_is_measured_in_the_dtype_it_multiplies_in(dtype: torch.dtype, multiplied: torch.dtype) -> None:
    assert measure.MatrixProduct(CPU, dtype).dtype == multiplied


def test_speed_skips_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RATE_SIZE", 64)
    monkeypatch.setattr(measure, "free_memory", lambda _: 1000)
    lane = speed(TINY, CPU, rounds=1)
    assert [row["verdict"] for row in lane.rows] == [SKIP] * 3
    assert all("bytes" in row["note"] for row in lane.rows)


@pytest.mark.parametrize("share", [0.99, 1.3])
def test_a_plan_that_misses_the_measurement_fails(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = IndexerGeometry.bill

    def bill(self: IndexerGeometry, path: str, **options: Any) -> Bill:
        found = honest(self, path, **options)
        return Bill(int(found.forward * share), found.held, found.training) if path == "materialized" else found

    monkeypatch.setattr(IndexerGeometry, "bill", bill)
    lane = residency(Problem(IndexerGeometry(1, 256, 256, 8, 16)), CPU, process=False)
    assert [(row["path"], row["phase"]) for row in lane.rows if row["verdict"] == FAIL] == [("materialized", "forward")]
    assert not lane.passed


def test_a_broken_gradient_fails_parity_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_lane, "DTYPES", (torch.float32,))
    monkeypatch.setattr(parity_lane, "index_scores", half_gradient)
    monkeypatch.setattr("headfold.lanes.budget.index_scores", half_gradient)
    lane = parity(TINY, CPU)
    verdicts = {(row["check"], row["result"]): row["verdict"] for row in lane.rows}
    assert verdicts["gradcheck, causal", "dq, dweights, dk"] == FAIL
    assert verdicts["budget, causal", "dk"] == FAIL
    assert verdicts["budget, causal", "dq"] == "pass"
    assert "Jacobian mismatch" in next(row["note"] for row in lane.rows)


def half_gradient(
    q: torch.Tensor, weights: torch.Tensor | None, k: torch.Tensor, *, impl: str = "auto", **call: Any
) -> torch.Tensor:
    """Score as headfold does, with half of dk lost, unless asked for the oracle."""
    kept = k if impl == "materialized" else (k + k.detach()) / 2
    return index_scores(q, weights, kept, impl=impl, **call)


def test_a_row_that_sees_no_key_spends_nothing_and_stays_a_number() -> None:
    hidden = torch.full((1, 2, 3), -torch.inf)
    assert spend(hidden, hidden.double(), [hidden]) == Spent(0.0, 0.0, (0, 0), 0)


def test_nan_where_the_truth_is_finite_is_a_mismatch() -> None:
    truth = torch.ones(1, 2, 3, dtype=torch.float64)
    got = truth.float()
    got[0, 1, 2] = torch.nan
    spent = spend(got, truth, [truth.float()])
    assert spent.mismatched == 1
    assert not spent.kept


def test_the_loop_that_is_compared_with_scores_as_the_oracle_does() -> None:
    q, weights, k = TINY.tensors(CPU, torch.float64)
    expected = index_scores(q, weights, k, causal=True, scale=0.5, impl="materialized")
    torch.testing.assert_close(per_head_loop(q, weights, k, causal=True, scale=0.5), expected)


def test_inputs_and_incoming_gradient_are_the_same_each_time() -> None:
    for first, second in zip(TINY.tensors(CPU), TINY.tensors(CPU), strict=True):
        assert torch.equal(first, second)
    path = headfold(TINY.geometry, CPU)
    assert torch.equal(path.incoming(TINY, CPU), path.incoming(TINY, CPU))


def test_the_allocator_sees_what_was_freed_and_what_was_left() -> None:
    def run() -> torch.Tensor:
        freed = torch.empty(3000, dtype=torch.uint8)
        kept = torch.empty(1000, dtype=torch.uint8)
        del freed
        return kept

    found = allocator_peak(run, CPU)
    assert (found.peak, found.left) == (4000, 1000)


def leave(how: str) -> None:
    """End this process at once."""
    if how == "exit":
        os._exit(1)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_process_that_was_killed_returns_nothing(how: str) -> None:
    assert in_fresh_process(leave, how) is None


def test_a_fresh_process_returns_what_its_function_does() -> None:
    assert in_fresh_process(math.hypot, 3.0, 4.0) == 5.0


def test_an_error_in_a_fresh_process_is_raised_here() -> None:
    with pytest.raises(ValueError, match="math domain error"):
        in_fresh_process(math.sqrt, -1.0)


def peak_of(size: int) -> int | None:
    """In a fresh process: the peak of filling this many bytes, after the heap was as large once before."""
    fill: Callable[[], object] = lambda: torch.full((size,), 1, dtype=torch.uint8)  # noqa: E731
    fill()
    return process_peak(fill)


def test_the_process_peak_sees_an_allocation() -> None:
    size = 64 << 20
    peak = in_fresh_process(peak_of, size)
    assert 0.99 * size <= peak <= size + (16 << 20)  # a few pages are there from before


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (None, "bytes", ""),
        (0, "bytes", "0 Bytes"),
        (17_179_869_184, "bytes", "16 GiB"),
        (0.0123, "seconds", "12.3 ms"),
        (2.5, "seconds", "2.5 s"),
        (1.23456, "ratio", "1.23"),
        (12345, "number", "12,345"),
        ("causal", "text", "causal"),
    ],
)
def test_values_read_well(value: Any, kind: Any, text: str) -> None:
    assert show(value, kind) == text


def test_a_lane_shows_only_columns_with_values_and_counts_its_verdicts() -> None:
    rows = [{"path": "a", "verdict": "pass"}, {"path": "b", "verdict": FAIL}, {"path": "c", "verdict": SKIP}]
    lane = Lane("l", "?", (Column("path", "path"), Column("note", "note"), Column("verdict", "verdict")), rows)
    assert lane.cells() == [["a", "pass"], ["b", "fail"], ["c", "not run"]]
    assert lane.verdict == "1 pass, 1 fail, 1 not run"
    assert not lane.passed


def test_json_of_a_lane_has_no_infinities() -> None:
    lane = Lane("l", "?", (), [{"share": math.inf, "error": 0.5}])
    assert json.loads(json.dumps(lane.to_json(), allow_nan=False))["rows"] == [{"share": "inf", "error": 0.5}]
