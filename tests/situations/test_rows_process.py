"""Rows 28 to 30: debugging tools around a call, errors inside of it, and threads."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from re2fx.runtime import ChainCall

from ..compare import Outcome, assert_same, weighted
from ..models import Block, ConvNet, Net
from .harness import (
    Run,
    compare,
    double,
    example,
    outcome,
    pair,
    reversible,
    row,
    train,
    without,
)

IMAGE = example(4, 3, 6, 6)
X = example(5, 4)


def user_hooks() -> AbstractContextManager[Any]:
    """A user's packing of saved tensors into lists."""
    return saved_tensors_hooks(lambda tensor: [tensor], lambda packed: packed[0])


TOOLS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "save_on_cpu": save_on_cpu,
    "saved_tensors_hooks": user_hooks,
    "profiler": profile,
}


@row(28)
@pytest.mark.parametrize("name", TOOLS)
def test_tools_around_a_step(executor: str, name: str) -> None:
    """Hooks on saved tensors nest, the profiler sees a step."""
    both = pair(executor, double(ConvNet(dropout=0.2)))

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        with TOOLS[name]():
            return train(run, model, inputs)

    compare(both, IMAGE, situation=situation)


@row(28)
def test_anomaly_mode(executor: str) -> None:
    """Errors of a backward still name their forward."""
    both = pair(executor, double(Net(dropout=0.2)))

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
            return train(run, model, inputs)

    compare(both, X, situation=situation)


@row(28)
def test_inside_a_checkpoint(executor: str) -> None:
    """A rewired network may be a part of something that is checkpointed."""
    both = pair(executor, double(Net(dropout=0.2)))

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        output = checkpoint(run, *inputs, use_reentrant=False)
        weighted(output).backward()
        return output

    compare(both, X, situation=situation)


def forgetful(self: ChainCall) -> None:
    """`ChainCall.abandon` that keeps what the call held."""


class Fuse:
    """Raises in the n-th call of an operator from now, in its forward or its backward."""

    calls: ClassVar[dict[str, int]] = {"forward": 0, "backward": 0}
    error: type[BaseException] = ValueError

    @classmethod
    def burn(cls, phase: str) -> None:
        cls.calls[phase] -= 1
        if cls.calls[phase] == 0:
            raise cls.error("on purpose")


@torch.library.custom_op("re2fx_situations::fuse", mutates_args=())
def fuse(x: Tensor) -> Tensor:
    Fuse.burn("forward")
    return x.tanh()


@fuse.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("re2fx_situations::fuse_backward", mutates_args=())
def fuse_backward(gradient: Tensor, out: Tensor) -> Tensor:
    Fuse.burn("backward")
    return gradient * (1 - out * out)


@fuse_backward.register_fake
def _(gradient: Tensor, out: Tensor) -> Tensor:
    return torch.empty_like(gradient)


fuse.register_autograd(
    lambda ctx, gradient: fuse_backward(gradient, ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)


class Fragile(Block):
    """Dropout before what may raise, so that the random stream is half drawn."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.inner(self.norm(x)))
        out: Tensor = x + self.outer(fuse(hidden))
        return out


PHASES = {"forward": ("forward", 2), "recompute": ("forward", 6), "backward": ("backward", 2)}


@row(29)
@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError])
@pytest.mark.parametrize("phase", PHASES)
def test_errors_in_a_branch(executor: str, phase: str, error: type[Exception]) -> None:
    """They reach the caller; the step after them is a clean one."""
    both = pair(executor, double(Net(block=Fragile, dropout=0.2)), X)
    compare(both, X)
    name, count = PHASES[phase]
    Fuse.error, Fuse.calls = error, {"forward": 0, "backward": 0} | {name: count}
    torch.manual_seed(0)
    with pytest.raises(error, match="on purpose"):
        weighted(both.reversible(X)).backward()
    assert Fuse.calls[name] == 0, "it went off"
    compare(both, X)


@row(29, compiled=None)
@without("eager", "re2fx.runtime:ChainCall.abandon", forgetful)
def test_an_error_leaves_nothing_alive(executor: str) -> None:
    """Without `ChainCall.abandon`: the streams of the step that failed stay alive."""
    rev = reversible(executor, double(Net(block=Fragile)), X)
    alive: list[weakref.ref[Tensor]] = []

    def fail() -> None:
        x = X.clone().requires_grad_()
        alive.append(weakref.ref(x))
        Fuse.error, Fuse.calls = ValueError, {"forward": 3, "backward": 0}
        with suppress(ValueError):
            rev(x)

    gc.collect()
    gc.disable()
    try:
        fail()
        assert alive[0]() is None
    finally:
        gc.enable()


@row(30)
def test_two_models_in_two_threads(executor: str) -> None:
    """Each is as it is alone. Random numbers are the process's, so there are none here."""
    pairs = [pair(executor, double(Net(depth=depth))) for depth in (3, 5)]
    for both in pairs:
        compare(both, X)
    expected = [outcome(both.store, both.model, (X,), train) for both in pairs]
    got: list[list[Outcome]] = [[], []]

    def work(index: int) -> None:
        torch.set_grad_enabled(True)
        for _ in range(5):
            got[index].append(outcome(pairs[index].reversible, pairs[index].model, (X,), train))

    run_threads(work)
    for index, results in enumerate(got):
        assert len(results) == 5
        for result in results:
            result.random_state = expected[index].random_state
            assert_same(result, expected[index], 1e-10)


@row(30)
def test_one_model_in_two_threads(executor: str) -> None:
    """Gradients of the input of two calls at once."""
    both = pair(executor, double(Net(depth=5)))
    model, inputs = both.model, [X, X.flip(0)]
    expected = [gradient(both.store, x) for x in inputs]
    gradient(both.reversible, X)
    got: list[list[Tensor]] = [[], []]
    run_threads(
        lambda index: got[index].extend(gradient(both.reversible, inputs[index]) for _ in range(5))
    )
    for index, results in enumerate(got):
        for result in results:
            torch.testing.assert_close(result, expected[index], rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def gradient(run: Run, x: Tensor) -> Tensor:
    """Of the input alone."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(weighted(run(x)), x)[0]


def run_threads(work: Callable[[int], Any]) -> None:
    """Two at once; an error of either is raised."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
