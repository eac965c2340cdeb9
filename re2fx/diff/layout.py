"""How a page arranges rows: modules that nest and fold, identical neighbours as one, long runs cut.

Everything is in program order, so a module that is called twice stands in two places.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, TypeAlias

from .result import Row

ALIKE = 3  # so many identical neighbours become one entry
CONTEXT = 3  # unchanged entries shown around a change
LONGEST = 4  # so many more of them are cut

Item: TypeAlias = "int | Section"


@dataclass
class Section:
    """What folds.

    Attributes:
        sort: ``"module"``, ``"alike"`` for identical modules in a row, ``"same"`` for entries in
            which nothing changed.
        path: of the module; of the first module of several.
        items: numbers of rows, and sections.
        changed: how many rows in it are not kept as they were.
        size: how many rows are in it.
    """

    sort: Literal["module", "alike", "same"]
    path: str
    items: list[Item] = field(default_factory=list)
    changed: int = 0
    size: int = 0


def arrange(rows: tuple[Row, ...]) -> Section:
    """The model as a section of sections."""
    root = nest(rows)
    _Folder(rows).fold(root)
    return root


def nest(rows: tuple[Row, ...]) -> Section:
    """Open a section for each module that the program enters."""
    root = Section("module", "")
    stack = [root]
    for number, row in enumerate(rows):
        parts = row.scope.split(".") if row.scope else []
        depth = 0
        while depth < min(len(stack) - 1, len(parts)) and stack[depth + 1].path == ".".join(
            parts[: depth + 1]
        ):
            depth += 1
        del stack[depth + 1 :]
        while depth < len(parts):
            depth += 1
            section = Section("module", ".".join(parts[:depth]))
            stack[-1].items.append(section)
            stack.append(section)
        stack[-1].items.append(number)
        for section in stack:
            section.changed += row.status != "kept"
            section.size += 1
    return root


class _Folder:
    """Folds from the inside out; equal numbers mark identical sections."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self.rows = rows
        self.numbers: dict[Hashable, int] = {}
        self.marks: dict[int, int] = {}

    def fold(self, section: Section) -> None:
        """Gather identical neighbours, then cut runs of what is unchanged."""
        for item in section.items:
            if isinstance(item, Section):
                self.fold(item)
        key = tuple(self.mark(item) for item in section.items)
        self.marks[id(section)] = self.numbers.setdefault(key, len(self.numbers))
        section.items = self.gather(section.items)
        if section.changed:
            section.items = self.cut(section.items)

    def mark(self, item: Item) -> Hashable:
        """What identical entries share."""
        if isinstance(item, Section):
            return _own_name(item), self.marks[id(item)]
        row = self.rows[item]
        return row.status, row.value.op, row.value.base, row.value.kind

    def gather(self, items: list[Item]) -> list[Item]:
        """Several identical numbered modules in a row become one entry."""
        found: list[Item] = []
        for mark, run in groupby(items, self.repeated):
            members = list(run)
            if mark is None or len(members) < ALIKE:
                found += members
            else:
                found.append(self.section("alike", members))
        return found

    def repeated(self, item: Item) -> int | None:
        """The mark of a numbered module, such as ``blocks.3``."""
        if isinstance(item, Section) and not _own_name(item):
            return self.marks[id(item)]
        return None

    def cut(self, items: list[Item]) -> list[Item]:
        """Fold what is unchanged and far from any change."""
        found: list[Item] = []
        runs = [(same, list(run)) for same, run in groupby(items, self.is_same)]
        for number, (same, run) in enumerate(runs):
            head = CONTEXT if number else 0
            tail = CONTEXT if number < len(runs) - 1 else 0
            if not same or len(run) < head + tail + LONGEST:
                found += run
                continue
            end = len(run) - tail
            found += [*run[:head], self.section("same", run[head:end]), *run[end:]]
        return found

    def is_same(self, item: Item) -> bool:
        """Whether nothing changed in an entry."""
        return not self.changed(item)

    def changed(self, item: Item) -> int:
        """How many rows of an entry changed."""
        return item.changed if isinstance(item, Section) else self.rows[item].status != "kept"

    def section(self, sort: Literal["alike", "same"], members: list[Item]) -> Section:
        """A section of entries that were there."""
        first = members[0]
        section = Section(sort, first.path if isinstance(first, Section) else "", members)
        section.changed = sum(self.changed(item) for item in members)
        section.size = sum(i.size if isinstance(i, Section) else 1 for i in members)
        return section


def _own_name(section: Section) -> str:
    """The last part of a module's path; nothing if it is a number."""
    name = section.path.rpartition(".")[2]
    return "" if name.isdigit() else name
