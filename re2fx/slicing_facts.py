"""What is known of a graph before any slicing of it is tried."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from . import ops
from .aliases import Aliases
from .graph import Flow
from .slicing_table import Rule, called, is_plain

# Results that may be their argument's memory, which `Aliases` does not know of.
_UNSURE = {"einsum", "int", "long", "bool"}
_NUMBERS = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout)


class Facts:
    """A graph with its rules, numbers and the order of what has effects.

    Attributes:
        nodes: in program order.
        position: of each node.
        constants: numbers that come of shapes, types and devices alone.
        inputs: values that a node reads, constants left out.
        before: nodes that have to run before a node, because of values, writes or switches.
        transformed: whether a part runs in a ``vmap``, where values are not what they seem.
    """

    def __init__(self, graph: Graph, root: nn.Module, values: Mapping[Node, Any]) -> None:
        self.graph, self.root = graph, root
        self.values: dict[Node, Any] = {node: values.get(node) for node in graph.nodes}
        flow = Flow(graph, root, identities=True)
        self._aliases = Aliases(flow)
        self.nodes, self.position = flow.nodes, flow.position
        self.constants: dict[Node, Any] = {}
        for node in self.nodes:
            if self._is_constant(node):
                self.constants[node] = self.values[node]
        self.inputs = {
            node: [n for n in node.all_input_nodes if n not in self.constants]
            for node in self.nodes
        }
        self.before: dict[Node, set[Node]] = {n: set(n.all_input_nodes) for n in self.nodes}
        self._called = {node: called(node, root) for node in self.nodes}
        self._plain = {node for node in self.nodes if is_plain(self.values[node])}
        self._written: set[Any] = set()
        self.transformed = False
        for node in self.nodes:
            if ops.is_inplace(node, root) and node not in self.constants:
                self._order_write(node)
            elif ops.switches_context(node):
                self._order_switch(node)

    def _is_constant(self, node: Node) -> bool:
        tensors = {n for n in node.all_input_nodes if isinstance(self.values[n], Tensor)}
        if not all(n in self.constants or n in tensors for n in node.all_input_nodes):
            return False
        asks = ops.reads_shape_only(node) and not ops.makes_tensor(node)
        counts = bool(node.all_input_nodes) and not tensors and ops.is_number_op(node)
        return (asks or counts) and node.op.startswith("call_") and _is_number(self.values[node])

    def _order_write(self, write: Node) -> None:
        members = self._aliases.of(write)
        self._written.update(n.target for n in members if n.op == "get_attr")
        self._order(write, {*members, *(user for n in members for user in n.users)})

    def _order_switch(self, switch: Node) -> None:
        name = getattr(switch.target, "__name__", "")
        self.transformed |= "nesting" in name or "functorch" in name
        self._order(switch, {n for n in self.nodes if n.op.startswith("call_")})

    def _order(self, node: Node, others: Iterable[Node]) -> None:
        for other in others:
            if self.position[other] < self.position[node]:
                self.before[node].add(other)
            elif other is not node:
                self.before[other].add(node)

    def rule(self, node: Node) -> Rule | None:
        """The rule for a node."""
        return self._called[node][0]

    def name(self, node: Node) -> str | None:
        """What a node calls."""
        return self._called[node][1]

    def module(self, node: Node) -> nn.Module | None:
        """The module a node calls."""
        return self._called[node][2]

    def is_plain(self, node: Node) -> bool:
        """Whether a value is a tensor that can be sliced, or read whole by slices."""
        return node in self._plain and not (node.op == "get_attr" and node.target in self._written)

    def writes_own(self, node: Node, inside: Mapping[Node, Any]) -> bool:
        """Whether an in-place operation, if it is one, writes what a region made and lets go of."""
        when = self.position[node]
        return all(
            n in inside
            and self.name(n) not in _UNSURE
            and all(self.position[user] <= when for user in n.users)
            for n in self.overwritten(node)
        )

    def overwritten(self, node: Node) -> list[Node]:
        """The values made before an in-place operation, if it is one, whose memory it may write."""
        if not ops.is_inplace(node, self.root):
            return []
        return [n for n in self._aliases.of(node) if self.position[n] < self.position[node]]

    def written_after(self, value: Node, reader: Node) -> bool:
        """Whether a value is overwritten once a node has read it."""
        return self._aliases.write_after(value, reader) is not None

    def shared(self, value: Node, others: Iterable[Node]) -> bool:
        """Whether a value may share memory with one of some others and is overwritten."""
        others = set(others) - {value}
        members = self._aliases.of(value)
        return self.written_after(value, value) and any(n in others for n in members)

    def views(self, node: Node) -> bool:
        """Whether a node only gives memory of its inputs another shape."""
        if ops.is_inplace(node, self.root) or not ops.may_alias(node, self.root):
            return False
        own = {key for key, _ in storages(self.values[node])}
        return own <= {key for n in self.inputs[node] for key, _ in storages(self.values[n])}

    def made(self, nodes: Iterable[Node], others: Iterable[Node]) -> int:
        """Bytes of the memory that nodes make, but not that of some other values."""
        taken = {key for node in others for key, _ in storages(self.values[node])}
        found: dict[int, int] = {}
        hidden = 0
        for node in nodes:
            found.update(storages(self.values[node]))
            if isinstance(inner := self.module(node), nn.MultiheadAttention):
                hidden += _inside_attention(inner, self.values[node])
        return hidden + sum(size for key, size in found.items() if key not in taken)


def storages(value: Any) -> Iterator[tuple[int, int]]:
    """The memory of the tensors in a value: what tells it apart, and its size."""
    if isinstance(value, Tensor) and value.layout is torch.strided:
        storage = value.untyped_storage()
        yield storage._cdata, min(storage.nbytes(), value.numel() * value.element_size())
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from storages(part)


def _inside_attention(inner: nn.MultiheadAttention, value: Any) -> int:
    """Bytes of queries, keys, values, what they attend to, and the weights if they are told."""
    out, weights = value
    heads = 0 if weights is None else inner.num_heads * weights.numel() // len(weights)
    seen = 0 if weights is None else heads * len(weights) * weights.element_size()
    return int(4 * out.numel() * out.element_size() + seen)


def _is_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_number, value))
    return type(value) in _NUMBERS
