"""The peak of a whole training step, forward, loss and backward, without running it for real.

The step runs on fake tensors, with the very autograd engine and reversible executor, under a mode
that sees every operator: it counts the bytes of each storage that an operator makes, until the
storage dies. What it cannot see by itself it is told:

    - what real kernels allocate while they run (`re2fx.workspace`);
    - that the engine, where nobody else holds a gradient, adds the next one into it; under a
      dispatch mode it adds out of place;
    - the random generators' states that the executor remembers, which are real tensors.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .body import watching
from .errors import OptionError
from .fake import Fakes, fake_twin, predicting
from .inputs import split
from .memory import storage_key
from .peak import Peak
from .workspace import Rule, nbytes, rule_of

Loss = Callable[[Any], Tensor]

_A = torch.ops.aten
_ENGINE = _engine_run_backward.__code__
_UNWRITTEN = {_A.empty, _A.empty_strided, _A.empty_like, _A.new_empty, _A.new_empty_strided}


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
    buffers and the random generators stay as they are. Autocast that is active counts.

    On the CPU the figure is what `re2fx.peak` measures on a second step. On CUDA the kernels'
    workspaces and the caching allocator's rounding are missing.

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
    args, kwargs = split(example_inputs)
    forecast = Forecast(model, (args, kwargs), grads)
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
    """

    def __init__(self, model: nn.Module, given: Any, grads: bool = True) -> None:
        self.fakes, self._name = Fakes(), type(model).__name__
        self.twin = fake_twin(model, self.fakes)
        self.given = self.fakes.tree(given)
        self._grads = grads
        own = (*self.twin.parameters(), *self.twin.buffers())
        self.members = {storage_key(tensor) for tensor in own}
        self._meter: _Meter | None = None

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
            self._meter = meter = _Meter(there, device, _alone())
            with meter, watching(meter.enter):
                result = forward()
                meter.turn = len(meter.timeline)
                torch.autograd.backward(result)
                del result
        return meter.summary(tuple(sorted(self.fakes.untold))), meter.where

    def running(self) -> AbstractContextManager[None]:
        """Fake tensors run in here."""
        return predicting(self.fakes, self._name)

    def work(self) -> tuple[int, int]:
        """Operations and bytes moved so far in the step that runs."""
        assert self._meter is not None, "asked from inside a step"
        return self._meter.work


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
    result = sum(torch.view_as_real(x).sum() if x.is_complex() else x.sum() for x in leaves)
    assert isinstance(result, Tensor)
    return result


def _give_grads(twin: nn.Module, grads: bool) -> None:
    for parameter in twin.parameters():
        filled = grads and parameter.requires_grad
        parameter.grad = torch.zeros_like(parameter) if filled else None


def _tensors(twin: nn.Module, given: Any) -> list[Tensor]:
    """All that is there before the step."""
    given = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    grads = [x.grad for x in twin.parameters() if x.grad is not None]
    return [*twin.parameters(), *twin.buffers(), *grads, *given]


@dataclass(frozen=True)
class _Kind:
    """What is known of an operator before it is called."""

    formula: Callable[..., int] | None
    moves: bool
    rule: Rule | None


@cache
def _kind(func: Any) -> _Kind:
    packet = func.overloadpacket
    formula = _formulas().get(packet)
    moves = formula is None and not func.is_view and packet not in _UNWRITTEN
    return _Kind(formula, moves, rule_of(func))


@cache
def _formulas() -> dict[Any, Callable[..., int]]:
    """Torch's, and the same ones for the CPU's attention, which it leaves out."""
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

    return {
        **flop_registry,
        _A._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
        _A._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    }


def _tensors_of(values: Sequence[Any]) -> list[Tensor]:
    """Those among some values, and in lists among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


def _is_state(tensor: Tensor) -> bool:
    """Whether it is the remembered state of a generator, which is not fake."""
    return type(tensor) is Tensor and tensor.dtype == torch.uint8


# the engine's additions

_Holders = tuple[int, int, int]


def _holders(tensor: Tensor) -> _Holders:
    """How many hold the Python object, the tensor and its storage."""
    storage = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return sys.getrefcount(tensor), tensor._use_count(), storage  # type: ignore[attr-defined]


def _from_engine(caller: FrameType | None) -> bool:
    """Whether the engine itself calls an operator, no backward written in Python."""
    return not torch.is_grad_enabled() and (caller is None or caller.f_code is _ENGINE)


class _Probe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds out how a gradient is held that the engine adds to."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, taken = kwargs or {}, _tensors_of(args)
        if func is _A.add.Tensor and _from_engine(sys._getframe().f_back):
            self.found = self._can_grow(*taken)
        return func(*args, **kwargs)

    def _can_grow(self, old: Tensor, new: Tensor) -> _Holders:
        return _holders(old)


def _alone() -> _Holders:
    """What `_holders` says in `_Meter._can_grow` of a gradient that nobody else holds."""
    with _Probe() as probe:  # type: ignore[no-untyped-call]
        middle = torch.ones(2, requires_grad=True).sin()
        (middle.exp() + middle.cos()).sum().backward()
    found: _Holders = probe.found
    return found


# the count


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operators make, while they live.

    Args:
        there: tensors that are there already.
        device: whose memory.
        alone: what `_holders` says of a gradient that nobody but the engine holds.

    Attributes:
        timeline: ``(operators so far, bytes)`` after each change.
        turn: where in the timeline the backward begins.
        where: the frame that was brought back last at the highest.
    """

    def __init__(self, there: Iterable[Tensor], device: torch.device, alone: _Holders) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.timeline: list[tuple[float, int]] = [(0, 0)]
        self.turn = 0
        self.where = ""
        self._place, self._highest = "", 0
        self._device, self._alone = device, alone
        self._flops, self._moved, self._bytes, self._steps = 0, 0, 0, 0
        self._there = {id(s): s for s in (tensor.untyped_storage() for tensor in there)}
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a wrapper around the dispatch, whose caller is looked at here

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._steps += 1
        kwargs, taken = kwargs or {}, _tensors_of(args)
        read = self._meet(taken, func)
        engine = func is _A.add.Tensor and _from_engine(sys._getframe().f_back)
        if engine and self._can_grow(*taken):
            func = _A.add_.Tensor
        result = func(*args, **kwargs)
        made = _tensors_of(result if isinstance(result, (tuple, list)) else (result,))
        written = self._note(made)
        kind = _kind(func)
        if kind.rule is not None and self._device.type == "cpu":
            self._pass(kind.rule(args, made))
        if kind.formula is not None:
            self._flops += kind.formula(*args, **kwargs, out_val=result)
        elif kind.moves:
            self._moved += read + written
        return result

    def _meet(self, tensors: Iterable[Tensor], func: Any) -> int:
        """Take storages that no operator made for old ones; return the bytes to read."""
        size = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            size += min(nbytes(tensor), storage.nbytes())
            if id(storage) not in self._live and id(storage) not in self._there:
                if func is _A.equal.default and _is_state(tensor):
                    self._add(storage)
                else:
                    self._there[id(storage)] = storage
        return size

    def _note(self, tensors: Iterable[Tensor]) -> int:
        """Count the new storages; return the bytes written."""
        size = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            size += min(nbytes(tensor), storage.nbytes())
            new = id(storage) not in self._live and id(storage) not in self._there
            if new and tensor.device.type == self._device.type:
                self._add(storage)
        return size

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        meter = weakref.ref(self)  # what outlives the step must not hold the count

        def gone(_: Any) -> None:
            own = meter()
            if own is not None:
                own._change(-own._live.pop(key)[1])

        self._live[key] = (weakref.ref(storage, gone), size)
        self._change(size)

    def _change(self, size: int) -> None:
        if size:
            self._bytes += size
            if self._bytes > self._highest:
                self._highest, self.where = self._bytes, self._place
            self.timeline.append((self._steps, self._bytes))

    def enter(self, place: str) -> None:
        """Note the frame that is brought back."""
        self._place = place

    @property
    def work(self) -> tuple[int, int]:
        """Operations, and bytes moved, so far."""
        return self._flops, self._moved

    def _pass(self, size: int) -> None:
        """Bytes that are there for a moment."""
        if size > 0:
            self._change(size)
            self._change(-size)

    def _can_grow(self, old: Tensor, new: Tensor) -> bool:
        """Whether the engine, without a dispatch mode, would add one gradient into another."""
        dense = nbytes(old) == old.untyped_storage().nbytes()
        alike = old.shape == new.shape and old.dtype == new.dtype
        return dense and alike and _holders(old) == self._alone

    def summary(self, untold: tuple[str, ...]) -> Foreseen:
        """What was counted, once the step is over."""
        line = tuple(self.timeline)
        highest = max(range(len(line)), key=lambda index: line[index][1])
        peak = Peak(line[highest][1], self._bytes, str(self._device), line)
        phase = "backward" if highest >= self.turn else "forward"
        return Foreseen(peak, phase, self.turn, self._flops, self._moved, untold)
