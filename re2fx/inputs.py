"""How the arguments of a call become the placeholders of a graph, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .errors import InputError, UncapturedError
from .shapes import Shapes

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Slot:
    """One leaf of the inputs: a placeholder with a name, or a constant.

    Attributes:
        name: for messages, and of the placeholder.
        constant: the fixed value.
        is_constant: whether it is fixed.
        is_tensor: whether an example showed that it is a tensor.
    """

    name: str
    constant: Any = None
    is_constant: bool = False
    is_tensor: bool = False


@dataclass(frozen=True)
class Call:
    """Positional and keyword arguments of one call, as example inputs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def leaves(self) -> list[Any]:
        """What is in them."""
        return pytree.tree_leaves((self.args, self.kwargs))


@dataclass(frozen=True)
class InputSpec:
    """The structure of a model's inputs.

    Attributes:
        owner: the model's class name, for messages.
        signature: the signature of its forward.
        tree: the bound arguments by name, nested as given, with a slot at each leaf.
        shapes: what the captures assumed about sizes, if they did.
    """

    owner: str
    signature: inspect.Signature
    tree: dict[str, Any]
    shapes: tuple[Shapes, ...] = ()

    @property
    def names(self) -> list[str]:
        """The placeholders' names, in order."""
        slots = pytree.tree_leaves(self.tree)
        return [slot.name for slot in slots if not slot.is_constant]

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any = None) -> InputSpec:
        """Read the structure off the signature and, where given, off example inputs.

        Without examples each argument without a default is one placeholder, and every argument
        with a default is fixed to it. With examples each tensor in them is one placeholder, and
        everything else in them is fixed.
        """
        owner = type(model).__name__
        signature = _plain(inspect.signature(model.forward))
        if example_inputs is None:
            tree = {
                name: Slot(name) if p.default is p.empty else Slot(name, p.default, True)
                for name, p in signature.parameters.items()
                if p.kind not in _VARIADIC
            }
            return cls(owner, signature, tree)

        def slot(path: Any, leaf: Any) -> Slot:
            fixed = not isinstance(leaf, torch.Tensor)
            return Slot(_name(path), leaf if fixed else None, fixed, not fixed)

        arguments = bind(owner, signature, *split(example_inputs))
        return cls(owner, signature, pytree.tree_map_with_path(slot, arguments))

    def arguments(self, placeholder: Callable[[str], Any]) -> inspect.BoundArguments:
        """The model's arguments, with a placeholder where a tensor goes."""
        values = pytree.tree_map(
            lambda s: s.constant if s.is_constant else placeholder(s.name), self.tree
        )
        return inspect.BoundArguments(self.signature, values)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The placeholders' values in a call.

        Raises:
            UncapturedError: a structure or a fixed value differs from what was captured.
            InputError: the arguments do not fit the signature, or a fixed fraction differs.
        """
        arguments = bind(self.owner, self.signature, args, kwargs)
        slots, structure = pytree.tree_flatten(self.tree)
        try:
            leaves = structure.flatten_up_to(arguments)
        except ValueError as error:
            raise UncapturedError(
                f"{self.owner} was captured with inputs of another structure: {error}. Transform "
                "the model with example_inputs= of the structure you call it with."
            ) from None
        values = []
        for slot, leaf in zip(slots, leaves, strict=True):
            if slot.is_tensor and not isinstance(leaf, torch.Tensor):
                raise UncapturedError(
                    f"{self.owner} was captured with a tensor for {slot.name} and called with "
                    f"{leaf!r}. Transform it with example_inputs= as you call it."
                )
            if not slot.is_constant:
                values.append(leaf)
            elif not _same(leaf, slot.constant):
                # A number that varies continuously would be captured at every call.
                varies = isinstance(leaf, float) and isinstance(slot.constant, float)
                raise (InputError if varies else UncapturedError)(
                    f"{self.owner} was captured with {slot.name}={slot.constant!r} and called with "
                    f"another value. Transform it with example_inputs= that hold this argument."
                )
        for shapes in self.shapes:
            shapes.check(self.owner, values)
        return values


def _plain(signature: inspect.Signature) -> inspect.Signature:
    """Without annotations, which need not survive pickling."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return inspect.Signature(parameters)


def split(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tuple, a dict, or one argument."""
    if isinstance(example_inputs, Call):
        return example_inputs.args, example_inputs.kwargs
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (example_inputs,), {}


def bind(
    owner: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments by name, defaults applied."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{owner}: {error}; its forward takes {signature}") from None
    bound.apply_defaults()
    kinds = signature.parameters
    return {
        name: value
        for name, value in bound.arguments.items()
        if kinds[name].kind not in _VARIADIC or value
    }


def _same(value: Any, constant: Any) -> bool:
    if value is constant:
        return True
    if isinstance(value, torch.Tensor) or isinstance(constant, torch.Tensor):
        return False
    return type(value) is type(constant) and bool(value == constant)


def _name(path: Any) -> str:
    """``clips_0`` for the first clip of the argument ``clips``."""
    parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
    return "_".join("".join(c if c.isalnum() else "_" for c in part) for part in parts)
