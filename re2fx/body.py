"""What a frame runs: a straight line of parts over numbered values.

Most bodies have one part. Where some of the nodes are independent along a dimension, they are a
part of their own that is run slice by slice::

    values 0, 1   inputs: the stream, and a side input
    part 0        2 = windows(norm(0))
    part 1        3 = attention(2, 1)      in 8 slices of 2 along its dimension 0
    part 2        4 = merge(3)

No FX in here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .observers import has_hooks
from .replay import Autocast, Lookup

Function = Callable[..., Any]


@dataclass(frozen=True)
class Slicing:
    """How a part is run slice by slice.

    Attributes:
        function: for slices; its sizes are those of the shapes it was proved for.
        slices: at most so many.
        reads: per value read, along which dimension it is cut and how many elements an item has
            there; None for one that is read whole.
        writes: the same of the results, which are laid together.
        shapes: per value read, the sizes for which independence was proved, with 0 for that of
            the items; None for what is no tensor.
        modules: those it calls, with their classes.
        quiet: dropouts that must not draw.
    """

    function: Function
    slices: int
    reads: tuple[tuple[int, int] | None, ...]
    writes: tuple[tuple[int, int], ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    modules: tuple[tuple[str, type], ...] = ()
    quiet: tuple[str, ...] = ()

    def sizes(self, root: Any, values: Sequence[Any]) -> list[int]:
        """How many items each slice has; empty where it must be run whole.

        What was proved holds for the shapes, the modules and the probabilities it was proved for.
        """
        items = self._items(values)
        if items < 2 or not self._holds(root):
            return []
        slices = min(self.slices, items)
        return [items // slices + (index < items % slices) for index in range(slices)]

    def _items(self, values: Sequence[Any]) -> int:
        """How many items the values have; 0 if their shapes are others than those proved for."""
        found: set[int] = set()
        for value, place, shape in zip(values, self.reads, self.shapes, strict=True):
            if shape is None:
                continue
            sizes = list(value.shape) if isinstance(value, torch.Tensor) else []
            if place is not None and len(sizes) == len(shape):
                items, rest = divmod(sizes[place[0]], place[1])
                found.add(0 if rest else items)
                sizes[place[0]] = 0
            if tuple(sizes) != shape:
                return 0
        return found.pop() if len(found) == 1 else 0

    def _holds(self, root: Any) -> bool:
        """Whether the modules are of their classes, without hooks, and draw no random numbers."""
        for target, kind in self.modules:
            module = _member(root, target)
            if has_hooks(module) or type(module) is not kind:
                return False
            if target in self.quiet and _draws(module):
                return False
        return True

    def cut(self, values: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
        """The values that each slice reads."""
        columns = []
        for value, place in zip(values, self.reads, strict=True):
            if place is None:
                columns.append([value] * len(sizes))
                continue
            dim, factor = place
            columns.append(list(value.split([size * factor for size in sizes], dim)))
        return [list(row) for row in zip(*columns, strict=True)]

    def join(self, results: Sequence[Sequence[Any]]) -> list[Any]:
        """The results of the slices laid together."""
        columns = zip(*results, strict=True)
        return [
            torch.cat(column, dim) for column, (dim, _) in zip(columns, self.writes, strict=True)
        ]

    def lay(
        self,
        joined: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
        sizes: Sequence[int],
        index: int,
    ) -> None:
        """Copy the results of one slice to their places in those that `join` would give."""
        begin = sum(sizes[:index])
        for whole, own, (dim, factor) in zip(joined, results, self.writes, strict=True):
            whole.narrow(dim, begin * factor, sizes[index] * factor).copy_(own)


@dataclass(frozen=True)
class Part:
    """Some of the nodes of a body: ``writes = function(root, *reads)``.

    Attributes:
        function: returns a tuple of all results, or the only one if not ``packed``.
        reads: the numbers of values it reads.
        writes: those of its results.
        lookup: finds the parameters and buffers it uses.
        packed: whether the function returns a tuple.
        slicing: how it may be run slice by slice.
        apart: whether it is run again for its own gradient alone, and once more for the parts
            behind it: nothing that it saves is there while they are differentiated.
    """

    function: Function
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    lookup: Lookup
    packed: bool = True
    slicing: Slicing | None = None
    apart: bool = False

    def run(self, root: Any, values: Sequence[Any]) -> list[Any]:
        """All of it at once."""
        result = self.function(root, *values)
        return list(result) if self.packed else [result]


@dataclass(frozen=True)
class Fixed:
    """Inputs that a body was made for.

    Attributes:
        inputs: of each leaf sizes, strides and dtype if it is a tensor, else the value itself.
        structure: the containers around them.
        device: of all tensors.
        autocasts: the state of autocast.
    """

    inputs: tuple[Any, ...]
    structure: Any
    device: torch.device
    autocasts: tuple[Autocast, ...]

    @classmethod
    def of(cls, inputs: Sequence[Any], device: torch.device) -> Fixed:
        """Those that are given, as if they were on a device, under the present autocast."""
        leaves, structure = pytree.tree_flatten(list(inputs))
        kinds = dict.fromkeys(("cpu", device.type))
        autocasts = [Autocast.now(kind) for kind in kinds if kind != "meta"]
        return cls(tuple(map(_told, leaves)), structure, device, tuple(autocasts))

    def holds(self, inputs: Sequence[Any]) -> bool:
        """Whether others are like them."""
        leaves, structure = pytree.tree_flatten(list(inputs))
        same = structure == self.structure and tuple(map(_told, leaves)) == self.inputs
        there = all(x.device == self.device for x in leaves if isinstance(x, torch.Tensor))
        return same and there and all(Autocast.now(a.device_type) == a for a in self.autocasts)


def _told(value: Any) -> Any:
    """What of an input a body may depend on before it runs."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return value


@dataclass(frozen=True)
class Body:
    """What a frame runs.

    Attributes:
        parts: in order.
        inputs: how many values are given, the first ones.
        outputs: the numbers of the results.
        fixed: the inputs that it was made for; None for all.
        otherwise: what is run on others.
        made: bytes of what it makes on the way, for example inputs.
    """

    parts: tuple[Part, ...]
    inputs: int
    outputs: tuple[int, ...]
    fixed: Fixed | None = None
    otherwise: Body | None = None
    made: int = 0

    def fitting(self, inputs: Sequence[Any]) -> Body:
        """The body for some inputs."""
        if self.fixed is None or self.fixed.holds(inputs):
            return self
        assert self.otherwise is not None, "there is one for all inputs"
        return self.otherwise

    @cached_property
    def frees(self) -> tuple[tuple[int, ...], ...]:
        """Per part the values that nothing reads behind it."""
        last = {place: index for index, part in enumerate(self.parts) for place in part.reads}
        kept = {*self.outputs, *range(self.inputs)}
        return tuple(
            tuple(place for place, index in last.items() if index == number and place not in kept)
            for number in range(len(self.parts))
        )

    @classmethod
    def whole(cls, function: Function, inputs: int, lookup: Lookup) -> Body:
        """Of one function with one result."""
        part = Part(function, tuple(range(inputs)), (inputs,), lookup, packed=False)
        return cls((part,), inputs, (inputs,))

    @property
    def sliced(self) -> bool:
        """Whether a part of it may run slice by slice."""
        return any(part.slicing is not None for part in self.parts)


def _member(root: Any, target: str) -> Any:
    for name in target.split("."):
        root = getattr(root, name, None)
    return root


def _draws(module: Any) -> bool:
    """Whether a dropout, or an attention with one, draws random numbers."""
    return bool(module.training and getattr(module, "p", getattr(module, "dropout", 0)))
