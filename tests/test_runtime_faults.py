"""What must not happen: leaks, silent wrong gradients, state left behind."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.errors import ReplayError, StreamError

from .compare import assert_reversible_equals_store, assert_same, step
from .models import Block, Net
from .test_runtime import X, rewired


def test_nothing_of_a_step_stays_alive() -> None:
    """No cycle through the autograd graph: reference counting alone frees everything."""
    rev = rewired(Net(dropout=0.1))
    gc.collect()
    gc.disable()
    try:
        with re2fx.record() as calls:
            loss = rev(X).sum()
        alive = weakref.ref(calls[0])
        states = [weakref.ref(p) for p in calls[0].output or ()]
        calls.clear()
        loss.backward()
        del loss
        assert alive() is None
        assert [s() for s in states] == [None, None]
    finally:
        gc.enable()


def test_a_side_input_that_depends_on_the_chain_leaves_no_cycle() -> None:
    class Feedback(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
            self.gate = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mix[0](x)
            gate = self.gate(x)
            x = x + self.mix[1](x)
            x = x + self.mix[2](x) * gate
            x = x + self.mix[3](x)
            return x

    rev = rewired(Feedback())
    assert rev.plan.chains[0].residuals[2].side_inputs == ("gate",)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert_reversible_equals_store(rev, x)
    gc.collect()
    gc.disable()
    try:
        with re2fx.record() as calls:
            out = rev(x)
        alive = weakref.ref(calls[0])
        calls.clear()
        del out
        assert alive() is None
    finally:
        gc.enable()


def test_parameters_changed_before_the_backward() -> None:
    rev = rewired(Net())
    loss = rev(X).square().sum()
    with torch.no_grad():
        rev.get_parameter("blocks.1.outer.bias").add_(1)
    with pytest.raises(ReplayError, match=r"blocks\.1\.outer\.bias was changed in place"):
        loss.backward()
    rev.zero_grad()
    assert_reversible_equals_store(rev, X)


def test_parameters_replaced_before_the_backward() -> None:
    """Without the check the gradient would be that of a network that never ran."""
    rev = rewired(Net())
    other = {name: p.detach() * 2 for name, p in rev.named_parameters()}
    for p in other.values():
        p.requires_grad_()
    loss = torch.func.functional_call(rev, other, (X,)).sum()
    with pytest.raises(ReplayError, match=r"parameter blocks\.3\.norm\.weight was replaced"):
        loss.backward()
    loss = rev(X).sum()
    rev.get_submodule("blocks.1").inner = nn.Sequential(nn.Linear(8, 16).double())
    with pytest.raises(ReplayError, match="a submodule was replaced"):
        loss.backward()


def test_functional_call_around_a_whole_step() -> None:
    rev = rewired(Net())
    other = {name: (p.detach() * 2).requires_grad_() for name, p in rev.named_parameters()}
    gradients = []
    for memory in ("store", "reversible"):
        rev.memory = memory
        loss = functional_step(rev, other)
        gradients.append(loss)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def functional_step(rev: nn.Module, parameters: dict[str, Tensor]) -> list[Tensor]:
    """Forward and backward while the parameters are swapped in."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rev = rev

        def forward(self, x: Tensor) -> list[Tensor]:
            return list(torch.autograd.grad(self.rev(x).sum(), list(parameters.values())))

    swapped = {f"rev.{name}": p for name, p in parameters.items()}
    return torch.func.functional_call(Step(), swapped, (X,))


def test_side_inputs_in_containers() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8))

        def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
            out: Tensor = self.inner(x) * table[0] + table[1]
            return out

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Table()
            self.mix = nn.ModuleList([Rotary() for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            table = self.table(x)
            for mix in self.mix:
                x = x + mix(x, table)
            return x

    rev = rewired(Model(), leaves=[Rotary])
    assert rev.plan.chains[0].residuals[1].side_inputs == ("table",)
    assert_reversible_equals_store(rev, torch.randn(3, 8, dtype=torch.float64))


class Table(nn.Module):
    """Returns a tuple that needs gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(self.scale), torch.sin(self.scale)


def test_side_input_changed_before_the_backward() -> None:
    rev = rewired(Masked())
    mask = torch.ones(3, 8, dtype=torch.float64)
    loss = rev(torch.randn(3, 8, dtype=torch.float64), mask).sum()
    mask.mul_(2)
    with pytest.raises(ReplayError, match="side input"):
        loss.backward()


class Masked(nn.Module):
    """A mask that each branch multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.mixes = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for mix in self.mixes:
            x = x + mix(x) * mask
        return x


def test_in_place_edit_of_a_saved_tensor_is_rejected_as_in_stored_execution() -> None:
    class Bad(Block):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.inner(self.norm(x)))
            hidden.mul_(2)
            return x + self.outer(hidden)

    rev = rewired(Net(block=Bad))
    for memory in ("store", "reversible"):
        rev.memory = memory
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            rev(X).sum().backward()


class Moody(nn.Module):
    """Saves another number of tensors at every other call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x * self.weight) if self.calls % 2 else x * self.weight


def test_a_branch_that_changes_between_runs() -> None:
    class MoodyBlock(Block):
        def __init__(self, width: int, dropout: float) -> None:
            super().__init__(width, dropout)
            self.mood = Moody()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.outer(self.mood(self.inner(self.norm(x))))

    rev = rewired(Net(block=MoodyBlock))
    with pytest.raises(ReplayError, match=r"blocks\.3 .*not deterministic"):
        rev(X).sum().backward()


def test_a_branch_that_broadcasts_the_stream() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.ModuleList([nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            for mix in self.mix:
                x = x + mix(x)
            return x

    rev = rewired(Broadcast())
    with pytest.raises(StreamError, match=r"turns a stream of \(5, 1\)"):
        rev(torch.randn(5, 1, dtype=torch.float64))


def test_an_error_in_a_branch_leaves_the_next_step_clean() -> None:
    class Fragile(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.outer(self.drop(check(self.inner(self.norm(x)))))

    rev = rewired(Net(block=Fragile, dropout=0.1))
    expected = step(rev, "reversible", X)
    with pytest.raises(ValueError, match="planted"):
        rev(torch.full_like(X, float("nan")))
    assert_same(step(rev, "reversible", X), expected, 0)


@torch.fx.wrap
def check(x: Tensor) -> Tensor:
    """Fails on NaN."""
    if x.isnan().any():
        raise ValueError("planted")
    return x


def test_state_is_per_call_not_per_module() -> None:
    rev = rewired(Net(dropout=0.1))
    before = set(vars(rev))
    out = rev(X).sum()
    other = copy.deepcopy(rev)
    out.backward()
    assert set(vars(rev)) == before
    assert_reversible_equals_store(other, X)


class Tempered(nn.Module):
    """Residuals that read a tensor which is neither parameter nor buffer, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.scale = torch.ones(4).double()
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x) * self.scale + self.shift)
        return x


@pytest.mark.parametrize("name", ["scale", "shift"])
@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_a_constant_changed_before_the_backward_raises(name: str, how: str) -> None:
    model = Tempered().double()
    rev = re2fx.transform(model)
    out = rev(torch.randn(2, 4).double())
    if how == "replaced":
        setattr(model, name, getattr(model, name) * 3)
    else:
        with torch.no_grad():
            getattr(model, name).mul_(3)
    with pytest.raises(re2fx.ReplayError, match=name):
        out.sum().backward()
