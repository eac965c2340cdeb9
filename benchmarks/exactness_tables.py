"""What `benchmarks.exactness` has measured, as README tables and as a picture."""

from __future__ import annotations

from matplotlib import pyplot
from matplotlib.figure import Figure

from .tables import Data, machine, table, verdicts

WAYS = {"plain": "#8a8a8a", "float reversible": "#1f6fb4", "exact reversible": "#b4441f"}


def rows_of(data: Data, key: str) -> list[Data]:
    """The rows that have a key."""
    return [row for row in data["rows"].values() if key in row]


def text_exactness(data: Data) -> str:
    """Wrong bits, gradient errors, step times, targets."""
    bits = [
        (
            f"{'exact' if row['exact'] else 'float'}, {row['bits']} bits",
            "bf16 autocast" if row["mixed"] else "fp32",
            f"{row['wrong_states']:,} of {row['states']:,}",
            f"{row['wrong_gradients']:,} of {row['gradients']:,}",
            f"{row['bytes_per_element']:.3f}",
        )
        for row in rows_of(data, "wrong_states")
    ]
    first = rows_of(data, "wrong_states")[0]
    truth = [
        (
            f"{row['residuals']}",
            row["coupling"],
            f"{row['steps']}",
            *("refused" if row[way] is None else f"{row[way]:.2e}" for way in WAYS),
        )
        for row in rows_of(data, "plain")
    ]
    times = [
        (
            f"{row['scope']}, {'bf16 autocast' if row['mixed'] else 'fp32'}",
            *(f"{row['ratios'][f'{bits} bits']:.3f}" for bits in range(4)),
        )
        for row in rows_of(data, "ratios")
    ]
    picture = (
        "![gradient error under bf16 autocast against depth](benchmarks/results/exactness.png)"
    )
    return (
        f"{picture}\n\nA ViT of {first['residuals']} residuals with dropout, trained on digits for "
        f"{first['steps']} steps: elements that differ from stored execution of the same network, "
        "and bytes kept for each element of the stream and block:\n\n"
        + table(("streams", "branches", "states", "gradients", "bytes"), bits)
        + "\n\nGradient error under bf16 autocast against stored execution in fp64, mean over "
        f"{rows_of(data, 'plain')[0]['batches']} batches:\n\n"
        + table(("residuals", "coupling", "steps trained", *WAYS), truth)
        + "\n\nStep time over float reversible, a ViT-S of 12 layers, by side bits:\n\n"
        + table(("executor", "0", "1", "2", "3"), times)
        + f"\n\n{verdicts(data)}\n\n{machine(data)}"
    )


def plot_exactness(data: Data) -> Figure:
    """Gradient error against depth, freshly initialised and trained."""
    rows = rows_of(data, "plain")
    steps = sorted({row["steps"] for row in rows})
    names = sorted({row["coupling"] for row in rows})
    figure, axes = pyplot.subplots(
        1, len(steps) * len(names), figsize=(10, 2.8), sharey=True, layout="constrained"
    )
    panels = [(name, number) for name in names for number in steps]
    for axis, (name, number) in zip(axes, panels, strict=True):
        own = [row for row in rows if row["coupling"] == name and row["steps"] == number]
        for way, color in WAYS.items():
            known = [(row["residuals"], row[way]) for row in own if row[way] is not None]
            axis.plot(*zip(*known, strict=True), "o-", color=color, markersize=3.5, label=way)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = sorted({row["residuals"] for row in own})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("residuals")
        axis.set_title(f"{name}, {number} steps")
    axes[0].set_ylabel("gradient error under bf16 autocast")
    axes[0].legend(frameon=False)
    return figure
