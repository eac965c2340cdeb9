"""Toy networks of three equal blocks, and what each test asserts about them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import re2fx
from re2fx import Plan
from tests.compare import assert_reversible_equals_store
from tests.reference import Step, follow_original, run_chain

Function = Callable[[Tensor], Tensor]
Block = Callable[[Any, Tensor, Function], Tensor]
Forward = Callable[[Any, Tensor], Any]

RE2TAL = (0.0, 1.0, 1.0)
X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Layers(nn.Module):
    """Layers for tokens of width 8, and a forward that each test writes for itself."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c, self.d, self.e = (nn.Linear(8, 8) for _ in range(6))
        self.low, self.high = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.relu = nn.LayerNorm(8), nn.ReLU(inplace=True)
        self.merge, self.modulation = nn.Linear(16, 8), nn.Linear(8, 24)
        self.conv = nn.Conv1d(4, 4, 3)
        self.drop = nn.Dropout(0.3)
        self.gamma, self.rate = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(1))
        self.position = nn.Parameter(torch.rand(1, 4, 8))
        self.head = nn.Linear(8, 3)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def layers(function: Forward) -> Layers:
    """The layers in fp64 and eval mode, with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Layers(function).double().eval()


def stacked(block: Block) -> Layers:
    """A stem, three blocks with branches of their own, and a head."""

    def function(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for f in (m.a, m.b, m.c):
            x = block(m, x, f)
        out: Tensor = m.head(x)
        return out

    return layers(function)


def plan_of(model: nn.Module, activation: str = "branch") -> Plan:
    """What re2fx would do."""
    return re2fx.explain(model, activation=activation).plan


def rules(plan: Plan) -> Counter[str]:
    """How often each rule refused something."""
    return Counter(refusal.rule for refusal in plan.refusals)


def lengths(plan: Plan) -> list[int]:
    """The chains' lengths."""
    return [len(chain) for chain in plan.chains]


def assert_rewired(
    block: Block,
    step: Callable[[Any, Function], Step],
    refused: dict[str, int] | None = None,
    moved: bool = False,
) -> Plan:
    """Three blocks are one chain, its values a plain loop's, its gradients ordinary autograd's.

    Args:
        block: how the user writes a block.
        step: what that block is, written independently.
        refused: what else is found in the blocks, by rule.
        moved: whether an activation moves, so that the original network is another function.
    """
    model = stacked(block)
    plan = plan_of(model)
    assert lengths(plan) == [3], str(plan)
    assert rules(plan) == (refused or {}), str(plan)
    rev = re2fx.transform(model)
    with torch.no_grad():
        steps = [step(model, f) for f in (model.a, model.b, model.c)]
        expected = model.head(run_chain(model.stem(X), steps, RE2TAL, "mean")[-1])
        torch.testing.assert_close(rev(X.clone()), expected, rtol=1e-11, atol=1e-11)
    assert moved or values_stay(model)
    rev.train()
    assert_reversible_equals_store(rev, X)
    return plan


def values_stay(model: nn.Module, x: Tensor = X) -> bool:
    """Under the coupling that is the original network, rewiring changes no value.

    It holds for every network, however much of it is rewired; only moved activations break it.
    """
    with torch.no_grad():
        given = pytree.tree_leaves(model(x.clone()))
    found = pytree.tree_leaves(follow_original(model, x))
    for a, b in zip(found, given, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    return True


def assert_refused(block: Block, rule: str, words: str) -> Plan:
    """None of three blocks is rewired, for this reason, and the network stays as it is."""
    return assert_nothing_rewired(stacked(block), rule, words)


def assert_nothing_rewired(model: nn.Module, rule: str, words: str) -> Plan:
    """The model comes back itself, with a refusal of a rule whose sentence has these words."""
    plan = plan_of(model)
    assert plan.chains == (), str(plan)
    sentences = [refusal.sentence for refusal in plan.refusals if refusal.rule == rule]
    assert any(words in sentence for sentence in sentences), str(plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", re2fx.Re2fxWarning)
        assert re2fx.transform(model) is model
    return plan


def assert_not_found(model: nn.Module) -> Plan:
    """Nothing in the model is called a skip-add."""
    plan = plan_of(model)
    assert plan.found == 0, str(plan)
    return plan


def assert_sound(model: nn.Module, chains: list[int], x: Tensor = X) -> Plan:
    """Chains of these lengths, values and gradients right in train mode too."""
    plan = plan_of(model)
    assert lengths(plan) == chains, str(plan)
    assert values_stay(model, x)
    assert_reversible_equals_store(re2fx.transform(model).train(), x)
    return plan


def name(value: Any) -> str:
    """The name of a test case: its function's."""
    return str(getattr(value, "__name__", ""))
