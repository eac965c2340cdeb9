"""Fixed-point streams: reconstruction without a wrong bit, at any depth.

In floating point a state that was added cannot be subtracted again exactly. Here the states of a
chain are whole numbers in units of ``2^-fraction``. For ``|b| = 2^-j`` a step and its inverse are::

    u       = round(a p_i + c F_i(p_i))           the same in both directions, to the bit
    p_{i+1} = u +- (p_{i-1} >> j)                 keep r = the j bits that were shifted out
    p_{i-1} = +-(p_{i+1} - u) << j | r

so that a chain costs ``j`` bits per element and block, and none for Re2TAL's ``b = 1``. Gradients
pass the rounding straight through (Bengio et al., 2013): ``(a, b, c)`` times the gradient.

Autograd only knows tensors of floating-point numbers, so a state is *carried* in the bits of one:
an int32 in a float32, an int64 in a float64 (``tensor.view(dtype)``). Nothing computes with a
carrier; `decode` gives the numbers it stands for, and shape-only operations move its bits.

The idea of keeping the bits that a division loses is from MacLaurin et al., Gradient-based
Hyperparameter Optimization through Reversible Learning (2015); BDIA (Zhang et al., 2024) applies it
to transformers for b = 1/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .coupling import Coupling
from .drawn import Drawn, signs
from .errors import OptionError
from .fixed_point import CARRIED, FixedPoint, Kernels, Number, check, is_fake, signed, size
from .gauge import Gauge

MOST_BITS = 8


@dataclass(frozen=True)
class FixedCoupling(Coupling):
    """A coupling of states in fixed point.

    Attributes:
        a, b, c: as for `Coupling`; ``|b|`` is a power of two from 2^-8 to 1.
        point: how fine and wide the numbers are.
        where: the residual, for messages.
        kernels: what does the arithmetic.
    """

    point: FixedPoint = field(default_factory=FixedPoint)
    where: str = ""
    kernels: Kernels = field(default_factory=Kernels, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.b != 0 and not 0 <= self.shift <= MOST_BITS:
            raise OptionError(f"exact: b = {self.b:g} is out of range. {_REMEDY}")
        if self.b != 0 and abs(self.b) != 2.0**-self.shift:
            raise OptionError(f"exact: b = {self.b:g} is no power of two. {_REMEDY}")

    @classmethod
    def of(cls, coupling: Coupling, point: FixedPoint) -> FixedCoupling:
        """A coupling in fixed point.

        Raises:
            OptionError: it cannot be.
        """
        numbers = coupling.a, coupling.b, coupling.c, coupling.evaluations
        if isinstance(coupling, Drawn):
            return FixedDrawn(
                coupling.a, coupling.gamma, coupling.c, point=point, gamma=coupling.gamma
            )
        return cls(*numbers, point=point)

    @classmethod
    def read(cls, arguments: Any) -> FixedCoupling:
        """Off the arguments of the operator of a step."""
        draw, a, b, c, fraction, width, where = arguments[3:]
        return _coupling(draw is not None, a, b, c, _given(fraction, width), where)

    @property
    def shift(self) -> int:
        """The number of bits that an element loses in a step."""
        return round(-math.log2(abs(self.b)))

    @property
    def bits(self) -> int:
        """How many bits of each element a step loses, and `advance` keeps."""
        return self.shift

    @property
    def growth(self) -> float:
        """Nothing grows: there is no error."""
        return 1.0 if self.invertible else math.inf

    @property
    def exact(self) -> bool:
        """Whether a state comes back to the bit, if its branch is run again as it was."""
        return True

    def at(self, where: str) -> FixedCoupling:
        """The same for a residual with a name."""
        return replace(self, where=where)

    # in a graph

    def encode(self, value: Any) -> Any:
        """Carry numbers."""
        return ENCODE(value, *self._point())

    def decode(self, state: Any) -> Any:
        """The numbers that are carried."""
        return DECODE(state, *self._point())

    def step(self, current: Any, previous: Any, branch: Any, draw: Any = None) -> Any:
        """``p_{i+1}``; what is shifted out is lost."""
        return STEP(current, previous, branch, draw, *self.coefficients, *self._point(), self.where)

    def weights(self, draw: Tensor | None) -> tuple[Number, Number, Number]:
        """a, b and c, for each sample if they are drawn."""
        return self.coefficients

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """a, b and c."""
        return float(self.a), float(self.b), float(self.c)

    def _point(self) -> tuple[int, int]:
        point = self.point
        return -1 if point.fraction is None else point.fraction, point.width or 0

    # in the executor

    def advance(
        self,
        current: Tensor,
        previous: Tensor,
        branch: Tensor,
        draw: Tensor | None,
        gauge: Gauge,
        where: str,
    ) -> tuple[Tensor, Tensor | None]:
        """``p_{i+1}`` and the bits that were shifted out, packed."""
        following, lost = _Advance.apply(  # type: ignore[no-untyped-call]
            current, previous, branch, draw, self, gauge, where
        )
        return following, lost if self.shift else None

    def retreat(
        self,
        following: Tensor,
        current: Tensor,
        branch: Tensor,
        draw: Tensor | None,
        lost: Tensor | None,
        spare: bool = False,
    ) -> Tensor:
        """``p_{i-1}`` from all that is known of the step, the bits shifted out among it."""
        change, _ = self.change(current, branch, draw)
        carried = CARRIED[following.dtype]
        whole: Tensor = self.kernels.separate(
            following.view(carried), change, lost, self.shift, self.sign(draw)
        )
        return whole.view(following.dtype)

    def change(self, current: Tensor, branch: Tensor, draw: Tensor | None) -> tuple[Tensor, Tensor]:
        """``round(a p_i + c F_i(p_i))`` in whole units, and the largest of its size."""
        carried, scale = CARRIED[current.dtype], 2.0 ** self.point.places(current.dtype)
        a, _, c = self.weights(draw)
        found: tuple[Tensor, Tensor] = self.kernels.change(
            current.view(carried), branch, current.dtype, a, c * scale
        )
        return found

    def sign(self, draw: Tensor | None) -> Number:
        """That of b."""
        return -1 if self.b < 0 else 1


@dataclass(frozen=True)
class FixedDrawn(FixedCoupling):
    """BDIA's coupling in fixed point; see `re2fx.drawn`. ``b`` is its weight for the sign +1.

    Attributes:
        gamma: the weight of the state before, up to its sign.
        skip: constant scale of the residual's skip.
    """

    gamma: float = 0.5
    skip: float = 1.0

    @property
    def draws(self) -> bool:
        """Signs are drawn."""
        return True

    def draw(self, stream: Tensor) -> Tensor:
        """The signs of one block."""
        return signs(stream)

    @property
    def expected(self) -> Coupling:
        """The given network."""
        return Coupling.original()

    def scaled(self, skip: float, branch: float) -> FixedDrawn:
        """The coupling of a residual written as ``skip * x + branch * F(x)``."""
        if branch != 1:
            raise OptionError("bdia: scale the branch itself")
        return replace(self, a=self.a * skip, b=self.b * skip, skip=self.skip * skip)

    def step(self, current: Any, previous: Any, branch: Any, draw: Any = None) -> Any:
        """``p_{i+1}``; what is shifted out is lost."""
        numbers = (self.skip, self.gamma, 1.0)
        return STEP(current, previous, branch, draw, *numbers, *self._point(), self.where)

    def weights(self, draw: Tensor | None) -> tuple[Number, Number, Number]:
        """a, b and c of each sample."""
        assert draw is not None, "signs have been drawn"
        shift = draw * self.gamma
        return (1 - shift) * self.skip, shift * self.skip, shift + 1

    def sign(self, draw: Tensor | None) -> Number:
        """That of b for each sample."""
        assert draw is not None, "signs have been drawn"
        return draw if self.b > 0 else -draw


def fixed(coupling: Coupling, point: FixedPoint | None) -> Coupling:
    """A coupling as it is computed: in fixed point, or as it is."""
    return coupling if point is None else FixedCoupling.of(coupling, point)


_REMEDY = (
    "Bit-exact streams need |b| = 2^-j with j from 0 to 8, the number of bits that are kept per "
    "element and block: Coupling.re2tal() has b = 1, Coupling.consistent(0.25) costs two bits."
)


class _Advance(torch.autograd.Function):
    """One step, with the gradients of the coupling without rounding."""

    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        previous: Tensor,
        branch: Tensor,
        draw: Tensor | None,
        coupling: FixedCoupling,
        gauge: Gauge,
        where: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.weights, ctx.branch = coupling.weights(draw), branch.dtype
        change, largest = coupling.change(current, branch, draw)
        carried = CARRIED[current.dtype]
        states = (current.view(carried), previous.view(carried))
        following, lost = coupling.kernels.combine(
            change, states[1], coupling.shift, coupling.sign(draw)
        )
        gauge.note(following, states, largest, coupling, where)
        ctx.mark_non_differentiable(lost)
        return following.view(current.dtype), lost

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return (*straight(grad, ctx.weights, ctx.branch), None, None, None, None)


def straight(
    grad: Tensor, weights: tuple[Number, Number, Number], branch: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of current, previous and branch, as if nothing had been rounded."""

    def times(weight: Number) -> Tensor | None:
        if isinstance(weight, Tensor):
            return grad * weight
        return None if weight == 0 else grad if weight == 1 else grad * weight

    a, b, c = map(times, weights)
    return a, b, c if c is None else c.to(branch)


# The operators of graphs. torch.library is not typed.

_library: Any = torch.library.Library("re2fx_exact", "DEF")  # type: ignore[no-untyped-call]
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define("encode(Tensor value, int fraction, int width) -> Tensor", tags=_tags)
_library.define("decode(Tensor state, int fraction, int width) -> Tensor", tags=_tags)
_library.define(
    "step(Tensor current, Tensor previous, Tensor branch, Tensor? draw, float a, float b, float c, "
    "int fraction, int width, str where) -> Tensor",
    tags=_tags,
)


def _given(fraction: int, width: int) -> FixedPoint:
    return FixedPoint(None if fraction < 0 else fraction, width or None)


@torch.library.impl(_library, "encode", "CompositeExplicitAutograd")
def _encode(value: Tensor, fraction: int, width: int) -> Tensor:
    point = _given(fraction, width)
    carrier = _carrier(value, width)
    value = value.to(carrier) * 2.0 ** point.places(carrier)
    if value.numel():
        check(float(value.abs().amax()), point, carrier, "the chain's input")
    return value.round().to(CARRIED[carrier]).view(carrier)


@torch.library.impl(_library, "decode", "CompositeExplicitAutograd")
def _decode(state: Tensor, fraction: int, width: int) -> Tensor:
    unit = 2.0 ** -_given(fraction, width).places(state.dtype)
    return state.view(CARRIED[state.dtype]).to(state.dtype) * unit


@torch.library.impl(_library, "step", "CompositeExplicitAutograd")
def _step(current: Tensor, previous: Tensor, branch: Tensor, draw: Any, *others: Any) -> Tensor:
    coupling = FixedCoupling.read((current, previous, branch, draw, *others))
    change, largest = coupling.change(current, branch, draw)
    following = change
    if coupling.b != 0:
        whole = previous.view(CARRIED[current.dtype]) >> coupling.shift
        following = change + signed(whole, coupling.sign(draw))
    if not is_fake(following):
        check(float(largest), coupling.point, current.dtype, coupling.where)
        check(float(size(following, current.dtype)), coupling.point, current.dtype, coupling.where)
    return following.view(current.dtype)


def _coupling(
    drawn: bool, a: float, b: float, c: float, point: FixedPoint, where: str
) -> FixedCoupling:
    """Of the numbers that the operator of a step has; a drawn one has its skip, gamma and 1."""
    if drawn:
        return FixedDrawn(a, a * b, c, 1, point, where, gamma=b, skip=a)
    return FixedCoupling(a, b, c, 1, point, where)


def _carrier(value: Tensor, width: int) -> torch.dtype:
    wide = width == 64 or (width == 0 and value.dtype == torch.float64)
    return torch.float64 if wide else torch.float32


def _step_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    coupling = FixedCoupling.read(inputs)
    ctx.branch, ctx.weights = inputs[2].dtype, coupling.weights(inputs[3])


def _step_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*straight(grad, ctx.weights, ctx.branch), *(None,) * 7)


def _encode_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


torch.library.register_fake(
    "re2fx_exact::encode",
    lambda value, fraction, width: torch.empty_like(value, dtype=_carrier(value, width)),
    lib=_library,
)
torch.library.register_fake(
    "re2fx_exact::decode", lambda state, fraction, width: torch.empty_like(state), lib=_library
)
torch.library.register_fake(
    "re2fx_exact::step", lambda current, *others: torch.empty_like(current), lib=_library
)
torch.library.register_autograd(
    "re2fx_exact::encode",
    lambda ctx, grad: (grad.to(ctx.dtype), None, None),
    setup_context=_encode_context,
    lib=_library,
)
torch.library.register_autograd(
    "re2fx_exact::decode", lambda ctx, grad: (grad, None, None), lib=_library
)
torch.library.register_autograd(
    "re2fx_exact::step", _step_backward, setup_context=_step_context, lib=_library
)


def decompose_decode(state: Tensor, fraction: int, width: int) -> Tensor:
    """`DECODE` for a compiler that fuses it with what reads it."""
    return _decode(state, fraction, width)


ENCODE = torch.ops.re2fx_exact.encode.default
DECODE = torch.ops.re2fx_exact.decode.default
STEP = torch.ops.re2fx_exact.step.default
