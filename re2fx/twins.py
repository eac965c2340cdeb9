"""A module tree with some of its submodules replaced, made without touching the given tree.

Only what must differ is made anew: the modules that hold a replaced one, directly or further down,
and what refers to these. Everything else is the very same object in both trees::

    Model ── encoder ── layers ── 0, 1, 2        Model' ── encoder' ── layers' ── 0', 1', 2
          └─ head                                       └─ head

References are followed where a module may keep them beside its children: in lists, tuples, sets and
dictionaries, bound methods, partials, weak references and the wrappers of hooks. What lies behind a
closure or in an object of another kind is left alone, and `strangers` tells of it.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph
from torch.nn.modules.module import _WrappedHook

from .errors import CaptureError
from .module import RewiredModule
from .observe import HOOKS

ATOMS = (type, types.ModuleType, torch.Tensor, torch.dtype, torch.device, torch.Generator)


class Twin(nn.Module):
    """A module made from another with the same parameters, buffers and mode.

    The dictionaries of parameters and buffers and the training flag are those of the given module;
    its children, hooks and other attributes are its own.
    """

    _kind: type[nn.Module]

    @property
    def training(self) -> bool:
        """The mode of the given module."""
        given: nn.Module = self.__dict__["_twin_of"]
        return given.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_twin_of" in self.__dict__:
            self.__dict__["_twin_of"].training = mode

    def __reduce__(self) -> tuple[Any, ...]:
        role = type(self).__mro__[1]
        return bare, (role, self._kind), {k: v for k, v in vars(self).items() if k != "training"}


def bare(role: type[Twin], kind: type[nn.Module]) -> Twin:
    """A twin of a class without anything in it yet."""
    return object.__new__(derive(role, kind))


def derive(role: type[Twin], kind: type[nn.Module]) -> type[Twin]:
    """The class of the twins of a class.

    Raises:
        CaptureError: the class forbids to be derived from.
    """
    try:
        made: type[Twin] = type(kind.__name__, (role, kind), {"_kind": kind})
    except Exception as error:
        raise CaptureError(
            f"{kind.__name__} cannot be derived from ({error}), so a submodule of it cannot be "
            "replaced; transform the submodule itself"
        ) from error
    made.__module__, made.__doc__ = kind.__module__, kind.__doc__
    return made


def make_twin(
    model: nn.Module, replaced: dict[nn.Module, nn.Module], role: type[Twin] = Twin
) -> Twin:
    """The twin of a model in which modules are replaced.

    Args:
        model: it is not changed.
        replaced: what takes the place of which of its modules, wherever it is referred to.
        role: the class of the twin itself; those of its modules are `Twin`.
    """
    made: Any = Copier(model, replaced, role)(model)
    assert isinstance(made, Twin)
    return made


def say_given_classes(graph: Graph) -> None:
    """Let the nodes that were traced in a twin name the class that the user knows."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        for key, (path, kind) in stack.items():
            if isinstance(kind, type) and issubclass(kind, Twin):
                stack[key] = (path, kind._kind)


class Copier:
    """Makes anew what refers to a replaced module.

    Args:
        model: where to start.
        replaced: as for `make_twin`.
        role: as for `make_twin`.
    """

    def __init__(
        self, model: nn.Module, replaced: dict[nn.Module, nn.Module], role: type[Twin]
    ) -> None:
        self.model, self.role = model, role
        self.made: dict[int, Any] = {id(old): new for old, new in replaced.items()}
        self.affected = affected(model, list(replaced))

    def __call__(self, value: Any) -> Any:
        """A value as the twin refers to it: itself, unless it refers to what is replaced."""
        if id(value) in self.made:
            return self.made[id(value)]
        if id(value) not in self.affected:
            return value
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, (list, dict, set, deque)):
            return self.container(value)
        made = self.made[id(value)] = self.immutable(value)
        return made

    def module(self, given: nn.Module) -> Twin:
        """A twin; noted before it is filled, as its modules may refer to it."""
        made = bare(self.role if given is self.model else Twin, type(given))
        self.made[id(given)] = made
        vars(made)["_twin_of"] = given
        for name, value in vars(given).items():
            if name in HOOKS and isinstance(value, dict) and id(value) not in self.affected:
                vars(made)[name] = copy.copy(value)  # a hook on the one is none on the other
            elif name != "training":
                vars(made)[name] = self(value)
        return made

    def container(self, value: Any) -> Any:
        """A container that can be changed."""
        made = copy.copy(value)
        made.clear()
        self.made[id(value)] = made
        if isinstance(value, dict):
            made.update((self(k), self(v)) for k, v in value.items())
        elif isinstance(value, set):
            made.update(map(self, value))
        else:
            made.extend(map(self, value))
        return made

    def immutable(self, value: Any) -> Any:
        """Anything else that is followed."""
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self, value))
        if isinstance(value, (tuple, frozenset)):
            return type(value)(map(self, value))
        if isinstance(value, types.MethodType):
            return rebound(value, self(value.__self__))
        if isinstance(value, weakref.ref):
            return weakref.ref(self(value()))
        if isinstance(value, _WrappedHook):
            return _WrappedHook(self(value.hook), self(value.module()))
        keywords = {name: self(v) for name, v in value.keywords.items()}
        return functools.partial(self(value.func), *map(self, value.args), **keywords)


def rebound(method: types.MethodType, owner: Any) -> Any:
    """The method of another object that a method corresponds to."""
    name = method.__name__
    if getattr(type(method.__self__), name, None) is method.__func__:
        return getattr(owner, name)  # a rewired module has a forward of its own
    return types.MethodType(method.__func__, owner)


def references(value: Any) -> Iterable[Any]:
    """What a value refers to, as far as that can be replaced in a copy of it."""
    if isinstance(value, RewiredModule):
        return ()
    if isinstance(value, nn.Module):
        return tuple(vars(value).values())
    if isinstance(value, dict):
        return (*value, *value.values())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return tuple(value)
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, weakref.ref):
        return (value(),)
    if isinstance(value, _WrappedHook):
        return (value.hook, value.module()) if value.with_module else (value.hook,)
    return ()


def hidden(value: Any) -> Iterable[Any]:
    """What a value refers to behind a closure or in an object of another kind."""
    if isinstance(value, types.FunctionType):
        cells = value.__closure__ or ()
        return tuple(c.cell_contents for c in cells if c != types.CellType())
    followed = (nn.Module, dict, list, tuple, set, frozenset, deque, functools.partial)
    if isinstance(value, (*ATOMS, *followed, types.MethodType, weakref.ref, _WrappedHook)):
        return ()
    return tuple(getattr(value, "__dict__", {}).values())


def affected(model: nn.Module, replaced: Iterable[nn.Module]) -> set[int]:
    """The ids of all values under a model that refer, in steps, to a replaced module."""
    readers: dict[int, list[int]] = {}
    stack, seen = [model], {id(model)}
    while stack:
        value: Any = stack.pop()
        for other in references(value):
            readers.setdefault(id(other), []).append(id(value))
            if id(other) not in seen and not isinstance(other, (*ATOMS, str, int, float)):
                seen.add(id(other))
                stack.append(other)
    found: set[int] = set()
    reached = [id(module) for module in replaced]
    while reached:
        for reader in readers.get(reached.pop(), ()):
            if reader not in found:
                found.add(reader)
                reached.append(reader)
    return found


def strangers(model: nn.Module, replaced: Iterable[nn.Module]) -> Iterator[str]:
    """Attributes through which a forward may come to modules of the given tree unseen."""
    wanted = affected(model, replaced) | {id(module) for module in replaced}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if reaches_hidden(value, wanted):
                yield f"{path}.{name}" if path else name


def reaches_hidden(start: Any, wanted: set[int]) -> bool:
    """Whether a value refers to one of the wanted modules where that cannot be replaced."""
    stack, seen = [(start, False)], {(id(start), False)}
    while stack:
        value, unseen = stack.pop()
        if isinstance(value, nn.Module):
            if unseen and id(value) in wanted:
                return True
            continue  # its attributes are looked through by themselves
        steps = [(other, unseen) for other in references(value)]
        steps += [(other, True) for other in hidden(value)]
        for step in steps:
            key = (id(step[0]), step[1])
            if key not in seen and not isinstance(step[0], (*ATOMS, str, int, float)):
                seen.add(key)
                stack.append(step)
    return False
