"""The capture lane: the path to the mask reads no data back, and the upstream patterns beside it do.

On any device: the undecorated bodies under a mode that forbids reads, a trace of them over fake tensors, and
compilation of the public functions with fullgraph. On a GPU also what these stand for: a CUDA graph, captured and
replayed with other data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headfold.backends import eager
from headfold.lanes import measure, upstream_masks
from headfold.lanes.every_op import same_bits
from headfold.lanes.record import FAIL, PASS, Column, Lane, Row, Track, no_track
from headfold.lanes.syncfree import DataRead, no_data_reads
from headfold.mask import index_mask, update_index_mask_
from headfold.scores import index_scores
from headfold.selection import index_topk
from headfold.tiles import DEFAULT_WORKSPACE

COLUMNS = (
    Column("pattern", "pattern"),
    Column("proof", "proof"),
    Column("expected", "expected"),
    Column("found", "found"),
    Column("verdict", "verdict"),
)
NO_READS, TRACE, FULLGRAPH, GRAPH = "no data read", "traced over fake tensors", "fullgraph compile", "CUDA graph"
EARLIER = "key 0 unmasked earlier"
REFUSED, EQUAL = "refused", "equal to eager"
B, S, H, D, TOPK = 2, 64, 4, 16, 20
FIRST_ROW = 7

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Pattern:
    """One way to a mask.

    public: what users call.   body: the same, undecorated, for proofs that a custom op is opaque to.   inputs: fresh
    ones for a seed and a device.   refused: whether it is expected to read data back.   plain: what users call for the
    bits of the body, where "auto" may choose another backend than the body's.
    """

    name: str
    public: Callable[..., Tensors]
    body: Callable[..., Tensors]
    inputs: Callable[[int, torch.device], Tensors]
    refused: bool = False
    plain: Callable[..., Tensors] | None = None


def capture(device: torch.device, *, track: Track[Any] = no_track) -> Lane:
    """Prove on a device that the path to the mask is free of host syncs, and show the upstream patterns refused."""
    lane = Lane("capture", "Does the path to the mask run without reading data back?", COLUMNS)
    proofs = (NO_READS, TRACE, FULLGRAPH, *((GRAPH,) if device.type == "cuda" else ()))
    for pattern, proof in track([(p, proof) for p in (*UPSTREAM, *OURS) for proof in proofs], "capture"):
        lane.rows.append(_row(pattern, proof, device))
    lane.rows.extend(_earlier_rows(device))
    lane.notes = [
        f"{NO_READS}: every op and every Python conversion that reads tensor data raises. {TRACE}: make_fx with "
        f"symbolic shapes. Both run the undecorated bodies, since a custom op is opaque to them. {FULLGRAPH}: "
        "torch.compile of the public functions (backend aot_eager).",
        "A row of an upstream pattern passes when it is refused, and says with what. Any other row passes when its "
        "results are bitwise those of a plain call.",
        f"{EARLIER}: one update selects key 0, a second one of the same row holds -1 and not key 0.",
        f"Inputs: b={B}, sq=sk={S}, h={H}, d={D}, topk={TOPK}; rows with -1 beside key 0, all -1, and duplicates.",
    ]
    if device.type != "cuda":
        lane.notes.append("Real CUDA graphs are captured and replayed with --device cuda.")
    return lane


def _row(pattern: Pattern, proof: str, device: torch.device) -> Row:
    row: Row = {"pattern": pattern.name, "proof": proof, "expected": REFUSED if pattern.refused else EQUAL}
    found = _graph(pattern, device) if proof == GRAPH else _traced(pattern, proof, device)
    kept = found.startswith(REFUSED) if pattern.refused else found == EQUAL
    return {**row, "found": found, "verdict": PASS if kept else FAIL}


def _traced(pattern: Pattern, proof: str, device: torch.device) -> str:
    """Say what a proof of any device finds: a refusal with its exception, or whether results are those of a call."""
    # Imported here: the compiler takes longer to import than all else the command needs.
    from torch._dynamo.exc import Unsupported
    from torch._subclasses.fake_tensor import DataDependentOutputException
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    # Any other exception is a fault of its own, not a refusal.
    refusals = (DataRead, DataDependentOutputException, GuardOnDataDependentSymNode, Unsupported)
    inputs = pattern.inputs(0, device)
    plain = None if proof == FULLGRAPH else pattern.plain
    expected = (plain or pattern.public)(*pattern.inputs(0, device))
    try:
        if proof == NO_READS:
            with no_data_reads():
                results = pattern.body(*inputs)
        elif proof == TRACE:
            results = make_fx(pattern.body, tracing_mode="symbolic")(*inputs)(*inputs)
        else:
            results = torch.compile(pattern.public, fullgraph=True, backend="aot_eager")(*inputs)
    except refusals as error:
        return _refusal(error)
    return _compared(results, expected)


def _graph(pattern: Pattern, device: torch.device) -> str:
    """Say what a CUDA graph does, in a process of its own: a capture that fails leaves its process unusable."""
    found: str | None = measure.in_fresh_process(_graph_here, pattern.name, str(device))
    return found or "the process that captured it was killed"


def _graph_here(name: str, device: str) -> str:
    """Capture and replay a pattern in this process; for a read, say with what it was refused."""
    pattern = next(p for p in (*UPSTREAM, *OURS) if p.name == name)
    try:
        return replayed(pattern.public, pattern.inputs, torch.device(device))
    except RuntimeError as error:
        return what_failed(error)


def what_failed(error: RuntimeError) -> str:
    """Say of an error in a capture whether it was a refusal, and with what."""
    first: BaseException = error  # the read that failed, after which leaving the capture failed too
    while isinstance(first.__context__, RuntimeError):
        first = first.__context__
    return _refusal(first) if "captur" in str(first).lower() else f"failed: {_said(first)}"


def replayed(
    public: Callable[..., Tensors], inputs: Callable[[int, torch.device], Tensors], device: torch.device
) -> str:
    """Capture one call, replay it with other data in the same memory, and compare with plain calls on that data."""
    with torch.cuda.device(device):
        static = inputs(0, device)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            public(*static)  # libraries set themselves up at a first call, which no capture may hold
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = public(*static)
        for seed in (1, 2):
            fresh = inputs(seed, device)
            for x, y in zip(static, fresh, strict=True):
                x.copy_(y)
            graph.replay()
            torch.cuda.synchronize()
            found = _compared(results, public(*fresh))
            if found != EQUAL:
                return f"replay {seed}: {found}"
    return EQUAL


def _earlier_rows(device: torch.device) -> list[Row]:
    """Show who keeps key 0 unmasked when an earlier update selected it and a later one holds -1."""
    rows: list[Row] = []
    ways: dict[str, tuple[Callable[..., Any], str]] = {p.name: (p.public, "masked again") for p in UPSTREAM}
    ways[UPDATE] = update_index_mask_, "kept"
    for name, (update, expected) in ways.items():
        mask = torch.full((1, 1, 4), float("-inf"), device=device)
        for selection in ([0, 1], [2, -1]):
            update(mask, torch.tensor([[selection]], dtype=torch.int32, device=device))
        found = "kept" if mask[0, 0, 0].item() == 0 else "masked again"
        verdict = PASS if found == expected else FAIL
        rows.append({"pattern": name, "proof": EARLIER, "expected": expected, "found": found, "verdict": verdict})
    return rows


def _compared(results: Tensors, expected: Tensors) -> str:
    pairs = zip(results, expected, strict=True)
    differing = [i for i, (x, y) in enumerate(pairs) if not same_bits(x, y)]
    return f"result {differing[0]} differs from eager" if differing else EQUAL


def _refusal(error: BaseException) -> str:
    return f"{REFUSED}: {_said(error)}"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _selection(seed: int, device: torch.device) -> Tensor:
    """Indices int32 [B, S, TOPK] with every corner: duplicates, key 0 beside -1, rows of -1 alone."""
    generator = torch.Generator(device).manual_seed(seed)
    indices = torch.randint(-1, S, (B, S, TOPK), generator=generator, dtype=torch.int32, device=device)
    indices[:, ::5, 3:] = -1
    indices[:, ::5, 1] = 0
    indices[:, 1::7] = -1
    return indices


def _selections(seed: int, device: torch.device) -> Tensors:
    return (_selection(seed, device),)


def _mask_and_block(seed: int, device: torch.device) -> Tensors:
    """Return an additive mask that an earlier update unmasked parts of, and a selection for rows from FIRST_ROW on."""
    return index_mask(_selection(seed + 100, device), S, dtype=torch.float32), _selection(seed, device)[:, FIRST_ROW:]


def _mask_and_selection(seed: int, device: torch.device) -> Tensors:
    return torch.full((B, S, S), float("-inf"), device=device), _selection(seed, device)


def _indexer_inputs(seed: int, device: torch.device) -> Tensors:
    """Return batch-first q, weights and k."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = (B, S, H, D), (B, S, H), (B, S, D)
    return tuple(torch.randn(shape, generator=generator, device=device) for shape in shapes)


def _mask(indices: Tensor) -> Tensors:
    return index_mask(indices, S), index_mask(indices, S, dtype=torch.bfloat16)


def _mask_body(indices: Tensor) -> Tensors:
    return eager.index_mask(indices, S, torch.bool), eager.index_mask(indices, S, torch.bfloat16)


def _update(mask: Tensor, indices: Tensor) -> Tensors:
    return (update_index_mask_(mask, indices, first_row=FIRST_ROW),)


def _update_body(mask: Tensor, indices: Tensor) -> Tensors:
    eager.update_index_mask_(mask, indices, FIRST_ROW)
    return (mask,)


def _chain(q: Tensor, weights: Tensor, k: Tensor, impl: str = "auto") -> Tensors:
    scores = index_scores(q, weights, k, causal=True, layout="bshd", impl=impl)
    indices = index_topk(q, weights, k, TOPK, causal=True, layout="bshd", impl=impl).indices
    return scores, indices, index_mask(indices, S)


def _chain_body(q: Tensor, weights: Tensor, k: Tensor) -> Tensors:
    causal: tuple[Any, ...] = (None, None, None, 0, 1, True, 1.0)  # start, end, bias, offset, ratio, relu, scale
    scores = eager.index_scores(q, weights, k, *causal)
    indices, _ = eager.index_topk(*(q, weights, k, *causal, TOPK, False, torch.int32, DEFAULT_WORKSPACE))
    return scores, indices, eager.index_mask(indices, S, torch.bool)


def _unless_equal(mask: Tensor, indices: Tensor) -> Tensors:
    return (upstream_masks.unmask_unless_equal(mask, indices),)


def _branching_on_any(mask: Tensor, indices: Tensor) -> Tensors:
    return (upstream_masks.unmask_branching_on_any(mask, indices),)


UPDATE = "update_index_mask_"
UPSTREAM = (
    Pattern("upstream, bool of torch.equal", _unless_equal, _unless_equal, _mask_and_selection, refused=True),
    Pattern("upstream, branch on any()", _branching_on_any, _branching_on_any, _mask_and_selection, refused=True),
)
OURS = (
    Pattern("index_mask", _mask, _mask_body, _selections),
    Pattern(UPDATE, _update, _update_body, _mask_and_block),
    Pattern("scores, topk, mask", _chain, _chain_body, _indexer_inputs, plain=partial(_chain, impl="eager")),
)
