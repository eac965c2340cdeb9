"""Two oracles of rewiring.

`run_chain` is the definition, a loop in plain Python that shares no code with re2fx. `expected`
applies it to a random program of `tests.programs`: the description says what a chain is, so nothing
here detects anything. `follow_original` knows no description and works for any network.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import re2fx

from .programs import Inner, Network, Residual, Sides, last_in_turn, same

Triple = tuple[float, float, float]
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """One residual ``skip * x + f(x)`` of a chain, and what is done to the stream before it."""

    f: Function
    skip: float = 1.0
    link: Function = same


def combine(*terms: tuple[float, Tensor]) -> Tensor:
    """Sum of ``coefficient * value`` from left to right, zeros and factors of one left out."""
    values = [x if k == 1 else x * k for k, x in terms if k != 0]
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def run_chain(
    x: Tensor, steps: Iterable[Step], coupling: Triple, readout: str, times: int = 1
) -> list[Tensor]:
    """p_{i+1} = a p_i + b p_{i-1} + c F_i(p_i), as often in turn; the readout behind every step."""
    p = q = start = x
    share_p = share_q = share = 1.0  # of the chain's input, in p, in q and in the original stream
    seen = []
    for step in steps:
        p, q, start = step.link(p), step.link(q), step.link(start)
        a, b, c = coupling[0] * step.skip, coupling[1] * step.skip, coupling[2]
        for _ in range(times):
            p, q = combine((a, p), (b, q), (c, step.f(p))), p
        share_p, share_q, share = a * share_p + b * share_q, share_p, share * step.skip
        both = combine((1.0, p), (1.0, q), (-(share_p + share_q - share), start))
        seen.append({"mean": (p + q) * 0.5, "sum": both, "last": p}[readout])
    return seen


def kind(behind: str | None) -> str | None:
    """An activation, a constant factor, or nothing."""
    return behind if behind in (None, "half") else "activation"


@dataclass(frozen=True)
class Rewiring:
    """How to rewire, as plain data."""

    coupling: Triple
    readout: str = "mean"
    activation: str = "branch"
    times: int = 1

    def stage(self, x: Tensor, residuals: Sequence[Residual], sides: Sides) -> list[Tensor]:
        """The value behind each residual of a stage."""
        if len(residuals) < 2:  # stays as it is, and lets a chain inside its branch be rewired
            return [r(r.link(x), sides, self.inner) for r in residuals]
        ends = [kind(r.block.behind) for r in residuals]
        if ends[-1] != ends[-2]:
            ends[-1] = None
        activations = [
            intact(r) if end == "activation" else same
            for r, end in zip(residuals, ends, strict=True)
        ]
        steps = []
        for r, end, before, behind in zip(
            residuals, ends, [same, *activations], activations, strict=False
        ):
            half = 0.5 if end == "half" else 1.0
            around = (before, same) if self.activation == "stream" else (same, behind)
            f = partial(branch, r, sides, r.scale * half, *around)
            steps.append(Step(f, r.skip * half, r.link))
        seen = run_chain(x, steps, self.coupling, self.readout, self.times)
        if self.activation == "stream":
            seen = [after(value) for after, value in zip(activations, seen, strict=True)]
        return seen if ends[-1] else [*seen[:-1], residuals[-1].after(seen[-1])]

    def inner(self, x: Tensor, residuals: Sequence[Residual], sides: Sides) -> Tensor:
        """The residuals inside the branch of a residual that is not rewired."""
        return self.stage(x, residuals, sides)[-1]


def intact(residual: Residual) -> Function:
    """What follows an addition, never in place."""
    return lambda x: residual.after(x.clone())


def branch(
    r: Residual, sides: Sides, scale: float, before: Function, behind: Function, p: Tensor
) -> Tensor:
    """The branches of a residual at one stream state, summed with their constant scale."""
    inner: Inner = last_in_turn
    values: list[Tensor] = [f(before(p), sides, inner) * scale for f in r.branches]
    return behind(sum(values[1:], values[0]))


def expected(network: Network, rewiring: Rewiring, x: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
    """What the rewired network must return, bit for bit."""
    return network.run(x.clone(), cond.clone(), rewiring.stage)


def follow_original(model: nn.Module, *inputs: Tensor, activation: str = "branch") -> Any:
    """The output of the rewired network with p_{i+1} = p_i + F_i(p_i), read without averaging.

    That is the original network, in another notation: whatever detection, chaining and rewiring do,
    the value must not move. Only activations that were moved may change it.
    """

    def last(readout: str, current: Any, previous: Any, start: Any, weights: object) -> Any:
        return current

    with patch("re2fx.passes.rewire.read", last), warnings.catch_warnings():
        warnings.simplefilter("ignore", re2fx.Re2fxWarning)
        rev = re2fx.transform(
            model, coupling=re2fx.Coupling.original(), memory="store", activation=activation
        )
    with torch.no_grad():
        return rev(*[x.clone() for x in inputs])
