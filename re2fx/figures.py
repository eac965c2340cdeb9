"""A report as plain text, as a table in a terminal, and as HTML for a notebook."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .footprint import WAYS, Kept, Report
from .verdict import chain_name, part_name, sentences, size

TITLE = "kept for the backward"
WIDTH = 100


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        kind: ``"chain"``, ``"part"`` or ``"total"``.
        label: what keeps the bytes.
        cells: one text for each way of training.
    """

    kind: str
    label: str
    cells: tuple[str, ...]


def rows(report: Report) -> Iterator[Row]:
    """Chains, parts, and sums."""
    for chain in report.chains:
        yield _row("chain", chain_name(chain), chain.kept)
    for part in report.parts:
        yield _row("part", part_name(part), part.kept)
    if report.chains:
        yield _row("total", "all chains", report.inside)
        yield _row("total", "outside the chains", report.outside)
    yield _row("total", "total", report.total)
    if report.measured is not None:
        yield _row("total", "measured", report.measured)


def _row(kind: str, label: str, kept: Kept) -> Row:
    return Row(kind, label, tuple(size(kept.of(way)) or "-" for way in WAYS))


def heading(report: Report) -> list[str]:
    """What the figures are of."""
    lines = [
        f"{report.name}: {', '.join(report.inputs)}; {report.mode} mode, {report.dtype}",
        f"parameters {size(report.parameters)}, gradients {size(report.gradients)}, buffers "
        f"{size(report.buffers)}, result {size(report.output)}; none of these is counted below",
    ]
    streams = sorted({(c.state, c.dtype) for c in report.chains if c.state})
    if streams:
        each = ", ".join(f"{size(state)} {dtype}" for state, dtype in streams)
        lines.append(f"a stream's state: {each}; a reversed chain keeps two")
    return lines


def text(report: Report) -> str:
    """Aligned plain text."""
    lines = list(rows(report))
    first = max(len(TITLE), *(len(row.label) for row in lines))
    widths = [
        max(len(way), *(len(row.cells[index]) for row in lines)) for index, way in enumerate(WAYS)
    ]

    def line(label: str, cells: tuple[str, ...]) -> str:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join((label.ljust(first), *aligned))

    rule = "-" * (first + sum(widths) + 2 * len(widths))
    table = [line(TITLE, WAYS), rule]
    for index, row in enumerate(lines):
        if row.kind == "total" and lines[index - 1].kind != "total":
            table.append(rule)
        table.append(line(row.label, row.cells))
    words = [textwrap.fill(x, WIDTH, subsequent_indent="  ") for x in sentences(report)]
    return "\n".join([*heading(report), "", *table, "", *words]).rstrip()


def terminal(report: Report) -> Any:
    """A rich renderable."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(TITLE, title_justify="left")
    for way in WAYS:
        table.add_column(way, justify="right", no_wrap=True)
    lines = list(rows(report))
    for index, row in enumerate(lines):
        last = index + 1 < len(lines) and lines[index + 1].kind != row.kind
        style = "bold" if row.label == "total" else ""
        table.add_row(Text(row.label), *row.cells, style=style, end_section=last)
    above = Text("\n".join(heading(report)))
    words = [Text(f"\n{sentence}") for sentence in sentences(report)]
    return Group(above, table, *words)


PAGE = """
<div>
<p>{% for line in heading %}{{ line }}<br>{% endfor %}</p>
<table>
<thead><tr><th style="text-align:left">{{ title }}</th>
{% for way in ways %}<th style="text-align:right">{{ way }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr{% if row.kind == "total" %} style="font-weight:600"{% endif %}>
<td style="text-align:left">{{ row.label }}</td>
{% for cell in row.cells %}<td style="text-align:right">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
{% for sentence in sentences %}<p>{{ sentence }}</p>
{% endfor %}
</div>
"""


def html(report: Report) -> str:
    """A table for a notebook."""
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(PAGE)
    return template.render(
        heading=heading(report),
        title=TITLE,
        ways=WAYS,
        rows=list(rows(report)),
        sentences=sentences(report),
    )
