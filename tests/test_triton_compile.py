"""The compile lane: kernels for four chips, without a GPU, in a process of their own without the interpreter."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headfold.lanes import compiling
from headfold.lanes.processes import answers, processes
from headfold.lanes.record import FAIL, PASS, Lane

pytest.importorskip("triton", reason="Triton is not installed")
from headfold.backends import triton
from headfold.backends.triton.compiling import SHARED, Compiled, Specimen
from headfold.backends.triton.score_specimens import KERNELS, specimens
from headfold.backends.triton.table import SHARED as ALIASES
from headfold.backends.triton.table import rows_of, tile

ARCHS = ["sm_80", "sm_90", "sm_100", "gfx942"]
SPECIMEN = Specimen("x", None, {}, {}, 4, 2)
FINE = Compiled(128, 0, 50_000, {"wgmma.mma_async": 8}, 1.0)


def compiled(arch: str, first: int | None, workers: int | None = None) -> dict[str, Any]:
    code = f"""
import json
from headfold.lanes.compiling import compiled
if __name__ == "__main__":
    print(json.dumps(compiled(("{arch}",), first={first}, workers={workers}).to_json()))
"""
    lane: dict[str, Any] = json.loads(compiling_process(code))
    return lane


def compiling_process(code: str, **variables: str) -> str:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def failed(lane: dict[str, Any]) -> list[tuple[str, str]]:
    return [(row["kernel"], row["note"]) for row in lane["rows"] if row["verdict"] == FAIL]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_default_tiles_compile_without_spills_and_use_the_tensor_cores(arch: str) -> None:
    lane = compiled(arch, 3)
    kernels = [row["kernel"] for row in lane["rows"]]
    assert kernels == [f"{x} bfloat16 h=32 d=128" for x in ("scores", "query_gradients", "key_gradients")]
    assert failed(lane) == []
    assert all(row["programs"] >= 1 for row in lane["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_row_of_the_table_compiles(arch: str) -> None:
    assert failed(compiled(arch, None)) == []


@pytest.mark.slow
def test_every_kernel_fits_hopper_with_the_triton_at_hand_whatever_it_spills() -> None:
    # make test-earlier: with those that the earliest versions of torch bring, none of which dies of a kernel.
    rows = [row for row in compiled("sm_90", None)["rows"] if triton.FLOAT64 or "float64" not in row["kernel"]]
    assert len(rows) > 150
    assert [row for row in rows if "registers" not in row or row["shared"] > SHARED["sm_90"]] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_every_row_of_the_table_has_a_specimen(arch: str) -> None:
    had = set()
    for specimen in specimens(arch):
        said = re.fullmatch(r"(\w+) (\w+) h=(\d+) d=(\d+)", specimen.name)
        if said and said[1] in KERNELS:
            had.add((tile(said[1], arch, getattr(torch, said[2]), int(said[4]), int(said[3])), said[2]))
    for row in rows_of(arch):
        if row.kernel in KERNELS:
            for dtype in {"half": ("bfloat16", "float16")}.get(row.dtype, (row.dtype,)):
                assert (row, dtype) in had


@pytest.mark.parametrize("arch", ARCHS)
def test_every_row_of_the_table_is_some_call_s(arch: str) -> None:
    dtypes = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for row in rows_of(arch):
        calls = [kernel for kernel, of in ALIASES.items() if of == row.kernel]
        some = [
            (kernel, dtype, h)
            for kernel in (row.kernel, *calls)
            for dtype in dtypes
            for h in (1, 2, 4, 8, 16, 32, 64, 128)
            if row.takes(dtype) and h <= row.h and tile(kernel, arch, dtype, min(row.d, 1024), h) is row
        ]
        assert some, row


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (FINE, []),
        (Compiled(255, 8, 50_000, {"wgmma.mma_async": 8}, 1.0), ["spills 8 bytes"]),
        (Compiled(128, 0, SHARED["sm_90"] + 1, {"wgmma.mma_async": 8}, 1.0), ["needs 232449 bytes of shared memory"]),
        (Compiled(128, 0, 50_000, {"mma.sync": 8}, 1.0), ["has no wgmma.mma_async"]),
        (replace(FINE, serial=True), ["waits for each of its matrix instructions"]),
    ],
)
def test_a_breach_is_named(result: Compiled, said: list[str]) -> None:
    found = result.breaches(SPECIMEN, "sm_90")
    assert len(found) == len(said)
    assert all(x.startswith(y) for x, y in zip(found, said, strict=True))


SKIPPABLE = """
import json
from headfold.backends.triton import backward
from headfold.backends.triton.compiling import compile_specimen
from headfold.backends.triton.score_specimens import specimens
from {module} import {skippable} as end_of_loop
backward.never_empty = end_of_loop
one = next(x for x in specimens("sm_90") if x.name == "key_gradients bfloat16 h=32 d=128")
print(json.dumps(compile_specimen(one, "sm_90").breaches(one, "sm_90")))
"""


def test_a_loop_that_may_be_skipped_is_found_where_it_takes_products_one_instruction_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "loops.py").write_text(
        "import triton\n\n\n@triton.jit\ndef to_last(first, last):\n    return last\n", encoding="utf-8"
    )
    breaches = {}
    for module, name in (("headfold.backends.triton.products", "never_empty"), ("loops", "to_last")):
        said = compiling_process(SKIPPABLE.format(module=module, skippable=name), PYTHONPATH=str(tmp_path))
        breaches[name] = json.loads(said)
    assert breaches == {"never_empty": [], "to_last": ["waits for each of its matrix instructions before the next"]}


ASIDE = """
import json
from dataclasses import replace
from headfold.backends.triton.compiling import compile_specimen
from headfold.backends.triton.sift_specimens import specimens
one = next(iter(specimens("sm_90")))
few = compile_specimen(one, "sm_90"), compile_specimen(replace(one, registers=104), "sm_90")
print(json.dumps([[x.spilled, x.again, len(x.breaches(replace(one, aside=1 << 12), "sm_90"))] for x in few]))
"""


def test_what_a_loop_puts_aside_in_each_turn_is_told_from_what_is_put_aside_once() -> None:
    (spilled, again, breaches), (more, always, other) = json.loads(compiling_process(ASIDE))
    assert more > spilled
    assert always > 0.05 > 0.01 > again
    assert (breaches, other) == (0, 1)


def test_programs_a_core_are_bounded_by_registers_and_by_shared_memory() -> None:
    assert FINE.programs_per_core(SPECIMEN, "sm_90") == 4
    assert Compiled(240, 0, 50_000, {}, 1.0).programs_per_core(SPECIMEN, "sm_90") == 2
    assert Compiled(64, 0, 100_000, {}, 1.0).programs_per_core(SPECIMEN, "sm_90") == 2


def test_several_processes_compile_the_rows_that_one_does_in_its_order() -> None:
    lanes = [compiled("sm_80", 3, workers) for workers in (1, 2)]
    assert lanes[0]["rows"] == lanes[1]["rows"]
    assert len(lanes[0]["rows"]) == 3


def test_jobs_that_wait_are_dropped_where_a_lane_ends_early() -> None:
    waiting: list[Future[None]] = []
    with pytest.raises(KeyboardInterrupt), processes(1) as pool:  # noqa: PT012 - the block is what is interrupted
        waiting += [pool.submit(time.sleep, 0.2) for _ in range(20)]
        raise KeyboardInterrupt
    assert sum(job.cancelled() for job in waiting) >= 15


def square(n: int) -> int:
    """Square a number, but for those that a process dies of."""
    if n in (3, 4, 9):
        os.kill(os.getpid(), signal.SIGKILL)
    return n * n


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_process_dies_of_costs_no_other_answer(count: int) -> None:
    found = list(answers(square, [(n,) for n in range(10)], count))
    assert found == [0, 1, 4, None, None, 25, 36, 49, 64, None]


def test_jobs_of_answers_that_nobody_reads_are_dropped() -> None:
    began = time.monotonic()
    with closing(answers(time.sleep, [(0.2,)] * 100, 1)) as found:
        next(found)
    assert time.monotonic() - began < 15


def test_a_kernel_that_a_process_dies_of_fails_its_row_and_loses_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["query_gradients bfloat16 h=32 d=128", "others"]
    monkeypatch.setattr(compiling, "_compiler", lambda: SimpleNamespace(TARGETS=("sm_90",), VERSION="3"))
    monkeypatch.setattr(compiling, "_specimens", lambda _: [SimpleNamespace(name=name) for name in names])
    given = iter([None, {"kernel": "others", "verdict": PASS}])
    monkeypatch.setattr(compiling, "answers", lambda *_: given)
    monkeypatch.setattr(compiling, "closing", nullcontext)
    first, second = compiling.compiled(("sm_90",), workers=2).rows
    assert (first["kernel"], first["arch"], first["verdict"]) == (names[0], "sm_90", FAIL)
    assert first["note"] == "the process that compiled it died, as for lack of memory"
    assert second == {"kernel": "others", "verdict": PASS}


def test_the_lane_refuses_an_unknown_chip_and_the_interpreter() -> None:
    if triton.INTERPRETED:
        with pytest.raises(RuntimeError, match=r"got TRITON_INTERPRET=1\. Unset it"):
            compiling.compiled(("sm_90",))
    else:
        with pytest.raises(ValueError, match="--arch must be one of 'sm_80'"):
            compiling.compiled(("sm_70",))


def test_a_page_gets_the_table_between_its_markers(tmp_path: Path) -> None:
    lane = Lane("compile", "?", compiling.COLUMNS, [{"kernel": "scores", "arch": "sm_90", "verdict": "pass"}], ["note"])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compiled -->\nold\n<!-- end -->\nafter\n")
    compiling.write(page, lane)
    text = page.read_text()
    assert text.startswith("before\n<!-- compiled -->\n\n| kernel")
    assert "| scores" in text
    assert "old" not in text
    assert text.endswith("note.\n<!-- end -->\nafter\n")
    page.write_text("no markers")
    with pytest.raises(ValueError, match=r"got .* without"):
        compiling.write(page, lane)
