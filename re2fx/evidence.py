"""What a verification measures: steps, their differences, and what precision lets one expect."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import nn

from .distance import norm, relative
from .findings import BlockError, ChainErrors, GradientError
from .plan import Location
from .replay import Autocast
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


@dataclass
class Evidence:
    """Everything that was measured.

    Attributes:
        precision: what to expect.
        locations: per chain and block, where it is written.
        stored: the step with stored execution.
        reversible: the same step with reversible execution.
        trials: what the chains showed of themselves, in the order they ended.
        again: stored execution once more.
        pinned: stored execution differentiated at the reconstructed states.
    """

    precision: Precision
    locations: tuple[tuple[Location, ...], ...]
    stored: Step
    reversible: Step
    trials: tuple[Trial, ...]
    again: Step | None = None
    pinned: Step | None = None

    def gradient_error(self, step: Step) -> float:
        """The largest relative error of a gradient."""
        return max((g.error for g in gradient_errors(self.stored, step)), default=0.0)

    def output_error(self, step: Step) -> float:
        """The largest relative error of an output."""
        if step.error is not None:
            return math.nan
        pairs = zip(step.outputs, self.stored.outputs, strict=True)
        return max((relative(got, true) for got, true in pairs), default=0.0)

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
        return complete and len(self.trials) == len(self.locations)

    @property
    def unexplained(self) -> bool:
        """Whether there is a difference that no branch accounts for yet."""
        if self.reversible.error is not None or self.unrepeated:
            return False
        worst = max(self.gradient_error(self.reversible), self.output_error(self.reversible))
        return worst > self.precision.tolerance

    def where(self, blocks: Sequence[Block]) -> str:
        """Chain and block numbers, module paths and source lines."""
        return f"{_numbers(blocks)}: {self.source(blocks)}"

    def source(self, blocks: Sequence[Block]) -> str:
        """Module paths and source lines."""
        places = [self.locations[chain][block] for chain, block in blocks]
        modules = dict.fromkeys(place.module or "the model itself" for place in places)
        lines = dict.fromkeys(str(short(place)) for place in places if place.file)
        return f"{shorten(modules)} ({shorten(lines)})" if lines else shorten(modules)


def gradient_errors(stored: Step, step: Step) -> tuple[GradientError, ...]:
    """Every gradient's error, the worst first; none if the step failed."""
    if step.error is not None:
        return ()
    norms = {name: norm(g) for name, g in stored.gradients.items() if g is not None}
    floor = SMALL * max((n for n in norms.values() if math.isfinite(n)), default=0.0)
    errors = []
    for name, true in stored.gradients.items():
        got = step.gradients[name]
        if true is not None and got is not None:
            errors.append(GradientError(name, relative(got, true, floor), norms[name]))
        elif true is not None or got is not None:
            errors.append(GradientError(name, math.inf, norms.get(name, 0.0)))
    return tuple(sorted(errors, key=lambda g: -g.error))


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
