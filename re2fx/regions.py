"""One compiled artifact per distinct piece of a network.

The blocks of a deep network are copies of a few structures. Parameters, buffers and side inputs
become arguments, so that all blocks of one structure and width call the same compiled function and
the time to compile does not grow with depth. (Each width has its own, because Dynamo gives up on a
function that it has to compile for too many.) The forward and the rerun call the very same function
too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .codegen import compile_graph

Function = Callable[..., Any]


class Regions:
    """Makes functions of outlined graphs, and shares what is equal.

    Args:
        root: holds the members that the graphs read.
        wrap: compiles a Python function.
    """

    def __init__(self, root: nn.Module, wrap: Callable[[Function], Function]) -> None:
        self._root, self._wrap = root, wrap
        self._functions: dict[str, Function] = {}

    def __len__(self) -> int:
        return len(self._functions)

    def compile(self, graph: Graph, name: str) -> Function:
        """A function ``(root, *placeholders)`` like `compile_graph`'s, compiled."""
        if not any(node.op == "call_function" or node.op == "call_method" for node in graph.nodes):
            return compile_graph(graph, name)
        pure, members = self._with_members_as_inputs(graph)
        sizes = [tuple(getattr(self._root, member).shape) for member in members]
        key = f"{structure(pure)}\n{sizes}"
        if key not in self._functions:
            self._functions[key] = self._wrap(compile_graph(pure, name))
        function = self._functions[key]

        def call(root: Any, *inputs: Any) -> Any:
            return function(None, *[getattr(root, member) for member in members], *inputs)

        return call

    def _with_members_as_inputs(self, graph: Graph) -> tuple[Graph, list[str]]:
        """A copy in which tensors on the root come in front of the other inputs."""
        new, copies = Graph(), {}
        members: dict[str, Node] = {}
        for node in graph.nodes:
            target = str(node.target)
            if node.op == "get_attr" and not isinstance(getattr(self._root, target), nn.Module):
                if target not in members:
                    members[target] = new.placeholder(target)
                copies[node] = members[target]
        for node in graph.nodes:
            if node not in copies:
                copies[node] = new.node_copy(node, copies.__getitem__)
        return new, list(members)


def structure(graph: Graph) -> str:
    """A text that is equal for graphs that compute the same of their inputs."""
    number = {node: index for index, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        target = "" if node.op in ("placeholder", "output") else node.target
        if callable(target):
            target = f"{getattr(target, '__qualname__', target)}@{id(target)}"
        args = map_arg((node.args, node.kwargs), lambda n: _Numbered(number[n]))  # type: ignore
        lines.append(f"{node.op} {target} {args!r}")
    return "\n".join(lines)


class _Numbered:
    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"%{self.index}"
