"""A picture of memory over the course of a step."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import OptionError
from .peak import Peak
from .text import amount

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666")
MIB = 2**20


def plot(own: Peak, others: Mapping[str, Peak], path: str | Path | None) -> Figure:
    """Bytes over time, each run's highest point marked.

    Raises:
        OptionError: matplotlib is not installed, or a run has no timeline.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("a picture needs matplotlib: pip install re2fx[bench]") from error
    runs = {"": own, **{name.replace("_", " "): run for name, run in others.items()}}
    if not all(run.timeline for run in runs.values()):
        raise OptionError("only runs on the CPU have a timeline to draw")
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = figure.subplots()
    for (name, run), colour in zip(runs.items(), cycle(COLOURS), strict=False):
        seconds, sizes = zip(*run.timeline, strict=True)
        label = f"{name}: {amount(run.peak)}" if name else amount(run.peak)
        values = [size / MIB for size in sizes]
        axes.step(seconds, values, where="post", color=colour, linewidth=1.0, label=label)
        place = sizes.index(run.peak) if run.peak in sizes else 0
        axes.plot([seconds[place]], [run.peak / MIB], "o", color=colour, markersize=4)
    axes.set_xlabel("seconds")
    axes.set_ylabel("MiB allocated")
    axes.set_ylim(0, None)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    if path is not None:
        figure.savefig(path)
    return figure
