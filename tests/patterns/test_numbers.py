"""Sizes, dtypes and what is made of them alone: read from a stream, they carry nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import re2fx
from tests.compare import assert_reversible_equals_store

from .common import X, layers, lengths, rules, values_stay

Forward = Callable[[Any, Tensor], Any]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    torch.compiler.reset()


def at_the_input(m: Any, x: Tensor) -> Any:
    for f in (m.a, m.b, m.c):
        b, n, c = x.shape
        x = x + f(x.reshape(b * n, c)).reshape(b, n, c)
    return m.head(x)


def once_for_all(m: Any, x: Tensor) -> Any:
    b, n, c = x.shape
    for f in (m.a, m.b, m.c):
        x = x + f(x.reshape(b * n, c)).reshape(b, n, c)
    return m.head(x)


def in_the_middle(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    x = x + m.a(x)
    b, n, dtype = x.shape[0], x.shape[1], x.dtype
    for f in (m.b, m.c):
        x = x + f(x.reshape(b * n, 8)).reshape(b, n, 8).to(dtype)
    return m.head(x)


def positions(m: Any, x: Tensor) -> Any:
    places = torch.arange(x.shape[1], device=x.device).to(x.dtype)[:, None]
    for f in (m.a, m.b, m.c):
        x = x + f(x * places)
    return m.head(x)


def weighted_positions(m: Any, x: Tensor) -> Any:
    places = m.stem(torch.ones(1, x.shape[1], 8, dtype=x.dtype))
    for f in (m.a, m.b, m.c):
        x = x + f(x * places)
    return m.head(x)


@pytest.mark.parametrize("route", ["symbolic", "dynamo"])
@pytest.mark.parametrize(
    "function", [at_the_input, once_for_all, in_the_middle, positions, weighted_positions]
)
def test_shared_numbers_are_no_leak(function: Forward, route: str) -> None:
    model = layers(function)
    rev = re2fx.transform(model, X, capture=route)
    assert isinstance(rev, re2fx.RewiredModule)
    assert (lengths(rev.plan), rules(rev.plan)) == ([3], {}), str(rev.plan)
    assert values_stay(model)
    assert_reversible_equals_store(rev.train(), X)
    other = torch.cat([X, X[:, :2]], 1)
    assert_reversible_equals_store(rev, torch.cat([other, other]))


@pytest.mark.parametrize("function", [at_the_input, positions])
def test_compiled(function: Forward) -> None:
    gradients = []
    for memory in ("reversible", "store"):
        torch.compiler.reset()
        model = layers(function)
        options: dict[str, Any] = {"compiler": "aot_eager", "memory": memory, "strict": True}
        run = torch.compile(model, backend="re2fx", fullgraph=True, dynamic=True, options=options)
        run(X).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("route", ["symbolic", "dynamo"])
def test_a_value_beside_a_shared_number_leaks(route: str) -> None:
    def function(m: Any, x: Tensor) -> Any:
        n = x.shape[1]
        h = m.a(x)
        x = x + h.reshape(-1, n, 8)
        for f in (m.b, m.c):
            x = x + f(x * n)
        return m.head(x), h.reshape(-1, n, 8)

    plan = re2fx.explain(layers(function), X, capture=route).plan
    assert (lengths(plan), rules(plan)) == ([2], {"branch used outside": 1}), str(plan)


@pytest.mark.parametrize("route", ["symbolic", "dynamo"])
def test_what_depends_on_the_shape_alone_is_no_branch(route: str) -> None:
    """``x + embedding(positions)`` adds to a stream; it is no function of it."""

    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        x = x + m.a(torch.ones(1, x.shape[1], 8, dtype=torch.float64))
        for f in (m.b, m.c):
            x = x + f(x)
        return m.head(x)

    plan = re2fx.explain(layers(function), X, capture=route).plan
    assert (lengths(plan), rules(plan)) == ([2], {}), str(plan)
