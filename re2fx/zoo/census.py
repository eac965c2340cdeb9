"""Count the skip-adds of a graph without asking the planner.

A skip-add is an addition of two activations of which one is an ancestor of the other, with a
trained operation on the way. Ancestors are sets of bits, one per node; nothing here knows of
chains, aliases or legality, so that what the planner overlooks is seen.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import nn
from torch.fx import Graph, Node

from ..graph import lookup
from ..plan import Plan

_ADDITIONS = {
    operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, torch.subtract,
    torch.rsub, torch.addcmul, torch.addcdiv, torch.lerp, torch.addmm, torch.baddbmm,
    "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__",
    "addcmul", "addcmul_", "lerp", "lerp_", "addmm", "baddbmm",
    torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, torch.ops.aten.sub.Tensor,
}  # fmt: skip
_NUMBERS = {"size", "dim", "numel", "ndimension", "__len__", torch.ops.aten.sym_size.int}
_LIKE = {
    "new_ones", "new_zeros", "new_full", "new_empty", torch.zeros_like,
    torch.ones_like, torch.full_like, torch.empty_like,
}  # fmt: skip
_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


def skip_adds(graph: Graph, root: nn.Module) -> list[str]:
    """The names of the skip-adds of a graph.

    Args:
        graph: any FX graph.
        root: the module that ``call_module`` and ``get_attr`` targets are looked up in.
    """
    nodes = list(graph.nodes)
    above = _ancestors(nodes)
    trained = sum(1 << i for i, node in enumerate(nodes) if _trains(node, root))
    place = {node: i for i, node in enumerate(nodes)}
    live = _activations(nodes)
    found = []
    for node in nodes:
        if node.target not in _ADDITIONS:
            continue
        operands = [n for n in dict.fromkeys(node.all_input_nodes) if n in live]
        pairs = ((a, b) for a in operands for b in operands if a is not b)
        if any(_leads(above, trained, place[a], place[b]) for a, b in pairs):
            found.append(node.name)
    return found


def overlooked(graph: Graph, root: nn.Module, plan: Plan) -> list[str]:
    """Skip-adds that a plan neither rewires nor refuses.

    Args:
        graph: the graph that the plan speaks of.
        root: what its targets are looked up in.
        plan: what was found in it.
    """
    residuals = [residual for chain in plan.chains for residual in chain.residuals]
    known = {refusal.node for refusal in plan.refusals}
    known |= {name for r in residuals for name in (r.add, *r.dropped)}
    known |= {addition.name for r in residuals for addition in r.inside}
    return [name for name in skip_adds(graph, root) if name not in known]


def _ancestors(nodes: list[Node]) -> list[int]:
    """Per node the set of nodes it is computed from, itself included."""
    above: dict[Node, int] = {}
    for place, node in enumerate(nodes):
        bits = 1 << place
        for value in node.all_input_nodes:
            bits |= above[value]
        above[node] = bits
    return [above[node] for node in nodes]


def _activations(nodes: Iterable[Node]) -> set[Node]:
    """What depends on an input's values, not just on its shape."""
    live: set[Node] = set()
    for node in nodes:
        is_attribute = node.target is getattr and node.args[1] in _ATTRIBUTES
        if is_attribute or node.target in _NUMBERS or node.target in _LIKE:
            continue
        if node.op == "placeholder" or any(value in live for value in node.all_input_nodes):
            live.add(node)
    return live


def _trains(node: Node, root: nn.Module) -> bool:
    """Whether a node calls a module with parameters, or reads a parameter."""
    if node.op == "call_module":
        return any(True for _ in root.get_submodule(str(node.target)).parameters())
    reads = (value for value in node.all_input_nodes if value.op == "get_attr")
    return any(isinstance(lookup(root, str(value.target)), nn.Parameter) for value in reads)


def _leads(above: list[int], trained: int, start: int, end: int) -> bool:
    """Whether a trained operation lies on a way from one node to the other."""
    if not above[end] >> start & 1:
        return False
    between = above[end] & trained & ~((2 << start) - 1)
    while between:
        lowest = (between & -between).bit_length() - 1
        if above[lowest] >> start & 1:
            return True
        between &= between - 1
    return False
