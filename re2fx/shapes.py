"""What a capture assumed about the sizes of its inputs, checked at every call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import InputError

Size = int | str


@dataclass(frozen=True)
class Shapes:
    """Sizes of the inputs: numbers that were fixed, and names that may take any value.

    Attributes:
        names: of the inputs.
        sizes: per input its sizes; the same name stands for the same size.
        dtypes: per input its type.
        guards: expressions over the named sizes that must hold.
    """

    names: tuple[str, ...]
    sizes: tuple[tuple[Size, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    guards: tuple[str, ...] = ()

    def check(self, owner: str, values: Sequence[Any]) -> None:
        """Compare with the inputs of a call.

        Raises:
            InputError: an input has another size or type than what was captured allows.
        """
        known: dict[str, int] = {}
        for name, sizes, dtype, value in zip(
            self.names, self.sizes, self.dtypes, values, strict=True
        ):
            if len(sizes) != value.dim() or dtype != value.dtype:
                raise InputError(
                    f"{owner} was captured with {name} of {len(sizes)} dimensions and {dtype}, and "
                    f"called with {tuple(value.shape)} of {value.dtype}. {_REMEDY}"
                )
            for index, (size, given) in enumerate(zip(sizes, value.shape, strict=True)):
                expected = known.setdefault(size, given) if isinstance(size, str) else size
                if given != expected:
                    raise InputError(
                        f"{owner} was captured with dimension {index} of {name} of size "
                        f"{expected}, and called with {tuple(value.shape)}. {_REMEDY} A size of 1 "
                        "is fixed: give an example of at least 2 where a size varies."
                    )
        failed = next((guard for guard in self.guards if not holds(guard, known)), None)
        small = next((name for name, size in known.items() if size < 2), None)
        if failed or small:
            raise InputError(
                f"{owner} was captured for other sizes than {shown(self, values)}; it may take "
                f"another path there ({failed or 'sizes below 2'}). {_REMEDY}"
            )


def holds(guard: str, sizes: dict[str, int]) -> bool:
    """Whether an expression over sizes is true."""
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

    return bool(eval(guard, dict(SYMPY_INTERP), dict(sizes)))


def shown(shapes: Shapes, values: Sequence[Any]) -> str:
    """The inputs' sizes."""
    pairs = zip(shapes.names, values, strict=True)
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in pairs)


_REMEDY = "Transform the model with example_inputs= of the sizes you call it with."
