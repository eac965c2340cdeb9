"""The features of VSGN: a pyramid of cross-scale graph layers, down and up again (sec. 3.3).

Zhao, Thabet and Ghanem, *Video Self-Stitching Graph Network for Temporal Action Localization*, ICCV
2021. Every cell has edges to the cells with the features nearest to its own: *free* edges to any
others of the sequence, *cross-scale* edges to those of the other scale. That is the magnified copy
for cells of the clip and the clip for those of the copy if the video is stitched; else the other
scale is an upsampled copy of the level's own features.

Simplified or changed:

- A layer is a residual, ``x = x + f(x)``, with a norm in front, so that it trains at any depth and
  can be rewired. The paper adds up both branches and ends with a ReLU.
- The edges of a level are found once, from what enters it before its norm, and not anew for each
  layer. They are an input of its layers and nothing that a layer makes: recomputing a layer from
  reconstructed features cannot change an edge.
- Norms are over the channels of a cell, not over time: padding cannot change them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .layers import (
    ChannelNorm,
    ConvNormReLU,
    MaskedConv,
    centres,
    halved,
    masked,
    sample,
    valid_length,
)


def nearest(cells: Tensor, others: Tensor, allowed: Tensor, count: int) -> Tensor:
    """For each cell the others with the features nearest to its own.

    Args:
        cells: features ``(B, C, T)``.
        others: features ``(B, C, S)``.
        allowed: ``(B, T, S)``, bool.
        count: how many.

    Returns:
        ``(B, T, min(count, S))`` int64, nearest first; -1 where no more are allowed.
    """
    points = cells.detach().transpose(1, 2), others.detach().transpose(1, 2)
    # Through a matrix product near ties would depend on the padding.
    distance = torch.cdist(*points, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance.masked_fill(~allowed, math.inf)
    order = distance.argsort(dim=-1, stable=True)[..., :count]
    return order.masked_fill(distance.gather(-1, order).isinf(), -1)


class Edges(nn.Module):
    """The neighbours of every cell, a half of them over free and a half over cross-scale edges.

    Args:
        neighbours: how many, even.

    Raises:
        ValueError: it is odd.
    """

    def __init__(self, neighbours: int) -> None:
        super().__init__()
        if neighbours % 2 or neighbours < 2:
            raise ValueError(f"neighbours must be even and at least 2, not {neighbours}")
        self.count = neighbours // 2

    def forward(self, x: Tensor, mask: Tensor, magnified: Tensor | None) -> Tensor:
        """Indices among the cells, followed by the upsampled ones if the video is not stitched.

        Args:
            x: ``(B, C, T)``.
            mask: ``(B, T)``.
            magnified: ``(B, T)``, the magnified cells of a stitched video.

        Returns:
            ``(B, T, neighbours)`` int64, less at sizes below that; a cell that lacks neighbours has
            itself instead.
        """
        own = (centres(mask) - 0.5).long().unsqueeze(2)
        valid = mask.unsqueeze(1)
        free = nearest(x, x, valid & (own != own.transpose(1, 2)), self.count)
        if magnified is None:
            upsampled = valid.repeat_interleave(2, 2).expand(-1, x.shape[2], -1)
            cross = nearest(x, upsample(x, mask), upsampled, self.count)
            cross = torch.where(cross < 0, cross, cross + x.shape[2])
        else:
            other = magnified.unsqueeze(2) != magnified.unsqueeze(1)
            cross = nearest(x, x, valid & other, self.count)
        edges = torch.cat([free, cross], 2)
        return torch.where(edges < 0, own, edges)


def upsample(x: Tensor, mask: Tensor) -> Tensor:
    """``(B, C, T)`` to ``(B, C, 2 T)``, interpolated; the mask ``(B, T)`` has no gap."""
    wide = mask.repeat_interleave(2, 1)
    return sample(x, centres(wide) / 2, valid_length(mask).clamp(min=1))


class CrossScaleLayer(nn.Module):
    """The hybrid of a temporal and a graph branch, xGN (sec. 3.3).

    The graph branch is an edge convolution (Wang et al., TOG 2019) with one layer and a maximum
    over the edges. Of a linear map of both ends of an edge, the part of a cell's own end can be
    added behind the maximum, and the other's computed once per cell instead of per edge.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.temporal = MaskedConv(width, width)
        self.own = nn.Conv1d(width, width, 1)
        self.other = nn.Conv1d(width, width, 1, bias=False)
        self.output = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, mask: Tensor, edges: Tensor, stitched: bool) -> Tensor:
        """One residual.

        Args:
            x: ``(B, C, T)``.
            mask: ``(B, T)``.
            edges: of `Edges`.
            stitched: whether they stay among the cells.
        """
        return x + self.branch(self.norm(x), mask, edges, stitched)

    def branch(self, x: Tensor, mask: Tensor, edges: Tensor, stitched: bool) -> Tensor:
        """What the layer adds."""
        hybrid = self.temporal(x, mask) + self.graph(x, mask, edges, stitched)
        return self.output(hybrid.relu())

    def graph(self, x: Tensor, mask: Tensor, edges: Tensor, stitched: bool) -> Tensor:
        """The edge convolution before its ReLU."""
        ends = self.other(x)
        if not stitched:
            ends = torch.cat([ends, upsample(ends, mask)], 2)
        index = edges.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
        reached = ends.gather(2, index).unflatten(2, (x.shape[2], -1))
        return self.own(x) + reached.amax(-1)


class CrossScalePyramid(nn.Module):
    """Encoder of graph layers on grids of 1, 2, 4, ... cells, and a decoder back (xGPN, sec. 3.3).

    Args:
        channels: of the input.
        width: of the features.
        levels: how many grids.
        depth: graph layers per level.
        neighbours: edges per cell, even.
        stitched: whether videos are stitched.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        levels: int = 5,
        depth: int = 2,
        neighbours: int = 8,
        stitched: bool = False,
    ) -> None:
        super().__init__()
        self.stitched = stitched
        self.stem = MaskedConv(channels, width)
        self.down = nn.ModuleList(MaskedConv(width, width, stride=2) for _ in range(levels - 1))
        self.norms = nn.ModuleList(ChannelNorm(width) for _ in range(levels))
        self.edges = Edges(neighbours)
        self.encoder = nn.ModuleList(
            nn.ModuleList(CrossScaleLayer(width) for _ in range(depth)) for _ in range(levels)
        )
        self.up = nn.ModuleList(ConvNormReLU(width, width) for _ in range(levels))

    def forward(
        self, x: Tensor, mask: Tensor, magnified: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Decoded features and masks of the levels.

        Args:
            x: ``(B, channels, T)``, T a multiple of ``2**(levels - 1)``.
            mask: ``(B, T)``.
            magnified: ``(B, T)``, the magnified cells of stitched videos.

        Returns:
            per level ``(B, width, T / 2**level)`` and ``(B, T / 2**level)``.
        """
        skips, masks = self.encode(self.stem(x, mask), mask, magnified)
        return self.decode(skips, masks), masks

    def encode(
        self, x: Tensor, mask: Tensor, magnified: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What each level's layers made, and its mask."""
        skips: list[Tensor] = []
        masks: list[Tensor] = []
        for level, (layers, norm) in enumerate(zip(self.encoder, self.norms, strict=True)):
            if level:
                x = self.down[level - 1](x, mask)
                mask = halved(mask)
                magnified = None if magnified is None else halved(magnified)
            edges = self.edges(x, mask, magnified)
            x = norm(x).relu()
            for layer in layers:  # type: ignore[attr-defined]
                x = layer(x, mask, edges, self.stitched)
            skips.append(x)
            masks.append(mask)
        return skips, masks

    def decode(self, skips: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
        """From the coarsest level to the finest; each cell's features go to both of its halves."""
        x = self.up[-1](skips[-1], masks[-1])
        decoded = [x]
        for level in reversed(range(len(skips) - 1)):
            x = masked(x, masks[level + 1]).repeat_interleave(2, 2)
            x = self.up[level](x + skips[level], masks[level])
            decoded.append(x)
        return decoded[::-1]
