"""The plan: what was found in a graph and what will be done with it, as plain data.

A plan holds the *names* of FX nodes, never the nodes, so it can be printed, compared, pickled and
outlive every graph it speaks of. Detection fills it; everything else reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Location:
    """Where in the user's code a node comes from."""

    module: str = ""
    file: str = ""
    line: int = 0
    function: str = ""
    code: str = ""

    def __str__(self) -> str:
        if not self.file:
            return self.module or "<unknown source>"
        return f"{self.file}:{self.line}"

    def below(self, path: str) -> Location:
        """The same place seen from a model that holds this one as the submodule ``path``."""
        return replace(self, module=f"{path}.{self.module}".strip(".")) if path else self


@dataclass(frozen=True)
class Addition:
    """The skip-add of a residual inside a block of several.

    Attributes:
        name: of the addition.
        location: module path and source line of it.
    """

    name: str
    location: Location


@dataclass(frozen=True)
class Residual:
    """One skip-add, ``output = skip_scale * skip + sum(branch_scale * branch)``.

    Attributes:
        add: name of the addition.
        skip: name of the stream value that is passed on.
        branches: names of the values added to it; several for parallel branches.
        branch_scales: one constant factor per branch.
        skip_scale: constant factor of the skip.
        output: name of the value that the next residual reads: the addition itself, the
            activation behind it, or a multiplication by a constant.
        activation: name of the activation that follows the addition, if it belongs to the chain.
        dropped: names of nodes whose work the coupling takes over (scales, inner additions).
        side_inputs: names of values from outside that the branch reads.
        location: module path and source line of the addition.
        block: whether the branch is the whole block, from the skip through the addition to a norm
            or an activation behind it; its update is then what it gives less what it gets.
        inside: the additions of other residuals in the same block.
    """

    add: str
    skip: str
    branches: tuple[str, ...]
    branch_scales: tuple[float, ...]
    skip_scale: float
    output: str
    activation: str | None
    dropped: tuple[str, ...]
    side_inputs: tuple[str, ...]
    location: Location
    block: bool = False
    inside: tuple[Addition, ...] = ()

    @property
    def kind(self) -> str:
        """In the field's words: pre- or post-activation, and what else is about it."""
        words = ["post-activation" if self.activation else "pre-activation"]
        if self.block:
            words = ["whole block"]
        if self.inside:
            words.append(f"{len(self.inside) + 1} residuals")
        if len(self.branches) > 1:
            words.append(f"{len(self.branches)} parallel branches")
        if any(scale != 1 for scale in (self.skip_scale, *self.branch_scales)):
            words.append("scaled")
        if self.side_inputs:
            words.append("side inputs")
        return ", ".join(words)

    def below(self, path: str) -> Residual:
        """The same residual seen from a model that holds this one as the submodule ``path``."""
        if not path:
            return self
        inside = (replace(other, location=other.location.below(path)) for other in self.inside)
        return replace(self, location=self.location.below(path), inside=tuple(inside))

    @property
    def places(self) -> tuple[tuple[str, int, int], ...]:
        """Module path, line and number of branches of each of its additions, its own last.

        The number of one that is not the last in its block is 0: a layer as one block and as two
        are two networks.
        """
        own = self.location.module, self.location.line, len(self.branches)
        return (*((other.location.module, other.location.line, 0) for other in self.inside), own)


@dataclass(frozen=True)
class Weight:
    """Bytes that one chain keeps for the backward, predicted.

    Attributes:
        stored: by ordinary training.
        reversible: with its activations reconstructed.
    """

    stored: int
    reversible: int

    @property
    def saving(self) -> int:
        """What reconstructing saves; negative if it keeps more."""
        return self.stored - self.reversible


@dataclass(frozen=True)
class Chain:
    """Consecutive residuals on one stream.

    Attributes:
        residuals: in order; the skip of each is the (linked) output of the one before.
        links: before each residual, the names of the shape-only operations between it and the
            residual before; always empty for the first.
        taps: names of stream values inside the chain that are used elsewhere too.
        weight: what it keeps, where that had a part in choosing it; another size of the inputs
            makes no other chain.
        notes: what its coupling means for it, in words; written when it is rewired.
    """

    residuals: tuple[Residual, ...]
    links: tuple[tuple[str, ...], ...]
    taps: tuple[str, ...] = ()
    weight: Weight | None = field(default=None, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.residuals)

    @property
    def entry(self) -> str:
        """Name of the value that enters the chain."""
        return self.residuals[0].skip

    @property
    def output(self) -> str:
        """Name of the value that leaves the chain."""
        return self.residuals[-1].output


@dataclass(frozen=True)
class Refusal:
    """A residual that was left alone, and why.

    Attributes:
        rule: short name of the rule, such as ``"projection"``.
        node: name of the addition.
        sentence: the reason in words.
        location: module path and source line of the addition.
    """

    rule: str
    node: str
    sentence: str
    location: Location

    def below(self, path: str) -> Refusal:
        """The same refusal seen from a model that holds this one as the submodule ``path``."""
        return replace(self, location=self.location.below(path)) if path else self

    def __str__(self) -> str:
        return f"{self.node} ({self.location}): {self.rule}: {self.sentence}"


@dataclass(frozen=True)
class Plan:
    """What re2fx does with one graph.

    Attributes:
        chains: what is rewired.
        refusals: skip-adds that are left as they are.
        misses: additions that are no skip-adds, with the reason; the nearest misses first.
    """

    chains: tuple[Chain, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    misses: tuple[Refusal, ...] = field(default=(), repr=False)

    @property
    def rewired(self) -> int:
        """Number of residuals that are rewired."""
        return sum(
            1 + len(residual.inside) for chain in self.chains for residual in chain.residuals
        )

    @property
    def found(self) -> int:
        """Number of skip-adds in the graph, rewired or refused."""
        return self.rewired + len(self.refusals)

    def signature(self) -> tuple[tuple[tuple[str, int, int], ...], ...]:
        """What two graphs of one model must agree on: per chain where each residual is written.

        Module paths, lines and the number of branches, not node names: a train and an eval graph
        number their nodes differently.
        """
        return tuple(
            tuple(place for residual in chain.residuals for place in residual.places)
            for chain in self.chains
        )

    def below(self, path: str) -> Plan:
        """The same plan seen from a model that holds this one as the submodule ``path``.

        Node names stay those of the submodule's own graph.
        """
        chains = (
            replace(chain, residuals=tuple(r.below(path) for r in chain.residuals))
            for chain in self.chains
        )
        return Plan(
            tuple(chains),
            tuple(refusal.below(path) for refusal in self.refusals),
            tuple(miss.below(path) for miss in self.misses),
        )

    @classmethod
    def merged(cls, plans: Iterable[Plan]) -> Plan:
        """Several plans as one."""
        plans = list(plans)
        return cls(
            tuple(chain for plan in plans for chain in plan.chains),
            tuple(refusal for plan in plans for refusal in plan.refusals),
            tuple(miss for plan in plans for miss in plan.misses),
        )

    def __str__(self) -> str:
        from .text import render_plan

        return render_plan(self)
