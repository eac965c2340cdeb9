"""Pictures of the pipeline: mAP by way, bytes against depth, detections on a time line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .annotations import Video
from .entries import ENTRIES, LOCALIZERS
from .metrics import Detection
from .tables import WAYS


def plot_map(data: dict[str, Any], path: Path) -> None:
    """Average mAP with its deviation over seeds, a panel per backbone."""
    rows = data["localization"]
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    figure, axes = plt.subplots(1, len(backbones), figsize=(5 * len(backbones), 3.5), sharey=True,
                                squeeze=False)  # fmt: skip
    for axis, backbone in zip(axes[0], backbones, strict=True):
        _bars(axis, [row for row in rows if row["backbone"] == backbone])
        axis.set_title(backbone)
    axes[0][0].set_ylabel("average mAP, %")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    localizers = list(dict.fromkeys(row["localizer"] for row in rows))
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    width = 0.8 / len(entries)
    for number, entry in enumerate(entries):
        own = {row["localizer"]: row for row in rows if row["entry"] == entry}
        places = [index + number * width for index in range(len(localizers))]
        heights = [100 * own[name]["mean"] for name in localizers]
        errors = [100 * own[name]["deviation"] for name in localizers]
        axis.bar(places, heights, width, yerr=errors, capsize=2, label=ENTRIES[entry].words)
    middle = [index + 0.4 - width / 2 for index in range(len(localizers))]
    axis.set_xticks(middle, [LOCALIZERS[name].words for name in localizers])


def plot_depth(data: dict[str, Any], path: Path) -> None:
    """Bytes kept against the residuals in the chains, at the papers' sizes."""
    rows = data["papers"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    figure, axes = plt.subplots(1, len(families), figsize=(5 * len(families), 3.5), squeeze=False)
    for axis, family in zip(axes[0], families, strict=True):
        own = [row for row in rows if row["family"] == family]
        names = [row["words"] for row in own]
        for way, words in WAYS.items():
            axis.plot(names, [(row["total"][way] or 0) / 2**30 for row in own], "o-", label=words)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("GiB kept for the backward")
        axis.set_title(f"{own[0]['frames']} frames of {own[0]['pixels']} px")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_timelines(
    videos: Sequence[Video],
    found: Mapping[str, Sequence[Detection]],
    labels: Sequence[str],
    path: Path,
    best: int = 12,
) -> None:
    """Actions and the best detections of each way, a panel per video.

    Args:
        videos: what is shown, with its actions.
        found: detections by the names of entries.
        labels: one colour each.
        path: where to write the picture.
        best: detections shown per video and way.
    """
    colours = dict(zip(labels, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(len(videos), 1, figsize=(9, 1.6 * len(videos)), squeeze=False)
    for axis, video in zip(axes[:, 0], videos, strict=True):
        _line(axis, 0, [(a.start, a.end, a.label, 1.0) for a in video.actions], colours)
        for row, detections in enumerate(found.values(), 1):
            own = sorted((d for d in detections if d.video == video.name), key=lambda d: -d.score)
            spans = [(d.start, d.end, d.label, d.score) for d in own[:best]]
            _line(axis, row, spans, colours)
        names = ["truth", *(ENTRIES[name].words for name in found)]
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0, video.duration)
        axis.set_title(video.name, fontsize=8)
    axes[-1, 0].set_xlabel("seconds")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, list(colours), loc="upper right", fontsize=7, ncol=len(colours))
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _line(
    axis: Axes, row: int, spans: Sequence[tuple[float, float, str, float]], colours: Any
) -> None:
    strongest = max((score for *_, score in spans), default=1.0)
    for start, end, label, score in reversed(spans):
        alpha = 0.15 + 0.85 * score / strongest
        axis.barh(row, end - start, 0.7, start, color=colours.get(label, "black"), alpha=alpha)
