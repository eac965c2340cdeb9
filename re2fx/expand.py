"""Functions that a capture kept whole, opened for inputs of given shapes.

torchvision wraps the attention of its Swin transformers so that symbolic tracing does not enter it.
What it does is a line of operations all the same once the sizes are known, and slices need to see
them. The opened form holds for those sizes, and is used for nothing else (`re2fx.body.Fixed`).
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from . import ops
from .interpret import Reader, thawed

_KNOWN = ("torch", "operator", "_operator", "math", "builtins", "re2fx", "einops")
Values = dict[Node, Any]
Traced = tuple[GraphModule, list[Node], dict[str, Any]]


def expand(graph: Graph, values: Values, device: torch.device) -> tuple[Graph, Values] | None:
    """A graph with such functions opened, and the values of its nodes.

    Args:
        graph: left as it is.
        values: examples of what its nodes come to, on ``meta``.
        device: where they are when it runs.

    Returns:
        None if it has no such function that can be opened.
    """
    closed = [n for n in graph.nodes if _is_closed(n) and isinstance(values.get(n), Tensor)]
    traced = {node: _traced(node, values, device) for node in closed}
    if not any(traced.values()):
        return None
    opened = Graph()
    copies: dict[Node, Node] = {}
    known: Values = {}
    for node in graph.nodes:
        found = traced.get(node)
        if found is not None:
            copies[node] = _inline(opened, found, node, copies, known)
            continue
        copies[node] = opened.node_copy(node, copies.__getitem__)
        known[copies[node]] = values.get(node)
    return opened, known


def _is_closed(node: Node) -> bool:
    """Whether a node calls a function of the user's or of a library."""
    if node.op != "call_function" or not isinstance(node.target, types.FunctionType):
        return False
    module = getattr(node.target, "__module__", None) or ""
    return module.split(".")[0] not in _KNOWN


def _traced(node: Node, values: Values, device: torch.device) -> Traced | None:
    """The function's operations, the nodes whose values are their inputs, and what they come to."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = [n for n in node.all_input_nodes if isinstance(values.get(n), Tensor)]
    numbers = [n for n in node.all_input_nodes if n not in inputs]
    if any(n not in values for n in numbers) or pytree.tree_any(
        _is_tensor, [values[n] for n in numbers]
    ):
        return None

    def run(*tensors: Tensor) -> Any:
        given = {n: copy.deepcopy(values[n]) for n in numbers}
        given.update(zip(inputs, tensors, strict=True))
        args, kwargs = _filled((node.args, node.kwargs), given)
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        return function(*args, **kwargs)

    # Whatever counts or records around this is not meant for it.
    modes = _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True)
    with modes[0], modes[1], torch.enable_grad():
        tensors = [_like(values[n], device) for n in inputs]
        try:
            made = make_fx(run, pre_dispatch=True, tracing_mode="real")(*tensors)
            reader = Reader(made, made.graph)  # tracing does not say what needs a gradient
            reader.run(*tensors)
        except Exception:  # whatever a function may do with a value that is not there
            return None
    bad = (n for n in made.graph.nodes if _is_held(n, made) or ops.switches_context(n))
    return None if any(True for _ in bad) else (made, inputs, reader.values)


def _is_held(node: Node, made: GraphModule) -> bool:
    """Whether it is a tensor that tracing has made a constant of, other than a number."""
    return node.op == "get_attr" and _number(node, made) is None


def _number(node: Node, made: GraphModule) -> Tensor | None:
    value = getattr(made, str(node.target), None)
    return value if isinstance(value, Tensor) and not value.dim() else None


def _inline(
    graph: Graph,
    traced: Traced,
    node: Node,
    copies: dict[Node, Node],
    known: Values,
) -> Node:
    """Copy the operations of a function to the end of a graph; returns its result."""
    made, inputs, found = traced
    own: dict[Node, Node] = {}
    given = iter(inputs)
    for inner in made.graph.nodes:
        if inner.op == "placeholder":
            own[inner] = copies[next(given)]
        elif inner.op == "output":
            (result,) = inner.args
            return own[result]
        else:
            if inner.op == "get_attr":
                number = _number(inner, made)
                assert number is not None, "other constants were refused"
                kwargs: dict[str, Any] = {"dtype": number.dtype}
                own[inner] = graph.call_function(torch.scalar_tensor, (number.item(),), kwargs)
            else:
                own[inner] = graph.node_copy(inner, own.__getitem__)
            own[inner].name = f"{node.name}_{inner.name}"
            known[own[inner]] = found[inner.name]
    raise AssertionError("every graph has an output")


def _filled(arguments: Any, given: dict[Node, Any]) -> Any:
    """A node's arguments with values in place of nodes, in lists that may be written into."""
    return thawed(map_arg(arguments, given.__getitem__))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _like(tensor: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return made.requires_grad_(tensor.requires_grad)
