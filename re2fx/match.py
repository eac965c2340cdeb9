"""What detection hands from pass to pass.

A match holds FX nodes and lives as long as one run of the pipeline; it ends as a `Residual` (names
only) in the plan, or as a `Refusal`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.fx import Node

from .graph import Flow
from .plan import Refusal


@dataclass(frozen=True)
class Term:
    """One operand of an addition: ``scale * value``.

    Attributes:
        value: the operand.
        scale: its constant factor.
        spelled: the multiplication that spells the factor, if it is a node of its own.
    """

    value: Node
    scale: float = 1.0
    spelled: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Match:
    """A skip-add: ``add = skip.scale * skip.value + sum(branch.scale * branch.value)``.

    Attributes:
        add: the (outermost) addition.
        skip: the operand that every branch derives from.
        branches: the others.
        inner: additions inside the sum, when it has more than two operands, or inside a block that
            is more than one residual.
        region: the nodes between the skip and the branches' ends, in program order.
        private: values that only the region reads and no activation goes into, such as noise.
        passengers: nodes that hang off the region and go nowhere.
    """

    add: Node
    skip: Term
    branches: tuple[Term, ...]
    inner: tuple[Node, ...]
    region: tuple[Node, ...]
    private: tuple[Node, ...] = ()
    passengers: tuple[Node, ...] = ()

    @property
    def dropped(self) -> tuple[Node, ...]:
        """Nodes whose work the coupling takes over."""
        spelled = tuple(node for term in (self.skip, *self.branches) for node in term.spelled)
        return (*spelled, *self.inner)

    def side_inputs(self, flow: Flow) -> list[Node]:
        """Values from outside that the region reads, constants and shapes of the skip left out."""
        inside = {self.skip.value, *self.region, *self.private}
        return list(
            dict.fromkeys(
                value
                for node in self.region
                for value in flow.inputs(node)
                if value not in inside and not flow.is_constant(value)
            )
        )


@dataclass(frozen=True)
class Tail:
    """What stands between an addition and the next residual's skip.

    Attributes:
        value: the last node of the tail, the next stream value.
        activation: the activation behind the addition.
        scaling: the multiplication by a constant behind the addition.
        links: shape-only operations, in order.
        closing: the norm or the activation behind the addition with which the block ends.
    """

    value: Node
    activation: Node | None = None
    scaling: Node | None = None
    links: tuple[Node, ...] = ()
    closing: Node | None = None

    @property
    def output(self) -> Node | None:
        """What the residual itself ends with, links left out; None for the bare addition."""
        return self.activation or self.scaling or self.closing


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive matches, and the tail behind each: what may become a chain."""

    matches: tuple[Match, ...]
    tails: tuple[Tail, ...]

    def __len__(self) -> int:
        return len(self.matches)

    def parts(self) -> Iterator[tuple[Match, Tail]]:
        """Each match with its tail."""
        return zip(self.matches, self.tails, strict=True)

    def nodes(self) -> Iterator[Node]:
        """Everything that belongs to the run, its entry left out."""
        for match, tail in self.parts():
            yield from (*match.region, *match.passengers, *match.dropped, match.add, *tail.links)
            if tail.output is not None:
                yield tail.output

    def span(self, flow: Flow) -> int:
        """Length in lines of the program."""
        first, last = self.matches[0].skip.value, self.matches[-1].add
        return flow.position[last] - flow.position[first]


def refuse(flow: Flow, node: Node, rule: str, sentence: str) -> Refusal:
    """A refusal of the addition ``node``."""
    return Refusal(rule, node.name, sentence, flow.location(node))


@dataclass
class Detection:
    """What detection found: matches that may be rewired, refusals, and what is no skip-add."""

    matches: list[Match] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    misses: list[Refusal] = field(default_factory=list)
