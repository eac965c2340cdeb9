"""Which of the possible chains are rewired: those long enough, that save enough, and, where one
lies inside the branch of another, the outer or the inner ones.

Where the inputs' shapes are known the choice between nested chains goes by the bytes saved, else
by length: the chain that spans more of the program is taken. In both cases a chain that cannot be
rewired for a reason of its own stands in nobody's way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch.fx import Node

from .errors import CaptureError, OptionError
from .graph import Flow
from .legality import obstacle
from .match import Detection, Match, Run, refuse
from .plan import Chain, Refusal, Weight
from .policy import Policy
from .text import amount, count

# Sums refused because neither operand is the skip itself.
NO_IDENTITY = ("projection", "scaled skip", "sliced skip", "type change", "fused addition")

Weigh = Callable[[Flow, Sequence[Chain]], Sequence[Weight]]  # of chains that share no node
Rivals = dict[Run, set[Run]]


@dataclass
class Choice:
    """What was chosen, and what spoke for it.

    Attributes:
        accepted: the runs that are rewired, in program order.
        weights: of the runs that were weighed.
        won: of runs chosen for those inside them, the bytes that they and those save.
        lost: of runs given up for those inside them, the bytes that they and those save.
        unweighed: why nested runs were chosen by length, if they were.
    """

    accepted: list[Run] = field(default_factory=list)
    weights: dict[Run, Weight] = field(default_factory=dict)
    won: dict[Run, tuple[int, int]] = field(default_factory=dict)
    lost: dict[Run, tuple[int, int]] = field(default_factory=dict)
    unweighed: str = ""

    def add(self, other: Choice) -> None:
        """Take over what was chosen of what this choice left."""
        self.accepted += other.accepted
        self.weights.update(other.weights)
        self.won.update(other.won)
        self.lost.update(other.lost)


def choose(
    flow: Flow,
    runs: Sequence[Run],
    policy: Policy,
    weigh: Callable[[Sequence[Run]], Sequence[Weight]] | None,
) -> Choice:
    """Choose runs that share no node.

    Args:
        flow: the dataflow of the graph.
        runs: all of them, singles included.
        policy: what a chain must come up to.
        weigh: predicts what runs keep that share no node; None if shapes are unknown.

    Raises:
        OptionError: the policy speaks of bytes, and those cannot be predicted.
    """
    choice = Choice()
    eligible = sorted(
        (run for run in runs if len(run) >= policy.min_chain),
        key=lambda run: (-run.span(flow), -len(run)),
    )
    rivals = find_rivals(eligible)
    doubtful = [run for run in eligible if rivals[run] or policy.min_saving is not None]
    if doubtful:
        weigh_all(choice, doubtful, rivals, policy, weigh)
    eligible = [r for r in eligible if r not in choice.weights or policy.is_met(choice.weights[r])]
    rivals = {run: rivals[run].intersection(eligible) for run in eligible}
    chosen = by_length(eligible, rivals) if choice.unweighed else by_bytes(choice, eligible, rivals)
    choice.accepted = sorted(chosen, key=lambda run: flow.position[run.matches[0].add])
    return choice


def find_rivals(runs: Iterable[Run]) -> Rivals:
    """Per run those that it shares nodes with."""
    claims: dict[Node, list[Run]] = defaultdict(list)
    rivals: Rivals = {}
    for run in runs:
        rivals[run] = set()
        for node in set(run.nodes()):
            claims[node].append(run)
    for claimants in claims.values():
        for run in claimants if len(claimants) > 1 else ():
            rivals[run].update(other for other in claimants if other is not run)
    return rivals


def weigh_all(
    choice: Choice,
    runs: Sequence[Run],
    rivals: Rivals,
    policy: Policy,
    weigh: Callable[[Sequence[Run]], Sequence[Weight]] | None,
) -> None:
    """Weigh runs, those that share no node in one go."""
    if weigh is None:
        policy.check_shapes(None)
        choice.unweighed = "example_inputs= would let the bytes saved decide"
        return
    layers: list[list[Run]] = []
    for run in runs:
        free = (layer for layer in layers if rivals[run].isdisjoint(layer))
        layer = next(free, None)
        if layer is None:
            layers.append([run])
        else:
            layer.append(run)
    try:
        for layer in layers:
            choice.weights.update(zip(layer, weigh(layer), strict=True))
    except CaptureError as error:
        if policy.min_saving is not None:
            raise OptionError(
                f"min_saving={policy.min_saving!r}: what the chains save cannot be predicted. "
                f"{error} Leave min_saving out, or choose chains with select=."
            ) from error
        choice.weights.clear()
        choice.unweighed = f"the bytes saved cannot be predicted: {error}"


def by_length(runs: Sequence[Run], rivals: Rivals) -> set[Run]:
    """The longest first, and of the others what is left."""
    chosen: set[Run] = set()
    for run in runs:
        if rivals[run].isdisjoint(chosen):
            chosen.add(run)
    return chosen


def by_bytes(choice: Choice, runs: Sequence[Run], rivals: Rivals) -> set[Run]:
    """From the innermost outwards, a run instead of those it excludes if it saves as much.

    Of runs that lie inside one another this finds the choice that saves most in all.
    """
    chosen: set[Run] = set()
    for run in reversed(runs):
        beaten = rivals[run] & chosen
        if beaten:
            own = choice.weights[run].saving
            others = sum(choice.weights[rival].saving for rival in beaten)
            if own < others:
                choice.lost[run] = (own, others)
                continue
            choice.won[run] = (own, others)
        chosen = (chosen - beaten) | {run}
    # What lost against a run that lost itself.
    return chosen | by_length([run for run in runs if rivals[run].isdisjoint(chosen)], rivals)


@dataclass(frozen=True)
class Refuser:
    """Says of every run that was not chosen why.

    Args:
        flow: the dataflow of the graph.
        detection: what was found in it.
        policy: what a chain must come up to.
        choice: what was chosen.
    """

    flow: Flow
    detection: Detection
    policy: Policy
    choice: Choice

    def refusals(self, runs: Iterable[Run]) -> Iterator[Refusal]:
        """One per match of the runs that are not rewired."""
        chosen = {match.add for run in self.choice.accepted for match in run.matches}
        for run in runs:
            for match in run.matches:
                if match.add not in chosen:
                    yield self.refusal(run, match)

    @cached_property
    def owner(self) -> dict[Node, tuple[Match, Run]]:
        """Per node the residual that is rewired with it, and its chain."""
        owner: dict[Node, tuple[Match, Run]] = {}
        for run in self.choice.accepted:
            for match, tail in run.parts():
                owned = Run((match,), (tail,)).nodes()
                owner.update(dict.fromkeys(owned, (match, run)))
        return owner

    def is_inside(self, refusal: Refusal) -> bool:
        """Whether a sum without a skip lies in a rewired branch: a modulation, a mixture."""
        return refusal.rule in NO_IDENTITY and self.flow.by_name[refusal.node] in self.owner

    def no_residual(self, refusal: Refusal) -> Refusal:
        """What such a sum is."""
        node = self.flow.by_name[refusal.node]
        match, run = self.owner[node]
        return self.inside(node, match, run, False)

    def refusal(self, run: Run, match: Match) -> Refusal:
        """Why a match is left alone."""
        flow, policy, owner = self.flow, self.policy, self.owner
        if match.add in owner:
            return self.inside(match.add, *owner[match.add], len(run) >= policy.min_chain)
        if len(run) == 1:
            return single(flow, match, self.detection, policy)
        if len(run) < policy.min_chain:
            sentence = (
                f"its chain has {count(len(run), 'residual')}, fewer than "
                f"min_chain={policy.min_chain} asks for"
            )
            return refuse(flow, match.add, "short chain", sentence)
        weight = self.choice.weights.get(run)
        if weight is not None and not policy.is_met(weight):
            sentence = policy.shortfall(weight, len(run))
            return refuse(flow, match.add, "small saving", sentence)
        return self.around(run, match)

    def inside(self, add: Node, outer: Match, winner: Run, was_choice: bool) -> Refusal:
        """Refuse what lies inside a chain that was chosen."""
        where = self.flow.location(outer.add)
        reason = ""
        if was_choice and winner in self.choice.won:
            saved, given_up = (amount(size) for size in self.choice.won[winner])
            reason = (
                f"; that chain saves {saved} for the backward, and those inside it would save "
                f"{given_up}"
            )
        elif was_choice and self.choice.unweighed:
            reason = f" because it is longer; {self.choice.unweighed}"
        sentence = (
            f"it lies inside the branch of {outer.add.name} ({where}), which is rewired as a "
            f"whole{reason}"
        )
        return refuse(self.flow, add, "nested", sentence)

    def around(self, run: Run, match: Match) -> Refusal:
        """Refuse what shares nodes with a chain that was chosen, most often around it."""
        nodes = (*match.region, *run.nodes())
        inner, _ = next(self.owner[node] for node in nodes if node in self.owner)
        if self.owner.keys().isdisjoint((*match.region, match.add)):
            sentence = (
                f"its stream goes on inside the branch of {inner.add.name} "
                f"({self.flow.location(inner.add)}), which is rewired as a whole"
            )
            return refuse(self.flow, match.add, "chain of one", sentence)
        reason = ""
        if run in self.choice.lost:
            given_up, saved = (amount(size) for size in self.choice.lost[run])
            reason = (
                f"; what is rewired there saves {saved} for the backward, and this chain of "
                f"{len(run)} would save {given_up}"
            )
        elif self.choice.unweighed:
            reason = f" because it is longer; {self.choice.unweighed}"
        sentence = (
            f"a chain with {inner.add.name} ({self.flow.location(inner.add)}) inside its branch "
            f"is rewired{reason}"
        )
        return refuse(self.flow, match.add, "nested", sentence)


def single(flow: Flow, match: Match, detection: Detection, policy: Policy) -> Refusal:
    """Refuse a chain of one, and say what ends it."""
    adds = {other.add for other in detection.matches}
    skips = {other.skip.value for other in detection.matches}
    readers = [user for user in flow.users(match.add) if not flow.is_shape(user)]
    between = [reader for reader in readers if reader in skips]
    if any(value in adds for value in flow.inputs(match.skip.value)):
        between.append(match.skip.value)
    refusal = obstacle(flow, match, between)
    if refusal is not None:
        return refusal
    names = ", ".join(reader.name for reader in readers[:3]) or "the output"
    other = "other selected residual" if policy.select is not None else "other residual"
    sentence = f"no {other} continues its stream (next: {names}), so rewiring would save nothing"
    return refuse(flow, match.add, "chain of one", sentence)
