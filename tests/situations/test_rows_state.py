"""Rows 1 to 4: buffers, random numbers, autocast and rounding between the two runs of a branch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import re2fx
from re2fx.replay import Ambient, Autocast

from ..compare import weighted
from ..models import ConvNet, Net
from .harness import (
    Pair,
    Run,
    Unmoved,
    compare,
    double,
    example,
    pair,
    reversible,
    row,
    train,
    under,
    without,
)

IMAGE = example(4, 3, 6, 6)
X = example(5, 4)


def cumulative(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    return model


def spectral(model: nn.Module) -> nn.Module:
    for index in range(4):
        nn.utils.parametrizations.spectral_norm(model.get_submodule(f"blocks.{index}.inner"))
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "batch norm": (ConvNet, IMAGE),
    "spectral norm": (lambda: spectral(Net()), X),
}
"""Modules whose forward moves their buffers."""


@contextmanager
def buffers_left(self: Ambient, record: bool) -> Any:
    """`Ambient.restored` without the buffers."""
    with torch.random.fork_rng(devices=[]):
        if self.generators is not None:
            self.generators.write()
        yield


@row(1)
@without("eager", "re2fx.replay:Ambient.restored", buffers_left)
@pytest.mark.parametrize("name", MODELS)
def test_batch_norm_counts_once(executor: str, name: str) -> None:
    """Without the copies of buffers in `Ambient.restored`: they move again in the backward."""
    build, x = MODELS[name]
    assert_moves(pair(executor, double(build())), x)


def assert_moves(both: Pair, x: Tensor) -> None:
    """As in stored execution, and not by nothing."""
    before = [buffer.clone() for buffer in both.model.buffers()]
    left = compare(both, x)
    moved = [not torch.equal(a, b) for a, b in zip(before, left.buffers.values(), strict=True)]
    assert any(moved)


@row(1, compiled=None)
@without("eager", "re2fx.replay:Ambient.restored", buffers_left)
def test_batch_norm_of_cumulative_averages(executor: str) -> None:
    """Without the copies of buffers in `Ambient.restored`: every batch weighs half."""
    assert_moves(pair(executor, double(cumulative(ConvNet()))), IMAGE)


def checkpointed(**options: Any) -> Any:
    """The network in a checkpoint of the user's own; two backwards."""

    def situation(run: Run, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
        made = {name: make(model) for name, make in options.items()}
        output = checkpoint(run, *inputs, use_reentrant=False, **made)
        weighted(output).backward(retain_graph=True)
        weighted(output).backward()
        return output

    return situation


def put_back(model: nn.Module) -> Callable[[], Any]:
    """For ``context_fn``: the recomputation leaves buffers as they are."""
    return lambda: (nullcontext(), Unmoved(model))


@row(1, compiled=None)
@without("eager", "re2fx.replay:running_statistics", lambda owner: set())
def test_batch_norm_in_a_checkpoint_that_puts_it_back(executor: str) -> None:
    """Without `running_statistics`: the second backward takes them for edited by hand."""
    both = pair(executor, double(ConvNet(dropout=0.2)))
    compare(both, IMAGE, situation=checkpointed(context_fn=put_back))


@row(1, compiled=None)
def test_batch_norm_in_a_bare_checkpoint(executor: str) -> None:
    """The checkpoint moves the statistics a second time, with re2fx as without (pytorch#96136)."""
    both = pair(executor, double(ConvNet()))
    moved = []
    for run in both:
        before = batches(both.model)
        checkpointed()(run, both.model, (IMAGE.clone().requires_grad_(),))
        moved.append([b - a for a, b in zip(before, batches(both.model), strict=True)])
    assert all(1 <= reversible <= stored for reversible, stored in zip(*moved, strict=True))
    assert max(moved[1]) == 3


def batches(model: nn.Module) -> list[int]:
    """How many each batch norm has seen."""
    return [int(b) for name, b in model.named_buffers() if name.endswith("batches_tracked")]


def any_graph(*args: Any) -> None:
    """`check_cuts` that finds nothing."""


@row(1, eager=None, compiled="raises")
@without("compiled", "re2fx.backend:check_cuts", any_graph)
def test_batch_norm_that_breaks_the_graph(executor: str) -> None:
    """Without `check_cuts`: each block is rewired by itself, another network.

    A cumulative average reads a number from a tensor, where Dynamo ends its graph.
    """
    run = reversible(executor, double(cumulative(ConvNet())))
    with pytest.raises(BackendCompilerFailed, match="Remove the graph break") as raised:
        run(IMAGE)
    assert isinstance(raised.value.inner_exception, re2fx.ChainCutError)


@contextmanager
def generator_left(self: Ambient, record: bool) -> Any:
    """`Ambient.restored` with whatever random numbers come next."""
    yield


@row(2)
@without("eager", "re2fx.replay:Ambient.restored", generator_left)
def test_random_numbers(executor: str) -> None:
    """Without the generators in `Ambient.restored`: another mask in the rerun.

    Every step draws fresh masks, from the stream as stored execution would.
    """
    both = pair(executor, double(ConvNet(dropout=0.4)))

    def two_steps(run: Run, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
        first, second = train(run, model, inputs), train(run, model, inputs)
        assert not torch.equal(first, second)
        return first, second

    compare(both, IMAGE, situation=two_steps)


class Noisy(nn.Module):
    """Adds noise, and drops whole branches at random."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        branch = torch.tanh(self.mix(x + 0.1 * torch.randn_like(x)))
        keep = torch.rand(x.shape[0], 1, dtype=x.dtype) > 0.3
        return x + branch * keep


@row(2)
@without("eager", "re2fx.replay:Ambient.restored", generator_left)
def test_stochastic_depth(executor: str) -> None:
    """Without the generators in `Ambient.restored`: other branches are dropped in the rerun."""
    compare(pair(executor, double(Net(block=Noisy)), X), X)


@contextmanager
def autocast_left(self: Autocast, cache: bool) -> Any:
    """`Autocast.restored` with whatever the backward is called under."""
    yield


@row(3)
@without("eager", "re2fx.replay:Autocast.restored", autocast_left)
@pytest.mark.parametrize("cache", [True, False])
def test_backward_outside_of_autocast(executor: str, cache: bool) -> None:
    """Without `Autocast.restored`: the rerun saves tensors of other dtypes."""
    both = pair(executor, double(Net(depth=6, width=16, dropout=0.2)).float())
    context = under(lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=cache))
    # bf16 rounds the reconstructed fp32 input anew where it sits at a rounding boundary.
    compare(both, X.float(), situation=context, tolerance=2e-2)
    assert not torch.is_autocast_enabled("cpu")


def narrow(x: Tensor) -> Tensor:
    """Streams in the dtype of the chain's input."""
    return x


@row(4)
@without("any", "re2fx.passes.rewire:widen", narrow)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_drift_in_half_precision(executor: str, dtype: torch.dtype) -> None:
    """Without streams widened to fp32: they drift by more than the precision over 24 blocks."""
    model = double(Net(depth=24)).to(dtype)
    x = X.to(dtype)
    compare(pair(executor, model), x, tolerance=3e-2)
    rev = re2fx.transform(model)
    assert isinstance(rev, re2fx.RewiredModule)
    with re2fx.record() as calls:
        rev(x)
    output = calls[0].output
    assert output is not None
    assert {p.dtype for p in output} == {torch.float32}
    start = rev.get_submodule("stem")(x).float()
    error = (calls[0].reconstruct().float() - start).norm() / start.norm()
    assert error < 1e-5
