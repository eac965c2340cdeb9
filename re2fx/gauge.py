"""The range of the streams in fixed point, watched while a chain runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .fixed_point import FixedPoint, check, immediate, is_fake, size

if TYPE_CHECKING:
    from .exact import FixedCoupling


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
