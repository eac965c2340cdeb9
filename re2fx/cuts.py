"""Refuse to rewire a piece of a chain.

A chain that a graph break splits would be rewired as two chains with a readout between them:
another function than the whole chain's, and another one in each version of torch. A value that may
be a stream must therefore not cross the boundary of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.fx import Node

from . import ops
from .errors import ChainCutError
from .graph import Flow
from .origin import Origin
from .plan import Plan


def check_cuts(flow: Flow, plan: Plan, origin: Origin) -> None:
    """Raise if a residual may lie on both sides of a graph break.

    Args:
        flow: the normalised graph.
        plan: the skip-adds found in it.
        origin: what the graph is a piece of.

    Raises:
        ChainCutError: names the break, the residual and the remedy.
    """
    if not origin.partial:
        return
    adds = [flow.by_name[r.add] for chain in plan.chains for r in chain.residuals]
    adds += [flow.by_name[refusal.node] for refusal in plan.refusals]
    halves = [flow.by_name[miss.node] for miss in plan.misses if miss.rule == "two sources"]
    halves = [add for add in halves if is_activation_sum(add)]
    if origin.before is not None or origin.ddp:
        for add in (*adds, *halves):
            if reaches(flow, add, flow.inputs, enters):
                raise cut(flow, add, origin, origin.before or origin.after)
    for add in adds:
        if reaches(flow, add, flow.users, leaves):
            raise cut(flow, add, origin, origin.after or origin.before)


def enters(flow: Flow, node: Node) -> bool:
    """Whether a value comes from another piece."""
    return node.op == "placeholder" and not flow.is_shape(node)


def leaves(flow: Flow, node: Node) -> bool:
    """Whether a value goes to another piece."""
    return node.op == "output"


def reaches(
    flow: Flow,
    start: Node,
    neighbours: Callable[[Node], Iterable[Node]],
    found: Callable[[Flow, Node], bool],
) -> bool:
    """Whether a boundary is reached from a value through what a stream may pass between blocks."""
    stack, seen = [start], set()
    while stack:
        node = stack.pop()
        if found(flow, node):
            return True
        if node in seen or not passes_stream(flow, node):
            continue
        seen.add(node)
        stack.extend(neighbours(node))
    return False


def passes_stream(flow: Flow, node: Node) -> bool:
    """Sums, activations, constant factors and shape-only operations, between two residuals."""
    return (
        ops.is_add(node)
        or ops.is_activation(node, flow.root)
        or ops.is_bijection(node)
        or ops.constant_factor(node) is not None
    )


def is_activation_sum(node: Node) -> bool:
    """Not a sum of losses."""
    value = node.meta.get("example_value")
    return not isinstance(value, Tensor) or value.dim() > 1


def cut(flow: Flow, add: Node, origin: Origin, where: str | None) -> ChainCutError:
    """The error."""
    rewire = "rewire first: torch.compile(re2fx.transform(model), backend='re2fx')"
    if origin.ddp:
        remedy = f"Set torch._dynamo.config.optimize_ddp = False, or {rewire}, then wrap."
    else:
        remedy = (
            "Remove the graph break (fullgraph=True shows what it is), compile the whole model, or "
            f"{rewire}."
        )
    return ChainCutError(
        f"{origin.name}: the residual at {flow.location(add)} may go on beyond this graph, which "
        f"Dynamo cut at {where}. Rewiring the pieces one by one would compute another function "
        f"than rewiring the whole chain. {remedy}"
    )
