"""Activation checkpoints that the user's model has already.

Dynamo keeps what `torch.utils.checkpoint` runs in a graph of its own. One within a branch stays: it
is run again as a whole. One that has residuals inside, as around a block, would hide them; its body
is written out instead, and what is rewired of it needs no checkpoint.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from . import ops
from .graph import Flow

Bodies = Callable[[str], Any]


def write_out_checkpoints(graph: Graph, body_of: Bodies) -> list[Node]:
    """Replace every checkpoint that hides residuals by its body; changes the graph.

    Args:
        graph: of Dynamo.
        body_of: the module that a name stands for in the graph.

    Returns:
        the new nodes.
    """
    found: list[Node] = []
    pending = [node for node in graph.nodes if is_checkpoint(node)]
    while pending:
        call = pending.pop()
        body = body_of(str(call.args[0].target))
        if hides_residuals(body) and all(map(selects, call.users)):
            new = write_out(graph, call, body)
            found += new
            pending += [node for node in new if is_checkpoint(node)]
    return found


def is_checkpoint(node: Node) -> bool:
    """Whether a node runs a checkpointed graph."""
    name = getattr(node.target, "_name", "") if node.op == "call_function" else ""
    held = bool(node.args) and isinstance(node.args[0], Node) and node.args[0].op == "get_attr"
    return name == "tag_activation_checkpoint" and held


def selects(node: Node) -> bool:
    """Whether a node takes one of several results."""
    return node.op == "call_function" and node.target is operator.getitem


def hides_residuals(body: Any) -> bool:
    """Whether a residual lies in a graph, or in the body of a checkpoint in it."""
    if not isinstance(body, GraphModule):
        return False
    flow = Flow(body.graph, body)
    for node in flow.nodes:
        if ops.is_add(node) and hides_residual(flow, node):
            return True
        if is_checkpoint(node) and hides_residuals(getattr(body, str(node.args[0].target), None)):  # type: ignore[union-attr]
            return True
    return False


def hides_residual(flow: Flow, add: Node) -> bool:
    """Whether one operand of a sum derives from the other through something that reads an input."""
    operands = flow.inputs(add)
    if len(operands) != 2 or not is_activation_sum(add):
        return False
    for skip, branch in (operands, operands[::-1]):
        region = flow.between(skip, [branch])
        if any(n.op == "placeholder" and n is not skip for m in region for n in flow.inputs(m)):
            return True
    return False


def is_activation_sum(node: Node) -> bool:
    """Not a sum of losses."""
    value = node.meta.get("example_value")
    return not isinstance(value, Tensor) or value.dim() > 0


def write_out(graph: Graph, call: Node, body: GraphModule) -> list[Node]:
    """Put the nodes of a checkpoint's body in its place."""
    held = call.args[0]
    assert isinstance(held, Node), "only such calls are written out"
    given = iter(call.args[1:])
    copies: dict[Node, Any] = {}
    new: list[Node] = []
    with graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "output":
                results = node.args[0]
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                if node.op == "get_attr":
                    copies[node].target = f"{held.target}.{node.target}"
                new.append(copies[node])
    for user in list(call.users):
        result = results[user.args[1]]
        user.replace_all_uses_with(copies[result] if isinstance(result, Node) else result)
        graph.erase_node(user)
    graph.erase_node(call)
    if not held.users:
        graph.erase_node(held)
    return new
