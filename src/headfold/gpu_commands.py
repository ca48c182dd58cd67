"""The commands that need a GPU: gpu proves it, tune searches its tiles."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from headfold.lanes import gpu as lane
from headfold.lanes import tuning
from headfold.lanes.record import Lane
from headfold.shell import Device, Json, device_of, finish, make_folder, tell, track_of


def gpu(
    folder: Annotated[Path, typer.Option("--report", help="Where gpu.jsonl goes.")] = Path("report"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Lanes that run at once; by the CPUs when not given.")
    ] = None,
    device: Device = "cuda",
    as_json: Json = False,
) -> None:
    """Prove one GPU: parity, memory, CUDA graphs, repeats and far offsets of every op on both backends (minutes)."""
    where = _gpu(device)
    make_folder(folder)
    start, report, facts = time.monotonic(), folder / "gpu.jsonl", lane.environment(where)

    def ended(one: Lane, lanes: list[Lane]) -> None:
        # At once, so that what was found stays if the command is ended.
        lane.write(report, lanes, {**facts, "seconds": round(time.monotonic() - start)})
        tell(f"{'pass' if one.passed else 'FAIL'}  {one.name}  {one.notes[-1]}")

    lanes = lane.gpu(where, workers=workers, track=track_of(as_json), ended=ended)
    tell(f"report: {report}")
    finish(lanes, as_json)


def tune(
    kernel: Annotated[str, typer.Option(help=f"One of {', '.join(tuning.KERNELS)}.")],
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "bfloat16",
    heads: Annotated[int, typer.Option(min=1, help="Heads of the indexer, or of the attention.")] = 32,
    dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 128,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that compile at once; by the CPUs when not given.")
    ] = None,
    device: Device = "cuda",
    as_json: Json = False,
) -> None:
    """Search the tiles of one kernel on the GPU at hand, and print the row that the table of tiles should have."""
    where, track = _gpu(device), track_of(as_json)
    finish([tuning.tune(kernel, where, dtype=dtype, heads=heads, dim=dim, workers=workers, track=track)], as_json)


def _gpu(name: str) -> torch.device:
    device = device_of(name, None)
    if device.type != "cuda":
        raise ValueError(f"--device: needs cuda or cuda:N, got {name!r}. headfold prove is for a CPU.")
    return device
