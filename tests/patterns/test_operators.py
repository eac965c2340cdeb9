"""Graphs in a graph: activation checkpoints and custom autograd functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import re2fx
from tests.reference import Step, run_chain

from .common import RE2TAL, Function, Layers, X, layers, lengths, rules

Forward = Callable[[Any, Tensor], Any]

# Dynamo makes an instance of the class to see what it is.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def kept(function: Any, *args: Any, reentrant: bool = False) -> Any:
    return checkpoint(function, *args, use_reentrant=reentrant)


def add(f: Function) -> Function:
    return lambda x: x + F.dropout(f(x), 0.0)


def around_each_block(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    for f in (m.a, m.b, m.c):
        x = kept(add(f), x)
    return m.head(x)


def reentrant(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    for f in (m.a, m.b, m.c):
        x = kept(add(f), x, reentrant=True)
    return m.head(x)


def around_some(m: Any, x: Tensor) -> Any:
    x = add(m.a)(m.stem(x))
    return m.head(kept(lambda x: add(m.c)(add(m.b)(x)), x))


def around_all(m: Any, x: Tensor) -> Any:
    x = m.stem(x)

    def run(x: Tensor) -> Tensor:
        for f in (m.a, m.b, m.c):
            x = kept(add(f), x)
        return x

    return m.head(kept(run, x))


def within_branches(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    for f in (m.a, m.b, m.c):
        x = x + kept(f, x)
    return m.head(x)


def around_the_stem_too(m: Any, x: Tensor) -> Any:
    return m.head(kept(lambda x: add(m.c)(add(m.b)(add(m.a)(m.stem(x)))), x))


CHECKPOINTS: list[Forward] = [
    around_each_block, reentrant, around_some, around_all, within_branches, around_the_stem_too,
]  # fmt: skip


def gradients(model: Layers, out: Tensor) -> list[Tensor]:
    model.zero_grad()
    out.square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def by_hand(model: Any, branch: Callable[[Function], Function]) -> Tensor:
    """The rewired network without any tool."""
    steps = [Step(branch(f)) for f in (model.a, model.b, model.c)]
    out: Tensor = model.head(run_chain(model.stem(X), steps, RE2TAL, "mean")[-1])
    return out


def assert_rewired(function: Forward, branch: Callable[[Any, Function], Function]) -> None:
    """By transform and by the backend, with the gradients of a plain loop."""
    model = layers(function).train()
    expected = gradients(model, by_hand(model, lambda f: branch(model, f)))
    rev: Any = re2fx.transform(model, X, capture="dynamo")
    assert (lengths(rev.plan), rules(rev.plan)) == ([3], {}), str(rev.plan)
    for rev.memory in ("store", "reversible"):
        torch.testing.assert_close(gradients(model, rev(X)), expected, rtol=1e-9, atol=1e-12)
    options: dict[str, Any] = {"compiler": "aot_eager", "strict": True}
    run = torch.compile(model, backend="re2fx", fullgraph=True, options=options)
    torch.testing.assert_close(gradients(model, run(X)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", CHECKPOINTS)
def test_checkpoints(function: Forward) -> None:
    assert_rewired(function, lambda m, f: f)


def test_one_within_a_branch_stays() -> None:
    rev: Any = re2fx.transform(layers(within_branches), X, capture="dynamo")
    names = [getattr(node.target, "_name", "") for node in rev.graph.nodes]
    assert names.count("tag_activation_checkpoint") == 3


def test_post_norm_in_a_checkpoint_is_refused_as_such() -> None:
    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        for f in (m.a, m.b, m.c):
            x = kept(lambda x, f=f: m.norm(x + f(x)), x)
        return m.head(x)

    plan = re2fx.explain(layers(function), X, capture="dynamo").plan
    assert (lengths(plan), rules(plan)) == ([], {"post-norm": 3}), str(plan)


class Doubled(torch.autograd.Function):
    """tanh with twice its gradient, so that losing it is seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * grad * (1 - torch.tanh(x) ** 2)


def test_a_custom_backward_in_a_branch() -> None:
    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        for f in (m.a, m.b, m.c):
            x = x + m.d(Doubled.apply(f(x)))
        return m.head(x)

    assert_rewired(function, lambda m, f: lambda p: m.d(Doubled.apply(f(p))))


class Sum(torch.autograd.Function):
    """A residual that differentiates itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x + x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad + grad @ weight.T, (x.flatten(0, 1).T @ grad.flatten(0, 1))


def test_a_residual_in_a_custom_function_is_its_own() -> None:
    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        for f in (m.a, m.b):
            x = Sum.apply(x, f.weight)
        return m.head(x)

    assert re2fx.explain(layers(function), X, capture="dynamo").plan.chains == ()
