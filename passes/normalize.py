"""Say the same program in one spelling, so that detection need not know the others.

    before                          after
    y = relu_(x); z = f(x)          y = relu_(x); z = f(y)        reads go through the write
    out += identity                 out_1 = out + identity        where nobody can tell
    x.add_(f, alpha=2)              torch.add(x, f, alpha=2)
    x -= f                          x_1 = x - f
    x * y, which nobody reads
    nn.Flatten(2)(x)                x.flatten(2, -1)
    w = x.float(); w + f(x)         w = x.float(); w + f(w.to(x's type))

Values, RNG and side effects stay the same, bit for bit. A new graph is returned.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from re2fx import ops
from re2fx.aliases import Aliases
from re2fx.casts import read_behind_widenings
from re2fx.graph import Flow, copy_graph


def normalize(graph: Graph, root: nn.Module) -> Graph:
    """Return an equal graph in which in-place writes are visible as dataflow.

    Args:
        graph: any FX graph; left as it is.
        root: the module its targets are looked up in.
    """
    new = copy_graph(graph)
    drop_dead(new)
    call_reshapes_as_methods(new, root)
    read_through_writes(new, root)
    write_sums_out_of_place(new, root)
    read_behind_widenings(new, root)
    new.lint()
    return new


def drop_dead(graph: Graph) -> None:
    """Remove arithmetic that nobody reads, which would look like a leak of what it reads."""
    for node in reversed(graph.nodes):
        dead = not node.users and ops.is_pure(node) and node.target is not operator.getitem
        if dead and not ops.reads_shape_only(node):
            graph.erase_node(node)


def call_reshapes_as_methods(graph: Graph, root: nn.Module) -> None:
    """Replace modules that only reshape by what they call."""
    for node in list(graph.nodes):
        module = ops.module_of(node, root)
        arguments = reshape_arguments(module)
        if module is None or arguments is None or ops.has_hooks(module):
            continue
        if len(node.args) != 1 or node.kwargs:
            continue
        with graph.inserting_before(node):
            new = graph.call_method(type(module).__name__.lower(), (node.args[0], *arguments))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def reshape_arguments(module: nn.Module | None) -> tuple[Any, ...] | None:
    """What ``nn.Flatten`` or ``nn.Unflatten`` gives to the method of its name."""
    if type(module) is nn.Flatten:
        return (module.start_dim, module.end_dim)
    if type(module) is nn.Unflatten and isinstance(module.dim, int):
        return (module.dim, tuple(module.unflattened_size))
    return None


def read_through_writes(graph: Graph, root: nn.Module) -> None:
    """After ``y = op_(x)`` both names are one tensor; let later reads of ``x`` say ``y``."""
    flow = Flow(graph, root)
    for node in flow.nodes:
        target = written(node, root)
        if target is None or node.target is operator.setitem or target.op == "get_attr":
            continue
        if flow.is_number(target):  # ``h += 1`` makes a new one
            continue
        for user in list(target.users):
            if flow.position[user] > flow.position[node]:
                user.replace_input_with(target, node)


def written(node: Node, root: nn.Module) -> Node | None:
    """The value an in-place operation overwrites and returns."""
    if not ops.is_inplace(node, root):
        return None
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    return first if isinstance(first, Node) else None


def write_sums_out_of_place(graph: Graph, root: nn.Module) -> None:
    """Replace in-place sums where no other value shares their memory afterwards."""
    flow = Flow(graph, root)
    aliases = Aliases(flow)
    for node in flow.nodes:
        if not ops.is_inplace_sum(node) or flow.is_shape(node) or not aliases.functional(node):
            continue
        scaled = node.kwargs or len(node.args) != 2
        plain, full = (
            (operator.sub, torch.sub) if ops.is_subtraction(node) else (operator.add, torch.add)
        )
        with graph.inserting_before(node):
            new = graph.call_function(full if scaled else plain, node.args, node.kwargs)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
