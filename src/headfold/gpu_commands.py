"""The commands that need a GPU: gpu proves it, tune searches its tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headfold.lanes import gpu as lane
from headfold.shell import Device, Json, device_of, err, finish, make_folder, track_of


def gpu(
    folder: Annotated[Path, typer.Option("--report", help="Where gpu.jsonl goes.")] = Path("report"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Lanes that run at once; by the CPUs when not given.")
    ] = None,
    device: Device = "cuda",
    as_json: Json = False,
) -> None:
    """Prove one GPU: parity, memory, CUDA graphs, repeats and far offsets of every op on both backends (minutes)."""
    where = device_of(device, None)
    if where.type != "cuda":
        raise ValueError(f"--device: needs cuda or cuda:N, got {device!r}. headfold prove is for a CPU.")
    make_folder(folder)
    lanes = lane.gpu(where, workers=workers, track=track_of(as_json))
    lane.write(folder / "gpu.jsonl", lanes, lane.environment(where))
    err.print(f"report: {folder / 'gpu.jsonl'}", markup=False, highlight=False, soft_wrap=True)
    finish(lanes, as_json)
