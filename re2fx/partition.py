"""Bodies in parts: which nodes of a frame run slice by slice, and the code of each part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from . import ops
from .body import Body, Part, Slicing
from .replay import Lookup
from .slicing import Region

Compile = Callable[[Graph, str], Callable[..., Any]]


@dataclass
class _Piece:
    """Nodes that become one part."""

    nodes: list[Node] = field(default_factory=list)
    region: Region | None = None


def partition(
    graph: Graph,
    root: nn.Module,
    regions: Sequence[Region],
    values: dict[Node, Any],
    compile: Compile,
    name: str,
) -> Body:
    """The body that runs a graph in parts.

    Args:
        graph: placeholders for what is given, and a tuple of values, or one, as its output.
        root: the module that its targets are looked up in.
        regions: what may be run slice by slice; disjoint.
        values: example values of its nodes.
        compile: makes functions from graphs.
        name: of the frame, for tracebacks.
    """
    (output,) = (node for node in graph.nodes if node.op == "output")
    given = output.args[0]
    outputs = [given] if isinstance(given, Node) else list(given)
    places: dict[Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            places[node] = len(places)
    inputs = len(places)
    parts = []
    for number, piece in enumerate(_pieces(graph, regions)):
        label = f"{name}, part {number}"
        if piece.region is None:
            parts.append(_plain(piece.nodes, places, outputs, compile, label))
        else:
            read = [node for node in piece.region.sliced if node.op == "get_attr"]
            if any(node not in places for node in read):
                parts.append(_plain(read, places, read, compile, f"{label}, weights"))
            parts.append(_sliced(piece.region, places, values, root, compile, label))
    return Body(tuple(parts), inputs, tuple(places[node] for node in outputs))


def _pieces(graph: Graph, regions: Sequence[Region]) -> list[_Piece]:
    """The nodes in an order in which every region runs at once."""
    region_of = {node: region for region in regions for node in region.nodes}
    done = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    waiting = [n for n in graph.nodes if n not in done and n.op != "output"]
    pieces: list[_Piece] = []
    while waiting:
        piece = _Piece()
        for node in waiting:
            if node not in region_of and done.issuperset(node.all_input_nodes):
                piece.nodes.append(node)
                done.add(node)
        if piece.nodes:
            pieces.append(piece)
        region = next((r for r in regions if _is_next(r, done)), None)
        assert piece.nodes or region is not None, "regions are convex, one by one and together"
        if region is not None:
            pieces.append(_Piece(list(region.nodes), region))
            done.update(region.nodes)
        waiting = [node for node in waiting if node not in done]
    return pieces


def _is_next(region: Region, done: set[Node]) -> bool:
    return done.isdisjoint(region.nodes) and done.issuperset(_reads(region.nodes))


def _reads(nodes: Sequence[Node]) -> list[Node]:
    """The values from outside that some nodes read."""
    own = set(nodes)
    return list(dict.fromkeys(v for node in nodes for v in node.all_input_nodes if v not in own))


def _plain(
    nodes: Sequence[Node],
    places: dict[Node, int],
    outputs: Sequence[Node],
    compile: Compile,
    name: str,
) -> Part:
    """A part that runs at once; its results get places."""
    own = set(nodes)
    reads = [node for node in _reads(nodes) if node in places]
    writes = [n for n in nodes if n in outputs or any(user not in own for user in n.users)]
    graph, targets = subgraph(nodes, reads, writes)
    read = tuple(places[node] for node in reads)
    return Part(compile(graph, name), read, _placed(writes, places), Lookup(targets))


def _sliced(
    region: Region,
    places: dict[Node, int],
    values: dict[Node, Any],
    root: nn.Module,
    compile: Compile,
    name: str,
) -> Part:
    """A part that may run slice by slice."""
    tensors = [*region.sliced, *region.whole]
    numbers = [n for n in _reads(region.nodes) if n in places and n not in tensors]
    reads, writes = [*tensors, *numbers], list(region.outputs)
    graph, targets = subgraph(region.nodes, reads, writes)
    called = [node for node in region.nodes if node.op == "call_module"]
    modules = {str(n.target): type(ops.module_of(n, root)) for n in called}
    slicing = Slicing(
        compile(_with_unread(region.graph(), numbers), f"{name}, in slices"),
        region.items,
        tuple(region.sliced.get(node) for node in reads),
        tuple(region.outputs.values()),
        tuple(_proved(node, region, values) for node in reads),
        tuple(modules.items()),
        region.quiet,
    )
    read = tuple(places[node] for node in reads)
    function, write = compile(graph, name), _placed(writes, places)
    return Part(function, read, write, Lookup(targets), slicing=slicing)


def _placed(nodes: Sequence[Node], places: dict[Node, int]) -> tuple[int, ...]:
    for node in nodes:
        places[node] = len(places)
    return tuple(places[node] for node in nodes)


def _proved(node: Node, region: Region, values: dict[Node, Any]) -> tuple[int, ...] | None:
    """The sizes of a value for which independence was proved, with 0 for that of the items."""
    value = values.get(node)
    if not isinstance(value, Tensor):
        return None
    sizes = list(value.shape)
    if node in region.sliced:
        sizes[region.sliced[node][0]] = 0
    return tuple(sizes)


def _with_unread(graph: Graph, numbers: Sequence[Node]) -> Graph:
    """The same with more inputs, which nobody reads: it has their values as constants."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        for node in reversed(numbers):
            graph.placeholder(f"{node.name}_unread")
    return graph


def subgraph(
    nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]
) -> tuple[Graph, tuple[str, ...]]:
    """A graph of its own for some nodes, and the dotted names it looks up on the root.

    Args:
        nodes: in order.
        inputs: become placeholders.
        outputs: returned as a tuple.
    """
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    targets: dict[str, None] = {}

    def copied(value: Node) -> Node:
        if value not in copies:
            assert value.op == "get_attr", f"{value} is neither an input nor one of the nodes"
            copies[value] = graph.node_copy(value)
            targets[str(value.target)] = None
        return copies[value]

    for node in nodes:
        copies[node] = graph.node_copy(node, copied)
        if node.op in ("call_module", "get_attr"):
            targets[str(node.target)] = None
    graph.output(tuple(map(copied, outputs)))
    return graph, tuple(targets)
