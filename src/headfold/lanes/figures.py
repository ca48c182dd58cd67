"""The report's pictures, as SVG: the residency cliff, measured beside planned, and time beside the machine's rate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headfold.geometry import PATHS, IndexerGeometry
from headfold.lanes.plan import DEVICES
from headfold.lanes.record import Lane

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe-Ito: told apart by readers who do not tell red from green.
COLORS = {"materialized": "#D55E00", "per-head loop": "#E69F00", "headfold": "#0072B2"}
GIB = 1 << 30
LENGTHS = [1 << n for n in range(10, 18)]


def draw(folder: Path, geometry: IndexerGeometry, lanes: dict[str, Lane]) -> list[Path]:
    """Write every figure that the lanes have rows for, and return the files."""
    figures = {"bytes.svg": bytes_by_length(geometry)}
    if "residency" in lanes:
        figures["peaks.svg"] = measured_peaks(lanes["residency"])
    if "speed" in lanes:
        figures["time.svg"] = time_shares(lanes["speed"])
    for name, figure in figures.items():
        figure.savefig(folder / name, metadata={"Date": None})
    return [folder / name for name in figures]


def _axes(title: str, height: float = 4.2) -> tuple[Figure, Any]:
    """Return an empty figure, made without the global state of pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def bytes_by_length(geometry: IndexerGeometry) -> Figure:
    """Draw planned bytes of a training step against sequence length, with the memory of devices across."""
    g = geometry
    figure, axes = _axes(
        f"One layer's indexer, forward + backward: b={g.b}, h={g.heads}, d={g.dim}, {g.dtype} (planned)"
    )
    for path in PATHS:
        peaks = [g.with_(sq=n, sk=n).bill(path).training / GIB for n in LENGTHS]
        axes.plot(LENGTHS, peaks, marker="o", markersize=4, color=COLORS[path], label=path)
    for name, size in DEVICES.items():
        axes.axhline(size / GIB, color="#999999", linewidth=0.8, linestyle="--")
        axes.annotate(name, (LENGTHS[0], size / GIB), fontsize=7, color="#666666", va="bottom")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(LENGTHS, [f"{n // 1024}k" for n in LENGTHS])
    ticks = [4.0**n for n in range(-3, 8)]
    axes.set_yticks(ticks, [f"{t:g} GiB" if t >= 1 else f"{t * 1024:g} MiB" for t in ticks])
    axes.set_xlabel("sequence length (sq = sk)")
    axes.set_ylabel("peak beyond inputs")
    axes.legend(frameon=False, loc="lower right")
    return figure


def measured_peaks(lane: Lane) -> Figure:
    """Draw measured beside planned peaks, a pair of bars a row."""
    rows = [row for row in lane.rows if row["phase"] != "held for backward"]
    figure, axes = _axes("Measured beside planned peaks, bytes beyond the inputs", 0.55 * len(rows) + 1.2)
    names = [f"{row['path']}\n{row['phase']}" for row in rows]
    spots = list(range(len(rows)))[::-1]
    axes.barh([s + 0.2 for s in spots], [row["planned"] / GIB for row in rows], 0.38, color="#BBBBBB", label="planned")
    measured = [row.get("measured", 0) / GIB for row in rows]
    colors = [next((c for family, c in COLORS.items() if row["path"].startswith(family)), "#555555") for row in rows]
    axes.barh([s - 0.2 for s in spots], measured, 0.38, color=colors, label="measured")
    for spot, row, value in zip(spots, rows, measured, strict=True):
        said = f" {value:.3g} GiB" if "measured" in row else " not run: does not fit here"
        axes.annotate(
            said, (max(value, 0 if "measured" in row else row["planned"] / GIB), spot - 0.2), va="center", fontsize=7
        )
    axes.set_yticks(spots, names, fontsize=8)
    axes.set_xlabel("GiB")
    axes.legend(frameon=False, loc="lower right")
    return figure


def time_shares(lane: Lane) -> Figure:
    """Draw each path's share of the matrix-product rate."""
    rows = [row for row in lane.rows if "share" in row]
    figure, axes = _axes("Share of the machine's own matrix-product rate", 0.32 * len(rows) + 1.4)
    spots = list(range(len(rows)))[::-1]
    axes.barh(spots, [row["share"] for row in rows], 0.7, color=[COLORS.get(row["path"], "#555555") for row in rows])
    for spot, row in zip(spots, rows, strict=True):
        axes.annotate(f" {row['share']:.2f}   {row['seconds']:.3g} s", (row["share"], spot), va="center", fontsize=7)
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle="--")
    axes.set_yticks(spots, [f"{row['path']}, {row['phase']}" for row in rows], fontsize=8)
    axes.set_xlabel("of a 2048³ product in the same round (1 = as fast as the product alone)")
    return figure
