"""One call of an FX graph as the rules of slicing see it: its name, arguments, shapes and slicings.

A value is sliced along a dimension that holds `items` items, ``factor`` elements of each in a row.
Inside a region such a row may be repeated, as in ``(T, B, C) -> (T * B, C)`` sliced along ``B``:
the dimension then is ``outer`` such rows.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg

from .overloads import argument, overload, writes


class Along(NamedTuple):
    """Where a value is sliced: ``shape[dim] == outer * items * factor``."""

    dim: int
    factor: int
    outer: int = 1

    def at(self, dim: int) -> Along:
        """The same in another dimension."""
        return self._replace(dim=dim)


# A value that is no tensor is a tuple of some.
State = Along | tuple["Along | None", ...]
Shape = tuple[int, ...]

_OPERATORS = {
    "truediv": "div", "itruediv": "div", "floordiv": "floor_divide", "mod": "remainder",
    "and_": "bitwise_and", "or_": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not",
    "iadd": "add", "isub": "sub", "imul": "mul", "ipow": "pow",
}  # fmt: skip
# In ATen's own words, and in the words of the rules.
_ATEN = {
    "_unsafe_view": "view", "_reshape_alias": "reshape", "_to_copy": "to", "_softmax": "softmax",
    "_log_softmax": "log_softmax", "lift_fresh_copy": "clone", "alias": "detach",
    "constant_pad_nd": "pad", "convolution": "conv", "linalg_vector_norm": "vector_norm",
    "max_pool2d_with_indices": "max_pool2d", "max_pool3d_with_indices": "max_pool3d",
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d", "_adaptive_avg_pool3d": "adaptive_avg_pool3d",
    "_prelu_kernel": "mul", "native_layer_norm": "layer_norm", "_fused_rms_norm": "rms_norm",
    "upsample_nearest1d": "interpolate", "upsample_nearest2d": "interpolate",
    "upsample_nearest3d": "interpolate", "upsample_bilinear2d": "interpolate",
    "upsample_bicubic2d": "interpolate", "upsample_linear1d": "interpolate",
    "upsample_trilinear3d": "interpolate",
}  # fmt: skip
# Python's functions of these names do not all take their arguments in one order.
_OF_F_ALONE = {"embedding", "instance_norm", "batch_norm"}


def functions(names: Iterable[str]) -> dict[Any, str]:
    """The names of the functions that the rules are for."""
    named: dict[Any, str] = {getattr(operator, k): v for k, v in _OPERATORS.items()}
    named[torch.linalg.vector_norm] = "vector_norm"
    named[getattr] = "getattr"
    for name in names:
        for owner in (F, operator) if name in _OF_F_ALONE else (F, torch, operator):
            for spelling in (name, f"{name}_"):
                function = getattr(owner, spelling, None)
                if callable(function) and not isinstance(function, type):
                    named.setdefault(function, name)
    return named


def name_of(node: Node, named: Mapping[Any, str]) -> str | None:
    """What a function or method is called, whatever the spelling."""
    op = overload(node)
    if op is not None:
        space, name = op._schema.name.split("::")
        name = name.removesuffix("_") if writes(op) else name
        return _ATEN.get(name, name) if space == "aten" else None
    if node.op == "call_method":
        name = str(node.target)
        return name if name.startswith("_") else name.removesuffix("_")
    return named.get(node.target)


class Call:
    """A node, what is known of its arguments, and the slicing asked about.

    Attributes:
        node: the call.
        module: the module called, if one is.
        out: the value that stands for its result.
        items: number of items.
        more: values from outside that have to be sliced too, as rules find out.
    """

    def __init__(
        self,
        node: Node,
        module: nn.Module | None,
        values: Mapping[Node, Any],
        constants: Mapping[Node, Any],
        items: int,
        states: Mapping[Node, State],
    ) -> None:
        self.node, self.module, self.items = node, module, items
        self.out = values[node]
        self.more: dict[Node, Along] = {}
        self._values, self._states = values, states
        given: Any = map_arg((node.args, node.kwargs), lambda n: constants.get(n, n))
        self.args: tuple[Any, ...] = given[0]
        self.kwargs: dict[str, Any] = given[1]

    def arg(self, index: int, *names: str, default: Any = None) -> Any:
        """An argument by its place, for an ATen operator by its name; of a module, a member."""
        if self.module is not None and index > 0:
            found = (getattr(self.module, n) for n in names if hasattr(self.module, n))
            return next(found, default)
        for name in names:
            if name in self.kwargs:
                return self.kwargs[name]
        op = overload(self.node)
        place = index if op is None else argument(op, *names)
        known = place is not None and place < len(self.args)
        return self.args[place] if known and place is not None else default

    @property
    def x(self) -> Any:
        """The first argument."""
        if self.args:
            return self.args[0]
        return next((self.kwargs[n] for n in ("input", "self", "query") if n in self.kwargs), None)

    @property
    def tensors(self) -> list[Node]:
        """All values among the arguments."""
        found: dict[Node, None] = {}
        map_aggregate(
            (self.args, self.kwargs),
            lambda a: found.setdefault(a) if isinstance(a, Node) else None,
        )
        return list(found)

    def state(self, value: Any) -> State | None:
        """How a value is sliced; None if it is whole."""
        return self._states.get(value) if isinstance(value, Node) else None

    def along(self, value: Any) -> Along | None:
        """How a tensor is sliced."""
        state = self.state(value)
        return state if isinstance(state, Along) else None

    def alone(self, *values: Any) -> bool:
        """Whether none but these are sliced."""
        return not any(n in self._states for n in self.tensors if all(n is not v for v in values))

    def shape(self, value: Any) -> Shape:
        """The shape of a tensor."""
        tensor = self._values[value] if isinstance(value, Node) else value
        return tuple(tensor.shape)

    @property
    def rank(self) -> int:
        """Number of dimensions of the result."""
        return self.out.dim() if isinstance(self.out, Tensor) else 0

    def broadcast(self, operands: Iterable[Any], rank: int | None = None) -> Along | None:
        """How a result is sliced that operands are broadcast to."""
        rank = self.rank if rank is None else rank
        operands = [value for value in operands if isinstance(value, (Node, Tensor))]
        found = {
            along.at(along.dim + rank - len(self.shape(value)))
            for value in operands
            if (along := self.along(value)) is not None
        }
        if len(found) != 1:
            return None
        (along,) = found
        return along if all(self.joins(value, along, rank) for value in operands) else None

    def joins(self, value: Any, along: Along, rank: int | None = None) -> bool:
        """Whether an operand, broadcast to a result that is sliced so, gives its part to each."""
        rank = self.rank if rank is None else rank
        if not isinstance(value, (Node, Tensor)):
            return True
        shape = self.shape(value)
        dim = along.dim - (rank - len(shape))
        own = self.along(value)
        if own is not None:
            return own == along.at(dim)
        return dim < 0 or shape[dim] == 1 or self.also(value, along.at(dim))

    def also(self, value: Any, along: Along) -> bool:
        """Whether a value is sliced so, or can be from now on."""
        own = self.state(value)
        if own is not None or not isinstance(value, Node) or along.outer != 1:
            return own is not None and own == along
        if self.shape(value)[along.dim] != self.items * along.factor:
            return False
        return self.more.setdefault(value, along) == along

    def reshaped(self, before: Shape, after: Shape, along: Along) -> Along | None:
        """Where the items lie when the elements, in their order, get another shape."""
        rows = prod(before[: along.dim]) * along.outer
        for dim, size in enumerate(after):
            lead = prod(after[:dim])
            if size == 1 or rows % lead:
                continue
            outer = rows // lead
            if size % (outer * self.items) == 0:
                return Along(dim, size // (outer * self.items), outer)
        return None


def fits(value: Any, state: State | None, items: int) -> bool:
    """Whether a value has the sizes that its slicing says."""
    if state is None:
        return True
    if isinstance(state, Along):
        plain = isinstance(value, Tensor) and state.dim < value.dim()
        return plain and value.shape[state.dim] == state.outer * items * state.factor
    parts = isinstance(value, (tuple, list)) and len(value) == len(state)
    return parts and all(fits(v, s, items) for v, s in zip(value, state, strict=True))
