"""Parts of a program that run without gradients, under autocast, or in a ``vmap``.

In a graph they are two operations that no value connects with what stands between them:

    enter = _enter_autocast("cpu", bfloat16, True, None)
    h = linear(x, weight)
    exit = _exit_autocast(enter)

A branch that holds all of a part takes the two operations along when it is run again. A block that
lies in one as a whole is run there. Everything else would run under another state than it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, Node
from torch.nn import attention

from . import ops
from .errors import CaptureError
from .state import allow_attention_kernels, attention_kernels

if TYPE_CHECKING:
    from .graph import Flow

sdpa: Any = attention
Allowed = tuple[Any, ...]


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


def enter_sdpa_kernel(names: Sequence[str]) -> Allowed:
    """Allow these kernels of attention and no other; returns which were allowed."""
    before = attention_kernels()
    sdpa._sdpa_kernel([sdpa._backend_from_string(name) for name in names])
    return before


def exit_sdpa_kernel(before: Allowed) -> None:
    """Allow the kernels of attention that were allowed before."""
    allow_attention_kernels(before)


def pair_attention_kernels(graph: Graph) -> None:
    """Write ``with sdpa_kernel(...)`` of a graph that was captured as what enters and leaves it.

    Dynamo writes both as calls of one function, the second with the kernels that the capture found.

    Raises:
        CaptureError: an order of kernels is set, or they are not set back.
    """
    now = frozenset(kernel.name for kernel in sdpa._cur_sdpa_kernel_backends())
    opened: list[tuple[Node, frozenset[str]]] = []
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not sdpa._sdpa_kernel:
            continue
        kernels, *ordered = node.args
        if any(ordered):
            raise CaptureError("it sets an order of attention kernels, which would not be kept")
        read = [value for value in kernels if isinstance(value, Node)]
        names = tuple(str(value.args[0]) for value in read)
        if opened and opened[-1][1] == frozenset(names):
            enter, now = opened.pop()
            node.target, node.args = exit_sdpa_kernel, (enter,)
        else:
            opened.append((node, now))
            node.target, node.args, now = enter_sdpa_kernel, (names,), frozenset(names)
        for value in read:
            if not value.users:
                graph.erase_node(value)
    if opened:
        raise CaptureError("it sets the attention kernels and does not set them back")


def refuse_settings(graph: Graph) -> None:
    """Refuse a graph that sets a state which no part of a program takes along.

    Raises:
        CaptureError: names the function, and the user's line if it is known.
    """
    for node in graph.nodes:
        name = name_of(node) if node.op == "call_function" else ""
        known = ops.switches_context(node) or "fwd_grad" in name
        torchs = str(getattr(node.target, "__module__", "")).partition(".")[0] == "torch"
        if torchs and name.lstrip("_").startswith("set_") and not known:
            file, line, *_ = node.meta.get("source_line") or ("", 0)
            where = f" ({file}:{line})" if file else ""
            raise CaptureError(f"it calls {name}, which a part that is run again would miss{where}")


def restore_grad_modes(graph: Graph) -> None:
    """Let a graph that was captured with gradients end its parts as it found them.

    The capture switched gradients on again; a caller may have them off.
    """
    for enter, exit in list(pairs(graph.nodes)):
        if name_of(enter) != "_set_grad_enabled" or exit is None:
            continue
        enter.target = enter_grad_mode
        exit.target, exit.args = exit_grad_mode, (enter,)
