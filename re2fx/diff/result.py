"""What differs between two graphs, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from functools import cached_property
from os import PathLike
from typing import Any, Literal

from re2fx.text import count
from re2fx.wiring import Wiring

from .listing import Listing, Value
from .match import Pairs, ascending, match

Names = tuple[tuple[str, ...], tuple[str, ...]]
Status = Literal["kept", "rewired", "changed", "added", "removed"]
SYMBOLS: dict[Status, str] = {
    "kept": " ", "rewired": "~", "changed": "!", "added": "+", "removed": "-",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One node of either graph, or the same node of both.

    Attributes:
        name: canonical name: module path and what it is, unique in the two graphs together.
        status: ``"kept"``; ``"rewired"`` if it is kept but reads another value than before;
            ``"changed"`` if another target or other arguments stand at its place; ``"added"`` or
            ``"removed"``.
        before: the node in the graph before, if it is there.
        after: the node in the graph after, if it is there.
        scope: path of the module whose code computes it; that of the row above if nothing is
            known, as for nodes that a pass inserted.
    """

    name: str
    status: Status
    before: Value | None
    after: Value | None
    scope: str

    @property
    def value(self) -> Value:
        """The node as it is after, or was before."""
        value = self.after or self.before
        assert value is not None
        return value


@dataclass(frozen=True)
class Edge:
    """An edge that differs.

    Attributes:
        reader: canonical name of the node that reads.
        slot: the place among its arguments, such as ``args[0]``.
        before: canonical name of the value that was read, if any.
        after: canonical name of the value that is read, if any.
    """

    reader: str
    slot: str
    before: str | None
    after: str | None

    @property
    def status(self) -> Status:
        """``"rewired"`` if another value is read than before, ``"added"`` or ``"removed"``."""
        if self.before is None:
            return "added"
        return "removed" if self.after is None else "rewired"


@dataclass(frozen=True)
class Summary:
    """How many nodes and edges differ.

    Attributes:
        kept: nodes in both graphs, with the same target and arguments.
        added, removed, changed: nodes.
        edges_added, edges_removed: edges.
        edges_rewired: places where a node reads another value than before.
    """

    kept: int
    added: int
    removed: int
    changed: int
    edges_added: int
    edges_removed: int
    edges_rewired: int

    def __str__(self) -> str:
        return (
            f"{count(self.added, 'node')} added, {self.removed} removed, {self.changed} changed, "
            f"{self.kept} kept; {count(self.edges_added, 'edge')} added, {self.edges_removed} "
            f"removed, {self.edges_rewired} rewired"
        )


@dataclass(frozen=True)
class Diff:
    """The difference of two graphs; print it, or write it to a page with `to_html`.

    Attributes:
        before: the graph before.
        after: the graph after.
        pairs: indices of the nodes that are the same.
        wirings: the reversible chains of the graph after, if it was made by `re2fx.transform`.
    """

    before: Listing
    after: Listing
    pairs: tuple[tuple[int, int], ...]
    wirings: tuple[Wiring, ...] = ()

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Every node of both graphs once, in program order."""
        return _rows(self)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """The edges that differ, in the order of the rows."""
        return tuple(edge for row in self.rows for edge in self._differing[row.name])

    @cached_property
    def changes(self) -> tuple[Row, ...]:
        """The rows that are not kept as they were."""
        return tuple(row for row in self.rows if row.status != "kept")

    @cached_property
    def summary(self) -> Summary:
        """How many nodes and edges differ."""
        nodes = Counter(row.status for row in self.rows)
        edges = Counter(edge.status for edge in self.edges)
        return Summary(
            nodes["kept"] + nodes["rewired"],
            nodes["added"],
            nodes["removed"],
            nodes["changed"],
            edges["added"],
            edges["removed"],
            edges["rewired"],
        )

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.changes)

    @cached_property
    def names(self) -> Names:
        """Canonical names of the nodes of either graph, by index."""
        return _names(self.before, self.after, self.pairs)

    @cached_property
    def _differing(self) -> dict[str, tuple[Edge, ...]]:
        return {row.name: tuple(self._edges(row)) for row in self.rows}

    def _edges(self, row: Row) -> Iterable[Edge]:
        return _edges(row.name, row.before, row.after, self.names)

    def __str__(self) -> str:
        return self.text()

    def text(self, context: int = 2, color: bool = False) -> str:
        """A unified diff of readable code, limited to what changed.

        Args:
            context: unchanged nodes shown before and after a change.
            color: mark changes with terminal colours; needs rich.

        Raises:
            OptionError: rich is not installed.
        """
        from .text import colored, unified

        text = unified(self, context)
        return colored(text) if color else text

    def to_dict(self) -> dict[str, Any]:
        """The difference as plain data for `json`: summary, nodes and edges that differ."""
        from .export import node_record

        return {
            "before": self.before.title,
            "after": self.after.title,
            "summary": asdict(self.summary),
            "nodes": [node_record(self, row) for row in self.changes],
            "edges": [{"status": edge.status, **asdict(edge)} for edge in self.edges],
        }

    def to_json(self) -> str:
        """What `to_dict` gives, as JSON."""
        import json

        return json.dumps(self.to_dict(), indent=1)

    def to_dot(self) -> str:
        """Both graphs as one in the DOT language: a cluster per module, changes in colour."""
        from .export import dot

        return dot(self)

    def to_html(
        self, path: str | PathLike[str] | None = None, steps: Sequence[tuple[str, Diff]] = ()
    ) -> str:
        """One self-contained page that needs no network.

        Args:
            path: a file to write it to.
            steps: further differences with their names, such as `re2fx.history` gives; the
                page lets one choose among them.

        Returns:
            the page.
        """
        from .page import page

        title = f"{self.before.title} \N{RIGHTWARDS ARROW} {self.after.title}"
        html = page([("all", self), *steps], title)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(html)
        return html

    def _repr_html_(self) -> str:
        from .text import marked_up

        return marked_up(self.text())


def compare(before: Listing, after: Listing, wirings: tuple[Wiring, ...] = ()) -> Diff:
    """Match two graphs and compare what was matched.

    Args:
        before: one graph.
        after: another.
        wirings: the reversible chains of ``after``.
    """
    return Diff(before, after, tuple(match(before, after)), wirings)


def _names(before: Listing, after: Listing, pairs: Iterable[tuple[int, int]]) -> Names:
    """Pairs are named as in the graph before; what is added takes the next free numbers."""
    taken: set[str] = set()
    numbers: Counter[str] = Counter()

    def fresh(value: Value) -> str:
        stem = ".".join(filter(None, (value.scope, value.base)))
        while True:
            name = f"{stem}_{numbers[stem]}" if numbers[stem] else stem
            numbers[stem] += 1
            if name not in taken:
                taken.add(name)
                return name

    first = tuple(fresh(value) for value in before.values)
    known = {j: first[i] for i, j in pairs}
    return first, tuple(known.get(v.index) or fresh(v) for v in after.values)


def _rows(diff: Diff) -> tuple[Row, ...]:
    """The merged program as rows."""
    rows: list[Row] = []
    for before, after in _merged(diff):
        value = after or before
        assert value is not None
        scope = value.scope
        if not scope and rows and value.op.startswith("call") and not value.location.line:
            scope = rows[-1].scope
        name = diff.names[1][after.index] if after else diff.names[0][value.index]
        rows.append(Row(name, _status(before, after, diff.names), before, after, scope))
    return tuple(rows)


def _merged(diff: Diff) -> Iterator[tuple[Value | None, Value | None]]:
    """Two programs as one: pairs, between them what is removed, then what is added.

    A pair that changed its place among the others stands where it is after.
    """
    left, right = diff.before.values, diff.after.values
    old = {j: left[i] for i, j in diff.pairs}
    paired = {i for i, _ in diff.pairs}
    start, begin = 0, 0
    for i, j in [*ascending(list(diff.pairs)), (len(left), len(right))]:
        yield from ((v, None) for v in left[start:i] if v.index not in paired)
        yield from ((old.get(v.index), v) for v in right[begin : j + 1])
        start, begin = i + 1, j + 1


def _status(before: Value | None, after: Value | None, names: Names) -> Status:
    if before is None or after is None:
        return "removed" if after is None else "added"
    if (before.label, before.literals) != (after.label, after.literals):
        return "changed"
    rewired = any(True for _ in _edges("", before, after, names))
    return "rewired" if rewired else "kept"


def _edges(name: str, before: Value | None, after: Value | None, names: Names) -> Iterable[Edge]:
    """Where one node reads other values than before."""
    old = [(names[0][r], slot) for r, slot in _read(before)]
    new = [(names[1][r], slot) for r, slot in _read(after)]
    if len(old) == len(new):
        for (was, slot), (now, _) in zip(old, new, strict=True):
            if was != now:
                yield Edge(name, slot, was, now)
        return
    alike = SequenceMatcher(None, [n for n, _ in old], [n for n, _ in new], autojunk=False)
    for tag, i, j, k, m in alike.get_opcodes():
        if tag == "equal":
            continue
        both = min(j - i, m - k)
        for (was, slot), (now, _) in zip(old[i : i + both], new[k : k + both], strict=True):
            yield Edge(name, slot, was, now)
        for was, slot in old[i + both : j]:
            yield Edge(name, slot, was, None)
        for now, slot in new[k + both : m]:
            yield Edge(name, slot, None, now)


def _read(value: Value | None) -> list[tuple[int, str]]:
    return list(zip(value.reads, value.slots, strict=True)) if value else []


__all__ = ["SYMBOLS", "Diff", "Edge", "Pairs", "Row", "Status", "Summary", "compare"]
