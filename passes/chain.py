"""Group residuals into chains: each one's skip is the output of the one before.

    x0 --(+)-- x1 --(+)-- relu -- x2 --permute-- x2' --(+)-- x3 ...

What may stand between two residuals, `re2fx.tails` says. What the user did not select is left out
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
from re2fx.plan import Addition, Chain, Plan, Refusal, Residual, Weight
from re2fx.policy import Policy
from re2fx.tails import Tails

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
        activation: ``"branch"``, ``"stream"`` or ``"block"``, where the activation behind an
            addition goes.
        policy: what is rewired of that which can be.
        weigh: predicts what chains keep; None if shapes are unknown.
    """

    def weigh_runs(runs: Sequence[Run]) -> Sequence[Weight]:
        assert weigh is not None, "handed on only if there is one"
        return weigh(flow, [describe(flow, run) for run in runs])

    tails = Tails(flow, detection.matches, activation, policy.post_norm)
    runs, unselected = select(flow, detection, tails, policy)
    choice = choose(flow, runs, policy, weigh_runs if weigh else None)
    left = list(leftovers(runs, choice, tails))
    while left:
        more = choose(flow, left, policy, weigh_runs if weigh else None)
        choice.add(more)
        choice.accepted.sort(key=lambda run: flow.position[run.matches[0].add])
        left = list(leftovers(left, choice, tails)) if more.accepted else []
    refuser = Refuser(flow, detection, policy, choice)
    inside = [r for r in detection.refusals if refuser.is_inside(r)]
    refused = [*(r for r in detection.refusals if r not in inside), *unselected]
    refused += refuser.refusals(runs)
    refused.sort(key=lambda refusal: flow.position[flow.by_name[refusal.node]])
    chains = (replace(describe(flow, r), weight=choice.weights.get(r)) for r in choice.accepted)
    misses = (*detection.misses, *map(refuser.no_residual, inside))
    return Plan(tuple(chains), tuple(refused), misses)


def leftovers(runs: Sequence[Run], choice: Choice, tails: Tails) -> Iterator[Run]:
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
            own = run.tails[indices[-1]]
            whole = own.closing is not None
            behind.append(replace(own, links=()) if whole else tails.last(matches[-1], behind))
            yield Run(matches, tuple(behind))


def clash(run: Run, index: int, taken: set[Node]) -> bool:
    """Whether one residual of a run, or the links before it, is taken by another chain."""
    match, tail = run.matches[index], run.tails[index]
    links = run.tails[index - 1].links if index else ()
    bare = Run((match,), (replace(tail, links=()),))
    return not taken.isdisjoint((*links, *bare.nodes()))


def select(
    flow: Flow, detection: Detection, tails: Tails, policy: Policy
) -> tuple[list[Run], list[Refusal]]:
    """The runs of what the user selects, and a refusal for each other match."""
    runs, refusals = group(detection.matches, tails), dict[Node, Refusal]()
    if policy.select is not None:
        for match, tail in (part for run in runs for part in run.parts()):
            reason = policy.deselects(describe_residual(flow, match, tail))
            if reason is not None:
                refusals[match.add] = refuse(flow, match.add, "not selected", reason)
        runs = group([match for match in detection.matches if match.add not in refusals], tails)
    return [tails.closed(run) for run in runs], list(refusals.values())


def group(matches: list[Match], tails: Tails) -> list[Run]:
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
            for tail in tails.of(match)
            for other in by_skip.get(tail.value, ())
        ]
        length[match.add] = 1
        if options:
            best, other, tail = max(outermost(options), key=lambda option: option[0])
            following[match.add] = (other, tail)
            length[match.add] = 1 + best
    continued = {other.add for other, _ in following.values()}
    return [follow(match, following, tails) for match in matches if match.add not in continued]


def outermost(options: list[tuple[int, Match, Tail]]) -> list[tuple[int, Match, Tail]]:
    """Those of several residuals on one stream value that lie in no other's branch."""
    return [
        option
        for option in options
        if not any(option[1].add in other.region for _, other, _ in options)
    ]


def follow(match: Match, following: dict[Node, tuple[Match, Tail]], tails: Tails) -> Run:
    """The run that starts at a match."""
    matches, behind = [match], []
    while matches[-1].add in following:
        other, tail = following[matches[-1].add]
        matches.append(other)
        behind.append(tail)
    behind.append(tails.last(matches[-1], behind))
    return Run(tuple(matches), tuple(behind))


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
    if tail.closing is not None:
        return describe_block(flow, match, tail.closing)
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


def describe_block(flow: Flow, match: Match, end: Node) -> Residual:
    """A match that is a whole block, or will be one, as plain data."""
    match = replace(match, region=(*match.region, end))
    sides = [n.name for n in match.side_inputs(flow) if not flow.is_shape(n)]
    return Residual(
        add=match.add.name,
        skip=match.skip.value.name,
        branches=(end.name,),
        branch_scales=(1.0,),
        skip_scale=1.0,
        output=end.name,
        activation=None,
        dropped=(),
        side_inputs=tuple(sides),
        location=flow.location(match.add),
        block=True,
        inside=tuple(Addition(node.name, flow.location(node)) for node in match.inner),
    )


def taps(flow: Flow, run: Run) -> Iterator[Node]:
    """Stream values inside the chain that somebody besides the next residual reads."""
    for match, tail, following in zip(run.matches, run.tails, run.matches[1:], strict=False):
        own = {*following.region, *following.passengers, *following.dropped, following.add}
        own.update(node for node in (tail.output, *tail.links) if node is not None)
        ends = (tail.closing,) if tail.closing else (match.add, tail.output or match.add)
        for value in dict.fromkeys((*ends, *tail.links)):
            if any(user not in own and not flow.is_shape(user) for user in flow.users(value)):
                yield value
