"""Drop what nobody reads: dead tuple elements, unused parameter reads and shape reads.

    before                               after
    mha = self.mha(x, x, x)              mha = self.mha(x, x, x)
    y = mha[0];  weights = mha[1]        y = mha[0]

Only operations that cannot have an effect are dropped; an in-place call without readers stays.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

from re2fx import ops


def cleanup(graph: Graph) -> bool:
    """Remove dead, effect-free nodes in place; return whether any was removed."""
    changed = False
    for node in reversed(graph.nodes):
        if not node.users and is_free_of_effects(node):
            graph.erase_node(node)
            changed = True
    if changed:
        graph.lint()
    return changed


def is_free_of_effects(node: Node) -> bool:
    """Reads a parameter, a tuple element or a shape, and does nothing else."""
    if node.op == "get_attr":
        return True
    selects = node.op == "call_function" and node.target is operator.getitem
    return selects or ops.reads_shape_only(node)
