"""Tensors that a chain call keeps for its backward: detached, and not to be changed meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import ReplayError


@dataclass(frozen=True)
class Held:
    """A tensor as a frame keeps it."""

    tensor: torch.Tensor
    needs_grad: bool
    version: int

    @classmethod
    def of(cls, value: Any) -> Any:
        """Wrap tensors, pass everything else."""
        if not isinstance(value, torch.Tensor):
            return value
        return cls(value.detach(), value.requires_grad, value._version)

    @property
    def changed(self) -> bool:
        """Whether somebody wrote to it since."""
        return self.tensor._version != self.version


@dataclass(frozen=True)
class Anchor:
    """A true pair of states ``(p_i, p_{i-1})``, kept because rounding would have grown too far."""

    current: Held
    previous: Held

    @classmethod
    def of(cls, current: torch.Tensor, previous: torch.Tensor) -> Anchor:
        """Keep a pair."""
        return cls(Held.of(current), Held.of(previous))

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The two states.

        Args:
            name: of the block that reads the newer one, for the message.

        Raises:
            ReplayError: one of them was changed in place since.
        """
        return state_of(self.current, name), state_of(self.previous, name)


def state_of(held: Held, name: str) -> torch.Tensor:
    """A stream state that is kept.

    Args:
        held: as it was kept.
        name: of the block, for the message.

    Raises:
        ReplayError: it was changed in place since.
    """
    if held.changed:
        raise ReplayError(
            f"{name}: a stream state of {tuple(held.tensor.shape)} that is kept here as "
            "an anchor was changed in place between the forward and the backward. Do not "
            "write to it (copy it first), or use memory='store'."
        )
    return held.tensor


def remember(sides: Sequence[Any]) -> list[Any]:
    """Side inputs, tensors in any nesting of containers wrapped."""
    return [pytree.tree_map(Held.of, side) for side in sides]


def tensors_of(sides: list[Any]) -> Iterator[torch.Tensor]:
    """The tensors among remembered side inputs."""
    for side in pytree.tree_leaves(sides):
        if isinstance(side, Held):
            yield side.tensor


def recall(sides: list[Any], name: str) -> list[Any]:
    """Side inputs for a rerun.

    Args:
        sides: what `remember` gave.
        name: of the block, for the message.

    Raises:
        ReplayError: one of them was changed in place since.
    """

    def value(side: Any) -> Any:
        if not isinstance(side, Held):
            return side
        if side.changed:
            raise ReplayError(
                f"{name}: a side input of {tuple(side.tensor.shape)} was changed in place between "
                "the forward and the backward, so the branch cannot be run again"
            )
        return side.tensor.detach().requires_grad_(side.needs_grad)

    return [pytree.tree_map(value, side) for side in sides]
