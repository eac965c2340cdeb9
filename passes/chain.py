"""Group residuals into chains: each one's skip is the output of the one before.

    x0 --(+)-- x1 --(+)-- relu -- x2 --permute-- x2' --(+)-- x3 ...

Between two residuals may stand one activation (post-activation networks), a multiplication by a
constant, and shape-only operations that can be undone. What the user did not select is left out
first. What lies inside the branch of a rewired residual stays inside it; `re2fx.choice` says which
of nested chains that is. Fills the plan; changes no graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from torch.fx import Node

from re2fx import ops
from re2fx.choice import Choice, Refuser, Weigh, choose
from re2fx.graph import Flow
from re2fx.match import Detection, Match, Run, Tail, refuse
from re2fx.plan import Chain, Plan, Refusal, Residual, Weight
from re2fx.policy import Policy

ALL = Policy()


def chain(
    flow: Flow,
    detection: Detection,
    activation: str = "branch",
    policy: Policy = ALL,
    weigh: Weigh | None = None,
) -> Plan:
    """Make the plan.

    Args:
        flow: the dataflow of the normalised graph.
        detection: what was found in it.
        activation: ``"branch"`` or ``"stream"``, where the activation behind an addition goes.
        policy: what is rewired of that which can be.
        weigh: predicts what chains keep; None if shapes are unknown.
    """

    def weigh_runs(runs: Sequence[Run]) -> Sequence[Weight]:
        assert weigh is not None, "handed on only if there is one"
        return weigh(flow, [describe(flow, run) for run in runs])

    runs, unselected = select(flow, detection, activation, policy)
    choice = choose(flow, runs, policy, weigh_runs if weigh else None)
    left = list(leftovers(flow, runs, choice, activation))
    while left:
        more = choose(flow, left, policy, weigh_runs if weigh else None)
        choice.add(more)
        choice.accepted.sort(key=lambda run: flow.position[run.matches[0].add])
        left = list(leftovers(flow, left, choice, activation)) if more.accepted else []
    refuser = Refuser(flow, detection, policy, choice)
    inside = [r for r in detection.refusals if refuser.is_inside(r)]
    refused = [*(r for r in detection.refusals if r not in inside), *unselected]
    refused += refuser.refusals(runs)
    refused.sort(key=lambda refusal: flow.position[flow.by_name[refusal.node]])
    chains = (replace(describe(flow, r), weight=choice.weights.get(r)) for r in choice.accepted)
    misses = (*detection.misses, *map(refuser.no_residual, inside))
    return Plan(tuple(chains), tuple(refused), misses)


def leftovers(flow: Flow, runs: Sequence[Run], choice: Choice, activation: str) -> Iterator[Run]:
    """What is left of runs without the residuals that chosen chains have taken."""
    taken = {node for run in choice.accepted for node in run.nodes()}
    accepted = set(choice.accepted)
    for run in runs:
        clashes = [clash(run, index, taken) for index in range(len(run))]
        if run in accepted or not any(clashes):
            continue
        for clashing, group_ in groupby(range(len(run)), key=clashes.__getitem__):
            indices = list(group_)
            if clashing or len(indices) < 2:
                continue
            matches = tuple(run.matches[index] for index in indices)
            behind = [run.tails[index] for index in indices[:-1]]
            behind.append(last_tail(flow, matches[-1], behind, activation))
            yield Run(matches, tuple(behind))


def clash(run: Run, index: int, taken: set[Node]) -> bool:
    """Whether one residual of a run, or the links before it, is taken by another chain."""
    match, tail = run.matches[index], run.tails[index]
    links = run.tails[index - 1].links if index else ()
    bare = Run((match,), (Tail(tail.value, tail.activation, tail.scaling),))
    return not taken.isdisjoint((*links, *bare.nodes()))


def select(
    flow: Flow, detection: Detection, activation: str, policy: Policy
) -> tuple[list[Run], list[Refusal]]:
    """The runs of what the user selects, and a refusal for each other match."""
    runs = group(flow, detection.matches, activation)
    if policy.select is None:
        return runs, []
    refusals: dict[Node, Refusal] = {}
    for match, tail in (part for run in runs for part in run.parts()):
        reason = policy.deselects(describe_residual(flow, match, tail))
        if reason is not None:
            refusals[match.add] = refuse(flow, match.add, "not selected", reason)
    kept = [match for match in detection.matches if match.add not in refusals]
    return group(flow, kept, activation), list(refusals.values())


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
