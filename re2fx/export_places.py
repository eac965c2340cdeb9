"""Where the operations of an exported program stand in the user's code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from .dynamo import locate

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_KEPT = ("stack_trace", "nn_module_stack")


def described(node: Node, model: nn.Module, prefix: str) -> dict[str, Any]:
    """Where a node stands, the way the other routes say it, and its example."""
    stand_in = Graph().create_node("placeholder", "x")
    stand_in.meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
    if "val" in node.meta:
        stand_in.meta["example_value"] = node.meta["val"]
    stand_in.meta["stack_trace"] = "".join(own_frames(node.meta.get("stack_trace") or ""))
    locate(stand_in)
    stack = node.meta.get("nn_module_stack") or {}
    stand_in.meta["nn_module_stack"] = dict(modules(stack, model, prefix))
    return stand_in.meta


def own_frames(trace: str) -> Iterator[str]:
    """The frames of a stack trace that are the user's code."""
    lines = trace.splitlines()
    for index, line in enumerate(lines):
        text = line.strip()
        if not text.startswith('File "') or text[6:].startswith((_TORCH, _HERE)):
            continue
        code = lines[index + 1].strip() if index + 1 < len(lines) else ""
        yield f"  {text}\n    {code}\n"


def modules(stack: dict[str, Any], model: nn.Module, prefix: str) -> Iterator[tuple[str, Any]]:
    """The modules a node was called in: path and class."""
    for path, kind in stack.values():
        path = path.split("@")[0]
        if prefix and not path.startswith(prefix):
            continue
        path = path.removeprefix(prefix)
        with suppress(AttributeError):  # a program keeps no modules, only their names
            kind = type(model.get_submodule(path))
        yield path, (path, kind)
