"""gpu: what only a device can show, lane by lane on both backends, with one verdict.

Every lane is a job in a process of its own. Those that measure memory, or fill it, run one at a time; the rest run
beside one another, since most of their time goes to compiling kernels. A job that takes too long is ended and fails,
and the others still run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from headfold import backends
from headfold.contract import UnsupportedError
from headfold.geometry import IndexerGeometry
from headfold.lanes import measure
from headfold.lanes.capture import capture
from headfold.lanes.every_op import IMPLS, name_of
from headfold.lanes.graphs import graphs
from headfold.lanes.offsets import offsets
from headfold.lanes.parity import parity
from headfold.lanes.plan import describe
from headfold.lanes.problem import Problem
from headfold.lanes.record import FAIL, Column, Lane, Track, no_track
from headfold.lanes.repeats import repeats
from headfold.lanes.residency import SMALL_CHANGE, residency, selection_residency, training_residency
from headfold.lanes.sanitizer import sanitizer
from headfold.lanes.selection_parity import selection_parity
from headfold.lanes.strides import strides
from headfold.lanes.training_parity import training_parity
from headfold.presets import SHAPES
from headfold.tiles import DEFAULT_WORKSPACE

# What parity looks at: more keys than a tile has, heads that share keys, and enough of both to repeat a selection.
CHECKED = Problem(IndexerGeometry(2, 192, 4096, 8, 64, 512, "bfloat16", np=8, np_k=2, hn=64, v_dim=64))
CHOSEN = IndexerGeometry(1, 256, 30000, 32, 64, 2048, "bfloat16")
# With small change, beyond its results a call takes 64 MiB.
WORKSPACE = DEFAULT_WORKSPACE - SMALL_CHANGE
DTYPES = ("float32", "bfloat16")
WORKERS = 6
# Seconds that all jobs may take together, and those that run one at a time before the others begin.
SECONDS, MEMORY_SECONDS = 570.0, 300.0
ALONE = 200.0  # seconds of one of these
BROKEN = (Column("check", "check"), Column("verdict", "verdict"), Column("note", "note"))


@dataclass(frozen=True)
class Job:
    """A lane to run: run(*arguments, device, **options), under a name of its own, in so many seconds."""

    name: str
    run: Callable[..., Lane]
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 240.0


def gpu(
    device: torch.device,
    *,
    workers: int | None = None,
    track: Track[Any] = no_track,
    ended: Callable[[Lane, list[Lane]], None] = lambda lane, lanes: None,
) -> list[Lane]:
    """Run every job on a device, within SECONDS, and return their lanes in the jobs' order.

    ended: called with each lane that has ended and with all of them, in which those that have not yet fail.

    Raises: UnsupportedError without Triton, whose kernels are half of what is shown.
    """
    if not backends.HAS_TRITON:
        raise UnsupportedError("gpu: needs Triton, which is not installed here. Install it with pip install triton.")
    alone, together = memory_jobs(), other_jobs()
    lanes = {job.name: _broken(job, "it had not ended when this was written") for job in (*alone, *together)}
    at_once = workers or max(1, min(WORKERS, (os.cpu_count() or 2) // 2))
    start = time.monotonic()

    def end(job: Job, lane: Lane) -> None:
        lanes[job.name] = lane
        ended(lane, [*lanes.values()])

    pool = ThreadPoolExecutor(max_workers=at_once)
    try:
        for job in track(alone, "memory"):
            end(job, _lane(job, device, start + MEMORY_SECONDS))
        waiting = {pool.submit(_lane, job, device, start + SECONDS): job for job in together}
        finished: Iterator[Future[Lane]] = as_completed(waiting)
        for _ in track(range(len(together)), "lanes"):
            done = next(finished)
            end(waiting[done], done.result())
    finally:
        pool.shutdown(cancel_futures=True)
    return [*lanes.values()]


def memory_jobs() -> list[Job]:
    """Return the jobs that measure memory or fill it: the seed's full shape, selection, training, far offsets."""
    jobs = []
    for dtype in DTYPES:
        full = Problem(SHAPES["full"].with_(topk=0, dtype=dtype))
        for impl in IMPLS:
            options = {"workspace": WORKSPACE, "with_loop": False, "with_materialized": impl == IMPLS[0], "impl": impl}
            jobs.append(Job(f"residency, full shape, {dtype}, {impl}", residency, (full,), options, ALONE))
    for impl in IMPLS:
        options = {"workspace": WORKSPACE, "impl": impl}
        jobs.append(Job(f"selection residency, {impl}", selection_residency, (Problem(CHOSEN),), options, ALONE))
        trained = Problem(SHAPES["train"].with_(dtype="bfloat16"))
        jobs.append(Job(f"training residency, {impl}", training_residency, (trained,), options, ALONE))
        jobs.append(Job(f"offsets, {impl}", offsets, (), {"impls": (impl,)}, ALONE))
    return jobs


def other_jobs() -> list[Job]:
    """Return the other jobs, those that take longest first."""
    jobs = []
    for impl in reversed(IMPLS):
        for name, run in (
            ("training parity", training_parity),
            ("parity", parity),
            ("selection parity", selection_parity),
        ):
            jobs.append(Job(f"{name}, {impl}", run, (CHECKED,), {"impl": impl}))
        jobs.append(Job(f"repeats, {impl}", repeats, (), {"impls": (impl,)}))
    for dtype, width in ((torch.bfloat16, 64), (torch.float16, 128)):
        options = {"impls": ("triton",), "dtypes": (dtype,), "widths": (width,)}
        jobs.append(Job(f"strides, {name_of(dtype)}, width {width}", strides, (), options))
    return [*jobs, Job("sanitizer", sanitizer, seconds=150.0), Job("graphs", graphs), Job("capture", capture)]


def _lane(job: Job, device: torch.device, end: float) -> Lane:
    """Run a job in a process of its own; an error there is a row that fails, so that the other lanes still run.

    end: when time is up for it, whatever its own seconds are, by time.monotonic().
    """
    start = time.monotonic()
    left = min(job.seconds, end - start)
    lane, said = None, "the process that ran it was killed"
    try:
        if left <= 0:
            raise TimeoutError("not begun: the lanes before it took all of the time")
        lane = measure.in_fresh_process(partial(job.run, **job.options), *job.arguments, device, seconds=left)
    except Exception as error:  # noqa: BLE001 - no type covers device, compiler and tool; the lane fails by name
        said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if not isinstance(lane, Lane):
        lane = _broken(job, said)
    lane.name = job.name
    if job.arguments:
        lane.notes.append(f"At {describe(job.arguments[0].geometry)}.")
    lane.notes.append(f"Took {time.monotonic() - start:.0f} s.")
    return lane


def _broken(job: Job, said: str) -> Lane:
    """Return the lane of a job that has none of its own."""
    return Lane(job.name, "Does it run?", BROKEN, [{"check": job.name, "verdict": FAIL, "note": said}])


def environment(device: torch.device) -> dict[str, Any]:
    """Return where it was shown: the machine's facts, the driver and Triton."""
    facts = measure.environment(device)
    facts["driver"] = _driver()
    if backends.HAS_TRITON:
        from importlib.metadata import version

        facts["triton"] = version("triton")
    return facts


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown: nvidia-smi is not on PATH"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else "unknown"


def write(path: Path, lanes: Sequence[Lane], facts: dict[str, Any]) -> None:
    """Write JSON lines: where it was shown and the verdict, then every row with its lane, then every lane's notes."""
    passed = all(lane.passed for lane in lanes)
    lines: list[dict[str, Any]] = [{"passed": passed, **facts}]
    for lane in lanes:
        found = lane.to_json()
        lines += [{"lane": lane.name, **row} for row in found["rows"]]
        lines.append({"lane": lane.name, "question": lane.question, "passed": lane.passed, "notes": lane.notes})
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.part")  # an earlier file stays whole until this one is
    written.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    written.replace(path)
