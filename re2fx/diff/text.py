"""Differences as text: a unified diff of readable code, one hunk per place and module."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .listing import Member, Value

if TYPE_CHECKING:
    from .result import Diff, Row

STYLES = {"+": "green", "-": "red", "@": "cyan"}
# Dark enough on white, light enough on black.
SHADES = {"+": "#1a7f37", "-": "#cf222e", "@": "#6e7781"}


def unified(diff: Diff, context: int = 2) -> str:
    """The summary, and the rows that differ with some around them.

    Args:
        diff: what to render.
        context: unchanged nodes shown before and after a change.
    """
    lines = [str(diff.summary)]
    if diff:
        lines += [f"--- {diff.before.title}", f"+++ {diff.after.title}"]
    for first, last, scope in hunks(diff.rows, context):
        lines += render_hunk(diff, diff.rows[first:last], scope)
    return "\n".join(lines)


def hunks(rows: tuple[Row, ...], context: int) -> Iterator[tuple[int, int, str]]:
    """Bounds and module of each run of changes that lie close together in one module."""
    changed = [i for i, row in enumerate(rows) if row.status != "kept"]
    done = 0
    while changed:
        scope = rows[changed[0]].scope
        size = 1
        while (
            size < len(changed)
            and changed[size] - changed[size - 1] <= 2 * context + 1
            and (rows[changed[size]].scope + ".").startswith(scope + ".")
        ):
            size += 1
        first = max(done, changed[0] - context)
        last = min(len(rows), changed[size - 1] + context + 1, *changed[size : size + 1])
        yield first, last, scope
        done, changed = last, changed[size:]


def inside(path: str, scope: str) -> bool:
    """Whether a module is another one or a part of it."""
    return path == scope or not scope or path.startswith(scope + ".")


def render_hunk(diff: Diff, rows: tuple[Row, ...], scope: str) -> list[str]:
    """A head line with places and module, source lines of what changed, and the code."""
    kind = diff.after.kinds.get(scope) or diff.before.kinds.get(scope, "")
    where = " ".join(filter(None, (scope, kind)))
    lines = [f"@@ -{_range(rows, 'before')} +{_range(rows, 'after')} @@ {where}".rstrip()]
    told = ""
    for row in rows:
        source = source_line(row.value)
        if row.status != "kept" and source != told:
            lines += [f" # {source}"] if source else []
            told = source
        lines += render_row(diff, row, scope)
    return lines


def _range(rows: tuple[Row, ...], side: str) -> str:
    numbers = [value.index for row in rows if (value := getattr(row, side)) is not None]
    return f"{min(numbers, default=-1) + 1},{len(numbers)}"


def source_line(value: Value) -> str:
    """File, line and code, if they are known."""
    place = value.location
    if not place.file:
        return ""
    return f"{os.path.basename(place.file)}:{place.line}  {place.code}".rstrip()


def render_row(diff: Diff, row: Row, scope: str) -> list[str]:
    """One line, or two if it was another before."""
    old = f"{code(row.before, row.name, diff.names[0], scope)}" if row.before else ""
    new = f"{code(row.after, row.name, diff.names[1], scope)}" if row.after else ""
    if row.status == "kept":
        return [f"  {new}"]
    return ([f"- {old}"] if row.before else []) + ([f"+ {new}"] if row.after else [])


def code(value: Value, name: str, names: tuple[str, ...], scope: str) -> str:
    """A node as a line of code, seen from a module.

    Args:
        value: the node.
        name: its canonical name.
        names: canonical names of its graph's nodes.
        scope: path of the module; names of its parts are shortened.
    """
    right = right_side(value, names, scope)
    return f"return {right}" if value.op == "output" else f"{short(name, scope)} = {right}"


def right_side(value: Value, names: tuple[str, ...], scope: str) -> str:
    """What is computed, as code."""
    parts = []
    for piece in value.pieces:
        if isinstance(piece, int):
            parts.append(short(names[value.reads[piece]], scope))
        else:
            parts.append(member(piece.path, scope) if isinstance(piece, Member) else piece)
    return "".join(parts)


def member(path: str, scope: str) -> str:
    """A member of the model: ``self.norm`` in the module it belongs to, a full path elsewhere."""
    if not inside(path, scope):
        return f"model.{path}"
    return f"self.{path[len(scope) + 1 :] if scope else path}"


def short(name: str, scope: str) -> str:
    """A name without the path of the module it is seen from, if it does not look like a number."""
    rest = name[len(scope) + 1 :] if scope and name.startswith(scope + ".") else name
    return name if rest[:1].isdigit() else rest


def colored(text: str) -> str:
    """The text with terminal colours."""
    from rich.console import Console
    from rich.text import Text

    console = Console(color_system="standard", force_terminal=True, width=10_000)
    with console.capture() as capture:
        for line in text.splitlines():
            console.print(Text(line, STYLES.get(line[:1], "")), end="\n", soft_wrap=True)
    return capture.get().rstrip("\n")


def marked_up(text: str) -> str:
    """The text for a notebook: the summary as a heading, changes in colour."""
    first, *rest = text.splitlines()
    lines = []
    for line in rest:
        shade = SHADES.get(line[:1])
        escaped = html.escape(line)
        lines.append(f'<span style="color:{shade}">{escaped}</span>' if shade else escaped)
    body = "<pre style='line-height:1.4'>" + "\n".join(lines) + "</pre>" if rest else ""
    return f"<div><strong>{html.escape(first)}</strong>{body}</div>"
