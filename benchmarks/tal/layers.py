"""Layers and positions that know which cells are valid, for tensors ``(B, C, T)``.

A layer that reads neighbours zeroes the invalid ones itself, so that no layer needs to care what
the one before left there: a sample has the same result alone and in a padded batch. Nothing
depends on T as a Python number, so that `torch.fx` can trace all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` of shape ``(B, C, T)`` with zeros outside the mask ``(B, T)``."""
    return x.masked_fill(~mask.unsqueeze(1), 0.0)


def padded(x: Tensor, mask: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Both with invalid cells appended, up to a multiple of cells."""
    extra = -x.shape[-1] % multiple
    return F.pad(x, (0, extra)), F.pad(mask, (0, extra), value=False)


def halved(mask: Tensor) -> Tensor:
    """The mask ``(B, T / 2)`` of cells twice as wide; one is valid if a half of it is."""
    return mask.unflatten(1, (-1, 2)).any(-1)


def centres(mask: Tensor, stride: int = 1) -> Tensor:
    """Where the centres of a mask's cells are, ``(B, T)`` in fp32.

    Args:
        mask: ``(B, T)``.
        stride: how wide each of them is, in cells of the features.
    """
    return (torch.ones_like(mask, dtype=torch.float32).cumsum(1) - 0.5) * stride


def valid_length(mask: Tensor) -> Tensor:
    """Up to where there are valid cells, ``(B,)`` in fp32."""
    return ((centres(mask) + 0.5) * mask).amax(1)


def sample(x: Tensor, positions: Tensor, length: Tensor) -> Tensor:
    """Linear interpolation between the centres of cells.

    Args:
        x: ``(B, C, T)``.
        positions: ``(B, M)`` in cells; beyond the outermost valid centres theirs counts.
        length: ``(B,)`` in cells, at least 1.

    Returns:
        ``(B, C, M)``.
    """
    last = (length - 1).unsqueeze(1)
    place = torch.minimum((positions - 0.5).clamp(min=0), last)
    left = place.floor()
    right = torch.minimum(left + 1, last)
    share = (place - left).unsqueeze(1).to(x.dtype)
    return _pick(x, left) * (1 - share) + _pick(x, right) * share


def _pick(x: Tensor, cells: Tensor) -> Tensor:
    return x.gather(2, cells.long().unsqueeze(1).expand(-1, x.shape[1], -1))


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, T)`` to the same shape."""
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class MaskedConv(nn.Module):
    """A convolution that reads zeros where cells are invalid.

    Args:
        inputs: channels.
        outputs: channels.
        kernel: cells, odd.
        stride: the result has ``T / stride`` cells.
        groups: as in `torch.nn.Conv1d`.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``(B, C, T)`` and the mask ``(B, T)`` of these cells to ``(B, outputs, T / stride)``."""
        return self.conv(masked(x, mask))


class ConvNormReLU(nn.Module):
    """A masked convolution of 3 cells, a norm over the channels, a ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = MaskedConv(inputs, outputs)
        self.norm = ChannelNorm(outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``(B, inputs, T)`` to ``(B, outputs, T)``."""
        return self.norm(self.conv(x, mask)).relu()


class ConvHead(nn.Module):
    """Convolutions with norms and ReLUs, and a last one without.

    Args:
        width: channels of all but the last.
        outputs: channels of the last.
        layers: how many convolutions, with the last.
        bias: what the last one's bias starts at.
    """

    def __init__(self, width: int, outputs: int, layers: int, bias: float) -> None:
        super().__init__()
        self.body = nn.ModuleList(ConvNormReLU(width, width) for _ in range(layers - 1))
        self.last = MaskedConv(width, outputs)
        nn.init.constant_(self.last.conv.bias, bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``(B, width, T)`` to ``(B, outputs, T)``."""
        for layer in self.body:
            x = layer(x, mask)
        return self.last(x, mask)
