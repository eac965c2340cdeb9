"""Where a graph that Dynamo hands over comes from: all of a model, or a piece of it.

Dynamo splits what it cannot trace. A backend is called with each piece alone, and must know that it
is one: the reason a graph ended is on the graph, and the Python frames between the call of the
compiled model and the frame being compiled say whether another piece ran before it.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

_TORCH = os.path.dirname(torch.__file__) + os.sep
_DYNAMO = os.path.join(_TORCH, "_dynamo") + os.sep
_CONVERT = os.path.join(_DYNAMO, "convert_frame.py")
_ENTRY = os.path.join(_DYNAMO, "eval_frame.py")
_MODULES = os.path.join(_TORCH, "nn", "modules") + os.sep
_MODULE = os.path.join(_MODULES, "module.py")


@dataclass(frozen=True)
class Origin:
    """What a Dynamo graph is a part of.

    Attributes:
        root: what was given to ``torch.compile``, or None if that is not known.
        before: where the rest of the model calls this piece from, if it is one.
        after: where and why the graph ends early, if it does.
        ddp: whether DistributedDataParallel's optimizer split the graph.
    """

    root: Any
    before: str | None = None
    after: str | None = None
    ddp: bool = False

    @property
    def name(self) -> str:
        """What to call the model in a message."""
        if isinstance(self.root, nn.Module):
            return type(self.root).__name__
        return getattr(self.root, "__name__", None) or "the compiled function"

    @property
    def partial(self) -> bool:
        """Whether the graph is a piece of a model."""
        return self.before is not None or self.after is not None


def find_origin(module: GraphModule) -> Origin:
    """Look at the reason the graph ended and at the frames that led to its compilation."""
    root, caller = callers()
    reason: Any = getattr(module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return Origin(root, caller)
    if "DDPOptimizer" in reason.reason:
        return Origin(root, caller, "DistributedDataParallel's bucket boundaries", ddp=True)
    sentence = next(iter(reason.reason.splitlines()), "").rstrip(". ")
    where = place(reason.user_stack[-1]) if reason.user_stack else "an unknown line"
    return Origin(root, caller, f"{where} ({sentence})")


def place(frame: traceback.FrameSummary) -> str:
    """A frame as ``file:line``."""
    return f"{frame.filename}:{frame.lineno}"


def callers() -> tuple[Any, str | None]:
    """What was compiled, and the innermost Python frame of the model that runs already."""
    frame: Any = sys._getframe(1)
    caller: str | None = None
    converting = False
    while frame is not None:
        file = frame.f_code.co_filename
        if file == _CONVERT:
            converting, caller = True, None
        elif converting and file == _ENTRY and "fn" in frame.f_locals:
            return compiled(frame.f_locals["fn"]), caller
        elif converting and caller is None and runs_model(file):
            caller = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return None, None


def compiled(function: Any) -> Any:
    """The module behind a bound method, or behind Dynamo's wrapper around torch's own modules."""
    inner = inspect.unwrap(function)
    cells = inspect.getclosurevars(inner).nonlocals if inspect.isfunction(inner) else {}
    if not hasattr(inner, "__self__") and inspect.ismethod(cells.get("fn")):
        inner = cells["fn"]
    return getattr(inner, "__self__", inner)


def runs_model(file: str) -> bool:
    """Whether a frame of this file is a model's own code, torch's containers included."""
    if file.startswith(_MODULES):
        return file != _MODULE
    return not file.startswith(_TORCH)
