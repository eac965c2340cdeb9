"""What stands between an addition and the stream value that the next residual reads.

Behind an addition may come one activation, a multiplication by a constant, and shape-only
operations that can be undone. A norm, or an activation that is to stay where it is, **closes** a
block instead::

    x0 --(+)-- norm -- x1 --(+)-- norm -- x2        T_i(x) = norm(x + F_i(x))

What is coupled then is the whole block: its output for the branch's, its update ``T(x) - x`` for
the residual's. Blocks closed by norms that come in the same order again and again, such as the
attention and the MLP of a layer, are one block together: the streams move alike from layer to
layer, not from an attention to an MLP (measured, see *Decisions* in the README).
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch.fx import Node

from . import ops
from .aliases import Aliases
from .graph import Flow
from .legality import first_refusal
from .match import Match, Run, Tail, Term

REACH = 4  # skips behind an addition among which the next residual's is looked for


class Tails:
    """Finds the tails of additions in one graph.

    Args:
        flow: the dataflow of the normalised graph.
        matches: what was found in it, in program order.
        activation: ``"branch"``, ``"stream"`` or ``"block"``, where an activation goes.
        post_norm: whether a norm may close a block.
    """

    def __init__(
        self, flow: Flow, matches: Sequence[Match], activation: str, post_norm: bool
    ) -> None:
        self.flow, self.activation, self.post_norm = flow, activation, post_norm
        self._matches = {match.add: match for match in matches}
        self._skips = sorted({m.skip.value for m in matches}, key=flow.position.__getitem__)
        self._places = [flow.position[skip] for skip in self._skips]
        self._aliases: Aliases | None = None
        self._closed: dict[tuple[Node, Node], Match | None] = {}

    def of(self, match: Match) -> Iterator[Tail]:
        """The stream values that stand for an addition's result, nearest first."""
        flow, add = self.flow, match.add
        readers = flow.users(add)
        starts = [Tail(add)]
        activations = [r for r in readers if ops.is_activation(r, flow.root) and activates(r, add)]
        # A second reader would see the value before the activation, which only the pre-activation
        # stream still holds.
        if activations and (len(readers) == 1 or self.activation == "stream"):
            starts += self._activated(match, activations[0])
        elif len(readers) == 1 and ops.constant_factor(readers[0]):
            starts.append(Tail(readers[0], scaling=readers[0]))
        elif self.post_norm:
            starts += self._normed(match)
        for start in starts:
            yield start
            if start.activation is None or self.activation == "branch":
                yield from linked(flow, start)

    def last(self, match: Match, before: Sequence[Tail]) -> Tail:
        """The last residual ends as those before it: with an activation, a scale or a norm."""
        for tail in self.of(match):
            if tail.links or not before:
                continue
            like = before[-1]
            if any(
                getattr(tail, kind) is not None and getattr(like, kind) is not None
                for kind in ("activation", "scaling", "closing")
            ):
                return tail
        return Tail(match.add)

    def _activated(self, match: Match, activation: Node) -> Iterator[Tail]:
        if self.activation != "block":
            yield Tail(activation, activation=activation)
        elif self._close(match, activation) is not None:
            yield Tail(activation, closing=activation)

    def _normed(self, match: Match) -> Iterator[Tail]:
        """The block up to the next skip, or up to a norm right behind the addition."""
        flow, add = self.flow, match.add
        nearest = bisect_right(self._places, flow.position[add])
        values = self._skips[nearest : nearest + REACH]
        values += [reader for reader in flow.users(add) if ops.is_norm(reader, flow.root)]
        for value in dict.fromkeys(values):
            inside = flow.between(add, [value])
            if any(ops.is_norm(node, flow.root) for node in inside) and all(
                map(self._keeps_shape, inside)
            ):
                if self._close(match, value) is not None:
                    yield Tail(value, closing=value)
                return

    def _keeps_shape(self, node: Node) -> bool:
        """A norm, an activation, a dropout, or one of several results; or no tensor at all."""
        kinds = (ops.is_norm, ops.is_activation, ops.is_dropout)
        known = any(kind(node, self.flow.root) for kind in kinds)
        return known or self.flow.is_number(node) or node.target is operator.getitem

    def _close(self, match: Match, end: Node) -> Match | None:
        """The residual with everything up to ``end`` in its region, if it can be run again."""
        if (match.add, end) not in self._closed:
            self._closed[match.add, end] = self._find_closed(match, end)
        return self._closed[match.add, end]

    def _find_closed(self, match: Match, end: Node) -> Match | None:
        flow = self.flow
        whole = block(flow, match, match, end)
        if self._aliases is None:
            self._aliases = Aliases(flow)
        sides = [n for n in flow.inputs(end) if n not in whole.region and not flow.is_constant(n)]
        if any(self._aliases.write_after(side, match.skip.value) for side in sides):
            return None
        # Looked at from its end, which takes the addition's part.
        return None if first_refusal(flow, replace(whole, add=end), self._aliases) else whole

    def closed(self, run: Run) -> Run:
        """A run whose closed blocks hold all that is theirs, those of one layer as one."""
        pairs = [
            (match if tail.closing is None else self._whole(match, tail.closing), tail)
            for match, tail in run.parts()
        ]
        period = self._period(run)
        if period > 1:
            pairs = [pair for layer in batches(pairs, period) for pair in self._merged(layer)]
        return Run(*(tuple(part) for part in zip(*pairs, strict=True)))

    def _whole(self, match: Match, end: Node) -> Match:
        whole = self._close(match, end)
        assert whole is not None, "a tail closes what can be closed"
        return whole

    def _period(self, run: Run) -> int:
        """The number of post-norm blocks from which on they repeat; 1 if none do."""
        if not all(tail.closing and self._is_normed(m, tail) for m, tail in run.parts()):
            return 1
        kinds = [self._kind(match, tail) for match, tail in run.parts()]
        for period in range(1, len(kinds) // 2 + 1):
            if all(a == b for a, b in zip(kinds, kinds[period:], strict=False)):
                return period
        return 1

    def _kind(self, match: Match, tail: Tail) -> object:
        """What blocks of different layers have in common: the line, and the path of the norm.

        Both are the same for every route by which a model was captured.
        """
        assert tail.closing is not None
        place = self.flow.location(match.add)
        return place.file, place.line, unnumbered(self.flow.location(tail.closing).module)

    def _is_normed(self, match: Match, tail: Tail) -> bool:
        assert tail.closing is not None
        inside = self.flow.between(match.add, [tail.closing])
        return any(ops.is_norm(node, self.flow.root) for node in inside)

    def _merged(self, layer: list[tuple[Match, Tail]]) -> list[tuple[Match, Tail]]:
        """The blocks of a layer as one, if nobody reads between them."""
        (first, _), (last, tail) = layer[0], layer[-1]
        assert tail.closing is not None
        if len(layer) < 2 or any(tail.links for _, tail in layer[:-1]):
            return layer
        whole = block(self.flow, first, last, tail.closing)
        _, leak = self.flow.passengers(whole.region, {tail.closing})
        if leak is not None:
            return layer
        return [(replace(whole, inner=tuple(match.add for match, _ in layer[:-1])), tail)]


def block(flow: Flow, first: Match, last: Match, end: Node) -> Match:
    """Everything from the skip of one residual to the end behind another as one match."""
    skip = first.skip.value
    region = [node for node in flow.between(skip, [end]) if node is not end]
    private = flow.private([*region, end])
    passengers, _ = flow.passengers(region, {end})
    return Match(
        last.add, Term(skip), (Term(end),), (), tuple(region), tuple(private), tuple(passengers)
    )


def unnumbered(path: str) -> str:
    """A module's path without the numbers of the layers it lies in."""
    return ".".join("#" if part.isdigit() else part for part in path.split("."))


def batches(pairs: list[tuple[Match, Tail]], size: int) -> Iterator[list[tuple[Match, Tail]]]:
    """So many at a time."""
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def activates(node: Node, value: Node) -> bool:
    """Whether an activation is one of this value, and reads else only members, as ``prelu``."""
    others = [n for n in node.all_input_nodes if n is not value]
    return node.args[:1] == (value,) and all(n.op == "get_attr" for n in others)


def linked(flow: Flow, tail: Tail) -> Iterator[Tail]:
    """Tails that go on through shape-only operations."""
    for user in flow.users(tail.value):
        if ops.is_bijection(user) and user.args and flow.source(user.args[0]) is tail.value:  # type: ignore[arg-type]
            longer = replace(tail, value=user, links=(*tail.links, user))
            yield longer
            yield from linked(flow, longer)
