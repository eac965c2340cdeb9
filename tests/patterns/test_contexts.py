"""Autocast, no_grad and vmap within branches, around blocks and across them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import re2fx
from re2fx.state import State
from tests.reference import Step, run_chain

from .common import RE2TAL, Function, Layers, X, layers, lengths, rules

Branch = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gate(m: Any, x: Tensor, f: Function) -> Tensor:
    with torch.no_grad():
        scale = torch.sigmoid(f(x))
    return m.d(x) * scale


def gate_first(m: Any, x: Tensor, f: Function) -> Tensor:
    with torch.no_grad():
        scale = torch.sigmoid(x)
    return f(x) * scale


def gate_in_gate(m: Any, x: Tensor, f: Function) -> Tensor:
    with torch.no_grad():
        scale = torch.sigmoid(f(x))
        with torch.no_grad():
            scale = scale * m.e(x)
        scale = scale + 1
    return m.d(x) * scale


def half(m: Any, x: Tensor, f: Function) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        h = f(x)
    return m.d(h.to(x.dtype))


def half_in_the_end(m: Any, x: Tensor, f: Function) -> Tensor:
    """What it saves last it saves there: a rerun ends inside."""
    h = m.d(x)
    with torch.autocast("cpu", torch.bfloat16):
        h = f(h)
    return h.to(x.dtype)


def never_half(m: Any, x: Tensor, f: Function) -> Tensor:
    h = m.d(x)
    with torch.autocast("cpu", enabled=False):
        h = f(h.float())
    return h


def mapped(m: Any, x: Tensor, f: Function) -> Tensor:
    return torch.vmap(lambda row: torch.tanh(f(row)))(m.d(x))


HALF = (half, half_in_the_end)
BRANCHES: list[Branch] = [gate, gate_first, gate_in_gate, *HALF, never_half, mapped]


def blocks(branch: Branch) -> Callable[[Any, Tensor], Any]:
    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        for f in (m.a, m.b, m.c):
            x = x + branch(m, x, f)
        return m.head(x)

    return function


def gradients(model: Layers, out: Tensor) -> list[Tensor]:
    model.zero_grad()
    out.square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def by_hand(model: Any, branch: Branch, x: Tensor) -> Tensor:
    """The rewired network without any tool."""
    steps = [Step(partial(branch, model, f=f)) for f in (model.a, model.b, model.c)]
    out: Tensor = model.head(run_chain(model.stem(x), steps, RE2TAL, "mean")[-1])
    return out


@pytest.mark.parametrize("branch", BRANCHES)
def test_in_a_branch(branch: Branch) -> None:
    model, x = layers(blocks(branch)).float(), X.float()
    rev: Any = re2fx.transform(model, x, capture="dynamo")
    assert (lengths(rev.plan), rules(rev.plan)) == ([3], {}), str(rev.plan)
    expected = gradients(model, by_hand(model, branch, x))
    close = 0.02 if branch in HALF else 1e-5
    for rev.memory in ("store", "reversible"):
        found = gradients(model, rev(x))
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= close * b.norm()


@pytest.mark.parametrize("branch", BRANCHES)
def test_compiled(branch: Branch) -> None:
    model, x = layers(blocks(branch)).float(), X.float()
    options: dict[str, Any] = {"compiler": "aot_eager", "strict": True}
    run = torch.compile(model, backend="re2fx", fullgraph=True, options=options)
    expected = gradients(model, by_hand(model, branch, x))
    for a, b in zip(gradients(model, run(x)), expected, strict=True):
        assert (a - b).norm() <= (0.02 if branch in HALF else 1e-5) * b.norm()


@pytest.mark.parametrize("branch", [gate, half, never_half])
@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_a_region_is_left_where_something_raises_in_it(branch: Branch, memory: Any) -> None:
    """As the ``with`` of the model would leave it."""
    model, x = layers(blocks(branch)).float(), X.float()
    rev: Any = re2fx.transform(model, x, capture="dynamo", memory=memory)
    weight, state = model.b.weight, State(("autocast", "gradient mode"))
    model.b.weight = torch.nn.Parameter(torch.randn(8, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        rev(x)
    assert state.changed() is None
    model.b.weight = weight
    gradients(model, rev(x))


def test_around_the_blocks() -> None:
    """The branches run, and run again, under the autocast that they lie in."""

    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        with torch.autocast("cpu", torch.bfloat16):
            for f in (m.a, m.b, m.c):
                x = x + m.d(f(x)).to(x.dtype)
        return m.head(x)

    model, x = layers(function).float(), X.float()
    rev: Any = re2fx.transform(model, x, capture="dynamo")
    assert (lengths(rev.plan), rules(rev.plan)) == ([3], {}), str(rev.plan)

    def branch(m: Any, p: Tensor, f: Function) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = m.d(f(p)).to(p.dtype)
            return out

    expected = gradients(model, by_hand(model, branch, x))
    for rev.memory in ("store", "reversible"):
        for a, b in zip(gradients(model, rev(x)), expected, strict=True):
            assert (a - b).norm() <= 0.02 * b.norm()


def test_shared_tables_without_gradients() -> None:
    """As rotary embeddings are made, from numbers that every block reads."""

    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        with torch.no_grad():
            table = torch.arange(x.shape[1], dtype=x.dtype)[:, None].cos() * m.gamma
        for f in (m.a, m.b, m.c):
            x = x + f(x * table)
        return m.head(x)

    model = layers(function)
    rev: Any = re2fx.transform(model, X, capture="dynamo")
    assert (lengths(rev.plan), rules(rev.plan)) == ([3], {}), str(rev.plan)
    found = [gradients(model, rev(X)) for rev.memory in ("store", "reversible")]
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
    assert model.gamma.grad is None


def over_two_blocks(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    h = m.a(x)
    with torch.no_grad():
        h = torch.sigmoid(h)
        other = m.d(x)
    x = x + m.b(h)
    return m.head(x + m.c(x)), other


def across_the_sum(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    h = m.a(x)
    with torch.autocast("cpu", torch.bfloat16):
        x = x + m.b(h).to(x.dtype)
    return m.head(x + m.c(x))


@pytest.mark.parametrize("function", [over_two_blocks, across_the_sum])
def test_across_a_residual(function: Callable[[Any, Tensor], Any]) -> None:
    plan = re2fx.explain(layers(function), X, capture="dynamo").plan
    assert plan.chains == (), str(plan)
    assert rules(plan)["context"] == 1, str(plan)
    assert any("switches the state that a part" in r.sentence for r in plan.refusals)


@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_the_callers_gradient_mode_stays(memory: Any) -> None:
    rev: Any = re2fx.transform(layers(blocks(gate)), X, capture="dynamo", memory=memory)
    with torch.no_grad():
        out = rev(X)
        assert not torch.is_grad_enabled()
    assert not out.requires_grad
    assert rev(X).requires_grad
