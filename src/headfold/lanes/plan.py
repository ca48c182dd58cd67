"""The plan: bytes and FLOPs of a geometry, per path. Runs nothing."""

from __future__ import annotations

from headfold.contract import one_of
from headfold.geometry import ATTENDING, BACKENDS, LOSSES, OURS, PATHS, SELECTED, SELECTING, IndexerGeometry
from headfold.lanes.paths import kernels_take
from headfold.lanes.record import Column, Lane, Row, show_bytes
from headfold.tiles import DEFAULT_WORKSPACE

GIB = 1 << 30
# Device memory that people have, in bytes; docs and figures draw the same lines.
DEVICES = {
    "RTX 4090 24 GB": 24 * GIB,
    "A100 / H100 80 GB": 80 * GIB,
    "H200 141 GB": 141 * GIB,
    "MI300X 192 GB": 192 * GIB,
}

COLUMNS = (
    Column("path", "path"),
    Column("backend", "backend"),
    Column("forward", "forward peak", "bytes"),
    Column("held", "held for backward", "bytes"),
    Column("training", "forward + backward peak", "bytes"),
    Column("fits", "fits (with its inputs)"),
)


def plan(geometry: IndexerGeometry, *, causal: bool = False, backend: str = "eager") -> Lane:
    """Bill each path for one layer's indexer, and say on which devices its training step fits.

    backend: of our paths, where it takes their widths: "triton" bills the kernels on a GPU, and the walk beside them.
    """
    g = geometry
    one_of("plan", "--backend", backend, BACKENDS)
    lane = Lane("plan", f"What does the indexer of {describe(g)} cost?", COLUMNS, notes=_notes(g, causal, backend))
    selecting = (*SELECTING, SELECTED) if g.topk else ()
    attending = (*LOSSES, *(ATTENDING if g.topk else ())) if g.np else ()
    for path in (*PATHS, *selecting, *attending):
        runs = "" if path not in OURS else backend if kernels_take(path, g) else "eager"
        bill = g.bill(path, causal=causal, accelerator=backend == "triton", backend=runs or "eager")
        needed = bill.training + g.inputs_bytes + (g.attention_bytes if path in attending else 0)
        fits = [name for name, size in DEVICES.items() if needed <= size]
        row: Row = {"path": path, "backend": runs, "forward": bill.forward, "held": bill.held}
        row["training"] = bill.training
        lane.rows.append({**row, "fits": f"{fits[0]} and larger" if fits else "none of the listed"})
    return lane


def describe(g: IndexerGeometry) -> str:
    """Name a geometry in one line."""
    topk = f", topk={g.topk}" if g.topk else ""
    attention = f", attention of np={g.np}, np_k={g.np_k}, hn={g.hn}, v_dim={g.v_dim}" if g.np else ""
    return f"b={g.b}, sq={g.sq}, sk={g.sk}, h={g.heads}, d={g.dim}{topk}, {g.dtype}{attention}"


def _notes(g: IndexerGeometry, causal: bool, backend: str) -> list[str]:
    scratch = g.scratch(PATHS[2], backend=backend if kernels_take(PATHS[2], g) else "eager")
    notes = [
        f"Peaks count results and scratch beyond the inputs ({show_bytes(g.inputs_bytes)}), for one layer.",
        f"One [sq, b, h, sk] intermediate is {g.intermediate_bytes:,} bytes ({show_bytes(g.intermediate_bytes)}); "
        f"the scores are {show_bytes(g.scores_bytes)}.",
        f"headfold's scratch is {show_bytes(scratch.forward)} forward and {show_bytes(scratch.backward)} backward, "
        f"out of a workspace of {show_bytes(DEFAULT_WORKSPACE)} by default.",
        f"Forward (1 product) {g.forward_flops(causal=causal) / 1e9:,.4g} GFLOP, backward "
        f"({g.backward_products} products) {g.backward_flops(causal=causal) / 1e9:,.4g} GFLOP"
        f"{' (causal)' if causal else ''}.",
    ]
    if g.topk:
        notes.append(
            f"A selection, [b, sq, topk] int32, is {show_bytes(g.indices_bytes)}; the [b, sq, sk] score matrix that "
            f"index_topk never makes is {g.scores_bytes:,} bytes ({show_bytes(g.scores_bytes)})."
        )
    if g.np:
        loss, attention = (g.bill(path, causal=causal) for path in (LOSSES[0], ATTENDING[0]))
        notes.append(
            f"One [b, np, sq, sk] tensor of attention is {g.logits_bytes:,} bytes ({show_bytes(g.logits_bytes)}): the "
            f"loss with full tensors peaks at {loss.training / max(1, g.logits_bytes):.2f} of them, dense masked "
            f"attention at {attention.training / max(1, g.logits_bytes):.2f}. headfold builds none."
        )
    return notes
