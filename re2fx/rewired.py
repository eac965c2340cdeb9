"""What rewiring makes of one mode of a network."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph

from .graph import freeze, thaw
from .plan import Plan
from .wiring import Wiring

History = tuple[tuple[str, Graph], ...]


@dataclass(frozen=True)
class Rewired:
    """One mode of a network after rewiring.

    Attributes:
        graph: the two-stream program.
        plan: what was rewired and what was refused.
        wirings: where its chains lie.
        history: name and graph of each step that led to it, the captured graph first.
    """

    graph: Graph
    plan: Plan
    wirings: tuple[Wiring, ...]
    history: History = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewired:
        graph = copy.deepcopy(self.graph, memo)
        return Rewired(graph, self.plan, self.wirings, self.history)  # nobody edits the past

    def __reduce__(self) -> tuple[Any, ...]:
        history = tuple((name, freeze(graph)) for name, graph in self.history)
        return _thawed, (freeze(self.graph), self.plan, self.wirings, history)


def _thawed(graph: Any, plan: Plan, wirings: tuple[Wiring, ...], history: Any) -> Rewired:
    steps = tuple((name, thaw(frozen)) for name, frozen in history)
    return Rewired(thaw(graph), plan, wirings, steps)
