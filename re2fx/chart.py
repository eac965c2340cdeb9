"""A picture of a report: one bar for each way of training, chains and the rest stacked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import OptionError
from .footprint import WAYS, ChainBytes, Kept, PartBytes, Report
from .text import count
from .verdict import chain_name, part_name, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# After Okabe and Ito, told apart by everyone: blues for the chains, warm colours for the rest.
CHAINS = ("#0072B2", "#56B4E9", "#004466", "#A6D8F5")
PARTS = ("#D55E00", "#E69F00", "#CC79A7")
REST = "#BBBBBB"
INK, FAINT = "#222222", "#DDDDDD"
ZOOM = 0.4  # bars shorter than this share of the longest are drawn a second time, magnified


@dataclass(frozen=True)
class Layer:
    """One colour of the bars."""

    label: str
    colour: str
    kept: Kept


def layers(report: Report) -> Iterator[Layer]:
    """Chains, or all of them as one if there are many; the largest parts; the rest."""
    chains, parts = report.chains, report.parts
    if len(chains) <= len(CHAINS):
        for chain, colour in zip(chains, CHAINS, strict=False):
            yield Layer(chain_name(chain), colour, chain.kept)
    else:
        residuals = sum(chain.residuals for chain in chains)
        label = f"{count(len(chains), 'chain')}, {count(residuals, 'residual')}"
        yield Layer(label, CHAINS[0], total(chains))
    for part, colour in zip(parts, PARTS, strict=False):
        yield Layer(part_name(part), colour, part.kept)
    rest = parts[len(PARTS) :]
    if rest:
        label = part_name(rest[0]) if len(rest) == 1 else f"the rest: {len(rest)} parts"
        yield Layer(label, REST, total(rest))


def total(rows: tuple[ChainBytes, ...] | tuple[PartBytes, ...]) -> Kept:
    """The bytes of several rows together."""
    sums = {way: [row.kept.of(way) for row in rows] for way in WAYS}
    return Kept(**{way: sum(x or 0 for x in values) for way, values in sums.items()})


def plot(report: Report, path: str | Path | None = None) -> Figure:
    """Draw the bars; see `Report.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("a picture needs matplotlib: pip install re2fx[bench]") from error
    ways = [way for way in WAYS if report.total.of(way) is not None]
    low = [way for way in ways if (report.total.of(way) or 0) < ZOOM * report.total.store]
    panels = [ways, low] if low else [ways]
    colours = list(layers(report))
    height = 1.2 + sum(0.7 + 0.42 * len(panel) for panel in panels) + 0.1 * len(colours)
    figure = Figure(figsize=(8.5, height), facecolor="white", layout="constrained")
    ratios = [len(panel) + 0.5 for panel in panels]
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        bars(axis, report, colours, panel)
    if low:
        axes[1].set_title("the short bars, magnified", loc="left", fontsize=9, color=INK)
    figure.suptitle(f"{report.name}, {', '.join(report.inputs)}", fontsize=11, color=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    where = "outside lower center"
    figure.legend(handles, labels, loc=where, fontsize=8, frameon=False, ncols=2)
    if path is not None:
        figure.savefig(path, dpi=160)
    return figure


def bars(axis: Any, report: Report, colours: list[Layer], ways: list[str]) -> None:
    """One panel: a bar for each way, its total at its end."""
    scale, unit = _unit(max(report.total.of(way) or 0 for way in ways))
    starts = dict.fromkeys(ways, 0.0)
    for layer in colours:
        widths = [(layer.kept.of(way) or 0) / scale for way in ways]
        axis.barh(
            ways, widths, left=list(starts.values()), height=0.62, color=layer.colour,
            label=layer.label, edgecolor="white", linewidth=0.3,
        )  # fmt: skip
        for way, width in zip(ways, widths, strict=True):
            starts[way] += width
    for row, (way, end) in enumerate(starts.items()):
        axis.annotate(
            size(report.total.of(way)), (end, row), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=9, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    axis.set_xlim(0, max(starts.values()) * 1.15 or 1)
    axis.invert_yaxis()
    axis.set_xlabel(f"kept for the backward, {unit}", fontsize=9, color=INK)
    axis.tick_params(labelsize=9, colors=INK, length=0)
    axis.set_axisbelow(True)
    axis.grid(axis="x", color=FAINT, linewidth=0.6)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


def _unit(largest: int) -> tuple[int, str]:
    """What to divide by, and its name."""
    unit = size(max(1, largest)).split()[1]
    exponent = ("B", "KiB", "MiB", "GiB", "TiB").index(unit)
    return int(1024**exponent), unit
