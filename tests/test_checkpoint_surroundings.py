"""Torch's tests of its checkpoint, restated: what surrounds a branch when it is run again.

The table is in test_checkpoint_suite.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from re2fx.errors import ReplayError

from .chains import Branch, X, chain, of
from .compare import weighted
from .situations.harness import Run, compare, under

# Determinism


class Moody(nn.Module):
    """One function the first time, another one from then on."""

    def __init__(self, first: Any, again: Any) -> None:
        super().__init__()
        self.first, self.again, self.calls = first, again, 0
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = (self.first if self.calls == 1 else self.again)(x + self.shift)
        return out


def three(x: Tensor) -> Tensor:
    """Saves three tensors."""
    return x.sin().exp().sin()


def two(x: Tensor) -> Tensor:
    """Saves two."""
    return x.sin().exp()


def smaller(x: Tensor) -> Tensor:
    """Saves two, one of another shape."""
    return x.sin() * torch.ones(4, dtype=x.dtype)


def shorter(x: Tensor) -> Tensor:
    """Saves two of another dtype."""
    return x.float().sin().exp().double()


CHANGES = {
    "fewer": (three, two, "saved 3 tensors in the forward and 2"),
    "more": (two, three, "saved 2 tensors in the forward and 3"),
    "shape": (two, smaller, "saved 2 tensors in the forward and 2 other ones"),
    "dtype": (two, shorter, "saved 2 tensors in the forward and 2 other ones"),
}


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_branch_that_is_not_deterministic(change: str, place: str) -> None:
    """Another number, shape or dtype raises; the first branch may go on after what is needed."""
    first, again, message = CHANGES[change]
    moody, steady = Moody(first, again), Branch()
    both = chain(moody, steady) if place == "first" else chain(steady, moody)

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        moody.calls = 0
        output = run(*inputs)
        weighted(output).backward()
        return output

    if change == "more" and place == "first":
        compare(both, X, situation=situation)
        return
    with pytest.raises(ReplayError, match=message):
        situation(both.reversible, both.model, (X,))
    moody.again = first
    compare(both, X, situation=situation)


def test_another_default_dtype_in_the_backward() -> None:
    """A factory in the branch makes the tensor that it made in the forward."""
    both = of(lambda x: x * torch.full((4,), 0.1))
    before = torch.get_default_dtype()

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        output = run(*inputs)
        torch.set_default_dtype(torch.float16)
        try:
            weighted(output).backward()
            assert torch.get_default_dtype() == torch.float16
        finally:
            torch.set_default_dtype(before)
        return output

    compare(both, X, situation=situation)


# Random numbers


@pytest.mark.parametrize("between", [True, False])
def test_random_numbers(between: bool) -> None:
    """The same in the rerun as in the forward, others in each step; the stream goes on after it."""
    drawn: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        drawn.append(torch.rand_like(x))
        return torch.tanh(nn.functional.dropout(x * drawn[-1], 0.3))

    both = of(function)

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        outputs = [run(*inputs)]
        if between:
            torch.rand(7)
        weighted(outputs[0]).backward()
        outputs.append(torch.rand(3))
        outputs.append(run(*inputs))
        return outputs

    compare(both, X, situation=situation)
    stored, reversible = drawn[:6], drawn[6:]
    forward, backward, following = reversible[:3], reversible[3:6], reversible[6:]
    assert all(map(torch.equal, forward, stored[:3]))
    assert all(map(torch.equal, forward, backward[::-1]))
    assert all(map(torch.equal, following, stored[3:]))
    assert not any(map(torch.equal, forward, following))


# Modes and contexts


def half() -> Any:
    """Autocast to bfloat16."""
    return torch.autocast("cpu", torch.bfloat16)


def inside(x: Tensor) -> Tensor:
    """Out of autocast for a moment."""
    with torch.autocast("cpu", enabled=False):
        y = x.float() @ torch.eye(4)
        assert y.dtype == torch.float32
    return y.tanh()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("function", [torch.tanh, inside])
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast(enabled: bool, function: Any, cached: bool) -> None:
    """The backward is outside of it, and the branches are inside again."""
    seen: list[torch.dtype] = []

    def noted(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return function(x)

    branches = [Branch(noted) for _ in range(3)]
    for branch in branches[1:]:
        branch.inner = branches[0].inner  # cast once, where casts are kept
    both = chain(*branches)
    both.model.float()
    context = partial(torch.autocast, "cpu", torch.bfloat16, enabled, cached)
    situation = under(context)
    compare(both, X.float(), situation=situation, tolerance=2e-2 if enabled else 1e-5)
    assert seen == [torch.bfloat16 if enabled else torch.float32] * 9
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_within_autocast() -> None:
    """The inner region decides, in the rerun too."""
    seen: list[torch.dtype] = []

    def noted(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x.float().tanh()

    both = of(noted)
    both.model.float()

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        with half():
            with torch.autocast("cpu", enabled=False):
                output = run(*inputs)
            weighted(output).backward()
        return output

    compare(both, X.float(), situation=situation, tolerance=1e-5)
    assert seen == [torch.float32] * 9


def test_a_device_context_around_the_forward() -> None:
    """Tensors that a branch makes are where they were, whatever is around the backward."""
    both = of(lambda x: x * torch.ones(4, dtype=x.dtype))
    compare(both, X, situation=under(lambda: torch.device("cpu")))
    output = both.reversible(X)
    with torch.device("meta"):
        output.sum().backward()
    assert both.model.get_parameter("stem.weight").grad.device.type == "cpu"  # type: ignore[union-attr]


# Writes


def in_place(x: Tensor) -> Tensor:
    """Writes to what nobody saved."""
    return x.sin().mul_(2).cos().exp_()


def views(x: Tensor) -> Tensor:
    """Several results of one operator, and views of what has no gradient."""
    variance, mean = torch.var_mean(x, dim=1, keepdim=True)
    picked = torch.arange(4).view(2, 2).view(-1)
    return (x[:, picked] - mean) * variance


@pytest.mark.parametrize("function", [in_place, views])
def test_writes_and_views_in_a_branch(function: Callable[[Tensor], Tensor]) -> None:
    """As in stored execution."""
    compare(of(function), X)


def test_a_write_to_a_saved_tensor() -> None:
    """An error in both."""
    for run in of(lambda x: x.tanh().mul_(2).sin()):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(X).sum().backward()


@pytest.mark.parametrize("where", ["inside", "around"])
def test_selective_checkpoints(where: str) -> None:
    """A checkpoint that keeps what some operators return, inside of branches or around all."""
    context = partial(create_selective_checkpoint_contexts, [torch.ops.aten.exp.default])
    kept = partial(checkpoint, use_reentrant=False, context_fn=context)

    def function(x: Tensor) -> Tensor:
        out: Tensor = kept(two, x) if where == "inside" else two(x)
        return out

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        output = kept(run, *inputs) if where == "around" else run(*inputs)
        assert isinstance(output, Tensor)
        weighted(output).backward()
        return output

    compare(of(function), X, situation=situation)
