"""A verification as a terminal table, as a notebook cell and as a picture."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import OptionError
from .findings import ChainErrors, Verification, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = {
    "ok": "green", "inexact": "yellow", "wrong": "red",
    "error": "red", "warning": "yellow", "note": "cyan",
}  # fmt: skip

# Okabe and Ito's colours, told apart with every kind of colour vision; the markers tell them apart
# without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def rich_view(verification: Verification) -> Any:
    """The verdict, the findings, and tables of gradients and chains."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    verdict = verification.verdict
    parts: list[Any] = [Text(verification.headline(), style=f"bold {STYLES[verdict]}")]
    for finding in verification.findings:
        text = Text()
        text.append(f"{finding.severity}: ", style=f"bold {STYLES[finding.severity]}")
        text.append(f"{finding.where}\n", style="bold")
        text.append(f"    {finding.sentence}\n    -> {finding.remedy}")
        parts.append(text)
    gradients = Table("gradient", "relative error", title="gradients, the worst first")
    for gradient in verification.shown_gradients:
        gradients.add_row(Text(gradient.name), f"{gradient.error:.1e}")
    chains = Table("chain", "blocks", "streams", "worst", "at", title="reconstructed states")
    for chain in verification.chains:
        chains.add_row(*map(Text, _row(chain)))
    parts += [table for table in (gradients, chains) if table.row_count]
    return Group(*parts)


def html_view(verification: Verification) -> str:
    """The same for a notebook; every text from the model is escaped."""
    lines = [f"<p><b>{html.escape(verification.headline())}</b></p>"]
    for finding in verification.findings:
        lines.append(
            f"<p><b>{finding.severity}: {html.escape(finding.where)}</b><br>"
            f"{html.escape(finding.sentence)}<br><i>{html.escape(finding.remedy)}</i></p>"
        )
    gradients = [(g.name, f"{g.error:.1e}") for g in verification.shown_gradients]
    lines.append(_table(("gradient", "relative error"), gradients))
    chains = [_row(chain) for chain in verification.chains]
    lines.append(_table(("chain", "blocks", "streams", "worst state", "at"), chains))
    return "\n".join(line for line in lines if line)


def _row(chain: ChainErrors) -> tuple[str, ...]:
    error = chain.worst.error
    worst = "not reconstructed" if error is None else figure(error)
    place = chain.worst.where if error else ""
    return str(chain.number), str(len(chain.blocks)), chain.dtype, worst, place


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def cells(kind: str, row: tuple[str, ...]) -> str:
        return "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', header)}</tr>{body}</table>" if rows else ""


def draw(verification: Verification, path: Any = None) -> Figure:
    """Reconstruction error against depth, one line per chain, on a logarithmic scale.

    A block whose input came back to the bit has no place on that scale and stands hollow on the
    lower edge.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise OptionError("matplotlib is not installed: pip install 're2fx[bench]'") from error

    picture = Figure(figsize=(8, 4), layout="constrained")
    axes = picture.add_subplot()
    errors = [b.error for chain in verification.chains for b in chain.blocks]
    levels = [e for e in errors if e and math.isfinite(e)] + [verification.tolerance]
    axes.set(yscale="log", ylim=(min(levels) / 4, max(levels) * 6))
    for index, chain in enumerate(verification.chains):
        _line(axes, index, chain, verification)
    _tolerance(axes, verification.tolerance)
    axes.set_xlabel("blocks from the end of the chain (hollow: equal to the bit)")
    axes.set_ylabel("relative error of the\nreconstructed state")
    axes.set_title(f"{verification.name}: {verification.conditions}", fontsize="medium")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if verification.chains:
        picture.legend(frameon=False, fontsize="small", loc="outside right upper")
    if path is not None:
        picture.savefig(path, dpi=150)
    return picture


def _line(axes: Any, index: int, chain: ChainErrors, verification: Verification) -> None:
    """One chain, read from its end as the backward walks it."""
    errors = [block.error for block in reversed(chain.blocks)]
    inexact = [(depth, error) for depth, error in enumerate(errors) if error]
    exact = [depth for depth, error in enumerate(errors) if error == 0]
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    # Earlier chains are larger, so that they show behind later ones with the same errors.
    size = min(2 + 75 / max(len(errors), 30), 4.5) + min(
        1.6 * (len(verification.chains) - 1 - index), 8
    )
    first, last = (chain.blocks[end].where.split(" (")[0] for end in (0, -1))
    axes.plot(
        [depth for depth, _ in inexact],
        [error for _, error in inexact],
        color=colour,
        marker=marker,
        markersize=size,
        linewidth=1.2,
        label=f"chain {chain.number}, {first if first == last else f'{first} .. {last}'}",
    )
    axes.plot(
        exact,
        [axes.get_ylim()[0]] * len(exact),
        marker,
        color=colour,
        markersize=size,
        markerfacecolor="white",
        clip_on=False,
        zorder=3,
    )


def _tolerance(axes: Any, tolerance: float) -> None:
    """A dashed line with its value."""
    axes.axhline(tolerance, color="0.35", linestyle="--", linewidth=1)
    axes.annotate(
        f"tolerance {tolerance:g}",
        (1, tolerance),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color="0.35",
    )
