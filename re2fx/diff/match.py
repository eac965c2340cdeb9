"""Which node of one graph is which node of another.

Two explanations of the same pair of graphs are worked out and the cheaper one is taken::

    names       nodes of equal name, target and provenance are the same: graphs edited by hand or
                by a pass
    structure   names mean nothing (they count: inserting one addition renames all that follow);
                provenance and dataflow decide

Both then pair, always only what is unambiguous: equal provenance; equal computation upstream, and
equal use downstream (hashes of the whole cone, interned, so without collisions); neighbours of
pairs; equal neighbourhoods of a few steps (Weisfeiler and Lehman). What is left between two pairs
is aligned as a sequence. Every step is linear in nodes and edges but the last, which is bounded.

Not optimal: finding the smallest difference of two graphs is NP-hard. Ambiguous nodes are paired in
program order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from functools import partial
from itertools import chain, pairwise

from re2fx.plan import Location

from .listing import Listing, Value

Pairs = list[tuple[int, int]]
Key = Callable[[int, Value], Hashable]
Rule = Callable[[], None]
NEIGHBOURHOODS = (3, 2, 1)
LARGEST_ALIGNMENT = 40_000


def match(before: Listing, after: Listing) -> Pairs:
    """Pairs of indices of nodes that are the same, sorted by the first.

    Args:
        before: one graph.
        after: another.
    """
    if _has_provenance(before) != _has_provenance(after):
        before, after = _without_provenance(before), _without_provenance(after)
    by_name = Matcher(before, after).match(names=True)
    cost = by_name.cost()
    if cost:
        by_structure = Matcher(before, after).match(names=False)
        # Names win unless they are plainly misleading.
        if 2 * by_structure.cost() < cost:
            return by_structure.pairs()
    return by_name.pairs()


class Matcher:
    """One explanation, while it is being worked out.

    Attributes:
        sides: the two graphs.
        partner: for each node of either graph, its partner in the other.
    """

    def __init__(self, before: Listing, after: Listing) -> None:
        self.sides = (before.values, after.values)
        self.users = (before.users, after.users)
        self.partner: tuple[list[int | None], list[int | None]] = (
            [None] * len(before.values),
            [None] * len(after.values),
        )
        self._interned: dict[Hashable, int] = {}

    def match(self, names: bool) -> Matcher:
        """Pair what can be paired; the surest evidence first."""
        for rule in [*(self.by_names() if names else []), *self.by_structure(names)]:
            if not (self.free(0) and self.free(1)):
                break
            rule()
        return self

    def by_names(self) -> list[Rule]:
        """Equal names, with equal provenance."""
        return [
            lambda: self.unique(lambda _, v: (v.name, *v.label, v.scope, v.location.line)),
            lambda: self.unique(lambda _, v: (v.name, v.op, v.scope, v.location.line)),
        ]

    def by_structure(self, names: bool) -> list[Rule]:
        """Provenance, dataflow, and at last what stands at one place."""
        return [
            lambda: self.unique(lambda _, v: "output" if v.op == "output" else None),
            lambda: self.unique(_named, ordered=True),
            lambda: self.unique(_written, ordered=True),
            lambda: self.numbered(self.upstream(), ordered=True),
            lambda: self.numbered(self.downstream(), ordered=True),
            self.spread,
            *(partial(self.near, steps) for steps in NEIGHBOURHOODS),
            lambda: self.unique(lambda _, v: (v.name, v.op, v.scope) if names else None),
            lambda: self.unique(_computed),
            lambda: self.align(lambda v: (*v.label, v.scope, v.literals)),
            lambda: self.align(lambda v: (*v.label, v.scope)),
            lambda: self.unique(self.surroundings),
            lambda: self.align(lambda v: (v.scope, v.location.line) if _has_line(v) else None),
        ]

    def near(self, steps: int) -> None:
        """Pair nodes whose neighbourhood is the same, and nobody else's, and then spread."""
        self.numbered(self.neighbourhoods(steps))
        self.spread()

    def numbered(self, numbers: tuple[list[int], list[int]], ordered: bool = False) -> None:
        """Pair by numbers of the nodes of both sides."""
        self.unique(lambda side, value: numbers[side][value.index], ordered)

    def pairs(self) -> Pairs:
        """What was paired."""
        return [(i, j) for i, j in enumerate(self.partner[0]) if j is not None]

    def pair(self, i: int, j: int) -> None:
        """Two nodes are the same."""
        self.partner[0][i], self.partner[1][j] = j, i

    def free(self, side: int) -> list[Value]:
        """The nodes of one graph without a partner."""
        partner = self.partner[side]
        return [value for value in self.sides[side] if partner[value.index] is None]

    def intern(self, key: Hashable) -> int:
        """A small number for a key: equal keys, equal numbers."""
        return self._interned.setdefault(key, len(self._interned))

    def unique(self, key: Key, ordered: bool = False) -> None:
        """Pair the nodes whose key nobody shares.

        Args:
            key: of a node, given its side; None keeps it out.
            ordered: also pair those that as many nodes share on both sides, in program order.
        """
        groups: dict[Hashable, tuple[list[int], list[int]]] = {}
        for side in (0, 1):
            for value in self.free(side):
                mark = key(side, value)
                if mark is not None:
                    groups.setdefault(mark, ([], []))[side].append(value.index)
        for left, right in groups.values():
            if len(left) == len(right) and (ordered or len(left) == 1):
                for i, j in zip(left, right, strict=True):
                    self.pair(i, j)

    def upstream(self) -> tuple[list[int], list[int]]:
        """Equal numbers: the same value, computed from the same inputs in the same way."""
        numbers: tuple[list[int], list[int]] = ([], [])
        for values, found in zip(self.sides, numbers, strict=True):
            for value in values:
                inputs = tuple(found[read] for read in value.reads)
                found.append(self.intern(("up", value.label, value.literals, inputs)))
        return numbers

    def downstream(self) -> tuple[list[int], list[int]]:
        """Equal numbers: everything that is done with the value, to the very end, is the same."""
        numbers = ([0] * len(self.sides[0]), [0] * len(self.sides[1]))
        for values, users, found in zip(self.sides, self.users, numbers, strict=True):
            for value in reversed(values):
                uses = tuple(sorted((slot, found[user]) for user, slot in users[value.index]))
                found[value.index] = self.intern(("down", value.label, value.literals, uses))
        return numbers

    def neighbourhoods(self, steps: int) -> tuple[list[int], list[int]]:
        """Equal numbers: the same neighbours as far as so many steps up and down."""
        numbers: list[list[int]] = []
        for values, users in zip(self.sides, self.users, strict=True):
            found = [self.intern((v.label, v.literals)) for v in values]
            for _ in range(steps):
                found = [
                    self.intern(
                        (
                            found[v.index],
                            tuple(found[read] for read in v.reads),
                            tuple(sorted((slot, found[user]) for user, slot in users[v.index])),
                        )
                    )
                    for v in values
                ]
            numbers.append(found)
        return numbers[0], numbers[1]

    def spread(self) -> None:
        """Pair equal neighbours of pairs, and their neighbours, until nothing is left."""
        todo = self.pairs()
        while todo:
            i, j = todo.pop()
            for a, b in chain(self.equal_reads(i, j), self.equal_users(i, j)):
                if self.partner[0][a] is None and self.partner[1][b] is None:
                    self.pair(a, b)
                    todo.append((a, b))

    def equal_reads(self, i: int, j: int) -> Pairs:
        """What two nodes read at the same place, if it is of one kind and free."""
        before, after = self.sides
        left, right = before[i], after[j]
        if left.slots != right.slots:
            return []
        return [(a, b) for a, b in zip(left.reads, right.reads, strict=True) if self.alike(a, b)]

    def equal_users(self, i: int, j: int) -> Pairs:
        """Who reads two nodes at the same place, if it is of one kind, free, and the only one."""
        seen: dict[Hashable, tuple[list[int], list[int]]] = {}
        for side, node in ((0, i), (1, j)):
            for user, slot in self.users[side][node]:
                if self.partner[side][user] is None:
                    key = (slot, self.sides[side][user].label, self.sides[side][user].scope)
                    seen.setdefault(key, ([], []))[side].append(user)
        return [(a[0], b[0]) for a, b in seen.values() if len(a) == len(b) == 1]

    def alike(self, i: int, j: int) -> bool:
        """Whether two free nodes do the same thing in the same module."""
        left, right = self.sides[0][i], self.sides[1][j]
        is_free = self.partner[0][i] is None and self.partner[1][j] is None
        return is_free and left.label == right.label and left.scope == right.scope

    def surroundings(self, side: int, value: Value) -> Hashable:
        """The pairs around a node: another node between the same pairs is at the same place."""
        if value.op in ("placeholder", "output") or not value.reads:
            return None
        around = tuple(self.pair_of(side, read) for read in value.reads)
        users = ((self.pair_of(side, u), slot) for u, slot in self.users[side][value.index])
        below = tuple(sorted(use for use in users if use[0] >= 0))
        return (around, below) if min(around) >= 0 and below else None

    def pair_of(self, side: int, index: int) -> int:
        """A number for the pair a node belongs to, the same from both sides; -1 without one."""
        partner = self.partner[side][index]
        return -1 if partner is None else partner if side else index

    def align(self, key: Callable[[Value], Hashable]) -> None:
        """Pair what is left between two pairs as sequences of keys."""
        steps = ascending(self.pairs())
        bounds = [(-1, -1), *steps, (len(self.sides[0]), len(self.sides[1]))]
        for (i, j), (k, m) in pairwise(bounds):
            left = self.between(0, i, k, key)
            right = self.between(1, j, m, key)
            for a, b in aligned([x for x, _ in left], [x for x, _ in right]):
                self.pair(left[a][1], right[b][1])

    def between(
        self, side: int, start: int, end: int, key: Callable[[Value], Hashable]
    ) -> list[tuple[Hashable, int]]:
        """Keys and indices of the free nodes strictly between two places."""
        found = []
        for index in range(start + 1, end):
            if self.partner[side][index] is None:
                mark = key(self.sides[side][index])
                if mark is not None:
                    found.append((mark, index))
        return found

    def cost(self) -> int:
        """How many nodes and edges differ under this explanation."""
        total = sum(1 + len(v.reads) for side in (0, 1) for v in self.free(side))
        for i, j in self.pairs():
            left, right = self.sides[0][i], self.sides[1][j]
            total += (left.label, left.literals) != (right.label, right.literals)
            reads = [self.partner[0][read] for read in left.reads]
            total += sum(a != b for a, b in zip(reads, right.reads, strict=False))
            total += abs(len(reads) - len(right.reads))
        return total


def _has_provenance(graph: Listing) -> bool:
    return any(_has_line(value) or value.scope for value in graph.values)


def _without_provenance(graph: Listing) -> Listing:
    """What only one of two graphs has would set all their nodes apart."""
    values = tuple(replace(v, scope="", location=Location()) for v in graph.values)
    return Listing(graph.title, values)


def _has_line(value: Value) -> bool:
    """Whether it is known where a node was written, and it is no boundary of the graph."""
    return bool(value.location.line) and value.op not in ("placeholder", "output")


def _named(side: int, value: Value) -> Hashable:
    """Inputs and members of the model."""
    return value.label if value.op in ("placeholder", "get_attr") else None


def _written(side: int, value: Value) -> Hashable:
    """The source line in its module, for nodes that have one."""
    if not value.scope and not value.location.line:
        return None
    return value.label, value.scope, value.location.line, value.location.file, value.literals


def _computed(side: int, value: Value) -> Hashable:
    """What is done in which module: lines move when a file is edited."""
    return (value.label, value.scope) if value.scope else None


def ascending(pairs: Pairs) -> Pairs:
    """The most pairs that are in the same order on both sides (longest increasing subsequence)."""
    ends: list[int] = []
    last: list[int] = []
    before: list[int] = []
    for number, (_, j) in enumerate(pairs):
        place = bisect_left(ends, j)
        before.append(last[place - 1] if place else -1)
        if place == len(ends):
            ends.append(j)
            last.append(number)
        else:
            ends[place], last[place] = j, number
    found = []
    number = last[-1] if last else -1
    while number >= 0:
        found.append(pairs[number])
        number = before[number]
    return found[::-1]


def aligned(left: Sequence[Hashable], right: Sequence[Hashable]) -> Pairs:
    """Places of equal items in two short sequences; in order of appearance in long ones."""
    if not left or not right:
        return []
    if len(left) * len(right) <= LARGEST_ALIGNMENT:
        blocks = SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
        return [(b.a + k, b.b + k) for b in blocks for k in range(b.size)]
    places: dict[Hashable, list[int]] = {}
    for place, item in enumerate(right):
        places.setdefault(item, []).append(place)
    seen: Counter[Hashable] = Counter()
    found = []
    for place, item in enumerate(left):
        if seen[item] < len(places.get(item, ())):
            found.append((place, places[item][seen[item]]))
            seen[item] += 1
    return found
