"""What a verification measures: steps, their differences, and what precision lets one expect."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from statistics import median
from typing import Any

import torch
from torch import nn

from .distance import norm, relative
from .findings import BlockError, ChainErrors, GradientError
from .plan import Location
from .replay import Autocast
from .snapshot import changed
from .text import short, shorten
from .trial import Repeat, Trial

# A gradient may be zero but for rounding, as that of a bias in front of a norm is. Its error is
# measured against this share of the largest gradient.
SMALL = 1e-2


Block = tuple[int, int]  # the numbers of a chain and of a block in it


@dataclass(frozen=True)
class Precision:
    """What can be expected of the numbers.

    Attributes:
        dtype: the coarsest that the network computes in.
        tolerance: relative error allowed in outputs, gradients and reconstructed states.
        rounding: relative error of a state or a branch that is exact but for the dtype.
        autocast: whether the dtype is autocast's.
    """

    dtype: torch.dtype
    tolerance: float
    rounding: float
    autocast: bool = False

    @classmethod
    def of(
        cls, model: nn.Module, inputs: Iterable[torch.Tensor], tolerance: float | None
    ) -> Precision:
        """Read the dtypes off the parameters, the inputs and the autocast in force."""
        tensors = [t for t in (*model.parameters(), *inputs) if t.is_floating_point()]
        dtypes = {t.dtype for t in tensors if t.dtype in TOLERANCES} or {torch.float32}
        states = [Autocast.now(kind) for kind in {t.device.type for t in tensors} - {"meta"}]
        casts = {s.dtype for s in states if s.enabled and s.dtype in TOLERANCES}
        casts = casts if torch.float32 in dtypes else set()  # autocast leaves fp64 as it is
        dtype = max(dtypes | casts, key=lambda d: torch.finfo(d).eps)
        allowed, rounding = TOLERANCES[dtype]
        allowed = allowed if tolerance is None else tolerance
        return cls(dtype, allowed, rounding, dtype in casts - dtypes)

    @property
    def half(self) -> bool:
        """Whether branches compute in half precision."""
        return self.dtype in (torch.float16, torch.bfloat16)

    def __str__(self) -> str:
        return f"{plain(self.dtype)} autocast" if self.autocast else plain(self.dtype)


# Tolerance, and what rounding alone does to a state over a deep chain. fp64 and fp32 reconstruct to
# 1e-14 and 2e-6 over 96 residuals, and gradients agree to 1e-13 and 6e-6: the tolerances lie well
# above that and well below any mistake. A branch in half precision reads its reconstructed input
# rounded, now and then to the neighbouring number; that is an error of one unit in the last place,
# 1e-3 or 8e-3, in single entries, and gradients of half precision are no more exact themselves.
TOLERANCES = {
    torch.float64: (1e-9, 1e-12),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (5e-2, 8e-3),
}


@dataclass
class Step:
    """What one forward and backward gave.

    Attributes:
        outputs: the tensors of the model's result, detached.
        gradients: by parameter and input; None where there is none.
        state: buffers, tensors and plain attributes of the modules afterwards.
        random: states of the random generators afterwards.
        error: what it raised instead.
    """

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


@dataclass(frozen=True)
class Unsteady:
    """What stored execution itself does not repeat.

    Attributes:
        gradients: the error of each from one run to the next, where it is above the tolerance.
        outputs: the largest error of an output.
        state: names of what the modules hold.
        random: names of generators.
    """

    gradients: dict[str, float]
    outputs: float
    state: frozenset[str]
    random: frozenset[str]

    @classmethod
    def of(cls, first: Step, second: Step, precision: Precision) -> Unsteady:
        """Compare two runs of stored execution."""
        norms = [norm(g) for g in first.gradients.values() if finite(g) and g is not None]
        # Garbage may be large, so what counts as small is told by the middle one.
        floor = SMALL * median(norms) if norms else 0.0
        errors = gradient_errors(first, second, first.gradients, floor)
        return cls(
            {g.name: g.error for g in errors if g.error > precision.tolerance},
            output_error(first, second),
            frozenset(moved(first.state, second.state, precision.rounding)),
            frozenset(changed(first.random, second.random)),
        )


@dataclass
class Evidence:
    """Everything that was measured.

    Attributes:
        precision: what to expect.
        locations: per chain and block, where it is written.
        stored: the step with stored execution.
        reversible: the same step with reversible execution.
        trials: what the chains showed of themselves, in the order they ended.
        unsteady: what stored execution does not repeat when it is run twice.
        calls: how many chain calls a step makes; -1 if that is not known.
        pinned: stored execution differentiated at the reconstructed states.
    """

    precision: Precision
    locations: tuple[tuple[Location, ...], ...]
    stored: Step
    reversible: Step
    trials: tuple[Trial, ...]
    unsteady: Unsteady
    calls: int
    pinned: Step | None = None

    def gradient_errors(self, of: Step, against: Step | None = None) -> tuple[GradientError, ...]:
        """The errors of all gradients that can be compared, the worst first."""
        stored = self.stored.gradients
        blamed = {} if self.unrepeated else self.unsteady.gradients
        names = [n for n in stored if n not in blamed and n not in self.infinite]
        norms = [norm(g) for name in names if (g := stored[name]) is not None]
        return gradient_errors(against or self.stored, of, names, SMALL * max(norms, default=0.0))

    @cached_property
    def infinite(self) -> list[str]:
        """Gradients that are not finite in stored execution."""
        return [name for name, g in self.stored.gradients.items() if not finite(g)]

    @property
    def output_error(self) -> float:
        """The largest relative error of an output."""
        return output_error(self.stored, self.reversible)

    @property
    def unrepeated(self) -> list[tuple[int, Repeat]]:
        """Branches that gave something else when they were run again, with their chains."""
        rounding = self.precision.rounding
        return [
            (trial.number, repeat)
            for trial in self.trials
            for repeat in reversed(trial.repeats)
            if repeat.failure or repeat.error > rounding
        ]

    @property
    def reconstructed(self) -> bool:
        """Whether every state of every chain was reconstructed."""
        complete = all(None not in trial.errors for trial in self.trials)
        return complete and len(self.trials) == self.calls

    @property
    def unexplained(self) -> bool:
        """Whether there is a difference that no branch accounts for yet."""
        errors = self.gradient_errors(self.reversible)
        return not self.unrepeated and any(g.error > self.precision.tolerance for g in errors)

    def where(self, blocks: Sequence[Block]) -> str:
        """Chain and block numbers, module paths and source lines."""
        return f"{_numbers(blocks)}: {self.source(blocks)}"

    def source(self, blocks: Sequence[Block]) -> str:
        """Module paths and source lines."""
        places = [self.locations[chain][block] for chain, block in blocks]
        modules = dict.fromkeys(place.module or "the model itself" for place in places)
        lines = dict.fromkeys(str(short(place)) for place in places if place.file)
        return f"{shorten(modules)} ({shorten(lines)})" if lines else shorten(modules)


def gradient_errors(
    stored: Step, step: Step, names: Iterable[str], floor: float
) -> tuple[GradientError, ...]:
    """The errors of some gradients, the worst first; none if the step failed."""
    if step.error is not None:
        return ()
    errors = []
    for name in names:
        true, got = stored.gradients[name], step.gradients[name]
        if true is not None and got is not None:
            errors.append(GradientError(name, relative(got, true, floor), norm(true)))
        elif true is not None or got is not None:
            errors.append(GradientError(name, math.inf, 0.0 if true is None else norm(true)))
    return tuple(sorted(errors, key=lambda g: -g.error))


def output_error(stored: Step, step: Step) -> float:
    """The largest relative error of an output; none if the step failed."""
    if step.error is not None or len(step.outputs) != len(stored.outputs):
        return math.inf
    pairs = zip(step.outputs, stored.outputs, strict=True)
    return max((relative(got, true) for got, true in pairs), default=0.0)


def moved(before: dict[str, Any], after: dict[str, Any], rounding: float) -> list[str]:
    """The names of what differs by more than rounding."""
    return [
        name
        for name in changed(before, after)
        if not isinstance(a := before.get(name), torch.Tensor)
        or not isinstance(b := after.get(name), torch.Tensor)
        or relative(b, a) > rounding
    ]


def finite(tensor: torch.Tensor | None) -> bool:
    """Whether every entry is a number."""
    return tensor is None or bool(tensor.isfinite().all())


def chain_errors(evidence: Evidence) -> tuple[ChainErrors, ...]:
    """The reconstruction errors with their places, in the order of the plan."""
    return tuple(
        ChainErrors(
            trial.number,
            plain(trial.dtype),
            tuple(
                BlockError(evidence.source([(trial.number, block)]), error)
                for block, error in enumerate(trial.errors)
            ),
        )
        for trial in sorted(evidence.trials, key=lambda trial: trial.number)
    )


def _numbers(blocks: Sequence[Block]) -> str:
    """``chain 0, blocks 2, 3``."""
    chains = groupby(sorted(blocks), key=lambda block: block[0])
    parts = []
    for chain, members in chains:
        numbers = [str(block) for _, block in members]
        noun = "block" if len(numbers) == 1 else "blocks"
        parts.append(f"chain {chain}, {noun} {shorten(numbers)}")
    return "; ".join(parts)


def plain(dtype: torch.dtype) -> str:
    """``float32``."""
    return str(dtype).removeprefix("torch.")
