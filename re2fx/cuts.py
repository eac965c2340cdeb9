"""Refuse to rewire a piece of a chain.

A chain that a graph break splits would be rewired as two chains with a readout between them:
another function than the whole chain's, and another one in each version of torch. A value that may
be a stream must therefore not cross the boundary of a piece.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import ops
from .checkpoints import hides_residual, is_activation_sum
from .dynamo import Lifted, locate
from .errors import ChainCutError, Re2fxWarning
from .graph import Flow
from .origin import Origin
from .plan import Plan

REWIRE = "rewire first: torch.compile(re2fx.transform(model), backend='re2fx')"
CHOSEN = ("leaf", "not selected")  # the user's word, in this piece and in every other


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
    refused = [r for r in plan.refusals if r.rule not in CHOSEN]
    walls = {flow.by_name[r.node] for r in plan.refusals if r.rule in CHOSEN}
    halves = [flow.by_name[miss.node] for miss in plan.misses if miss.rule == "two sources"]
    halves = [add for add in halves if is_activation_sum(add)]
    if origin.before is not None or origin.ddp:
        for add in (*adds, *(flow.by_name[r.node] for r in refused), *halves):
            if reaches(flow, add, flow.inputs, enters, walls):
                raise cut(flow, add, origin, origin.before or origin.after)
    # A projection starts a chain; the piece that goes on with it meets it where it enters.
    adds += [flow.by_name[r.node] for r in refused if r.rule != "projection"]
    for add in adds:
        if reaches(flow, add, flow.users, leaves, walls):
            raise cut(flow, add, origin, origin.after or origin.before)


def warn_of_limit(origin: Origin) -> None:
    """Warn if Dynamo will not compile the model once more, but run it as it was given.

    Its limit of versions is the one way to leave a compiled model on which no backend is asked.
    """
    limit = torch._dynamo.config.recompile_limit
    if origin.versions + 1 < limit:
        return
    warnings.warn(
        f"{origin.name} has {limit} compiled versions, as many as torch._dynamo.config."
        "recompile_limit allows. For a call that none of them fits, Dynamo would run the network "
        "as it was given, which is another function than the rewired one. Raise the limit, pass "
        f"dynamic=True or fullgraph=True (an error instead) to torch.compile, or {REWIRE}.",
        Re2fxWarning,
        stacklevel=2,
    )


def warn_of_additions(origin: Origin) -> None:
    """Warn if Python runs a part of the model that adds, where no backend sees it."""
    if not origin.additions:
        return
    warnings.warn(
        f"{origin.name}: Dynamo cannot compile the function around this piece, so Python runs the "
        f"addition at {', '.join(dict.fromkeys(origin.additions))}. If that is a residual, it is "
        f"not rewired. Remove the graph break (fullgraph=True shows what it is), or {REWIRE}.",
        Re2fxWarning,
        stacklevel=2,
    )


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
    walls: set[Node],
) -> bool:
    """Whether a boundary is reached from a value through what a stream may pass between blocks.

    No chain goes on through the additions in ``walls``.
    """
    stack, seen = [start], set()
    while stack:
        node = stack.pop()
        if found(flow, node):
            return True
        if node in seen or node in walls or not passes_stream(flow, node):
            continue
        seen.add(node)
        stack.extend(neighbours(node))
    return False


def passes_stream(flow: Flow, node: Node) -> bool:
    """What may stand between two residuals: anything that keeps every element, but no layer."""
    if ops.is_add(node) or ops.is_activation(node, flow.root):
        return True
    if flow.trains(node) or ops.is_norm(node, flow.root):
        return False
    value = node.meta.get("example_value")
    inputs = [n.meta.get("example_value") for n in node.all_input_nodes]
    sizes = [v.numel() for v in inputs if isinstance(v, Tensor)]
    return not isinstance(value, Tensor) or value.numel() in sizes


def check_bodies(lifted: Lifted, name: str) -> None:
    """Raise if a residual is hidden in the body of a higher-order operator.

    Raises:
        ChainCutError: names the residual and the remedy.
    """
    for body in lifted.root.modules():
        if not isinstance(body, GraphModule):
            continue
        flow = Flow(body.graph, body)
        for node in flow.nodes:
            locate(node)
            if ops.is_add(node) and hides_residual(flow, node):
                raise ChainCutError(
                    f"{name}: the residual at {flow.location(node)} lies inside a region that "
                    "Dynamo captures as one operator (a condition, a nested compiled region), so "
                    f"it cannot be rewired with the others. Write it without, or {REWIRE}."
                )


def cut(flow: Flow, add: Node, origin: Origin, where: str | None) -> ChainCutError:
    """The error."""
    if origin.ddp:
        remedy = f"Set torch._dynamo.config.optimize_ddp = False, or {REWIRE}, then wrap."
    else:
        remedy = (
            "Remove the graph break (fullgraph=True shows what it is), compile the whole model, or "
            f"{REWIRE}."
        )
    return ChainCutError(
        f"{origin.name}: the residual at {flow.location(add)} may go on beyond this graph, which "
        f"Dynamo cut at {where}. Rewiring the pieces one by one would compute another function "
        f"than rewiring the whole chain. {remedy}"
    )
