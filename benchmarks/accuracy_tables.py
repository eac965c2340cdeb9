"""The accuracy of couplings as markdown and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure

from .tables import Data, machine, table, verdicts

FULL = "ViT-12"  # the network with a table of its own
WHEN = {"start": "#c9c9c9", "1": "#d1803b", "last": "#1f6fb4"}

Groups = dict[tuple[str, str], list[Data]]


def groups(data: Data) -> Groups:
    """Rows by network and candidate, in their order."""
    found: Groups = {}
    for row in data["rows"]:
        found.setdefault((row["model"], row["candidate"]), []).append(row)
    return found


def spread(values: Sequence[float]) -> float:
    """The standard deviation over the seeds."""
    return stdev(values) if len(values) > 1 else 0.0


def accuracies(rows: Sequence[Data], epoch: int) -> list[float]:
    """In per cent, after an epoch, 0 for none."""
    return [100 * row["accuracy"][epoch] for row in rows]


def percent(rows: Sequence[Data], epoch: int) -> str:
    """Mean and standard deviation."""
    values = accuracies(rows, epoch)
    return f"{fmean(values):.1f} ± {spread(values):.1f}"


def distance(rows: Sequence[Data], epoch: int) -> str:
    """Mean and standard deviation of the distance from the pretrained function."""
    values = [row["distance"][epoch] for row in rows]
    if None in values:
        return "diverged"
    return f"{fmean(values):.3f} ± {spread(values):.3f}"


def label(rows: Sequence[Data]) -> str:
    """The candidate's name, with a mark if it was not finetuned reversibly."""
    name: str = rows[0]["candidate"]
    return f"{name} (stored)" if any(row["memory"] == "store" for row in rows) else name


def text_accuracy(data: Data) -> str:
    """The README's tables: one network in full, the others' accuracies side by side."""
    found, setup = groups(data), data["setup"]
    epochs = setup["finetune_epochs"]
    models = list(dict.fromkeys(model for model, _ in found))
    names = list(dict.fromkeys(name for _, name in found))
    seeds = len({row["seed"] for row in data["rows"]})
    parts = [
        f"{setup['data']}, {seeds} seeds of weights, split and order; pretrained for "
        f"{setup['pretrain_epochs']} epochs, then rewired and finetuned for {epochs} at a rate of "
        f"{setup['finetune_rate']:g}. Test accuracy in per cent and relative distance of the "
        "logits from the pretrained network's, mean ± standard deviation."
    ]
    own = [rows for (model, _), rows in found.items() if model == FULL]
    if own:
        parts += [f"{setup['models'][FULL]}:", table(full_head(epochs), map(full_row, own))]
    parts += [
        f"All networks, accuracy at the start / after 1 epoch / after {epochs}:",
        table(
            ("coupling, readout", *models),
            ((name, *(brief(found.get((model, name))) for model in models)) for name in names),
        ),
    ]
    described = "; ".join(f"{model}: {setup['models'][model]}" for model in models)
    parts.append(f"{described}.")
    if any(row["memory"] == "store" for row in data["rows"]):
        parts.append(
            "*stored*: fp32 streams would lose too many digits over this depth, so activations "
            "were kept; the function is the same."
        )
    if data["targets"]:
        parts.append(verdicts(data))
    return "\n\n".join([*parts, machine(data)])


def block_accuracy(data: Data) -> str:
    """The README's block: the picture, which there is once there are results, and the tables."""
    picture = "benchmarks/results/accuracy.png"
    return f"![test accuracy of each coupling]({picture})\n\n{text_accuracy(data)}"


def full_head(epochs: int) -> tuple[str, ...]:
    """Columns of the first table."""
    return (
        "coupling, readout", "distance at the start", "accuracy at the start", "after 1 epoch",
        f"after {epochs}", f"distance after {epochs}",
    )  # fmt: skip


def full_row(rows: Sequence[Data]) -> tuple[str, ...]:
    """A line of the first table."""
    return (
        label(rows), distance(rows, 0), percent(rows, 0), percent(rows, 1), percent(rows, -1),
        distance(rows, -1),
    )  # fmt: skip


def brief(rows: Sequence[Data] | None) -> str:
    """Three means in one cell."""
    if rows is None:
        return ""
    return " / ".join(f"{fmean(accuracies(rows, epoch)):.1f}" for epoch in (0, 1, -1))


def plot_accuracy(data: Data) -> Figure:
    """Per network: accuracy at the start, after one epoch and at the end, with deviations."""
    found, epochs = groups(data), data["setup"]["finetune_epochs"]
    models = list(dict.fromkeys(model for model, _ in found))
    names = list(dict.fromkeys(name for _, name in found))
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(1.8 + 2.2 * len(models), 1.3 + 0.32 * len(names)),
        layout="constrained", sharey=True, squeeze=False,
    )  # fmt: skip
    for axis, model in zip(axes[0], models, strict=True):
        panel(axis, [found.get((model, name)) for name in names])
        axis.set_title(model)
        axis.set_xlabel("test accuracy, %")
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    handles = axes[0][0].get_legend_handles_labels()[0]
    labels = ("at the start", "after 1 epoch", f"after {epochs} epochs")
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def panel(axis: Any, found: Sequence[Sequence[Data] | None]) -> None:
    """One network: a line per candidate, the finetuned original's mean as a rule."""
    first = found[0]
    if first is not None and first[0]["candidate"] == "original":
        axis.axvline(fmean(accuracies(first, -1)), color=WHEN["last"], linewidth=0.7, alpha=0.6)
    places = [place for place, rows in enumerate(found) if rows is not None]
    known = [rows for rows in found if rows is not None]
    for shift, epoch, (when, colour) in zip((-0.2, 0, 0.2), (0, 1, -1), WHEN.items(), strict=True):
        values = [accuracies(rows, epoch) for rows in known]
        axis.errorbar(
            [fmean(own) for own in values], [place + shift for place in places],
            xerr=[spread(own) for own in values], fmt="o", color=colour, markersize=3.5,
            elinewidth=1.1, capsize=1.8, label=when,
        )  # fmt: skip
