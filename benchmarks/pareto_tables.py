"""What `benchmarks.pareto` has measured: the README's tables, a page with every row, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from .pareto_entries import ANSWER
from .tables import Data, machine, table

Row = dict[str, Any]

COLORS = {"re2fx": "#1f6fb4", "re2fx compiled": "#7b5ea7", "compiled": "#4f9a5f"}
FAR = 2.5  # times plain training, from where on times are shown by their logarithms
MARKS = {
    "plain": ("s", "#8a8a8a"),
    "checkpoint, branches": ("v", "#d1803b"),
    "checkpoint, blocks": ("o", "#d1803b"),
    "checkpoint, first half": ("D", "#d1803b"),
    "checkpoint, k blocks": ("^", "#d1803b"),
    "checkpoint, nested": ("P", "#d1803b"),
    "offload": ("X", "#b4441f"),
}


def timed(rows: Sequence[Row]) -> list[Row]:
    """The rows of entries that were measured."""
    return [row for row in rows if row.get("over_plain") is not None]


def kind(row: Row) -> str:
    """The line of the picture that an entry lies on; that of a rival without a line is its own."""
    if row["own"]:
        return "re2fx compiled" if row["compiled"] else "re2fx"
    return "compiled" if row["compiled"] else str(row["entry"])


def rivals(rows: Sequence[Row]) -> list[Row]:
    """What others offer."""
    return [row for row in timed(rows) if not row["own"]]


def over(own: Row, rival: Row) -> float:
    """One entry's step time over another's: in pairs where both were timed in the same rounds."""
    same = own.get("part") == rival.get("part") and len(own["seconds"]) == len(rival["seconds"])
    if same:
        pairs = zip(own["seconds"], rival["seconds"], strict=True)
        return median(a / b for a, b in pairs)
    return float(own["over_plain"] / rival["over_plain"])


def answer(rows: Sequence[Row], rival: Row) -> Row | None:
    """What re2fx offers that needs no more than a rival does.

    That is the entry whose budget was the rival's peak, if there is one, and else the fastest.
    Eager rivals are answered by the eager executor, compiled ones by either.
    """
    fitting = [
        row
        for row in timed(rows)
        if row["own"]
        and row["peak"] <= rival["peak"]
        and (rival["compiled"] or not row["compiled"])
    ]
    meant = [row for row in fitting if row["entry"] == ANSWER + rival["entry"]]
    return min(meant or fitting, key=lambda row: over(row, rival), default=None)


def order(models: Sequence[Data]) -> list[str]:
    """The entries that were measured of any network."""
    return list(dict.fromkeys(row["entry"] for model in models for row in timed(model["rows"])))


def overview(models: Sequence[Data]) -> str:
    """A row for each entry, peak and time of every network against plain training's."""
    cells = {}
    for model in models:
        plain = next((row for row in timed(model["rows"]) if row["entry"] == "plain"), None)
        for row in timed(model["rows"]):
            share = f"{row['peak'] / plain['peak']:.0%}" if plain else "?"
            cells[model["name"], row["entry"]] = f"{share}, {row['over_plain']:.2f}x"
    names = [model["name"] for model in models]
    rows = [(entry, *(cells.get((name, entry), "") for name in names)) for entry in order(models)]
    return table(("training", *names), rows)


def comparisons(models: Sequence[Data]) -> list[tuple[str, Row, Row | None]]:
    """Every rival of every network, with re2fx's answer."""
    return [
        (model["name"], rival, answer(model["rows"], rival))
        for model in models
        for rival in rivals(model["rows"])
    ]


def at_every_peak(models: Sequence[Data]) -> str:
    """A row for each rival: re2fx's step time over its, at its peak or below."""
    found = {(name, rival["entry"]): (rival, own) for name, rival, own in comparisons(models)}
    names = [model["name"] for model in models]

    def cell(name: str, entry: str) -> str:
        if (name, entry) not in found:
            return ""
        rival, own = found[name, entry]
        return "needs more" if own is None else f"{over(own, rival):.2f}x"

    entries = dict.fromkeys(entry for _, entry in found)
    return table(
        ("rival", *names), [(entry, *(cell(name, entry) for name in names)) for entry in entries]
    )


def verdict(models: Sequence[Data]) -> str:
    """In how many comparisons re2fx is not slower."""
    found = comparisons(models)
    answered = [over(own, rival) for _, rival, own in found if own is not None]
    faster = sum(ratio <= 1 for ratio in answered)
    worst = f" (at most {max(answered):.2f}x)" if answered else ""
    return (
        f"At the peak of a rival or below, re2fx takes at most the rival's time in {faster} of "
        f"{len(found)} comparisons, more in {len(answered) - faster}{worst}, and cannot go as low "
        f"in {len(found) - len(answered)}."
    )


def gradients(models: Sequence[Data]) -> str:
    """The largest errors of gradients."""
    parts = []
    for own, words in ((False, "of rivals against plain"), (True, "of re2fx against stored")):
        errors = [
            row["gradient_error"]
            for model in models
            for row in timed(model["rows"])
            if row["own"] == own and row.get("gradient_error") is not None
        ]
        if errors:
            parts.append(f"{words} at most {max(errors):.0e}")
    return f"Relative difference of gradients, worst parameter: {', '.join(parts)}."


def text_pareto(data: Data) -> str:
    """The README's block."""
    models = list(data["models"].values())
    sizes = "; ".join(model["words"] for model in models)
    rounds = min(model["rounds"] for model in models)
    return (
        "![step time against peak](benchmarks/results/pareto.png)\n\n"
        "Peak of a step above parameters and gradients, and step time, of plain training's; "
        f"median of {rounds} rounds in one process, fp32, dropout as the libraries have it.\n\n"
        f"{overview(models)}\n\nre2fx's step time over that of each rival, at the rival's peak or "
        f"below:\n\n{at_every_peak(models)}\n\n{verdict(models)} {gradients(models)} "
        f"[All rows](benchmarks/results/pareto.md). {sizes}. {machine(data)}"
    )


def full(model: Data) -> str:
    """Every entry of a network, those that are missing too."""
    rows = []
    plain = next((row for row in timed(model["rows"]) if row["entry"] == "plain"), None)
    for row in timed(model["rows"]):
        predicted, error = row.get("predicted"), row.get("gradient_error")
        rows.append(
            (
                row["entry"],
                f"{row['peak'] / 2**20:.1f}",
                "" if predicted is None else f"{predicted / 2**20:.1f}",
                f"{row['peak'] / plain['peak']:.1%}" if plain else "",
                f"{row['median_seconds']:.4f}",
                f"{row['over_plain']:.3f}",
                "" if error is None else f"{error:.1e}",
            )
        )
    head = ("training", "peak, MiB", "predicted", "of plain", "step, s", "/ plain", "gradients")
    missing = [
        f"- {row['entry']}: {row.get('error') or row.get('unavailable') or 'not timed'}"
        for row in model["rows"]
        if row.get("over_plain") is None
    ]
    return "\n\n".join([table(head, rows), *(["\n".join(missing)] if missing else [])])


def answers(model: Data) -> str:
    """Every rival of a network, and which of re2fx's entries answers it."""
    rows = []
    for _, rival, own in comparisons([model]):
        peak = f"{rival['peak'] / 2**20:.1f}"
        if own is None:
            rows.append((rival["entry"], peak, f"{rival['over_plain']:.3f}", "", "", "", ""))
            continue
        mine = f"{own['peak'] / 2**20:.1f}"
        times = (f"{own['over_plain']:.3f}", f"{over(own, rival):.3f}")
        rows.append(
            (rival["entry"], peak, f"{rival['over_plain']:.3f}", own["entry"], mine, *times)
        )
    head = ("rival", "peak, MiB", "/ plain", "re2fx", "peak, MiB", "/ plain", "/ rival")
    return table(head, rows)


def page(title: str, models: Sequence[Data], about: str) -> str:
    """Networks with all their rows and comparisons."""
    parts = [f"# {title}", about]
    for model in models:
        parts += [f"## {model['name']}", model["words"], full(model)]
        parts += ["re2fx at each rival's peak or below:", answers(model)]
    return "\n\n".join(parts) + "\n"


def page_pareto(data: Data) -> str:
    """The page beside the result file."""
    about = (
        "One step in fp32: its peak above parameters and gradients, its time, and how far "
        "gradients are from plain training's (rivals) or from stored execution of the rewired "
        f"network (re2fx). Made by `python -m benchmarks.pareto`. {machine(data)}"
    )
    return page("Step time against peak", list(data["models"].values()), about)


def plot_models(models: Sequence[Data]) -> Figure:
    """A panel for each network."""
    columns = min(2, len(models)) or 1
    lines = -(-len(models) // columns) or 1
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 3.3 * lines), layout="constrained", squeeze=False
    )
    labels: dict[str, Any] = {}
    for axes in panels.flat[len(models) :]:
        axes.set_axis_off()
    for axes, model in zip(panels.flat, models, strict=False):
        labels |= panel(axes, model)
    figure.legend(
        labels.values(), labels, loc="outside lower center", ncols=2 * columns, frameon=False
    )
    return figure


def panel(axes: Axes, model: Data) -> dict[str, Any]:
    """Lines for re2fx and for the partitioner's budgets, a mark for each other rival."""
    rows, drawn = timed(model["rows"]), {}
    for name, color in COLORS.items():
        points = sorted((r["peak"] / 2**20, r["over_plain"]) for r in rows if kind(r) == name)
        if points:
            xs, ys = zip(*points, strict=True)
            (drawn[name],) = axes.plot(xs, ys, "o-", color=color, markersize=4, linewidth=1.5)
    for name, (mark, color) in MARKS.items():
        for row in (row for row in rows if row["entry"] == name):
            place = row["peak"] / 2**20, row["over_plain"]
            (drawn[name],) = axes.plot(*place, mark, color=color, markersize=6, linestyle="")
    axes.set_xlim(0, None)
    if max((row["over_plain"] for row in rows), default=1) > FAR:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator((1, 1.2, 1.5, 2, 3, 5, 8, 12, 20)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
    axes.margins(y=0.12)
    axes.set_xlabel("peak of a step, MiB")
    axes.set_title(f"{model['name']}: step time against plain")
    return drawn


def plot_pareto(data: Data) -> Figure:
    """Step time against peak."""
    return plot_models(list(data["models"].values()))
