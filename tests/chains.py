"""Chains of branches that are kept whole, and know how often they have run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .situations.harness import Pair, double, example, pair

X = example(5, 4)


class Parts(nn.Module):
    """A stem and branches."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.branches = nn.ModuleList(branches)


class Chain(Parts):
    """A skip around each branch."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return x


class Branch(nn.Module):
    """A linear layer and a function; counts its calls."""

    def __init__(self, function: Callable[[Tensor], Any] = torch.tanh) -> None:
        super().__init__()
        self.inner, self.function, self.calls = nn.Linear(4, 4), function, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.function(self.inner(x))
        return out


def chain(*branches: nn.Module) -> Pair:
    """A chain under both executors."""
    made = pair("eager", double(Chain(*branches)), leaves=[type(branch) for branch in branches])
    assert len(made.store.plan.chains[0]) == len(branches)  # type: ignore[attr-defined]
    reset(made)
    return made


def of(function: Callable[[Tensor], Any] = torch.tanh, depth: int = 3) -> Pair:
    """A chain of branches that end in a function."""
    return chain(*[Branch(function) for _ in range(depth)])


def calls(both: Pair) -> list[Any]:
    """How often each branch has run."""
    return [branch.calls for branch in both.model.branches]  # type: ignore[union-attr]


def reset(both: Pair) -> None:
    """Count from zero."""
    for branch in both.model.branches:  # type: ignore[union-attr]
        branch.calls = 0


def two_sines(x: Tensor) -> Tensor:
    """Saves two tensors."""
    return x.sin().sin()


@contextmanager
def no_collection() -> Iterator[None]:
    """Reference counting alone."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
