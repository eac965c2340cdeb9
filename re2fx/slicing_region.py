"""A run of nodes that treats the items along a dimension one by one, as a graph of its own."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .slicing_calls import Shape
from .slicing_facts import Facts
from .slicing_shapes import first_read, write_sized


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes that may be run slice by slice.

    Attributes:
        nodes: in graph order. Sizes of values inside that nothing else reads are among them.
        sliced: values from outside that each slice reads its part of: dimension and factor, where
            ``shape[dim] == items * factor``. Parameters and buffers may be among them.
        whole: tensors from outside that each slice reads whole; parameters and buffers that are
            read whole are attributes in the region's graph too.
        outputs: values read elsewhere, which are their slices one after another along a dimension.
        items: how many there are, in slices of any size.
        quiet: targets of modules that must not drop anything.
        bytes: of the tensors made inside and not read elsewhere, views not counted: what all items
            at once keep, and a slice of them its part of.
        constants: numbers that come of shapes.
        forms: how calls with sizes are written for any number of items.
    """

    nodes: tuple[Node, ...]
    sliced: dict[Node, tuple[int, int]]
    whole: tuple[Node, ...]
    outputs: dict[Node, tuple[int, int]]
    items: int
    quiet: tuple[str, ...]
    bytes: int
    constants: Mapping[Node, Any] = field(repr=False)
    forms: Mapping[Node, tuple[str, Shape]] = field(repr=False)

    def graph(self) -> Graph:
        """Of any number of items: ``(*sliced, *whole) -> outputs``, with the names of nodes."""
        graph, copies = Graph(), dict[Node, Node]()
        for value in (*self.sliced, *self.whole):
            copies[value] = graph.placeholder(value.name)

        def copied(value: Node) -> Any:
            if value in self.constants:
                return self.constants[value]
            if value not in copies:
                assert value.op == "get_attr", f"{value} is neither an input nor of the region"
                copies[value] = graph.node_copy(value)
            return copies[value]

        for node in self.nodes:
            if node in self.constants:
                continue
            if node in self.forms:
                x = copied(first_read(node))
                copies[node] = write_sized(graph, node, x, self.forms[node])
                continue
            given: Any = map_arg((node.args, node.kwargs), copied)
            args, kwargs = given
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
        graph.output(tuple(copies[node] for node in self.outputs))
        return graph


def order(
    facts: Facts, found: Sequence[Region], numbers_first: bool = False
) -> list[Node | Region] | None:
    """The nodes of a graph with regions as units, in an order in which they can be run.

    As near as it was written; in-place writes stay where they were. None if there is no such order;
    what `regions` finds together has one.

    Args:
        facts: of the graph.
        found: its regions.
        numbers_first: whether a region waits for the numbers that it has as constants, too.
    """
    unit: dict[Node, Node | Region] = {node: region for region in found for node in region.nodes}
    waits: dict[Node | Region, set[Node | Region]] = {}
    first: dict[Node | Region, int] = {}
    for index, node in enumerate(facts.nodes):
        item = unit.get(node, node)
        first.setdefault(item, index)
        above = waits.setdefault(item, set())
        has = isinstance(item, Region) and not numbers_first
        numbers: Mapping[Node, Any] = facts.constants if has else {}
        above.update(unit.get(n, n) for n in facts.before[node] if n not in numbers)
        above.discard(item)
    readers: dict[Node | Region, list[Node | Region]] = {item: [] for item in waits}
    for item, above in waits.items():
        for value in above:
            readers[value].append(item)
    at = {index: item for item, index in first.items()}
    heap = [first[item] for item, above in waits.items() if not above]
    heapq.heapify(heap)
    result: list[Node | Region] = []
    while heap:
        item = at[heapq.heappop(heap)]
        result.append(item)
        for reader in readers[item]:
            waits[reader].discard(item)
            if not waits[reader]:
                heapq.heappush(heap, first[reader])
    return result if len(result) == len(waits) else None
