"""Whether a model still has the modules that a capture went through.

A graph calls some modules as they are at every run; the others are dissolved in it: what their
forward and their hooks did when they were captured is what it does. Whoever replaces one of them
later, as adapters, sharding and quantisation do, or hooks it, must not be ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.fx import Graph

from .text import shorten

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Members:
    """The dissolved modules of a capture, as they were.

    Attributes:
        live: paths of the modules that the graphs call.
        forwards: path of each dissolved module, and what its forward is.
        hooks: path of each dissolved module that has hooks, and how many.
    """

    live: frozenset[str]
    forwards: tuple[tuple[str, str], ...]
    hooks: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, model: nn.Module, graphs: Iterable[Graph]) -> Members:
        """Those of a capture that was just made."""
        nodes = (node for graph in graphs for node in graph.nodes if node.op == "call_module")
        return cls.beside(model, frozenset(str(node.target) for node in nodes))

    @classmethod
    def beside(cls, model: nn.Module, live: frozenset[str]) -> Members:
        """A model's modules now, without those that are called and what they hold."""
        found = list(dissolved(model, live))
        forwards = tuple((path, forward_of(module)) for path, module in found)
        counts = ((path, sum(len(getattr(m, name)) for name in _HOOKS)) for path, m in found)
        return cls(live, forwards, tuple(pair for pair in counts if pair[1]))

    def replaced(self, now: Members) -> str | None:
        """Which of the modules are others now, in words."""
        if now.forwards == self.forwards:
            return None
        before, after = dict(self.forwards), dict(now.forwards)
        changes = [
            f"{path or 'the model'} of {name}, and called with {after.get(path, 'none')} there"
            for path, name in before.items()
            if after.get(path) != name
        ]
        added = [path for path in after if path not in before]
        return changes[0] if changes else f"no module {shorten(added)}, and called with one"

    def hooked(self, now: Members) -> tuple[str, ...]:
        """Dissolved modules that have more or fewer hooks now."""
        if now.hooks == self.hooks:
            return ()
        before, after = dict(self.hooks), dict(now.hooks)
        paths = dict.fromkeys((*after, *before))
        return tuple(p or "the model" for p in paths if before.get(p) != after.get(p))


def dissolved(model: nn.Module, live: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of each that no call of a graph reaches, shared ones once."""
    seen = {id(module) for module in called(model, live)}
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        prefix = f"{path}." if path else ""
        stack += [(prefix + name, m) for name, m in module._modules.items() if m is not None]


def called(model: nn.Module, live: frozenset[str]) -> Iterator[nn.Module]:
    """The modules at some paths, those that are there."""
    for path in live:
        module: nn.Module | None = model
        for name in path.split(".") if path else ():
            module = module._modules.get(name) if module is not None else None
        if module is not None:
            yield module


def visit(module: nn.Module) -> None:
    """Let Dynamo, which traces this, guard the class of every module; it does nothing."""
    for child in module._modules.values():
        if child is not None:
            visit(child)


def forward_of(module: nn.Module) -> str:
    """What runs when a module is called: its class, and a forward of its own if it has one."""
    kind = type(module)
    own = vars(module).get("forward")
    given = f" with {getattr(own, '__qualname__', type(own).__name__)}" if own is not None else ""
    return f"{kind.__module__}.{kind.__qualname__}{given}"
