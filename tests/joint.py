"""Rewired networks through AOTAutograd and the pass that reverses joint graphs, watched.

No code is generated: the graphs run as they are. Every joint graph is checked on its way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch.fx import Graph, GraphModule, Interpreter, Node

import re2fx
from re2fx.codegen import compile_graph
from re2fx.marks import COUPLE, MARKS
from re2fx.module import LiveRoot
from re2fx.passes.mark import mark
from re2fx.passes.reverse import reverse

from .compare import Loss, Outcome, assert_same, step, weighted

aten = torch.ops.aten

VIEWS = {
    aten.t.default, aten.permute.default, aten.transpose.int, aten.view.default,
    aten._unsafe_view.default, aten.alias.default, aten.detach.default, aten.expand.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int,
}  # fmt: skip


class Marked(nn.Module):
    """A rewired network in its present mode, its streams as marks."""

    def __init__(self, rev: re2fx.RewiredModule, reversible: bool = True) -> None:
        super().__init__()
        rewired = rev._rewired[rev.training]
        self.rev = rev
        self.marked = mark(rewired.graph, rev._live._model, rewired.wirings, reversible)
        self.function = compile_graph(self.marked, "marked")
        self.constants = list(rev._live._constants)
        for name, value in rev._live._constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, *args: Any) -> Any:
        constants = {name: getattr(self, name) for name in self.constants}
        root = LiveRoot(self.rev._live._model, constants)
        return self.function(root, *self.rev._inputs.flatten(args, {}))


class Checking(Interpreter):
    """Runs a backward; what was put into it must come out the way the graph says."""

    def run_node(self, n: Node) -> Any:
        """Compare shapes and memory layouts."""
        result, value = super().run_node(n), n.meta.get("val")
        if isinstance(value, Tensor) and n.meta.get("partitioner_tag") == IN_BACKWARD:
            assert result.shape == value.shape, n.format_node()
            layouts = zip(result.shape, result.stride(), value.stride(), strict=True)
            same = all(size == 1 or have == want for size, have, want in layouts)
            assert same, f"{n.format_node()}: {result.stride()} instead of {value.stride()}"
        return result


IN_BACKWARD = "must_be_in_backward"


@dataclass
class Watched:
    """What happened to the graphs of one network.

    Attributes:
        rev: the network.
        members: how many parameters and buffers it has.
        run: the compiled network.
        blocks: how many blocks each joint graph reconstructs.
        joints: the joint graphs, reversed.
        forwards: what the partitioner made of them.
        inference: forward graphs without a backward.
        saved: what each forward graph gives to its backward.
        results: the same, the tensors of the last call.
    """

    rev: re2fx.RewiredModule
    members: int
    run: Callable[..., Any] = field(init=False)
    blocks: list[int] = field(default_factory=list)
    joints: list[Graph] = field(default_factory=list)
    forwards: list[Graph] = field(default_factory=list)
    inference: list[Graph] = field(default_factory=list)
    saved: list[list[Node]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)

    def roles(self) -> dict[str, list[Node]]:
        """What the last forward saves: members, inputs, stream states, random states, others.

        Views of a tensor count as the tensor.
        """
        found: dict[str, list[Node]] = {}
        for node in self.saved[-1]:
            found.setdefault(self.role(node), []).append(node)
        return found

    def counts(self) -> dict[str, int]:
        """How many of each, parameters left out."""
        return {name: len(nodes) for name, nodes in self.roles().items() if name != "member"}

    def role(self, node: Node) -> str:
        """What a saved tensor is."""
        source: Any = node
        while source.target in VIEWS:
            source = source.args[0]
        if source.op == "placeholder":
            places = [place for place in source.graph.nodes if place.op == "placeholder"]
            return "member" if places.index(source) < self.members else "input"
        if source.meta.get("stream"):
            return "stream"
        target = source.target
        if target is operator.getitem:
            target = source.args[0].target
        return "state" if target is run_and_save_rng_state else str(target)


def size(nodes: list[Node]) -> int:
    """Bytes of tensors."""
    values = [node.meta["val"] for node in nodes]
    return sum(value.numel() * value.element_size() for value in values)


def watch(
    rev: re2fx.RewiredModule,
    *,
    reversible: bool = True,
    dynamic: bool = False,
    edit: Callable[[Graph], object] | None = None,
) -> Watched:
    """Compile a network when it is first called.

    Args:
        rev: a rewired network; runs in the mode it is in.
        reversible: what the marks say.
        dynamic: whether sizes are symbols.
        edit: something to do to the reversed graph before it is partitioned.
    """
    marked = Marked(rev, reversible)
    members = {**dict(marked.named_parameters()), **dict(marked.named_buffers())}
    watched = Watched(rev, len(members))

    def partition(joint: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        before = set(joint.graph.nodes)
        for node in joint.graph.nodes:
            node.meta["stream"] = node.target is COUPLE
        watched.blocks.append(reverse(joint.graph))
        watched.joints.append(joint.graph)
        check_joint(joint.graph, before)
        if edit is not None:
            edit(joint.graph)
        joint.recompile()
        forward, backward = min_cut_rematerialization_partition(joint, inputs, **kwargs)
        values: Any = forward.graph.output_node().args[0]
        number = kwargs["num_fwd_outputs"]
        watched.forwards.append(forward.graph)
        watched.saved.append([value for value in values[number:] if isinstance(value, Node)])

        def run_forward(*args: Any) -> Any:
            results = forward(*args)
            watched.results[:] = results[number:]
            return results

        compiled.extend((run_forward, backward if dynamic else Checking(backward).run))
        return forward, backward

    def infer(module: GraphModule, inputs: Any) -> Any:
        reverse(module.graph)
        module.recompile()
        watched.inference.append(module.graph)
        return make_boxed_func(module)

    compiled: list[Any] = []
    function = aot_function(
        lambda members, *args: torch.func.functional_call(marked, members, args, tie_weights=False),
        lambda module, inputs: make_boxed_func(compiled[-2]),
        lambda module, inputs: make_boxed_func(compiled[-1]),
        partition,
        num_params_buffers=len(members),
        keep_inference_input_mutations=True,
        inference_compiler=infer,
        dynamic=dynamic,
    )
    watched.run = partial(function, members)
    return watched


def check_joint(graph: Graph, before: set[Node]) -> None:
    """What holds of every reversed joint graph.

    Args:
        graph: the graph.
        before: the nodes it had before it was reversed.
    """
    graph.lint()
    assert not any(node.target in MARKS for node in graph.nodes)
    for node in graph.nodes:
        if node not in before and node.meta.get("partitioner_tag") != IN_BACKWARD:
            assert is_of_the_forward(node), node.format_node()
    saving = [node for node in graph.nodes if node.target is run_and_save_rng_state]
    again = [node for node in graph.nodes if node.target is run_with_rng_state]
    assert len(saving) == len(again)
    for node in again:
        state, target = node.args[:2]
        assert state.args[0].target is run_and_save_rng_state
        assert state.args[1] == 0
        assert state.args[0].args[0] is target
        assert list(state.users) == [node], "a state is used once"


def is_of_the_forward(node: Node) -> bool:
    """Whether a new node is one of those that replace forward nodes."""
    symbols = (aten.sym_size.int, aten.sym_stride.int)
    if node.target in (run_and_save_rng_state, *symbols) or node.meta.get("stream"):
        return True
    source: Any = node.args[0]
    if node.target is operator.getitem:
        return source.target is run_and_save_rng_state
    return node.target is aten.clone.default and source.op == "placeholder"


@contextmanager
def running(rev: re2fx.RewiredModule, run: Callable[..., Any]) -> Iterator[None]:
    """Let a function stand in for the network's forward."""
    rev.__dict__["forward"] = run
    try:
        yield
    finally:
        del rev.__dict__["forward"]


def outcome(
    rev: re2fx.RewiredModule,
    run: Callable[..., Any],
    *inputs: Any,
    loss: Loss = weighted,
    seed: int = 0,
) -> Outcome:
    """What a step leaves behind in which a function stands in for the network's forward."""
    with running(rev, run):
        return step(rev, str(rev.memory), *inputs, loss=loss, seed=seed)


def assert_compiled_equals_store(
    rev: re2fx.RewiredModule,
    *inputs: Any,
    tolerance: float = 1e-10,
    loss: Loss = weighted,
    dynamic: bool = False,
) -> Watched:
    """The compiled network, reversed, against ordinary autograd on the same network."""
    watched = watch(rev, dynamic=dynamic)
    got = outcome(rev, watched.run, *inputs, loss=loss)
    assert_same(got, step(rev, "store", *inputs, loss=loss), tolerance)
    return watched
