"""How the flat results of a captured graph become what the model returns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


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

    def strangers(self) -> list[torch.Tensor]:
        """Tensors in the template that are no results."""
        found: list[torch.Tensor] = []

        def note(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                found.append(leaf)
            return leaf

        replaced(self.template, note)
        return found


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
