"""What rewiring makes of one mode of a network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph

from .conditioning import anchored
from .coupling import Coupling, Readout
from .couplings import effective
from .fixed_point import FixedPoint
from .graph import freeze, thaw
from .plan import Plan
from .wiring import DRIFT_TOLERANCE, Wiring

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
        tolerance: relative error that a reconstructed state may have.
        training: the mode.
    """

    graph: Graph
    plan: Plan
    wirings: tuple[Wiring, ...]
    history: History = ()
    couplings: tuple[Coupling, ...] = ()
    readout: Readout = "mean"
    activation: str = "branch"
    point: FixedPoint | None = None
    tolerance: float = DRIFT_TOLERANCE
    training: bool = True

    def swaps(self, couplings: Sequence[Coupling]) -> bool:
        """Whether other couplings change nothing but what the blocks compute and keep."""
        plain = all(c.evaluations == 1 and not c.draws for c in (*self.couplings, *couplings))
        return plain and self.readout != "sum"

    def recoupled(
        self, couplings: Sequence[Coupling]
    ) -> tuple[list[list[Coupling]], list[tuple[frozenset[torch.dtype], ...]]]:
        """Per chain what each block computes with other couplings, and where it keeps its pair."""
        found = effective(self.plan, couplings, self.point)
        own = zip(self.wirings, found, strict=True)
        return found, [anchored(wiring.recoupled(blocks)) for wiring, blocks in own]

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
