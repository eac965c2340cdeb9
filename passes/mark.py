"""Write the stream arithmetic of a rewired graph as marks, for the compiled executor.

    before                              after
    f1 = mlp(norm(p1))                  r1 = fork(p1);  f1 = mlp(norm(r1))
    p2 = p0 + f1                        p2 = couple(p1, p0, r1, f1, 0, 1, 1)
    q2 = p2.permute(0, 2, 1)            q2 = link(p2, p2.permute(0, 2, 1))

Values, gradients and random numbers stay the same. A new graph is returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from re2fx.graph import Flow, copy_graph
from re2fx.marks import COUPLE, FORK, LINK
from re2fx.wiring import Block, Wiring


@dataclass(frozen=True)
class Part:
    """What one block is written in.

    Attributes:
        step: the block.
        readers: the nodes of its branch that read the stream.
        arithmetic: the nodes that spell its coupling.
    """

    step: Block
    readers: tuple[Node, ...]
    arithmetic: tuple[Node, ...]


def mark(graph: Graph, root: nn.Module, wirings: tuple[Wiring, ...]) -> Graph:
    """Return the graph with marks.

    Args:
        graph: a rewired graph; left as it is.
        root: the module its targets are looked up in.
        wirings: where its chains lie.
    """
    flow = Flow(copy_graph(graph), root, identities=True)
    parts = {block: look_up(flow, block) for wiring in wirings for block in wiring.blocks}
    marked: dict[str, Node] = {}  # stream states by their names in the given graph
    for wiring in wirings:
        for step in wiring.steps:
            if isinstance(step, Block):
                mark_block(flow, parts[step], marked)
                continue
            for before, names in (
                (step.current, step.currents),
                (step.previous, step.previouses),
            ):
                for name in names:
                    mark_operation(flow, before, name, marked)
                    before = name
    flow.graph.lint()
    return flow.graph


def look_up(flow: Flow, step: Block) -> Part:
    """Find the nodes of a block before anything is changed."""
    stream, previous, branch, output = (
        flow.by_name[name] for name in (step.current, step.previous, step.branch, step.output)
    )
    arithmetic = flow.cone(output, [stream, previous, branch])
    path = flow.between(stream, [branch])
    passengers, _ = flow.passengers(path, set(arithmetic))
    readers = [node for node in (*path, *passengers) if stream in node.all_input_nodes]
    readers.sort(key=flow.position.__getitem__)
    return Part(step, tuple(readers), tuple(arithmetic))


def mark_block(flow: Flow, part: Part, marked: dict[str, Node]) -> None:
    """A fork in front of the branch, and its coupling as one operator."""
    step, coupling, named = part.step, part.step.coupling, flow.by_name
    current, previous = (marked.get(n, named[n]) for n in (step.current, step.previous))
    branch, output = named[step.branch], named[step.output]
    with flow.graph.inserting_before(part.readers[0]):
        fork = create(flow, branch, FORK, current)
    for reader in part.readers:
        reader.replace_input_with(current, fork)
    coefficients = (float(coupling.a), float(coupling.b), float(coupling.c))
    with flow.graph.inserting_before(output):
        new = create(flow, output, COUPLE, current, previous, fork, branch, *coefficients)
    output.replace_all_uses_with(new)
    for node in part.arithmetic:  # from the output back
        flow.graph.erase_node(node)
    marked[step.output] = new


def mark_operation(flow: Flow, before: str, after: str, marked: dict[str, Node]) -> None:
    """A shape-only operation on one stream."""
    node = flow.by_name[after]
    with flow.graph.inserting_after(node):
        new = create(flow, node, LINK, marked.get(before, flow.by_name[before]), node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    marked[after] = new


def create(flow: Flow, origin: Node, target: Any, *args: Any) -> Node:
    """A mark with the provenance of the node it stands for."""
    node = flow.graph.call_function(target, args)
    node.meta = {k: v for k, v in origin.meta.items() if k != "example_value"}
    return node
