"""Cut a rewired graph into what the eager executor runs: branches, links, and the rest.

    graph                                program
    p0   = stem(x)                       segment  p0 = stem(x)
    f0   = mlp(norm(p0))                 enter    chain 0 at p0
    p1   = p0 + f0                       block    branch(p) = mlp(norm(p))
    f1   = attn(norm(p1), mask)          block    branch(p, mask) = attn(norm(p), mask)
    p2   = p0 + f1                       leave    chain 0
    y    = head((p2 + p1) * 0.5)         segment  y = head((p2 + p1) * 0.5)

The arithmetic of the coupling is the executor's; every other node is run as it is written, by code
that looks its modules and parameters up on the live root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import networkx as nx
from torch import nn
from torch.fx import Graph, Node

from re2fx import ops
from re2fx.aliases import Aliases
from re2fx.body import Body
from re2fx.checkpoint import Checkpoint
from re2fx.codegen import compile_graph
from re2fx.conditioning import anchored
from re2fx.contexts import owned
from re2fx.framing import Framing, may_run_again
from re2fx.graph import Flow
from re2fx.layout import Relayout
from re2fx.partition import subgraph
from re2fx.program import Enter, Leave, Program, RunBlock, RunLink, Segment, Step
from re2fx.replay import Lookup
from re2fx.runtime import Reverse
from re2fx.shuffles import inverse, shuffles
from re2fx.wiring import Block, Link, Wiring


@dataclass
class Group:
    """Nodes that run as one step."""

    chain: int
    step: Block | Link
    last: bool
    first: bool
    body: list[Node] = field(default_factory=list)
    ends: list[Node] = field(default_factory=list)


Compile = Callable[[Graph, str], Callable[..., Any]]


def outline(
    graph: Graph,
    root: nn.Module,
    wirings: Sequence[Wiring],
    compile: Compile = compile_graph,
    framing: Framing | None = None,
) -> Program:
    """Make the program of the reversible executor.

    Args:
        graph: the rewired graph; left as it is.
        root: the module its targets are looked up in.
        wirings: where its chains lie.
        compile: makes the functions of branches and segments from their graphs.
        framing: makes frames of whatever may be run again, also outside the chains.
    """
    return _Outliner(graph, root, wirings, compile, framing).run()


def separated(wiring: Wiring) -> Wiring:
    """The same with one operation a link: one may need a size of the result of the one before."""

    def steps() -> Iterator[Block | Link]:
        for step in wiring.steps:
            if isinstance(step, Block):
                yield step
                continue
            currents, previouses = step.currents, step.previouses
            befores = zip((step.current, *currents), (step.previous, *previouses), strict=True)
            for before, current, previous in zip(befores, currents, previouses, strict=False):
                yield Link(*before, (current,), (previous,))

    return replace(wiring, steps=tuple(steps()))


class _Outliner:
    def __init__(
        self,
        graph: Graph,
        root: nn.Module,
        wirings: Sequence[Wiring],
        compile: Compile,
        framing: Framing | None,
    ) -> None:
        self.flow = Flow(graph, root, identities=True)
        self.compile, self.framing = compile, framing
        self.wirings = [separated(wiring) for wiring in wirings]
        self.anchored = [dict(zip(w.blocks, anchored(w), strict=True)) for w in self.wirings]
        self.groups: dict[Node, Group] = {}
        self.slots: dict[Node, int] = {}
        self.steps: list[Step] = []
        self.reads: list[list[Node]] = []
        self.pending: list[Node] = []
        for index, wiring in enumerate(self.wirings):
            self.collect(index, wiring)
        self.move_constants_inside()
        self.position = self.flow.position

    def collect(self, chain: int, wiring: Wiring) -> None:
        """Assign the nodes of a chain to its steps."""
        named = self.flow.by_name
        count = len(wiring.steps)
        for index, step in enumerate(wiring.steps):
            group = Group(chain, step, last=index == count - 1, first=index == 0)
            if isinstance(step, Link):
                group.ends = [named[name] for name in (*step.currents, *step.previouses)]
                members = group.ends
            else:
                output, branch = named[step.output], named[step.branch]
                path = self.flow.between(named[step.current], [branch])
                arithmetic = self.arithmetic(step)
                hanging, _ = self.flow.passengers(path, set(arithmetic))
                body = [*self.flow.private([*path, *hanging]), *path, *hanging]
                group.body = [*body, *owned(self.flow, body)]
                group.ends = [output]
                members = [*group.body, *arithmetic]
            self.groups.update(dict.fromkeys(members, group))

    def arithmetic(self, step: Block) -> list[Node]:
        """The nodes that spell the coupling's step."""
        named = self.flow.by_name
        inputs = [named[name] for name in (step.current, step.previous, step.branch)]
        return self.flow.cone(named[step.output], inputs)

    def move_constants_inside(self) -> None:
        """What is computed from parameters for one branch alone belongs to that branch."""
        for node in reversed(self.flow.nodes):
            if node.op == "get_attr" or not self.flow.is_constant(node):
                continue
            if ops.is_inplace(node, self.flow.root):
                continue
            owners = {id(self.groups.get(user)) for user in self.flow.users(node)}
            group = self.groups.get(next(iter(self.flow.users(node)), node))
            if len(owners) == 1 and group is not None and isinstance(group.step, Block):
                self.groups[node] = group
                group.body.append(node)

    def run(self) -> Program:
        """Order the steps and emit them."""
        for node in self.flow.nodes:
            if node.op == "placeholder":
                self.slot(node)
        for item in self.order():
            if isinstance(item, Node):
                self.pending.append(item)
            else:
                self.flush()
                self.emit_group(item)
        self.flush()
        return Program(tuple(self.steps), self.frees(), len(self.slots))

    def order(self) -> Iterable[Node | Group]:
        """Nodes and groups in an order every one of them can run in, as near as written."""
        graph: nx.DiGraph[int] = nx.DiGraph()
        items: dict[int, Node | Group] = {}
        when: dict[int, int] = {}
        for node in self.flow.nodes:
            item: Node | Group = self.groups.get(node, node)
            if node.op in ("placeholder", "get_attr"):
                continue
            key = id(item)
            items[key] = item
            graph.add_node(key)
            if not isinstance(item, Group) or node in item.ends:
                when[key] = self.position[node]
            for value in node.all_input_nodes:
                before: Node | Group = self.groups.get(value, value)
                if before is not item and value.op not in ("placeholder", "get_attr"):
                    graph.add_edge(id(before), key)
        for key in nx.lexicographical_topological_sort(graph, key=when.__getitem__):
            yield items[key]

    # what a group reads

    def outside(self, nodes: Iterable[Node], given: Iterable[Node]) -> list[Node]:
        """Values from elsewhere that nodes read, parameters and given ones left out."""
        nodes = list(nodes)
        own = {*nodes, *given}
        return list(
            dict.fromkeys(
                value
                for node in nodes
                for value in node.all_input_nodes
                if value not in own and value.op != "get_attr"
            )
        )

    def sides(self, group: Group) -> list[Node]:
        """Side inputs of a block, in a fixed order."""
        assert isinstance(group.step, Block), "links have sides per operation"
        current, branch = (self.flow.by_name[n] for n in (group.step.current, group.step.branch))
        sides = self.outside(group.body, [current])
        if branch in (current, *group.body, *sides):
            return sides
        return [*sides, branch]  # computed in another graph, when a rewired module is cut

    def link_sides(self, link: Link) -> list[list[Node]]:
        """Side inputs per operation of a link."""
        named = self.flow.by_name
        sources = [link.current, *link.currents]
        return [
            self.outside([named[name]], [named[source]])
            for name, source in zip(link.currents, sources, strict=False)
        ]

    # emission

    def slot(self, node: Node) -> int:
        """The slot of a value."""
        return self.slots.setdefault(node, len(self.slots))

    def emit(self, step: Step, reads: list[Node]) -> None:
        self.steps.append(step)
        self.reads.append(reads)

    def emit_group(self, group: Group) -> None:
        """A block or a link, with the begin and the end of its chain."""
        if group.first:
            wiring = self.wirings[group.chain]
            names = [name for name in (wiring.entry, wiring.before) if name is not None]
            entries = [self.flow.by_name[name] for name in names]
            self.emit(Enter(group.chain, *map(self.slot, entries)), entries)
        if isinstance(group.step, Link):
            self.emit_link(group, group.step)
        else:
            self.emit_block(group, group.step)
        if group.last:
            self.emit(Leave(group.chain), [])

    def emit_block(self, group: Group, step: Block) -> None:
        current, branch = (self.flow.by_name[name] for name in (step.current, step.branch))
        sides = self.sides(group)
        body = sorted(group.body, key=self.position.__getitem__)
        graph, targets = subgraph(body, [current, *sides], branch)
        name = f"{step.location.module or 'the model'} ({step.location})"
        function = self.compile(graph, f"branch {step.branch}")
        kept = self.anchored[group.chain][step]
        lookup, tolerance = Lookup(targets), self.wirings[group.chain].tolerance
        parts = None
        if self.framing is not None:
            made = self.framing.body(graph, self.compile, f"branch {step.branch}")
            parts = made if len(made.parts) > 1 or made.sliced else None
        frame = Reverse(function, step.coupling, lookup, name, kept, tolerance, parts)
        output = self.flow.by_name[step.output]
        slot = self.slot(output) if self.read_outside(output, group.chain) else None
        self.emit(RunBlock(group.chain, frame, tuple(map(self.slot, sides)), slot), sides)

    def emit_link(self, group: Group, link: Link) -> None:
        named = self.flow.by_name
        operations, reads = [], []
        sources = [link.current, *link.currents]
        for name, source, sides in zip(link.currents, sources, self.link_sides(link), strict=False):
            node = named[name]
            graph, _ = subgraph([node], [named[source], *sides], node)
            kind = undoing(node)
            operations.append((kind, compile_graph(graph, f"link {name}"), len(sides)))
            reads += sides
        states = [[named[n] for n in names] for names in (link.currents, link.previouses)]
        slots = [
            tuple(self.slot(n) if self.read_outside(n, group.chain) else None for n in nodes)
            for nodes in states
        ]
        frame = Relayout(tuple(operations))
        self.emit(RunLink(group.chain, frame, tuple(map(self.slot, reads)), *slots), reads)

    def read_outside(self, value: Node, chain: int) -> bool:
        """Whether anybody but the chain itself reads a stream state."""
        named = self.flow.by_name
        for user in value.users:
            group = self.groups.get(user)
            if group is None or group.chain != chain:
                return True
            if isinstance(group.step, Link):
                own = {group.step.current, group.step.previous}
                own.update(group.step.currents, group.step.previouses)
            else:
                own = {group.step.current, group.step.previous}
            if value not in {named[name] for name in own}:
                return True
        return False

    def flush(self) -> None:
        """Run the ordinary nodes gathered so far, as one segment or as several frames."""
        if not self.pending:
            return
        nodes, self.pending = self.pending, []
        for piece in self.framing.split(nodes, self.aliases) if self.framing else [nodes]:
            self.emit_segment(piece)

    def emit_segment(self, nodes: Sequence[Node]) -> None:
        """Ordinary nodes."""
        inside = set(nodes)
        results = [
            node for node in nodes if any(user not in inside for user in node.users)
        ]  # fmt: skip
        reads = self.outside(nodes, [])
        output = next((node for node in nodes if node.op == "output"), None)
        inner = [node for node in nodes if node.op != "output"]
        graph, targets = subgraph(inner, reads, results, output)
        name = f"segment {len(self.steps)}"
        function = self.compile(graph, name)
        outputs = () if output is not None else tuple(map(self.slot, results))
        frame = None
        if self.framing is not None and inner and may_run_again(self.flow, self.aliases, inner):
            if output is None:
                body = self.framing.body(graph, self.compile, name)
            else:
                body = Body.whole(function, len(reads), Lookup(targets))
            frame = Checkpoint(body, self.named(inner))
        self.emit(Segment(function, tuple(map(self.slot, reads)), outputs, frame), reads)

    @cached_property
    def aliases(self) -> Aliases:
        """Which values share memory."""
        return Aliases(self.flow)

    def named(self, nodes: Sequence[Node]) -> str:
        """Where some nodes come from, for messages."""
        places = [self.flow.location(node) for node in nodes if node.op != "get_attr"]
        first = places[0]
        modules = dict.fromkeys(place.module or "the model" for place in places)
        return (
            f"{next(iter(modules))} to {list(modules)[-1]} ({first})" if places[1:] else f"{first}"
        )

    def frees(self) -> tuple[tuple[int, ...], ...]:
        """Per step the slots that are read there for the last time, or never."""
        last: dict[int, int] = dict.fromkeys(self.slots.values(), 0)
        for index, (step, reads) in enumerate(zip(self.steps, self.reads, strict=True)):
            written: list[int | None] = []
            if isinstance(step, Segment):
                written += step.outputs
            elif isinstance(step, RunBlock):
                written.append(step.output)
            elif isinstance(step, RunLink):
                written += (*step.currents, *step.previouses)
            for slot in (*(self.slots[n] for n in reads), *written):
                if slot is not None:
                    last[slot] = index
        frees: list[list[int]] = [[] for _ in self.steps]
        for slot, index in last.items():
            frees[index].append(slot)
        return tuple(map(tuple, frees))


def undoing(node: Node) -> str | Callable[..., Any]:
    """What undoes a shape-only operation."""
    if shuffles(node):
        return compile_graph(inverse(node), f"undo {node.name}")
    if ops.copies(node):
        return "copy"
    return "permute" if ops.permutes(node) else "reshape"
