"""Running a graph node by node, as its generated code would run."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx import Graph, Node
from torch.fx.immutable_collections import immutable_dict, immutable_list

from .graph import lookup
from .sizes import on_meta


class LiveInterpreter(fx.Interpreter):
    """Runs a graph against a live root.

    Args:
        root: what the graph's targets are looked up on.
        graph: any graph.
    """

    def __init__(self, root: Any, graph: Graph) -> None:
        super().__init__(root, garbage_collect_values=True, graph=graph)
        self._root = root

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A node's arguments; its lists are lists again, which the called may write into."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return thawed(args), thawed(kwargs)

    def fetch_attr(self, target: str) -> Any:
        """A parameter, buffer or constant of the live root."""
        return lookup(self._root, target)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module of the live root."""
        return lookup(self._root, str(target))(*args, **kwargs)


class Reader(LiveInterpreter):
    """Notes what every node comes to, by its name, on ``meta``."""

    def __init__(self, root: Any, graph: Graph) -> None:
        super().__init__(root, graph)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        """Run one and note what it comes to."""
        value = super().run_node(n)
        if n.op != "output":
            self.values[n.name] = on_meta(value)
        return value


def thawed(value: Any) -> Any:
    """A node's argument as generated code would pass it: new lists and dicts, not frozen ones."""
    if isinstance(value, immutable_list):
        return [thawed(item) for item in value]
    if isinstance(value, immutable_dict):
        return {key: thawed(item) for key, item in value.items()}
    if type(value) is tuple:
        return tuple(thawed(item) for item in value)
    return value
