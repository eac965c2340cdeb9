"""Which residuals form a chain, and what ends one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import re2fx
from re2fx import Plan

from .reference import Step, follow_original, run_chain
from .test_detect import X, plan_of, toy


def shape(plan: Plan) -> tuple[list[int], list[str]]:
    """Chain lengths and refused rules."""
    return [len(chain) for chain in plan.chains], [r.rule for r in plan.refusals]


def post_activation(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.s(x))
    x = F.relu(x + m.a(x))
    x = F.relu(x + m.b(x))
    return m.c(x)


@pytest.mark.parametrize("activation", ["branch", "stream"])
def test_post_activation(activation: str) -> None:
    plan = plan_of(post_activation, activation)
    assert shape(plan) == ([2], [])
    assert [(r.output, r.activation) for r in plan.chains[0].residuals] == [
        ("relu_1", "relu_1"),
        ("relu_2", "relu_2"),
    ]
    assert "the activation behind the addition moved: 2 of 2" in str(plan)


def test_last_activation_stays_where_the_chain_has_none() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        x = x + m.a(x)
        return F.relu(x + m.b(x))

    plan = plan_of(function)
    assert shape(plan) == ([2], [])
    assert [r.activation for r in plan.chains[0].residuals] == [None, None]
    model = toy(function)
    torch.testing.assert_close(follow_original(model, X), model(X.clone()))


@pytest.mark.parametrize("late", [False, True], ids=["read before", "read after"])
@pytest.mark.parametrize("activation", ["branch", "stream"])
def test_value_before_the_activation_used_elsewhere(late: bool, activation: str) -> None:
    """Only the pre-activation stream still holds it; otherwise the chain ends there."""

    def function(m: Any, x: Tensor) -> Any:
        x = m.s(x)
        y = x + m.a(x)
        tap = None if late else y.sin()
        x = F.relu(y)
        tap = y.sin() if tap is None else tap
        return x + m.b(x), tap

    model, plan = toy(function), plan_of(function, activation)
    if activation == "branch":
        assert shape(plan) == ([], ["chain of one", "chain of one"])
        assert "relu" in plan.refusals[0].sentence
        for got, wanted in zip(
            follow_original(model, X, activation=activation), model(X), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    else:
        assert shape(plan) == ([2], []), str(plan)
        assert plan.chains[0].taps == ("add",)


def test_in_place_activation_at_the_head_of_a_block() -> None:
    """It overwrites the skip as well, so it stands between the blocks."""

    def function(m: Any, x: Tensor) -> Tensor:
        x = m.s(x)
        x = x + m.a(m.relu(x))
        return x + m.b(m.relu(x))

    plan = plan_of(function)
    assert shape(plan) == ([2], [])
    assert [r.activation for r in plan.chains[0].residuals] == ["relu_1", None]
    assert [r.skip for r in plan.chains[0].residuals] == ["relu", "relu_1"]


def nested(m: Any, x: Tensor, f: Any, g: Any) -> Tensor:
    h = m.norm(x)
    h = h + f(h)
    h = h + g(h)
    return x + h


def test_outer_chain_wins() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return nested(m, nested(m, m.s(x), m.a, m.b), m.c, m.p)

    plan = plan_of(function)
    assert shape(plan) == ([2], ["nested"] * 4)
    inner, outer = plan.refusals[0], plan.chains[0].residuals[0]
    assert f"inside the branch of {outer.add} (" in inner.sentence
    assert inner.location.function == "nested"


def test_outer_skip_of_one_gives_way() -> None:
    """The global skip of super-resolution networks."""

    def function(m: Any, x: Tensor) -> Tensor:
        x = m.s(x)
        h = x + m.a(x)
        h = h + m.b(h)
        return m.p(m.c(h) + x)

    plan = plan_of(function)
    assert shape(plan) == ([2], ["chain of one"])
    assert plan.refusals[0].node not in {r.add for r in plan.chains[0].residuals}
    assert "(next: p)" in plan.refusals[0].sentence
    model = toy(function)
    torch.testing.assert_close(follow_original(model, X), model(X))


def test_projection_parts_chains() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        x = x + m.a(x)
        x = x + m.b(x)
        x = m.p(x) + m.c(x)
        x = x + m.a(x)
        return x + m.b(x)

    assert shape(plan_of(function)) == ([2, 2], ["projection"])


LINKS: dict[str, tuple[Any, int]] = {
    "transpose": (lambda x: x.transpose(0, 1), 1),
    "flatten": (lambda x: x.flatten(0, 1), 1),
    "contiguous": (lambda x: x.contiguous(), 1),
    "several": (lambda x: x.transpose(0, 1).contiguous().reshape(6, 4), 3),
}


@pytest.mark.parametrize("readout", ["mean", "sum", "last"])
@pytest.mark.parametrize("name", LINKS)
def test_shape_only_operations_link(name: str, readout: Any) -> None:
    link, number = LINKS[name]

    def function(m: Any, x: Tensor) -> Tensor:
        x = x + m.a(x)
        x = x + m.b(x)
        x = link(x)
        return x + m.c(x)

    model, plan = toy(function), plan_of(function)
    assert shape(plan) == ([3], [])
    assert [len(names) for names in plan.chains[0].links] == [0, 0, number]
    torch.testing.assert_close(follow_original(model, X), model(X), rtol=1e-12, atol=1e-12)
    rev = re2fx.transform(model, readout=readout, memory="store")
    steps = [Step(model.a), Step(model.b), Step(model.c, link=link)]
    wanted = run_chain(X, steps, (0, 1, 1), readout)[-1]
    torch.testing.assert_close(rev(X), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["slice", "pool", "repeat", "mean"])
def test_other_operations_do_not_link(name: str) -> None:
    between: dict[str, Any] = {
        "slice": lambda x: x[:, 1:],
        "pool": lambda x: F.avg_pool1d(x, 1),
        "repeat": lambda x: x.repeat(2, 1, 1),
        "mean": lambda x: x.mean(1, keepdim=True),
    }

    def function(m: Any, x: Tensor) -> Tensor:
        x = x + m.a(x)
        x = x + m.b(x)
        x = between[name](x)
        return x + m.c(x)

    plan = plan_of(function)
    assert shape(plan) == ([2], ["chain of one"])
    model = toy(function)
    torch.testing.assert_close(follow_original(model, X), model(X), rtol=1e-12, atol=1e-12)


def test_tap_does_not_end_a_chain() -> None:
    def function(m: Any, x: Tensor) -> Any:
        x = x + m.a(x)
        tap = m.p(x)
        x = x + m.b(x)
        return x + m.c(x), tap

    plan = plan_of(function)
    assert shape(plan) == ([3], [])
    assert plan.chains[0].taps == ("add",)
    assert "read in the middle of the chain: add" in str(plan)


def test_side_inputs_are_named() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        gate = torch.sigmoid(m.p(x))
        x = m.s(x)
        x = x + gate * m.a(x)
        return x + gate * m.b(x)

    plan = plan_of(function)
    assert [r.side_inputs for r in plan.chains[0].residuals] == [("sigmoid",)] * 2
    assert shape(plan) == ([2], [])


def test_side_input_made_from_the_stream_is_no_side_input() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        gate = torch.sigmoid(m.p(x))
        x = x + gate * m.a(x)
        return x + gate * m.b(x)

    plan = plan_of(function)
    assert shape(plan)[0] == []
    refusal = plan.refusals[0]
    assert refusal.rule == "branch used outside"
    assert "mul_1 (" in refusal.sentence


def test_equal_plans_for_equal_graphs() -> None:
    assert plan_of(post_activation) == plan_of(post_activation)
