"""doctor: versions, devices, and which implementation each kind of call gets, and why."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from headfold import backends
from headfold.lanes import measure
from headfold.lanes.record import Column, Lane, show_facts

COLUMNS = (Column("call", "call"), Column("implementation", "implementation"), Column("why", "why"))
# The call that is asked about: the rule looks at the op and its width besides device and dtype.
OP, WIDTH = "index_scores", 128
PACKAGES = ("triton", "numpy", "safetensors", "matplotlib", "transformers", "megatron-core", "attn-gym")


def devices() -> list[torch.device]:
    """Return the CPU and every accelerator that torch sees."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def doctor() -> Lane:
    """Describe this machine and the rule that picks an implementation on it."""
    lane = Lane("doctor", f"What does {OP} at d={WIDTH} get here, and why?", COLUMNS)
    for device in devices():
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            chosen, why = backends.automatic(OP, device, getattr(torch, dtype), WIDTH)
            lane.rows.append({"call": f"{device}, {dtype}", "implementation": chosen, "why": why})
    lane.notes.append(backends.RULE)
    lane.notes.extend(f"kernels of {op}: widths {low} to {high}" for op, (low, high) in backends.TRITON_WIDTHS.items())
    for device in devices():
        lane.notes.extend(f"{name}: {value}" for name, value in _facts(device).items())
    lane.notes.extend(f"{package}: {_installed(package)}" for package in PACKAGES)
    return lane


def _facts(device: torch.device) -> dict[str, str]:
    facts = measure.environment(device)
    facts["memory_free_bytes"] = measure.free_memory(device)
    return show_facts(facts)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
