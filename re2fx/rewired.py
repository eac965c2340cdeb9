"""What rewiring makes of one mode of a network."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Graph

from .coupling import Coupling, Readout
from .exact import FixedPoint
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
        couplings: per chain how its streams combine.
        readout, activation: as it was rewired.
        point: the numbers of its streams, if they are fixed-point ones.
    """

    graph: Graph
    plan: Plan
    wirings: tuple[Wiring, ...]
    history: History = ()
    couplings: tuple[Coupling, ...] = ()
    readout: Readout = "mean"
    activation: str = "branch"
    point: FixedPoint | None = None

    @property
    def swaps(self) -> bool:
        """Whether another coupling changes nothing but the coefficients of the blocks."""
        return self.readout == "mean"

    @property
    def normalized(self) -> Graph:
        """The graph that the plan speaks of."""
        return dict(self.history)["normalized"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewired:
        graph = copy.deepcopy(self.graph, memo)
        return replace(self, graph=graph)  # nobody edits the past

    def __reduce__(self) -> tuple[Any, ...]:
        history = tuple((name, freeze(graph)) for name, graph in self.history)
        others = {k: v for k, v in vars(self).items() if k not in ("graph", "history")}
        return _thawed, (freeze(self.graph), history, others)


def _thawed(graph: Any, history: Any, others: dict[str, Any]) -> Rewired:
    steps = tuple((name, thaw(frozen)) for name, frozen in history)
    return Rewired(thaw(graph), history=steps, **others)
