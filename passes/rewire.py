"""Rewrite the planned chains into the two-stream form. Plain, differentiable, printable FX.

    before                            after, for the coupling (0, 1, 1)
    x1 = x0 + F0(x0)                  p1 = x0 + F0(x0)
    x2 = x1 + F1(x1)                  p2 = x0 + F1(p1)
    x3 = x2 + F2(x2)                  p3 = p1 + F2(p2)
    y  = head(x3)                     y  = head((p3 + p2) * 0.5)

The graph is copied in program order. Inside the branch of residual i the stream value x_i becomes
p_i; everybody else who reads it (a tap, the end of the chain) gets the readout of (p_i, p_{i-1}).
Nodes outside the chains are copied as they are. Streams are carried in at least fp32; a branch and
a reader get them in the dtype of the chain's input, which changes nothing in an fp32 network.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from re2fx import ops
from re2fx.contexts import owned
from re2fx.coupling import Coupling, Readout, linear_weights, read, widen
from re2fx.couplings import Couplings, of_residual, resolve
from re2fx.drawn import signs
from re2fx.errors import OptionError
from re2fx.graph import Flow
from re2fx.plan import Chain, Plan, Residual
from re2fx.wiring import Block, Link, Wiring


@dataclass(frozen=True)
class Pair:
    """The two streams at one point of a chain, and the activation still to be applied to them."""

    current: Node
    previous: Node
    activation: Node | None = None


@dataclass
class State:
    """A chain while it is being written; ``start`` is its input in the present layout."""

    entry: str
    start: Node
    dtype: Node
    pair: Pair
    coupling: Coupling
    couplings: list[tuple[Coupling, float]] = field(default_factory=list)
    steps: list[Block | Link] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """What is needed to read one stream value from outside: its streams, and the way there."""

    pair: Pair
    start: Node
    dtype: Node
    coupling: Coupling
    couplings: tuple[tuple[Coupling, float], ...]


class Recorder(GraphAppendingTracer):
    """Records arithmetic on proxies as nodes that carry the provenance of an old node."""

    origin: Node | None = None

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """Create a node with the source line of ``origin``."""
        node = super().create_node(*args, **kwargs)
        for key in ("stack_trace", "source_line", "nn_module_stack"):
            if self.origin is not None and key in self.origin.meta:
                node.meta[key] = self.origin.meta[key]
        return node


def rewire(
    flow: Flow,
    plan: Plan,
    coupling: Couplings,
    readout: Readout = "mean",
    activation: str = "branch",
) -> tuple[Graph, tuple[Wiring, ...]]:
    """Return the two-stream graph and where its chains lie.

    Args:
        flow: the dataflow of the normalised graph the plan was made for.
        plan: what to rewire.
        coupling: how the two streams combine; one for all chains or one per chain.
        readout: how two streams become one value, at taps and at the end of a chain.
        activation: ``"branch"`` moves an activation behind an addition into the branch,
            ``"stream"`` leaves the stream before it and applies it where the stream is read,
            ``"block"`` leaves it where it is.
    """
    return _Rewirer(flow, plan, coupling, readout, activation).run()


class _Rewirer:
    def __init__(
        self, flow: Flow, plan: Plan, coupling: Couplings, readout: Readout, activation: str
    ) -> None:
        self.flow, self.plan, self.readout = flow, plan, readout
        outputs = [chain.output for chain in plan.chains]
        self.couplings = dict(zip(outputs, resolve(coupling, plan.chains), strict=True))
        self.on_stream = activation == "stream"
        self.switches = any(ops.switches_context(node) for node in flow.nodes)
        self.graph = Graph()
        self.recorder = Recorder(self.graph)
        # What an old value is in the new graph, for readers outside the chains.
        self.values: dict[Node, Node] = {}
        self.readings: dict[Node, Reading] = {}
        # Where each chain stands, and which old nodes write its steps or belong to its branches.
        self.states: dict[str, State] = {}
        self.steps: dict[Node, tuple[Chain, Residual]] = {}
        self.links: dict[Node, Chain] = {}
        self.branches: dict[Node, tuple[Chain, Residual]] = {}
        self.bodies: dict[str, list[Node]] = {}  # what runs once more, by a residual's addition
        self.taken_over: set[Node] = set()
        self.branch_inputs: dict[Node, Node] = {}
        for chain in plan.chains:
            self.look_up(chain)

    def look_up(self, chain: Chain) -> None:
        """Turn the plan's names into nodes."""
        node = self.flow.by_name
        for residual, links in zip(chain.residuals, chain.links, strict=True):
            skip, add = node[residual.skip], node[residual.add]
            own = {add, *(node[name] for name in residual.dropped)}
            region = self.flow.between(skip, [node[name] for name in residual.branches])
            doors = {node[residual.output]} if residual.block else own
            passengers, _ = self.flow.passengers([n for n in region if n not in doors], doors)
            self.branches.update(dict.fromkeys((*region, *passengers), (chain, residual)))
            if not residual.block:
                self.taken_over.update(own)
            if self.couplings[chain.output].evaluations > 1:
                self.bodies[residual.add] = body(self.flow, region)
            self.steps[node[residual.output]] = (chain, residual)
            self.links.update((node[name], chain) for name in links)

    def run(self) -> tuple[Graph, tuple[Wiring, ...]]:
        """Write the new graph in the order of the old one."""
        for node in self.flow.nodes:
            if node in self.steps:
                self.write_step(node, *self.steps[node])
            elif node in self.links:
                self.write_link(node, self.states[self.links[node].output])
            elif node not in self.taken_over and self.flow.source(node) not in self.readings:
                self.values[node] = self.copy(node)
        self.drop_bypassed_identities()
        self.graph.lint()
        written = [self.states[chain.output] for chain in self.plan.chains]
        return self.graph, tuple(Wiring(s.entry, tuple(s.steps)) for s in written)

    def drop_bypassed_identities(self) -> None:
        """An identity at a branch's end has lost its reader, the addition."""
        for node in reversed(self.flow.nodes):
            copied = self.values.get(node)
            if self.flow.source(node) is not node and copied is not None and not copied.users:
                self.graph.erase_node(copied)

    def state(self, chain: Chain) -> State:
        """Where a chain stands; at its beginning the input is replicated into both streams."""
        if chain.output not in self.states:
            entry, coupling = self.flow.by_name[chain.entry], self.couplings[chain.output]
            value = self.value(entry)
            with self.behind(value):
                dtype = self.emit(entry, lambda x: x.dtype, value)
                self.recorder.origin = entry
                start = self.recorder.create_node("call_function", widen, (value,), {})
                start = self.emit(entry, coupling.encode, start)
            pair = Pair(start, start)
            self.states[chain.output] = State(start.name, start, dtype, pair, coupling)
        return self.states[chain.output]

    def write_step(self, node: Node, chain: Chain, residual: Residual) -> None:
        """``p_{i+1}`` from the two streams and the branch."""
        state = self.state(chain)
        add = self.flow.by_name[residual.add]
        moved = self.flow.by_name[residual.activation] if residual.activation else None
        new, current = self.write_block(state, residual, residual.skip_scale)
        for _ in range(1, state.coupling.evaluations):
            state.pair = Pair(new, current, state.pair.activation)
            for member in self.bodies[residual.add]:
                self.values[member] = self.copy(member)  # reads the pair as it is now
            new, current = self.write_block(state, residual, 1.0)
        if self.on_stream and moved is not None:
            self.publish(add, state, Pair(new, current))
        self.publish(node, state, Pair(new, current, moved if self.on_stream else None))

    def write_block(self, state: State, residual: Residual, scale: float) -> tuple[Node, Node]:
        """One step of the recurrence; returns the two newest states.

        Args:
            state: of the chain.
            residual: its branch was written for the present pair.
            scale: what the step does to the skip of the original network.
        """
        moved = self.flow.by_name[residual.activation] if residual.activation else None
        branch = self.copy(self.flow.by_name[residual.output]) if residual.block else None
        branch = branch or self.branch_sum(residual)
        if moved is not None and not self.on_stream:
            branch = self.activate(moved, branch, self.sole_branch(residual))
        coupling = of_residual(state.coupling, residual)
        current, previous = state.pair.current, state.pair.previous
        add = self.flow.by_name[residual.add]
        drawn = self.draw(add, current) if coupling.draws else []
        new = self.emit(add, coupling.step, current, previous, branch, *drawn)
        state.couplings.append((coupling, scale))
        state.steps.append(
            Block(current.name, previous.name, branch.name, new.name, coupling, residual.location)
        )
        return new, current

    def draw(self, add: Node, stream: Node) -> list[Node]:
        """What a block's coupling draws, behind its branch, as the executor does."""
        self.recorder.origin = add
        return [self.recorder.create_node("call_function", signs, (stream,), {})]

    def branch_sum(self, residual: Residual) -> Node:
        """The branch's output: parallel branches added, constant scales applied."""
        total: Node | None = None
        for name, scale in zip(residual.branches, residual.branch_scales, strict=True):
            origin = self.flow.by_name[name]
            value = self.values[self.flow.source(origin)]
            if scale != 1:
                value = self.emit(origin, lambda x, k=scale: x * k, value)
            total = value if total is None else self.emit(origin, operator.add, total, value)
        assert total is not None, "a residual has at least one branch"
        return total

    def sole_branch(self, residual: Residual) -> Node | None:
        """The operation whose very output is the branch, if there is one."""
        plain = len(residual.branches) == 1 and residual.branch_scales == (1.0,)
        return self.flow.by_name[residual.branches[0]] if plain else None

    def write_link(self, node: Node, state: State) -> None:
        """A shape-only operation on both streams."""
        pair, source = state.pair, self.flow.source(first_input(node))
        after = Pair(*(self.copy(node, {source: p}) for p in (pair.current, pair.previous)))
        if self.readout == "sum":
            state.start = self.copy(node, {source: state.start})
        last = state.steps[-1]
        if isinstance(last, Link):
            state.steps.pop()
        else:
            last = Link(pair.current.name, pair.previous.name, (), ())
        currents, previouses = last.currents, last.previouses
        state.steps.append(
            Link(
                last.current,
                last.previous,
                (*currents, after.current.name),
                (*previouses, after.previous.name),
            )
        )
        self.publish(node, state, after)

    def publish(self, node: Node, state: State, pair: Pair) -> None:
        """From here on ``node`` of the old graph stands for this pair of streams."""
        state.pair = pair
        weighed = tuple(state.couplings) if self.readout == "sum" else ()
        self.readings[node] = Reading(pair, state.start, state.dtype, state.coupling, weighed)

    def copy(self, node: Node, given: dict[Node, Node] | None = None) -> Node:
        """Copy a node, each argument as this node should see it, or as given."""

        def argument(value: Node) -> Node:
            source = self.flow.source(value)
            return given[source] if given and source in given else self.seen_by(node, value)

        return self.graph.node_copy(node, argument)

    def seen_by(self, reader: Node, value: Node) -> Node:
        """What a reader of the old graph reads in the new one."""
        source = self.flow.source(value)
        if reader in self.branches:
            chain, residual = self.branches[reader]
            if source.name == residual.skip:
                return self.branch_input(self.state(chain))
        if source not in self.readings:
            return self.values[value] if value in self.values else self.values[source]
        if ops.reads_extent_only(reader):
            return self.readings[source].pair.current
        return self.value(source)

    def branch_input(self, state: State) -> Node:
        """The stream as its branch reads it."""
        current, activation = state.pair.current, state.pair.activation
        if current not in self.branch_inputs:
            with self.behind(current):
                value = self.emit(
                    current,
                    lambda x, dtype: state.coupling.decode(x).to(dtype),
                    current,
                    state.dtype,
                )
                if activation is not None:
                    value = self.activate(activation, value, None)
            self.branch_inputs[current] = value
        return self.branch_inputs[current]

    def value(self, source: Node) -> Node:
        """One tensor for a value: itself, or the readout of the two streams it stands for."""
        if source not in self.values:
            reading = self.readings[source]
            weights = linear_weights(reading.couplings)
            with self.behind(reading.pair.current):
                self.values[source] = self.read(source, reading, weights)
        return self.values[source]

    def behind(self, stream: Node) -> AbstractContextManager[Any]:
        """Where to write what is made of a stream: its first reader may switch a context."""
        if not self.switches:
            return nullcontext()
        following = stream.next
        while following.op == "placeholder":
            following = following.next
        return self.graph.inserting_before(following)

    def read(self, source: Node, reading: Reading, weights: tuple[float, float, float]) -> Node:
        """The readout of two streams, the pending activation applied."""
        decode = reading.coupling.decode
        value = self.emit(
            source,
            lambda p, q, start, dtype: read(
                self.readout, decode(p), decode(q), decode(start), weights
            ).to(dtype),
            reading.pair.current,
            reading.pair.previous,
            reading.start,
            reading.dtype,
        )
        if reading.pair.activation is not None:
            value = self.activate(reading.pair.activation, value, None)
        return value

    def activate(self, node: Node, value: Node, producer: Node | None) -> Node:
        """The activation on a value; one in place gets a copy if the value may be needed intact."""
        root = self.flow.root
        if ops.is_inplace(node, root) and (producer is None or ops.keeps_output(producer, root)):
            value = self.emit(node, torch.clone, value)
        return self.copy(node, {self.flow.source(first_input(node)): value})

    def emit(self, origin: Node, function: Any, *values: Node) -> Node:
        """Record arithmetic on nodes, with the provenance of a node of the old graph."""
        self.recorder.origin = origin
        result: Proxy = function(*(Proxy(value, self.recorder) for value in values))
        return result.node


def body(flow: Flow, region: Iterable[Node]) -> list[Node]:
    """What must be written again for a branch to run again, in program order.

    Besides the nodes on the way from the stream those that draw noise for it, switches of autocast
    and gradients that belong to it, identities among its nodes, and writes to members: those it
    reads, and the counters of its layers.

    Raises:
        OptionError: the branch writes to a member, and somebody else reads the result.
    """
    region = list(region)
    inner = {*flow.private(region), *region}
    first, last = (flow.position[region[end]] for end in (0, -1))
    found = {*inner, *owned(flow, inner)}
    found.update(node for node in flow.nodes[first:last] if flow.source(node) in inner)
    read = (value for node in inner for value in flow.inputs(node))
    unread = (node for node in flow.nodes[first:last] if not flow.users(node))
    for node in filter(partial(writes_member, flow), (*read, *unread)):
        if not inner.issuperset(flow.users(node)):
            raise OptionError(
                f"{flow.location(node)}: the branch changes a tensor of its module, which is read "
                "elsewhere too; it cannot run twice. Leave the residual out with select=, or use "
                "another coupling."
            )
        found.add(node)
    return sorted(found, key=flow.position.__getitem__)


def writes_member(flow: Flow, node: Node) -> bool:
    """Whether a node writes to a parameter or buffer in place and reads nothing else."""
    inputs = node.all_input_nodes
    members = bool(inputs) and all(value.op == "get_attr" for value in inputs)
    return members and ops.is_inplace(node, flow.root)


def first_input(node: Node) -> Node:
    """The value an activation or a shape-only operation works on."""
    value = node.args[0]
    assert isinstance(value, Node), "only operations on a stream get here"
    return value
