"""Differences for other programs: records for JSON, and the DOT language."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .text import code, right_side

if TYPE_CHECKING:
    from .result import Diff, Row

COLORS = {
    "kept": "#8c959f", "rewired": "#0969da", "changed": "#9a6700", "added": "#1a7f37",
    "removed": "#cf222e",
}  # fmt: skip
STYLES = {"kept": "solid", "rewired": "bold", "changed": "bold", "added": "bold"}


def node_record(diff: Diff, row: Row) -> dict[str, Any]:
    """One node that differs."""
    place = row.value.location
    return {
        "name": row.name,
        "status": row.status,
        "module": row.scope,
        "file": place.file,
        "line": place.line,
        "code": place.code,
        "before": row.before and _side(row.before, diff.names[0]),
        "after": row.after and _side(row.after, diff.names[1]),
    }


def _side(value: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "node": value.name,
        "op": value.op,
        "target": value.target,
        "code": right_side(value, names, value.scope),
        "reads": [names[read] for read in value.reads],
        "shape": value.shape,
    }


def dot(diff: Diff) -> str:
    """Both graphs as one, a cluster per module."""
    lines = ["digraph diff {", "  rankdir=TB;", '  node [shape=box, fontname="monospace"];']
    clusters: dict[str, list[Row]] = {}
    for row in diff.rows:
        clusters.setdefault(row.scope, []).append(row)
    for number, (scope, rows) in enumerate(clusters.items()):
        lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(scope)};"]
        lines += [f"    {_node(diff, row)}" for row in rows]
        lines.append("  }")
    lines += [f"  {line}" for line in _arrows(diff)]
    return "\n".join([*lines, "}"])


def _node(diff: Diff, row: Row) -> str:
    names = diff.names[0] if row.after is None else diff.names[1]
    label = code(row.value, row.name, names, row.scope)
    style = STYLES.get(row.status, "dashed")
    return (
        f"{_quoted(row.name)} [label={_quoted(label)}, color={_quoted(COLORS[row.status])}, "
        f"style={style}, tooltip={_quoted(row.status)}];"
    )


def _arrows(diff: Diff) -> Iterator[str]:
    """Edges of both graphs; a rewired one is a removed and an added one."""
    removed = {(e.before, e.reader) for e in diff.edges if e.before is not None}
    added = {(e.after, e.reader) for e in diff.edges if e.after is not None}
    for value in diff.after.values:
        for read in dict.fromkeys(value.reads):
            edge = diff.names[1][read], diff.names[1][value.index]
            status = "added" if edge in added else "kept"
            yield _arrow(edge, status)
    for source, reader in sorted(removed):
        if source is not None:
            yield _arrow((source, reader), "removed")


def _arrow(edge: tuple[str, str], status: str) -> str:
    style = STYLES.get(status, "dashed")
    return (
        f"{_quoted(edge[0])} -> {_quoted(edge[1])} "
        f"[color={_quoted(COLORS[status])}, style={style}];"
    )


def _quoted(text: str) -> str:
    """A string of the DOT language; JSON escapes quotes and line ends the same way."""
    return json.dumps(text, ensure_ascii=False)
