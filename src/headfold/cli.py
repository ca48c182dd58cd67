"""The headfold command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from headfold import gpu_commands
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
from headfold.shell import (
    Batch,
    Causal,
    Device,
    Dtype,
    Inputs,
    Json,
    Preset,
    Rounds,
    Shape,
    Threads,
    Tokens,
    Workspace,
    device_of,
    exclude,
    finish,
    make_folder,
    tell,
    track_of,
)

app = typer.Typer(
    help="DeepSeek Sparse Attention's lightning indexer without the resident head axis: plan it, run it, prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
        exclude(
            "--megatron",
            preset=preset,
            shape=shape,
            model=model,
            dtype=dtype,
            backend=backend,
            causal="causal" if causal else None,
        )
        finish([megatron_plan(megatron, tokens=tokens, b=batch, memory=room)], as_json)
    if model is not None:
        exclude("--model", preset=preset, shape=shape, backend=backend, causal="causal" if causal else None)
        finish(config_plan(model, tokens=tokens or 4096, b=batch or 1, dtype=dtype, memory=room), as_json)
    if memory is not None:
        raise ValueError(f"--memory: needs --megatron or --model, got {memory:g} without one.")
    geometry = _problem(preset, shape, None, tokens, batch, dtype, causal).geometry
    finish([run_plan(geometry, causal=causal, backend=backend or "eager")], as_json)


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
    where = device_of(device, threads)
    if preset is not None and tokens is None:
        tokens = 512  # the budgets look at fewer rows than that
    problem = _problem(preset, shape, inputs, tokens, None, None, False)
    lanes = [run_parity(problem, where, impl=impl, track=track_of(as_json))]
    if problem.geometry.topk:
        lanes.append(run_selection_parity(problem, where, impl=impl, track=track_of(as_json)))
    if problem.geometry.np:
        lanes.append(run_training_parity(problem, where, impl=impl, track=track_of(as_json)))
    finish(lanes, as_json)


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
    where = device_of(device, threads)
    if full:
        exclude("--full", preset=preset, shape=shape, inputs=inputs)
    problem = _problem(preset, "full" if full else shape, inputs, tokens, batch, dtype, causal)
    _enough(workspace, problem, where)
    track = track_of(as_json)
    lanes = [run_residency(problem, where, workspace=workspace, process=process, track=track)]
    if full:
        lanes += report.long_selections(where, workspace=workspace, process=process, track=track)
    elif problem.geometry.topk:
        lanes.append(run_selection_residency(problem, where, workspace=workspace, process=process, track=track))
    if not full and problem.geometry.np:
        lanes.append(run_training_residency(problem, where, workspace=workspace, process=process, track=track))
    finish(lanes, as_json)


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
    where, track = device_of(device, threads), track_of(as_json)
    if sweep:
        exclude("--sweep", preset=preset, shape=shape, inputs=inputs, dtype=dtype, workspace=workspace)
        finish([run_sweep(where, rounds=rounds, track=track)], as_json)
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
    finish(lanes, as_json)


@app.command()
def capture(device: Device = "cpu", threads: Threads = None, as_json: Json = False) -> None:
    """Prove the path to the mask free of host syncs; on a GPU, capture and replay it as a CUDA graph."""
    where = device_of(device, threads)
    finish([run_capture(where, track=track_of(as_json))], as_json)


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
    where = device_of(device, threads)
    problem = _problem(preset, shape, inputs, tokens, batch, dtype, causal)
    make_folder(folder)
    lanes = report.prove(problem, where, rounds=rounds, full=full, track=track_of(as_json))
    report.write(folder, problem, lanes, where)
    tell(f"report: {folder / 'report.md'}")
    finish(lanes, as_json)


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
    where, files = device_of(device, threads), files or []
    if len(files) > 2:
        raise ValueError(f"agree: needs at most two files, got {len(files)}.")
    if files:
        given = {"preset": preset, "shape": shape, "tokens": tokens, "batch": batch, "causal": causal or None}
        exclude("agree FILE", **given)
    if len(files) == 2:
        exclude("agree FILE FILE", dtypes=dtypes)
        sides = from_files(*files)
    else:
        problem = from_file(files[0], "agree") if files else _problem(preset, shape, None, tokens, batch, None, causal)
        sides = at_dtypes(problem, *_dtypes(dtypes or "bfloat16,float32"))
    finish([run_agree(sides, where, topk=topk, at_least=at_least, track=track_of(as_json))], as_json)


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
        finish([run_doctor()], as_json)
    lane = run_compiled(tuple(arch or ()), track=track_of(as_json))
    if page is not None:
        write_compiled(page, lane)
    finish([lane], as_json)


app.command()(gpu_commands.gpu)
app.command()(gpu_commands.tune)


def _geometry(
    preset: str | None, shape: str | None, tokens: int | None, batch: int | None, dtype: str | None
) -> IndexerGeometry:
    if preset is not None:
        exclude("--preset", shape=shape)
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
    exclude(
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


def _enough(workspace: int | None, problem: Problem, device: torch.device) -> None:
    """Refuse a workspace that some op on this problem does not fit in, before anything runs."""
    least = least_workspace(problem.geometry, device)
    if workspace is not None and workspace < least:
        raise ValueError(f"--workspace: needs at least {least} bytes for this shape, got {workspace}.")


def main() -> None:
    """Run the command; a broken contract or bad usage is one sentence on stderr and exit status 2."""
    try:
        app()
    except (ValueError, TypeError, UnsupportedError) as error:
        tell(f"headfold: {error}", style="red")
        sys.exit(2)
