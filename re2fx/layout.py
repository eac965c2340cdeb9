"""Memory layout of the streams: shape-only links and how to undo them, strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Function = Callable[..., Any]


@dataclass(frozen=True)
class Relayout:
    """Shape-only operations between two blocks.

    Attributes:
        operations: per operation what undoes it (``"permute"``, ``"reshape"``, ``"copy"`` or a
            function ``(root, stream)``), the function ``(root, stream, *sides)``, and how many
            sides it takes.
    """

    operations: tuple[tuple[str | Function, Function, int], ...]

    def undo(self, root: Any, shapes: Sequence[torch.Size], stream: torch.Tensor) -> torch.Tensor:
        """The stream before the operations, from the shapes it had before each of them."""
        for (kind, function, _), shape in zip(
            reversed(self.operations), reversed(shapes), strict=True
        ):
            if not isinstance(kind, str):
                stream = kind(root, stream)
            elif kind == "permute":
                # Dimensions of distinct sizes show where each one went.
                probe = torch.empty(tuple(range(1, len(shape) + 1)), device="meta")
                order = [size - 1 for size in function(root, probe).shape]
                stream = stream.permute([order.index(d) for d in range(len(shape))])
            elif kind == "reshape":
                stream = stream.reshape(shape)
        return stream


def restrided(stream: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A reconstructed state in the layout it had: layouts choose kernels, and what they save.

    A state that repeats memory (stride 0) cannot be laid out again and stays as it is.
    """
    if stream.stride() == strides or 0 in strides:
        return stream
    like = torch.empty_strided(stream.shape, strides, dtype=stream.dtype, device=stream.device)
    return like.copy_(stream)
