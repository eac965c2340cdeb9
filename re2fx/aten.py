"""ATen graphs: writing arithmetic into them, and undoing shape-only operators.

A node of an ATen graph carries a fake tensor under ``meta["val"]``; what is written here does too,
because the partitioner weighs nodes by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

aten = torch.ops.aten

_RESHAPES = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.clone.default,
    aten.alias.default, aten.contiguous.default, aten._to_copy.default,
}  # fmt: skip


def emit(graph: Graph, target: Any, *args: Any, **meta: Any) -> Node:
    """Append an operator at the graph's insertion point.

    Args:
        graph: an ATen graph.
        target: the operator.
        args: its arguments, nodes among them.
        meta: entries of the new node's ``meta``.
    """
    node = graph.call_function(target, args)
    values = pytree.tree_map_only(Node, lambda n: n.meta["val"], args)
    fakes = [v.fake_mode for v in pytree.tree_leaves(values) if hasattr(v, "fake_mode")]
    with fakes[0]:
        node.meta = {**meta, "val": target(*values)}
    return node


@dataclass(frozen=True)
class Value:
    """A node that understands arithmetic, so that `Coupling` can be written into a graph.

    Attributes:
        node: the value.
        meta: entries for the ``meta`` of every node the arithmetic makes.
    """

    node: Node
    meta: dict[str, Any]

    def _apply(self, target: Any, other: Any) -> Value:
        operand = other.node if isinstance(other, Value) else other
        return Value(emit(self.node.graph, target, self.node, operand, **self.meta), self.meta)

    def __add__(self, other: Any) -> Value:
        return self._apply(aten.add.Tensor, other)

    def __sub__(self, other: Any) -> Value:
        return self._apply(aten.sub.Tensor, other)

    def __mul__(self, other: Any) -> Value:
        return self._apply(aten.mul.Tensor, other)

    def __truediv__(self, other: Any) -> Value:
        return self._apply(aten.div.Tensor, other)


def steps_between(before: Node, after: Node) -> list[Node] | None:
    """The shape-only operators that make ``after`` of ``before``, or None if there are others."""
    steps: list[Node] = []
    node: Any = after
    while node is not before:
        known = isinstance(node, Node) and (node.target in _RESHAPES or order(node) is not None)
        if not known:
            return None
        steps.append(node)
        node = node.args[0]
    return steps[::-1]


def order(node: Node) -> list[int] | None:
    """Where each dimension of the result comes from, if the operator permutes."""
    rank = node.meta["val"].dim() if isinstance(node.meta.get("val"), Tensor) else 0
    dims = list(range(rank))
    if node.target is aten.permute.default:
        return [int(dim) % rank for dim in node.args[1]]  # type: ignore
    if node.target is aten.transpose.int:
        i, j = (int(dim) % rank for dim in node.args[1:3])  # type: ignore
        dims[i], dims[j] = dims[j], dims[i]
        return dims
    if node.target is aten.t.default:
        return dims[::-1]
    return None


def undo(step: Node, value: Node, **meta: Any) -> Node:
    """What a shape-only operator was given, from what it gave."""
    graph, permuted = value.graph, order(step)
    if permuted is not None:
        inverse = [permuted.index(dim) for dim in range(len(permuted))]
        return emit(graph, aten.permute.default, value, inverse, **meta)
    source = step.args[0]
    assert isinstance(source, Node), "a shape-only operator has an input"
    sizes = [number(source, aten.sym_size.int, dim) for dim in range(source.meta["val"].dim())]
    return emit(graph, aten.reshape.default, value, sizes, **meta)


def restrided(value: Node, like: Node, **meta: Any) -> Node:
    """A reconstructed state in the memory layout it had, unless that is known to be the same."""
    have, want = value.meta["val"], like.meta["val"]
    layouts = zip(want.shape, have.stride(), want.stride(), strict=True)
    if all(is_known(size == 1) or is_known(old == new) for size, old, new in layouts):
        return value
    graph = value.graph
    shape = [number(like, aten.sym_size.int, dim) for dim in range(want.dim())]
    repeated = [dim for dim, step in enumerate(want.stride()) if is_zero(step)]
    if repeated:  # one of the equal parts, seen as often as it was
        for dim in repeated:
            value = emit(graph, aten.slice.Tensor, value, dim, 0, 1, **meta)
        return emit(graph, aten.expand.default, value, shape, **meta)
    strides = [number(like, aten.sym_stride.int, dim) for dim in range(want.dim())]
    empty = emit(graph, aten.new_empty_strided.default, value, shape, strides, **meta)
    return emit(graph, aten.copy.default, empty, value, **meta)


def is_known(fact: Any) -> bool:
    """Whether a statement about sizes is true without a look at them."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(fact)


def number(like: Node, target: Any, dim: int) -> Any:
    """A size or a stride of a node: itself, or a node that says it."""
    value = like.meta["val"]
    known = (value.shape if target is aten.sym_size.int else value.stride())[dim]
    return known if isinstance(known, int) else emit(like.graph, target, like, dim)


def is_zero(step: Any) -> bool:
    """Whether a dimension is repeated, not stored."""
    return isinstance(step, int) and step == 0


def is_tensor(node: Node) -> bool:
    """Whether a node stands for tensors and not for a number."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) for leaf in leaves)


def is_random(node: Node) -> bool:
    """Whether an operator draws from a global generator when it runs.

    Fused attention is tagged as random for its dropout, which is mostly off.
    """
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded not in getattr(
        node.target, "tags", ()
    ):
        return False
    return bool(argument(node, "dropout_p") != 0)


def argument(node: Node, name: str) -> Any:
    """An argument of an operator by its name in the schema, its default if it is not given."""
    for index, declared in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if declared.name == name:
            given = node.args[index] if index < len(node.args) else declared.default_value
            return node.kwargs.get(name, given)
    return None
