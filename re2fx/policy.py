"""Which residuals and chains may be rewired: the user's word, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import OptionError
from .plan import Residual, Weight
from .text import amount, count

Predicate = Callable[[Residual], object]
Select = Predicate | str | Sequence[str]


@dataclass(frozen=True)
class Policy:
    """What is rewired of that which can be.

    Attributes:
        select: a function of a `Residual`, or patterns of module paths as in `fnmatch`, of which
            those with ``!`` in front exclude; None for all.
        min_chain: number of residuals from which on a chain is rewired.
        min_saving: bytes that reconstructing a chain must save: a whole number, or as a fraction
            of what it keeps when stored.
        below: path of the submodule that is rewired by itself; paths are those of the model.
        post_norm: whether the coupling lets norms behind additions close blocks.
    """

    select: Select | None = None
    min_chain: int = 2
    min_saving: int | float | None = None
    below: str = ""
    post_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "select", _checked_select(self.select))
        _check_chain(self.min_chain)
        _check_saving(self.min_saving)

    def check_shapes(self, example_inputs: Any) -> None:
        """Bytes can only be compared where shapes are known.

        Raises:
            OptionError: ``min_saving`` is given without example inputs.
        """
        if self.min_saving is not None and not has_tensors(example_inputs):
            raise OptionError(
                f"min_saving={self.min_saving!r}: what a chain saves depends on the inputs' "
                "shapes. Pass example_inputs= of the shape you train with; tensors on "
                "device='meta' take no memory."
            )

    def deselects(self, residual: Residual) -> str | None:
        """Why a residual is not selected, or None if it is."""
        residual = residual.below(self.below)
        path = residual.location.module
        where = path or "the model itself"
        if self.select is None:
            return None
        if callable(self.select):
            return None if self.select(residual) else f"the function select= says no to {where}"
        excluded = [p for p in self.select if p[:1] == "!" and fnmatchcase(path, p[1:])]
        if excluded:
            return f"{excluded[0]!r} of select= excludes {where}"
        chosen = [p for p in self.select if p[:1] != "!"]
        if chosen and not any(fnmatchcase(path, pattern) for pattern in chosen):
            return f"no pattern of select= matches {where}"
        return None

    def is_met(self, weight: Weight) -> bool:
        """Whether a chain saves enough."""
        if self.min_saving is None:
            return True
        whole = isinstance(self.min_saving, int)
        return weight.saving >= self.min_saving * (1 if whole else weight.stored)

    def shortfall(self, weight: Weight, length: int) -> str:
        """Why a chain does not save enough, with the figures."""
        share = f" ({weight.saving / weight.stored:.0%})" if weight.stored else ""
        wanted = f"{self.min_saving!r}"
        if isinstance(self.min_saving, int):
            wanted += f" ({amount(self.min_saving)})"
        return (
            f"rewired, its chain of {count(length, 'residual')} would keep "
            f"{amount(weight.reversible)} for the backward instead of {amount(weight.stored)}; "
            f"that saves {amount(weight.saving)}{share}, less than min_saving={wanted}"
        )


def has_tensors(example_inputs: Any) -> bool:
    """Whether example inputs have shapes."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(example_inputs))


def _checked_select(select: Any) -> Predicate | tuple[str, ...] | None:
    """Patterns as a tuple, which can be compared and hashed; a function as it is.

    Raises:
        OptionError: it is neither.
    """
    if select is None:
        return None
    if callable(select):
        predicate: Predicate = select
        if not isinstance(select, Hashable):
            raise OptionError(
                f"select={select!r}: the function must be hashable, because compilations of one "
                "model are compared by their options; pass one of its methods or a lambda"
            )
        return predicate
    patterns = (select,) if isinstance(select, str) else select
    texts = isinstance(patterns, Sequence) and all(isinstance(p, str) for p in patterns)
    if not texts or not patterns or any(p in ("", "!") for p in patterns):
        raise OptionError(
            f"select={select!r}: expected a function that takes a re2fx.Residual, a pattern of "
            "module paths such as 'layers.2.*', or a list of patterns; '!' in front excludes"
        )
    return tuple(patterns)


def _check_chain(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise OptionError(
            f"min_chain={value!r}: expected a whole number of at least 2. A chain of one keeps two "
            "states where its branch keeps about one, so rewiring it changes the function and "
            "saves nothing."
        )


def _check_saving(value: Any) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = number and math.isfinite(value) and value >= 0
    if not fits or (isinstance(value, float) and value >= 1):
        raise OptionError(
            f"min_saving={value!r}: expected bytes as a whole number of at least 0, or a fraction "
            "of what a chain keeps, at least 0.0 and below 1.0"
        )
