"""Tables that look alike in a log, in a terminal and in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table as RichTable

_STYLE = "text-align:{align};padding:.15em .8em;vertical-align:top"


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns.

    Attributes:
        title: what the rows are.
        columns: their names; a name that ends in ``>`` is set to the right.
        rows: one text per column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> list[str]:
        """The columns' names as shown."""
        return [column.rstrip(">") for column in self.columns]

    def to_rich(self) -> RichTable:
        """For a terminal."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(self.title, style="bold"), title_justify="left", box=box.SIMPLE
        )
        for column, name in zip(self.columns, self.names, strict=True):
            justify: Literal["left", "right"] = "right" if column.endswith(">") else "left"
            table.add_column(name, justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def to_html(self) -> str:
        """For a notebook; inherits its colours."""

        def cells(tag: str, values: Sequence[str]) -> str:
            return "".join(
                f'<{tag} style="{_STYLE.format(align=align)}">{html.escape(value)}</{tag}>'
                for value, align in zip(values, aligns, strict=True)
            )

        aligns = ["right" if column.endswith(">") else "left" for column in self.columns]
        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        return (
            f'<table><caption style="text-align:left;font-weight:600">{html.escape(self.title)}'
            f"</caption><thead><tr>{cells('th', self.names)}</tr></thead>"
            f"<tbody>{body}</tbody></table>"
        )

    def to_text(self) -> str:
        """Aligned plain text, for a log."""
        lines = [tuple(self.names), *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        right = [column.endswith(">") for column in self.columns]

        def line(cells: Sequence[str]) -> str:
            aligned = (
                cell.rjust(width) if last else cell.ljust(width)
                for cell, width, last in zip(cells, widths, right, strict=True)
            )
            return "  ".join(aligned).rstrip()

        head = line(self.names)
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([self.title, head, rule, *map(line, self.rows)])


def to_rich(head: str, tables: Iterable[Table], foot: str = "") -> Group:
    """A sentence, tables and perhaps another sentence for a terminal."""
    from rich.console import Group
    from rich.text import Text

    below = [Text(foot)] if foot else []
    return Group(Text(head), *(table.to_rich() for table in tables), *below)


def to_html(head: str, tables: Iterable[Table], foot: str = "") -> str:
    """A sentence, tables and perhaps another sentence for a notebook."""
    below = f"<p>{html.escape(foot)}</p>" if foot else ""
    return f"<p>{html.escape(head)}</p>" + "".join(table.to_html() for table in tables) + below
