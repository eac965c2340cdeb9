"""A coupling that moves while the network trains.

    rev.coupling     (1, .1, 1) ──────────── over 1000 steps ───────────▸ (.3, .7, 1)
                     near the pretrained network            well conditioned

Dr2Net (Zhao et al., Dynamic Reversible Dual-Residual Networks, CVPR 2024) finetunes pretrained
networks this way. The small object here does what torch's schedulers of learning rates do: `step`
after every optimizer step, or every epoch, and its state goes into the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from torch import nn

from .coupling import Coupling
from .couplings import (
    Couplings,
    PerChain,
    check_change,
    checked,
    couplings_of,
    resolve,
    simplest,
)
from .errors import OptionError
from .module import RewiredModule
from .piecewise import PiecewiseModule, merged_plan, pieces_of

Shape = Literal["linear", "cosine", "constant"]
By = Literal["step", "epoch"]
SHAPES: tuple[str, ...] = get_args(Shape)
UNITS: tuple[str, ...] = get_args(By)

Waypoint = tuple[int, Couplings]

PROBES = 32  # points between two waypoints at which the conditioning is looked at beforehand


class Schedule:
    """Moves the coupling of a rewired network from one value to another.

    ::

        rev = re2fx.transform(model, coupling=re2fx.Coupling(0.5, 0.5, 1))
        schedule = re2fx.Schedule(rev, rev.coupling, re2fx.Coupling(0.1, 0.9, 1), over=1000)
        for batch in batches:
            train(rev, batch)
            schedule.step()

    Making one sets the coupling to the first. `re2fx.trainers` has callbacks that step it.

    Args:
        rev: what `re2fx.transform` made.
        start: the coupling at first; one, one per chain, or a function of a `Chain`.
        end: the coupling at last.
        over: the number of steps from the one to the other.
        shape: ``"linear"``, ``"cosine"`` (slow at both ends), or ``"constant"``, which keeps each
            coupling until the next is due.
        every: the coupling changes only every so many steps. A change makes compiled code be traced
            and compiled again, so let it be seldom there.
        by: what a step is, ``"step"`` of the optimizer or ``"epoch"``; for the callbacks.
        snap: take the nearest coupling whose ``|b|`` is a power of two; see `Coupling.snapped`.

    Raises:
        OptionError: an argument has a value it cannot take.
        ConditioningError: a coupling on the way could not be reconstructed with.
    """

    def __init__(
        self,
        rev: nn.Module,
        start: Couplings,
        end: Couplings,
        over: int,
        shape: Shape = "linear",
        every: int = 1,
        by: By = "step",
        snap: bool = False,
    ) -> None:
        if not whole(over, 1):
            raise OptionError(f"over={over!r}: expected a whole number of steps, at least 1")
        self._begin(rev, [(0, start), (over, end)], shape, every, by, snap)

    @classmethod
    def of(
        cls,
        rev: nn.Module,
        waypoints: Sequence[Waypoint],
        shape: Shape = "linear",
        every: int = 1,
        by: By = "step",
        snap: bool = False,
    ) -> Schedule:
        """A schedule through several couplings.

        Args:
            rev: what `re2fx.transform` made.
            waypoints: ``(step, coupling)`` in the order of their steps, the first at step 0.
            shape: between any two of them, as for `Schedule`.
            every: as for `Schedule`.
            by: as for `Schedule`.
            snap: as for `Schedule`.
        """
        made = cls.__new__(cls)
        made._begin(rev, waypoints, shape, every, by, snap)
        return made

    def _begin(
        self,
        rev: nn.Module,
        waypoints: Sequence[Waypoint],
        shape: Shape,
        every: int,
        by: By,
        snap: bool,
    ) -> None:
        if not isinstance(rev, (RewiredModule, PiecewiseModule)):
            raise OptionError(f"Schedule({type(rev).__name__}): expected what re2fx.transform made")
        for name, value, allowed in (("shape", shape, SHAPES), ("by", by, UNITS)):
            if value not in allowed:
                raise OptionError(
                    f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}"
                )
        if not whole(every, 1):
            raise OptionError(f"every={every!r}: expected a whole number of steps, at least 1")
        self.rev, self.shape, self.every, self.by, self.snap = rev, shape, every, by, bool(snap)
        self.waypoints = self._read(waypoints)
        self.count = 0
        self._check()
        self._apply()

    def _read(self, waypoints: Sequence[Waypoint]) -> list[tuple[int, PerChain]]:
        """The waypoints with a coupling per chain."""
        steps = [step for step, _ in waypoints]
        ordered = all(earlier < later for earlier, later in pairwise(steps))
        if not all(whole(step, 0) for step in steps) or steps[:1] != [0] or not ordered:
            raise OptionError(
                f"waypoints at {steps}: expected whole numbers of steps that rise, the first 0"
            )
        chains = merged_plan(self.rev).chains
        read = [(step, resolve(checked(coupling), chains)) for step, coupling in waypoints]
        for coupling in (coupling for _, couplings in read for coupling in couplings):
            if coupling.evaluations > 1 or coupling.draws:
                raise OptionError(
                    f"coupling {coupling}: a schedule moves a, b and c; Coupling.double() and "
                    "Coupling.bdia() are not among those between which it can"
                )
        return read

    def _check(self) -> None:
        """Look at the couplings on the way before anything is trained with them."""
        parts = pieces_of(self.rev).values()
        reversible = all(part.memory != "store" for part in parts)
        for (first, before), (last, after) in pairwise(self.waypoints):
            crossed = any(p.b * q.b < 0 for p, q in zip(before, after, strict=True))
            if reversible and crossed and self.shape != "constant":
                raise OptionError(
                    f"the coupling from step {first} to step {last} passes b = 0, which cannot be "
                    "inverted: expected couplings with b of one sign, or shape='constant'"
                )
        ends = [step for step, _ in self.waypoints]
        probes = (p + (q - p) * i // PROBES for p, q in pairwise(ends) for i in range(PROBES))
        for step in dict.fromkeys((*probes, ends[-1])):
            couplings = self.at(step)
            for part in parts:
                own, couplings = (
                    couplings[: len(part.plan.chains)],
                    couplings[len(part.plan.chains) :],
                )
                check_change(part, own)

    def at(self, count: int) -> PerChain:
        """The coupling of each chain after so many steps."""
        count = min(count - count % self.every, count)
        passed = [pair for pair in self.waypoints if pair[0] <= count]
        first, before = passed[-1]
        if len(passed) < len(self.waypoints) and self.shape != "constant":
            last, after = self.waypoints[len(passed)]
            share = (count - first) / (last - first)
            share = (1 - math.cos(math.pi * share)) / 2 if self.shape == "cosine" else share
            before = tuple(between(p, q, share) for p, q in zip(before, after, strict=True))
        return tuple(c.snapped() for c in before) if self.snap else before

    @property
    def coupling(self) -> Coupling | PerChain:
        """The coupling at present: one if all chains have the same, else one per chain."""
        return simplest(self.at(self.count))

    def step(self) -> None:
        """Go on by one step, and set the coupling that is due."""
        self.count += 1
        self._apply()

    def _apply(self) -> None:
        due = self.at(self.count)
        if due != couplings_of(pieces_of(self.rev).values()):
            self.rev.coupling = due

    def state_dict(self) -> dict[str, Any]:
        """Everything but the network, in plain numbers, strings and lists."""
        waypoints = [[at, [[c.a, c.b, c.c] for c in own]] for at, own in self.waypoints]
        names = ("count", "shape", "every", "by", "snap")
        return {"waypoints": waypoints, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another schedule was, on its way, and set the network's coupling.

        Raises:
            OptionError: it was a schedule for another number of chains.
        """
        waypoints = [
            (at, [Coupling(*numbers) for numbers in own]) for at, own in state["waypoints"]
        ]
        self.waypoints = self._read(waypoints)
        for name in ("count", "shape", "every", "by", "snap"):
            setattr(self, name, state[name])
        self._apply()


def between(before: Coupling, after: Coupling, share: float) -> Coupling:
    """So far from one coupling to another."""
    pairs = ((before.a, after.a), (before.b, after.b), (before.c, after.c))
    a, b, c = (p + (q - p) * share for p, q in pairs)
    return Coupling(a, b, c)


def whole(value: object, least: int) -> bool:
    """Whether something is a whole number, and large enough."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
