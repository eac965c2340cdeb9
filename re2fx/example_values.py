"""What the nodes of a graph come to, for inputs of given shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, Node

from .foresight import Forecast
from .interpret import LiveInterpreter
from .sizes import on_meta


def example_values(
    graph: Graph, root: Any, given: Sequence[Any], forecast: Forecast
) -> dict[str, Any]:
    """What the nodes of a graph come to, by their names, on ``meta``."""
    reader = _Reader(root, graph)
    with forecast.running():
        reader.run(*given)
    return reader.values


class _Reader(LiveInterpreter):
    """Notes the value of every node."""

    def __init__(self, root: Any, graph: Graph) -> None:
        super().__init__(root, graph)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        """Run one and note what it comes to."""
        value = super().run_node(n)
        if n.op != "output":
            self.values[n.name] = on_meta(value)
        return value
