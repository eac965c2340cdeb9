"""An exception in any pass of any block propagates, and the next step is a clean one."""

from __future__ import annotations

import gc
from contextlib import suppress
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

import re2fx

from .compare import assert_same, step
from .models import Net

DEPTH = 5
BLOCKS = (0, 2, DEPTH - 1)
X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ERRORS: tuple[type[BaseException], ...] = (ValueError, KeyboardInterrupt, torch.OutOfMemoryError)


class Fuse(nn.Module):
    """The identity; raises in its n-th forward from now, or in its next backward."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards, self.backward_too, self.error = 0, False, ERRORS[0]
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.forwards -= 1
        if self.forwards == 0:
            raise self.error("on purpose")
        return self.weight * Trip.apply(x, self)


class Trip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fuse: Fuse) -> Tensor:
        ctx.fuse = fuse
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        fuse: Fuse = ctx.fuse
        if fuse.backward_too:
            fuse.backward_too = False
            raise fuse.error("on purpose")
        return gradients[0], None


def network() -> tuple[Any, list[Fuse]]:
    """Dropout before each fuse, so that the random stream is half drawn when it goes."""
    torch.manual_seed(0)
    model = Net(DEPTH, dropout=0.3)
    fuses = [Fuse() for _ in range(DEPTH)]
    for block, fuse in zip(model.blocks, fuses, strict=True):
        block.outer = nn.Sequential(nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8), fuse)
    rev = re2fx.transform(model.double(), leaves=[Fuse])
    assert isinstance(rev, re2fx.RewiredModule)
    assert len(rev.plan.chains[0]) == DEPTH
    return rev, fuses


def light(fuse: Fuse, phase: str, error: type[BaseException]) -> None:
    fuse.error = error
    fuse.forwards = {"forward": 1, "recompute": 2, "backward": 0}[phase]
    fuse.backward_too = phase == "backward"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("phase", ["forward", "recompute", "backward"])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_next_step_is_clean(block: int, phase: str, error: type[BaseException]) -> None:
    """Values, gradients, buffers and the random stream."""
    rev, fuses = network()
    clean = step(rev, "reversible", X)
    stored = step(rev, "store", X)
    buffers = {name: buffer.clone() for name, buffer in rev.named_buffers()}
    rev.memory = "reversible"
    light(fuses[block], phase, error)
    with pytest.raises(error, match="on purpose"):
        rev(X).square().sum().backward()
    assert fuses[block].forwards <= 0, "it went off"
    assert not fuses[block].backward_too, "it went off"
    with torch.no_grad():
        for name, buffer in rev.named_buffers():
            buffer.copy_(buffers[name])
    again = step(rev, "reversible", X)
    assert_same(again, clean, 0.0)
    assert_same(again, stored, 1e-10)


def test_buffers_move_once_when_the_recompute_fails() -> None:
    """The statistics are those of the forward alone, as in stored execution."""
    found = {}
    for memory in ("store", "reversible"):
        rev, fuses = network()
        rev.memory = memory
        torch.manual_seed(1)
        out = rev(X)
        light(fuses[2], "backward" if memory == "store" else "recompute", ERRORS[0])
        if memory == "reversible":
            fuses[2].forwards = 1
        with pytest.raises(ValueError, match="on purpose"):
            out.square().sum().backward()
        found[memory] = dict(rev.named_buffers())
    for name, stored in found["store"].items():
        torch.testing.assert_close(found["reversible"][name], stored, rtol=0, atol=1e-12)


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


@pytest.mark.parametrize("faults", [False, True], ids=["clean", "with exceptions"])
def test_500_steps_leave_nothing(faults: bool) -> None:
    """Live tensors to the piece, and the process's memory.

    Without `ChainCall.abandon` a forward that raises keeps its streams for ever.
    """
    rev, fuses = network()
    phases = ("forward", "recompute", "backward")

    def train(steps: int) -> None:
        for number in range(steps):
            if faults and number % 2:
                light(fuses[number % DEPTH], phases[number % 3], ERRORS[0])
            rev.zero_grad(set_to_none=True)
            with suppress(ValueError):
                rev(X).square().sum().backward()
        for fuse in fuses:
            fuse.forwards, fuse.backward_too = 0, False
        rev.zero_grad(set_to_none=True)

    train(20)
    before, memory = live_tensors(), psutil.Process().memory_info().rss
    train(500)
    assert live_tensors() <= before
    assert psutil.Process().memory_info().rss - memory < 16 * 2**20
