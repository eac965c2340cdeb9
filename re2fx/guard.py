"""A sampled check of the reconstruction while a network trains.

`verify` compares everything once. What it cannot see is what happens later: weights that grow until
a coupling loses digits, a branch that begins to read something that changes. The guard looks at one
block of one chain every so many steps, and keeps two tensors for it on that step alone::

    forward    keep p_t and p_{t-1} of the sampled block t
    backward   undo block t as always; compare both states with what was kept

If p_t was right and p_{t-1} is not, the block is to blame; if both are wrong, a later one is, and
the next step looks there.
"""

from __future__ import annotations

import warnings
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from .distance import relative
from .errors import DriftError, OptionError, Re2fxWarning
from .module import RewiredModule
from .program import calls_made_by
from .runtime import ChainCall, Reverse, Walk

Action = Literal["warn", "raise"]


@dataclass(frozen=True)
class Drift:
    """What one sampled check found.

    Attributes:
        step: the number of the call, from 0.
        where: module path and source line of the block.
        before: relative error of the block's input, on which its branch is run again: norm of the
            difference over the norm of the true state.
        error: that of the state which undoing the block gives, the input of the block before it.
        cause: what is to blame, if ``error`` passes the tolerance.
    """

    step: int
    where: str
    before: float
    error: float
    cause: str = ""


@dataclass(frozen=True)
class _Target:
    """A block: its module, its chain's number there, and its place among the chain's blocks."""

    module: RewiredModule
    chain: int
    block: int


class DriftGuard:
    """Checks one reconstructed block every so many steps.

    ::

        with re2fx.DriftGuard(rev, every=100, tolerance=1e-3) as guard:
            train(rev)
        guard.history

    A step is a call of the network with gradients in the eager executor. Values, gradients, buffers
    and random numbers stay what they are; a sampled step keeps two stream states more, the others
    nothing.

    Args:
        rev: what `re2fx.transform` made.
        every: how many steps apart the checks are; each looks at the next block in turn.
        tolerance: the largest relative error that passes.
        action: ``"warn"`` with `Re2fxWarning`, or ``"raise"`` `DriftError` out of the backward.

    Attributes:
        history: the last 1,000 `Drift`, oldest first.

    Raises:
        OptionError: an argument has a value it cannot take.
    """

    def __init__(
        self, rev: nn.Module, every: int = 100, tolerance: float = 1e-3, action: Action = "warn"
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise OptionError(f"every={every!r}: expected a whole number of steps, at least 1")
        if not tolerance > 0:
            raise OptionError(f"tolerance={tolerance!r}: expected a number above 0")
        if action not in get_args(Action):
            raise OptionError(f"action={action!r}: expected one of 'warn', 'raise'")
        self._parts = [module for module in rev.modules() if isinstance(module, RewiredModule)]
        if not self._parts:
            raise OptionError(f"DriftGuard({type(rev).__name__}): transform the model first")
        self.every, self.tolerance, self.action = every, tolerance, action
        self.history: deque[Drift] = deque(maxlen=1000)
        self._targets = [
            _Target(part, number, block)
            for part in self._parts
            for number, wiring in enumerate(part.wirings)
            for block in range(1, len(wiring.blocks))
        ]
        self._calls: dict[int, int] = {}
        self._next, self._soon = 0, False

    def attach(self) -> None:
        """Begin to check."""
        for part in self._parts:
            if part._guard is not None and part._guard is not self:
                raise OptionError(f"{type(part).__name__} has a DriftGuard already: detach it")
            part._guard = self

    def detach(self) -> None:
        """Check no more."""
        for part in self._parts:
            if part._guard is self:
                part._guard = None

    def __enter__(self) -> DriftGuard:
        self.attach()
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def watch(self, module: RewiredModule) -> AbstractContextManager[None]:
        """A context for one call of a module, in which the block of this step is looked at."""
        step = self._calls.get(id(module), 0)
        self._calls[id(module)] = step + 1
        target = self._targets[self._next % len(self._targets)]
        if target.module is not module or (step % self.every and not self._soon):
            return nullcontext()
        self._next, self._soon = self._next + 1, False

        def make(chain: int, root: Any, *starts: Any) -> ChainCall:
            if chain != target.chain:
                return ChainCall(root, *starts)
            return _GuardedCall(self, step, target.block, root, *starts)

        return calls_made_by(make)

    def judge(self, call: _GuardedCall, index: int, drift: Drift, state: torch.Tensor) -> None:
        """Note a check, and say what is wrong."""
        if drift.error <= self.tolerance:
            self.history.append(drift)
            return
        cause, remedy = self._cause(call, index, drift, state)
        self.history.append(Drift(drift.step, drift.where, drift.before, drift.error, cause))
        text = (
            f"{drift.where}: in step {drift.step} the state reconstructed by undoing this block is "
            f"off by {drift.error:.1e} of its norm (tolerance {self.tolerance:.1e}): {cause}. "
            f"{remedy}"
        )
        if self.action == "raise":
            raise DriftError(text)
        warnings.warn(text, Re2fxWarning, stacklevel=2)

    def _cause(
        self, call: _GuardedCall, index: int, drift: Drift, state: torch.Tensor
    ) -> tuple[str, str]:
        if drift.before > self.tolerance:
            self._soon = True
            return (
                f"its input is off by {drift.before:.1e} already, so a later block is to blame",
                "The next step looks at the block behind.",
            )
        first, second = (call.rerun(index, state) for _ in range(2))
        repeats = relative(first, second)
        if repeats > self.tolerance * 1e-3:
            return (
                f"its branch does not repeat itself ({repeats:.1e} apart on the same input)",
                "re2fx.verify finds what it reads; keep it out with leaves= or select=.",
            )
        coupling = call.frame(index).coupling
        if abs(coupling.b) < 0.5:
            return (
                f"its coupling divides by b = {coupling.b:g}, which multiplies errors",
                "Use a coupling with |b| nearer to 1, a smaller drift_tolerance, or "
                "memory='store'.",
            )
        return (
            "its branch gives another result in the backward than in the forward, but the same "
            "there twice: what it reads beside its input has changed, or rounding errors have "
            "grown with its weights",
            "re2fx.verify tells them apart; memory='store' is not affected.",
        )


class _GuardedCall(ChainCall):
    """A call that keeps the states at one block until its backward has reconstructed them."""

    def __init__(self, guard: DriftGuard, step: int, block: int, root: Any, *starts: Any) -> None:
        super().__init__(root, *starts)
        self._guard, self._step, self._block = guard, step, block
        self._index: int | None = None
        self._truth: list[tuple[torch.Tensor, int]] = []

    def block(self, frame: Reverse, sides: Any) -> torch.Tensor:
        """Run one block; keep the states in front of the sampled one."""
        done = sum(isinstance(record.frame, Reverse) for record in self.records)
        if done == self._block:
            self._index = len(self.records)
            self._truth = [(state.detach(), state._version) for state in self.streams]
        return super().block(frame, sides)

    def frame(self, index: int) -> Reverse:
        """The block at a place among the records."""
        frame = self.records[index].frame
        assert isinstance(frame, Reverse)
        return frame

    def _step_back(self, walk: Walk, collect: bool = False) -> None:
        super()._step_back(walk, collect)
        if walk.front != self._index or not self._truth or walk.previous is None:
            return
        truth, self._truth = self._truth, []
        if any(state._version != version for state, version in truth):
            return  # the caller has changed the chain's input, which is its own
        found = (walk.current, walk.previous)
        decode = self.coupling.decode
        before, error = (
            relative(decode(a), decode(b)) for a, (b, _) in zip(found, truth, strict=True)
        )
        drift = Drift(self._step, self.frame(walk.front).name, before, error)
        self._guard.judge(self, walk.front, drift, walk.current)
