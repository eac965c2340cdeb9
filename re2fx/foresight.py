"""The peak of a whole training step, forward, loss and backward, without running it for real.

The step runs on fake tensors, with the very autograd engine and reversible executor, under a mode
that sees every operator: it counts the bytes of each storage that an operator makes, until the
storage dies. What it cannot see by itself it is told:

    - what real kernels allocate while they run (`re2fx.workspace`, `re2fx.workspace_cuda`);
    - that the engine adds gradients in place (`re2fx.accumulation`);
    - the random generators' states that the executor remembers, which are real tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .accumulation import alone
from .errors import OptionError
from .fake import Fakes, fake_twin, predicting
from .inputs import split
from .memory import storage_key
from .meter import Meter
from .peak import Peak
from .replay import Autocast
from .rerun import watching

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Foreseen:
    """What one training step would take; print it.

    Attributes:
        peak: predicted bytes above what is there before the step. The first coordinate of its
            timeline is the number of operators run so far, not seconds.
        phase: ``"forward"`` (the loss included) or ``"backward"``, where the peak lies.
        turn: index in the timeline at which the backward begins.
        flops: of matrix products, convolutions and attention, recomputation included.
        moved: bytes that all other operators read and write, views aside.
        untold: what the model calls whose shape rule leaves out what its kernel keeps.
    """

    peak: Peak
    phase: str
    turn: int
    flops: int
    moved: int
    untold: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.peak}, in the {self.phase}; {self.flops / 1e9:.3g} GFLOP"


def foresee(
    model: nn.Module, example_inputs: Any, loss: Loss | None = None, grads: bool = True
) -> Foreseen:
    """Predict the highest memory of one training step; nothing is computed or allocated.

    The model runs in the mode it is in, a rewired one with its ``memory``. It, its gradients and
    buffers and the random generators stay as they are. Autocast that is active counts for the
    forward and the loss; the backward runs outside of it, as torch recommends.

    The figure is what `re2fx.peak` measures on a second step. On CUDA what cuDNN takes for
    convolutions is missing, and the caching allocator is taken to have its default settings.

    Args:
        model: any module; tensors on ``meta``, or on a device that this machine lacks, are taken
            to be on the CPU.
        example_inputs: as for `re2fx.transform`; tensors may be on ``meta`` or fake.
        loss: called with the model's result; `total` by default.
        grads: whether each parameter has its ``.grad`` before the step, as after
            ``zero_grad(set_to_none=False)``. Otherwise those that the backward makes count.

    Raises:
        CaptureError: what the model allocates depends on the values of tensors.
        OptionError: nothing in the model's result requires a gradient.
    """
    forecast = Forecast(model, split(example_inputs), grads)
    args, kwargs = forecast.given
    return forecast.step(lambda: (loss or total)(forecast.twin(*args, **kwargs)))[0]


class Forecast:
    """Predicts steps of one model, several of them.

    Args:
        model: any module; it stays as it is.
        given: tensors in any structure, to run it on.
        grads: as for `foresee`.

    Attributes:
        twin: the model with fake tensors.
        given: the same structure with fake tensors.
        fakes: makes them.
        members: the storages of parameters and buffers, by `re2fx.memory.storage_key`.
        meter: of the step that runs, or of the last one.
    """

    def __init__(self, model: nn.Module, given: Any, grads: bool = True) -> None:
        self.fakes, self._name = Fakes(), type(model).__name__
        self.twin = fake_twin(model, self.fakes)
        self.given = self.fakes.tree(given)
        self._grads = grads
        own = (*self.twin.parameters(), *self.twin.buffers())
        self.members = {storage_key(tensor) for tensor in own}
        self.meter = Meter((), torch.device("cpu"), (0, 0, 0))

    def running(self) -> AbstractContextManager[None]:
        """Fake tensors run in here."""
        return predicting(self.fakes, self._name)

    def step(self, forward: Callable[[], Tensor]) -> tuple[Foreseen, str]:
        """One training step.

        Args:
            forward: runs `twin`, or its parts, and returns a loss.

        Returns:
            what it takes, and the frame that had been brought back last where it takes most.
        """
        with self.running():
            _give_grads(self.twin, self._grads)
            there = _tensors(self.twin, self.given)
            device = there[0].device if there else torch.device("cpu")
            self.meter = meter = Meter(there, device, alone())
            with _outside_autocast(there) as autocast, meter, watching(meter.enter):
                with autocast():
                    result = forward()
                meter.turn = len(meter.timeline)
                torch.autograd.backward(result)
                del result
        return summary(meter, tuple(sorted(self.fakes.untold))), meter.where


def summary(meter: Meter, untold: tuple[str, ...]) -> Foreseen:
    """What was counted, once a step is over."""
    line = tuple(meter.timeline)
    highest = max(range(len(line)), key=lambda index: line[index][1])
    peak = Peak(line[highest][1], meter.bytes, str(meter.device), line)
    phase = "backward" if highest >= meter.turn else "forward"
    return Foreseen(peak, phase, meter.turn, meter.flops, meter.moved, untold)


def total(output: Any) -> Tensor:
    """The sum of everything in a model's result that requires a gradient.

    Raises:
        OptionError: nothing does.
    """
    leaves = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        raise OptionError(
            "no tensor in the model's output requires a gradient; pass loss= from the model's "
            "output to a scalar tensor"
        )
    sums = [torch.view_as_real(x).sum() if x.is_complex() else x.sum() for x in leaves]
    return sums[0] if len(sums) == 1 else torch.stack([x.double() for x in sums]).sum()


@contextmanager
def _outside_autocast(there: Iterable[Tensor]) -> Iterator[Callable[[], Any]]:
    """Leave the active autocast; yields what enters it again.

    All the way: a region that ends inside another one keeps its cast weights.
    """
    kinds = {"cpu", *(tensor.device.type for tensor in there)}
    active = [state for state in map(Autocast.now, sorted(kinds)) if state.enabled]
    depth = torch.autocast_increment_nesting()
    with ExitStack() as stack:
        stack.callback(torch.autocast_decrement_nesting)
        for _ in range(depth):
            torch.autocast_decrement_nesting()
            stack.callback(torch.autocast_increment_nesting)
        for state in active:
            torch.set_autocast_enabled(state.device_type, False)
            stack.callback(torch.set_autocast_enabled, state.device_type, True)
        yield partial(_inside, active)


@contextmanager
def _inside(states: Iterable[Autocast]) -> Iterator[None]:
    with ExitStack() as stack:
        for state in states:
            stack.enter_context(state.restored(cache=True))
        yield


def _give_grads(twin: nn.Module, grads: bool) -> None:
    for parameter in twin.parameters():
        filled = grads and parameter.requires_grad
        parameter.grad = torch.zeros_like(parameter) if filled else None


def _tensors(twin: nn.Module, given: Any) -> list[Tensor]:
    """All that is there before the step."""
    inputs = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    grads = [x.grad for x in twin.parameters() if x.grad is not None]
    return [*twin.parameters(), *twin.buffers(), *grads, *inputs]
