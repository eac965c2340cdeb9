"""The features of ActionFormer: transformer blocks with local attention, on halving grids.

Zhang, Wu and Li, *ActionFormer: Localizing Moments of Actions with Transformers*, ECCV 2022,
its encoder. Every residual is written as ``x = x + f(x)``, so that it can be rewired. As in the
paper's equations, a level is a block on the grid above and then a strided depthwise convolution:
attention comes before the striding, and no skip has to jump over it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import ChannelNorm, ConvNormReLU, MaskedConv, halved
from .local_attention import LocalAttention


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al., ICCV 2021)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((width, 1), start))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, T)`` to the same shape."""
        return x * self.factor


class Block(nn.Module):
    """Pre-norm attention and MLP, each a scaled residual branch (the paper's encoder)."""

    def __init__(
        self, width: int, heads: int, window: int, ratio: int, dropout: float, scale: float
    ) -> None:
        super().__init__()
        self.attention_norm = ChannelNorm(width)
        self.attention = LocalAttention(width, heads, window)
        self.attention_scale = LayerScale(width, scale)
        self.mlp = nn.Sequential(
            ChannelNorm(width),
            nn.Conv1d(width, ratio * width, 1),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Conv1d(ratio * width, width, 1),
            nn.Dropout(dropout),
            LayerScale(width, scale),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``(B, C, T)`` and ``(B, T)`` to ``(B, C, T)``."""
        x = x + self.attention_scale(self.attention(self.attention_norm(x), mask))
        x = x + self.mlp(x)
        return x


class Pyramid(nn.Module):
    """Features on grids of 1, 2, 4, ... cells.

    Args:
        channels: of the input.
        width: of the features.
        projection: how many convolutions embed the input.
        stem: how many blocks come before the first level's features.
        levels: how many grids.
        heads: of the attention.
        window: of the attention, in cells of each grid.
        ratio: how much wider the MLPs are inside.
        dropout: in the MLPs.
        scale: what the layer scales start at.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        projection: int = 2,
        stem: int = 2,
        levels: int = 5,
        heads: int = 4,
        window: int = 9,
        ratio: int = 4,
        dropout: float = 0.0,
        scale: float = 0.1,
    ) -> None:
        super().__init__()

        def blocks(count: int) -> nn.ModuleList:
            sizes = width, heads, window, ratio, dropout, scale
            return nn.ModuleList(Block(*sizes) for _ in range(count))

        self.projection = nn.ModuleList(
            ConvNormReLU(channels if i == 0 else width, width) for i in range(projection)
        )
        self.stem = blocks(stem)
        self.blocks = blocks(levels - 1)
        self.down = nn.ModuleList(
            MaskedConv(width, width, stride=2, groups=width) for _ in range(levels - 1)
        )
        self.norms = nn.ModuleList(ChannelNorm(width) for _ in range(levels))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features and masks of the levels.

        Args:
            x: ``(B, channels, T)``, T a multiple of ``2**(levels - 1)``.
            mask: ``(B, T)``.

        Returns:
            per level ``(B, width, T / 2**level)`` and ``(B, T / 2**level)``.
        """
        for layer in self.projection:
            x = layer(x, mask)
        for block in self.stem:
            x = block(x, mask)
        features, masks = [self.norms[0](x)], [mask]
        for block, down, norm in zip(self.blocks, self.down, self.norms[1:], strict=True):
            x = down(block(x, mask), mask)
            mask = halved(mask)
            features.append(norm(x))
            masks.append(mask)
        return features, masks
