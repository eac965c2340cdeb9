"""Dynamo graphs in the form the passes speak of, and back.

Dynamo hands parameters, buffers and tensors found on modules to a backend as placeholders, next to
the activations. `lift` makes them attributes of a root module again, so that the passes and the
executors see the same kind of graph as from symbolic tracing: who is a parameter, where a node
stands in the user's code. `lower` makes placeholders of them again, in the given order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .checkpoints import write_out_checkpoints
from .graph import copy_graph

_FRAME = re.compile(r'^\s*File "(?P<file>.*)", line (?P<line>\d+), in (?P<function>.*)$')
_ROOT = re.compile(r"^[A-Za-z_]+\[(?P<quote>['\"])(?P<name>\w+)(?P=quote)\]\.?")
_CHILD = re.compile(
    r"(\.__dict__\[['\"]_modules['\"]\]|\._modules)\[(?P<quote>['\"])(?P<name>\w+)(?P=quote)\]"
)


class Root(nn.Module):
    """Holds the members of a lifted graph under the names of their placeholders."""

    def hold(self, name: str, value: Any) -> None:
        """Give a member its value; a parameter stays one."""
        self._parameters.pop(name, None)
        self._buffers.pop(name, None)
        if isinstance(value, nn.Parameter):
            self._parameters[name] = value
        else:
            self._buffers[name] = value


@dataclass(frozen=True)
class Lifted:
    """A Dynamo graph with attributes for members.

    Attributes:
        graph: members are ``get_attr`` nodes; the activations' placeholders stay.
        root: holds the members' values, and the submodules of the given graph module.
        placeholders: names of all placeholders in the order of the call, and whether each is a
            member.
    """

    graph: Graph
    root: Root
    placeholders: tuple[tuple[str, bool], ...]

    def split(self, inputs: Sequence[Any]) -> tuple[Root, list[Any]]:
        """A root with the members of one call, and the activations of that call."""
        root, rest = Root(), []
        root._modules = self.root._modules
        root._parameters.update(self.root._parameters)
        root._buffers.update(self.root._buffers)
        for (name, member), value in zip(self.placeholders, inputs, strict=True):
            if member:
                root.hold(name, value)
            else:
                rest.append(value)
        return root, rest


def lift(module: GraphModule, inputs: Sequence[Any]) -> Lifted:
    """Make attributes of the placeholders that come from modules.

    Args:
        module: what Dynamo captured; left as it is.
        inputs: one value per placeholder, real or fake.
    """
    graph, root = copy_graph(module.graph), Root()
    root.train(module.training)
    for name, child in module.named_children():
        root.add_module(name, child)
    placeholders = []
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    for node, value in zip(nodes, inputs, strict=True):
        member = is_member(node, value)
        placeholders.append((node.name, member))
        if member:
            root.hold(node.name, value)
            node.op, node.target = "get_attr", node.name
    for node in graph.nodes:
        if node.op == "get_attr" and node.name not in root._parameters | root._buffers:
            copy_attribute(module, root, str(node.target))
        locate(node)
    write_out(graph, root)
    graph.lint()
    return Lifted(graph, root, tuple(placeholders))


def write_out(graph: Graph, root: Root) -> None:
    """Write out the checkpoints that hide residuals, and forget bodies that nobody runs."""
    for node in write_out_checkpoints(graph, lambda target: attrgetter(target)(root)):
        locate(node)
    held = {str(node.target).split(".")[0] for node in graph.nodes if node.op != "placeholder"}
    for name in [name for name in root._modules if name not in held]:
        del root._modules[name]


def lower(lifted: Lifted, graph: Graph) -> GraphModule:
    """A graph module with the call of the one that was lifted.

    Args:
        lifted: says which placeholders there were.
        graph: a rewritten form of its graph; left as it is.
    """
    new, copies = Graph(), {}
    named = {name: new.placeholder(name) for name, _ in lifted.placeholders}
    for node in graph.nodes:
        name = str(node.target) if node.op == "get_attr" else node.name
        if node.op in ("placeholder", "get_attr") and name in named:
            copies[node] = named[name]
            named[name].meta = dict(node.meta)
        else:
            copies[node] = new.node_copy(node, copies.__getitem__)
    return GraphModule(lifted.root, new)


def is_member(node: Node, value: Any) -> bool:
    """Whether a placeholder is a parameter, a buffer or another tensor found on a module."""
    if not isinstance(value, Tensor):
        return False
    if isinstance(value, nn.Parameter):
        return True
    source = getattr(node.meta.get("grapharg"), "source", None)
    guard = getattr(source, "guard_source", None)
    # A tensor with a history that was put on a module is an activation.
    return (
        guard is not None
        and not value.requires_grad
        and bool(guard.is_unspecialized_nn_module() or guard.is_specialized_nn_module())
    )


def copy_attribute(module: nn.Module, root: Root, target: str) -> None:
    """A constant or a submodule that the graph module itself holds."""
    if "." in target or hasattr(root, target):
        return
    value = getattr(module, target)
    if isinstance(value, Tensor):
        root.hold(target, value)
    else:
        setattr(root, target, value)


def locate(node: Node) -> None:
    """Say where a node stands the way symbolic tracing does: module paths, the innermost line."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        node.meta["nn_module_stack"] = {
            key: (module_path(path), kind) for key, (path, kind) in stack.items()
        }
    frames = [_FRAME.match(line) for line in (node.meta.get("stack_trace") or "").splitlines()]
    found = [(index, frame) for index, frame in enumerate(frames) if frame]
    if found:
        index, frame = found[-1]
        lines = node.meta["stack_trace"].splitlines()
        code = lines[index + 1].strip() if index + 1 < len(lines) else ""
        node.meta["source_line"] = (frame["file"], int(frame["line"]), frame["function"], code)


def module_path(path: str) -> str:
    """``L['self'].blocks.0`` as ``blocks.0``; another name than ``self`` stays in front.

    Dynamo may write a child as the dictionary that holds it: ``._modules['blocks']``.
    """
    match = _ROOT.match(path)
    if match is None:
        return path
    rest = _CHILD.sub(lambda child: f".{child['name']}", "." + path[match.end() :]).lstrip(".")
    return rest if match["name"] == "self" else f"{match['name']}.{rest}".rstrip(".")
