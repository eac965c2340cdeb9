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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .bits import pack, unpack
from .coupling import Coupling
from .drawn import Drawn, signs
from .errors import OptionError, RangeError

Function = Callable[..., Any]

WIDTHS = (32, 64)
MOST_BITS = 8
CARRIED = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class FixedPoint:
    """How fine and how wide the numbers of a stream are.

    Attributes:
        fraction: bits behind the point; 16 in 32 bits and 32 in 64 bits by default, which makes
            the largest number 16,384 and about a billion.
        width: bits of a number, 32 or 64; by default 64 for streams in fp64 and 32 for all others.

    Raises:
        OptionError: a value is not possible.
    """

    fraction: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if self.width not in (None, *WIDTHS):
            raise OptionError(f"exact: width={self.width!r}: expected 32 or 64 bits")
        if self.fraction is None:
            return
        most = (self.width or 32) - 4
        if not isinstance(self.fraction, int) or not 0 <= self.fraction <= most:
            raise OptionError(
                f"exact: fraction={self.fraction!r}: expected a whole number of bits from 0 to "
                f"{most}"
            )

    @classmethod
    def of(cls, exact: bool | FixedPoint) -> FixedPoint | None:
        """What the argument ``exact`` says."""
        if isinstance(exact, FixedPoint):
            return exact
        if not isinstance(exact, bool):
            raise OptionError(
                f"exact={exact!r}: expected True, False or a re2fx.FixedPoint(fraction, width)"
            )
        return cls() if exact else None

    def bits(self, carrier: torch.dtype) -> int:
        """Bits behind the point of the numbers that a dtype carries."""
        return self.fraction if self.fraction is not None else carrier.itemsize * 4

    def limit(self, carrier: torch.dtype) -> float:
        """What a number, in units, must stay below: a sum of two then fits."""
        return 2.0 ** (carrier.itemsize * 8 - 2)


# The arithmetic on whole numbers.


Number = float | Tensor  # one for all samples, or one each


def change(
    current: Tensor, branch: Tensor, dtype: torch.dtype, a: Number, c: Number
) -> tuple[Tensor, Tensor]:
    """``round(a p + c f)`` and the largest of its size."""
    value = branch.to(dtype) * c
    if isinstance(a, Tensor) or a != 0:
        value = value + current.to(dtype) * a
    largest = value.abs().amax() if value.numel() else value.new_zeros(())
    return value.round().to(current.dtype), largest


def combine(change: Tensor, previous: Tensor, shift: int, sign: Number) -> tuple[Tensor, Tensor]:
    """The state behind, and the bits of the one before that are lost in it, packed."""
    following = change + signed(previous >> shift if shift else previous, sign)
    return following, pack(previous, shift) if shift else previous.new_empty(0)


def separate(
    following: Tensor, change: Tensor, lost: Tensor | None, shift: int, sign: Number
) -> Tensor:
    """The state before."""
    kept = signed(following - change, sign)
    return kept if lost is None else unpack(kept, lost, shift)


def signed(whole: Tensor, sign: Number) -> Tensor:
    """Whole numbers times 1 or -1."""
    if isinstance(sign, Tensor):
        return whole * sign.to(whole.dtype)
    return whole if sign > 0 else -whole


@dataclass(frozen=True)
class Kernels:
    """The arithmetic, as it is or compiled.

    `change` is one function for both directions, so that both round alike however it is compiled.
    """

    change: Function = change
    combine: Function = combine
    separate: Function = separate

    def compiled(self, wrap: Callable[[Function], Function]) -> Kernels:
        """Each through a compiler."""
        return Kernels(wrap(self.change), wrap(self.combine), wrap(self.separate))


@dataclass(frozen=True)
class FixedCoupling(Coupling):
    """A coupling of states in fixed point.

    Attributes:
        a, b, c: as for `Coupling`; ``|b|`` is a power of two from 2^-8 to 1.
        point: how fine and wide the numbers are.
        where: the residual, for messages.
        kernels: what does the arithmetic.
    """

    point: FixedPoint = FixedPoint()
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
        carried, scale = CARRIED[current.dtype], 2.0 ** self.point.bits(current.dtype)
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


class Gauge:
    """Watches that the numbers of one chain stay in their range.

    On the CPU each block is looked at when it has run: the largest change bounds the states, and
    only if the bound reaches the limit is the state itself measured. Elsewhere that would wait for
    the device once a block, so figures are gathered and looked at where the chain ends.
    """

    def __init__(self) -> None:
        self._reach: tuple[float, float] | None = None
        self._waiting: list[tuple[str, FixedPoint, torch.dtype, Tensor]] = []

    def note(
        self,
        following: Tensor,
        states: tuple[Tensor, Tensor],
        largest: Tensor,
        coupling: FixedCoupling,
        where: str,
    ) -> None:
        """Look at one step.

        Args:
            following: the new state, in whole numbers.
            states: the two before.
            largest: of the sizes of the changes, in units.
            coupling: of the step.
            where: the residual.

        Raises:
            RangeError: a number is too large, or no number.
        """
        dtype = largest.dtype
        if not immediate(following):
            self._waiting.append((where, coupling.point, dtype, largest))
            self._waiting.append((where, coupling.point, dtype, size(following, dtype)))
            return
        if self._reach is None:
            self._reach = (float(size(states[0], dtype)), float(size(states[1], dtype)))
        change = float(largest)
        check(change, coupling.point, dtype, where)
        reach = change + self._reach[1] * abs(coupling.b) + 1
        if not reach < coupling.point.limit(dtype):
            reach = float(size(following, dtype))
            check(reach, coupling.point, dtype, where)
        self._reach = (reach, self._reach[0])

    def settle(self) -> None:
        """Look at what was gathered."""
        waiting, self._waiting = self._waiting, []
        if not waiting or is_fake(waiting[0][3]):
            return
        for (where, point, dtype, _), value in zip(
            waiting, torch.stack([entry[3] for entry in waiting]).tolist(), strict=True
        ):
            check(value, point, dtype, where)


def size(whole: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest absolute value, as a floating-point number."""
    if not whole.numel():
        return torch.zeros((), dtype=dtype, device=whole.device)
    low, high = torch.aminmax(whole)
    return torch.maximum(high.to(dtype), -low.to(dtype))


def check(largest: float, point: FixedPoint, carrier: torch.dtype, where: str) -> None:
    """Refuse numbers that cannot be carried.

    Raises:
        RangeError: names the residual, the value, the range and the remedy.
    """
    limit, unit = point.limit(carrier), 2.0 ** -point.bits(carrier)
    if largest < limit:
        return
    if not math.isfinite(largest):
        raise RangeError(
            f"{where or 'the stream'}: a value that is infinite or not a number cannot be carried "
            "in fixed point. Find out where it comes from; memory='store' with exact=False would "
            "pass it on."
        )
    raise RangeError(
        f"{where or 'the stream'}: a value of {largest * unit:.4g} does not fit into a stream of "
        f"at most {limit * unit:.4g} ({point.bits(carrier)} bits behind the point). Use "
        "exact=re2fx.FixedPoint(fraction=...) with fewer bits, or width=64."
    )


def immediate(tensor: Tensor) -> bool:
    """Whether reading a value off a tensor waits for nothing."""
    return tensor.device.type == "cpu" and not is_fake(tensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no values."""
    return tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)


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
    value = value.to(carrier) * 2.0 ** point.bits(carrier)
    if value.numel():
        check(float(value.abs().amax()), point, carrier, "the chain's input")
    return value.round().to(CARRIED[carrier]).view(carrier)


@torch.library.impl(_library, "decode", "CompositeExplicitAutograd")
def _decode(state: Tensor, fraction: int, width: int) -> Tensor:
    unit = 2.0 ** -_given(fraction, width).bits(state.dtype)
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
