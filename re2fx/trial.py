"""Two kinds of chain call that tell what the backward of the usual kind does.

`Watched` keeps the true stream states of a forward, runs every branch again on its true input, and
compares each reconstructed state with the true one::

    forward, block i      remember p_i;  as usual
    end of the chain      for each i, from the last:  F_i(p_i) again, against the first result
                          for each i, from the last:  r_i reconstructed, against p_i

`Pinned` is stored execution whose values are the true ones and whose branches are differentiated
at given states r_i: at the reconstructed ones it gives the gradient that reversible execution must
give if it is right, however inexact the reconstruction is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .coupling import Coupling
from .distance import norm, ratio, relative, same
from .layout import restrided
from .replay import Ambient
from .runtime import ChainCall, Reverse


@dataclass
class Repeat:
    """How a branch did when it was run again on its true input.

    Attributes:
        block: its number in the chain.
        error: norm of the change of the branch's result over the norm of the result.
        cause: what the run moved that it should not have, if the branch did not repeat.
        failure: the error it raised instead.
    """

    block: int
    error: float = 0.0
    cause: str = ""
    failure: str = ""


@dataclass
class Trial:
    """What was seen of one chain.

    Attributes:
        number: of the chain in the plan.
        dtype: of its streams.
        branch_dtypes: what the branches gave.
        couplings: of its blocks.
        inputs: per block the state its branch read; those that could be reconstructed replaced by
            their reconstruction.
        errors: per block the relative error of that reconstruction, None where there is none.
        repeats: per block, from the last.
        failure: the error that ended the reconstruction.
    """

    number: int
    dtype: torch.dtype
    branch_dtypes: set[torch.dtype] = field(default_factory=set)
    couplings: list[Coupling] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    errors: list[float | None] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)
    failure: str = ""


Why = Callable[[Callable[[], Any]], str]


class Watched(ChainCall):
    """Keeps the true states of its chain and examines it when the chain ends.

    Args:
        number: of the chain.
        why: runs something and says what it moved that a rerun should not.
        trials: gets the result.
        root, start, before: as for `ChainCall`.
    """

    def __init__(
        self,
        number: int,
        why: Why,
        trials: list[Trial],
        root: Any,
        start: torch.Tensor,
        before: torch.Tensor | None = None,
    ) -> None:
        super().__init__(root, start, before)
        self._why, self._trials = why, trials
        self._trial = Trial(number, start.dtype)
        self._steps: list[_Step] = []

    def block(self, frame: Reverse, sides: Sequence[Any]) -> torch.Tensor:
        """Run one block as usual and keep its states."""
        current, previous = (state.detach() for state in self.streams)
        following = super().block(frame, sides)
        place = len(self.records) - 1
        self._steps.append(_Step(place, frame.coupling, current, previous, following.detach()))
        return following

    def leave(self) -> None:
        """End the chain and examine it."""
        super().leave()
        trial, blocks = self._trial, {step.place: i for i, step in enumerate(self._steps)}
        trial.inputs = [step.current for step in self._steps]
        trial.couplings = [step.coupling for step in self._steps]
        trial.errors = [None] * len(blocks)
        self._trials.append(trial)
        while self._steps:  # emptied on the way: from here on only the blocks' inputs are needed
            trial.repeats.append(self._repeat(self._steps.pop(), len(self._steps)))
        try:
            for place, state in self.reconstructed():
                block = blocks[place]
                decode = self.coupling.decode
                trial.errors[block] = relative(decode(state), decode(trial.inputs[block]))
                trial.inputs[block] = state
        except torch.OutOfMemoryError:
            raise
        except (
            Exception
        ) as error:  # whatever a branch may raise on a state that is not the true one
            trial.failure = str(error)

    def _repeat(self, step: _Step, block: int) -> Repeat:
        """Run a branch again on its true input and compare the result."""
        try:
            branch = self.rerun(step.place, step.current)
            self._trial.branch_dtypes.add(branch.dtype)
            draw = self.records[step.place].draw
            again = step.coupling.step(step.current, step.previous, branch, draw)
            if same(again, step.following):
                return Repeat(block)
            difference = step.coupling.decode(again) - step.coupling.decode(step.following)
            error = ratio(norm(difference), abs(step.coupling.c) * norm(branch))
            return Repeat(block, error, self._why(lambda: self.rerun(step.place, step.current)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return Repeat(block, failure=str(error))


@dataclass(frozen=True)
class _Step:
    """A block's place among the records, and the true states around it."""

    place: int
    coupling: Coupling
    current: torch.Tensor
    previous: torch.Tensor
    following: torch.Tensor


class Pinned(ChainCall):
    """Stored execution with the branches differentiated at given states.

    Args:
        inputs: per block the state to differentiate its branch at.
        root, start, before: as for `ChainCall`.
    """

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        root: Any,
        start: torch.Tensor,
        before: torch.Tensor | None = None,
    ) -> None:
        super().__init__(root, start, before)
        self._inputs = iter(inputs)

    def block(self, frame: Reverse, sides: Sequence[Any]) -> torch.Tensor:
        """Run one block twice: for its value, and for its derivative."""
        current, previous = self.streams
        ambient = Ambient(self.root, frame.lookup, current.device)
        value = frame.branch(self.root, current, *sides).detach()
        ambient.settle(self.root)
        state = restrided(next(self._inputs), current.stride())
        with ambient.restored(record=True):
            branch = frame.branch(self.root, at(state, current), *sides)
        draw = frame.coupling.draw(current)
        following: torch.Tensor = frame.coupling.step(current, previous, at(value, branch), draw)
        self._streams = (following, current)
        return following


class _At(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, origin: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, grads[0]


def at(value: torch.Tensor, origin: torch.Tensor) -> torch.Tensor:
    """A value, to the bit, with the gradient of another tensor."""
    made: torch.Tensor = _At.apply(value, origin)  # type: ignore[no-untyped-call]
    return made
