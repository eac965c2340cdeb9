"""What of a program may be run again from its inputs, and where to cut it.

Frames for the nodes outside the chains are cut where little crosses and much has been made since
the last cut, so that what one of them needs while it is run again stays small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from . import ops
from .aliases import Aliases
from .body import Body, Fixed
from .expand import expand
from .graph import Flow
from .partition import NARROW, Compile, partition
from .sizes import nbytes
from .slicing import Region, regions

CHEAP = 8  # a region makes at least this part of the bytes of the largest
DEAR = 2  # and this one, if that is run once more


class Framing:
    """Makes frames of the parts of a rewired graph.

    Args:
        values: example values by the names of the graph's nodes; meta tensors do.
        root: the module that targets are looked up in.
    """

    def __init__(self, values: Mapping[str, Any], root: nn.Module) -> None:
        self.values, self.root = values, root
        members = (*root.parameters(), *root.buffers())
        self.device = next((tensor.device for tensor in members), torch.device("cpu"))

    def value(self, node: Node) -> Any:
        """The example value of a node, or of its copy in another graph."""
        return self.values.get(node.name)

    def split(self, nodes: Sequence[Node], aliases: Aliases) -> list[list[Node]]:
        """Ordinary nodes that run one after the other, cut where little crosses.

        Not in front of what writes to the memory of what crosses: it could not be run again.
        """
        last = {value: i for i, node in enumerate(nodes) for value in node.all_input_nodes}
        pieces: list[list[Node]] = [[]]
        made, crossing = 0, dict[Node, int]()
        for index, node in enumerate(nodes):
            pieces[-1].append(node)
            own = nbytes(self.value(node)) if node.op != "get_attr" else 0
            made += 0 if ops.may_alias(node, self.root) else own
            if last.get(node, -1) > index:
                crossing[node] = own
            crossing = {n: size for n, size in crossing.items() if last[n] > index}
            narrow = 0 < sum(crossing.values()) * NARROW <= made
            whole = narrow and len(crossing) == 1 and index + 1 < len(nodes)
            if whole and all(aliases.write_after(value, node) is None for value in crossing):
                pieces.append([])
                made = 0
        return pieces

    def body(self, graph: Graph, compile: Compile, name: str) -> Body:
        """The body that runs a frame's graph, in slices where its nodes are independent."""
        values = {node: self.value(node) for node in graph.nodes}
        inputs = [values[node] for node in graph.nodes if node.op == "placeholder"]
        if any(value is None for value in inputs):
            return partition(graph, self.root, [], values, compile, name)
        body = self._in_parts(graph, values, compile, name)
        opened = expand(graph, values, self.device)
        if opened is None:
            return body
        made = self._in_parts(*opened, compile, f"{name}, opened")
        if not made.sliced:
            return body
        return replace(made, fixed=Fixed.of(inputs, self.device), otherwise=body)

    def _in_parts(self, graph: Graph, values: dict[Node, Any], compile: Compile, name: str) -> Body:
        found = _worth_while(regions(graph, self.root, values), values)
        body = partition(graph, self.root, found, values, compile, name)
        inside = sum(region.bytes for region in found)
        return replace(body, made=max(inside, self._made(graph.nodes, values)))

    def _made(self, nodes: Iterable[Node], values: Mapping[Node, Any]) -> int:
        """Bytes of the values that share no memory with others."""
        made = (n for n in nodes if n.op not in ("get_attr", "placeholder", "output"))
        return sum(nbytes(values[n]) for n in made if not ops.may_alias(n, self.root))


def _worth_while(found: Sequence[Region], values: Mapping[Node, Any]) -> list[Region]:
    """Regions that spare more than they return, and much of what the body makes.

    One that another follows is run once more for that one's gradient, if it has a gradient itself.
    """
    chosen: list[Region] = []
    most = max((region.bytes for region in found), default=0)
    for region in sorted(found, key=lambda r: -r.bytes):
        twice = any(_feeds(a, b, values) for r in chosen for a, b in ((r, region), (region, r)))
        least = most / (DEAR if twice else CHEAP)
        returned = sum(nbytes(values[node]) for node in region.outputs)
        if region.bytes >= max(least, returned):
            chosen.append(region)
    return [region for region in found if region in chosen]


def _feeds(first: Region, second: Region, values: Mapping[Node, Any]) -> bool:
    """Whether a region with a gradient is computed from another one."""
    graded = any(_has_gradient(values[node]) for node in first.outputs)
    seen, stack = set[Node](), list(first.outputs) if graded else []
    goal = set(second.nodes)
    while stack:
        node = stack.pop()
        if node in goal:
            return True
        if node not in seen:
            seen.add(node)
            stack.extend(node.users)
    return False


def _has_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def may_run_again(flow: Flow, aliases: Aliases, nodes: Sequence[Node]) -> bool:
    """Whether nodes give the same result when they are run again from what they read.

    Not if the memory of an input is written to there or later, and not if they switch the state
    that operations run under.
    """
    if any(ops.switches_context(node) for node in nodes):
        return False
    own = set(nodes)
    first = min(flow.position[node] for node in nodes)
    before = flow.nodes[max(first - 1, 0)]
    reads = {value for node in nodes for value in node.all_input_nodes} - own
    return all(
        aliases.write_after(value, before) is None for value in reads if value.op != "get_attr"
    )
