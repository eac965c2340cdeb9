"""Tensors that a forward makes from numbers alone, which tracing turns into constants."""

from __future__ import annotations

from torch import nn
from torch.fx import Graph

from . import ops
from .aliases import Aliases
from .graph import Flow


def make_anew(graph: Graph, model: nn.Module, constants: set[str]) -> None:
    """Copy a constant at every call if the graph writes into it; changes the graph.

    The user's code made it anew at every call; written in place it would keep what was added.

    Args:
        graph: as it was traced.
        model: the module its targets are looked up in.
        constants: names of the tensors made while tracing.
    """
    if not constants:
        return
    flow = Flow(graph, model)
    aliases = Aliases(flow)
    writes = [n for n in flow.nodes if ops.is_inplace(n, model) and flow.inputs(n)]
    written = {n.target for write in writes for n in aliases.of(write) if n.op == "get_attr"}
    for target in sorted(constants & written):
        reads = [n for n in flow.nodes if n.op == "get_attr" and n.target == target]
        with graph.inserting_after(reads[0]):
            new = graph.call_method("clone", (reads[0],))
        new.meta = dict(reads[0].meta)
        for read in reads:
            for user in list(read.users):
                if user is not new:
                    user.replace_input_with(read, new)
        for read in reads[1:]:
            graph.erase_node(read)
