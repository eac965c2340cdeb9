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


def to_rich(head: str, tables: Iterable[Table]) -> Group:
    """A sentence and tables for a terminal."""
    from rich.console import Group
    from rich.text import Text

    return Group(Text(head), *(table.to_rich() for table in tables))


def to_html(head: str, tables: Iterable[Table]) -> str:
    """A sentence and tables for a notebook."""
    return f"<p>{html.escape(head)}</p>" + "".join(table.to_html() for table in tables)
