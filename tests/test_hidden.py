"""What is kept whole: when another route is asked, and when it cannot be run again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx import routes

from .compare import assert_reversible_equals_store
from .models import Net

X = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    torch.compiler.reset()


class Gate(nn.Module):
    """A look at a value, which symbolic tracing cannot follow, around a layer."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.adds, self.mix = adds, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 100:
            return x
        out: Tensor = self.mix(x)
        return x + out if self.adds else out


class Pause(nn.Module):
    """The same around nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x if len(x) < 100 else -x


class Gated(nn.Module):
    def __init__(self, gate: nn.Module, last: bool = False) -> None:
        super().__init__()
        self.mixes = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.gate, self.last = gate, last

    def forward(self, x: Tensor) -> Tensor:
        for mix in self.mixes[:2]:
            x = x + torch.tanh(mix(x))
        if not self.last:
            x = self.gate(x)
        for mix in self.mixes[2:]:
            x = x + torch.tanh(mix(x))
        return self.gate(x) if self.last else x


@pytest.mark.parametrize(
    ("gate", "last", "route", "chains"),
    [
        (Gate(True), False, "dynamo", [5]),  # hides a residual
        (Gate(False), False, "symbolic", [2, 2]),  # a projection, wherever one looks
        (Gate(False), True, "symbolic", [4]),
        (Pause(), False, "dynamo", [4]),  # a stream may pass it
        (Pause(), True, "symbolic", [4]),
    ],
)
def test_another_route_is_asked_where_it_may_see_more(
    gate: nn.Module, last: bool, route: str, chains: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = Gated(gate, last).double(), []

    def ask(*args: Any) -> Any:
        asked.append(args)
        return capture(*args)

    capture = routes.capture_call
    monkeypatch.setattr(routes, "capture_call", ask)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    explanation = re2fx.explain(model, X)
    assert explanation.route == route
    assert bool(asked) == (route == "dynamo")
    assert [len(chain) for chain in explanation.plan.chains] == chains
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    rev = re2fx.transform(model, X)
    assert_reversible_equals_store(rev, X)


class Table(nn.Module):
    """Looks at the dtype of what it is given, as a rotary embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.rand(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.arange(x.shape[1])[:, None] * self.frequencies
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Rotating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixes = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.table = Table()

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.table(x)
        for mix in self.mixes:
            x = x + mix(x) * cos + torch.tanh(mix(x)) * sin
        return x


def test_tables_made_from_the_stream_belong_to_no_branch() -> None:
    model = Rotating().double()
    assert [len(c) for c in re2fx.explain(model).plan.chains] == [2]  # nobody knows what it reads
    explanation = re2fx.explain(model, X)
    assert [len(chain) for chain in explanation.plan.chains] == [3]
    assert_reversible_equals_store(re2fx.transform(model, X), X)


class Recurrence(nn.Module):
    """Goes on from the state that its last call left, or only keeps a picture of it."""

    def __init__(self, reads: bool = True) -> None:
        super().__init__()
        self.weight, self.reads = nn.Parameter(torch.rand(4)), reads
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x * self.weight)
        if self.reads:
            self.state = x.detach() if self.state is None else self.state + x.detach()
            return x + self.state
        return x


class Recurrent(nn.Module):
    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.units = nn.ModuleList([Recurrence(reads) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = x + unit(x)
        return x


def test_a_module_that_keeps_a_state_is_not_run_again() -> None:
    model = Recurrent(True).double()
    plan = re2fx.explain(model, X).plan
    assert not plan.chains
    assert [refusal.rule for refusal in plan.refusals] == ["state"] * 3
    assert "assigns a tensor to units.0.state" in plan.refusals[0].sentence
    assert all(unit.state is None for unit in model.units)
    assert len(re2fx.explain(Recurrent(False).double(), X).plan.chains[0]) == 3


def test_equal_graphs_are_planned_once_and_stay_two(monkeypatch: pytest.MonkeyPatch) -> None:
    from re2fx import pipeline

    planned: list[Any] = []
    plan = pipeline.make_plan

    def counted(*args: Any, **options: Any) -> Any:
        planned.append(args)
        return plan(*args, **options)

    monkeypatch.setattr(pipeline, "make_plan", counted)
    rev: Any = re2fx.transform(Net(3).double())
    assert len(planned) == 1
    train, eval_ = (rev.train(mode).graph for mode in (True, False))
    assert train is not eval_
    assert [node.name for node in train.nodes] == [node.name for node in eval_.nodes]
    assert_reversible_equals_store(rev, X)

    class Moody(Net):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return 2 * out if self.training else out

    planned.clear()
    moody: Any = re2fx.transform(Moody(3).double())
    assert len(planned) == 2
    torch.testing.assert_close(moody.train()(X), 2 * moody.eval()(X))
