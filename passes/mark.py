"""Write the stream arithmetic of a rewired graph as marks, for the compiled executor.

    before                              after
    f1 = mlp(norm(p1))                  r1 = fork(p1);  f1 = mlp(norm(r1))
    p2 = p0 + f1                        p2 = couple(p1, p0, r1, f1, 0, 1, 1)
    q2 = p2.permute(0, 2, 1)            q2 = link(p2, p2.permute(0, 2, 1))

A step in fixed point is an operator by itself and stays; a fork in front of its branch says that
its states may be reconstructed. Values, gradients and random numbers stay the same. A new graph is
returned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from re2fx.coupling import Coupling
from re2fx.errors import OptionError
from re2fx.exact import STEP, FixedCoupling
from re2fx.graph import Flow, copy_graph, location
from re2fx.marks import COUPLE, FORK, LINK, MARKS, read_couple
from re2fx.plan import Location
from re2fx.wiring import DRIFT_TOLERANCE, Block, Link, Wiring


@dataclass(frozen=True)
class Part:
    """What one block is written in.

    Attributes:
        step: the block.
        readers: the nodes of its branch that read the stream.
        arithmetic: the nodes that spell its coupling.
    """

    step: Block
    readers: tuple[Node, ...]
    arithmetic: tuple[Node, ...]


def mark(
    graph: Graph, root: nn.Module, wirings: tuple[Wiring, ...], reversible: bool = True
) -> Graph:
    """Return the graph with marks.

    Args:
        graph: a rewired graph; left as it is.
        root: the module its targets are looked up in.
        wirings: where its chains lie.
        reversible: whether the states may be reconstructed; if not, the marks only say that the
            graph is rewired already.
    """
    check_drawn(wirings)
    flow = Flow(copy_graph(graph), root, identities=True)
    parts = {block: look_up(flow, block) for wiring in wirings for block in wiring.blocks}
    marked: dict[str, Node] = {}  # stream states by their names in the given graph
    for wiring in wirings:
        for step in wiring.steps:
            if isinstance(step, Block):
                if not step.coupling.exact:
                    mark_block(flow, parts[step], marked, reversible, wiring.tolerance)
                elif reversible:
                    fork_branch(flow, parts[step], marked)
                continue
            if not reversible and wiring.blocks[0].coupling.exact:
                continue
            for before, names in (
                (step.current, step.currents),
                (step.previous, step.previouses),
            ):
                for name in names:
                    mark_operation(flow, before, name, marked)
                    before = name
    flow.graph.lint()
    return flow.graph


def check_drawn(wirings: tuple[Wiring, ...]) -> None:
    """Refuse couplings that no mark can carry.

    Raises:
        OptionError: says which other executors can.
    """
    for wiring in wirings:
        for block in wiring.blocks:
            if block.coupling.draws:
                raise OptionError(
                    f"{block.location}: coupling {block.coupling} draws its coefficients in the "
                    "forward, which graphs compiled as wholes do not support. Use re2fx.transform "
                    "without torch.compile, or compile the given model with scope='region'."
                )


def look_up(flow: Flow, step: Block) -> Part:
    """Find the nodes of a block before anything is changed."""
    stream, previous, branch, output = (
        flow.by_name[name] for name in (step.current, step.previous, step.branch, step.output)
    )
    arithmetic = flow.cone(output, [stream, previous, branch])
    path = flow.between(stream, [branch])
    passengers, _ = flow.passengers(path, set(arithmetic))
    readers = [node for node in (*path, *passengers) if stream in node.all_input_nodes]
    readers.sort(key=flow.position.__getitem__)
    return Part(step, tuple(readers), tuple(arithmetic))


def mark_block(
    flow: Flow, part: Part, marked: dict[str, Node], reversible: bool, tolerance: float
) -> None:
    """A fork in front of the branch, and its coupling as one operator."""
    step, coupling, named = part.step, part.step.coupling, flow.by_name
    current, previous = (marked.get(n, named[n]) for n in (step.current, step.previous))
    branch, output = named[step.branch], named[step.output]
    fork = fork_branch(flow, part, marked)
    coefficients = (float(coupling.a), float(coupling.b), float(coupling.c))
    with flow.graph.inserting_before(output):
        streams = (current, previous, fork, branch)
        how = reversible, tolerance, coupling.block
        new = create(flow, output, COUPLE, *streams, *coefficients, *how)
    output.replace_all_uses_with(new)
    for node in part.arithmetic:  # from the output back
        flow.graph.erase_node(node)
    marked[step.output] = new


def fork_branch(flow: Flow, part: Part, marked: dict[str, Node]) -> Node:
    """A fork in front of the branch."""
    current = marked.get(part.step.current, flow.by_name[part.step.current])
    branch = flow.by_name[part.step.branch]
    # Right behind the stream: a reader may stand where gradients or autocast are switched.
    first = next(n for n in flow.graph.nodes if n.op != "placeholder")
    behind = (
        flow.graph.inserting_before(first)
        if current.op == "placeholder"
        else (flow.graph.inserting_after(current))
    )
    with behind:
        fork = create(flow, branch, FORK, current)
    for reader in part.readers:
        reader.replace_input_with(current, fork)
    return fork


def mark_operation(flow: Flow, before: str, after: str, marked: dict[str, Node]) -> None:
    """A shape-only operation on one stream."""
    node = flow.by_name[after]
    with flow.graph.inserting_after(node):
        new = create(flow, node, LINK, marked.get(before, flow.by_name[before]), node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    marked[after] = new


def create(flow: Flow, origin: Node, target: Any, *args: Any) -> Node:
    """A mark with the provenance of the node it stands for."""
    node = flow.graph.call_function(target, args)
    node.meta = {k: v for k, v in origin.meta.items() if k not in ("example_value", "is_wrapped")}
    return node


def is_marked(graph: Graph) -> bool:
    """Whether a graph was rewired before it was traced."""
    return any(node.target in (*MARKS, STEP) for node in graph.nodes)


def is_exact(graph: Graph) -> bool:
    """Whether a graph has states in fixed point that are to be reconstructed."""
    targets = {node.target for node in graph.nodes if node.op == "call_function"}
    return STEP in targets and FORK in targets


@dataclass
class Chain:
    """A chain while its marks are taken away.

    Attributes:
        entry: name of its input.
        before: name of the state before, if it is another one.
        current, previous: the two states behind the last block.
        steps: blocks and links so far.
        tolerance: relative error that a reconstructed state may have.
    """

    entry: str
    before: str | None
    current: Node
    previous: Node
    steps: list[Block | Link] = field(default_factory=list)
    tolerance: float = DRIFT_TOLERANCE

    @property
    def wiring(self) -> Wiring:
        """The chain as it lies in the graph without marks."""
        return Wiring(self.entry, tuple(self.steps), self.before, self.tolerance)


def unmark(graph: Graph) -> tuple[Graph, tuple[Wiring, ...]]:
    """The graph with plain arithmetic again, and where its reversible chains lie.

    Args:
        graph: a graph with marks, traced from a rewired module; left as it is.
    """
    new = copy_graph(graph)
    chains: list[Chain] = []
    exact = is_exact(new)
    for node in list(new.nodes):
        if node.target is COUPLE:
            unmark_block(node, chains)
        elif node.target is STEP and exact:
            arguments: Any = node.args
            current, previous, branch = arguments[:3]
            block = (current, previous, branch, node)
            add_block(chains, *block, FixedCoupling.read(node.args), location(node))
    for node in reversed(new.nodes):
        if node.target in (FORK, LINK):
            node.replace_all_uses_with(unlinked(node) if node.target is LINK else node.args[0])
            new.erase_node(node)
    new.lint()
    return new, tuple(chain.wiring for chain in chains)


def unlinked(stream: Any) -> Any:
    """What a mark behind a shape-only operation stands for."""
    while stream.target is LINK:
        stream = stream.args[1]
    return stream


def unmark_block(node: Node, chains: list[Chain]) -> None:
    """The coupling's arithmetic instead of its mark."""
    current, previous, _, branch, coupling, reversible, tolerance = read_couple(node)
    tracer = GraphAppendingTracer(node.graph)
    with node.graph.inserting_before(node):
        values = (Proxy(value, tracer) for value in (current, previous, branch))
        output = coupling.step(*values).node
    node.replace_all_uses_with(output)
    node.graph.erase_node(node)
    if reversible:
        block = (current, previous, branch, output)
        add_block(chains, *block, coupling, location(node), tolerance)


def add_block(
    chains: list[Chain],
    current: Any,
    previous: Any,
    branch: Node,
    output: Node,
    coupling: Coupling,
    place: Location,
    tolerance: float = DRIFT_TOLERANCE,
) -> None:
    """A block behind the last one of its chain, or the first of a new one."""
    start, before, links = current, previous, []
    while start.target is LINK and before.target is LINK:
        links.append((start.args[1].name, before.args[1].name))
        start, before = start.args[0], before.args[0]
    chain = next((c for c in chains if c.current is start and c.previous is before), None)
    if chain is None:
        before_entry = None if previous is current else unlinked(previous).name
        entry = unlinked(current).name
        chain = Chain(entry, before_entry, current, previous, tolerance=tolerance)
        chains.append(chain)
    elif links:
        currents, previouses = zip(*reversed(links), strict=True)
        names = (start.name, unlinked(before).name)
        chain.steps.append(Link(*names, currents, previouses))
    read, old, new = (unlinked(value).name for value in (current, previous, branch))
    chain.steps.append(Block(read, old, new, output.name, coupling, place))
    chain.current, chain.previous = output, current
