"""Pictures of the pipeline: mAP by way, bytes against depth, detections on a time line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .entries import ENTRIES, LOCALIZERS
from .tables import WAYS

Data = dict[str, Any]
# Actions of one row of a time line: start, end, label, score.
Spans = Sequence[Sequence[Any]]
TRUTH = "truth"


def plot_map(data: Data) -> Figure:
    """Average mAP with its deviation over seeds, a panel per backbone."""
    rows = data["localization"]
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    figure, panels = _panels(1, len(backbones), (4.6, 3.2))
    for axes, backbone in zip(panels, backbones, strict=True):
        _bars(axes, [row for row in rows if row["backbone"] == backbone])
        axes.set_title(f"{backbone}: average mAP, %")
    handles, words = panels[-1].get_legend_handles_labels()
    figure.legend(
        handles, words, loc="outside lower center", ncol=2, frameon=False, fontsize=7.5
    )  # fmt: skip
    return figure


def _panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(columns * size[0], rows * size[1]), squeeze=False,
        sharey="row" if rows == 1 else False, layout="constrained",
    )  # fmt: skip
    return figure, list(grid.flat)


def _bars(axes: Axes, rows: Sequence[Data]) -> None:
    localizers = list(dict.fromkeys(row["localizer"] for row in rows))
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    width = 0.8 / len(entries)
    for number, entry in enumerate(entries):
        own = {row["localizer"]: row for row in rows if row["entry"] == entry}
        places = [index + number * width for index in range(len(localizers))]
        heights = [100 * own[name]["mean"] for name in localizers]
        errors = [100 * own[name]["deviation"] for name in localizers]
        axes.bar(places, heights, width, yerr=errors, capsize=2, label=ENTRIES[entry].words)
    middle = [index + 0.4 - width / 2 for index in range(len(localizers))]
    axes.set_xticks(middle, [LOCALIZERS[name].words for name in localizers])


def plot_costs(data: Data) -> Figure:
    """Bytes kept for the backward by the networks of each family, at the papers' sizes."""
    rows = data["papers"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    figure, panels = _panels(1, len(families), (4.6, 3.2))
    for axes, family in zip(panels, families, strict=True):
        own = [row for row in rows if row["family"] == family]
        names = [row["words"] for row in own]
        for way, words in WAYS.items():
            axes.plot(names, [(row["total"][way] or 0) / 2**30 for row in own], "o-", label=words)
        axes.set_ylim(bottom=0)
        axes.set_title(f"GiB kept, {own[0]['frames']} frames of {own[0]['pixels']} px")
    panels[0].legend(frameon=False, fontsize=7.5)
    return figure


def plot_timelines(data: Data) -> Figure:
    """Actions and the best detections of each way, a panel per video."""
    videos, labels = data["videos"], data["labels"]
    colours = dict(zip(labels, pyplot.get_cmap("tab10").colors, strict=False))
    figure, panels = _panels(len(videos), 1, (9, 1.5))
    for axes, video in zip(panels, videos, strict=True):
        names = [TRUTH, *video["found"]]
        for row, spans in enumerate([video["actions"], *video["found"].values()]):
            _line(axes, row, spans, colours)
        words = [ENTRIES[name].words if name in ENTRIES else name for name in names]
        axes.set_yticks(range(len(names)), words, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlim(0, video["duration"])
        axes.set_title(video["name"], fontsize=8)
    panels[-1].set_xlabel(f"seconds ({data['backbone']}, {data['localizer']})")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, list(colours), loc="outside upper right", fontsize=7, ncol=len(colours))
    return figure


def _line(axes: Axes, row: int, spans: Spans, colours: Mapping[str, Any]) -> None:
    strongest = max((span[3] for span in spans), default=1.0)
    for start, end, label, score in reversed(spans):
        alpha = 0.15 + 0.85 * score / strongest
        axes.barh(row, end - start, 0.7, start, color=colours.get(label, "black"), alpha=alpha)
