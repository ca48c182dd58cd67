"""What docs/measure_kernels.py times, at sizes of a CPU, and the tables that it becomes."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import measure_kernels
from measuring import catalog, others, rows, tables, worker
from measuring.rows import Absent, Place, Ready, Row, asked, measured

ROOT = Path(__file__).parent.parent
CPU = Place(torch.device("cpu"), "eager", "aot_eager")
ROWS = catalog.catalog()


def once_each() -> list[Any]:
    """One row of each call with each set of sizes; of peers, whose own tests call them, one, which imports them all."""
    found = {(r.call, *r.shape, r.dtype): r for r in reversed(ROWS) if not r.call.startswith(others.NAMES[:-1])}
    return [
        pytest.param(
            row,
            id=f"{row.call} {' '.join(row.shape)} {row.dtype}",
            marks=pytest.mark.slow if row.call in others.NAMES else (),
        )
        for row in found.values()
    ]


@pytest.mark.parametrize("row", once_each())
@pytest.mark.filterwarnings("ignore")
def test_every_call_runs_at_tiny_sizes(row: Row) -> None:
    if row.call in others.NAMES:
        pytest.importorskip("transformers", reason="transformers is not installed")
    found = measured(row.tiny(), CPU, 0.0)
    if row.call.endswith("captured"):
        assert "CUDA" in found["absent"]
    elif row.call.startswith("attn-gym lightning_indexer, fused") or row.call.startswith("cudnn"):
        assert "CUDA" in found["absent"] or "does not import" in found["absent"]
    else:
        assert found.get("failed") is None
        assert 0 < found["fastest"] <= found["ms"] <= found["slowest"]


def test_rows_are_told_apart_and_every_shape_that_was_asked_for_is_there() -> None:
    keys = [(row.call, row.key["shape"], row.dtype) for row in ROWS]
    assert len(set(keys)) == len(keys)
    assert {row.group for row in ROWS} == {catalog.RATES, *catalog.GROUPS}
    shapes = {row.key["shape"] for row in ROWS}
    assert shapes > {
        "b=8 s=4096 h=32 d=128",
        "b=8 s=4096 h=16 d=64",
        "b=1 s=32768 h=64 d=128",
        "b=1 s=32768 h=32 d=128",
        "b=1 sq=32768 sk=65536 h=32 d=128",
        "b=1 sq=32768 sk=262144 h=32 d=128",
    }
    for row in ROWS:  # a selection has scores at its shape to be compared with, and a replay
        if row.call == f"index_topk {catalog.TOPK}, causal":
            for beside in ("index_scores, triton, causal, forward", f"{row.call}, captured"):
                assert (beside, row.key["shape"], "bfloat16") in keys
    rated = {row.dtype for row in ROWS if row.call == "matrix product"}
    assert {row.dtype for row in ROWS if row.group == "dtypes"} | {"bfloat16"} == rated


def test_a_group_comes_with_the_device_s_own_rates() -> None:
    assert {row.group for row in catalog.catalog(("loss",))} == {"loss", catalog.RATES}


def test_flops_are_those_of_what_rows_see() -> None:
    row = next(r for r in ROWS if "sq" in r.shape and r.call.startswith("index_topk"))
    shape = {"b": 1, "sq": 3, "sk": 5, "h": 2, "d": 16}
    assert Row("", "", shape, row.make, beside={"topk": 2}).ready(CPU).flops == 2 * (3 + 4 + 5) * 2 * 16
    full = next(r for r in ROWS if r.call == "index_scores, triton, backward").tiny().ready(CPU)
    assert (full.flops, full.products) == (2 * 2 * 24 * 24 * 4 * 16, 3)


def raising(error: Exception) -> Row:
    def make(*_: Any) -> Ready:
        raise error

    return Row("group", "call", {"s": 1}, make)


def test_what_keeps_a_row_from_being_timed_is_its_answer() -> None:
    said = "CUDA out of memory. Tried to allocate 128.50 GiB. GPU 0 has a total capacity of 79.18 GiB"
    key = {"group": "group", "call": "call", "shape": "s=1", "dtype": "bfloat16"}
    out = measured(raising(torch.OutOfMemoryError(said)), CPU, 1)
    assert out == {**key, "out_of_memory": int(128.5 * 2**30)}
    assert measured(raising(Absent("not installed")), CPU, 1) == {**key, "absent": "not installed"}
    assert measured(raising(ValueError("q needs\nmore")), CPU, 1) == {**key, "failed": "ValueError: q needs"}
    assert (asked("tried to allocate 20 bytes"), asked("CUDA error")) == (20, 0)


def test_a_slow_call_has_fewer_runs_and_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []

    def called() -> None:
        taken.append(0.06)
        time.sleep(0.06)

    def make(*_: Any) -> Ready:
        return Ready(called)

    row = Row("group", "call", {"s": 1}, make)
    found = measured(row, CPU, 5.0)
    assert (found["runs"], found["calls"], len(taken)) == (7, 1, 9)
    assert 60 <= found["host_ms"] <= found["slowest"]
    assert 1 <= measured(row, CPU, 0.4)["runs"] <= 4
    assert measured(row, CPU, 0.0)["runs"] == 1
    monkeypatch.setattr(rows, "BUDGET", 0.1)
    assert measured(row, CPU, 5.0)["runs"] == 3


def test_a_short_call_has_more_runs() -> None:
    found = measured(Row("group", "call", {"s": 1}, lambda *_: Ready(lambda: None)), CPU, 5.0)
    assert (found["runs"], found["calls"]) == (rows.MOST, 5)


def asleep(*_: Any) -> Ready:
    return Ready(lambda: time.sleep(60))


def dead(*_: Any) -> Ready:
    os._exit(3)


def test_rows_go_to_other_processes() -> None:
    assert [one.key for one in pickle.loads(pickle.dumps(ROWS))] == [row.key for row in ROWS]


def test_lines_are_written_as_they_come_and_failures_are_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "found.jsonl"

    def answers() -> Iterator[dict[str, Any]]:
        yield {"device": "H100"}
        yield line("one", ms=2.0)
        assert len(file.read_text().splitlines()) == 2
        yield line("two", failed="ValueError: no")

    with file.open("w") as to:
        assert measure_kernels.write(answers(), to, 2) == 1
    assert [json.loads(x).get("call") for x in file.read_text().splitlines()] == [None, "one", "two"]
    said = [x.partition(":")[0] for x in capsys.readouterr().err.splitlines()]
    assert said == ["[0/2] measuring on", "[1/2] one s=1 bfloat16", "[2/2] two s=1 bfloat16"]


@pytest.mark.slow
def test_processes_that_die_or_sleep_are_replaced_and_the_others_rows_are_timed() -> None:
    dying, sleeping, fine = Row("g", "dead", {"s": 1}, dead), Row("g", "asleep", {"s": 1}, asleep), ROWS[0].tiny()
    facts, *found = measure_kernels.lines([dying, fine, sleeping, fine], CPU, 5.0)
    assert {"device", "driver", "torch", "headfold"} <= facts.keys()
    assert found[0]["failed"] == "the process that ran it ended"
    assert found[2]["slow"] == 5.0
    assert all(found[i]["call"] == "matrix product" and found[i]["ms"] > 0 for i in (1, 3))
    several = [dying, *(row.tiny() for row in ROWS[:3])]
    assert [row.call for row in worker.rehearsed(several, CPU, 1, 60.0)] == ["dead", *["matrix product"] * 3]
    assert list(worker.rehearsed([sleeping], CPU, 1, 0.1)) == []


def test_without_a_gpu_it_says_so_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["measure_kernels.py", "--only", "topk", "--only", "peers"])
    assert measure_kernels.main() == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "measure_kernels needs a CUDA or ROCm device, and torch finds none here.\n")


def line(call: str, shape: str = "s=1", dtype: str = "bfloat16", **found: Any) -> dict[str, Any]:
    if "ms" in found:
        found |= {"fastest": found["ms"], "slowest": found["ms"], "runs": 7, "calls": 5}
    return {"group": "g", "call": call, "shape": shape, "dtype": dtype, **found}


def facts(device: str, torch_version: str = "2.11.0+cu130") -> dict[str, Any]:
    return {"device": device, "driver": "580", "torch": torch_version, "triton": "3.6.0", "cuda": "13.0"}


def test_every_card_has_a_table_of_all_its_files_where_the_later_row_counts(tmp_path: Path) -> None:
    product = line("matrix product", "8^3", ms=1.0, tflops=800.0, products=1)
    scores = "index_scores, triton, causal, forward"
    first = [
        facts("H100"),
        product,
        line("copy", "bytes=4", "uint8", ms=1.0, gb_per_s=3000.0),
        line(scores, ms=8.0, tflops=400.0, products=1, host_ms=0.2),
        line("small call", ms=1.0, host_ms=0.9),
        line("index_topk 2, causal", ms=20.0),
        line("index_topk 2, causal, captured", ms=9.0),
        line("index_scores, materialized, forward", out_of_memory=1 << 37),
        line("slow peer", slow=40.0),
        line("other peer", absent="not installed"),
    ]
    later = [
        facts("H100", "2.12.0"), {**product, "tflops": 400.0}, line("index_topk 2, causal", ms=10.0, tflops=100.0),
        facts("H200"), {**product, "dtype": "float32"}, line("selected_scores", ms=1.0, tflops=1.0),
    ]  # fmt: skip
    for name, written in (("kernels_a.jsonl", first), ("kernels_b.jsonl", later), ("other.jsonl", [facts("none")])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in written))
    said = tables.kernels(tmp_path)
    h100, h200 = said.split("### H200")
    cells = {(x := [c.strip() for c in row.split("|")[1:-1]])[0]: x[1:] for row in h100.splitlines() if "|" in row}
    at = {name: i for i, name in enumerate(tables.HEAD[1:])}
    assert cells[scores][at["of the product's"]] == "50%"
    assert cells["index_topk 2, causal"][at["median ms"]] == "10"
    assert cells["index_topk 2, causal"][at["note"]] == "25% on top of scoring"
    assert cells["index_topk 2, causal"][at["of the product's"]] == "25%"  # of its own day's product
    assert cells["index_topk 2, causal, captured"][at["note"]] == "12% on top of scoring"
    assert cells["copy"][at["note"]] == "3.00 TB/s read and written"
    assert cells["small call"][at["note"]] == "the host takes 0.9 ms to launch it"
    assert cells[scores][at["note"]] == ""
    assert cells["index_scores, materialized, forward"][at["note"]] == "out of memory, asked for 128 GiB"
    assert cells["slow peer"][at["note"]] == "took more than 40 s"
    assert cells["other peer"][at["note"]] == "not installed"
    assert "torch 2.11.0, Triton 3.6.0, CUDA 13.0; " in h100
    assert "torch 2.12.0, Triton 3.6.0, CUDA 13.0; " in h100
    assert "8^3 float32" in h200
    assert "%" not in h200  # the product of another card is no measure of this one's
    assert "index_scores" not in h200


def test_a_short_table_has_plain_pytorch_beside_each_call(tmp_path: Path) -> None:
    (ours, theirs, shape), (backward, _, _), *_ = tables.BESIDE_PYTORCH
    at = {"shape": shape, "peak_bytes": 1 << 20}
    written = [
        facts("H100"), {**line(ours, ms=2.0), **at}, {**line(theirs, ms=30.0), **at, "peak_bytes": 1 << 30},
        {**line(backward, ms=9.0), **at},  # beside which there is nothing
        facts("H200"), {**line(ours, ms=2.0), **at}, {**line(theirs, out_of_memory=1 << 37), "shape": shape},
    ]  # fmt: skip
    (tmp_path / "kernels_a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in tables.beside_pytorch(tmp_path).splitlines()]
    assert [row for row in rows if row and row[0].startswith("index_scores")] == [
        ["index_scores, forward", shape, "2 ms", "30 ms", "15.0 ×", "1 MiB", "1 GiB"],
        ["index_scores, forward", shape, "2 ms", "out of memory, asked for 128 GiB", "", "1 MiB", ""],
    ]


def test_the_file_of_one_card_has_no_heading() -> None:
    said = tables.kernels(ROOT / "docs" / "results")
    assert said.startswith("| call ")
    assert "NVIDIA H200" in said
