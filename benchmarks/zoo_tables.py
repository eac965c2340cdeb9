"""The zoo as markdown: the README's table, the page with every model, and the picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from statistics import median
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure

from re2fx.tables import Table
from re2fx.zoo import Results, Row
from re2fx.zoo.tables import FINISHED, by_group, headline, model_row, reasons, totals
from re2fx.zoo.tables import MODELS as COLUMNS

from .tables import Data, machine, verdicts


def rows_of(data: Data) -> Results:
    """The results in a file."""
    return Results([Row.read(row) for row in data["rows"]])


def markdown(made: Table) -> str:
    """A table as markdown, numbers to the right."""
    bars = ["---:" if column.endswith(">") else "---" for column in made.columns]
    rows = [[escaped(cell) for cell in row] for row in made.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (made.names, bars, *rows))


def escaped(cell: str) -> str:
    """Text that a cell of a markdown table shows as it is."""
    for mark in ("|", "<", "*", "_", "`"):
        cell = cell.replace(mark, "\\" + mark)
    return " ".join(cell.split())


def libraries(data: Data) -> str:
    """The versions that the models come from."""
    return ", ".join(f"{name} {number}" for name, number in data["libraries"].items())


def text_zoo(data: Data) -> str:
    """The README's table: what became of each library's models."""
    results = rows_of(data)
    return (
        f"{headline(results).capitalize()}.\n\n{markdown(totals(results))}\n\n{verdicts(data)}\n\n"
        f"{libraries(data)}; {machine(data)}"
    )


def page_zoo(data: Data) -> str:
    """A page with a row for every model and a sentence for every kind of trouble."""
    results = rows_of(data)
    parts = [
        "# The zoo",
        "Models of the catalogue in `re2fx/zoo/catalogue.txt`, reduced in width, depth and input, "
        "in fp64 where they can be run in it. *share* is the part of what ordinary training keeps "
        "for the backward that lies in the chains; *gradient error* compares reversible with "
        "stored execution. Made by `python -m benchmarks.zoo` and `python -m benchmarks.render`.",
        text_zoo(data),
    ]
    for made in reasons(results):
        parts += [f"## {made.title}", markdown(made)]
    for group, rows in by_group(results.rows):
        made = Table(group, COLUMNS, tuple(map(model_row, rows)))
        parts += [f"## {group}", markdown(made)]
    return "\n\n".join(parts) + "\n"


def plot_zoo(data: Data) -> Figure:
    """By family: the part of the activations in chains, and what became of the skip-adds."""
    groups = [(name, rows) for name, rows in by_group(rows_of(data).rows) if name]
    figure, (share, fate) = pyplot.subplots(
        1, 2, figsize=(10, 0.8 + 0.3 * len(groups)), layout="constrained", sharey=True
    )
    for place, (_, rows) in enumerate(reversed(groups)):
        known = (r for r in rows if r.status in FINISHED and (r.share is not None or not r.rewired))
        values = [100 * (row.share or 0.0) for row in known]
        share.plot(values, [place] * len(values), "o", color="#1f6fb4", alpha=0.35, markersize=4)
        if values:
            share.plot([median(values)], [place], "|", color="black", markersize=12)
        _fates(fate, place, rows)
    share.set_yticks(range(len(groups)), [name for name, _ in reversed(groups)])
    share.set_title("kept activations in chains, %; median")
    fate.set_title("skip-adds")
    fate.legend(frameon=False, fontsize=7.5, loc="lower right")
    return figure


FATES = {
    "in chains": "#1f6fb4",
    "projection": "#c9c9c9",
    "post-norm": "#d1803b",
    "chain of one": "#4f9a5f",
    "other refusals": "#8a8a8a",
}


def _fates(axes: Any, place: int, rows: list[Row]) -> None:
    """One stacked bar."""
    numbers: dict[str, int] = defaultdict(int)
    numbers["in chains"] = sum(row.rewired for row in rows)
    rules = Counter[str]()
    for row in rows:
        for refusal in row.refusals:
            rules[refusal["rule"]] += refusal["count"]
    for rule, times in rules.items():
        numbers[rule if rule in FATES else "other refusals"] += times
    left = 0
    for name, color in FATES.items():
        label = name if place == 0 else None
        axes.barh(place, numbers[name], left=left, color=color, height=0.7, label=label)
        left += numbers[name]
