"""What the nodes of a graph come to, for inputs of given shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph

from .foresight import Forecast
from .interpret import Reader


def example_values(
    graph: Graph, root: Any, given: Sequence[Any], forecast: Forecast
) -> dict[str, Any]:
    """What the nodes of a graph come to, by their names, on ``meta``."""
    reader = Reader(root, graph)
    with forecast.running():
        reader.run(*given)
    return reader.values
