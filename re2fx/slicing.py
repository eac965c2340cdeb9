"""Which runs of nodes treat the items along a dimension one by one, and may be run slice by slice.

    t1 = linear(x)      x of (B, T, C)          for each slice of x along T:
    t2 = gelu(t1)                                   t1, t2, t3 = ..., of a few tokens
    t3 = linear(t2)                             t3 = cat of the slices' along T

Proved on the graph, by a rule for each operation: one without a rule ends a region. A region runs
as a unit, so nothing that it reads may depend on it, and what is read of it elsewhere is sliced.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from .slicing_calls import Along, Call, State, fits
from .slicing_facts import Facts as Facts
from .slicing_region import Region as Region
from .slicing_region import order as order
from .slicing_shapes import EXPANSIONS, RESHAPES, first_read, sizes
from .slicing_table import is_quiet as is_quiet
from .slicing_table import may_draw

MANY = 16  # slices, of which more make no difference
FAR = 32  # values, among which a region begins that reaches back

Start = tuple[Node, Along, int]
Answer = tuple[State | None, dict[Node, Along]]


def regions(
    graph: Graph,
    root: nn.Module,
    values: Mapping[Node, Any],
    least: int = 2,
    many: int = MANY,
) -> list[Region]:
    """Disjoint regions, in which each next one spares the most bytes of those left.

    With all of them run as units the graph still has an order, which `order` tells.

    Args:
        graph: the body of a frame; left as it is.
        root: the module its targets are looked up in.
        values: what stands for each node, fake or real.
        least: fewest items of a region.
        many: slices of which more make no difference.
    """
    facts = Facts(graph, root, values)
    found: list[Region] = []
    answers: dict[Any, Answer] = {}
    while not facts.transformed:
        region = _Search(facts, found, max(least, 2), answers).best(many)
        if region is None:
            break
        found.append(region)
    return found


def region_from(
    graph: Graph, root: nn.Module, values: Mapping[Node, Any], start: Node, dim: int
) -> Region | None:
    """The largest region that begins at one value, along one of its dimensions."""
    facts = Facts(graph, root, values)
    if facts.transformed or not facts.is_plain(start) or facts.values[start].shape[dim] < 2:
        return None
    search = _Search(facts, (), 2, {})
    return _Growth(search, (start, Along(dim, 1), facts.values[start].shape[dim])).region()


class _Search:
    """Regions of a graph in which some have been found already."""

    def __init__(
        self, facts: Facts, found: Sequence[Region], least: int, answers: dict[Any, Answer]
    ) -> None:
        self.facts, self.found, self.least, self.answers = facts, found, least, answers
        self.taken = {node for region in found for node in region.nodes}
        self.above = _ancestors(facts, found)

    def best(self, many: int) -> Region | None:
        """The one that spares most bytes in many slices; then the first, along dimension 0."""
        best: tuple[Any, Start, Region] | None = None
        for start, region in self.grow_all():
            node, along, items = start
            rank = (-_spared(region, many), self.facts.position[node], along.dim, -items)
            if (best is None or rank < best[0]) and self.has_order(region):
                best = rank, start, region
        return best and self.reaching_back(best[1], best[2])

    def has_order(self, region: Region) -> bool:
        """Whether the graph has one with a region as a unit, too."""
        return order(self.facts, [*self.found, region]) is not None

    def reaching_back(self, start: Start, region: Region) -> Region:
        """A region with what makes the slices that it reads, if that can be cut alike.

        Such as the mask of an attention, which is larger than the two rows it is computed from.
        """
        starts = [start]
        for value in [*region.sliced]:
            if value is start[0] or value not in region.sliced:
                continue
            others = (other for node in self.makers(value) for other in self.starts(node))
            for other in others:
                if other[2] != region.items:
                    continue
                grown = _Growth(self, *starts, other)
                found = grown.region() if value in grown.nodes else None
                larger = found is not None and found.bytes > region.bytes
                if found and larger and {*found.nodes} > {*region.nodes} and self.has_order(found):
                    region, starts = found, [*starts, other]
                    break
        return region

    def makers(self, value: Node) -> Sequence[Node]:
        """What a value is made from by nodes that might be in a region, from far to near."""
        facts, found = self.facts, dict[Node, None]()
        waiting = deque([value])
        while waiting and len(found) < FAR:
            node = waiting.popleft()
            if facts.rule(node) is None or node in facts.constants or node in self.taken:
                continue
            new = [maker for maker in facts.inputs[node] if maker not in found]
            found.update(dict.fromkeys(new))
            waiting.extend(new)
        return sorted(found, key=facts.position.__getitem__)

    def grow_all(self) -> Iterable[tuple[Start, Region]]:
        """From every value along every dimension, but not from inside what has grown already.

        Unless an operation was left out because of two of its operands: one of them may be read
        from outside by a region that begins later.
        """
        reached: set[tuple[Node, int]] = set()
        tried: set[Start] = set()
        for node in self.facts.nodes:
            for start in self.starts(node):
                if (node, start[1].dim) in reached:
                    continue
                waiting = deque([start])
                while waiting:
                    start = waiting.popleft()
                    if start in tried:
                        continue
                    tried.add(start)
                    grown = _Growth(self, start)
                    if not grown.nodes:
                        continue
                    region = grown.region()
                    if region is not None:
                        yield start, region
                        states = grown.states.items()
                        reached.update((n, s.dim) for n, s in states if isinstance(s, Along))
                    waiting.extend(grown.later_starts())

    def starts(self, node: Node) -> Iterable[Start]:
        """A value along each of its dimensions."""
        facts = self.facts
        if not facts.is_plain(node) or node.op == "get_attr":
            return
        for dim, size in enumerate(facts.values[node].shape):
            if size >= self.least:
                yield node, Along(dim, 1), size

    def ask(self, node: Node, items: int, states: Mapping[Node, State]) -> Answer:
        """What the rule for a node says."""
        key = (node, items, *((n, states[n]) for n in self.facts.inputs[node] if n in states))
        if key not in self.answers:
            facts, rule = self.facts, self.facts.rule(node)
            assert rule is not None
            call = Call(node, facts.module(node), facts.values, facts.constants, items, states)
            state = rule(call)
            state = state if fits(facts.values[node], state, items) else None
            self.answers[key] = state, call.more
        return self.answers[key]


def _spared(region: Region, many: int) -> float:
    """Bytes that many slices spare; few items spare less."""
    return region.bytes * (1 - 1 / min(region.items, many))


class _Growth:
    """What can be run slice by slice from one value on, or from several that are cut alike."""

    def __init__(self, search: _Search, start: Start, *others: Start) -> None:
        self.search, self.facts, self.start = search, search.facts, start
        self.items, self.starts = start[2], [node for node, *_ in (start, *others)]
        self.sliced = {node: along for node, along, _ in (start, *others)}
        self.states: dict[Node, State] = {**self.sliced}
        self.whole: set[Node] = set()
        self.nodes: dict[Node, State | None] = {}
        self.refused: list[Node] = []
        self.mask = self.above = 0
        self.grow()

    def grow(self) -> None:
        """Take in every node that can be, in program order."""
        position = self.facts.position
        heap = [position[user] for node in self.starts for user in node.users]
        heapq.heapify(heap)
        seen: set[int] = set()
        while heap:
            index = heapq.heappop(heap)
            node = self.facts.nodes[index]
            if index in seen:
                continue
            seen.add(index)
            if self.admit(node):
                for user in node.users:
                    heapq.heappush(heap, position[user])

    def admit(self, node: Node) -> bool:
        """Take a node in, if it can be."""
        facts = self.facts
        if facts.rule(node) is None or node in facts.constants or node in self.search.taken:
            return False
        read = self.read(node)
        if not all(self.can_read(value, node) for value in read):
            return False
        if not facts.writes_own(node, self.nodes):
            return False
        state, more = self.search.ask(node, self.items, self.states)
        if isinstance(state, Along) and not facts.is_plain(node):
            return False
        dead = state is None and facts.name(node) == "getitem" and not node.users
        if state is None and not (dead and read[0] in self.nodes):
            inside = [value for value in read if value in self.states]
            self.refused += [node] if len(inside) > 1 else []
            return False
        whole = [v for v in read if v not in self.states and v not in more]
        if not self.agrees(whole, more):
            return False
        if not self.stays_convex(node):
            self.refused.append(node)
            return False
        self.nodes[node] = state
        if state is not None:
            self.states[node] = state
        self.states.update(more)
        self.sliced.update(more)
        self.whole.update(whole)
        return True

    def read(self, node: Node) -> list[Node]:
        """The values that a node reads in the region's graph."""
        if self.facts.name(node) in RESHAPES | EXPANSIONS:
            return [first_read(node)]
        return self.facts.inputs[node]

    def can_read(self, value: Node, node: Node) -> bool:
        """Whether a value is known, and from outside a tensor that stays what it is."""
        if value in self.nodes:
            plain = isinstance(self.states.get(value), Along) and self.facts.is_plain(value)
            return plain or self.facts.name(node) == "getitem"
        return self.facts.is_plain(value) and not self.facts.written_after(value, node)

    def agrees(self, whole: Iterable[Node], more: Mapping[Node, Along]) -> bool:
        """Whether what is read from outside is read in one way everywhere."""
        return not any(value in self.whole for value in more) and not any(
            value in self.sliced for value in whole
        )

    def stays_convex(self, node: Node) -> bool:
        """Whether nothing between the region and a node, in either direction, is outside."""
        facts, above = self.facts, 0
        for value in facts.before[node]:
            if value not in self.nodes and value not in facts.constants:
                above |= self.search.above[value] | 1 << facts.position[value]
        bit = 1 << facts.position[node]
        if above & (self.mask | bit) or self.above & bit:
            return False
        self.mask |= bit
        self.above |= above
        return True

    def later_starts(self) -> Iterable[Start]:
        """Values inside that a refused node is computed from."""
        if not self.refused:
            return
        wanted = 0
        for node in self.refused:
            wanted |= self.search.above[node]
        for node, state in self.nodes.items():
            if isinstance(state, Along) and wanted >> self.facts.position[node] & 1:
                if state.outer == 1:
                    yield node, state, self.items
                yield node, Along(state.dim, 1), self.facts.values[node].shape[state.dim]

    # what becomes of it

    def region(self) -> Region | None:
        """What has grown, without what gives nothing that can be read outside."""
        nodes = self.trimmed()
        numbers = self.numbers(nodes)
        outputs = self.outputs(nodes, numbers)
        if not outputs or any(self.facts.shared(value, nodes) for value in outputs):
            return None
        read = dict.fromkeys(v for n in nodes for v in self.read(n) if v not in nodes)
        parts = sorted((v for v in read if v in self.sliced), key=self.place)
        whole = [v for v in read if v not in parts and v.op != "get_attr"]
        size = self.facts.made(nodes, [*read, *outputs])
        if not size:
            return None
        drawing = (n for n in self.nodes if n in nodes and may_draw(self.facts.module(n)))
        return Region(
            nodes=tuple(sorted((*nodes, *numbers), key=self.place)),
            sliced={value: _pair(self.sliced[value]) for value in parts},
            whole=tuple(sorted(whole, key=self.place)),
            outputs={value: _pair(state) for value, state in outputs.items()},
            items=self.items,
            quiet=tuple(dict.fromkeys(str(n.target) for n in drawing)),
            bytes=size,
            constants=self.facts.constants,
            forms=self.forms(nodes),
        )

    def place(self, node: Node) -> int:
        """The position of a node; the start comes first."""
        return -1 if node is self.start[0] else self.facts.position[node]

    def trimmed(self) -> set[Node]:
        """The nodes without views at the end, and without values that cannot be laid together."""
        nodes = set(self.nodes)
        for node in reversed(self.nodes):
            ends = not any(user in nodes for user in node.users)
            if ends and node.users and self.facts.views(node):
                nodes.discard(node)
        while True:
            read = (n for n in self.nodes if n in nodes and not nodes.issuperset(n.users))
            bad = next((n for n in read if not _is_whole_row(self.nodes[n])), None)
            if bad is None:
                return nodes
            dropped = {bad}
            for node in self.nodes:
                if node in nodes and any(value in dropped for value in self.read(node)):
                    dropped.add(node)
            nodes -= dropped

    def numbers(self, nodes: set[Node]) -> set[Node]:
        """Sizes of values inside that nothing but the region reads."""
        found: set[Node] = set()
        for node in reversed(self.facts.nodes):
            if node in self.facts.constants and node not in self.search.taken:
                inside = all(user in nodes or user in found for user in node.users)
                inside &= nodes.issuperset(self.facts.inputs[node])
                if inside and self.search.above[node] & self.mask:
                    found.add(node)
        return found

    def outputs(self, nodes: set[Node], numbers: set[Node]) -> dict[Node, Along]:
        """Values that are read outside."""
        own = nodes | numbers
        found: dict[Node, Along] = {}
        for node in self.nodes:
            state = self.nodes[node]
            if node in nodes and any(user not in own for user in node.users):
                assert isinstance(state, Along)
                found[node] = state
        return found

    def forms(self, nodes: set[Node]) -> dict[Node, Any]:
        """The calls with sizes, as they are written for any number of items."""
        facts = self.facts
        forms = {n: sizes(facts.name(n), facts.values[n], self.nodes[n]) for n in nodes}
        return {node: form for node, form in forms.items() if form is not None}


def _is_whole_row(state: State | None) -> bool:
    """Whether the slices of a value, one after another, are the value."""
    return isinstance(state, Along) and state.outer == 1


def _pair(along: Along) -> tuple[int, int]:
    return along.dim, along.factor


def _ancestors(facts: Facts, found: Sequence[Region]) -> dict[Node, int]:
    """For each node the positions of those that run before it, with regions as units."""
    above: dict[Node, int] = {}
    items = order(facts, found)
    assert items is not None, "regions that are found together have an order"
    for item in items:
        nodes = item.nodes if isinstance(item, Region) else (item,)
        numbers: Mapping[Node, Any] = facts.constants if isinstance(item, Region) else {}
        mask = 0
        for node in nodes:
            mask |= 1 << facts.position[node] if len(nodes) > 1 else 0
            for value in facts.before[node]:
                if value not in nodes and value not in numbers:
                    mask |= above[value] | 1 << facts.position[value]
        above.update(dict.fromkeys(nodes, mask))
    return above
