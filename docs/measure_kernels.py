"""Time the kernels on the GPU at hand, as JSON lines: what docs/kernels.md says was measured.

    python docs/measure_kernels.py --output docs/results/kernels_h200.jsonl
    python docs/measure_kernels.py --only topk --only peers --output docs/results/kernels_h200.jsonl --append

The first line says where it was measured; then a row a line, each as soon as it is there. Files may hold several
measurements, of other days and cards: docs/regenerate.py makes a table of each card, where what came later counts.
Every measurement begins with the device's own rates, of a matrix product in each dtype and of a copy.

A row has the median of seven runs, of more where they are short, and their range in milliseconds, what the host took to
launch a call (host_ms, the median), and the peak of what the call allocates; one with a rate says how many products it
counts. A run is five calls in a row, and what one of them took, unless that would take seconds: then it is one call.
Instead of times a row may say that it ran out of memory and what it asked for, took longer than it may, calls what is
not installed, or failed.
Kernels are compiled beforehand, by several processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from measuring.catalog import GROUPS, catalog
from measuring.rows import Place, Row
from measuring.worker import Worker, rehearsed

REHEARSAL = 100.0  # seconds that compiling beforehand may take


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time the kernels on the GPU at hand.")
    parser.add_argument("--only", action="append", choices=GROUPS, help="a group of rows; may be repeated")
    parser.add_argument("--seconds", type=float, default=30.0, help="what a row may take (default %(default)s)")
    parser.add_argument("--output", type=Path, help="where the lines go, instead of standard output")
    parser.add_argument("--append", action="store_true", help="add to the file instead of writing it anew")
    parser.add_argument(
        "--workers", type=int, help="processes that compile beforehand; 0 for none; by the CPUs if absent"
    )
    return parser.parse_args(arguments)


def lines(rows: Sequence[Row], place: Place, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the device's facts, and then the answer of every row; a process that broke or was too slow is replaced."""
    worker = Worker(place)
    try:
        yield worker.facts()
        for row in rows:
            answer = worker.time(row, seconds)
            yield answer
            if {"slow", "failed"} & answer.keys():
                worker.end()
                worker = Worker(place)
                worker.facts()
    finally:
        worker.end()


def write(answers: Iterable[dict[str, Any]], to: TextIO, count: int) -> int:
    """Write lines as they come, say each on standard error, and return how many rows failed."""
    failed = 0
    for i, answer in enumerate(answers):
        to.write(json.dumps(answer) + "\n")
        to.flush()
        said = {name: value for name, value in answer.items() if name not in ("group", "call", "shape", "dtype")}
        name = " ".join(str(answer[x]) for x in ("call", "shape", "dtype")) if i else "measuring on"
        sys.stderr.write(f"[{i}/{count}] {name}: {json.dumps(said)}\n")
        failed += "failed" in answer
    return failed


def main() -> int:
    """Measure what is asked for."""
    chosen = options()
    if not torch.cuda.is_available():
        sys.stderr.write("measure_kernels needs a CUDA or ROCm device, and torch finds none here.\n")
        return 2
    start, place = time.monotonic(), Place(torch.device("cuda"))
    rows = catalog(tuple(chosen.only or GROUPS))
    workers = min(8, (os.cpu_count() or 2) // 2) if chosen.workers is None else chosen.workers
    first = [row for row in reversed(rows) if row.rehearsed]  # what takes longest to compile comes late in the list
    for i, row in enumerate(rehearsed(first, place, workers, REHEARSAL) if workers else (), 1):
        sys.stderr.write(f"[{i}/{len(first)}] compiled: {row.key}\n")
    if chosen.output is None:
        failed = write(lines(rows, place, chosen.seconds), sys.stdout, len(rows))
    else:
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        with chosen.output.open("a" if chosen.append else "w", encoding="utf-8") as file:
            failed = write(lines(rows, place, chosen.seconds), file, len(rows))
    sys.stderr.write(f"{len(rows)} rows in {time.monotonic() - start:.0f} s, {failed} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
