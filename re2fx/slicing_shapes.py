"""Which operations that only move, cut or join elements leave the items of a slicing apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .overloads import overload
from .slicing_calls import Along, Call, State

RESHAPES = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
    "ravel", "Flatten", "Unflatten",
}  # fmt: skip
EXPANSIONS = {"expand", "expand_as", "broadcast_to"}


def kept(call: Call) -> State | None:
    """The values of the first argument one by one, whatever else is given."""
    return call.along(call.x)


def like(call: Call) -> State | None:
    """A new tensor of the first argument's shape."""
    return call.along(call.x) if call.alone(call.x) else None


def reshaped(call: Call) -> State | None:
    """Other dimensions for the elements in their order."""
    along = call.along(call.x)
    typed = any(isinstance(a, torch.dtype) for a in (*call.args, *call.kwargs.values()))
    if along is None or typed or not isinstance(call.out, Tensor):
        return None
    return call.reshaped(call.shape(call.x), tuple(call.out.shape), along)


def expanded(call: Call) -> State | None:
    """Repeated along other dimensions."""
    along = call.along(call.x)
    return None if along is None else along.at(along.dim + call.rank - len(call.shape(call.x)))


def permuted(call: Call) -> State | None:
    """Dimensions in another order; which, is seen on a tensor of the sizes 1, 2, 3..."""
    along = call.along(call.x)
    if along is None or call.module is not None or not call.alone(call.x):
        return None
    probe = torch.empty([1 + dim for dim in range(len(call.shape(call.x)))], device="meta")
    kwargs = {k: v for k, v in call.kwargs.items() if k not in ("input", "self")}
    if call.node.op == "call_method":
        moved = getattr(probe, str(call.node.target))(*call.args[1:], **kwargs)
    else:
        target: Any = call.node.target
        moved = target(probe, *call.args[1:], **kwargs)
    return along.at(tuple(moved.shape).index(along.dim + 1))


def attribute(call: Call) -> State | None:
    """``x.T`` and ``x.mT``."""
    return permuted(call) if call.args[1:] in (("T",), ("mT",)) else None


def axes(call: Call, value: Any, index: int, *names: str, default: Any = None) -> set[int] | None:
    """The dimensions an argument speaks of, counted from the left; None if of all or unknown."""
    given = call.arg(index, *(names or ("dim", "axis")), default=default)
    dims = [given] if isinstance(given, int) else given
    rank = len(call.shape(value))
    if not isinstance(dims, (list, tuple)) or not dims:
        return None
    if any(isinstance(dim, bool) or not isinstance(dim, int) for dim in dims):
        return None
    return {dim % rank for dim in dims}


def beside(index: int, default: Any = None, names: tuple[str, ...] = ()) -> Any:
    """A rule: along any dimension but those an argument names, and each result has them all."""

    def rule(call: Call) -> State | None:
        along = call.along(call.x)
        if along is None or not call.alone(call.x):
            return None
        dims = axes(call, call.x, index, *names, default=default)
        if dims is None or along.dim in dims:
            return None
        return (along,) * len(call.out) if isinstance(call.out, (tuple, list)) else along

    return rule


def reduced(index: int) -> Any:
    """A rule: along any dimension but those an argument names, which may be gone afterwards."""

    def rule(call: Call) -> State | None:
        along, named = call.along(call.x), ("dim", "axis")
        if along is None or not call.alone(call.x):
            return None
        dims = axes(call, call.x, index, *named)
        if dims is None or along.dim in dims or not isinstance(call.out, Tensor):
            return None
        gone = 0 if call.rank == len(call.shape(call.x)) else sum(d < along.dim for d in dims)
        return along.at(along.dim - gone)

    return rule


def separated(call: Call) -> State | None:
    """``unbind`` and ``select``: another dimension is gone."""
    along, default = call.along(call.x), None if isinstance(call.out, Tensor) else 0
    if along is None or not call.alone(call.x):
        return None
    dims = axes(call, call.x, 1, "dim", default=default)
    if dims is None or along.dim in dims:
        return None
    moved = along.at(along.dim - sum(dim < along.dim for dim in dims))
    return moved if isinstance(call.out, Tensor) else (moved,) * len(call.out)


def flipped(call: Call) -> State | None:
    """``x.flip(1, 2)`` and ``torch.flip(x, (1, 2))``."""
    along = call.along(call.x)
    dims = call.args[1:] if len(call.args) > 2 else call.arg(1, "dims")
    dims = [dims] if isinstance(dims, int) else dims
    if along is None or dims is None:
        return None
    rank = len(call.shape(call.x))
    return None if any(dim % rank == along.dim for dim in dims) else along


def cut(call: Call) -> State | None:
    """ATen's ``slice``: of another dimension, or all of this one."""
    along = call.along(call.x)
    if along is None or not call.alone(call.x):
        return None
    dim, step = call.arg(1, "dim", default=0), call.arg(4, "step", default=1)
    here = dim % len(call.shape(call.x)) == along.dim
    return along if not here or _is_all(call, dim, step) else None


def _is_all(call: Call, dim: int, step: int) -> bool:
    """Whether a slice is of a whole dimension, and would be of a shorter one."""
    return step == 1 and call.out.shape[dim] == call.shape(call.x)[dim]


def indexed(call: Call) -> State | None:
    """``x[...]`` of a tensor by numbers and slices, or of a tuple by a number."""
    state, index = call.state(call.x), call.args[1]
    if state is None or not call.alone(call.x):
        return None
    if not isinstance(state, Along):
        return state[index] if isinstance(index, int) else None
    parts = index if isinstance(index, tuple) else (index,)
    if not all(map(_is_plain, parts)) or sum(part is Ellipsis for part in parts) > 1:
        return None
    missing = len(call.shape(call.x)) - sum(p is not None and p is not Ellipsis for p in parts)
    before = after = 0
    for part in (*parts, Ellipsis) if Ellipsis not in parts else parts:
        if part is not None and part is not Ellipsis and before == state.dim:
            everything = isinstance(part, slice) and _runs_through(part, call.shape(call.x)[before])
            return state.at(after) if everything else None
        if part is None:
            after += 1
        elif part is Ellipsis:
            if before <= state.dim < before + missing:
                return state.at(after + state.dim - before)
            before, after = before + missing, after + missing
        else:
            before, after = before + 1, after + isinstance(part, slice)
    return None


def _is_plain(part: Any) -> bool:
    """Whether an index is a number, a slice by numbers, or makes no difference to others."""
    if isinstance(part, slice):
        bounds = (part.start, part.stop, part.step)
        return all(bound is None or isinstance(bound, int) for bound in bounds)
    return part is None or part is Ellipsis or type(part) is int


def _runs_through(part: slice, size: int) -> bool:
    """Whether a slice of a dimension is all of it, and would be of a shorter one."""
    ends = part.stop is None or part.stop >= size
    return part.start in (None, 0) and part.step in (None, 1) and ends


def joined(call: Call) -> State | None:
    """``cat`` along another dimension."""
    return _together(call, {a for a in map(call.along, _parts(call)) if a is not None}, False)


def stacked(call: Call) -> State | None:
    """``stack``; a new dimension before the sliced one moves it."""
    return _together(call, {a for a in map(call.along, _parts(call)) if a is not None}, True)


def _parts(call: Call) -> list[Any]:
    given = call.arg(0, "tensors")
    return list(given) if isinstance(given, (list, tuple)) else []


def _together(call: Call, found: set[Along], new: bool) -> State | None:
    if len(found) != 1:
        return None
    (along,) = found
    dim = call.arg(1, "dim", "axis", default=0) % call.rank
    if not new and dim == along.dim:
        return None
    if any(len(call.shape(part)) != call.rank - new for part in _parts(call)):
        return None
    if not all(call.also(part, along) for part in _parts(call)):
        return None
    return along.at(along.dim + (new and dim <= along.dim))


def first_read(node: Node) -> Node:
    """The first argument of a call."""
    return node.all_input_nodes[0]


def sizes(name: str | None, out: Any, along: State | None) -> tuple[str, tuple[int, ...]] | None:
    """What a call has to be written as to take any number of items, with its sizes."""
    if name not in RESHAPES | EXPANSIONS or not isinstance(along, Along):
        return None
    shape = tuple(-1 if dim == along.dim else size for dim, size in enumerate(out.shape))
    return "reshape" if name in RESHAPES else "expand", shape


def write_sized(graph: Graph, node: Node, x: Node, form: tuple[str, tuple[int, ...]]) -> Node:
    """The call in the words of a graph, with its sizes."""
    kind, shape = form
    if overload(node) is not None:
        target = getattr(torch.ops.aten, kind).default
        return graph.create_node("call_function", target, (x, list(shape)), {}, node.name)
    if kind == "expand":
        return graph.create_node("call_method", kind, (x, *shape), {}, node.name)
    return graph.create_node("call_function", torch.reshape, (x, shape), {}, node.name)
