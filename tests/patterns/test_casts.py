"""Casts on the stream: where their types are known, what loses nothing is no obstacle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx import Plan
from re2fx.consistency import check_consistency
from tests.compare import assert_reversible_equals_store
from tests.reference import Step, run_chain
from tests.test_dynamo import planned

from .common import RE2TAL, Layers, X, layers, lengths, plan_of, rules

Block = Callable[[Any, Tensor, Any], Tensor]
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def residual_in_fp32(m: Any, x: Tensor, f: Any) -> Tensor:
    """As in Mamba: the branch first, the skip in fp32."""
    y = m.norm(x.to(m.norm.weight.dtype))
    residual = x.to(torch.float32)
    return residual + f(y)


def wide_stream(m: Any, x: Tensor, f: Any) -> Tensor:
    return x.float() + f(x.to(m.stem.weight.dtype))


def type_of_the_weights(m: Any, x: Tensor, f: Any) -> Tensor:
    return x.to(m.gamma.dtype) + f(x)


def model(block: Block, dtype: torch.dtype = SINGLE) -> Layers:
    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        for f in (m.a, m.b, m.c):
            x = block(m, x, f)
        return m.head(x.to(m.head.weight.dtype))

    return layers(function).to(dtype)


def rewired(given: nn.Module, x: Tensor) -> re2fx.RewiredModule:
    rev = re2fx.transform(given, x, capture="dynamo")
    assert isinstance(rev, re2fx.RewiredModule)
    assert (lengths(rev.plan), rules(rev.plan)) == ([3], {}), str(rev.plan)
    return rev


def compiled_plan(given: nn.Module, x: Tensor) -> Plan:
    """What the backend makes of it."""
    from re2fx.dynamo import lift

    plans = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        plans.append(planned(lift(module, inputs)))
        return module.forward

    torch.compile(given, backend=backend, fullgraph=True)(x)
    return plans[0]


def errors(rev: re2fx.RewiredModule, x: Tensor) -> list[float]:
    """Relative errors of the gradients, reversible against stored."""
    gradients = {}
    for rev.memory in ("store", "reversible"):
        rev.zero_grad()
        rev(x).float().square().mean().backward()
        gradients[rev.memory] = [p.grad for p in rev.parameters() if p.grad is not None]
    pairs = zip(gradients["reversible"], gradients["store"], strict=True)
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("block", [residual_in_fp32, wide_stream])
def test_no_ops_and_widenings(block: Block, dtype: torch.dtype) -> None:
    given, x = model(block, dtype), X.to(dtype)
    rev = rewired(given, x)
    assert compiled_plan(given, x).signature() == rev.plan.signature()
    norm = given.norm if block is residual_in_fp32 else nn.Identity()

    def branch(p: Tensor, f: Any) -> Tensor:
        out: Tensor = f(norm(p.to(dtype)))
        return out

    steps = [Step(partial(branch, f=f)) for f in (given.a, given.b, given.c)]
    end = run_chain(given.stem(x).float(), steps, RE2TAL, "mean")[-1]
    torch.testing.assert_close(rev(x), given.head(end.to(dtype)), rtol=1e-6, atol=1e-6)
    assert max(errors(rev, x)) < (2e-6 if dtype == SINGLE else 0.02)


def test_a_type_that_is_read_off_a_parameter() -> None:
    assert_reversible_equals_store(rewired(model(type_of_the_weights, DOUBLE), X), X)


@pytest.mark.parametrize("block", [residual_in_fp32, wide_stream])
def test_narrowing_is_refused_with_the_types(block: Block) -> None:
    plan = re2fx.explain(model(block, DOUBLE), X, capture="dynamo").plan
    assert (lengths(plan), rules(plan)) == ([], {"type change": 3}), str(plan)
    assert "which turns torch.float64 into torch.float32" in plan.refusals[0].sentence


@pytest.mark.parametrize("block", [residual_in_fp32, wide_stream])
def test_symbolic_tracing_knows_no_types(block: Block) -> None:
    plan = plan_of(model(block))
    assert rules(plan) == {"type change": 3}, str(plan)
    assert "captured by Dynamo its types are known" in plan.refusals[0].sentence


# Another type than at the time of capture.


def test_parameters_of_another_type_afterwards() -> None:
    """bf16 widens at the chain's beginning; fp64 would narrow, and is not rewired silently."""
    given, x = model(residual_in_fp32), X.to(SINGLE)
    rev = rewired(given, x)
    rev.bfloat16()
    torch.testing.assert_close(rev(x.to(HALF)), rewired(given, x.to(HALF))(x.to(HALF)))
    assert max(errors(rev, x.to(HALF))) < 0.02
    rev.double()
    with pytest.raises(re2fx.ModeMismatchError, match=r"turns torch\.float64 into torch\.float32"):
        rev(X)
    rev.float()
    rev(x)


def test_autocast_afterwards() -> None:
    given, x = model(residual_in_fp32), X.to(SINGLE)
    rev = rewired(given, x)
    with torch.autocast("cpu", HALF):
        torch.testing.assert_close(rev(x), rewired(given, x)(x), rtol=0, atol=0)
        assert max(errors(rev, x)) < 0.02


def test_the_backend_notices_another_type() -> None:
    """The plans of one model must agree there too."""
    given = model(residual_in_fp32)
    plans: list[Plan] = []

    def keep(origin: Any, options: object, plan: Plan) -> None:
        plans.append(plan)
        check_consistency(origin, options, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("re2fx.backend.check_consistency", keep)
        run = torch.compile(given, backend="re2fx", options={"compiler": "aot_eager"})
        run(X.to(SINGLE)).sum().backward()
        given.bfloat16()
        run(X.to(HALF)).sum().backward()
        assert plans[0].signature() == plans[1].signature()
        given.double()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="is refused now"):
            run(X)


def test_example_inputs_let_auto_know_the_types() -> None:
    given, x = model(residual_in_fp32), X.to(SINGLE)
    rev: Any = re2fx.transform(given, x)
    assert lengths(rev.plan) == [3]
    assert compiled_plan(given, x).signature() == rev.plan.signature()
