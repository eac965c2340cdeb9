"""How a skip-add is spelled: additions, subtractions, constant scales, in place or not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import re2fx
from tests.compare import assert_reversible_equals_store
from tests.reference import Step

from .common import (
    Block,
    Function,
    X,
    assert_not_found,
    assert_refused,
    assert_rewired,
    layers,
    name,
    plan_of,
    stacked,
    values_stay,
)


def in_place(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, f: Tensor) -> Tensor:
    """An augmented assignment, as a statement."""
    x = function(x, f)
    return x


# How it is written, and what it is: the factor of the skip and of the branch.
SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float]] = {
    "x - f": (lambda x, f: x - f, 1, -1),
    "f - x": (lambda x, f: f - x, -1, 1),
    "x + (-f)": (lambda x, f: x + (-f), 1, -1),
    "(-x) + f": (lambda x, f: (-x) + f, -1, 1),
    "torch.neg(x) + f": (lambda x, f: torch.neg(x) + f, -1, 1),
    "torch.sub(x, f)": (lambda x, f: torch.sub(x, f), 1, -1),
    "torch.sub(x, f, alpha=0.5)": (lambda x, f: torch.sub(x, f, alpha=0.5), 1, -0.5),
    "torch.sub(f, x, alpha=0.5)": (lambda x, f: torch.sub(f, x, alpha=0.5), -0.5, 1),
    "torch.subtract(input=x, other=f)": (lambda x, f: torch.subtract(input=x, other=f), 1, -1),
    "torch.rsub(f, x)": (lambda x, f: torch.rsub(f, x), 1, -1),
    "torch.rsub(x, f, alpha=0.75)": (lambda x, f: torch.rsub(x, f, alpha=0.75), -0.75, 1),
    "x.sub(f)": (lambda x, f: x.sub(f), 1, -1),
    "x.sub_(f)": (lambda x, f: x.sub_(f), 1, -1),
    "x.sub_(f, alpha=0.5)": (lambda x, f: x.sub_(f, alpha=0.5), 1, -0.5),
    "x -= f": (partial(in_place, operator.isub), 1, -1),
    "f -= x": (lambda x, f: operator.isub(f, x), -1, 1),
    "operator.iadd(x, f)": (operator.iadd, 1, 1),
    "operator.iadd(f, x)": (lambda x, f: operator.iadd(f, x), 1, 1),
    "f.add_(x)": (lambda x, f: f.add_(x), 1, 1),
    "x.__add__(f)": (lambda x, f: x.__add__(f), 1, 1),
    "torch.add(x, f, alpha=-2)": (lambda x, f: torch.add(x, f, alpha=-2), 1, -2),
    "sum([x, f])": (lambda x, f: sum([x, f]), 1, 1),  # type: ignore[dict-item,return-value]
    "sum([f, x])": (lambda x, f: sum([f, x]), 1, 1),  # type: ignore[dict-item,return-value]
    "x + f * 0.5": (lambda x, f: x + f * 0.5, 1, 0.5),
    "0.9 * x + 0.1 * f": (lambda x, f: 0.9 * x + 0.1 * f, 0.9, 0.1),
    "x * 1.5 + f": (lambda x, f: x * 1.5 + f, 1.5, 1),  # DeepNorm without its norm
    "(x + f) / 2": (lambda x, f: (x + f) / 2, 0.5, 0.5),
    "x.clone() + f": (lambda x, f: x.clone() + f, 1, 1),
    "x.contiguous() + f": (lambda x, f: x.contiguous() + f, 1, 1),
    "2 * -x.clone() - f": (lambda x, f: 2 * -x.clone() - f, -2, -1),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(spelling: str) -> None:
    add, skip, branch = SPELLINGS[spelling]
    assert_rewired(
        lambda m, x, f: add(x, f(x)),
        lambda m, f: Step(lambda p: branch * f(p), skip),
    )


def test_several_terms_with_signs() -> None:
    def block(m: Any, x: Tensor, f: Function) -> Tensor:
        return x + f(x) - m.d(x) - (m.e(x) - m.norm(x))

    def step(m: Any, f: Function) -> Step:
        return Step(lambda p: f(p) - m.d(p) - m.e(p) + m.norm(p))

    plan = assert_rewired(block, step)
    assert "3 parallel branches, scaled" in plan.chains[0].residuals[0].kind


def test_sum_of_a_list() -> None:
    def block(m: Any, x: Tensor, f: Function) -> Tensor:
        total: Any = sum([x, f(x), m.d(x)])
        return total

    assert_rewired(block, lambda m, f: Step(lambda p: f(p) + m.d(p)))


# Twins.


def difference_of_transforms(m: Any, x: Tensor, f: Function) -> Tensor:
    return f(x) - m.d(x)


def pooled_less_itself(m: Any, x: Tensor, f: Function) -> Tensor:
    h = torch.relu(f(x))
    return torch.nn.functional.avg_pool1d(h, 3, 1, 1) - h


def stacked_and_summed(m: Any, x: Tensor, f: Function) -> Tensor:
    return torch.stack([x, f(x)]).sum(0)


def squared(m: Any, x: Tensor, f: Function) -> Tensor:
    return x * f(x)


@pytest.mark.parametrize(
    "block", [difference_of_transforms, pooled_less_itself, stacked_and_summed, squared], ids=name
)
def test_no_residual(block: Block) -> None:
    assert_not_found(stacked(block))


def test_poolformer_subtracts_inside_the_branch() -> None:
    def block(m: Any, x: Tensor, f: Function) -> Tensor:
        h = m.norm(x)
        return x + f(torch.nn.functional.avg_pool1d(h, 3, 1, 1) - h)

    def step(m: Any, f: Function) -> Step:
        def branch(p: Tensor) -> Tensor:
            h = m.norm(p)
            return f(torch.nn.functional.avg_pool1d(h, 3, 1, 1) - h)

        return Step(branch)

    assert_rewired(block, step)


FUSED: list[tuple[Callable[..., Tensor], str, str]] = [
    (lambda m, x, f: torch.addcmul(x, m.gamma, f(x)), "fused addition", "addcmul multiplies"),
    (lambda m, x, f: x.addcmul(m.gamma, f(x)), "fused addition", "addcmul multiplies"),
    (lambda m, x, f: torch.addcdiv(x, f(x), m.gamma), "fused addition", "write the sum with +"),
    (lambda m, x, f: torch.baddbmm(x, f(x), m.d.weight.expand(2, 8, 8)), "fused addition", "badd"),
    (lambda m, x, f: torch.lerp(x, f(x), 0.3), "fused addition", "lerp multiplies and adds"),
    (lambda m, x, f: torch.lerp(f(x), x, 0.3), "fused addition", "lerp multiplies and adds"),
    (lambda m, x, f: torch.lerp(x, f(x), m.rate), "scaled skip", "(lerp)"),
]


@pytest.mark.parametrize(("block", "rule", "words"), FUSED)
def test_fused_additions_are_named(block: Block, rule: str, words: str) -> None:
    assert_refused(block, rule, words)


def test_a_product_with_a_bias_is_no_skip_add() -> None:
    """`addmm` as in a linear layer: what it adds to is a parameter."""

    def function(m: Any, x: Tensor) -> Tensor:
        flat = m.stem(x).reshape(-1, 8)
        return torch.addmm(m.a.bias, flat, m.a.weight)

    assert_not_found(layers(function))


# Any tree of sums over the stream and two branches.

Tree = Any


def trees() -> st.SearchStrategy[Tree]:
    """Nested tuples: ``(operation, left, right)``, or a leaf."""
    leaf = st.sampled_from(("x", "x", "f", "d", "-x", "0.5 x", "copy"))
    operations = st.sampled_from(("+", "-", "rsub", "add alpha", "sub alpha", "in place"))
    return st.recursive(leaf, lambda t: st.tuples(operations, t, t), max_leaves=5)


def grow(tree: Tree, m: Any, x: Tensor, f: Function) -> Tensor:
    """What a tree means."""
    if isinstance(tree, str):
        leaves: dict[str, Callable[[], Tensor]] = {
            "x": lambda: x,
            "f": lambda: f(x),
            "d": lambda: m.d(m.norm(x)),
            "-x": lambda: -x,
            "0.5 x": lambda: x * 0.5,
            "copy": lambda: x.clone(),
        }
        return leaves[tree]()
    operation, left, right = tree[0], grow(tree[1], m, x, f), grow(tree[2], m, x, f)
    if operation == "rsub":
        return torch.rsub(left, right)
    if operation == "add alpha":
        return torch.add(left, right, alpha=0.7)
    if operation == "sub alpha":
        return torch.sub(left, right, alpha=0.7)
    if operation == "in place":
        return in_place(operator.isub, left * 1.0, right)
    return left + right if operation == "+" else left - right


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tree=trees())
def test_any_sum_is_read_rightly(tree: Tree) -> None:
    """Whatever is found in it, read as a skip and branches it has the same value."""
    model = stacked(lambda m, x, f: grow(tree, m, x, f))
    assert values_stay(model)
    if plan_of(model).chains:
        assert_reversible_equals_store(re2fx.transform(model), X)
