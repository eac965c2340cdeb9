"""What the nodes of a graph come to, for inputs of given shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from .foresight import Forecast
from .interpret import LiveInterpreter


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
            self.values[n.name] = pytree.tree_map_only(torch.Tensor, _on_meta, value)
        return value


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():  # a fake one would hold its mode, and cannot be pickled
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return made.requires_grad_(tensor.requires_grad and tensor.is_floating_point())
