"""The README's results blocks as markdown, made from the result files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .common import CONTENDERS

Data = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, numbers to the right."""
    bars = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, bars, *rows))


def verdicts(data: Data) -> str:
    """The targets and whether they were met."""
    rows = (
        (t["claim"], f"{t['value']:g}", f"{t['limit']:g}", "yes" if t["met"] else "**no**")
        for t in data["targets"]
    )
    return table(("target", "measured", "at most", "met"), rows)


def machine(data: Data) -> str:
    """What the figures hold for."""
    env = data["environment"]
    return (
        f"{env['cpu']}, {env['cores']} cores; torch {env['torch']}, Python {env['python']}; "
        f"{env['date']}."
    )


def by_depth(rows: Sequence[Data], key: str = "residuals") -> dict[int, dict[str, Data]]:
    """Rows by number of residuals (or another key) and contender."""
    found: dict[int, dict[str, Data]] = {}
    for row in rows:
        found.setdefault(row[key], {})[row["contender"]] = row
    return found


def trio(rows: dict[str, Data], key: str, unit: float, digits: int) -> str:
    """The three contenders' figures in one cell."""
    return " / ".join(f"{rows[name][key] / unit:.{digits}f}" for name in CONTENDERS)


def text_headline(data: Data) -> str:
    """Two sentences for the top of the README, from the depth results."""
    found = {ratio["residuals"]: ratio for ratio in data["ratios"]}
    deepest = max(found)
    own = by_depth(data["rows"])[deepest]
    kept = {name: own[name]["kept_chain"] / 2**20 for name in CONTENDERS}
    time, dropped = found[48], data["with_dropout"]
    return (
        f"A ViT-S of {deepest} residuals keeps {kept['re2fx']:.1f} MiB inside its chain for the "
        f"backward,\nwhere ordinary training keeps {kept['plain']:.0f} MiB and a checkpoint around "
        f"every branch {kept['checkpoint']:.0f} MiB.\nA step at 48 residuals takes "
        f"{time['time_over_plain']:.2f}x the time of ordinary training and "
        f"{time['time_over_checkpoint']:.2f}x that of checkpointing\n(with dropout "
        f"{dropped['time_over_plain']:.2f}x and {dropped['time_over_checkpoint']:.2f}x)."
    )


def text_depth(data: Data) -> str:
    """The README's table of memory and time against depth."""
    setup, order = data["setup"], " / ".join(CONTENDERS)
    rows = [
        (
            str(residuals),
            trio(own, "kept_chain", 2**20, 1),
            trio(own, "peak", 2**20, 0),
            trio(own, "median_seconds", 1, 2),
        )
        for residuals, own in by_depth(data["rows"]).items()
    ]
    head = ("residuals", "kept by the chain, MiB", "process peak, MiB", "step, s")
    model = f"{setup['model']}, batch {setup['batch']}, {setup['tokens']} tokens"
    return (
        f"{model}. Each cell: {order}.\n\n{table(head, rows)}\n\n{verdicts(data)}\n\n"
        f"{machine(data)}"
    )


def text_scale(data: Data) -> str:
    """The README's table of planning times."""
    columns = ("capture", "plan", "rewire", "outline", "planning")
    rows = [
        (f"{row['nodes']:,}", f"{row['residuals']:,}", *(f"{row[c]:.2f}" for c in columns))
        for row in data["rows"]
    ]
    head = ("nodes", "residuals", *(f"{c}, s" for c in columns))
    return f"{table(head, rows)}\n\n{verdicts(data)}\n\n{machine(data)}"


def text_demo(data: Data) -> str:
    """The README's tables of the demo."""
    found, setup = data["accuracy"], data["setup"]
    epochs = f"finetuned {setup['finetune_epochs']} epochs"
    accuracy = table(
        ("network", "test accuracy"),
        (
            ("original", f"{found['original']:.1%}"),
            ("rewired with its weights", f"{found['rewired, not finetuned']:.1%}"),
            (f"rewired, {epochs} reversibly", f"{found['rewired, by epoch'][-1]:.1%}"),
            (f"original, {epochs} too", f"{found['original, by epoch'][-1]:.1%}"),
        ),
    )
    rows = [
        (str(residuals), trio(own, "kept", 2**20, 2), trio(own, "median_seconds", 1e-3, 0))
        for residuals, own in by_depth(data["cost"]).items()
    ]
    head = ("residuals", "kept for backward, MiB", "step, ms")
    return (
        f"{setup['model']}; {setup['data']}.\n\n{accuracy}\n\n"
        f"Each cell: {' / '.join(CONTENDERS)}; batch {setup['batch']}.\n\n{table(head, rows)}\n\n"
        f"{machine(data)}"
    )


def text_compiled(data: Data) -> str:
    """The README's tables of compiled training: what it keeps and takes, and compile times."""
    setup, small = data["setup"], data["setup"]["cold"]
    rows = [
        (
            row["contender"],
            f"{row['kept'] / 2**20:.2f}",
            "unknown" if row["peak"] is None else f"{row['peak'] / 2**20:.0f}",
            f"{row['median_seconds']:.2f}",
            f"{row['over_plain']:.3f}",
            f"{row['over_checkpoint']:.3f}",
        )
        for row in data["rows"]
    ]
    head = ("training", "kept, MiB", "process peak, MiB", "step, s", "/ plain", "/ checkpoint")
    cold = by_depth(data["cold"], "layers")
    order = list(dict.fromkeys(row["contender"] for row in data["cold"]))
    times = [
        (str(layers), *(f"{own[name]['compile']:.0f}" for name in order))
        for layers, own in cold.items()
    ]
    return (
        f"{setup['model']}, {setup['layers']} layers, {2 * setup['layers']} residuals, of width "
        f"{setup['width']}, batch {setup['batch']}, {setup['tokens']} tokens. The peak is above "
        f"the model, its gradients of {setup['gradients'] / 2**20:.0f} MiB included.\n\n"
        f"{table(head, rows)}\n\n{verdicts(data)}\n\n"
        f"Seconds to compile forward and backward with empty caches, {small['tokens']} tokens of "
        f"width {small['width']}:\n\n"
        f"{table(('layers', *order), times)}\n\n{setup['cpp_compiler']}; {machine(data)}"
    )


# README block, the result file it is made from, and how.
TEXTS: dict[str, tuple[str, Callable[[Data], str]]] = {
    "headline": ("depth", text_headline),
    "depth": ("depth", text_depth),
    "scale": ("scale", text_scale),
    "demo": ("demo", text_demo),
    "compiled": ("compiled", text_compiled),
}
