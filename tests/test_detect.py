"""Which additions are skip-adds, each with a negative twin that names the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import re2fx
from re2fx import Plan
from re2fx.capture import capture
from re2fx.passes.normalize import normalize

from .reference import follow_original


class Toy(nn.Module):
    """Some layers, and a forward that each test writes for itself."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.s, self.a, self.b, self.c, self.p = (nn.Linear(4, 4) for _ in range(5))
        self.norm, self.mix = nn.LayerNorm(4), nn.Linear(8, 4)
        self.relu, self.skip = nn.ReLU(inplace=True), nn.Identity()
        self.mha = nn.MultiheadAttention(4, 1, batch_first=True)
        self.g, self.pos = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(3, 4))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def toy(function: Callable[[Any, Tensor], Any]) -> Toy:
    """The toy with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy(function).double().eval()


def name(value: Any) -> str:
    """The name of a test case: its function's."""
    return str(getattr(value, "__name__", ""))


def plan_of(function: Callable[[Any, Tensor], Any], activation: str = "branch") -> Plan:
    """What re2fx would do."""
    return re2fx.explain(toy(function), activation=activation).plan


def twice(block: Callable[[Any, Tensor, nn.Module], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A stem and two equal blocks with their own layers."""
    return lambda m, x: block(m, block(m, m.s(x), m.a), m.b)


# Positives: a chain of two.


def pre_norm(m: Any, x: Tensor, f: nn.Module) -> Tensor:
    return x + f(m.norm(x))


def identity_skip(m: Any, x: Tensor, f: nn.Module) -> Tensor:
    return m.skip(x) + f(x)


def constant_scale(m: Any, x: Tensor, f: nn.Module) -> Tensor:
    return 0.9 * x + f(x)


def layer_scale(m: Any, x: Tensor, f: nn.Module) -> Tensor:
    return x + m.g * f(x)


def parallel(m: Any, x: Tensor, f: nn.Module) -> Tensor:
    return x + f(x) + m.c(m.norm(x))


def in_place_activation(m: Any, x: Tensor, f: nn.Module) -> Tensor:
    return x + m.relu(f(x))


def in_place_addition(m: Any, x: Tensor, f: nn.Module) -> Tensor:
    x += f(x)
    return x


def in_place_addition_of_an_in_place_activation(m: Any, x: Tensor, f: nn.Module) -> Tensor:
    x += m.relu(f(x))
    return x


def onto_the_branch(m: Any, x: Tensor, f: nn.Module) -> Tensor:
    out: Tensor = m.norm(f(x))
    out += x
    return out


def dead_tuple_element(m: Any, x: Tensor, f: nn.Module) -> Tensor:
    h, _ = m.mha(f(x), x, x)
    return x + h


def shape_readers(m: Any, x: Tensor, f: nn.Module) -> Tensor:
    h = f(x)
    torch._assert(h.shape[0] == x.shape[0], "another batch")
    return x + h.view(x.shape) * torch.ones_like(h)


def identities_inside(m: Any, x: Tensor, f: nn.Module) -> Tensor:
    return x + m.skip(f(m.skip(m.norm(m.skip(x)))))


def weight_computed_in_the_branch(m: Any, x: Tensor, f: nn.Module) -> Tensor:
    return x + F.linear(f(x), m.c.weight * 2, m.c.bias)


POSITIVES = [
    pre_norm, identity_skip, constant_scale, layer_scale, parallel, in_place_activation,
    in_place_addition, in_place_addition_of_an_in_place_activation, onto_the_branch,
    dead_tuple_element, shape_readers, identities_inside, weight_computed_in_the_branch,
]  # fmt: skip


@pytest.mark.parametrize("block", POSITIVES, ids=lambda f: f.__name__)
def test_found(block: Callable[[Any, Tensor, nn.Module], Tensor]) -> None:
    model = toy(twice(block))
    plan = re2fx.explain(model).plan
    assert (plan.rewired, plan.refusals) == (2, ()), str(plan)
    torch.testing.assert_close(follow_original(model, X), model(X.clone()), rtol=1e-12, atol=1e-12)
    rev = re2fx.transform(model)  # the reversible executor can be made of it
    torch.testing.assert_close(rev(X.clone()).isfinite().all(), torch.tensor(True))


def test_residuals_are_described() -> None:
    plan = plan_of(lambda m, x: 0.9 * m.s(x) + m.c(m.a(m.s(x))))
    assert plan.found == 1  # the same module twice is two values, so the skip is no identity
    assert plan.refusals[0].rule == "projection"
    first, second = plan_of(twice(constant_scale)).chains[0].residuals
    assert (first.skip, first.branches, first.skip_scale) == ("s", ("a",), 0.9)
    assert first.dropped == ("mul",)
    assert second.skip == first.output == first.add == "add"
    (parallels,) = plan_of(twice(parallel)).chains
    assert [r.branches for r in parallels.residuals] == [("a", "c"), ("b", "c_1")]
    assert parallels.residuals[0].location.function == "parallel"


# Negatives: the rule, and words of the sentence that name the reason.


def post_norm(m: Any, x: Tensor) -> Tensor:
    x = m.norm(x + m.a(x))
    return m.norm(x + m.b(x))


def projection(m: Any, x: Tensor) -> Tensor:
    x = m.p(x) + m.a(x)
    return m.p(x) + m.b(x)


def learned_skip(m: Any, x: Tensor) -> Tensor:
    x = m.g * x + m.a(x)
    return m.g * x + m.b(x)


def parallel_with_a_stranger(m: Any, x: Tensor) -> Tensor:
    y = m.s(x)
    z = m.c(x).sin()
    y = y + m.a(y) + z
    return y + m.b(y)


def branch_read_by_the_output(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    x = x + m.b(h)
    return x + m.c(x), h.sin()


def attention_weights_used(m: Any, x: Tensor) -> Any:
    h, weights = m.mha(x, x, x)
    x = x + h
    return x + m.b(x), weights.cos()


def written_through_a_view(m: Any, x: Tensor) -> Tensor:
    x = m.s(x)
    x = x + m.a(x)
    x[:, 1:].add_(m.b(x)[:, 1:])
    return x + m.c(x)


def argument_overwritten(m: Any, x: Tensor) -> Tensor:
    x.add_(m.a(x))
    return x + m.b(x)


def single(m: Any, x: Tensor) -> Tensor:
    x = m.s(x)
    return m.c(x + m.a(x))


def zero(m: Any, x: Tensor) -> Tensor:
    x = x * 0 + m.a(x)
    return x * 0 + m.b(x)


NEGATIVES: list[tuple[Callable[[Any, Tensor], Any], str, str]] = [
    (post_norm, "post-norm", "the norm norm, which cannot be inverted"),
    (projection, "projection", "it passes through p"),
    (learned_skip, "scaled skip", "not a constant (mul)"),
    (parallel_with_a_stranger, "chain of one", "no other residual continues its stream"),
    (branch_read_by_the_output, "branch used outside", "sin ("),
    (attention_weights_used, "branch used outside", "getitem_1 ("),
    (written_through_a_view, "in-place write", "add_ ("),
    (argument_overwritten, "in-place write", "writes in place"),
    (single, "chain of one", "(next: c)"),
    (zero, "zero scale", "multiplied by zero"),
]


@pytest.mark.parametrize(("function", "rule", "words"), NEGATIVES, ids=name)
def test_refused(function: Callable[[Any, Tensor], Any], rule: str, words: str) -> None:
    model = toy(function)
    plan = re2fx.explain(model).plan
    refusal = next((r for r in plan.refusals if r.rule == rule), None)
    assert refusal is not None, str(plan)
    assert words in refusal.sentence
    assert refusal.node in plan_nodes(model)
    assert rule in str(plan)
    assert refusal.location.function == function.__name__
    torch.testing.assert_close(follow_original(model, X), model(X.clone()), rtol=1e-12, atol=1e-12)


def plan_nodes(model: Toy) -> set[str]:
    """The names of the normalised graph's nodes."""
    return {node.name for node in normalize(capture(model).train, model).nodes}


def concat(m: Any, x: Tensor) -> Tensor:
    return m.mix(torch.cat([x, m.a(x)], -1))


def positional(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + m.pos


def untrained(m: Any, x: Tensor) -> Tensor:
    return x + torch.sin(x)


def number(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + 1


MISSES = [
    (positional, "constant", "one operand is a parameter or a constant"),
    (untrained, "nothing trained", "no trained operation lies between x and the addition"),
    (number, "one operand", "a number"),
]


@pytest.mark.parametrize(("function", "rule", "words"), MISSES, ids=name)
def test_missed(function: Callable[[Any, Tensor], Tensor], rule: str, words: str) -> None:
    plan = plan_of(function)
    assert plan.found == 0
    assert [miss.rule for miss in plan.misses] == [rule]
    assert words in plan.misses[0].sentence
    assert "nearest misses:" in str(plan)
    assert words in str(plan)


def test_two_inputs_are_two_sources() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + self.f(y)

    plan = re2fx.explain(Sum()).plan
    assert [miss.rule for miss in plan.misses] == ["two sources"]
    assert "different inputs" in str(plan)


def test_no_addition_at_all() -> None:
    plan = plan_of(concat)
    assert (plan.found, plan.misses) == (0, ())
    assert "the graph has no addition of two activations" in str(plan)


def test_nearest_miss_first() -> None:
    def several(m: Any, x: Tensor) -> Tensor:
        return (torch.sin(x + 1) + x) + m.pos

    rules = [miss.rule for miss in plan_of(several).misses]
    assert rules == ["nothing trained", "constant", "one operand"]
