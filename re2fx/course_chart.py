"""A picture of what is alive over the course of a predicted step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import OptionError
from .foresight import Foreseen
from .text import amount

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# After Okabe and Ito, told apart by everyone.
COLOURS = {"plain": "#8A8A8A", "stored": "#8A8A8A", "checkpointed": "#D55E00"}
OWN = "#0072B2"
INK, FAINT = "#222222", "#DDDDDD"
COLUMNS = 1200  # moments of a step that a picture can tell apart
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def plot(
    title: str, steps: Mapping[str, Foreseen], budget: int | None, path: str | Path | None
) -> Figure:
    """One line for each step, over the share of its operators that have run.

    Args:
        title: of the picture.
        steps: by name.
        budget: bytes at which a line is drawn.
        path: where to write it.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("a picture needs matplotlib: pip install re2fx[bench]") from error
    figure = Figure(figsize=(8.0, 3.8), facecolor="white", layout="constrained")
    axes = figure.subplots()
    highest = max(step.peak.peak for step in steps.values())
    scale, unit = next((s, u) for s, u in UNITS if highest >= s or s == 1)
    for name, step in steps.items():
        colour = COLOURS.get(name, OWN)
        whole = _operators(step)
        shares, sizes = zip(*_thinned(step), strict=True)
        axes.step(
            shares, [size / scale for size in sizes], where="post", color=colour, linewidth=1.2,
            label=f"{name}: {amount(step.peak.peak)}",
        )  # fmt: skip
        line = step.peak.timeline
        top = next(place for place, size in line if size == step.peak.peak)
        axes.plot([top / whole], [step.peak.peak / scale], "o", color=colour, markersize=4.5)
        place, size = line[max(0, step.turn - 1)]
        axes.plot(
            [place / whole], [size / scale], "v", color=colour, markerfacecolor="white",
            markersize=6, zorder=3,
        )  # fmt: skip
    if budget is not None:
        axes.axhline(
            budget / scale, color=INK, linewidth=1.0, linestyle=(0, (4, 3)),
            label=f"budget: {amount(budget)}",
        )  # fmt: skip
    axes.plot([], [], "v", color=INK, markerfacecolor="white", label="the backward begins")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.08 * max(highest, budget or 0) / scale)
    axes.set_xlabel("share of the step's operators that have run", color=INK)
    axes.set_ylabel(f"activations alive, {unit}", color=INK)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=160)
    return figure


def _operators(step: Foreseen) -> float:
    return max(1.0, step.peak.timeline[-1][0])


def _thinned(step: Foreseen) -> Iterator[tuple[float, int]]:
    """The timeline by shares; of moments too close to tell apart, the highest and the last."""
    whole = _operators(step)
    line = step.peak.timeline
    for _, group in groupby(line, key=lambda point: int(point[0] / whole * COLUMNS)):
        points = list(group)
        top = max(points, key=lambda point: point[1])
        yield top[0] / whole, top[1]
        yield points[-1][0] / whole, points[-1][1]
