"""`Coupling.double`: each branch runs twice, once on either stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import re2fx
from re2fx import Coupling
from re2fx.memory import saved_bytes

from .compare import assert_reversible_equals_store, step, weighted
from .joint import assert_compiled_equals_store
from .models import ConvNet, Net, Tapped
from .programs import Block, Program, Stage, programs
from .test_backend import EXECUTORS, compiled
from .test_rewire import COMMON, EVERY_SPELLING, check, label

# Dynamo hides this warning from everybody but those who make warnings errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

DOUBLE = Coupling.double()
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGE = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Compiled code does not outlive its test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def rewired(model: nn.Module, *inputs: Any, **options: Any) -> re2fx.RewiredModule:
    """Transform in fp64."""
    rev = re2fx.transform(model.double(), *inputs, coupling=DOUBLE, **options)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev


# the graph, against the loop


@pytest.mark.parametrize("block", EVERY_SPELLING, ids=label)
def test_one_thing_at_a_time(block: Block) -> None:
    blocks = (replace(block, link=None), Block(("mlp",)), block, block)
    check(Program((2, 4, 4), (Stage("linear", blocks),)), DOUBLE, "mean", "branch")


@pytest.mark.parametrize("activation", ["branch", "stream"])
@settings(COMMON, max_examples=40)
@given(data=st.data(), readout=st.sampled_from(("mean", "last")))
def test_random_programs(activation: str, data: st.DataObject, readout: Any) -> None:
    program = data.draw(programs(3) if activation == "branch" else programs(3, "stream"))
    check(program, DOUBLE, readout, activation)


def test_by_hand() -> None:
    """Y' = y + F(z), z' = z + F(y')."""
    model = Net(3).double()
    y = z = model.stem(X)
    for block in model.blocks:
        y = y + (block(z) - z)
        z = z + (block(y) - y)
    rev = rewired(model)
    torch.testing.assert_close(rev(X), model.head((y + z) / 2))
    assert len(rev.plan.chains[0]) == 3
    assert len(rev.wirings[0].blocks) == 6


def test_both_streams_carry_the_full_update() -> None:
    """With branches that do not depend on the stream the network is the original one."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for index, norm in enumerate(self.norms):
                x = x + (norm(x) * 0 + index)
            return x

    model = Constant().double()
    for readout in ("mean", "last"):
        torch.testing.assert_close(rewired(model, readout=readout)(X), model(X))


# executors


@pytest.mark.parametrize("activation", ["branch", "stream"])
def test_batch_norm_and_dropout(activation: str) -> None:
    rev = rewired(ConvNet(dropout=0.3), activation=activation)
    assert_reversible_equals_store(rev, IMAGE, tolerance=1e-10)
    rev = rewired(Net(dropout=0.3))
    assert_reversible_equals_store(rev, X)


def test_each_run_draws_its_own_noise() -> None:
    """Two runs on equal states give two results."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = x + (self.norm(x) * 0 + torch.rand(4))
            return x

    rev = rewired(Noisy(), example_inputs=(torch.zeros(4).double(),), capture="dynamo")
    with re2fx.record() as calls:
        rev(torch.zeros(4).double())
    current, previous = calls[0].output or (torch.zeros(4), torch.zeros(4))
    assert bool((current != previous).all())
    assert_reversible_equals_store(rev, torch.zeros(4).double())


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
def test_statistics_move_in_each_run(capture: str) -> None:
    """And layers count both."""
    model = ConvNet().double()
    rev = rewired(model, IMAGE, capture=capture)
    rev(IMAGE).sum().backward()
    counted = {name: int(b) for name, b in rev.named_buffers() if "num_batches" in name}
    assert {n for name, n in counted.items() if "stem" in name} == {1}
    assert {n for name, n in counted.items() if "blocks" in name} == {2}


class Counting(nn.Module):
    """Branches that count their runs in a buffer and read it; ``then`` reads it afterwards."""

    steps: Tensor

    def __init__(self, first: bool, then: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.register_buffer("steps", torch.zeros(4))
        self.first, self.then = first, then

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.zeros(4)
        for layer in self.layers:
            if self.first:
                seen = self.steps.add_(1)
                x = x + layer(x) * seen
            else:
                value = layer(x)
                seen = self.steps.add_(1)
                x = x + value * seen
        return x * seen if self.then else x


@pytest.mark.parametrize("first", [True, False])
def test_what_a_branch_writes_and_reads_is_written_twice(first: bool) -> None:
    model = Counting(first).double()
    rev = rewired(model, X, capture="dynamo")
    y = z = X
    for index, layer in enumerate(model.layers):
        y = y + layer(z) * (2 * index + 1)
        z = z + layer(y) * (2 * index + 2)
    torch.testing.assert_close(rev(X), (y + z) / 2)
    assert model.steps.tolist() == [6] * 4


def test_what_others_read_too_cannot_be_written_twice() -> None:
    with pytest.raises(re2fx.OptionError, match=r"test_double.py.* it cannot run twice"):
        rewired(Counting(False, then=True), X, capture="dynamo")


def test_sides_and_taps() -> None:
    rev = rewired(Tapped())
    x, context = torch.randn(2, 3, 8, dtype=torch.float64)
    assert_reversible_equals_store(rev, x, context)
    assert_reversible_equals_store(rev, x, context, loss=lambda out: weighted(out[1]))


def test_it_keeps_two_states() -> None:
    rev = rewired(Net(6, 32))
    assert saved_bytes(lambda: rev(X), rev).chains == (2 * 5 * 32 * 8,)


@pytest.mark.parametrize("name", EXECUTORS)
def test_compiled(name: str) -> None:
    torch.manual_seed(0)
    model = Net(3).double()
    expected = step(rewired(model), "store", X)
    weighted(compiled(model, {**EXECUTORS[name], "coupling": DOUBLE})(X)).backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.gradients[key], rtol=1e-9, atol=1e-10)


def test_reversed_graphs() -> None:
    watched = assert_compiled_equals_store(rewired(Net(3, dropout=0.3)), X, tolerance=1e-10)
    assert watched.blocks == [6]
    assert watched.counts()["stream"] == 2


# what looks at it


def test_verify_and_the_guard_see_every_run() -> None:
    rev = rewired(Net(4))
    checked = re2fx.verify(rev, X)
    checked.raise_for_findings()
    assert len(checked.chains[0].blocks) == 8
    with re2fx.DriftGuard(rev, every=1) as guard:
        for _ in range(7):
            rev(X).sum().backward()
    assert len(guard.history) == 7


def test_it_says_what_it_costs() -> None:
    assert "the branch of each residual runs twice" in str(re2fx.explain(rewired(Net())))
    assert "runs twice" in str(re2fx.explain(Net(), coupling=DOUBLE))
    assert "runs twice" not in str(re2fx.explain(Net()))
    assert str(DOUBLE) == "(0, 1, 1) twice"


def test_the_sum_of_the_streams_is_refused() -> None:
    with pytest.raises(re2fx.OptionError, match=r"readout='sum' counts every update twice"):
        rewired(Net(), readout="sum")
    with pytest.raises(re2fx.OptionError, match="evaluations must be 1 or 2"):
        Coupling(0, 1, 1, 3)
