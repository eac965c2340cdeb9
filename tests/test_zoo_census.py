"""Skip-adds counted without the planner, and the count held against the planner's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from re2fx.pipeline import make_plan
from re2fx.plan import Plan
from re2fx.zoo.census import overlooked, skip_adds

from .models import ConvNet, Net, Tapped


class Sums(nn.Module):
    """Every kind of sum that is no skip-add, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        siblings = self.a(x) + self.b(x)  # neither leads to the other
        untrained = siblings + torch.relu(siblings)  # nothing trained in between
        biased = untrained + self.bias  # no activation
        size = x.shape[0] + biased.shape[1]  # numbers
        skip: Tensor = biased + self.a(torch.tanh(biased)) * size
        return skip


def test_only_skip_adds_count() -> None:
    graph = symbolic_trace(Sums()).graph
    model = Sums()
    (name,) = skip_adds(graph, model)
    found = next(node for node in graph.nodes if node.name == name)
    assert found is next(node for node in reversed(graph.nodes) if "add" in node.name)


@pytest.mark.parametrize(
    ("model", "number"), [(Net(depth=5), 5), (ConvNet(depth=3), 3), (Tapped(depth=5), 5)]
)
def test_every_block_counts_and_the_planner_has_it(model: nn.Module, number: int) -> None:
    graph = symbolic_trace(model).graph
    assert len(skip_adds(graph, model)) == number
    flow, plan = make_plan(graph, model)
    assert overlooked(flow.graph, model, plan) == []


def test_what_a_plan_leaves_out_is_named() -> None:
    model = Net(depth=4)
    flow, plan = make_plan(symbolic_trace(model).graph, model)
    (chain,) = plan.chains
    shorter = replace(plan, chains=(replace(chain, residuals=chain.residuals[1:]),))
    assert overlooked(flow.graph, model, shorter) == [chain.residuals[0].add]
    assert len(overlooked(flow.graph, model, Plan())) == 4
