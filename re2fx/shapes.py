"""What a capture assumed about the sizes of its inputs, checked at every call."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import CaptureError, UncapturedError

Size = int | str


@dataclass(frozen=True)
class Shapes:
    """Sizes of the inputs: numbers that were fixed, and names that may take any value.

    Attributes:
        names: of the inputs.
        sizes: per input its sizes; the same name stands for the same size, and an expression
            over names for what it comes to. The names of an input that is not read have a dot.
        dtypes: per input its type.
        guards: expressions over the named sizes that must hold.
    """

    names: tuple[str, ...]
    sizes: tuple[tuple[Size, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    guards: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = {size for row in self.sizes for size in row if isinstance(size, str)}
        expressions = (*self.guards, *(size for size in sizes if not is_name(size)))
        functions = {expression: function_of(expression) for expression in expressions}
        for expression, (names, _) in functions.items():
            for name in names:
                if name not in sizes:
                    raise CaptureError(
                        f"what was assumed about the inputs, {expression}, is of {name}, which is "
                        "the size of no input"
                    )
        object.__setattr__(self, "_functions", functions)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_functions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def value(self, size: Size, known: dict[str, int]) -> int:
        """A size: the number, what its name stands for, or what its expression comes to."""
        if isinstance(size, int):
            return size
        return known[size] if is_name(size) else int(self.computed(size, known))

    def computed(self, expression: str, known: dict[str, int]) -> Any:
        """The value of a guard or of a size."""
        functions: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = vars(self)["_functions"]
        names, function = functions[expression]
        return function(*[known[name] for name in names])

    def in_words(self) -> dict[str, str]:
        """Per input its sizes, those that may vary as ``any``."""
        rows = ((size if isinstance(size, int) else "any" for size in row) for row in self.sizes)
        texts = (", ".join(map(str, row)) for row in rows)
        return {name: f"({text})" for name, text in zip(self.names, texts, strict=True)}

    def check(self, owner: str, values: Sequence[Any]) -> None:
        """Compare with the inputs of a call.

        Raises:
            UncapturedError: an input has another size or type than what was captured allows.
        """
        for name, sizes, dtype, value in zip(
            self.names, self.sizes, self.dtypes, values, strict=True
        ):
            if len(sizes) != value.dim() or dtype != value.dtype:
                raise UncapturedError(
                    f"{owner} was captured with {name} of {len(sizes)} dimensions and {dtype}, and "
                    f"called with {tuple(value.shape)} of {value.dtype}. {_REMEDY}"
                )
        known = named_sizes(self.sizes, values)
        for name, sizes, value in zip(self.names, self.sizes, values, strict=True):
            for index, (size, given) in enumerate(zip(sizes, value.shape, strict=True)):
                expected = self.value(size, known)
                if given != expected:
                    raise UncapturedError(
                        f"{owner} was captured with dimension {index} of {name} of size "
                        f"{expected}, and called with {tuple(value.shape)}. {_REMEDY} A size of 1 "
                        "is fixed: give an example of at least 2 where a size varies."
                    )
        failed = next((guard for guard in self.guards if not self.computed(guard, known)), None)
        small = any(size < 2 for name, size in known.items() if "." not in name)
        if failed or small:
            raise UncapturedError(
                f"{owner} was captured for other sizes than {shown(self, values)}; it may take "
                f"another path there ({failed or 'sizes below 2'}). {_REMEDY}"
            )


def named_sizes(sizes: Sequence[Sequence[Size]], values: Sequence[Any]) -> dict[str, int]:
    """What the names stand for in a call: the size each is given where it comes first."""
    known: dict[str, int] = {}
    for row, value in zip(sizes, values, strict=True):
        for size, given in zip(row, value.shape, strict=True):
            if isinstance(size, str) and is_name(size):
                known.setdefault(size, given)
    return known


def is_name(size: str) -> bool:
    """Whether a size is a name, of Dynamo's or ``input.dimension``, and no expression."""
    return size.replace(".", "_").isidentifier()


def function_of(expression: str) -> tuple[tuple[str, ...], Callable[..., Any]]:
    """An expression over sizes as Dynamo writes it: its names, and a function of their values."""
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

    known = {**SYMPY_INTERP, **_FUNCTIONS}
    found = {node.id for node in ast.walk(ast.parse(expression)) if isinstance(node, ast.Name)}
    names = tuple(sorted(found - known.keys()))
    function: Callable[..., Any] = eval(f"lambda {', '.join(names)}: {expression}", known)
    return names, function


def shown(shapes: Shapes, values: Sequence[Any]) -> str:
    """The inputs' sizes."""
    pairs = zip(shapes.names, values, strict=True)
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in pairs)


_FUNCTIONS = {
    "Eq": operator.eq, "Ne": operator.ne, "Mod": operator.mod, "PythonMod": operator.mod,
    "Max": max, "Min": min, "max": max, "min": min, "abs": abs,
}  # fmt: skip
_REMEDY = "Transform the model with example_inputs= of the sizes you call it with."
