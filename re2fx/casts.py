"""Casts whose types are known: which lose nothing, and how a stream is read behind one.

    before                              after
    wide = x.float()                    wide = x.float()
    f = mlp(norm(x))                    f = mlp(norm(wide.to(x's type)))
    y = wide + f                        y = wide + f

A widening is undone exactly by casting back, so the skip may be the wide value, and the branch
reads it. Types are known where the graph was captured with them: by Dynamo and by export, for the
types the model and its inputs had then.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.fx import Graph, Node

from . import ops
from .aliases import Aliases
from .graph import Flow


def read_behind_widenings(graph: Graph, root: nn.Module) -> None:
    """Let the branches of a stream that is widened read it behind the cast; changes the graph."""
    if not any(ops.widens(node) for node in graph.nodes):
        return
    flow = Flow(graph, root)
    aliases = Aliases(flow)
    done: set[Node] = set()
    for cast in flow.nodes:
        if not ops.widens(cast):
            continue
        narrow = flow.source(first(cast))
        written = aliases.write_after(narrow, narrow)
        if narrow in done or written is not None or not is_skip(flow, cast, narrow):
            continue
        done.add(narrow)
        read_behind(graph, flow, narrow, cast)


def first(cast: Node) -> Node:
    """What is cast."""
    value = cast.args[0]
    assert isinstance(value, Node), "a cast is one of a value"
    return value


def is_skip(flow: Flow, cast: Node, narrow: Node) -> bool:
    """Whether a widened value is added to what is computed from the narrow one."""
    return any(flow.between(narrow, [other]) for other in beside(flow, cast))


def beside(flow: Flow, cast: Node) -> Iterator[Node]:
    """The other operands of the sums that read a value."""
    for user in flow.users(cast):
        if ops.is_sum(user):
            yield from (value for value in flow.inputs(user) if value is not cast)


def read_behind(graph: Graph, flow: Flow, narrow: Node, cast: Node) -> None:
    """Cast first, and give every other reader the wide value cast back."""
    wide = ops.example(cast)
    equal = [u for u in flow.users(narrow) if ops.widens(u) and same_type(ops.example(u), wide)]
    readers = [user for user in list(narrow.users) if user not in equal]
    with graph.inserting_after(narrow if narrow.op != "placeholder" else last_input(graph)):
        new = graph.call_method("to", (narrow, typed(wide)))
    with graph.inserting_after(new):
        back = graph.call_method("to", (new, typed(ops.example(narrow))))
    new.meta, back.meta = dict(cast.meta), {**cast.meta, **narrow.meta}
    for user in readers:
        user.replace_input_with(narrow, back)
    for old in equal:
        old.replace_all_uses_with(new)
        graph.erase_node(old)


def last_input(graph: Graph) -> Node:
    """The last placeholder, behind which nodes may stand."""
    places: list[Node] = [node for node in graph.nodes if node.op == "placeholder"]
    return places[-1]


def typed(example: torch.Tensor | None) -> torch.dtype:
    """The type of a value that is known."""
    assert example is not None, "only known types are compared"
    return example.dtype


def same_type(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    """Whether two values are of the same known type."""
    return left is not None and right is not None and left.dtype == right.dtype
