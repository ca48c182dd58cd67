"""A row of the measurement: a call at a shape, how to make it ready, and what timing it finds."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

RUNS, CALLS = 7, 5
# Seconds in which short calls are run more often, and how often at most: a median of few runs of them varies by some
# hundredths, with the device's clock.
SHORT, MOST = 0.3, 41
# Seconds of a row's runs: where five calls a run would take longer, a run is one call, which launches in no time beside
# that; where one call a run would, there are fewer runs, down to three.
BUDGET, FEWEST = 2.0, 3
UNITS = {"bytes": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
# Sizes at which every row runs on a CPU, to see that it runs.
TINY = {"b": 2, "s": 24, "sq": 24, "sk": 40, "h": 4, "d": 16, "topk": 8, "np": 4, "np_k": 2, "hn": 24, "v_dim": 16}
TINY |= {"n": 64, "bytes": 4096}


class Absent(Exception):
    """What a row calls is not here, and why."""


@dataclass(frozen=True)
class Place:
    """Where rows run, and what runs the calls of ours that are "triton" in a row's name.

    compiler: the backend of torch.compile.
    """

    device: torch.device
    impl: str = "triton"
    compiler: str = "inductor"


class Ready(NamedTuple):
    """A call whose inputs are made.

    flops: of one product of the algorithm.   products: how many of them it counts, whatever the kernels run.
    moved: bytes that it reads and writes, of a copy.   allocates: whether what it allocates is its own to count.
    """

    run: Callable[[], Any]
    flops: float = 0.0
    products: int = 1
    moved: int = 0
    allocates: bool = True


Sizes = dict[str, int]
Make = Callable[[Sizes, torch.dtype, Place], Ready]


@dataclass(frozen=True)
class Row:
    """One call at one shape.

    beside: sizes that its name holds already.   rehearsed: whether running it beforehand, beside others, leaves
    compiled kernels for later.
    """

    group: str
    call: str
    shape: Sizes
    make: Make
    dtype: str = "bfloat16"
    beside: Sizes = field(default_factory=dict)
    rehearsed: bool = False

    @property
    def key(self) -> dict[str, str]:
        """What tells it from other rows."""
        shape = " ".join(f"{size}^3" if name == "n" else f"{name}={size}" for name, size in self.shape.items())
        return {"group": self.group, "call": self.call, "shape": shape, "dtype": self.dtype}

    def tiny(self) -> Row:
        """Return the same call at sizes that a CPU runs at once."""
        shape, beside = ({x: min(n, TINY[x]) for x, n in sizes.items()} for sizes in (self.shape, self.beside))
        return replace(self, shape=shape, beside=beside)

    def ready(self, place: Place) -> Ready:
        """Make its inputs."""
        return self.make(self.shape | self.beside, getattr(torch, self.dtype), place)


def normal(place: Place, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return normal numbers."""
    return torch.randn(shape, device=place.device).to(dtype)


def measured(row: Row, place: Place, seconds: float) -> dict[str, Any]:
    """Time a row; what keeps it from being timed is its answer then.   seconds: what all of it should take."""
    try:
        return {**row.key, **_timed(row, place, seconds)}
    except Absent as reason:
        return {**row.key, "absent": str(reason)}
    except torch.OutOfMemoryError as error:
        return {**row.key, "out_of_memory": asked(str(error))}
    except Exception as error:  # noqa: BLE001 - whatever a peer or a compiler raises is this row's answer, and the next is timed
        return {**row.key, "failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
    finally:
        if place.device.type == "cuda":
            torch.cuda.empty_cache()


def asked(said: str) -> int:
    """Return the bytes that an allocator could not give, as its message rounds them; 0 where it names none."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (\w+)", said)
    return round(float(found[1]) * (1 << UNITS[found[2]])) if found else 0


def _timed(row: Row, place: Place, seconds: float) -> dict[str, Any]:
    ready = row.ready(place)
    taken, calls = milliseconds(ready.run, place.device, seconds)
    times = sorted(run.device for run in taken)
    median = statistics.median(times)
    found: dict[str, Any] = {"ms": _round(median), "fastest": _round(times[0]), "slowest": _round(times[-1])}
    found |= {"host_ms": _round(statistics.median(run.host for run in taken)), "runs": len(taken), "calls": calls}
    if ready.allocates and place.device.type == "cuda":
        found["peak_bytes"] = _peak(ready.run)
    if ready.flops:
        found |= {"tflops": _round(ready.products * ready.flops / median / 1e9), "products": ready.products}
    if ready.moved:
        found["gb_per_s"] = _round(ready.moved / median / 1e6)
    return found


def _round(x: float) -> float:
    return float(f"{x:.4g}")


class Taken(NamedTuple):
    """Milliseconds of a call of a run: on the device, and until the host had launched it."""

    device: float
    host: float


def milliseconds(run: Callable[[], Any], device: torch.device, seconds: float) -> tuple[list[Taken], int]:
    """Time a call on a device, warm: what one call took by each run, and the calls in a row of a run.

    A call alone would count what the host takes to launch it, which a stream of work hides.
    """
    start, once = time.perf_counter(), _clock(device)
    once(run, 1)
    first = once(run, 1)
    alone = first.device
    calls = CALLS if alone * RUNS * CALLS <= BUDGET * 1e3 else 1
    a_run = max(alone * calls, 1e-6)
    wanted = max(FEWEST, min(RUNS, int(BUDGET * 1e3 / a_run)))
    if calls == CALLS:
        wanted = max(wanted, min(MOST, int(SHORT * 1e3 / a_run)))
    left = (seconds - (time.perf_counter() - start)) * 0.8e3  # the call that shows its memory comes after
    runs = min(wanted, int(left / a_run))
    if runs < 1:
        return [first], 1
    return [once(run, calls) for _ in range(runs)], calls


def _clock(device: torch.device) -> Callable[[Callable[[], Any], int], Taken]:
    def on_device(run: Callable[[], Any], calls: int) -> Taken:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        host = on_host(run, calls).host
        last.record()
        torch.cuda.synchronize()
        return Taken(float(first.elapsed_time(last)) / calls, host)

    def on_host(run: Callable[[], Any], calls: int) -> Taken:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        taken = (time.perf_counter() - start) * 1e3 / calls
        return Taken(taken, taken)

    return on_device if device.type == "cuda" else on_host


def _peak(run: Callable[[], Any]) -> int:
    """Bytes that a call takes at most beyond what was allocated before it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
