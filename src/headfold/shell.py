"""What the commands share: their options, the device and folder that these name, and lanes in print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import track as rich_track
from rich.table import Table
from rich.text import Text

from headfold.lanes.record import FAIL, PASS, SKIP, Lane

# A pipe has no width of its own; tables fold badly at the 80 columns that would be assumed.
out, err = Console(width=None if sys.stdout.isatty() else 160), Console(stderr=True)
STYLES = {PASS: "green", FAIL: "bold red", SKIP: "yellow"}

Preset = Annotated[str | None, typer.Option(help="A published model's indexer, such as deepseek-v3.2 or glm-5.")]
Shape = Annotated[
    str | None, typer.Option(help='small, prod, full, chunk, train, or text like "b=1,sq=4096,sk=4096,h=32,d=128".')
]
Inputs = Annotated[Path | None, typer.Option(help="A safetensors file with captured q, weights and k.")]
Tokens = Annotated[
    int | None, typer.Option(min=1, help="Positions of a --preset's prefill; 4096 (parity: 512) when not given.")
]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Batch size of a --preset; 1 when not given.")]
Dtype = Annotated[str | None, typer.Option(help="float16, bfloat16, float32 or float64.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's default when not given.")]
Workspace = Annotated[int | None, typer.Option(help="headfold's workspace in bytes; 64 MiB when not given.")]
Causal = Annotated[bool, typer.Option("--causal", help="Rows see no later keys.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved timing rounds.")]


def exclude(option: str, **others: object) -> None:
    """Refuse options that this one leaves nothing to say about."""
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{option}: excludes --{name}, got {str(value)!r} for it.")


def make_folder(folder: Path) -> None:
    """Make the report's folder before the lanes run, so that nothing is measured in vain."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--report: needs a folder, got {folder} ({error.strerror}).") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--report: needs a folder that can be written, got {folder}.")


def device_of(name: str, threads: int | None) -> torch.device:
    """Return a device that is here, and set the CPU threads."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: needs cpu, cuda or cuda:N, got {name!r}.") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: needs cpu, cuda or cuda:N, got {name!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: needs a device that torch sees, got {name!r} and no CUDA or ROCm device.")
    return device


def track_of(as_json: bool) -> Callable[[Sequence[Any], str], Iterable[Any]]:
    """Return what wraps a list in a progress bar, on stderr; none beside JSON."""
    return partial(_bar, quiet=as_json)


def _bar(items: Sequence[Any], description: str, *, quiet: bool) -> Iterable[Any]:
    return rich_track(items, description=description, console=err, transient=True, disable=quiet)


def tell(line: str, *, style: str | None = None) -> None:
    """Print a line to stderr as it is."""
    err.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def finish(lanes: list[Lane], as_json: bool) -> NoReturn:
    """Print the lanes and exit with 0 if every verdict passed, 1 if one failed."""
    passed = all(lane.passed for lane in lanes)
    if as_json:
        print(json.dumps({"passed": passed, "lanes": [lane.to_json() for lane in lanes]}, indent=1))  # noqa: T201 - for programs
    else:
        for lane in lanes:
            _print(lane)
        if len(lanes) > 1:
            out.print("[green]contract kept[/]" if passed else "[bold red]contract BROKEN[/]")
    raise typer.Exit(0 if passed else 1)


def _print(lane: Lane) -> None:
    table = Table(title=escape(f"{lane.name}: {lane.question}"), title_justify="left", title_style="bold")
    for column in lane.filled_columns():
        table.add_column(column.title, justify="left" if column.kind == "text" else "right", overflow="fold")
    for row, cells in zip(lane.rows, lane.cells(), strict=True):
        table.add_row(*map(escape, cells), style=STYLES.get(row.get("verdict", "")))
    out.print(table)
    for note in lane.notes:
        out.print(Padding(Text(note, style="dim"), (0, 0, 0, 2)))
    if any(row.get("verdict") for row in lane.rows):
        out.print(f"  {lane.verdict}", style="green" if lane.passed else "bold red")
