"""Measuring: bytes from the allocator, bytes from the process, seconds, and the machine's own rate."""

from __future__ import annotations

import atexit
import gc
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

import headfold
from headfold.contract import compute_dtype

RATE_SIZE = 2048


@dataclass(frozen=True)
class Peak:
    """Bytes beyond those alive at the start: the peak, and what was still alive at the end."""

    peak: int
    left: int
    result: Any


def allocator_peak(run: Callable[[], Any], device: torch.device) -> Peak:
    """Run once and follow the allocator: every event of it on CPU, its own peak counter on CUDA."""
    _collect()
    return _cuda_peak(run, device) if device.type == "cuda" else _cpu_peak(run)


def _collect() -> None:
    """Free what died. Later collections leave out what is alive at the first, mostly modules, slow to walk."""
    gc.collect()
    _freeze_once()


@cache
def _freeze_once() -> None:
    gc.freeze()
    atexit.register(gc.unfreeze)


def _cuda_peak(run: Callable[[], Any], device: torch.device) -> Peak:
    torch.cuda.synchronize(device)
    before = _settled(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    return Peak(_requested(device, "peak") - before, _requested(device, "current") - before, result)


def _settled(device: torch.device) -> int:
    """Return what is allocated once it has stopped falling: autograd's thread lets go of a backward late."""
    count = _requested(device, "current")
    while True:
        time.sleep(0.003)
        before, count = count, _requested(device, "current")
        if count >= before:
            return count


def _requested(device: torch.device, when: str) -> int:
    """Bytes that tensors asked for; what was handed out may be a larger block, up to a mebibyte more for each."""
    count: int = torch.cuda.memory_stats(device)[f"requested_bytes.all.{when}"]
    return count


def _cpu_peak(run: Callable[[], Any]) -> Peak:
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet_stderr():
        profiler.start()
    try:
        result = run()
    finally:
        with _quiet_stderr():
            profiler.stop()
    inner = profiler.profiler
    assert inner is not None
    assert inner.kineto_results is not None
    recorded: list[Any] = inner.kineto_results.events()
    events = [(e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]"]
    now = peak = 0
    for _, count in sorted(events, key=lambda event: event[0]):
        now += count
        peak = max(peak, now)
    return Peak(peak, now, result)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop what the profiler's C++ prints while it starts and stops."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("w") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def process_peak(run: Callable[[], Any]) -> int:
    """Run `run` in this process and return by how much its resident set peaked above its start.

    Meant for a fresh subprocess. Linux keeps the peak since the last reset in /proc; elsewhere there is no reset, so
    the figure is exact only if nothing larger ran before.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        before = _rusage_peak()
        run()
        return _rusage_peak() - before
    reset.write_text("5")
    before = _status_bytes(status, "VmRSS")
    run()
    return _status_bytes(status, "VmHWM") - before


def _rusage_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status_bytes(status: Path, field: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{status} has no {field}.")


def in_fresh_process(function: Callable[..., Any], *args: Any, seconds: float | None = None) -> Any:
    """Call a module-level function in a fresh process; None when that was killed, as for lack of memory.

    On Linux it is forked from a server that has imported the lanes and run nothing; elsewhere it is a new interpreter.

    Raises: TimeoutError after `seconds`, when the process and all that it started have been ended.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=_fresh_context()) as pool:
        try:
            process = None if seconds is None else psutil.Process(pool.submit(os.getpid).result())
            answer = pool.submit(partial(function, *args))
            if process is not None and not wait([answer], seconds).done:
                _end(process)
                raise TimeoutError(f"took more than {seconds:.0f} seconds")
            return answer.result()
        except BrokenProcessPool:
            return None


def _end(process: psutil.Process) -> None:
    """Kill a process and those that it started, they theirs, and so on."""
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            one.kill()


@cache
def _fresh_context() -> BaseContext:
    if sys.platform != "linux":
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["headfold.lanes.residency"])
    return context


def free_memory(device: torch.device) -> int:
    """Return the bytes that a row may take: free device memory, or what the machine and its cgroup leave."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds from earlier rows is free to the next
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time one call, device work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class MatrixProduct:
    """The machine's own rate: a square product of size 2048, in the dtype that a score path multiplies in.

    On a CPU that is the compute dtype: half-precision inputs are cast before their products there, and where the
    processor has no half-precision units torch's own product of them runs at a hundredth of the float32 rate.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the operands once and warm the library up."""
        self.device = device
        self.dtype = compute_dtype(dtype) if device.type == "cpu" else dtype
        self.a, self.b = (torch.randn(RATE_SIZE, RATE_SIZE, device=device).to(self.dtype) for _ in range(2))
        self.out = torch.empty_like(self.a)
        self.rate()

    def rate(self) -> float:
        """FLOP/s, the median of five."""
        run = partial(torch.mm, self.a, self.b, out=self.out)
        return 2 * RATE_SIZE**3 / statistics.median(seconds(run, self.device) for _ in range(5))


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to repeat a measurement."""
    facts: dict[str, Any] = {
        "headfold": headfold.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        facts["cuda"] = torch.version.cuda or torch.version.hip
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
