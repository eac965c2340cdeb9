"""Sums, differences and constant factors: how FX nodes spell arithmetic."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from .overloads import overload, spellings

_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__radd__", "__iadd__"}
_REVERSED = {torch.rsub, "rsub", "__rsub__"}  # the second operand less the first
_SUBTRACTIONS = _REVERSED | {
    operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract", "subtract_",
    "__sub__", "__isub__",
}  # fmt: skip
_NEGATIONS = {operator.neg, torch.neg, torch.negative, "neg", "negative", "__neg__"}
# One operation that multiplies and adds to its first operand.
_FUSED_ADDITIONS: set[Any] = {
    torch.addcmul, torch.addcdiv, torch.lerp, torch.addmm, torch.addmv, torch.addbmm,
    torch.baddbmm, torch.addr,
}  # fmt: skip
_FUSED_ADDITIONS |= {function.__name__ for function in _FUSED_ADDITIONS}
_FUSED_ADDITIONS |= {f"{name}_" for name in _FUSED_ADDITIONS if isinstance(name, str)}
_MULTIPLICATIONS = {
    operator.mul,
    operator.imul,
    torch.mul,
    torch.multiply,
    "mul",
    "mul_",
    "multiply",
}
_DIVISIONS = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"}


def calls(node: Node, names: set[Any]) -> bool:
    """Whether a node calls one of some functions or methods, or the operator one of them is."""
    if node.op not in ("call_function", "call_method"):
        return False
    op = overload(node)
    return node.target in names if op is None else not names.isdisjoint(spellings(op))


def is_add(node: Node) -> bool:
    """An addition in any spelling, in place or not."""
    return calls(node, _ADDS)


def is_subtraction(node: Node) -> bool:
    """A subtraction in any spelling, in place or not."""
    return calls(node, _SUBTRACTIONS)


def is_sum(node: Node) -> bool:
    """An addition or a subtraction."""
    return is_add(node) or is_subtraction(node)


def subtracts_from_second(node: Node) -> bool:
    """``rsub(y, x)``, which is ``x - y``."""
    return calls(node, _REVERSED)


def is_fused_addition(node: Node) -> bool:
    """A product and an addition in one operation, as ``addcmul`` and ``lerp``."""
    return calls(node, _FUSED_ADDITIONS)


def negates(node: Node) -> bool:
    """``-x``."""
    return calls(node, _NEGATIONS)


def constant_factor(node: Node) -> tuple[Node, float] | None:
    """``(x, k)`` for ``x * k``, ``k * x`` and ``x / k`` with a Python number ``k``."""
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if calls(node, _MULTIPLICATIONS):
        if isinstance(left, (int, float)) and isinstance(right, Node):
            left, right = right, left
        if isinstance(left, Node) and isinstance(right, (int, float)):
            return left, float(right)
    if calls(node, _DIVISIONS) and isinstance(left, Node) and isinstance(right, (int, float)):
        return (left, 1.0 / right) if right != 0 else None
    return None


def is_product(node: Node) -> bool:
    """A multiplication or division of any two values."""
    return calls(node, _MULTIPLICATIONS | _DIVISIONS)
