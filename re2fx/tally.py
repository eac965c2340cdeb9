"""Who keeps what: storages kept for a backward, each counted once and under the node that keeps it.

A graph is run node by node, so that what autograd saves can be put down to a residual of a chain or
to a module outside the chains. The tensors may be fake.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from .graph import Flow, location
from .interpret import LiveInterpreter
from .memory import storage_key
from .plan import Chain, Plan, Residual
from .replay import Generators

PLACE = "re2fx_place"  # key of a node's metadata, which passes copy along with the node

Run = Callable[..., Any]


@dataclass(frozen=True)
class Place:
    """Where in a network something is kept.

    Attributes:
        where: ``"chain"``, ``"inputs"``, ``"before"``, ``"between"`` or ``"behind"`` the chains,
            ``"readout"``, ``"loss"``, ``"model"`` without chains, or the rule by which a residual
            was refused.
        module: path of the module, empty for the model itself.
        chain: number of the chain, -1 outside.
        residual: number of the residual in its chain, -1 outside.
    """

    where: str
    module: str = ""
    chain: int = -1
    residual: int = -1


POSITIONS = ("before", "between", "behind", "model")
MODEL = Place("model")
READOUT = Place("readout")
INPUTS = Place("inputs")


class Tally:
    """Storages kept by a forward, each under the place that keeps it first.

    Args:
        model: its parameters and buffers are not counted.
        inputs: what the model is called with; counted, if kept, as ``INPUTS``.

    Attributes:
        place: where the forward is at the moment.
    """

    def __init__(self, model: nn.Module, inputs: Any = ()) -> None:
        self.place = MODEL
        self._members = {storage_key(t) for t in (*model.parameters(), *model.buffers())}
        leaves = pytree.tree_leaves(inputs)
        self._inputs = {storage_key(x) for x in leaves if isinstance(x, torch.Tensor)}
        self._kept: list[tuple[torch.UntypedStorage, Place]] = []

    def keep(self, tensor: torch.Tensor, place: Place | None = None) -> None:
        """Note a tensor that is kept."""
        self._kept.append((tensor.untyped_storage(), place or self.place))

    def keep_first(self, tensors: Iterator[torch.Tensor], place: Place) -> None:
        """Note tensors that go down to a place whoever else keeps them too."""
        self._kept = [*((t.untyped_storage(), place) for t in tensors), *self._kept]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what autograd saves in here."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            self.keep(tensor)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def bytes(self) -> Counter[Place]:
        """Bytes by place."""
        seen = set(self._members)
        found: Counter[Place] = Counter()
        for storage, place in self._kept:
            key = storage._cdata
            if key not in seen:
                seen.add(key)
                found[INPUTS if key in self._inputs else place] += storage.nbytes()
        return found


@dataclass(frozen=True)
class Region:
    """The branch of one residual, as a checkpoint runs it.

    Attributes:
        nodes: in program order.
        reads: the values from outside that they read.
    """

    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]


def mark_places(graph: Graph, root: nn.Module, plan: Plan) -> tuple[Region, ...]:
    """Write each node's `Place` into its metadata, and return the branches.

    Args:
        graph: the graph the plan was made for.
        root: the module its targets are looked up in.
        plan: its chains and refusals.
    """
    flow = Flow(graph, root, identities=True)
    owner: dict[Node, tuple[int, int]] = {}
    bodies: dict[tuple[int, int], set[Node]] = {}
    for number, chain in enumerate(plan.chains):
        for index, residual in enumerate(chain.residuals):
            body = bodies[number, index] = set(_body(flow, residual))
            members = {*body, *_frame(flow, chain, index)}
            owner.update(dict.fromkeys(members, (number, index)))
    for node, key in _constants(flow, owner):
        owner[node] = key
        bodies[key].add(node)
    outside = _Outside(flow, plan)
    for node in flow.nodes:
        module = location(node).module
        inside = owner.get(node)
        node.meta[PLACE] = Place("chain", module, *inside) if inside else outside.place(node)
    return tuple(_region(flow, body) for body in bodies.values())


def _body(flow: Flow, residual: Residual) -> list[Node]:
    """The branch, with what hangs off it and the noise it alone reads."""
    end = flow.by_name[residual.output if residual.block else residual.add]
    path = [node for node in flow.between(flow.by_name[residual.skip], [end]) if node is not end]
    hanging, _ = flow.passengers(path, {end})
    body = [*flow.private([*path, *hanging]), *path, *hanging]
    return [*body, end] if residual.block else body


def _frame(flow: Flow, chain: Chain, index: int) -> list[Node]:
    """The addition, what belongs to it, and the shape-only operations before it."""
    residual = chain.residuals[index]
    names = (residual.add, residual.output, residual.activation, *chain.links[index])
    return [flow.by_name[name] for name in names if name is not None]


def _constants(
    flow: Flow, owner: dict[Node, tuple[int, int]]
) -> Iterator[tuple[Node, tuple[int, int]]]:
    """What is computed from parameters for one residual alone, last first."""
    for node in reversed(flow.nodes):
        if node in owner or node.op == "get_attr" or not flow.is_constant(node):
            continue
        owners = {owner.get(user) for user in flow.users(node)}
        only = next(iter(owners), None)
        if len(owners) == 1 and only is not None:
            yield node, only


def _region(flow: Flow, body: set[Node]) -> Region:
    nodes = tuple(sorted(body, key=flow.position.__getitem__))
    reads = dict.fromkeys(value for node in nodes for value in node.all_input_nodes)
    return Region(nodes, tuple(value for value in reads if value not in body))


class _Outside:
    """Where a node outside the chains lies."""

    def __init__(self, flow: Flow, plan: Plan) -> None:
        at = [(flow.by_name[c.entry], flow.by_name[c.output]) for c in plan.chains]
        self.flow = flow
        self.first = min((flow.position[entry] for entry, _ in at), default=len(flow.nodes))
        self.last = max((flow.position[output] for _, output in at), default=len(flow.nodes))
        self.refused = {r.location.module: r.rule for r in plan.refusals if r.location.module}

    def place(self, node: Node) -> Place:
        """By the refused residual it belongs to, or by its position."""
        module, position = location(node).module, self.flow.position[node]
        parts = module.split(".")
        for end in range(len(parts), 0, -1):
            path = ".".join(parts[:end])
            if path in self.refused:
                return Place(self.refused[path], path)
        if self.first == len(self.flow.nodes):
            return Place("model", module)
        if position <= self.first:
            return Place("before", module)
        return Place("between" if position < self.last else "behind", module)


class Walker(LiveInterpreter):
    """Runs a graph against a live root and tells a tally where it is.

    Args:
        root: what the graph's targets are looked up on.
        graph: any graph; places are read off its metadata where there are any.
        tally: told the place of each node.
        regions: branches that are run as one call each.
        checkpoint: ``checkpoint(function, *inputs)`` runs a region.
    """

    def __init__(
        self,
        root: Any,
        graph: Graph,
        tally: Tally,
        regions: Sequence[Region] = (),
        checkpoint: Run | None = None,
    ) -> None:
        super().__init__(root, graph)
        self.garbage_collect_values = False  # done here: a region is run later than written
        self._tally, self._checkpoint = tally, checkpoint
        self._regions = {region.nodes[-1]: region for region in regions if region.nodes}
        self._deferred = {n for region in regions for n in region.nodes}

    def run_node(self, n: Node) -> Any:
        """Run a node, or a whole region at its last node."""
        if n in self._regions:
            return self._run_region(self._regions[n])
        return None if n in self._deferred else self._run(n)

    def _run(self, node: Node) -> Any:
        self._tally.place = node.meta.get(PLACE, READOUT)
        result = super().run_node(node)
        self._free(node)
        return result

    def _free(self, node: Node) -> None:
        for value in self.user_to_last_uses.get(node, ()):
            self.env.pop(value, None)

    def _run_region(self, region: Region) -> Any:
        assert self._checkpoint is not None, "regions are for checkpoints"
        place = region.nodes[-1].meta[PLACE]
        inputs = [self.env[node] for node in region.reads]
        tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
        states = Generators(tensors[0].device).states if tensors else []
        for tensor in (*tensors, *states):  # a checkpoint keeps both, used or not
            self._tally.keep(tensor, place)

        def branch(*_: Any) -> Any:
            for node in region.nodes:
                self.env[node] = self._run(node)
            return self.env[region.nodes[-1]]

        return self._checkpoint(branch, *inputs)


@contextmanager
def by_module(model: nn.Module, tally: Tally) -> Iterator[None]:
    """Run a model in here; places outside the chains name the module that is being called.

    It is what tells the parts of a module apart that has no graph, or is one node of it.
    """
    stack: list[Place] = []
    handles = []
    for path, module in model.named_modules():

        def enter(_: nn.Module, __: Any, path: str = path) -> None:
            stack.append(tally.place)
            if tally.place.where in POSITIONS:
                tally.place = replace(tally.place, module=path)

        def leave(*_: Any) -> None:
            tally.place = stack.pop()

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
