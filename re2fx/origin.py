"""Where a graph that Dynamo hands over comes from: all of a model, or a piece of it.

Dynamo splits what it cannot trace. A backend is called with each piece alone, and must know that it
is one: the reason a graph ended is on the graph, and the Python frames between the call of the
compiled model and the frame being compiled say whether another piece ran before it.
"""

from __future__ import annotations

import dis
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

_TORCH = os.path.dirname(torch.__file__) + os.sep
_DYNAMO = os.path.join(_TORCH, "_dynamo") + os.sep
_CONVERT = os.path.join(_DYNAMO, "convert_frame.py")
_ENTRY = os.path.join(_DYNAMO, "eval_frame.py")
_OWN = os.path.dirname(__file__) + os.sep
# Names in the code that Dynamo writes in place of a function's own.
_COMPILED = ("__compiled_fn", "__resume_at")
_MODULES = os.path.join(_TORCH, "nn", "modules") + os.sep
_MODULE = os.path.join(_MODULES, "module.py")


@dataclass(frozen=True)
class Origin:
    """What a Dynamo graph is a part of.

    Attributes:
        root: what was given to ``torch.compile``, or None if that is not known.
        owner: the module that the compiled function is a method of or works on.
        code: the name of the compiled function; of a piece, where it goes on.
        before: where the rest of the model calls this piece from, if it is one.
        after: where and why the graph ends early, if it does.
        ddp: whether DistributedDataParallel's optimizer split the graph.
        additions: where Python itself may add tensors, in functions that Dynamo gave up on and
            that call this piece.
        versions: how many compiled versions of the function there are already.
    """

    root: Any
    owner: nn.Module | None = None
    code: str = ""
    before: str | None = None
    after: str | None = None
    ddp: bool = False
    additions: tuple[str, ...] = ()
    versions: int = 0

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
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list  # it is running already

    root, entered, frames = callers()
    owner, code = owner_of(root, entered), entered.f_code.co_name if entered else ""
    caller = place(frames[0].f_code.co_filename, frames[0].f_lineno) if frames else None
    additions = tuple(additions_in(frames))
    versions = len(_debug_get_cache_entry_list(entered.f_code)) if entered else 0
    reason: Any = getattr(module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return Origin(root, owner, code, caller, additions=additions, versions=versions)
    if "DDPOptimizer" in reason.reason:
        return Origin(
            root, owner, code, caller, "DistributedDataParallel's bucket boundaries", ddp=True
        )
    sentence = next(iter(reason.reason.splitlines()), "").rstrip(". ")
    last = reason.user_stack[-1] if reason.user_stack else None
    where = place(last.filename, last.lineno) if last else "an unknown line"
    return Origin(root, owner, code, caller, f"{where} ({sentence})", additions=additions)


def place(file: str, line: int | None) -> str:
    """``file:line``."""
    return f"{file}:{line}"


def callers() -> tuple[Any, Any, list[FrameType]]:
    """What was compiled, the frame at hand, and those of the model that run it, innermost first."""
    frame: Any = sys._getframe(1)
    running: list[FrameType] = []
    converting: Any = None
    while frame is not None:
        file = frame.f_code.co_filename
        if file == _CONVERT:
            converting, running = frame.f_locals.get("frame", converting), []
        elif converting and file == _ENTRY and "fn" in frame.f_locals:
            return compiled(frame.f_locals["fn"]), converting, running
        elif converting and runs_model(file):
            running.append(frame)
        frame = frame.f_back
    return None, None, []


def owner_of(root: Any, frame: Any) -> nn.Module | None:
    """The module of a frame: its ``self``, or the first it has among its variables."""
    if frame is None:
        return root if isinstance(root, nn.Module) else None
    held = frame.f_locals
    values = [held.get("self"), *held.values(), *map(frame.f_globals.get, frame.f_code.co_names)]
    return next((value for value in values if isinstance(value, nn.Module)), None)


def additions_in(frames: Iterable[FrameType]) -> Iterator[str]:
    """Where functions that Python runs as they were written add two values."""
    for frame in frames:
        code = frame.f_code
        written = any(name.startswith(_COMPILED) for name in code.co_names)
        if written or code.co_filename.startswith(_OWN):
            continue
        lines = dict(dis.findlinestarts(code))
        line, before = code.co_firstlineno, ""
        for step in dis.get_instructions(code):
            line = lines.get(step.offset) or line
            if adds(step) and before != "LOAD_CONST":
                yield place(code.co_filename, line)
            before = step.opname


def adds(step: dis.Instruction) -> bool:
    """Whether a step of Python adds."""
    words = ("BINARY_ADD", "INPLACE_ADD")  # before Python 3.11
    return step.opname in words or step.argrepr in ("+", "+=") or step.argval == "add_"


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
