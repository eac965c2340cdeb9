"""Parts of a program that run without gradients, under autocast, or in a ``vmap``.

In a graph they are two operations that no value connects with what stands between them:

    enter = _enter_autocast("cpu", bfloat16, True, None)
    h = linear(x, weight)
    exit = _exit_autocast(enter)

A branch that holds all of a part takes the two operations along when it is run again. A block that
lies in one as a whole is run there. Everything else would run under another state than it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Graph, Node

from . import ops

if TYPE_CHECKING:
    from .graph import Flow


@dataclass(frozen=True)
class Context:
    """One such part.

    Attributes:
        enter: switches the state.
        exit: switches it back; None if nothing does.
        inside: what stands between them and makes a value, in program order.
        switches: the two, and those between them.
    """

    enter: Node
    exit: Node | None
    inside: tuple[Node, ...]
    switches: tuple[Node, ...]

    @property
    def transforms(self) -> bool:
        """Whether values in it are of another kind, as in a ``vmap``."""
        return "nesting" in name_of(self.enter)


def name_of(node: Node) -> str:
    """The name of the function that a node calls."""
    return getattr(node.target, "__name__", "")


def pairs(nodes: Iterable[Node]) -> Iterator[tuple[Node, Node | None]]:
    """The switches of a program, each with what switches back.

    Gradients are set, not entered and left: they are on in the beginning, and what sets them to
    what they were before the last switch ends it.
    """
    opened: list[tuple[Node, bool | None]] = []  # and how gradients were before
    graded = True
    for node in nodes:
        if not ops.switches_context(node):
            continue
        name = name_of(node)
        ends = name.startswith(("_exit", "exit")) or "decrement" in name
        if name == "_set_grad_enabled":
            mode = bool(node.args[0])
            ends = bool(opened) and opened[-1][1] == mode
            before, graded = graded, mode
        if ends and opened:
            yield opened.pop()[0], node
        elif not ends:
            opened.append((node, before if name == "_set_grad_enabled" else None))
    yield from ((node, None) for node, _ in opened)


def contexts(flow: Flow) -> tuple[Context, ...]:
    """All such parts of a program."""
    found = []
    for enter, exit in pairs(flow.nodes):
        end = flow.position[exit] if exit is not None else len(flow.nodes)
        between = flow.nodes[flow.position[enter] + 1 : end]
        switches = [node for node in between if ops.switches_context(node)]
        inside = tuple(node for node in between if matters(flow, node))
        whole = (enter, *switches, *(() if exit is None else (exit,)))
        found.append(Context(enter, exit, inside, whole))
    return tuple(found)


def matters(flow: Flow, node: Node) -> bool:
    """Whether it matters under which state a node runs."""
    fixed = node.op in ("get_attr", "placeholder") or flow.is_number(node)
    fixed = fixed or flow.source(node) is not node
    return not fixed and not ops.switches_context(node) and bool(node.users or flow.inputs(node))


def owned(flow: Flow, inside: Iterable[Node]) -> list[Node]:
    """The switches that belong to a branch: all that stands between them is the branch's."""
    if not flow.contexts:
        return []
    own = set(inside)
    held = (c for c in flow.contexts if c.exit and c.inside and own.issuperset(c.inside))
    return list(dict.fromkeys(node for context in held for node in context.switches))


def crossing(flow: Flow, inside: Iterable[Node], add: Node) -> Context | None:
    """A part that holds something of a residual, but neither all of it nor only its branch."""
    if not flow.contexts:
        return None
    own, position = set(inside), flow.position
    start = min(position[node] for node in own)
    for context in flow.contexts:
        held = set(context.inside)
        if add not in held and held.isdisjoint(own):
            continue
        if context.exit is not None and own.issuperset(held):
            continue
        before = position[context.enter] < start
        if before and add in held and not context.transforms:
            continue
        return context
    return None


def enter_grad_mode(mode: bool) -> bool:
    """Switch gradients on or off; returns how they were."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(mode)
    return before


def exit_grad_mode(before: bool) -> None:
    """Switch gradients back to what they were."""
    torch._C._set_grad_enabled(before)


def restore_grad_modes(graph: Graph) -> None:
    """Let a graph that was captured with gradients end its parts as it found them.

    The capture switched gradients on again; a caller may have them off.
    """
    for enter, exit in list(pairs(graph.nodes)):
        if name_of(enter) != "_set_grad_enabled" or exit is None:
            continue
        enter.target = enter_grad_mode
        exit.target, exit.args = exit_grad_mode, (enter,)
