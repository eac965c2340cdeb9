"""Pictures and README tables from the result files: ``python -m benchmarks.render``.

Every figure in the README's results blocks comes out of ``results/*.json`` through here; with
``--check`` nothing is written and the exit status is 1 if the README says something else.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .accuracy_tables import block_accuracy, plot_accuracy
from .common import CONTENDERS, RESULTS, read_results
from .exactness_tables import plot_exactness, text_exactness
from .frames_tables import text_frames
from .gpu_tables import NOT_YET, page_gpu, plot_gpu, text_gpu, text_headline
from .overlap_tables import text_overlap
from .pareto_tables import page_pareto, plot_pareto, text_pareto
from .sentence_tables import text_sentences
from .situation_tables import text_fuzz, text_situations
from .tables import TEXTS as TABLES
from .tables import Data
from .tal.pictures import plot_costs, plot_map, plot_timelines
from .tal.tables import text_tal, text_tal_costs, text_tal_peaks
from .zoo_tables import page_zoo, plot_zoo, text_zoo

README = Path(__file__).parents[1] / "README.md"

COLORS = {
    "plain": "#8a8a8a",
    "checkpoint": "#d1803b",
    "re2fx": "#1f6fb4",
    "budget": "#4f9a5f",
    "re2fx graph": "#1f6fb4",
    "re2fx region": "#7b5ea7",
}
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "font.size": 9,
    "figure.dpi": 130,
    "savefig.dpi": 130,
}


def lines(axes: Axes, rows: Sequence[Data], key: str, unit: float, title: str) -> None:
    """One labelled line per contender over the number of residuals; both axes logarithmic."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for name in CONTENDERS:
        own = [row for row in rows if row["contender"] == name]
        xs, ys = [row["residuals"] for row in own], [row[key] / unit for row in own]
        axes.plot(xs, ys, "o-", color=COLORS[name], markersize=3.5, linewidth=1.5)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["residuals"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("residuals")
    axes.set_title(title)
    label_ends(axes, {row["contender"]: row[key] / unit for row in rows}, ticks[-1])


def ratios(axes: Axes, rows: Sequence[Data], title: str) -> None:
    """Step time against ordinary training, from zero."""
    lines(axes, rows, "over_plain", 1, title)
    for text in list(axes.texts):
        text.remove()
    axes.set_yscale("linear")
    axes.set_ylim(0, None)
    ends = {row["contender"]: row["over_plain"] for row in rows}
    label_ends(axes, ends, max(row["residuals"] for row in rows))


def label_ends(axes: Axes, ends: dict[str, float], x: float) -> None:
    """Name the lines at their ends, pushed apart where they would overlap."""
    to_pixels, below = axes.transData, -1e9
    for name, value in sorted(ends.items(), key=lambda item: item[1]):
        height = to_pixels.transform((x, value))[1]
        below = max(height, below + 1.3 * pyplot.rcParams["font.size"] * axes.figure.dpi / 72)
        axes.annotate(
            name,
            (x, value),
            xytext=(7, (below - height) * 72 / axes.figure.dpi),
            textcoords="offset points",
            color=COLORS[name],
            va="center",
            annotation_clip=False,
        )


def plot_depth(data: Data) -> Figure:
    """Kept bytes, process peak and step time against depth."""
    figure, (kept, peak, time) = pyplot.subplots(1, 3, figsize=(10, 2.9), layout="constrained")
    lines(kept, data["rows"], "kept_chain", 2**20, "kept by the chain for backward, MiB")
    lines(peak, data["rows"], "peak", 2**20, "process peak above the model, MiB")
    ratios(time, data["rows"], "step time against plain")
    return figure


def plot_scale(data: Data) -> Figure:
    """Planning time against graph size, with a line of slope 1 to compare."""
    figure, axes = pyplot.subplots(figsize=(4.6, 2.9), layout="constrained")
    nodes = [row["nodes"] for row in data["rows"]]
    for name, color in (("capture", COLORS["plain"]), ("planning", COLORS["re2fx"])):
        seconds = [row[name] for row in data["rows"]]
        axes.plot(nodes, seconds, "o-", color=color, markersize=3.5, linewidth=1.5)
        axes.annotate(
            f" {name}", (nodes[-1], seconds[-1]), color=color, va="center", annotation_clip=False
        )
    axes.set_xlim(0, None)
    axes.set_ylim(0, None)
    axes.set_xlabel("nodes in the graph")
    axes.set_title("capture (both modes) and planning (one), s")
    return figure


def plot_demo(data: Data) -> Figure:
    """Accuracy while finetuning, and what training costs."""
    figure, (accuracy, kept) = pyplot.subplots(1, 2, figsize=(7.6, 2.9), layout="constrained")
    found = data["accuracy"]
    starts = {"original": found["original"], "rewired": found["rewired, not finetuned"]}
    for name, color, drop in (("original", COLORS["plain"], -9), ("rewired", COLORS["re2fx"], 2)):
        values = [100 * value for value in (starts[name], *found[f"{name}, by epoch"])]
        accuracy.plot(values, "o-", color=color, markersize=3.5, linewidth=1.5)
        accuracy.annotate(
            name,
            (0, values[0]),
            xytext=(9, drop),
            textcoords="offset points",
            color=color,
            va="center",
        )
    accuracy.set_xlabel("epochs of finetuning")
    accuracy.set_title("digits, test accuracy, %")
    lines(kept, data["cost"], "kept", 2**20, "kept for backward, MiB")
    return figure


def trade(axes: Axes, rows: Sequence[Data], key: str, title: str) -> None:
    """Step time against bytes: the partitioner's budgets as a curve, the others as points."""
    known = [(row["contender"], row[key] / 2**20, row["over_plain"]) for row in rows if row[key]]
    curve = sorted((x, y) for name, x, y in known if name.split()[0] in ("plain", "budget"))
    xs, ys = [x for x, _ in curve], [y for _, y in curve]
    axes.plot(xs, ys, "o-", color=COLORS["budget"], markersize=3.5, linewidth=1.5, label="budget")
    for name, x, y in known:
        if name in COLORS:
            axes.plot(x, y, "o", color=COLORS[name], markersize=6, label=name)
    axes.margins(x=0.12, y=0.15)
    axes.set_xlabel("MiB")
    axes.set_title(title)


def name_budgets(axes: Axes, rows: Sequence[Data]) -> None:
    """Write each budget next to its point among the kept bytes."""
    for row in rows:
        if row["contender"].startswith("budget "):
            axes.annotate(
                row["contender"].removeprefix("budget "),
                (row["kept"] / 2**20, row["over_plain"]),
                xytext=(-3, -4),
                textcoords="offset points",
                color=COLORS["budget"],
                fontsize=7.5,
                ha="right",
                va="top",
            )


def plot_compiled(data: Data) -> Figure:
    """Step time against what is kept and against the peak; compile time against depth."""
    figure, (kept, peak, cold) = pyplot.subplots(1, 3, figsize=(11, 3.1), layout="constrained")
    trade(kept, data["rows"], "kept", "step time against plain; kept for backward")
    trade(peak, data["rows"], "peak", "step time against plain; process peak")
    name_budgets(kept, data["rows"])
    kept.set_xscale("log")
    kept.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    kept.minorticks_off()
    peak.set_xlim(0, None)
    kept.legend(frameon=False, fontsize=7.5)
    ends = {}
    for name in dict.fromkeys(row["contender"] for row in data["cold"]):
        own = [row for row in data["cold"] if row["contender"] == name]
        xs, ys = [row["layers"] for row in own], [row["compile"] for row in own]
        cold.plot(xs, ys, "o-", color=COLORS[name], markersize=3.5, linewidth=1.5)
        ends[name] = ys[-1]
    cold.set_xlim(0, None)
    cold.set_ylim(0, None)
    cold.set_xlabel("layers")
    cold.set_title("compile time with empty caches, s")
    label_ends(cold, ends, max((row["layers"] for row in data["cold"]), default=0))
    return figure


TEXTS: dict[str, tuple[str, Callable[[Data], str]]] = {
    **TABLES,
    "accuracy": ("accuracy", block_accuracy),
    "zoo": ("zoo", text_zoo),
    "situations": ("situations", text_situations),
    "exactness": ("exactness", text_exactness),
    "fuzz": ("fuzz", text_fuzz),
    "sentences": ("sentences", text_sentences),
    "pareto": ("pareto", text_pareto),
    "frames": ("frames", text_frames),
    "gpu": ("gpu", text_gpu),
    "tal": ("tal", text_tal),
    "tal-costs": ("tal_costs", text_tal_costs),
    "tal-peaks": ("tal_peaks", text_tal_peaks),
    "gpu headline": ("gpu", text_headline),
    "overlap": ("overlap", text_overlap),
}

# What a block says before its result file exists.
ABSENT = {
    "pareto": "Not measured yet: `python -m benchmarks.pareto`.",
    "frames": "Not measured yet: `python -m benchmarks.frames`.",
    "gpu": NOT_YET,
    "tal": "Not measured yet: `python -m benchmarks.tal compare`.",
    "tal-peaks": "Not predicted yet: `python -m benchmarks.tal peaks`.",
    "tal-costs": "Not measured yet: `python -m benchmarks.tal costs`.",
}

# Pages beside the result files, which have more to say than a README takes.
PAGES: dict[str, Callable[[Data], str]] = {
    "zoo": page_zoo,
    "pareto": page_pareto,
    "gpu": page_gpu,
}

PLOTS: dict[str, Callable[[Data], Figure]] = {
    "depth": plot_depth,
    "scale": plot_scale,
    "demo": plot_demo,
    "compiled": plot_compiled,
    "accuracy": plot_accuracy,
    "zoo": plot_zoo,
    "exactness": plot_exactness,
    "pareto": plot_pareto,
    "gpu": plot_gpu,
    "tal": plot_map,
    "tal_costs": plot_costs,
    "tal_timelines": plot_timelines,
}


def rewritten(readme: str) -> str:
    """The README with its results blocks made anew; most without a result file stay."""
    for name, (source, text) in TEXTS.items():
        begin, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
        known = (RESULTS / f"{source}.json").exists()
        if begin in readme and (known or name in ABSENT):
            made = text(read_results(source)) if known else ABSENT[name]
            block = f"{begin}\n{made}\n{end}"
            pattern = re.escape(begin) + ".*?" + re.escape(end)
            readme = re.sub(pattern, lambda _, block=block: block, readme, flags=re.S)  # type: ignore[misc]
    return readme


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if README differs")
    options = parser.parse_args()
    old = README.read_text() if README.exists() else ""
    new = rewritten(old)
    if options.check:
        if new != old:
            sys.exit("README.md differs from benchmarks/results; run python -m benchmarks.render")
        return
    if new != old:
        README.write_text(new)
    for name, page in PAGES.items():
        if (RESULTS / f"{name}.json").exists():
            (RESULTS / f"{name}.md").write_text(page(read_results(name)))
    with pyplot.rc_context(STYLE):
        for name, plot in PLOTS.items():
            if (RESULTS / f"{name}.json").exists():
                figure = plot(read_results(name))
                # No software version inside, so that equal data make equal files.
                figure.savefig(RESULTS / f"{name}.png", metadata={"Software": ""})
                pyplot.close(figure)


if __name__ == "__main__":
    main()
