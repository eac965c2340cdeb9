"""What a rewired module interprets: a straight line of steps over numbered slots.

Ordinary nodes run as compiled segments; chains run block by block through `ChainCall`, so that side
inputs may be computed from a stream in the middle of a chain. A slot is emptied after its last
reader. No FX in here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from .checkpoint import Checkpoint, CheckpointCall
from .coupling import Coupling
from .exact import FixedCoupling
from .fixed_point import Kernels
from .layout import Relayout
from .runtime import ChainCall, Reverse

Function = Callable[..., Any]


@dataclass(frozen=True)
class Segment:
    """Ordinary nodes, run as compiled code: ``outputs = function(root, *inputs)``.

    With a frame their intermediates are not kept, but made again for the backward.
    """

    function: Function
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    frame: Checkpoint | None = None

    def run(self, root: Any, values: Sequence[Any]) -> Any:
        """A tuple of the outputs, or whatever the last segment of a program returns."""
        if self.frame is None or not torch.is_grad_enabled():
            return self.function(root, *values)
        call = CheckpointCall(root, self.frame)
        outputs = call.run(values)
        calls = _recording.get()
        if calls is not None:
            calls.checkpoints.append(call)
        return outputs if self.outputs or not outputs else outputs[0]


@dataclass(frozen=True)
class Enter:
    """A chain begins with the value in slot ``start``, and that in ``before`` as the one before."""

    chain: int
    start: int
    before: int | None = None


@dataclass(frozen=True)
class RunBlock:
    """One block; its result goes to slot ``output`` if anybody reads it."""

    chain: int
    frame: Reverse
    sides: tuple[int, ...]
    output: int | None


@dataclass(frozen=True)
class RunLink:
    """Shape-only operations; slots for the states of both streams after each, where read."""

    chain: int
    frame: Relayout
    sides: tuple[int, ...]
    currents: tuple[int | None, ...]
    previouses: tuple[int | None, ...]


@dataclass(frozen=True)
class Leave:
    """A chain ends."""

    chain: int


Step = Segment | Enter | RunBlock | RunLink | Leave


@dataclass(frozen=True)
class Program:
    """A straight line of steps over numbered slots; the first slots are the inputs.

    Attributes:
        steps: in order; the last is a segment that returns the model's output.
        frees: per step, the slots nobody reads afterwards.
        slots: how many there are.
    """

    steps: tuple[Step, ...]
    frees: tuple[tuple[int, ...], ...]
    slots: int

    def recoupled(
        self,
        couplings: Sequence[Sequence[Coupling]],
        anchored: Sequence[Sequence[frozenset[torch.dtype]]],
    ) -> Program:
        """The same with other coefficients and anchors, per chain one for each block.

        The frames are other ones too: what was run before is undone as it was done.
        """
        following = [
            zip(*own, strict=True) for own in zip(couplings, anchored, strict=True)
        ]  # fmt: skip

        def step(given: Step) -> Step:
            if not isinstance(given, RunBlock):
                return given
            coupling, dtypes = next(following[given.chain])
            frame = replace(given.frame, coupling=coupling, anchored=dtypes)
            return replace(given, frame=frame)

        return replace(self, steps=tuple(map(step, self.steps)))

    def run(
        self, root: Any, inputs: Sequence[Any], after: Callable[[int], None] | None = None
    ) -> Any:
        """Run all steps; return what the last one returns.

        Args:
            root: holds the members.
            inputs: the first values.
            after: called with the number of each step when it has run.
        """
        values: list[Any] = [*inputs, *([None] * (self.slots - len(inputs)))]
        calls: dict[int, ChainCall] = {}
        result: Any = None
        try:
            for index, (step, frees) in enumerate(zip(self.steps, self.frees, strict=True)):
                result = self._do(step, root, values, calls)
                for slot in frees:
                    values[slot] = None
                if after is not None:
                    after(index)
        finally:
            for call in calls.values():  # none, unless a step raised
                call.abandon()
        return result

    def _do(self, step: Step, root: Any, values: list[Any], calls: dict[int, ChainCall]) -> Any:
        if isinstance(step, Segment):
            outputs = step.run(root, [values[slot] for slot in step.inputs])
            for slot, value in zip(step.outputs, outputs if step.outputs else (), strict=True):
                values[slot] = value
            return outputs
        if isinstance(step, Enter):
            starts = [values[slot] for slot in (step.start, step.before) if slot is not None]
            calls[step.chain] = _make.get()(step.chain, root, *starts)
            return None
        call = calls[step.chain]
        if isinstance(step, Leave):
            call.leave()
            _note(calls.pop(step.chain))
            return None
        sides = [values[slot] for slot in step.sides]
        if isinstance(step, RunBlock):
            output = call.block(step.frame, sides)
            if step.output is not None:
                values[step.output] = output
            return None
        for slots, states in zip(
            (step.currents, step.previouses), call.relayout(step.frame, sides), strict=True
        ):
            for place, state in zip(slots, states, strict=True):
                if place is not None:
                    values[place] = state
        return None


def with_kernels(program: Program, kernels: Kernels) -> Program:
    """The same with other code for steps in fixed point."""

    def step(one: Step) -> Step:
        coupling = one.frame.coupling if isinstance(one, RunBlock) else None
        if not isinstance(one, RunBlock) or not isinstance(coupling, FixedCoupling):
            return one
        return replace(one, frame=replace(one.frame, coupling=replace(coupling, kernels=kernels)))

    return replace(program, steps=tuple(map(step, program.steps)))


class Calls(list[ChainCall]):
    """Recorded calls of chains.

    Attributes:
        checkpoints: those of checkpoint frames.
    """

    def __init__(self) -> None:
        super().__init__()
        self.checkpoints: list[CheckpointCall] = []


_recording: ContextVar[Calls | None] = ContextVar("re2fx_recording", default=None)

Make = Callable[..., ChainCall]


def _usual(chain: int, root: Any, *starts: Any) -> ChainCall:
    return ChainCall(root, *starts)


_make: ContextVar[Make] = ContextVar("re2fx_make", default=_usual)


def _note(call: ChainCall) -> None:
    calls = _recording.get()
    if calls is not None:
        call.recorded = True
        calls.append(call)


def recording() -> bool:
    """Whether chain calls are being recorded in this context."""
    return _recording.get() is not None or _make.get() is not _usual


@contextmanager
def calls_made_by(make: Make) -> Iterator[None]:
    """Let another kind of call run the chains inside the block, stored or reversible.

    Args:
        make: ``make(chain, root, start)``, or with the state before it as a fourth argument, gives
            the call that runs the chain with that number.
    """
    token = _make.set(make)
    try:
        yield
    finally:
        _make.reset(token)


@contextmanager
def record() -> Iterator[Calls]:
    """Record every chain call made inside the block, in the order the chains end.

    Each call gives the chain's last two stream states (``call.output``) and the chain's input
    reconstructed from them (``call.reconstruct()``)::

        with re2fx.record() as calls:
            rev(x)
        calls[0].reconstruct()
    """
    calls = Calls()
    token = _recording.set(calls)
    try:
        yield calls
    finally:
        _recording.reset(token)
