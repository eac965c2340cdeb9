"""Numbers in fixed point: how fine and wide they are, the arithmetic of a step, and its range."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .bits import pack, unpack
from .errors import OptionError, RangeError

Function = Callable[..., Any]

WIDTHS = (32, 64)
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

    def places(self, carrier: torch.dtype) -> int:
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
        made = (PerKind(kernel, wrap) for kernel in (self.change, self.combine, self.separate))
        return Kernels(*made)


class PerKind:
    """A kernel compiled by itself for every dtype and every number that it is called with.

    Dynamo counts what it compiles by code object and gives up on one that it has compiled eight
    times, and all networks of a process and all couplings on a schedule's way share the kernels.
    """

    def __init__(self, kernel: Function, wrap: Callable[[Function], Function]) -> None:
        self._kernel, self._wrap = kernel, wrap
        self._made: dict[tuple[Any, ...], Function] = {}

    def __call__(self, *args: Any) -> Any:
        """Run the kernel."""
        kind = tuple((a.dtype, a.dim()) if isinstance(a, Tensor) else a for a in args)
        if kind not in self._made:
            code = self._kernel.__code__.replace()
            self._made[kind] = self._wrap(FunctionType(code, self._kernel.__globals__))
        return self._made[kind](*args)


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
    limit, unit = point.limit(carrier), 2.0 ** -point.places(carrier)
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
        f"at most {limit * unit:.4g} ({point.places(carrier)} bits behind the point). Use "
        "exact=re2fx.FixedPoint(fraction=...) with fewer bits, or width=64."
    )


def immediate(tensor: Tensor) -> bool:
    """Whether reading a value off a tensor waits for nothing."""
    return tensor.device.type == "cpu" and not is_fake(tensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no values."""
    return tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)
