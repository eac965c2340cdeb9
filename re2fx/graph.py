"""Read-only questions about an FX graph: who reads whom, where a region begins and ends.

`Flow` is computed once per graph, in one pass, and never changes it. All its walks stay between two
positions of the program, so a question about a block costs as much as the block is long, however
deep the network is.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from . import ops
from .contexts import Context, contexts
from .overloads import packed, unpacked
from .plan import Location


class Flow:
    """The dataflow of one graph, by default with identities looked through.

    Args:
        graph: any FX graph.
        root: the module that ``call_module`` and ``get_attr`` targets are looked up in.
        identities: whether an ``nn.Identity`` counts as a node of its own.
    """

    def __init__(self, graph: Graph, root: nn.Module, identities: bool = False) -> None:
        self.graph, self.root = graph, root
        self._identities = identities
        self.nodes: list[Node] = list(graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.by_name = {node.name: node for node in self.nodes}
        self._source: dict[Node, Node] = {}
        self._between: dict[tuple[Node, tuple[Node, ...]], list[Node]] = {}
        self._inputs: dict[Node, tuple[Node, ...]] = {}
        self._users: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        self._shape: set[Node] = set()
        self._made: set[Node] = set()  # of the former, tensors
        self._constant: set[Node] = set()
        self._parametric: set[Node] = set()
        self._free: set[Node] = set()  # no activation goes into it
        for node in self.nodes:
            self._visit(node)

    def _visit(self, node: Node) -> None:
        inputs = tuple(self.source(n) for n in node.all_input_nodes)
        if not self._identities and ops.is_identity(node, self.root):
            self._source[node] = inputs[0]
            return
        self._inputs[node] = inputs
        for value in dict.fromkeys(inputs):
            self._users[value].append(node)
        if ops.is_number_input(node):
            self._shape.add(node)
        if node.op == "get_attr":
            self._constant.add(node)
            self._free.add(node)
            if isinstance(lookup(self.root, str(node.target)), nn.Parameter):
                self._parametric.add(node)
        elif inputs and all(n in self._constant for n in inputs) and node.op != "output":
            self._constant.add(node)
            if any(n in self._parametric for n in inputs) or self._module_trains(node):
                self._parametric.add(node)
        if node.op != "placeholder" and all(n in self._free or n in self._shape for n in inputs):
            self._free.add(node)
        if ops.reads_shape_only(node) or (
            inputs and ops.is_number_op(node) and all(n in self._shape for n in inputs)
        ):
            self._shape.add(node)
            if ops.makes_tensor(node) or any(n in self._made for n in inputs):
                self._made.add(node)
            if ops.reads_shape_only(node) and not ops.makes_tensor(node):
                self._made.discard(node)

    def _module_trains(self, node: Node) -> bool:
        module = ops.module_of(node, self.root)
        return module is not None and any(True for _ in module.parameters())

    def source(self, node: Node) -> Node:
        """The value itself, behind any identities."""
        return self._source.get(node, node)

    def inputs(self, node: Node) -> tuple[Node, ...]:
        """The values a node reads."""
        return self._inputs.get(node, ())

    def users(self, node: Node) -> list[Node]:
        """The nodes that read a value, in program order."""
        return self._users[node]

    def is_shape(self, node: Node) -> bool:
        """Whether the node depends on shapes, dtypes and devices alone."""
        return node in self._shape

    def is_number(self, node: Node) -> bool:
        """Whether the node is a number, a shape or a dtype, and no tensor."""
        return node in self._shape and node not in self._made

    def is_constant(self, node: Node) -> bool:
        """Whether the node depends on parameters, buffers and constants alone."""
        return node in self._constant

    def trains(self, node: Node) -> bool:
        """Whether an activation meets a parameter in this node."""
        if node in self._constant:
            return False
        return self._module_trains(node) or any(n in self._parametric for n in self.inputs(node))

    def is_independent(self, node: Node) -> bool:
        """Whether no value of an activation goes into the node; shapes, dtypes and weights may."""
        return node in self._free or node in self._shape

    def between(self, start: Node, ends: Iterable[Node]) -> list[Node]:
        """The nodes on a path from ``start`` to any of ``ends``, ends included, in program order.

        Empty if no value of ``start`` reaches them. What is computed from its shape alone and
        read elsewhere too, such as the size of a batch, is no part of it. Nodes above ``start`` in
        the program cannot depend on it, so the walk never leaves the lines between them. The
        answer is remembered, and nobody's to change.
        """
        ends = tuple(self.source(end) for end in ends)
        if (start, ends) not in self._between:
            self._between[start, ends] = self._find_between(start, ends)
        return self._between[start, ends]

    def _find_between(self, start: Node, ends: Sequence[Node]) -> list[Node]:
        floor, position, inputs = self.position[start], self.position, self._inputs
        seen: set[Node] = set()
        stack = list(ends)
        while stack:
            node = stack.pop()
            if node in seen or position[node] <= floor:
                continue
            seen.add(node)
            stack.extend(inputs[node])
        order = sorted(seen, key=position.__getitem__)
        path = self._reached(start, order)
        shared = self._shared(path, ends)
        while shared:
            path = self._reached(start, self._leading([n for n in path if n not in shared], ends))
            shared = self._shared(path, ends)
        carried = {start}
        for node in path:
            if not carried.isdisjoint(inputs[node]) and not self.is_number(node):
                carried.add(node)
        return path if any(end in carried for end in ends) else []

    def _reached(self, start: Node, order: Iterable[Node]) -> list[Node]:
        """Those of some nodes, in program order, that are computed from ``start``."""
        reached: set[Node] = {start}
        path = []
        for node in order:
            if not reached.isdisjoint(self._inputs[node]):
                reached.add(node)
                path.append(node)
        return path

    def _leading(self, path: list[Node], ends: Iterable[Node]) -> list[Node]:
        """Those of some nodes, in program order, that an end is computed from through them."""
        wanted = set(ends)
        for node in reversed(path):
            if node in wanted:
                wanted.update(self.inputs(node))
        return [node for node in path if node in wanted]

    def _shared(self, path: list[Node], ends: Sequence[Node]) -> set[Node]:
        """Nodes of a path that depend on its start's shape alone and are read elsewhere too."""
        inside, found = set(path), set[Node]()
        for node in path:
            if node in ends or not self.is_independent(node):
                continue
            before = (n for n in self.inputs(node) if n in inside)
            beside = ops.reads_shape_only(node) or all(n in found for n in before)
            if beside and self._is_read_outside(node, inside):
                found.add(node)
        return found

    def _is_read_outside(self, node: Node, inside: set[Node]) -> bool:
        """Whether an activation outside of a region is computed with an independent value."""
        stack, seen = [node], set[Node]()
        while stack:
            node = stack.pop()
            for user in self.users(node):
                if self.is_independent(user):
                    if user not in seen:
                        seen.add(user)
                        stack.append(user)
                elif user not in inside:
                    return True
        return False

    def private(self, region: Iterable[Node]) -> list[Node]:
        """Values that only a region reads and no activation goes into, in program order.

        Noise of a constant size, for example, and what is computed from it.
        """
        inside = set(region)
        found: set[Node] = set()
        stack = [value for node in inside for value in self.inputs(node)]
        while stack:
            node = stack.pop()
            if node in inside or node in found or not self._is_source(node):
                continue
            if all(user in inside or user in found for user in self.users(node)):
                found.add(node)
                stack.extend(self.inputs(node))
        return sorted(found, key=self.position.__getitem__)

    def _is_source(self, node: Node) -> bool:
        """Computed, but from numbers, parameters and constants alone, and not one itself."""
        if node.op in ("placeholder", "get_attr") or node in self._constant or node in self._shape:
            return False
        return node in self._free

    def cone(self, end: Node, stops: Iterable[Node]) -> list[Node]:
        """The nodes that ``end`` is computed from, itself included, back to ``stops``."""
        floor, found = set(stops), []
        stack = [end]
        while stack:
            node = stack.pop()
            if node not in floor:
                floor.add(node)
                found.append(node)
                stack.extend(self.inputs(node))
        return found

    def passengers(
        self, region: Iterable[Node], doors: set[Node]
    ) -> tuple[list[Node], Node | None]:
        """Nodes that hang off a region and go nowhere, and the first real leak.

        Dead tuple elements and ``torch._assert`` on shapes read values of a region without
        carrying any of them away. ``doors`` are the nodes allowed to read the region.

        Returns:
            the passengers in program order, and a node outside that carries a value away, if any.
        """
        inside = set(region)
        found: list[Node] = []
        stack = [u for n in region for u in self.users(n) if u not in inside and u not in doors]
        seen: set[Node] = set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if not (self.is_shape(node) or self.is_dead(node)):
                return [], node
            found.append(node)
            stack.extend(u for u in self.users(node) if u not in inside)
        return sorted(found, key=self.position.__getitem__), None

    def is_dead(self, node: Node) -> bool:
        """Nobody reads the value, and computing it has no effect."""
        selects = node.op == "call_function" and node.target is operator.getitem
        return selects and not self.users(node)

    @cached_property
    def contexts(self) -> tuple[Context, ...]:
        """The parts that run without gradients, under autocast, or in a ``vmap``."""
        return contexts(self)

    @cached_property
    def dominators(self) -> dict[Node | str, Node | str]:
        """Immediate dominators of the activations, from a common root above all inputs."""
        flow: nx.DiGraph[Node | str] = nx.DiGraph()
        flow.add_node(ROOT)
        for node in self.nodes:
            if node in self._shape or node in self._free or node in self._source:
                continue
            inputs = [n for n in self.inputs(node) if n not in self._shape and n not in self._free]
            flow.add_edges_from((n, node) for n in inputs)
            if not inputs:
                flow.add_edge(ROOT, node)
        return dict(nx.immediate_dominators(flow, ROOT))

    def common_source(self, left: Node, right: Node) -> Node | None:
        """The last value that everything in both operands flows through, if there is one."""
        idom = self.dominators
        a: Node | str = left
        b: Node | str = right
        while a != b:
            if isinstance(a, str) or isinstance(b, str):
                return None
            if self.position[a] > self.position[b]:
                a = idom.get(a, ROOT)
            else:
                b = idom.get(b, ROOT)
        return None if isinstance(a, str) else a

    def location(self, node: Node) -> Location:
        """Module path and the innermost line of the user's code."""
        return location(node)


ROOT = "<inputs>"


def lookup(root: nn.Module, target: str) -> Any:
    """The attribute a dotted ``get_attr`` target names, or None."""
    value: Any = root
    for name in target.split("."):
        value = getattr(value, name, None)
    return value


def location(node: Node) -> Location:
    """Module path and the innermost line of the user's code, as recorded while tracing."""
    stack = node.meta.get("nn_module_stack") or {}
    module = next(reversed(stack.values()))[0] if stack else ""
    frame = node.meta.get("source_line")
    return Location(module, *frame) if frame else Location(module)


def forget_examples(graph: Graph) -> None:
    """Keep shape and type of the examples in a graph, not the examples, which hold their tracer."""
    for node in graph.nodes:
        example = node.meta.pop("example_value", None)
        if isinstance(example, Tensor):
            node.meta["shape"] = tuple(map(str, example.shape))
            node.meta["dtype"] = example.dtype


@dataclass(frozen=True)
class _Reference:
    """Stands for a node in a frozen graph."""

    name: str


Frozen = tuple[tuple[str, str, Any, Any, Any, dict[str, Any]], ...]


def freeze(graph: Graph) -> Frozen:
    """A graph as a flat list; pickled as it is, a graph recurses from node to node."""

    def rows() -> Iterator[tuple[str, str, Any, Any, Any, dict[str, Any]]]:
        for node in graph.nodes:
            given: Any = map_aggregate((node.args, node.kwargs), away)
            yield node.op, node.name, packed(node.target), *given, node.meta

    def away(value: Any) -> Any:
        return _Reference(value.name) if isinstance(value, Node) else value

    return tuple(rows())


def thaw(frozen: Frozen) -> Graph:
    """The graph again, with equal node names."""
    graph = Graph()
    nodes: dict[str, Node] = {}

    def back(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _Reference) else value

    for op, name, target, args, kwargs, meta in frozen:
        given: Any = map_aggregate((args, kwargs), back)
        arguments, keywords = given
        nodes[name] = graph.create_node(op, unpacked(target), arguments, keywords, name)
        nodes[name].meta = meta
        assert nodes[name].name == name, "names are what plans and wirings speak of"
    return graph


def same_graph(left: Graph, right: Graph) -> bool:
    """Whether two graphs have equal nodes, by names, in one order."""
    if len(left.nodes) != len(right.nodes):
        return False

    def row(node: Node) -> tuple[Any, ...]:
        given: Any = map_aggregate((node.args, node.kwargs), away)
        return node.op, node.name, node.target, given

    def away(value: Any) -> Any:
        return _Reference(value.name) if isinstance(value, Node) else value

    return all(row(a) == row(b) for a, b in zip(left.nodes, right.nodes, strict=True))


def copy_graph(graph: Graph) -> Graph:
    """A copy with equal node names."""
    return copy.deepcopy(graph)
