"""Which values of a graph may share memory, and which in-place writes later reads can see."""

from __future__ import annotations

from torch.fx import Node

from . import ops
from .graph import Flow


class Aliases:
    """Which values may share memory, and which in-place writes are seen by later reads.

    Union-find over the operations that may return a view of an input; one pass over the graph.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._parent: dict[Node, Node] = {}
        self._members: dict[Node, list[Node]] = {}
        self._dirty: dict[Node, Node] = {}
        self._writes: dict[Node, list[Node]] = {}
        for node in flow.nodes:
            self._members[node] = [node]
            if flow.is_number(node) or not ops.may_alias(node, flow.root):
                continue
            # An in-place operation returns its first argument, a view may be one of any.
            count = 1 if ops.is_inplace(node, flow.root) else None
            for value in flow.inputs(node)[:count]:
                if not flow.is_number(value):
                    self._join(node, value)
        for node in flow.nodes:
            writes = ops.is_inplace(node, flow.root) and not flow.is_number(node)
            if writes and flow.inputs(node):
                self._inspect(node)

    def _find(self, node: Node) -> Node:
        while node in self._parent:
            node = self._parent[node]
        return node

    def _join(self, left: Node, right: Node) -> None:
        a, b = self._find(left), self._find(right)
        if a is b:
            return
        if len(self._members[a]) < len(self._members[b]):
            a, b = b, a
        self._parent[b] = a
        self._members[a] += self._members.pop(b)

    def _inspect(self, write: Node) -> None:
        """Record the write if a value made before it is read after it."""
        flow, when = self._flow, self._flow.position[write]
        self._writes.setdefault(self._find(write), []).append(write)
        for node in self.of(write):
            if flow.position[node] >= when or node.op == "get_attr":
                continue
            if any(flow.position[user] > when for user in flow.users(node)):
                self._dirty.setdefault(self._find(write), write)

    def of(self, node: Node) -> list[Node]:
        """All values that may share memory with a value, itself included."""
        return self._members[self._find(node)]

    def after(self, node: Node, write: Node) -> bool:
        """Whether a value was made by, or after, a write."""
        return self._flow.position[node] >= self._flow.position[write]

    def dirty_write(self, node: Node) -> Node | None:
        """An in-place write that a later read of the same memory sees, if any."""
        return self._dirty.get(self._find(node))

    def write_after(self, node: Node, when: Node) -> Node | None:
        """An in-place write into the memory of a value, later in the program than ``when``."""
        position = self._flow.position
        writes = self._writes.get(self._find(node), ())
        return next((write for write in writes if position[write] > position[when]), None)

    def functional(self, write: Node) -> bool:
        """Whether an in-place operation may as well be written out of place."""
        owned = all(n.op not in ("placeholder", "get_attr") for n in self.of(write))
        return owned and self.dirty_write(write) is None
