"""Couplings whose coefficients are drawn in the forward, anew for every sample and block.

BDIA (Zhang et al., *On Exact Bit-level Reversible Transformers Without Changing Architectures*,
2024) averages, per sample and block, between the integration of the step before and its reflection.
With ``s = +1`` or ``-1``::

    p_{i+1} = (1 - s g) p_i + s g p_{i-1} + (1 + s g) F_i(p_i)

In expectation over s that is the given network, ``p_i + F_i(p_i)``, which it is in eval mode. The
signs are one tensor of shape (samples, 1, ..., 1) per block; the first dimension of a stream is
that of the samples. An executor keeps them: they are not drawn again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .coupling import Coupling, accumulate
from .errors import OptionError


def signs(stream: torch.Tensor) -> torch.Tensor:
    """A random sign per sample of a stream, from torch's default generator, in its dtype."""
    shape = [stream.shape[0], *[1] * (stream.dim() - 1)] if stream.dim() else []
    drawn = torch.randint(0, 2, shape, device=stream.device)
    return (drawn * 2 - 1).to(stream.dtype)


@dataclass(frozen=True)
class Drawn(Coupling):
    """BDIA's coupling; ``(a, b, c)`` is its expectation.

    Attributes:
        gamma: the weight of the state before, up to its sign.
        skip: constant scale of the residual's skip.
    """

    gamma: float = 0.5
    skip: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.gamma, (int, float)) or not 0 < abs(self.gamma) < 1:
            raise OptionError(f"bdia: gamma must lie between 0 and 1, or -1 and 0: {self.gamma!r}")

    @property
    def draws(self) -> bool:
        """Signs are drawn."""
        return True

    def draw(self, stream: torch.Tensor) -> torch.Tensor:
        """The signs of one block."""
        return signs(stream)

    @property
    def expected(self) -> Coupling:
        """The given network."""
        return Coupling.original()

    @property
    def outcomes(self) -> tuple[Coupling, ...]:
        """The coupling of a sample with either sign."""
        g, k = self.gamma, self.skip
        return tuple(Coupling(k * (1 - s), k * s, 1 + s) for s in (g, -g))

    @property
    def invertible(self) -> bool:
        """Either sign can be inverted."""
        return all(outcome.invertible for outcome in self.outcomes)

    @property
    def growth(self) -> float:
        """Of the worse sign."""
        return max(outcome.growth for outcome in self.outcomes)

    @property
    def gain(self) -> float:
        """Of the larger sign."""
        return max(outcome.gain for outcome in self.outcomes)

    def scaled(self, skip: float, branch: float) -> Drawn:
        """The coupling of a residual written as ``skip * x + branch * F(x)``."""
        if branch != 1:
            raise OptionError("bdia: scale the branch itself")
        return replace(self, a=self.a * skip, skip=self.skip * skip)

    def step(self, current: Any, previous: Any, branch: Any, draw: Any = None) -> Any:
        """``p_{i+1}`` with the drawn signs."""
        shift = draw * self.gamma
        mixed = current * (1 - shift) + previous * shift
        return accumulate((self.skip, mixed), (1.0, branch * (shift + 1)))

    def inverse(self, following: Any, current: Any, branch: Any, draw: Any = None) -> Any:
        """``p_{i-1}`` with the signs that the forward drew."""
        shift = draw * self.gamma
        mixed = following - branch * (shift + 1)
        if self.skip != 1:
            mixed = mixed / self.skip
        return (mixed - current * (1 - shift)) / shift

    def __str__(self) -> str:
        return f"bdia({self.gamma:g})"
