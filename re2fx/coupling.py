"""How the two streams of a chain combine, and how their end becomes one tensor.

Every published scheme with one branch evaluation per step is one linear two-step recurrence over
the stream states ``p_i`` of a chain, with ``p_0 = p_{-1}`` the chain's input and ``F_i`` its
branches::

    p_{i+1} = a * p_i + b * p_{i-1} + c * F_i(p_i)
    p_{i-1} = (p_{i+1} - a * p_i - c * F_i(p_i)) / b

A branch may also be a **whole block** ``T``, with a norm or an activation behind its addition that
no stream can pass. Its update is ``T(x) - x``, so that the weights are ``(a - c, b, c)``.

The methods use nothing but arithmetic, so one definition serves tensors (the executors) and FX
proxies (the rewiring, which records the arithmetic as graph nodes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from .errors import OptionError

Readout = Literal["mean", "sum", "last"]
READOUTS: tuple[str, ...] = get_args(Readout)

FINEST = 8  # the largest j of a snapped b = 2**-j


def accumulate(*terms: tuple[float, Any]) -> Any:
    """Sum ``coefficient * value``, leaving out zeros and factors of one."""
    total: Any = None
    for coefficient, value in terms:
        if coefficient == 0:
            continue
        term = value if coefficient == 1 else value * coefficient
        total = term if total is None else total + term
    return total


@dataclass(frozen=True)
class Coupling:
    """The coefficients ``(a, b, c)`` of the two-step recurrence.

    Attributes:
        a: weight of the current stream state ``p_i``.
        b: weight of the previous stream state ``p_{i-1}``; zero cannot be inverted.
        c: weight of the branch's output.
        evaluations: steps per residual; its branch is run anew, with the same weights, in each.
        block: whether the branch is a whole block, see `of_block`.
    """

    a: float
    b: float
    c: float
    evaluations: int = 1
    block: bool = field(default=False, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        for name in ("a", "b", "c"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise OptionError(f"coupling: {name} must be a finite number, not {value!r}")
        if self.evaluations not in (1, 2):
            raise OptionError(f"coupling: evaluations must be 1 or 2, not {self.evaluations!r}")

    @classmethod
    def re2tal(cls) -> Coupling:
        """Each skip jumps two branches instead of one (Re2TAL, CVPR 2023): ``(0, 1, 1)``."""
        return cls(0.0, 1.0, 1.0)

    @classmethod
    def original(cls) -> Coupling:
        """The network as it was, ``(1, 0, 1)``: not invertible, for ``memory="store"`` only."""
        return cls(1.0, 0.0, 1.0)

    @classmethod
    def consistent(cls, b: float) -> Coupling:
        """``(1 - b, b, 1 + b)``: nearer to the original network the smaller ``b`` is."""
        return cls(1.0 - b, b, 1.0 + b)

    @classmethod
    def midpoint(cls, b: float, h: float) -> Coupling:
        """``(1 - b, b, h)``: the damped midpoint rule with step ``h``."""
        return cls(1.0 - b, b, h)

    @classmethod
    def momentum(cls, g: float) -> Coupling:
        """``(1 + g, -g, 1 - g)``: the momentum ResNet (ICML 2021)."""
        return cls(1.0 + g, -g, 1.0 - g)

    @classmethod
    def dr2net(cls, alpha: float, beta: float) -> Coupling:
        """``(alpha, beta, 1)``: Dr2Net (CVPR 2024)."""
        return cls(alpha, beta, 1.0)

    @classmethod
    def double(cls) -> Coupling:
        """``(0, 1, 1)`` twice per residual: ``y' = y + F(z)``, ``z' = z + F(y')``.

        The coupling of RevNet (Gomez et al., 2017) with one branch for both of its functions: both
        streams get the update of every residual, so their mean carries the full one. **A branch
        runs twice**, which doubles the cost of the forward and of the backward; dropout is drawn
        for each run, and running statistics move in each.
        """
        return cls(0.0, 1.0, 1.0, evaluations=2)

    @staticmethod
    def bdia(gamma: float = 0.5) -> Coupling:
        """Random signs per sample and block in train mode, the given network in eval mode.

        BDIA (Zhang et al., 2024), see `re2fx.drawn`: ``(1 - s g, s g, 1 + s g)`` with a drawn sign
        ``s``. Needs ``readout="last"``, and in fp32 anchors. In eval mode nothing is reconstructed,
        since ``(1, 0, 1)`` cannot be inverted: a call with gradients stores.
        """
        from .drawn import Drawn

        return Drawn(1.0, 0.0, 1.0, gamma=gamma)

    @property
    def draws(self) -> bool:
        """Whether its coefficients are drawn in the forward."""
        return False

    def draw(self, stream: torch.Tensor) -> torch.Tensor | None:
        """What one block draws for the samples of a stream, of shape (samples, 1, ..., 1)."""
        return None

    @property
    def expected(self) -> Coupling:
        """The coupling in eval mode."""
        return self

    @property
    def outcomes(self) -> tuple[Coupling, ...]:
        """The couplings that are drawn from, each as likely as the others."""
        return (self,)

    def check_readout(self, readout: Readout) -> None:
        """Refuse a readout that would not mean what it says.

        Raises:
            OptionError: names the one to take.
        """
        if self.evaluations > 1 and readout == "sum":
            raise OptionError(
                f"readout='sum' counts every update twice with coupling {self}, both of whose "
                "streams carry all of them; use 'mean' or 'last'"
            )
        if self.draws and readout != "last":
            raise OptionError(
                f"readout={readout!r}: with coupling {self} the network in eval mode is the given "
                "one only if its newest state is read; use readout='last'"
            )

    def scaled(self, skip: float, branch: float) -> Coupling:
        """The coupling of a residual written as ``skip * x + branch * F(x)``."""
        if skip == 1 and branch == 1:
            return self
        return replace(self, a=self.a * skip, b=self.b * skip, c=self.c * branch)

    @property
    def takes_blocks(self) -> bool:
        """Whether the streams of whole blocks stay bounded.

        A norm forgets the mean and the size of what it gets, a ReLU what is negative. Where a block
        forgets, the recurrence is ``p_{i+1} = (a - c) p_i + b p_{i-1} + constant``, whose solutions
        must die away: so do those of ``consistent(b)`` for ``-1 < b < 1/3``, those of Re2TAL grow
        1.62-fold per block.
        """
        if self.draws or self.evaluations > 1:
            return False
        return _largest_root(1.0, -(self.a - self.c), -self.b) < 1

    def of_block(self) -> Coupling:
        """The same of a branch that is a whole block: ``(a - c, b, c)``."""
        return replace(self, a=self.a - self.c, block=True)

    @property
    def passed(self) -> float:
        """What of ``p_i`` gets into ``p_{i+1}``, by itself and through a block as it is.

        Branches are left out, and so is what a block does to its input.
        """
        return self.a + self.c if self.block else self.a

    def snapped(self) -> Coupling:
        """The nearest coupling whose ``|b|`` is ``2**-j`` for a ``j`` from 0 to 8.

        The sign of ``b`` stays, and ``a`` takes up the difference: ``a + b``, by which a constant
        stream is multiplied, stays what it was.

        Raises:
            OptionError: ``b`` is zero.
        """
        if self.b == 0:
            raise OptionError(f"coupling={self}: b = 0 has no power of two nearest to it")
        powers = (2.0**-j for j in range(FINEST + 1))
        b = math.copysign(min(powers, key=lambda power: abs(abs(self.b) - power)), self.b)
        return self if b == self.b else replace(self, a=self.a + (self.b - b), b=b)

    @property
    def invertible(self) -> bool:
        """Whether ``p_{i-1}`` follows from ``(p_{i+1}, p_i)``."""
        return self.b != 0

    @property
    def growth(self) -> float:
        """By how much one step of the inverse amplifies a rounding error, at the most.

        The largest root in absolute value of ``b m^2 + a m - 1 = 0``, the characteristic equation
        of the inverse recurrence with the branches left out; 1 means errors do not grow.
        """
        if not self.invertible:
            return math.inf
        return _largest_root(self.b, self.passed, -1.0)

    @property
    def exact(self) -> bool:
        """Whether a state comes back to the bit, if its branch is run again as it was."""
        return False

    @property
    def bits(self) -> int:
        """How many bits of each element a step loses, and `advance` keeps."""
        return 0

    def at(self, where: str) -> Coupling:
        """The same for a residual with a name."""
        return self

    def encode(self, value: Any) -> Any:
        """The first state of a stream from a value."""
        return value

    def decode(self, state: Any) -> Any:
        """The numbers that a state stands for."""
        return state

    @property
    def gain(self) -> float:
        """By how much one step stretches the streams if the branches are left out.

        The largest root in absolute value of ``m^2 - a m - b = 0``.
        """
        return _largest_root(1.0, -self.passed, -self.b)

    def step(self, current: Any, previous: Any, branch: Any, draw: Any = None) -> Any:
        """``p_{i+1}`` from ``p_i``, ``p_{i-1}``, ``F_i(p_i)`` and what was drawn, if anything."""
        return accumulate((self.a, current), (self.b, previous), (self.c, branch))

    def inverse(self, following: Any, current: Any, branch: Any, draw: Any = None) -> Any:
        """``p_{i-1}`` from ``p_{i+1}``, ``p_i``, ``F_i(p_i)`` and what was drawn, if anything."""
        previous = following
        if self.a != 0:
            previous = previous - (current if self.a == 1 else current * self.a)
        if self.c != 0:
            previous = previous - (branch if self.c == 1 else branch * self.c)
        return previous if self.b == 1 else previous / self.b

    def advance(
        self, current: Any, previous: Any, branch: Any, draw: Any, gauge: Any, where: str
    ) -> tuple[Any, Any]:
        """``p_{i+1}``, and what `retreat` needs beside the states, the branch and the draw."""
        return self.step(current, previous, branch, draw), None

    def retreat(
        self,
        following: Any,
        current: Any,
        branch: Any,
        draw: Any,
        lost: Any,
        spare: bool = False,
    ) -> Any:
        """``p_{i-1}``; it may lie where the branch's result was, if nobody else has that to spare.

        Rounded as by `inverse`.
        """
        alike = branch.dtype == following.dtype and branch.stride() == following.stride()
        if not spare or not alike or type(self) is not Coupling:
            return self.inverse(following, current, branch, draw)
        rest = replace(self, b=1.0, c=0.0).inverse(following, current, branch)
        scaled = branch if self.c == 1 else branch.mul_(self.c)
        previous = torch.sub(rest, scaled, out=branch)
        return previous if self.b == 1 else previous.div_(self.b)

    def __str__(self) -> str:
        twice = " twice" if self.evaluations == 2 else ""
        return f"({self.passed:g}, {self.b:g}, {self.c:g}){twice}"


def _largest_root(square: float, linear: float, constant: float) -> float:
    """The largest absolute value among the roots of a quadratic equation."""
    root = complex(linear * linear - 4 * square * constant) ** 0.5
    return max(abs((-linear + sign * root) / (2 * square)) for sign in (1, -1))


def linear_weights(couplings: Sequence[tuple[Coupling, float]]) -> tuple[float, float, float]:
    """What is left of the chain's input in ``p_n``, in ``p_{n-1}`` and in the original output.

    Args:
        couplings: per residual its effective coupling and the constant scale of its skip.
    """
    current, previous, original = 1.0, 1.0, 1.0
    for coupling, skip in couplings:
        current, previous = coupling.a * current + coupling.b * previous, current
        original *= skip
    return current, previous, original


def read(
    readout: Readout, current: Any, previous: Any, start: Any, weights: tuple[float, float, float]
) -> Any:
    """Turn two streams into one value.

    ``mean`` is Re2TAL's. ``sum`` keeps the full update of the original ``x + sum F_i`` (the mean
    halves it): the two streams together, less the surplus of the chain's input ``start``. ``last``
    is a copy of the newer state ``p_n`` alone: what reads it may write to it, the stream is kept.
    """
    if readout == "last":
        return current.clone()
    if readout == "mean":
        return (current + previous) * 0.5
    surplus = weights[0] + weights[1] - weights[2]
    return accumulate((1.0, current), (1.0, previous), (-surplus, start))


def widen(value: torch.Tensor) -> torch.Tensor:
    """A stream's first state in at least fp32: half precision would drift with depth."""
    half = value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value
