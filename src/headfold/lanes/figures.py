"""The report's pictures, as SVG: the residency cliff, measured beside planned, and time beside the machine's rate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headfold.geometry import PATHS, IndexerGeometry
from headfold.lanes.plan import DEVICES
from headfold.lanes.record import Lane, show, show_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe-Ito: told apart by readers who do not tell red from green.
COLORS = {"materialized": "#D55E00", "per-head loop": "#E69F00", "headfold": "#0072B2"}
GIB = 1 << 30
LENGTHS = [1 << n for n in range(10, 18)]
UNITS = ("KiB", "MiB", "GiB", "TiB")


def draw(folder: Path, geometry: IndexerGeometry, lanes: dict[str, Lane]) -> list[Path]:
    """Write every figure that the lanes have rows for, and return the files."""
    figures = {"bytes.svg": bytes_by_length(geometry)}
    if "residency" in lanes:
        figures["peaks.svg"] = measured_peaks(lanes["residency"])
    if "speed" in lanes:
        figures["time.svg"] = time_shares(lanes["speed"])
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "headfold"}):  # the same figure is the same file
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
        f"One layer's indexer, forward + backward: b={g.b}, h={g.heads}, d={g.dim}, {g.dtype} (planned)", 5.0
    )
    peaks: list[float] = []
    for path in PATHS:
        line = [g.with_(sq=n, sk=n).bill(path).training / GIB for n in LENGTHS]
        peaks += line
        axes.plot(LENGTHS, line, marker="o", markersize=4, color=COLORS[path], label=path)
    beside = axes.get_yaxis_transform()
    for name, size in DEVICES.items():
        axes.axhline(size / GIB, color="#999999", linewidth=0.8, linestyle="--")
        # Beside the plot, each below its line but the highest above: two of these sizes are close.
        side = "bottom" if size == max(DEVICES.values()) else "top"
        axes.annotate(name, (1.01, size / GIB), xycoords=beside, fontsize=7, color="#666666", va=side)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(LENGTHS, [f"{n // 1024}k" for n in LENGTHS])
    ticks = [t for t in (4.0**n for n in range(-10, 16)) if min(peaks) / 4 <= t <= max(peaks) * 4]
    axes.set_yticks(ticks, [show_bytes(int(t * GIB)) for t in ticks])
    axes.set_xlabel("sequence length (sq = sk)")
    axes.set_ylabel("peak beyond inputs")
    axes.legend(frameon=False, loc="lower right")
    return figure


def measured_peaks(lane: Lane) -> Figure:
    """Draw measured beside planned peaks, a pair of bars a row."""
    rows = [row for row in lane.rows if row["phase"] != "held for backward"]
    # Grey and color are told by the title: a legend would have to name every color.
    figure, axes = _axes("Measured (colored) beside planned (grey) peaks, beyond the inputs", 0.5 * len(rows) + 1.2)
    largest = max(max(row["planned"], row.get("measured", 0)) for row in rows)
    power = min(len(UNITS), max(1, (largest.bit_length() - 1) // 10))
    unit = 1024**power
    names = [f"{row['path']}\n{row['phase']}" for row in rows]
    spots = list(range(len(rows)))[::-1]
    planned = [row["planned"] / unit for row in rows]
    measured = [row.get("measured", 0) / unit for row in rows]
    colors = [next((c for family, c in COLORS.items() if row["path"].startswith(family)), "#555555") for row in rows]
    axes.barh([s + 0.2 for s in spots], planned, 0.38, color="#BBBBBB")
    axes.barh([s - 0.2 for s in spots], measured, 0.38, color=colors)
    for spot, row, value in zip(spots, rows, measured, strict=True):
        said = show_bytes(row["measured"]) if "measured" in row else "not run: does not fit here"
        axes.annotate(f" {said}", (value, spot - 0.2), va="center", fontsize=7)
    axes.set_yticks(spots, names, fontsize=8)
    axes.set_xlim(0, largest / unit * 1.15)  # room for the longest bar's number
    axes.set_xlabel(UNITS[power - 1])
    return figure


def time_shares(lane: Lane) -> Figure:
    """Draw each path's share of the matrix-product rate."""
    rows = [row for row in lane.rows if "share" in row]
    figure, axes = _axes("Share of the machine's own matrix-product rate", 0.32 * len(rows) + 1.4)
    spots = list(range(len(rows)))[::-1]
    axes.barh(spots, [row["share"] for row in rows], 0.7, color=[COLORS.get(row["path"], "#555555") for row in rows])
    for spot, row in zip(spots, rows, strict=True):
        said = f"{row['share']:.2f}   {show(row['seconds'], 'seconds')}"
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # keeps the line at 1 off the number
        axes.annotate(
            said, (row["share"], spot), (4, 0), textcoords="offset points", va="center", fontsize=7, bbox=ground
        )
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlim(0, 1.2 * max([1.0, *(row["share"] for row in rows)]))
    axes.set_yticks(spots, [f"{row['path']}, {row['phase']}" for row in rows], fontsize=8)
    axes.set_xlabel("of a 2048³ product in the same round (1 = as fast as the product alone)")
    return figure
