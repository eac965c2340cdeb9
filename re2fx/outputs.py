"""How the flat results of a captured graph become what the model returns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import CaptureError


@dataclass(frozen=True)
class Result:
    """Stands for a result of the graph."""

    index: int


@dataclass(frozen=True)
class OutputSpec:
    """The structure of what a model returns.

    Attributes:
        template: what it returned when it was captured, a `Result` in place of each tensor.
    """

    template: Any

    @classmethod
    def of(cls, returned: Any, results: Sequence[torch.Tensor]) -> OutputSpec:
        """Read the structure off a returned object that holds the very tensors of ``results``."""
        number = {id(value): Result(index) for index, value in enumerate(results)}
        return cls(replaced(returned, lambda leaf: number.get(id(leaf), leaf)))

    def used(self, results: Sequence[torch.Tensor]) -> list[int]:
        """Which results are returned, in order; others are left over from side effects.

        Raises:
            CaptureError: an object that cannot be taken apart holds one of the others.
        """
        found: set[int] = set()
        opaque: list[Any] = []

        def note(leaf: Any) -> Any:
            if isinstance(leaf, Result):
                found.add(leaf.index)
            elif hasattr(leaf, "__dict__"):
                opaque.append(leaf)
            return leaf

        replaced(self.template, note)
        left = {id(value) for index, value in enumerate(results) if index not in found}
        for leaf in opaque:
            if holds(leaf, left):
                raise CaptureError(
                    f"it returns a {type(leaf).__name__}, which holds tensors and which pytree "
                    "does not know; ask it to return tensors, tuples, dicts or dataclasses"
                )
        return sorted(found)

    def strangers(self) -> list[torch.Tensor]:
        """Tensors in the template that are no results."""
        found: list[torch.Tensor] = []

        def note(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                found.append(leaf)
            return leaf

        replaced(self.template, note)
        return found


def holds(value: Any, wanted: set[int], depth: int = 4) -> bool:
    """Whether an object or what it holds, some steps deep, is one of those with some ids."""
    if id(value) in wanted:
        return True
    if depth == 0 or isinstance(value, (torch.nn.Module, type)):
        return False
    inner = list(vars(value).values()) if hasattr(value, "__dict__") else []
    if isinstance(value, dict):
        inner += value.values()
    elif isinstance(value, (list, tuple)):
        inner += value
    return any(holds(item, wanted, depth - 1) for item in inner)


def build(spec: OutputSpec, results: Sequence[Any]) -> Any:
    """What the model returns, from the graph's results."""
    return replaced(spec.template, lambda x: results[x.index] if isinstance(x, Result) else x)


def replaced(value: Any, change: Any) -> Any:
    """A copy with every leaf changed: of containers known to pytree, and of dataclasses."""

    def leaf(item: Any) -> Any:
        plain = dataclasses.is_dataclass(item) and not isinstance(item, (type, Result))
        if not plain or pytree.is_namedtuple_instance(item):
            return change(item)
        new = copy.copy(item)
        for field in dataclasses.fields(item):
            object.__setattr__(new, field.name, replaced(getattr(item, field.name), change))
        return new

    return pytree.tree_map(leaf, value)
