"""A verification as a terminal table, as a notebook cell and as a picture."""

from __future__ import annotations

import html
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
    try:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise OptionError("rich is not installed: pip install 're2fx[cli]'") from error

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

    A block whose input came back to the bit has no place on that scale and stands on the lower
    edge, hollow.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise OptionError("matplotlib is not installed: pip install 're2fx[bench]'") from error

    picture = Figure(figsize=(7, 4), layout="constrained")
    axes = picture.add_subplot()
    axes.set_yscale("log")
    levels = [
        e for chain in verification.chains for b in chain.blocks if (e := b.error) and e < 1e300
    ]
    least = min([*levels, verification.tolerance]) / 4
    for index, chain in enumerate(verification.chains):
        _line(axes, index, chain, least)
    axes.axhline(verification.tolerance, color="0.35", linestyle="--", linewidth=1)
    axes.annotate(
        f"tolerance {verification.tolerance:.0e}",
        (1, verification.tolerance),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color="0.35",
    )
    axes.set_xlabel("blocks from the end of the chain")
    axes.set_ylabel("relative error of the\nreconstructed state")
    axes.set_title(f"{verification.name}: {verification.conditions}", fontsize="medium")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=least / 1.5, top=max([*levels, verification.tolerance]) * 6)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if verification.chains:
        axes.legend(frameon=False, fontsize="small", loc="best")
    if path is not None:
        picture.savefig(path, dpi=150)
    return picture


def _line(axes: Any, index: int, chain: ChainErrors, least: float) -> None:
    """One chain, read from its end as the backward walks it."""
    errors = [block.error for block in reversed(chain.blocks)]
    points = [(depth, error) for depth, error in enumerate(errors) if error is not None]
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    size = 4 if len(points) < 60 else 2
    label = f"chain {chain.number}, {chain.blocks[0].where.split(' (')[0]}"
    axes.plot(
        [depth for depth, _ in points],
        [max(error, least) for _, error in points],
        color=colour,
        marker=marker,
        markersize=size,
        linewidth=1.2,
        label=label,
    )
    exact = [depth for depth, error in points if error == 0]
    axes.plot(exact, [least] * len(exact), marker, color=colour, markersize=size, mfc="white")
