"""Bodies in parts: which nodes of a frame run slice by slice, and the code of each part."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from . import ops
from .body import Body, Part, Slicing
from .replay import Lookup
from .sizes import nbytes
from .slicing import Facts, Region, order

NARROW = 4  # bytes made since the last cut per byte that crosses

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
    whole = _pieces(graph, root, regions, values)
    pieces = [part for piece in whole for part in _narrowed(piece, graph, root, values)]
    for number, piece in enumerate(pieces):
        label = f"{name}, part {number}"
        if piece.region is None:
            parts.append(_plain(piece.nodes, places, outputs, compile, label))
        else:
            read = [node for node in piece.region.sliced if node.op == "get_attr"]
            if any(node not in places for node in read):
                parts.append(_plain(read, places, read, compile, f"{label}, weights"))
            parts.append(_sliced(piece, piece.region, places, values, root, compile, label))
    return Body(tuple(parts), inputs, tuple(places[node] for node in outputs))


def _pieces(
    graph: Graph, root: nn.Module, regions: Sequence[Region], values: dict[Node, Any]
) -> list[_Piece]:
    """The nodes in an order in which every region runs at once and writes stay in their places.

    A region is not cut off if it would have to count what is made of its own results, or if it
    comes between a value and what overwrites it: no part may change what it reads.
    """
    given = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    if not regions:
        nodes = [n for n in graph.nodes if n.op != "output" and n not in given]
        return [_Piece(nodes)] if nodes else []
    facts = Facts(graph, root, values)
    items = order(facts, regions, numbers_first=True) or order(facts, regions)
    assert items is not None, "regions that are found together have an order"
    pieces: list[_Piece] = []
    done = dict.fromkeys(given, -1)  # in which piece

    def without(number: int) -> list[_Piece]:
        """The pieces without the last region up to a piece."""
        last = next(p.region for p in reversed(pieces[: number + 1]) if p.region is not None)
        return _pieces(graph, root, [region for region in regions if region is not last], values)

    for item in items:
        if isinstance(item, Region):
            pieces.append(_Piece(_with_numbers(item, done), item))
            if not set(done).issuperset(_reads(pieces[-1].nodes)):
                return without(len(pieces) - 1)
            done.update(dict.fromkeys(item.nodes, len(pieces) - 1))
        elif item not in done and item.op != "output":
            if not pieces or pieces[-1].region is not None:
                pieces.append(_Piece())
            number = len(pieces) - 1
            pieces[-1].nodes.append(item)
            done[item] = number
            if any(0 <= done[value] < number for value in facts.overwritten(item)):
                return without(number)
    return pieces


def _narrowed(
    piece: _Piece, graph: Graph, root: nn.Module, values: dict[Node, Any]
) -> list[_Piece]:
    """Plain nodes cut where little crosses of what they have made since the last cut.

    So that a part can be brought back without what the parts in front of it save.
    """
    if piece.region is not None or any(values.get(node) is None for node in piece.nodes):
        return [piece]
    facts = Facts(graph, root, values)
    written = {n: i for i, node in enumerate(piece.nodes) for n in facts.overwritten(node)}
    last = {value: i for i, node in enumerate(piece.nodes) for value in node.all_input_nodes}
    own, found = set(piece.nodes), [_Piece()]
    made, fresh = 0, dict[Node, int]()
    for index, node in enumerate(piece.nodes):
        found[-1].nodes.append(node)
        view = ops.may_alias(node, root)
        held = sum(fresh.get(value, 0) for value in node.all_input_nodes)
        fresh[node] = min(nbytes(values[node]), held) if view else nbytes(values[node])
        made += 0 if view else fresh[node]
        crossing = sum(
            size
            for value, size in fresh.items()
            if last.get(value, -1) > index or any(user not in own for user in value.users)
        )
        narrow = 0 < crossing * NARROW <= made and index + 1 < len(piece.nodes)
        if narrow and not any(written.get(value, -1) > index for value in piece.nodes[: index + 1]):
            found.append(_Piece())
            made, fresh = 0, {}
    return found


def _with_numbers(region: Region, done: Container[Node]) -> list[Node]:
    """Its nodes, and those of the numbers that it reads and that nobody has counted yet."""
    nodes = set(region.nodes)
    waiting = list(nodes)
    while waiting:
        for value in waiting.pop().all_input_nodes:
            if value in region.constants and value not in done and value not in nodes:
                nodes.add(value)
                waiting.append(value)
    return sorted(nodes)


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
    piece: _Piece,
    region: Region,
    places: dict[Node, int],
    values: dict[Node, Any],
    root: nn.Module,
    compile: Compile,
    name: str,
) -> Part:
    """A part that may run slice by slice."""
    tensors = [*region.sliced, *region.whole]
    numbers = [n for n in _reads(piece.nodes) if n in places and n not in tensors]
    reads, writes = [*tensors, *numbers], list(region.outputs)
    graph, targets = subgraph(piece.nodes, reads, writes)
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
    nodes: Sequence[Node],
    inputs: Sequence[Node],
    result: Node | Sequence[Node],
    output: Node | None = None,
) -> tuple[Graph, tuple[str, ...]]:
    """A graph of its own for some nodes, and the dotted names it looks up on the root.

    Args:
        nodes: in order.
        inputs: become placeholders.
        result: returned, several as a tuple.
        output: the node that returns something else instead.
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
    if output is not None:
        graph.node_copy(output, copied)
    else:
        graph.output(copied(result) if isinstance(result, Node) else tuple(map(copied, result)))
    return graph, tuple(targets)
