"""Calls with planned frames that go wrong are refused or leave nothing behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from re2fx.errors import ReplayError

from .compare import weighted
from .framed import Mixed, Transformer
from .situations.harness import compare, double
from .test_frames_autograd import KINDS, X, chosen, kinds

pytestmark = pytest.mark.usefixtures("nothing_is_small")


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is saved is brought back, whatever its size."""
    monkeypatch.setattr("re2fx.rerun.SMALL", 0)


@kinds
def test_an_input_changed_in_between(kind: str) -> None:
    """What a checkpoint keeps must be what it was."""
    net = chosen("written attention", kind)
    x = X.clone()
    output = net.pair.reversible(x)
    x.mul_(2)
    with pytest.raises(ReplayError, match="changed in place"):
        weighted(output).backward()
    net.rev.zero_grad()
    compare(net.pair, X)


@kinds
@pytest.mark.parametrize("name", ["stem.0.weight", "layers.0.mlp.0.bias", "head.weight"])
def test_a_parameter_changed_in_between(name: str, kind: str) -> None:
    net = chosen("written attention", kind)
    output, parameter = net.pair.reversible(X), net.rev.get_parameter(name)
    with torch.no_grad():
        parameter.mul_(1)
    with pytest.raises((ReplayError, RuntimeError), match=r"in place|inplace"):
        weighted(output).backward()
    net.rev.zero_grad()
    compare(net.pair, X)


class Writes(nn.Module):
    """Writes to what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Transformer()

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu_()
        out: Tensor = self.net(x)
        return out


def test_a_stem_that_writes_to_its_input() -> None:
    """It cannot be run again from it."""
    net = Mixed.of(double(Writes()), X.clone())
    net.choose(slices=7)
    left = []
    for run in net.pair:
        x, given = X.clone(), X.clone().requires_grad_()
        for value in (x, given * 1):
            weighted(run(value)).backward()
        assert torch.equal(x, X.relu())
        left.append([given.grad, *[p.grad for p in net.rev.parameters()]])
        net.rev.zero_grad()
    torch.testing.assert_close(*left, rtol=1e-9, atol=1e-10)


class Strict(nn.Module):
    """Raises on demand."""

    fails = False

    def forward(self, x: Tensor) -> Tensor:
        if Strict.fails:
            raise ArithmeticError("on demand")
        return x.sin()


@kinds
@pytest.mark.parametrize("place", ["stem", "layers", "head"])
def test_an_exception_in_the_forward(
    place: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call is as ever, and nothing of the failed one is left."""
    model: Any = Transformer(depth=2)
    if place == "layers":
        model.layers[1].mlp[1] = Strict()
    elif place == "stem":
        model.stem[1] = Strict()
    else:
        model.norm = Strict()
    net = Mixed.of(double(model), X, leaves=[Strict])
    net.choose(**KINDS[kind])
    compare(net.pair, X)
    x = X.clone().requires_grad_() * 1
    left = weakref.ref(x)
    gc.collect()
    gc.disable()
    try:
        monkeypatch.setattr(Strict, "fails", True)
        try:
            net.pair.reversible(x)
        except ArithmeticError:
            pass
        else:
            raise AssertionError
        del x
        assert left() is None
    finally:
        gc.enable()
    monkeypatch.setattr(Strict, "fails", False)
    compare(net.pair, X)
