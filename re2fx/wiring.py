"""Where the parts of each chain lie in a rewired graph: names again, never nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .coupling import Coupling
from .plan import Location

# Relative error that a reconstructed state may have unless something else is said.
DRIFT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Block:
    """One residual in the rewired graph: ``output = coupling.step(current, previous, branch)``.

    Attributes:
        current: name of the stream state the branch reads, ``p_i``.
        previous: name of the state before, ``p_{i-1}``.
        branch: name of the branch's result.
        output: name of ``p_{i+1}``.
        coupling: the effective coefficients, constant scales of the residual folded in.
        location: the addition in the user's code.
    """

    current: str
    previous: str
    branch: str
    output: str
    coupling: Coupling
    location: Location


@dataclass(frozen=True)
class Link:
    """Shape-only operations between two blocks, applied to both streams.

    Attributes:
        current, previous: names of the states before.
        currents, previouses: names of the states after each operation.
    """

    current: str
    previous: str
    currents: tuple[str, ...]
    previouses: tuple[str, ...]


@dataclass(frozen=True)
class Wiring:
    """One chain in the rewired graph.

    Attributes:
        entry: name of its input.
        steps: blocks and links in order.
        before: name of the state before its input, if the chain goes on from another graph.
        tolerance: relative error that a reconstructed state may have; see `re2fx.conditioning`.
    """

    entry: str
    steps: tuple[Block | Link, ...]
    before: str | None = None
    tolerance: float = DRIFT_TOLERANCE

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The residuals, links left out."""
        return tuple(step for step in self.steps if isinstance(step, Block))

    def recoupled(self, couplings: Sequence[Coupling]) -> Wiring:
        """The same chain with other coefficients, one per block.

        The names stay, those of the graph as it is; another one may be spelled with other nodes.
        """
        following = iter(couplings)
        steps = (
            replace(step, coupling=next(following)) if isinstance(step, Block) else step
            for step in self.steps
        )
        return replace(self, steps=tuple(steps))
