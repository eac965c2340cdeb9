"""ATen operators by the names that Python has for them.

A graph from `torch.export` calls ``torch.ops.aten.add.Tensor`` where the user's code, and a graph
from another route, has ``+``, ``torch.add`` or ``x.add``. Nothing is known here about single
operators but those whose ATen name is not Python's: what one is called, what it writes and what it
returns a view of is read off its schema.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload
from torch.fx import Node

# ATen's name, and what Python calls the same.
_RENAMED: dict[str, Any] = {
    "_unsafe_view": "view",
    "_reshape_alias": "reshape",
    "_reshape_copy": "reshape",
    "_to_copy": "to",
    "numpy_T": "T",
    "split_with_sizes": "split",
    "sym_size": "size",
    "sym_numel": "numel",
    "sym_stride": "stride",
    "lift_fresh_copy": "clone",
    "slice": operator.getitem,
    "index": operator.getitem,
    "feature_dropout": F.dropout2d,
    "feature_alpha_dropout": F.alpha_dropout,
    "native_dropout": F.dropout,
    "native_layer_norm": F.layer_norm,
    "native_group_norm": F.group_norm,
    "native_batch_norm": F.batch_norm,
    "_native_batch_norm_legit": F.batch_norm,
    "_native_batch_norm_legit_functional": F.batch_norm,
    "cudnn_batch_norm": F.batch_norm,
    "_fused_rms_norm": F.rms_norm,
    "convolution": F.conv2d,
    "_scaled_dot_product_attention": F.scaled_dot_product_attention,
}


def overload(node: Node) -> OpOverload[..., Any] | None:
    """The operator a node calls, if it calls one."""
    return node.target if isinstance(node.target, OpOverload) else None


@cache
def spellings(op: OpOverload[..., Any]) -> frozenset[Any]:
    """The functions, and the names of methods, that are this operator in Python.

    Empty for an operator that is not torch's own: its name says nothing.
    """
    space, name = op._schema.name.split("::")
    if space != "aten":
        return frozenset()
    renamed = _RENAMED.get(name, name)
    if not isinstance(renamed, str):
        return frozenset({renamed})
    functions = (getattr(owner, renamed, None) for owner in (torch, F))
    return frozenset({renamed, *filter(callable, functions)})


@cache
def writes(op: OpOverload[..., Any]) -> bool:
    """Whether it writes into its first argument."""
    first = next(iter(op._schema.arguments), None)
    return first is not None and first.alias_info is not None and first.alias_info.is_write


@cache
def returns_view(op: OpOverload[..., Any]) -> bool:
    """Whether its result may share memory with an argument, as its schema has it."""
    return any(value.alias_info is not None for value in op._schema.returns)


@cache
def argument(op: OpOverload[..., Any], *names: str) -> int | None:
    """The place of an argument that has one of these names."""
    for index, declared in enumerate(op._schema.arguments):
        if declared.name in names:
            return index
    return None


@dataclass(frozen=True)
class Named:
    """An operator by its name, which can be pickled; operators cannot."""

    space: str
    name: str
    overload: str


def packed(target: Any) -> Any:
    """A node's target as it is pickled."""
    if not isinstance(target, OpOverload):
        return target
    space, name = target._schema.name.split("::")
    return Named(space, name, target._overloadname)


def unpacked(target: Any) -> Any:
    """A node's target again."""
    if not isinstance(target, Named):
        return target
    return getattr(getattr(getattr(torch.ops, target.space), target.name), target.overload)


def is_check(node: Node) -> bool:
    """A statement about sizes, types or devices that computes nothing."""
    op = overload(node)
    words = ("_assert", "sym_constrain_range")
    return op is not None and any(word in op._schema.name for word in words)
