"""Networks whose modules change after they were planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from re2fx.body import Slicing

from .framed import Mixed, Transformer
from .models import ConvNet
from .planning import few_slices as few_slices
from .situations.harness import compare, double, example

X = example(2, 7, 4)


def sliced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slices each part that could be sliced had, in what follows."""
    counts: list[int] = []
    sizes = Slicing.sizes

    def noting(self: Slicing, root: Any, values: Any) -> list[int]:
        found = sizes(self, root, values)
        counts.append(len(found))
        return found

    monkeypatch.setattr(Slicing, "sizes", noting)
    return counts


def change_nothing(model: Any) -> None:
    """The first layer as it was planned."""


def replace_activation(model: Any) -> None:
    """By one of another class."""
    model.layers[0].mlp[1] = nn.Tanh()


def replace_by_mixing(model: Any) -> None:
    """By a module that is not independent along the tokens."""
    model.layers[0].mlp[1] = Mixing()


class Mixing(nn.Module):
    """Looks at other tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) * 0.1


def add_hook(model: Any) -> None:
    """That changes what a module gives, along the tokens."""
    model.layers[0].mlp[0].register_forward_hook(lambda m, args, out: out.cumsum(1) * 0.1)


def add_other_hook(model: Any) -> None:
    """In front of a module."""
    model.layers[0].mlp[3].register_forward_pre_hook(lambda m, args: (args[0].flip(1),))


def drop(model: Any) -> None:
    """Some of what passes."""
    model.layers[0].mlp[2].p = 0.5


@pytest.mark.parametrize(
    "change", [replace_activation, replace_by_mixing, add_hook, add_other_hook, drop]
)
@pytest.mark.parametrize("slices", [3])
def test_modules_that_change_after_planning(
    change: Callable[[Any], None], slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was proved does not hold for them, so they run whole."""
    counts = []
    for what in (change_nothing, change):
        with monkeypatch.context() as patch:
            net = Mixed.of(double(Transformer()), X)
            compare(net.choose(slices=slices), X)  # which makes the program
            what(net.pair.model)
            found = sliced(patch)
            compare(net.pair, X)
            counts.append(sum(count > 1 for count in found))
    assert counts[1] < counts[0]


def test_a_dropout_that_is_switched_on_moves_the_random_stream_alike() -> None:
    net = Mixed.of(double(Transformer()), X)
    compare(net.choose(slices=3), X)
    for p in (0.5, 0.0, 0.9):
        for module in net.pair.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
        compare(net.pair, X)


def test_statistics_that_are_frozen_after_planning() -> None:
    """And move again later."""
    x = example(4, 3, 6, 6)
    net = Mixed.of(double(ConvNet()), x)
    compare(net.choose(), x)
    norms = [m for m in net.pair.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for training in (False, True, False):
        for norm in norms:
            norm.train(training)
        left = compare(net.pair, x)
        moved = [v for name, v in left.buffers.items() if "num_batches" in name]
        assert all(int(value) == int(training) for value in moved)


def test_slices_of_batches_are_refused_once_statistics_move() -> None:
    """A batch norm planned in eval mode treats images one by one, and in train mode does not."""
    x = example(6, 3, 6, 6)
    model = double(ConvNet(depth=2))
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    net = Mixed.of(model, x)
    net.choose(slices=3)
    compare(net.pair, x)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.train()
    compare(net.pair, x)
