"""A picture of a calibration: distance from the pretrained function against bytes kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calibration import Calibrated, Calibration
from .errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, INK, FAINT = "#0072B2", "#D55E00", "#222222", "#DDDDDD"
LINE = 11.0  # points from one label to the next
UNIT = 2**20


def plot(found: Calibration, path: str | Path | None = None) -> Figure:
    """Draw the points and the frontier; see `Calibration.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("a picture needs matplotlib: pip install re2fx[bench]") from error
    figure = Figure(figsize=(7.5, 4.2), facecolor="white", layout="constrained")
    axes = figure.subplots()
    shown = [row for row in found.rows if math.isfinite(row.distance)]
    edge, least = found.frontier, min((row.kept for row in shown if row.kept), default=0)

    def place(row: Calibrated) -> float:
        return (row.kept or least) / UNIT

    axes.step(
        [place(row) for row in edge], [row.distance for row in edge], where="post", color=BLUE,
        linewidth=1.2,
    )  # fmt: skip
    for row in shown:
        colour = ORANGE if row is found.recommended else BLUE
        inside = colour if row in found.acceptable else "white"
        axes.plot(place(row), row.distance, "o", color=colour, markerfacecolor=inside)
    axes.set_ylim(0, 1.1 * max((row.distance for row in shown), default=1.0) or 1.0)
    axes.set_xlim(0, 1.6 * max((place(row) for row in shown), default=1.0) or 1.0)  # and the names
    _name(axes, shown, place)
    axes.set_xlabel("kept for the backward, MiB (hollow: cannot be trained reversibly)", color=INK)
    axes.set_ylabel("relative distance of the output", color=INK)
    axes.set_title(f"{found.model}: rewired against pretrained", loc="left", fontsize=10)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=160)
    return figure


def _name(axes: Any, rows: list[Calibrated], place: Callable[[Calibrated], float]) -> None:
    """Write the names beside the points, from below, pushed apart where they would overlap."""
    per_point = axes.figure.dpi / 72
    last = -math.inf
    for row in sorted(rows, key=lambda row: row.distance):
        height = axes.transData.transform((0, row.distance))[1] / per_point
        last = max(height, last + LINE)
        axes.annotate(
            row.name, (place(row), row.distance), xytext=(9, last - height),
            textcoords="offset points", va="center", fontsize=8, color=INK,
        )  # fmt: skip
