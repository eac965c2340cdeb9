"""What a capture kept whole: may residuals lie in it, or chains across it? Can it be run again?

A submodule that was kept whole hides nothing from the plan if a run of it adds no two activations,
and if no stream passes it: it trains something, or there are no additions on one side of it. One
that assigns tensors to itself, such as the state of a recurrence, is marked for the plan: run again
it would do something else.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from . import ops
from .capture import Captured
from .errors import CaptureError
from .observe import observe


def hides(model: nn.Module, example_inputs: Any, captured: Captured) -> bool:
    """Whether another capture might find more in the submodules that this one kept whole.

    Marks the calls of those that assign tensors to themselves.

    Args:
        model: the captured model; it is run on the inputs, and left as it was.
        example_inputs: as for `re2fx.transform`.
        captured: its graphs.
    """
    if not captured.leaves and not any(writers(captured.train, model)):
        return False
    try:
        observed = observe(model, example_inputs)
    except CaptureError:
        return True  # another capture says why it does not run
    mark_assigning(captured, observed.assigned)
    additions = observed.additions
    through = set(passed(captured.train, model)) | set(passed(captured.eval, model))
    first = {module: path for path, module in model.named_modules()}
    kept = {path: first[model.get_submodule(path)] for path in captured.leaves}
    return any(additions[kept[path]] or path in through for path in kept)


def tables(graph: Graph, model: nn.Module) -> Iterator[str]:
    """Modules that are called whole, train nothing and are read in several places.

    Such as rotary embeddings, which are given the stream and look at its dtype only: what happens
    inside decides whether they belong to a branch.
    """
    for node in graph.find_nodes(op="call_module"):
        module = model.get_submodule(str(node.target))
        own = not type(module).__module__.startswith("torch.nn.")
        if own and len(node.users) > 1 and next(module.parameters(), None) is None:
            yield str(node.target)


def writers(graph: Graph, model: nn.Module) -> Iterator[type[nn.Module]]:
    """Classes of modules that are called whole and whose code assigns to attributes."""
    modules = (model.get_submodule(str(n.target)) for n in graph.find_nodes(op="call_module"))
    kinds = {type(module) for module in modules}
    own = (kind for kind in kinds if not kind.__module__.startswith("torch.nn."))
    return filter(assigns, own)


def assigns(kind: type[nn.Module]) -> bool:
    """Whether a method of a class, its constructor left out, assigns to an attribute."""
    methods = (m for name, m in vars(kind).items() if inspect.isfunction(m) and name != "__init__")
    return any(step.opname == "STORE_ATTR" for m in methods for step in dis.get_instructions(m))


def mark_assigning(captured: Captured, assigned: dict[str, str]) -> None:
    """Write on calls of submodules to which attributes tensors are assigned in them."""
    for graph in (captured.train, captured.eval):
        for node in graph.find_nodes(op="call_module"):
            path = str(node.target)
            for owner, name in assigned.items():
                if owner == path or owner.startswith(f"{path}."):
                    node.meta["assigns"] = f"{owner}.{name}"


def passed(graph: Graph, model: nn.Module) -> Iterator[str]:
    """Modules without parameters that stand between two sums, where a stream may pass them."""
    behind: set[Node] = set()
    for node in graph.nodes:
        if ops.is_sum(node) or any(value in behind for value in node.all_input_nodes):
            behind.add(node)
    before: set[Node] = set()
    for node in reversed(graph.nodes):
        if ops.is_sum(node) or any(user in before for user in node.users):
            before.add(node)
    for node in graph.nodes:
        if node.op == "call_module" and node in behind and node in before:
            module = model.get_submodule(str(node.target))
            if next(module.parameters(), None) is None:
                yield str(node.target)
