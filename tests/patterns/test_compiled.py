"""Patterns that only Dynamo's graphs show: known sizes, item writes, operators of graphs.

Gradients are compared with the stored network's, both under ``aot_eager``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import re2fx
from re2fx import Plan
from re2fx.consistency import check_consistency

from .common import Layers, X, layers, lengths, plan_of, rules


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model: Layers, x: Tensor, memory: str) -> list[Tensor]:
    """What one compiled step leaves behind."""
    torch._dynamo.reset()
    model.zero_grad()
    x = x.clone().requires_grad_()
    options: dict[str, Any] = {"compiler": "aot_eager", "memory": memory}
    out = torch.compile(model, backend="re2fx", fullgraph=True, options=options)(x)
    out.double().square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def compiled(
    function: Callable[[Any, Tensor], Any], dtype: torch.dtype = torch.float64, close: float = 1e-10
) -> Plan:
    """The plan of the compiled network, its gradients compared."""
    model, x = layers(function).to(dtype), X.to(dtype)
    plans: list[Plan] = []
    checked = check_consistency

    def keep(origin: Any, options: object, plan: Plan) -> None:
        plans.append(plan)
        checked(origin, options, plan)

    with patch("re2fx.backend.check_consistency", keep):
        found = gradients(model, x, "reversible")
        expected = gradients(model, x, "store")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close)
    return plans[0]


def blocks(block: Callable[[Any, Tensor, Any], Tensor]) -> Callable[[Any, Tensor], Any]:
    """A stem, three blocks and a head."""

    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        for f in (m.a, m.b, m.c):
            x = block(m, x, f)
        return m.head(x)

    return function


REWIRED: dict[str, Callable[[Any, Tensor, Any], Tensor]] = {
    "the type of the stream itself": lambda m, x, f: x.type_as(x) + f(x),
    "a subtraction in place": lambda m, x, f: x.sub_(f(x)),
    "a copied skip": lambda m, x, f: x.clone() + f(m.norm(x)),
    "a list": lambda m, x, f: sum([x, f(x)]),  # type: ignore[dict-item,return-value]
    "rolled": lambda m, x, f: (lambda y: y + f(y))(torch.roll(x, 1, 1)),
    "a checkpoint in the branch": lambda m, x, f: x + checkpoint(f, x, use_reentrant=False),
    "a condition in the branch": lambda m, x, f: (
        x + torch.cond(x.sum() > 0, lambda v: f(v).sin(), lambda v: f(v), (x,))
    ),
    "scratch in the branch": lambda m, x, f: (
        x + torch.zeros_like(x).index_add_(1, torch.arange(4), f(x))
    ),
}


@pytest.mark.parametrize("block", REWIRED)
def test_rewired(block: str) -> None:
    plan = compiled(blocks(REWIRED[block]))
    assert (lengths(plan), rules(plan)) == ([3], {}), str(plan)


def set_item(m: Any, x: Tensor, f: Any) -> Tensor:
    y = x.clone()
    y[:, 1:] = x[:, 1:] + f(x[:, 1:])
    return y


REFUSED: dict[str, tuple[Callable[[Any, Tensor, Any], Tensor], str, str]] = {
    "a cast to another type": (
        lambda m, x, f: x.float().double() + f(x),
        "type change",
        "the skip passes through",
    ),
    "an item that is set": (set_item, "sliced skip", "it passes through getitem"),
}


@pytest.mark.filterwarnings("ignore:nothing in Layers:re2fx.Re2fxWarning")
@pytest.mark.parametrize("block", REFUSED)
def test_refused(block: str) -> None:
    function, rule, words = REFUSED[block]
    plan = compiled(blocks(function))
    assert plan.chains == (), str(plan)
    assert rules(plan) == {rule: 3}, str(plan)
    assert words in plan.refusals[0].sentence


def test_a_cast_that_happens_to_change_nothing() -> None:
    """Known here; symbolic tracing, which knows no types, refuses it."""

    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        for f in (m.a, m.b, m.c):
            x = x.double() + f(x)
        return m.head(x)

    plan = compiled(function)
    assert (lengths(plan), rules(plan)) == ([3], {}), str(plan)
    assert rules(plan_of(layers(function))) == {"type change": 3}


def test_a_wide_stream_with_half_branches() -> None:
    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        for f in (m.a, m.b, m.c):
            x = x.float() + f(x.bfloat16())
        return m.head(x.bfloat16())

    plan = compiled(function, torch.bfloat16, close=0.05)
    assert (lengths(plan), rules(plan)) == ([3], {}), str(plan)


def test_a_sum_that_repeats_the_skip() -> None:
    """One token plus all of them: the stream would grow."""

    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)[:, :1]
        x = x + m.a(m.position * x)
        for f in (m.b, m.c):
            x = x + f(x)
        return m.head(x)

    plan = compiled(function)
    assert lengths(plan) == [2], str(plan)
    (refusal,) = plan.refusals
    assert refusal.rule == "broadcast"
    assert "of shape (2, 1, 8) to (2, 4, 8)" in refusal.sentence


def test_without_sizes_the_same_sum_stops_when_it_runs() -> None:
    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)[:, :1]
        x = x + m.a(m.position * x)
        return m.head(x + m.b(x))

    rev = re2fx.transform(layers(function))
    with pytest.raises(re2fx.StreamError, match="keeps its shape"):
        rev(X.clone())
