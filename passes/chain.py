"""Group residuals into chains: each one's skip is the output of the one before.

    x0 --(+)-- x1 --(+)-- relu -- x2 --permute-- x2' --(+)-- x3 ...

Between two residuals may stand one activation (post-activation networks), a multiplication by a
constant, and shape-only operations that can be undone. Chains are taken outermost first; what lies
inside the branch of a rewired residual stays inside it. Fills the plan; changes no graph.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from torch.fx import Node

from re2fx import ops
from re2fx.graph import Flow
from re2fx.legality import obstacle
from re2fx.match import Detection, Match, refuse
from re2fx.plan import Chain, Plan, Refusal, Residual

# Sums refused because neither operand is the skip itself.
NO_IDENTITY = ("projection", "scaled skip", "sliced skip", "type change", "fused addition")


@dataclass(frozen=True)
class Tail:
    """What stands between an addition and the next residual's skip.

    Attributes:
        value: the last node of the tail, the next stream value.
        activation: the activation behind the addition.
        scaling: the multiplication by a constant behind the addition.
        links: shape-only operations, in order.
    """

    value: Node
    activation: Node | None = None
    scaling: Node | None = None
    links: tuple[Node, ...] = ()

    @property
    def output(self) -> Node | None:
        """What the residual itself ends with, links left out; None for the bare addition."""
        return self.activation or self.scaling


@dataclass(frozen=True)
class Run:
    """Consecutive matches, and the tail behind each."""

    matches: tuple[Match, ...]
    tails: tuple[Tail, ...]

    def nodes(self) -> Iterator[Node]:
        """Everything that belongs to the run, its entry left out."""
        for match, tail in zip(self.matches, self.tails, strict=True):
            yield from (*match.region, *match.passengers, *match.dropped, match.add, *tail.links)
            if tail.output is not None:
                yield tail.output

    def span(self, flow: Flow) -> int:
        """Length in lines of the program."""
        first, last = self.matches[0].skip.value, self.matches[-1].add
        return flow.position[last] - flow.position[first]


def chain(flow: Flow, detection: Detection, activation: str = "branch") -> Plan:
    """Make the plan.

    Args:
        flow: the dataflow of the normalised graph.
        detection: what was found in it.
        activation: ``"branch"`` or ``"stream"``, where the activation behind an addition goes.
    """
    owner: dict[Node, Match] = {}
    accepted: list[Run] = []
    refused: list[Refusal] = []
    runs = group(flow, detection.matches, activation)
    queue = [(-run.span(flow), number, run) for number, run in enumerate(runs)]
    heapq.heapify(queue)
    while queue:
        _, number, run = heapq.heappop(queue)
        clashes = [clash(run, index, owner) for index in range(len(run.matches))]
        if any(clashes):
            refused += overlapping(flow, run, clashes, owner)
            for part in stretches(flow, run, clashes, activation):
                heapq.heappush(queue, (-part.span(flow), number, part))
        elif len(run.matches) == 1:
            refused.append(single(flow, run.matches[0], detection))
        else:
            accepted.append(run)
            for match, tail in zip(run.matches, run.tails, strict=True):
                owned = Run((match,), (tail,)).nodes()
                owner.update(dict.fromkeys(owned, match))
    others, inside = outside_branches(flow, detection.refusals, owner)
    refused += others
    accepted.sort(key=lambda run: flow.position[run.matches[0].add])
    refused.sort(key=lambda refusal: flow.position[flow.by_name[refusal.node]])
    chains = tuple(describe(flow, run) for run in accepted)
    return Plan(chains, tuple(refused), (*detection.misses, *inside))


def clash(run: Run, index: int, owner: dict[Node, Match]) -> Node | None:
    """A node of one residual of a run, or of the links before it, that another chain has taken."""
    match, tail = run.matches[index], run.tails[index]
    links = run.tails[index - 1].links if index else ()
    nodes = (*links, *Run((match,), (Tail(tail.value, tail.activation, tail.scaling),)).nodes())
    return next((node for node in nodes if node in owner), None)


def stretches(flow: Flow, run: Run, clashes: list[Node | None], activation: str) -> Iterator[Run]:
    """What is left of a run without the residuals that another chain has taken."""
    for taken, group_ in groupby(range(len(clashes)), key=lambda index: clashes[index] is not None):
        indices = list(group_)
        if taken or len(indices) < 2:
            continue
        matches = tuple(run.matches[index] for index in indices)
        behind = [run.tails[index] for index in indices[:-1]]
        behind.append(last_tail(flow, matches[-1], behind, activation))
        yield Run(matches, tuple(behind))


def overlapping(
    flow: Flow, run: Run, clashes: list[Node | None], owner: dict[Node, Match]
) -> Iterator[Refusal]:
    """Refuse what another chain has taken, and a residual that is left alone between such."""
    for index, (match, node) in enumerate(zip(run.matches, clashes, strict=True)):
        if node is not None:
            yield nested(flow, match.add, owner[node], match.add in owner)
            continue
        around = [*clashes[max(index - 1, 0) : index], *clashes[index + 1 : index + 2]]
        if all(around):
            other = next(node for node in around if node is not None)
            yield refuse(
                flow,
                match.add,
                "chain of one",
                f"its stream goes on inside the branch of {owner[other].add.name} "
                f"({flow.location(owner[other].add)}), which is rewired as a whole",
            )


def outside_branches(
    flow: Flow, refusals: list[Refusal], owner: dict[Node, Match]
) -> tuple[list[Refusal], list[Refusal]]:
    """Refusals that concern a stream, and sums inside a rewired branch that are no skip-adds.

    A modulation or a mixture of two transformed values in a branch looks like a projection.
    """
    others, inside = [], []
    for refusal in refusals:
        node = flow.by_name[refusal.node]
        if refusal.rule in NO_IDENTITY and node in owner:
            inside.append(nested(flow, node, owner[node], True))
        else:
            others.append(refusal)
    return others, inside


def group(flow: Flow, matches: list[Match], activation: str) -> list[Run]:
    """Link matches into maximal runs.

    Where a stream forks, the residual that encloses the other goes on, else the longer run.
    """
    by_skip: dict[Node, list[Match]] = defaultdict(list)
    for match in matches:
        by_skip[match.skip.value].append(match)
    following: dict[Node, tuple[Match, Tail]] = {}
    length: dict[Node, int] = {}
    for match in reversed(matches):
        options = [
            (length[other.add], other, tail)
            for tail in tails(flow, match.add, activation)
            for other in by_skip.get(tail.value, ())
        ]
        length[match.add] = 1
        if options:
            best, other, tail = max(outermost(options), key=lambda option: option[0])
            following[match.add] = (other, tail)
            length[match.add] = 1 + best
    continued = {other.add for other, _ in following.values()}
    return [
        follow(flow, match, following, activation)
        for match in matches
        if match.add not in continued
    ]


def outermost(options: list[tuple[int, Match, Tail]]) -> list[tuple[int, Match, Tail]]:
    """Those of several residuals on one stream value that lie in no other's branch."""
    return [
        option
        for option in options
        if not any(option[1].add in other.region for _, other, _ in options)
    ]


def follow(
    flow: Flow, match: Match, following: dict[Node, tuple[Match, Tail]], activation: str
) -> Run:
    """The run that starts at a match."""
    matches, behind = [match], []
    while matches[-1].add in following:
        other, tail = following[matches[-1].add]
        matches.append(other)
        behind.append(tail)
    behind.append(last_tail(flow, matches[-1], behind, activation))
    return Run(tuple(matches), tuple(behind))


def last_tail(flow: Flow, match: Match, before: list[Tail], activation: str) -> Tail:
    """The last residual ends as those before it: with an activation or a scale if they do."""
    for tail in tails(flow, match.add, activation):
        if tail.links or not before:
            continue
        like = before[-1]
        if tail.activation is not None and like.activation is not None:
            return tail
        if tail.scaling is not None and like.scaling is not None:
            return tail
    return Tail(match.add)


def tails(flow: Flow, add: Node, activation: str) -> Iterator[Tail]:
    """The stream values that stand for an addition's result, nearest first."""
    readers = flow.users(add)
    starts = [Tail(add)]
    activations = [r for r in readers if ops.is_activation(r, flow.root) and activates(r, add)]
    # A second reader would see the value before the activation, which only the pre-activation
    # stream still holds.
    if activations and (len(readers) == 1 or activation == "stream"):
        starts.append(Tail(activations[0], activation=activations[0]))
    elif len(readers) == 1 and ops.constant_factor(readers[0]):
        starts.append(Tail(readers[0], scaling=readers[0]))
    for start in starts:
        yield start
        if start.activation is None or activation == "branch":
            yield from linked(flow, start)


def activates(node: Node, value: Node) -> bool:
    """Whether an activation is one of this value, and reads else only members, as ``prelu``."""
    others = [n for n in node.all_input_nodes if n is not value]
    return node.args[:1] == (value,) and all(n.op == "get_attr" for n in others)


def linked(flow: Flow, tail: Tail) -> Iterator[Tail]:
    """Tails that go on through shape-only operations."""
    for user in flow.users(tail.value):
        if ops.is_bijection(user) and user.args and flow.source(user.args[0]) is tail.value:  # type: ignore[arg-type]
            longer = Tail(user, tail.activation, tail.scaling, (*tail.links, user))
            yield longer
            yield from linked(flow, longer)


def nested(flow: Flow, add: Node, other: Match, inside: bool) -> Refusal:
    """Refuse what overlaps a chain that was taken first."""
    where = f"{other.add.name} ({flow.location(other.add)})"
    return refuse(
        flow,
        add,
        "nested",
        f"it lies inside the branch of {where}, which is rewired as a whole"
        if inside
        else f"a chain with {where} inside its branch is rewired",
    )


def single(flow: Flow, match: Match, detection: Detection) -> Refusal:
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
    return refuse(
        flow,
        match.add,
        "chain of one",
        f"no other residual continues its stream (next: {names}), so rewiring would save nothing",
    )


def describe(flow: Flow, run: Run) -> Chain:
    """A run as plain data."""
    links = ((), *(tuple(n.name for n in tail.links) for tail in run.tails[:-1]))
    residuals = tuple(
        describe_residual(flow, match, tail)
        for match, tail in zip(run.matches, run.tails, strict=True)
    )
    return Chain(residuals, links, tuple(node.name for node in taps(flow, run)))


def describe_residual(flow: Flow, match: Match, tail: Tail) -> Residual:
    """A match and what follows it as plain data."""
    factor = ops.constant_factor(tail.scaling) if tail.scaling is not None else None
    scale = factor[1] if factor is not None else 1.0
    sides = [n.name for n in match.side_inputs(flow) if not flow.is_shape(n)]
    return Residual(
        add=match.add.name,
        skip=match.skip.value.name,
        branches=tuple(term.value.name for term in match.branches),
        branch_scales=tuple(term.scale * scale for term in match.branches),
        skip_scale=match.skip.scale * scale,
        output=(tail.output or match.add).name,
        activation=tail.activation.name if tail.activation is not None else None,
        dropped=tuple(node.name for node in match.dropped),
        side_inputs=tuple(sides),
        location=flow.location(match.add),
    )


def taps(flow: Flow, run: Run) -> Iterator[Node]:
    """Stream values inside the chain that somebody besides the next residual reads."""
    for match, tail, following in zip(run.matches, run.tails, run.matches[1:], strict=False):
        own = {*following.region, *following.passengers, *following.dropped, following.add}
        own.update(node for node in (tail.output, *tail.links) if node is not None)
        for value in dict.fromkeys((match.add, tail.output or match.add, *tail.links)):
            if any(user not in own and not flow.is_shape(user) for user in flow.users(value)):
                yield value
