"""The capture lane: upstream patterns refused, ours passing, and a broken one of ours found out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from headfold import index_mask
from headfold.backends import eager
from headfold.lanes import capture as lane
from headfold.lanes import measure
from headfold.lanes.capture import EQUAL, GRAPH, OURS, UPSTREAM, Pattern, capture
from headfold.lanes.record import FAIL, PASS, Row
from headfold.lanes.upstream_masks import unmask_branching_on_any, unmask_unless_equal

CPU = torch.device("cpu")
NEG_INF = float("-inf")
UPDATE = OURS[1]
WAYS = pytest.mark.parametrize("way", [unmask_unless_equal, unmask_branching_on_any])


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return capture(CPU).rows


def found(rows: list[Row], part: str) -> dict[str, str]:
    return {row["proof"]: row["found"] for row in rows if part in row["pattern"]}


def test_every_pattern_meets_every_proof_and_passes(rows: list[Row]) -> None:
    assert [row["verdict"] for row in rows] == [PASS] * 18
    assert len({(row["pattern"], row["proof"]) for row in rows}) == 18


def test_the_upstream_patterns_are_refused_for_reading_data(rows: list[Row]) -> None:
    equal = found(rows, "torch.equal")
    assert equal["no data read"] == "refused: DataRead: equal reads tensor data on the host"
    assert equal["traced over fake tensors"] == "refused: DataDependentOutputException: aten.equal.default"
    assert equal["fullgraph compile"].startswith("refused: Unsupported: ")
    assert equal["key 0 unmasked earlier"] == "masked again"
    branch = found(rows, "any()")
    assert branch["no data read"] == "refused: DataRead: Tensor.__bool__ reads tensor data on the host"
    assert branch["traced over fake tensors"].startswith("refused: GuardOnDataDependentSymNode")
    assert branch["fullgraph compile"].startswith("refused: Unsupported: ")
    assert branch["key 0 unmasked earlier"] == "masked again"


@pytest.mark.parametrize("name", [pattern.name for pattern in OURS])
def test_ours_equal_a_plain_call_under_every_proof(rows: list[Row], name: str) -> None:
    for proof in ("no data read", "traced over fake tensors", "fullgraph compile"):
        assert found(rows, name)[proof] == EQUAL


@WAYS
def test_the_reproducers_are_right_where_a_mask_is_written_once(way: Any) -> None:
    indices = lane._selection(3, CPU)
    mask = torch.full((lane.B, lane.S, lane.S), NEG_INF)
    assert torch.equal(way(mask, indices), index_mask(indices, lane.S, dtype=torch.float32))


def test_the_selections_have_every_corner() -> None:
    for seed in range(3):
        rows = lane._selection(seed, CPU).flatten(0, 1)
        holds_both = (rows == 0).any(-1) & (rows == -1).any(-1)
        assert holds_both.any()
        assert (rows == -1).all(-1).any()
        ordered = rows.sort(-1).values
        assert ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()


def reading(indices: Tensor) -> tuple[Tensor, ...]:
    mask = eager.index_mask(indices, lane.S, torch.bool)
    return (mask.logical_not() if mask.all() else mask,)


@pytest.mark.parametrize("proof", [lane.NO_READS, lane.TRACE, lane.FULLGRAPH])
def test_a_pattern_of_ours_that_reads_fails(proof: str) -> None:
    row = lane._row(Pattern("reads", reading, reading, lane._selections), proof, CPU)
    assert row["verdict"] == FAIL
    assert row["found"].startswith("refused: ")


@pytest.mark.parametrize("place", [0, 1])
def test_a_result_in_which_one_bit_differs_fails(place: int) -> None:
    def negated(indices: Tensor) -> tuple[Tensor, ...]:
        results = lane._mask_body(indices)
        results[place][-1, -1, -1].neg_() if place else results[place][-1, -1, -1].logical_not_()
        return results

    row = lane._row(Pattern("differs", lane._mask, negated, lane._selections), lane.NO_READS, CPU)
    assert (row["found"], row["verdict"]) == (f"result {place} differs from eager", FAIL)


def test_an_upstream_pattern_that_passes_fails_its_row() -> None:
    row = lane._row(Pattern("mended", UPDATE.public, UPDATE.body, UPDATE.inputs, refused=True), lane.NO_READS, CPU)
    assert (row["found"], row["verdict"]) == (EQUAL, FAIL)


def test_a_fault_that_is_no_read_is_not_taken_for_a_refusal() -> None:
    def faulty(mask: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        lane._row(Pattern("faulty", UPDATE.public, faulty, UPDATE.inputs, refused=True), lane.NO_READS, CPU)


class FakeGraph:
    """Stands in for a CUDA graph: replays by calling again and copying into the captured results."""

    def __init__(self, pattern: Pattern, broken: bool) -> None:
        self.pattern, self.broken = pattern, broken
        self.made: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []

    def watch(self, *static: Tensor) -> tuple[Tensor, ...]:
        results = tuple(x.clone() for x in self.pattern.public(*static))
        self.made.append((static, results))
        return results

    def replay(self) -> None:
        static, results = self.made[1]  # the first call warms up
        for x, y in zip(results, self.pattern.public(*static), strict=True):
            if not self.broken:
                x.copy_(y)


@pytest.mark.parametrize(("broken", "said"), [(False, EQUAL), (True, "replay 1: result 0 differs from eager")])
@pytest.mark.parametrize("pattern", OURS, ids=lambda p: p.name)
def test_a_replay_is_compared_with_plain_calls_on_other_data(
    pattern: Pattern, broken: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = FakeGraph(pattern, broken)
    stream = type("Stream", (), {"wait_stream": lambda *_: None})
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    watched = Pattern(pattern.name, graph.watch, pattern.body, pattern.inputs)
    assert lane.replayed(watched.public, watched.inputs, CPU) == said


REFUSED_BY_CUDA = "CUDA error: operation not permitted when stream is capturing"


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ([REFUSED_BY_CUDA], f"refused: RuntimeError: {REFUSED_BY_CUDA}"),
        ([REFUSED_BY_CUDA, "CUDA error: invalid"], f"refused: RuntimeError: {REFUSED_BY_CUDA}"),
        (["CUDA error: out of memory"], "failed: RuntimeError: CUDA error: out of memory"),
        (["out of memory", "capture_end failed"], "failed: RuntimeError: out of memory"),
    ],
)
def test_a_failed_capture_says_what_failed_first(errors: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> str:
        try:
            raise RuntimeError(errors[0])
        finally:
            if errors[1:]:
                raise RuntimeError(errors[1])

    monkeypatch.setattr(lane, "replayed", failing)
    assert lane._graph_here(UPSTREAM[0].name, "cuda") == said


@pytest.mark.parametrize(
    ("left", "verdicts"),
    [(EQUAL, [FAIL, PASS]), ("refused: RuntimeError: capturing", [PASS, FAIL]), (None, [FAIL, FAIL])],
)
def test_a_graph_is_judged_in_a_process_of_its_own(
    left: str | None, verdicts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def fresh(*call: Any) -> str | None:
        calls.append(call)
        return left

    monkeypatch.setattr(measure, "in_fresh_process", fresh)
    rows = [lane._row(pattern, GRAPH, torch.device("cuda", 1)) for pattern in (UPSTREAM[0], UPDATE)]
    assert [row["verdict"] for row in rows] == verdicts
    assert calls == [(lane._graph_here, p.name, "cuda:1") for p in (UPSTREAM[0], UPDATE)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a CUDA device has CUDA graphs")
def test_cuda_graphs_are_captured_and_replayed() -> None:
    rows = capture(torch.device("cuda")).rows
    assert [row for row in rows if row["verdict"] != PASS] == []
    assert sum(row["proof"] == GRAPH for row in rows) == len(UPSTREAM) + len(OURS)
