"""The headfold command."""

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

from headfold.backends import IMPLEMENTATIONS
from headfold.contract import DTYPES, UnsupportedError, one_of
from headfold.geometry import IndexerGeometry
from headfold.lanes import report
from headfold.lanes.agree import agree as run_agree
from headfold.lanes.agree import at_dtypes, from_files
from headfold.lanes.capture import capture as run_capture
from headfold.lanes.compiling import compiled as run_compiled
from headfold.lanes.compiling import write as write_compiled
from headfold.lanes.config_plan import config_plan
from headfold.lanes.doctor import doctor as run_doctor
from headfold.lanes.model_plan import megatron_plan
from headfold.lanes.parity import parity as run_parity
from headfold.lanes.paths import least_workspace
from headfold.lanes.plan import plan as run_plan
from headfold.lanes.problem import Problem, from_file
from headfold.lanes.record import FAIL, PASS, SKIP, Lane
from headfold.lanes.residency import residency as run_residency
from headfold.lanes.residency import selection_residency as run_selection_residency
from headfold.lanes.residency import training_residency as run_training_residency
from headfold.lanes.selection_parity import selection_parity as run_selection_parity
from headfold.lanes.selection_speed import selection_speed as run_selection_speed
from headfold.lanes.speed import speed as run_speed
from headfold.lanes.speed import sweep as run_sweep
from headfold.lanes.training_parity import training_parity as run_training_parity
from headfold.lanes.training_paths import trained
from headfold.lanes.training_speed import training_speed as run_training_speed
from headfold.presets import SHAPES, find_preset, parse_shape

app = typer.Typer(
    help="DeepSeek Sparse Attention's lightning indexer without the resident head axis: plan it, run it, prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
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


@app.command()
def plan(
    preset: Preset = None,
    shape: Shape = None,
    tokens: Tokens = None,
    batch: Batch = None,
    dtype: Dtype = None,
    causal: Causal = False,
    megatron: Annotated[
        Path | None, typer.Option(help="A YAML file of Megatron's arguments: bill the whole model, stock and patched.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A config.json of transformers: bill the whole model, stock and on headfold.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0, help="With a whole model: GiB of a device; plans the longest context.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Whose bytes headfold's rows have: eager (when not given), or triton's kernels.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Bytes and FLOPs of a geometry, per path, against device memory; or a whole model's bill. Runs nothing."""
    room = None if memory is None else int(memory * (1 << 30))
    if megatron is not None:
        _exclude(
            "--megatron",
            preset=preset,
            shape=shape,
            model=model,
            dtype=dtype,
            backend=backend,
            causal="causal" if causal else None,
        )
        _finish([megatron_plan(megatron, tokens=tokens, b=batch, memory=room)], as_json)
    if model is not None:
        _exclude("--model", preset=preset, shape=shape, backend=backend, causal="causal" if causal else None)
        _finish([config_plan(model, tokens=tokens or 4096, b=batch or 1, dtype=dtype, memory=room)], as_json)
    if memory is not None:
        raise ValueError(f"--memory: needs --megatron or --model, got {memory:g} without one.")
    geometry = _problem(preset, shape, None, tokens, batch, dtype, causal).geometry
    _finish([run_plan(geometry, causal=causal, backend=backend or "eager")], as_json)


@app.command()
def parity(
    preset: Preset = None,
    shape: Shape = None,
    inputs: Inputs = None,
    tokens: Tokens = None,
    impl: Annotated[str, typer.Option(help="The implementation to check.")] = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check gradients by float64 gradcheck, then error budgets dtype by dtype."""
    one_of("parity", "--impl", impl, IMPLEMENTATIONS)
    where = _device(device, threads)
    if preset is not None and tokens is None:
        tokens = 512  # the budgets look at fewer rows than that
    problem = _problem(preset, shape, inputs, tokens, None, None, False)
    lanes = [run_parity(problem, where, impl=impl, track=_track(as_json))]
    if problem.geometry.topk:
        lanes.append(run_selection_parity(problem, where, impl=impl, track=_track(as_json)))
    if problem.geometry.np:
        lanes.append(run_training_parity(problem, where, impl=impl, track=_track(as_json)))
    _finish(lanes, as_json)


@app.command()
def residency(
    preset: Preset = None,
    shape: Shape = None,
    inputs: Inputs = None,
    tokens: Tokens = None,
    batch: Batch = None,
    dtype: Dtype = None,
    causal: Causal = False,
    workspace: Workspace = None,
    full: Annotated[
        bool, typer.Option("--full", help="The seed's full shape, and selections from 16384 and 65536 keys (minutes).")
    ] = False,
    process: Annotated[bool, typer.Option(help="Also read the peak of a fresh process for each row (CPU).")] = True,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure peaks beside planned ones, per path; what does not fit is not run, and says the bytes it would need."""
    where = _device(device, threads)
    if full:
        _exclude("--full", preset=preset, shape=shape, inputs=inputs)
    problem = _problem(preset, "full" if full else shape, inputs, tokens, batch, dtype, causal)
    _enough(workspace, problem, where)
    track = _track(as_json)
    lanes = [run_residency(problem, where, workspace=workspace, process=process, track=track)]
    if full:
        lanes += report.long_selections(where, workspace=workspace, process=process, track=track)
    elif problem.geometry.topk:
        lanes.append(run_selection_residency(problem, where, workspace=workspace, process=process, track=track))
    if not full and problem.geometry.np:
        lanes.append(run_training_residency(problem, where, workspace=workspace, process=process, track=track))
    _finish(lanes, as_json)


@app.command()
def speed(
    preset: Preset = None,
    shape: Shape = None,
    inputs: Inputs = None,
    tokens: Tokens = None,
    batch: Batch = None,
    dtype: Dtype = None,
    causal: Causal = False,
    workspace: Workspace = None,
    rounds: Rounds = 5,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also time installed megatron-core, attention-gym, transformers.")
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Show where headfold starts to pay, over shapes and dtypes.")
    ] = False,
    targets: Annotated[
        bool,
        typer.Option("--targets", help="Judge the project's speed targets (two CPU cores, prod, chunk and train)."),
    ] = False,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Median and spread per path, beside the machine's own matrix-product rate."""
    where, track = _device(device, threads), _track(as_json)
    if sweep:
        _exclude("--sweep", preset=preset, shape=shape, inputs=inputs, dtype=dtype, workspace=workspace)
        _finish([run_sweep(where, rounds=rounds, track=track)], as_json)
    problem = _problem(preset, shape, inputs, tokens, batch, dtype, causal)
    _enough(workspace, problem, where)
    options: dict[str, Any] = {"rounds": rounds, "targets": targets, "workspace": workspace, "track": track}
    lanes = [run_speed(problem, where, peers=peers, **options)]
    if problem.geometry.topk:
        # The targets of scoring and of selecting are stated at shapes of their own.
        chosen = Problem(SHAPES["chunk"]) if targets and problem == Problem(SHAPES["prod"]) else problem
        lanes.append(run_selection_speed(chosen, where, **options))
    if targets or problem.geometry.np:
        lanes.append(run_training_speed(trained(problem), where, **options))
    _finish(lanes, as_json)


@app.command()
def capture(device: Device = "cpu", threads: Threads = None, as_json: Json = False) -> None:
    """Prove the path to the mask free of host syncs; on a GPU, capture and replay it as a CUDA graph."""
    where = _device(device, threads)
    _finish([run_capture(where, track=_track(as_json))], as_json)


@app.command()
def prove(
    preset: Preset = None,
    shape: Shape = None,
    inputs: Inputs = None,
    tokens: Tokens = None,
    batch: Batch = None,
    dtype: Dtype = None,
    causal: Causal = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Add the seed's full shape, and long selections (minutes)."),
    ] = False,
    folder: Annotated[Path, typer.Option("--report", help="Where the report goes.")] = Path("report"),
    rounds: Rounds = 1,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run every lane on one geometry or on captured tensors, give one verdict and write a report."""
    where = _device(device, threads)
    problem = _problem(preset, shape, inputs, tokens, batch, dtype, causal)
    _make_folder(folder)
    lanes = report.prove(problem, where, rounds=rounds, full=full, track=_track(as_json))
    report.write(folder, problem, lanes, where)
    err.print(f"report: {folder / 'report.md'}", markup=False, highlight=False, soft_wrap=True)
    _finish(lanes, as_json)


@app.command()
def agree(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Two safetensors files, each a saved selection or a capture with q, weights and k; or one capture."
        ),
    ] = None,
    preset: Preset = None,
    shape: Shape = None,
    tokens: Tokens = None,
    batch: Batch = None,
    causal: Causal = False,
    dtypes: Annotated[
        str | None,
        typer.Option(help="Two dtypes that one input's tensors are rounded to; bfloat16,float32 when not given."),
    ] = None,
    topk: Annotated[int | None, typer.Option(min=1, help="Keys to keep; the inputs' own when not given.")] = None,
    at_least: Annotated[
        float | None, typer.Option(min=0, max=1, help="Judge: the share of members that has to agree.")
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare two selections, or the selections of one input at two dtypes, and count the rows that tie at the cut."""
    where, files = _device(device, threads), files or []
    if len(files) > 2:
        raise ValueError(f"agree: needs at most two files, got {len(files)}.")
    if files:
        given = {"preset": preset, "shape": shape, "tokens": tokens, "batch": batch, "causal": causal or None}
        _exclude("agree FILE", **given)
    if len(files) == 2:
        _exclude("agree FILE FILE", dtypes=dtypes)
        sides = from_files(*files)
    else:
        problem = from_file(files[0], "agree") if files else _problem(preset, shape, None, tokens, batch, None, causal)
        sides = at_dtypes(problem, *_dtypes(dtypes or "bfloat16,float32"))
    _finish([run_agree(sides, where, topk=topk, at_least=at_least, track=_track(as_json))], as_json)


@app.command()
def doctor(
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile every kernel for chips that need not be here, and judge it.")
    ] = False,
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942, more than once; all when not given.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write what was compiled into this page, between markers.")] = None,
    as_json: Json = False,
) -> None:
    """Versions, devices, and which implementation each kind of call gets and why."""
    if not compile_:
        if arch or page is not None:
            raise ValueError("--arch, --page: need --compile, got one of them without it.")
        _finish([run_doctor()], as_json)
    lane = run_compiled(tuple(arch or ()), track=_track(as_json))
    if page is not None:
        write_compiled(page, lane)
    _finish([lane], as_json)


def _geometry(
    preset: str | None, shape: str | None, tokens: int | None, batch: int | None, dtype: str | None
) -> IndexerGeometry:
    if preset is not None:
        _exclude("--preset", shape=shape)
        return find_preset(preset).geometry(b=batch or 1, tokens=tokens or 4096, dtype=dtype or "bfloat16")
    if tokens is not None or batch is not None:
        given = f"--tokens {tokens}" if tokens is not None else f"--batch {batch}"
        raise ValueError(f"--tokens, --batch: need a --preset, got {given} without one. A --shape has its own sizes.")
    geometry = SHAPES["prod"] if shape is None else parse_shape(shape)
    return geometry if dtype is None else geometry.with_(dtype=dtype)


def _problem(
    preset: str | None,
    shape: str | None,
    inputs: Path | None,
    tokens: int | None,
    batch: int | None,
    dtype: str | None,
    causal: bool,
) -> Problem:
    if inputs is None:
        if causal and preset is not None and find_preset(preset).ratio > 1:
            ratio = find_preset(preset).ratio
            raise ValueError(f"--causal: needs one key a position, got --preset {preset} with {ratio} positions a key.")
        return Problem(_geometry(preset, shape, tokens, batch, dtype), causal)
    _exclude(
        "--inputs",
        preset=preset,
        shape=shape,
        tokens=tokens,
        batch=batch,
        dtype=dtype,
        causal="causal" if causal else None,
    )
    return from_file(inputs)


def _dtypes(text: str) -> tuple[torch.dtype, torch.dtype]:
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2 or not set(names) <= set(known):
        raise ValueError(f"--dtypes: needs two of {', '.join(known)}, as in bfloat16,float32, got {text!r}.")
    return known[names[0]], known[names[1]]


def _exclude(option: str, **others: object) -> None:
    """Refuse options that this one leaves nothing to say about."""
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{option}: excludes --{name}, got {str(value)!r} for it.")


def _enough(workspace: int | None, problem: Problem, device: torch.device) -> None:
    """Refuse a workspace that some op on this problem does not fit in, before anything runs."""
    least = least_workspace(problem.geometry, device)
    if workspace is not None and workspace < least:
        raise ValueError(f"--workspace: needs at least {least} bytes for this shape, got {workspace}.")


def _make_folder(folder: Path) -> None:
    """Make the report's folder before the lanes run, so that nothing is measured in vain."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--report: needs a folder, got {folder} ({error.strerror}).") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--report: needs a folder that can be written, got {folder}.")


def _device(name: str, threads: int | None) -> torch.device:
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


def _track(as_json: bool) -> Callable[[Sequence[Any], str], Iterable[Any]]:
    return partial(_bar, quiet=as_json)


def _bar(items: Sequence[Any], description: str, *, quiet: bool) -> Iterable[Any]:
    return rich_track(items, description=description, console=err, transient=True, disable=quiet)


def _finish(lanes: list[Lane], as_json: bool) -> NoReturn:
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


def main() -> None:
    """Run the command; a broken contract or bad usage is one sentence on stderr and exit status 2."""
    try:
        app()
    except (ValueError, TypeError, UnsupportedError) as error:
        err.print(f"headfold: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
