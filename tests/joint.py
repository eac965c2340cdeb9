"""Rewired networks through AOTAutograd and the pass that reverses joint graphs, watched.

No code is generated: the graphs run as they are. Every joint graph is checked on its way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from functorch.compile import aot_module, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch.fx import Graph, GraphModule, Node

import re2fx
from re2fx.codegen import compile_graph
from re2fx.module import LiveRoot
from re2fx.marks import COUPLE, MARKS
from re2fx.passes.mark import mark
from re2fx.passes.reverse import reverse

from .compare import Loss, Outcome, assert_same, step, weighted

Edit = Callable[[Graph], object]


class Marked(nn.Module):
    """A rewired network in its present mode, its streams as marks."""

    def __init__(self, rev: re2fx.RewiredModule, reversible: bool = True) -> None:
        super().__init__()
        rewired = rev._rewired[rev.training]
        self.rev = rev
        self.marked = mark(rewired.graph, rev._live._model, rewired.wirings, reversible)
        self.function = compile_graph(self.marked, "marked")
        for name, constant in rev._live._constants.items():
            self.register_buffer(name, constant, persistent=False)

    def forward(self, *args: Any) -> Any:
        root = LiveRoot(self.rev._live._model, {k: getattr(self, k) for k in self.rev._live._constants})
        return self.function(root, *self.rev._inputs.flatten(args, {}))


@dataclass
class Watched:
    """What happened to the graphs of one network.

    Attributes:
        rev: the network.
        run: the compiled network.
        number: how many parameters and buffers come before the inputs.
        blocks: how many blocks each joint graph reconstructs.
        joints: the joint graphs, reversed.
        forwards, backwards: what the partitioner made of them.
        outputs: how many outputs of each forward are not saved tensors.
        inference: forward graphs without a backward.
    """

    rev: re2fx.RewiredModule
    run: Callable[..., Any] = field(init=False)
    number: int = 0
    blocks: list[int] = field(default_factory=list)
    joints: list[Graph] = field(default_factory=list)
    forwards: list[Graph] = field(default_factory=list)
    backwards: list[Graph] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    inference: list[Graph] = field(default_factory=list)

    @property
    def saved(self) -> list[Node]:
        """What the last forward gives to its backward."""
        (values,) = self.forwards[-1].output_node().args
        assert isinstance(values, (tuple, list))
        return [value for value in values[self.outputs[-1] :] if isinstance(value, Node)]

    def roles(self) -> dict[str, list[Node]]:
        """The saved tensors by what they are."""
        places = [node for node in self.forwards[-1].nodes if node.op == "placeholder"]
        found: dict[str, list[Node]] = {}
        for node in self.saved:
            found.setdefault(self.role(node, places), []).append(node)
        return found

    def role(self, node: Node, places: list[Node]) -> str:
        """``"member"`` or ``"input"``, seen directly or through views, or what made the tensor."""
        source = node
        while source.target in VIEWS:
            source = source.args[0]  # type: ignore[assignment]
        if source.op == "placeholder":
            return "member" if places.index(source) < self.number else "input"
        if node.target is operator.getitem:
            made = node.args[0].target  # type: ignore[union-attr]
            return "state" if made is run_and_save_rng_state else str(made)
        return "stream" if node.meta.get("stream") else str(node.target)


VIEWS = {
    torch.ops.aten.t.default, torch.ops.aten.permute.default, torch.ops.aten.transpose.int,
    torch.ops.aten.view.default, torch.ops.aten.alias.default, torch.ops.aten.expand.default,
}  # fmt: skip


def size(nodes: list[Node]) -> int:
    """Bytes of tensors."""
    values = [node.meta["val"] for node in nodes]
    return sum(value.numel() * value.element_size() for value in values)


def watch(
    rev: re2fx.RewiredModule, *, reversing: bool = True, edit: Edit | None = None
) -> Watched:
    """Compile a network when it is called.

    Args:
        rev: a rewired network; runs in the mode it is in.
        reversing: whether the joint graph is reversed; if not, marks only become arithmetic.
        edit: something to do to the reversed graph before it is partitioned.
    """
    marked = Marked(rev, reversing)
    members = [*marked.parameters(), *marked.buffers()]
    watched = Watched(rev, number=len({id(member) for member in members}))

    def partition(joint: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        assert any(node.target in MARKS for node in joint.graph.nodes)
        for node in joint.graph.nodes:
            node.meta["original"] = True
            node.meta["stream"] = node.target is COUPLE
        watched.blocks.append(reverse(joint.graph))
        watched.joints.append(joint.graph)
        check_joint(joint.graph)
        if edit is not None:
            edit(joint.graph)
        joint.recompile()
        pair = min_cut_rematerialization_partition(joint, inputs, **kwargs)
        watched.outputs.append(kwargs["num_fwd_outputs"])
        for graphs, half in zip((watched.forwards, watched.backwards), pair, strict=True):
            graphs.append(half.graph)
        return pair

    def keep(module: GraphModule, inputs: Any) -> Any:
        return make_boxed_func(module)

    def infer(module: GraphModule, inputs: Any) -> Any:
        reverse(module.graph)
        module.recompile()
        watched.inference.append(module.graph)
        return make_boxed_func(module)

    watched.run = aot_module(
        marked,
        keep,
        keep,
        partition,
        keep_inference_input_mutations=True,
        inference_compiler=infer,
    )
    return watched


def check_joint(graph: Graph) -> None:
    """What holds of every reversed joint graph."""
    graph.lint()
    assert not any(node.target in MARKS for node in graph.nodes)
    new = [n for n in graph.nodes if "original" not in n.meta and n.op == "call_function"]
    for node in graph.nodes:
        if node.meta.get("partitioner_tag") == "must_be_in_backward":
            assert node.op == "call_function"
    saving = [n for n in graph.nodes if n.target is run_and_save_rng_state]
    again = [n for n in graph.nodes if n.target is run_with_rng_state]
    assert [states_of(n) for n in saving] == [states_of(n) for n in again], (saving, again)


def states_of(node: Node) -> Node: ...


@contextmanager
def running(watched: Watched) -> Iterator[None]:
    """Let the network run compiled."""
    watched.rev.__dict__["forward"] = watched.run
    try:
        yield
    finally:
        del watched.rev.__dict__["forward"]


def outcome(watched: Watched, *inputs: Any, loss: Loss = weighted, seed: int = 0) -> Outcome:
    """What a compiled step leaves behind."""
    with running(watched):
        return step(watched.rev, "reversible", *inputs, loss=loss, seed=seed)


def assert_compiled_equals_store(
    rev: re2fx.RewiredModule, *inputs: Any, tolerance: float = 1e-10, loss: Loss = weighted
) -> Watched:
    """The compiled network against ordinary autograd on the same one."""
    watched = watch(rev)
    got = outcome(watched, *inputs, loss=loss)
    assert_same(got, step(rev, "store", *inputs, loss=loss), tolerance)
    return watched
