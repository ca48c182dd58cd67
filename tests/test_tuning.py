"""What tune does without a GPU: candidates, the row that it writes, and refusals."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from headfold import backends, cli
from headfold.lanes import tuning
from headfold.lanes.record import PASS, Lane
from headfold.lanes.tuning import KERNELS, candidates, written

pytest.importorskip("triton", reason="Triton is not installed")
from headfold.backends.triton import table
from headfold.backends.triton.table import ANY, TABLE, Row, tile

CUDA = torch.device("cuda")
NOW = Row("scores", "sm_90", "half", 128, ANY, 128, 64, 4, 2)


def test_every_kernel_of_the_table_that_has_tiles_can_be_tuned() -> None:
    others = {"fold", "compare", "attention_masked", *table.SHARED}
    assert set(KERNELS) == {row.kernel for row in TABLE} - others


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_candidates_begin_with_the_tables_own_and_are_few_and_different(kernel: str, dtype: torch.dtype) -> None:
    now = tile(kernel, "sm_90", dtype, 128, 32)
    found = candidates(kernel, now, 32)
    assert found[0] == now
    assert 5 <= len(found) == len(set(found)) <= 60
    assert {row[:5] for row in found} == {now[:5]}
    for row in found[1:]:
        assert row.warps in (4, 8)
        assert 128 <= row.rows * row.keys // row.warps <= 4096
        assert row.stages <= (4 if dtype == torch.bfloat16 else 2)


def test_where_a_loop_takes_its_bounds_from_is_tried_both_ways() -> None:
    for kernel in KERNELS:
        now = tile(kernel, "sm_90", torch.bfloat16, 128, 32)
        found = candidates(kernel, now, 32)
        assert (now._replace(uniform=not now.uniform) in found) == (kernel in ("scores", "query_gradients"))


def test_rows_of_heads_are_not_more_than_the_heads() -> None:
    now = tile("attention", "sm_90", torch.bfloat16, 128, 4)
    assert {row.rows for row in candidates("attention", now, 4)[1:]} == {16}
    assert {row.rows for row in candidates("attention", now, 33)[1:]} == {16, 32, 64}


def test_a_row_is_written_as_the_table_has_it() -> None:
    said = written(NOW)
    assert said == 'Row("scores", "sm_90", "half", 128, ANY, 128, 64, 4, 2),'
    assert eval(said, {"Row": Row, "ANY": ANY}) == (NOW,)
    assert written(NOW._replace(uniform=False)).endswith(", 4, 2, None, False),")


def test_the_most_registers_are_part_of_a_row_and_of_its_launch() -> None:
    capped = NOW._replace(registers=168)
    said = written(capped)
    assert said == 'Row("scores", "sm_90", "half", 128, ANY, 128, 64, 4, 2, 168),'
    assert eval(said, {"Row": Row, "ANY": ANY}) == (capped,)
    assert NOW.options == {"num_warps": 4}
    assert capped.options == {"num_warps": 4, "maxnreg": 168}


def test_registers_for_one_more_program_are_asked_for_where_shared_memory_has_room() -> None:
    from headfold.backends.triton.compiling import Compiled

    specimen = tuning.specimen_of(NOW, "bfloat16", 32, 128)
    assert specimen.registers is None
    assert tuning.specimen_of(NOW._replace(registers=96), "bfloat16", 32, 128).registers == 96
    roomy = Compiled(216, 0, 66560, {}, 0.0)
    assert roomy.programs_per_core(specimen, "sm_90") == 2
    assert roomy.registers_for_one_more(specimen, "sm_90") == 168
    assert Compiled(216, 0, 83456, {}, 0.0).registers_for_one_more(specimen, "sm_90") is None


def search() -> tuning.Search:
    return tuning.Search("sm_90", "bfloat16", 32, 128, CUDA)


def test_a_candidate_is_tried_again_with_so_few_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    from headfold.backends.triton import compiling
    from headfold.backends.triton.compiling import Compiled

    launched: list[int | None] = []
    monkeypatch.setattr(tuning.Search, "_launch", lambda _, tile: launched.append(tile.registers))
    monkeypatch.setattr(
        compiling, "compile_specimen", lambda x, _: Compiled(x.registers or 216, 8 * (x.registers == 80), 40_000, {}, 0)
    )
    sizes = {"rows": 128, "keys": 64, "warps": 4, "stages": 2, "uniform": "yes"}
    assert search().compiled(NOW) == [
        (NOW, {**sizes, "registers": 216, "shared": 40_000}),
        (
            NOW._replace(registers=168),
            {**sizes, "cap": 168, "registers": 168, "shared": 40_000},
        ),
    ]
    assert launched == [None, 168]
    spilled = NOW._replace(registers=80)
    ((_, row),) = search().compiled(spilled)
    assert (row["verdict"], row["note"]) == ("", "spills 8 bytes")
    assert launched == [None, 168]
    row = search().compiled(spilled, anyway=True)[0][1]
    assert ("verdict" in row, row["note"]) == (False, "spills 8 bytes")
    assert launched[2] == 80


def test_a_candidate_that_does_not_launch_is_not_timed_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from headfold.backends.triton import compiling
    from headfold.backends.triton.compiling import Compiled

    def fail(*_: Any) -> None:
        raise RuntimeError("out of resource\nand more")

    monkeypatch.setattr(tuning.Search, "_launch", fail)
    monkeypatch.setattr(compiling, "compile_specimen", lambda *_: Compiled(64, 0, 40_000, {}, 0))
    ((_, row),) = search().compiled(NOW)
    assert (row["verdict"], row["note"]) == ("", "RuntimeError: out of resource")


def at_once(job: Any, jobs: list[tuple[Any, ...]], count: int) -> Any:
    """Do each job where it is asked for, but for the last one, of which its process dies."""
    assert count == 3
    yield from (job(*one) for one in jobs[:-1])
    yield None


def test_what_compiled_is_timed_and_the_fastest_row_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(_: tuning.Search, tile: Row, anyway: bool) -> list[tuple[Row, dict[str, Any]]]:
        assert anyway == (tile.rows == 128)
        sizes = {"rows": tile.rows, "keys": 64, "warps": 4, "stages": 2, "uniform": "no"}
        if tile.rows == 256:
            return [(tile, {**sizes, "verdict": "", "note": "spills 8 bytes"})]
        return [(tile, sizes), (tile._replace(registers=80), {**sizes, "cap": 80})]

    def timed(_: tuning.Search, tile: Row, row: dict[str, Any], call: object) -> dict[str, Any]:
        assert call == "call"
        return {**row, "seconds": 1.0 if tile.registers else 2.0, "verdict": PASS}

    monkeypatch.setattr(tuning, "answers", at_once)
    monkeypatch.setattr(tuning.Search, "compiled", compiled)
    monkeypatch.setattr(tuning.Search, "timed", timed)
    monkeypatch.setattr(tuning.Search, "inputs", lambda *_: None)
    monkeypatch.setattr(tuning, "candidates", lambda *_: [NOW, NOW._replace(rows=256), NOW._replace(rows=512)])
    monkeypatch.setattr(backends, "load", lambda _: type("Kernels", (), {"INTERPRETED": False}))
    monkeypatch.setattr(table, "arch_of", lambda _: "sm_90")
    monkeypatch.setattr(table, "tile", lambda *_: NOW)
    monkeypatch.setitem(tuning.KERNELS, "scores", tuning.Kernel((128,), (64,), lambda *_: "call"))  # type: ignore[arg-type]
    lane = tuning.tune("scores", CUDA, dtype="bfloat16", heads=32, dim=128, workers=3)
    assert [(row["rows"], row.get("cap"), row.get("times")) for row in lane.rows] == [
        (128, 80, 0.5),
        (128, None, 1.0),
        (256, None, None),
        (512, None, None),
    ]
    assert lane.rows[-1]["note"] == "the process that compiled it died, as for lack of memory"
    assert lane.notes[0].endswith("128, 64, 4, 2, 80, False),")


def ranked(*seconds: float | None) -> Lane:
    rows: list[dict[str, Any]] = []
    for n, taken in enumerate(seconds):
        row: dict[str, Any] = {"rows": 64 << n, "keys": 64, "warps": 4, "stages": 2}
        rows.append(row if taken is None else {**row, "seconds": taken, "verdict": PASS})
    lane = Lane("tune", "?", tuning.COLUMNS, rows)
    tuning._rank(lane, NOW._replace(arch="*"), "sm_90")
    return lane


def test_the_fastest_is_first_and_becomes_the_chips_own_row() -> None:
    lane = ranked(2.0, None, 1.0)
    assert [row.get("times") for row in lane.rows] == [0.5, 1.0, None]
    assert lane.notes == [
        'The table\'s new row, before the one it has: Row("scores", "sm_90", "half", 128, ANY, 256, 64, 4, 2),'
    ]
    assert ranked(1.0, 2.0).notes[0].startswith("The table's own is the fastest")


def test_where_nothing_ran_the_lane_fails() -> None:
    lane = ranked(None, None)
    assert lane.notes == ["No candidate ran: the table stays as it is."]
    assert not lane.passed


def test_a_candidate_is_the_tables_first_row_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    import triton.testing

    seen: list[Row] = []
    before = tile("scores", "sm_90", torch.bfloat16, 128, 32)
    candidate = before._replace(rows=64)
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, quantiles: [3.0, 2.0, 4.0])
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    row = search().timed(candidate, {}, lambda: seen.append(tile("scores", "sm_90", torch.bfloat16, 128, 32)))
    assert seen == [candidate]
    assert tile("scores", "sm_90", torch.bfloat16, 128, 32) == before != candidate
    assert row == {"seconds": 0.003, "low": 0.002, "high": 0.004, "verdict": PASS}

    def fail() -> None:
        raise RuntimeError("no memory\nand more")

    assert search().timed(candidate, {"rows": 256}, fail) == {
        "rows": 256,
        "verdict": "",
        "note": "RuntimeError: no memory",
    }


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_a_specimen_and_a_call_that_runs(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = backends.load("triton")
    if not kernels.INTERPRETED:
        pytest.skip("on a GPU the command itself runs them")
    monkeypatch.setattr(tuning, "TOPK", 5)
    inputs = tuning.Search("cpu", "float32", 2, 16, torch.device("cpu")).inputs(4, 20)
    KERNELS[kernel].call(kernels, inputs)()
    specimen = tuning.specimen_of(tile(kernel, "sm_90", torch.bfloat16, 128, 32), "bfloat16", 32, 128)
    assert specimen.name.startswith(kernel)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kernel": "fold"}, "--kernel must be one of 'scores', "),
        ({"dtype": "int8"}, "--dtype must be one of 'float16'"),
    ],
)
def test_what_cannot_be_tuned_is_refused(change: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tuning.tune(**{"kernel": "scores", "device": CUDA, "dtype": "bfloat16", "heads": 2, "dim": 16, **change})  # type: ignore[arg-type]


def test_a_machine_without_cuda_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["headfold", "tune", "--kernel", "scores"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1)
    assert "no CUDA or ROCm device" in err
