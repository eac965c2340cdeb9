"""Let the backward of a joint graph reconstruct the streams instead of reading stored ones.

    joint graph                           after
    r1 = fork(p1);  f1 = mlp(r1)          f1 = mlp(p1)
    p2 = couple(p1, p0, r1, f1, ...)      p2 = p0 + f1
    ...                                   ...
    g  = use(tangent, r1, f1)             f1' = mlp(p1');  p0' = p2' - f1'
                                          g  = use(tangent, p1', f1')

The blocks of a chain are walked from the last to the first. Forward nodes of a block that the
backward reads, or that its branch's result needs, are cloned with the stream's state replaced by
its reconstruction; the backward reads the clones; the clones give the state before. At an anchor
both states are the stored ones. Clones are tagged as the backward's, so the partitioner that runs
next has nothing to keep of a chain but its last two states and its anchors. What does not depend
on the stream (parameters, side inputs, random seeds) is shared with the forward. A random operator
that would draw anew is paired: the forward keeps the generator's state, and the clone runs with it.

Works in place on the graphs of AOTAutograd, any set of decompositions. A chain that was cut into
several graphs is reversed piece by piece.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
import torch
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from re2fx.aten import Value, emit, is_random, is_tensor, restrided, steps_between, undo
from re2fx.conditioning import place_anchors
from re2fx.coupling import Coupling
from re2fx.marks import COUPLE, LINK, MARKS, read_couple


def reverse(graph: Graph) -> int:
    """Reverse every marked chain of a joint graph, and turn the marks into arithmetic.

    Args:
        graph: a joint graph, or the forward of a network that is not trained, in which the marks
            only become arithmetic.

    Returns:
        how many blocks the backward reconstructs.
    """
    if not any(node.target in MARKS for node in graph.nodes):
        return 0
    tangents = [n for n in graph.nodes if n.op == "placeholder" and "tangents" in str(n.target)]
    backward = dependents(tangents)
    done = sum(Reversal(graph, backward).run(piece) for piece in pieces(graph))
    keep_overwritten(graph)
    for node in list(graph.nodes):
        if node.target in MARKS:
            expand(node)
    sort(graph)
    graph.eliminate_dead_code()
    graph.lint()
    return done


def dependents(nodes: Iterable[Node], stop: Callable[[Node], bool] | None = None) -> set[Node]:
    """Everything computed from the given nodes, themselves included, up to where ``stop`` says."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and node.op != "output" and not (stop and stop(node)):
            found.add(node)
            stack.extend(node.users)
    return found


# Finding the chains


@dataclass(frozen=True)
class Block:
    """One step of a chain in the joint graph, read off its mark.

    Attributes:
        couple: the mark.
        current: ``p_i``.
        previous: ``p_{i-1}``.
        read: what the branch sees of ``p_i``.
        branch: ``F_i(p_i)``.
        coupling: the coefficients.
        reversible: whether its states may be reconstructed.
        tolerance: relative error that a reconstructed state may have.
    """

    couple: Node
    current: Node
    previous: Node
    read: Node
    branch: Node
    coupling: Coupling
    reversible: bool
    tolerance: float

    @classmethod
    def of(cls, couple: Node) -> Block:
        """Read the arguments of a mark."""
        return cls(couple, *read_couple(couple))


def pieces(graph: Graph) -> list[list[Block]]:
    """The blocks of each chain in order, as far as they lie in this graph."""
    couples = [node for node in graph.nodes if node.target is COUPLE]
    blocks = {node: Block.of(node) for node in couples if read_couple(node).reversible}
    following: dict[Node, Block] = {}
    for block in blocks.values():
        current, previous = unlinked(block.current, block.previous)
        before = blocks.get(current)
        if before is not None and previous is before.current:
            following[before.couple] = block
    continued = {block.couple for block in following.values()}
    found = []
    for block in blocks.values():
        if block.couple not in continued:
            piece = [block]
            while piece[-1].couple in following:
                piece.append(following[piece[-1].couple])
            found.append(piece)
    return found


def anchors(piece: list[Block]) -> list[Block]:
    """The blocks in front of which the true pair of states is stored, as far as they lie here."""
    couplings = [block.coupling for block in piece]
    eps = torch.finfo(piece[0].couple.meta["val"].dtype).eps
    return [piece[place] for place in place_anchors(couplings, eps, piece[0].tolerance)]


def unlinked(current: Node, previous: Node) -> tuple[Node, Node]:
    """The two states in front of the shape-only operations behind a block, if all can be undone."""
    states: Any = (current, previous)
    while all(state.target is LINK for state in states):
        if any(steps_between(*state.args) is None for state in states):
            break
        states = tuple(state.args[0] for state in states)
    return states[0], states[1]


# Reversing one

IN_BACKWARD = {"partitioner_tag": "must_be_in_backward"}


class Reversal:
    """The walk over one chain, last block first.

    Args:
        graph: the joint graph.
        backward: the nodes that depend on a tangent.
    """

    def __init__(self, graph: Graph, backward: set[Node]) -> None:
        self.graph, self.backward = graph, backward
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        marks = [node for node in graph.nodes if node.target in MARKS]
        self.streamed = dependents(marks, backward.__contains__)
        self.claimed: set[Node] = set()  # forward nodes of the blocks walked so far
        self.seen: set[Node] = set()  # where random numbers were looked for

    def run(self, piece: list[Block]) -> int:
        """Reverse the blocks down to the first one the backward reads; return how many."""
        blocks = piece[::-1]
        members = [self.members(block) for block in blocks]
        readers = [self.readers(nodes) for nodes in members]
        count = max((i + 1 for i, users in enumerate(readers) if users), default=0)
        following, current = blocks[0].couple, blocks[0].current
        kept = anchors(piece)
        for index, block in enumerate(blocks[:count]):
            first = next(users for users in readers[index:] if users)
            with self.graph.inserting_before(min(first, key=self.position.__getitem__)):
                if index == 0:
                    current = self.another_name(current)
                goes_on, stored = index < count - 1, block in kept
                clones = self.rerun(block, current, members[index], goes_on and not stored)
                if goes_on and stored:
                    states = unlinked(block.current, block.previous)
                    following, current = map(self.another_name, states)
                elif goes_on:
                    branch = clones.get(block.branch, block.branch)
                    following, current = self.step_back(block, following, current, branch)
        return count

    def another_name(self, node: Node) -> Node:
        """What clones read instead of the very node that their originals read.

        The partitioner merges common subexpressions: with equal inputs, a clone would become its
        original again and be stored.
        """
        return emit(self.graph, ALIAS, node, **IN_BACKWARD)

    def members(self, block: Block) -> set[Node]:
        """Forward nodes of the block: what depends on its stream, and the noise it alone reads."""

        def stop(node: Node) -> bool:
            elsewhere = node in self.backward or node in self.claimed
            return elsewhere or node.target is COUPLE or not is_tensor(node)

        found = dependents([block.read], stop)
        self.claimed |= found
        return found | self.noise(found)

    def noise(self, members: set[Node]) -> set[Node]:
        """Random values that only these nodes read, and what is computed from nothing else."""
        found: set[Node] = set()
        for draw in self.draws_behind(members):
            reached = dependents([draw], lambda n: n in self.backward or n in members)
            if reached.isdisjoint(self.streamed):
                found |= reached
                found |= {node for node in draw.all_input_nodes if is_blank(node)}
        return found

    def draws_behind(self, members: set[Node]) -> list[Node]:
        """Operators that make random numbers for these nodes, whatever their stream is."""
        found = []
        stack = [source for node in members for source in node.all_input_nodes]
        while stack:
            node = stack.pop()
            if node in self.seen or node in self.streamed or node.op != "call_function":
                continue
            self.seen.add(node)
            if is_random(node) and is_small(node):
                continue  # the numbers take less memory than the state of their generator
            if draws(node):
                found.append(node)
            else:
                stack.extend(node.all_input_nodes)
        return found

    def readers(self, members: set[Node]) -> set[Node]:
        """Nodes of the backward that read a forward node of the block."""
        return {user for node in members for user in node.users if user in self.backward}

    def rerun(
        self, block: Block, current: Node, members: set[Node], with_branch: bool
    ) -> dict[Node, Node]:
        """Clone what is needed of the block, let the backward read it; return the clones."""
        stack = [node for node in members if not self.backward.isdisjoint(node.users)]
        if with_branch:
            stack.append(block.branch)
        needed: set[Node] = set()
        while stack:
            node = stack.pop()
            if node in members and node not in needed and node is not block.read:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        clones = {block.read: current}
        for node in members:  # the backward reads clones now, so nothing is left to checkpoint
            node.meta.pop("recompute", None)
        for node in sorted(needed, key=self.position.__getitem__):
            if is_random(node):
                self.repeat(node, clones)
            else:
                for seed in filter(is_seed, node.all_input_nodes):
                    clones[seed] = self.another_name(seed)
                clones[node] = self.graph.node_copy(node, lambda value: clones.get(value, value))
                clones[node].meta = {**node.meta, **IN_BACKWARD}
        for node, clone in clones.items():
            node.replace_all_uses_with(clone, delete_user_cb=lambda user: user in self.backward)
        return clones

    def repeat(self, node: Node, clones: dict[Node, Node]) -> None:
        """A random operator: the forward keeps the generator's state, the backward runs with it."""
        args: Any = (node.target, *node.args)
        kwargs: Any = node.kwargs
        meta = node.meta
        never_merge_draws()
        with self.graph.inserting_before(node):
            saving = self.graph.call_function(run_and_save_rng_state, args, kwargs)
            state = self.graph.call_function(operator.getitem, (saving, 0))
            value = self.graph.call_function(operator.getitem, (saving, 1))
        args, kwargs = map_arg((args, kwargs), lambda value: clones.get(value, value))
        again = self.graph.call_function(run_with_rng_state, (state, *args), kwargs)
        states = generator_state(meta["val"])
        for new, val in ((saving, (states, meta["val"])), (state, states), (value, meta["val"])):
            new.meta = {**meta, "val": val, **MUST_SAVE}
        again.meta = {**meta, **IN_BACKWARD}
        node.replace_all_uses_with(value)
        self.graph.erase_node(node)
        clones[value] = again

    def step_back(
        self, block: Block, following: Node, current: Node, branch: Node
    ) -> tuple[Node, Node]:
        """The reconstructed ``(p_i, p_{i-1})`` in the layout of the block before."""
        values = [Value(node, IN_BACKWARD) for node in (following, current, branch)]
        previous = block.coupling.inverse(*values).node
        previous = restrided(previous, block.previous, **IN_BACKWARD)
        states = unlinked(block.current, block.previous)
        return (
            restrided(unlink(block.current, states[0], current), states[0], **IN_BACKWARD),
            restrided(unlink(block.previous, states[1], previous), states[1], **IN_BACKWARD),
        )


def unlink(stream: Node, start: Node, value: Node) -> Node:
    """Undo the shape-only operations since ``start`` on a reconstructed state."""
    while stream is not start:
        marked: Any = stream.args
        for step in reversed(steps_between(*marked) or ()):
            value = undo(step, value, **IN_BACKWARD)
        stream = marked[0]
    return value


def is_seed(node: Node) -> bool:
    """A seed that the compiler drew for one of its operators; a clone gets the same."""
    return "inductor_lookup_seed" in str(node.target) or "inductor_seed" in str(node.target)


def draws(node: Node) -> bool:
    """Whether an operator makes random numbers, from a generator or from a seed."""
    return is_random(node) or any(is_seed(source) for source in node.all_input_nodes)


def is_blank(node: Node) -> bool:
    """Memory to draw into, cheaper to make again than to keep."""
    made = node.op == "call_function" and is_tensor(node)
    return made and not any(map(is_tensor, node.all_input_nodes))


def is_small(node: Node) -> bool:
    """Whether random numbers are no bigger than the state of the generator they come from."""
    value, state = node.meta["val"], generator_state(node.meta["val"])
    known = isinstance(value, torch.Tensor) and isinstance(value.numel(), int)
    return known and value.numel() * value.element_size() <= state.numel()


def generator_state(result: Any) -> torch.Tensor:
    """What the state of a generator looks like, for the device of a fake result."""
    fake = next(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
    device = fake.device.type
    state = (
        torch.get_rng_state()
        if device == "cpu"
        else torch.get_device_module(device).get_rng_state()
    )
    with fake.fake_mode:  # type: ignore[attr-defined]
        return torch.empty(state.shape, dtype=state.dtype)


# Before and afterwards

COPY_ = torch.ops.aten.copy_.default
CLONE = torch.ops.aten.clone.default
MUST_SAVE = {"recompute": CheckpointPolicy.MUST_SAVE}


def keep_overwritten(graph: Graph) -> None:
    """Copy the inputs that the forward writes to and clones read: they mean what was there.

    The forward reads the copy too, or the partitioner would leave copying to the backward.
    """
    written = dict.fromkeys(node.args[0] for node in graph.nodes if node.target is COPY_)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    read = read_by_clones(graph)
    for old in written:
        users = [user for user in old.users if user.target is not COPY_]
        if old.op != "placeholder" or old not in read:
            continue
        with graph.inserting_before(first):
            kept = emit(graph, CLONE, old, **MUST_SAVE)
        for user in users:
            user.replace_input_with(old, kept)


def read_by_clones(graph: Graph) -> set[Node]:
    """What clones are computed from besides streams; the backward may compute it again, too."""
    found: set[Node] = set()
    stack = [source for node in graph.nodes if is_clone(node) for source in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in found and node.target not in MARKS:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def is_clone(node: Node) -> bool:
    """Whether a node was made for the backward here."""
    return node.meta.get("partitioner_tag") == IN_BACKWARD["partitioner_tag"]


def never_merge_draws() -> None:
    """Tell the partitioner that two draws with equal arguments are two draws."""
    from torch._functorch.compile_utils import rand_ops

    if run_and_save_rng_state not in rand_ops:
        rand_ops.append(run_and_save_rng_state)


ALIAS = torch.ops.aten.alias.default


def expand(node: Node) -> None:
    """Replace a mark by what it stands for."""
    if node.target is COUPLE:
        block = Block.of(node)
        meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}
        with node.graph.inserting_before(node):
            values = [Value(n, meta) for n in (block.current, block.previous, block.branch)]
            result = block.coupling.step(*values).node
    else:
        result = node.args[1 if node.target is LINK else 0]
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def sort(graph: Graph) -> None:
    """Put every node behind its inputs, otherwise in the order they are in."""
    order: nx.DiGraph[Node] = nx.DiGraph()
    position = {node: index for index, node in enumerate(graph.nodes)}
    order.add_nodes_from(position)
    order.add_edges_from((source, node) for node in position for source in node.all_input_nodes)
    nodes = list(nx.lexicographical_topological_sort(order, key=position.__getitem__))
    for before, node in pairwise(nodes):
        before.append(node)
