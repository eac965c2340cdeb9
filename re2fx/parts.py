"""What lies outside the chains, gathered from single modules into a few parts worth a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .footprint import Kept, PartBytes
from .tally import Place
from .text import common_path

ROWS = 12  # at the most
SMALL = 0.02  # of the largest column's bytes outside: not worth splitting
FAMILY = 8  # more modules than this in one list are one row

Leaf = tuple[str, tuple[str, ...]]  # where, and the module path


@dataclass(frozen=True)
class _Group:
    """Modules below one path."""

    where: str
    leaves: Mapping[tuple[str, ...], int]

    @property
    def path(self) -> tuple[str, ...]:
        """What their paths have in common."""
        return common_path(self.leaves)

    @property
    def size(self) -> int:
        """Bytes of all of them, in the larger column."""
        return sum(self.leaves.values())

    def split(self) -> list[_Group]:
        """One group for each child of the common path."""
        depth = len(self.path) + 1
        children: dict[tuple[str, ...], dict[tuple[str, ...], int]] = {}
        for path, size in self.leaves.items():
            children.setdefault(path[:depth], {})[path] = size
        return [_Group(self.where, leaves) for leaves in children.values()]


def part_rows(
    store: Counter[Place], checkpoint: Counter[Place] | None, reversible: Counter[Place] | None
) -> tuple[PartBytes, ...]:
    """The parts outside the chains, largest first.

    Args:
        store: bytes by place, of the network as it is.
        checkpoint: with checkpoints.
        reversible: rewired.
    """
    columns = [None if c is None else _leaves(c) for c in (store, checkpoint, reversible)]
    sizes: Counter[Leaf] = Counter()
    for column in columns:
        sizes |= column or Counter()
    rows = []
    for group in _groups(sizes):
        keys = [(group.where, path) for path in group.leaves]
        values = [None if c is None else sum(c[key] for key in keys) for c in columns]
        kept = Kept(values[0] or 0, values[1], values[2])
        rows.append(PartBytes(group.where, ".".join(group.path), kept))
    return tuple(sorted(rows, key=lambda row: row.kept.store, reverse=True))


def _leaves(column: Counter[Place]) -> Counter[Leaf]:
    """Bytes by where and module."""
    found: Counter[Leaf] = Counter()
    for place, size in column.items():
        if place.where != "chain":
            found[place.where, tuple(place.module.split(".")) if place.module else ()] += size
    return found


def _groups(sizes: Counter[Leaf]) -> list[_Group]:
    """Start from one group for each kind of place, and split the largest as long as it helps."""
    kinds: dict[str, dict[tuple[str, ...], int]] = {}
    for (where, path), size in sizes.items():
        kinds.setdefault(where, {})[path] = size
    groups = [_Group(where, leaves) for where, leaves in kinds.items()]
    done: list[_Group] = []
    worth = SMALL * sizes.total()
    while groups:
        groups.sort(key=lambda group: group.size)
        group = groups.pop()
        pieces = group.split()
        room = ROWS - len(done) - len(groups)
        if 1 < len(pieces) <= min(room, FAMILY) and group.size > worth:
            groups += pieces
        else:
            done.append(group)
    return done
