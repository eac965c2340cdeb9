"""Operations that move every element by a rule of their own, and what undoes them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from .arithmetic import calls

_ROLLS = {"roll", torch.roll}
_FLIPS = {"flip", torch.flip}


def shuffles(node: Node) -> bool:
    """A roll or a flip by constant numbers."""
    return calls(node, _ROLLS | _FLIPS) and len(node.all_input_nodes) == 1 and bool(node.args)


def inverse(node: Node) -> Graph:
    """The graph of the function that undoes a shuffle: ``(stream) -> stream``."""
    graph = Graph()
    stream = graph.placeholder("stream")
    rest, named = list(node.args[1:]), dict(node.kwargs)
    if calls(node, _ROLLS):
        if rest:
            rest[0] = negated(rest[0])
        else:
            named["shifts"] = negated(named["shifts"])
    graph.output(graph.create_node(node.op, node.target, (stream, *rest), named))
    return graph


def negated(shifts: Any) -> Any:
    """The shifts the other way."""
    return -shifts if isinstance(shifts, int) else tuple(-shift for shift in shifts)
