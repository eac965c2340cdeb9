"""Differences as one self-contained page: data, template, style and script in a single file."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

from re2fx.wiring import Block, Link, Wiring

from .layout import Section, arrange
from .listing import Member, Value
from .result import SYMBOLS, Diff, Row
from .text import member

STATUSES = list(SYMBOLS)
SORTS = ["module", "alike", "same"]
SCRIPTS = ("model.js", "rows.js", "wiring.js", "main.js")


def page(diffs: Sequence[tuple[str, Diff]], title: str) -> str:
    """Render differences; the reader chooses among several.

    Args:
        diffs: with their names.
        title: of the page.
    """
    import jinja2

    data = {"title": title, "diffs": [_Packed(name, diff).data() for name, diff in diffs]}
    template = jinja2.Environment(autoescape=True).from_string(asset("page.html.j2"))
    return template.render(
        title=title,
        names=[name for name, _ in diffs],
        data=embedded(data),
        css=asset("page.css"),
        scripts=[asset(name) for name in SCRIPTS],
    )


def asset(name: str) -> str:
    """A file that the page is made of."""
    return resources.files("re2fx.diff").joinpath("assets", name).read_text("utf-8")


def embedded(data: Any) -> str:
    """JSON that can stand in a script element: no tag and no comment can begin in it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


class _Packed:
    """One difference as the script reads it; repeated strings are numbered."""

    def __init__(self, name: str, diff: Diff) -> None:
        self.name, self.diff = name, diff
        self.rows = diff.rows
        self.strings: dict[Hashable, int] = {}
        # A value is known by the number of its row, the same in both graphs.
        self.number = {row.name: index for index, row in enumerate(self.rows)}

    def data(self) -> dict[str, Any]:
        """Everything the page shows."""
        rows = [self.row(row) for row in self.rows]
        tree = self.section(arrange(self.rows))
        return {
            "name": self.name,
            "before": self.diff.before.title,
            "after": self.diff.after.title,
            "summary": asdict(self.diff.summary),
            "rows": rows,
            "tree": tree,
            "chains": [self.chain(wiring) for wiring in self.diff.wirings],
            "strings": list(self.strings),
        }

    def string(self, text: str) -> int:
        """The number of a string."""
        return self.strings.setdefault(text, len(self.strings))

    def row(self, row: Row) -> list[Any]:
        """Status, name, module, then each side; the second side is left out if it is the same."""
        before = row.before and self.side(row.before, 0, row.scope)
        after = row.after and self.side(row.after, 1, row.scope)
        head: list[Any] = [STATUSES.index(row.status), row.name, self.string(row.scope)]
        return [*head, before] if before == after else [*head, before, after]

    def side(self, value: Value, side: int, scope: str) -> list[Any]:
        """Code in pieces (numbers are rows), node, opcode, target, place in the source, shape."""
        names = self.diff.names[side]
        pieces: list[Any] = []
        for piece in value.pieces:
            if isinstance(piece, int):
                pieces.append(self.number[names[value.reads[piece]]])
            else:
                text = member(piece.path, scope) if isinstance(piece, Member) else piece
                joined = pieces and isinstance(pieces[-1], str)
                pieces[-1:] = [pieces[-1] + text] if joined else [*pieces[-1:], text]
        place = value.location
        return [
            pieces,
            value.name,
            self.string(value.op),
            self.string(value.target),
            self.string(f"{place.file}:{place.line}" if place.file else ""),
            self.string(place.code),
            self.string(value.shape),
            self.string(value.kind),
        ]

    def section(self, section: Section) -> list[Any]:
        """Sort, path, class, size, number of changes, entries."""
        diff = self.diff
        kind = diff.after.kinds.get(section.path) or diff.before.kinds.get(section.path, "")
        items = [i if isinstance(i, int) else self.section(i) for i in section.items]
        return [
            SORTS.index(section.sort),
            section.path,
            kind,
            section.size,
            section.changed,
            items,
        ]

    def chain(self, wiring: Wiring) -> dict[str, Any]:
        """What the drawing of a chain shows."""
        by_node = {row.after.name: i for i, row in enumerate(self.rows) if row.after}
        steps: list[dict[str, Any]] = []
        for step in wiring.steps:
            if isinstance(step, Link):
                name = step.currents[-1] if step.currents else step.current
                steps.append({"link": len(step.currents), "row": by_node.get(name, -1)})
            else:
                steps.append(self.block(step, by_node))
        return {
            "entry": by_node.get(wiring.entry, -1),
            "before": by_node.get(wiring.before or "", -1),
            "steps": steps,
        }

    def block(self, block: Block, by_node: dict[str, int]) -> dict[str, Any]:
        """One residual of a drawing."""
        place = block.location
        return {
            "row": by_node.get(block.output, -1),
            "branch": by_node.get(block.branch, -1),
            "module": place.module,
            "source": f"{place.file.rpartition('/')[2]}:{place.line}" if place.file else "",
            "code": place.code,
            "coupling": [block.coupling.a, block.coupling.b, block.coupling.c],
        }
