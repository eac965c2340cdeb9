"""Which cells learn which action in ActionFormer, and at what distances (ECCV 2022, training).

A cell of a level learns an action if its centre is in the action and near the action's, and if the
farther of the action's ends is at a distance that the level is there for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .localizer import widened


@dataclass(frozen=True)
class Points:
    """The cells of all levels, N together.

    Attributes:
        centres: ``(N,)`` in cells of the features.
        strides: ``(N,)``, the cells' widths.
        ranges: ``(N, 2)``, the distances to an action's farther end that their level is for.
    """

    centres: Tensor
    strides: Tensor
    ranges: Tensor


def points_of(sizes: Sequence[int], base: float, device: torch.device | None = None) -> Points:
    """The cells of levels with ``sizes`` cells, each twice as wide as those of the level before.

    Args:
        sizes: cells per level.
        base: where the first level's range ends, in cells; each next one ends at twice that.
        device: of the tensors.
    """
    centres, strides, ranges = [], [], []
    for level, size in enumerate(sizes):
        stride = 2**level
        low, high = range_of(level, len(sizes), base)
        centres.append((torch.arange(size, device=device) + 0.5) * stride)
        strides.append(torch.full((size,), float(stride), device=device))
        ranges.append(torch.tensor([low, high], device=device).expand(size, 2))
    return Points(torch.cat(centres), torch.cat(strides), torch.cat(ranges))


def range_of(level: int, levels: int, base: float) -> tuple[float, float]:
    """A level's distances; the levels together cover all that are."""
    low = 0.0 if level == 0 else base * 2.0 ** (level - 1)
    high = math.inf if level == levels - 1 else base * 2.0**level
    return low, high


def assign(points: Points, segments: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """What every cell is to learn about the actions of a video.

    Args:
        points: N cells.
        segments: ``(n, 2)`` in cells. One shorter than a cell counts as one cell long: otherwise
            it might have no centre in it.
        radius: how far from an action's centre a cell may be, in widths of the cell.

    Returns:
        ``(N,)`` int64, the action of each, the shortest of several, -1 for none; and ``(N, 2)``,
        the distances to its start and to its end, in widths of the cell.
    """
    if not len(segments):
        none = torch.full_like(points.centres, -1, dtype=torch.int64)
        return none, torch.zeros_like(points.ranges)
    segments = widened(segments)
    distances = _distances(points, segments)
    fits = _fits(points, segments, distances, radius)
    lengths = (segments[:, 1] - segments[:, 0]).expand(fits.shape)
    shortest, index = lengths.masked_fill(~fits, math.inf).min(1)
    rows = torch.arange(len(index), device=index.device)
    offsets = distances[rows, index] / points.strides.unsqueeze(1)
    return index.masked_fill(shortest.isinf(), -1), offsets


def _distances(points: Points, segments: Tensor) -> Tensor:
    """From each cell's centre to each action's start and end, ``(N, n, 2)``."""
    centres = points.centres.unsqueeze(1)
    return torch.stack([centres - segments[:, 0], segments[:, 1] - centres], -1)


def _fits(points: Points, segments: Tensor, distances: Tensor, radius: float) -> Tensor:
    """Which cell may learn which action, ``(N, n)``."""
    inside = distances.amin(-1) >= 0
    farther = distances.amax(-1)
    low, high = points.ranges[:, :1], points.ranges[:, 1:]
    away = (points.centres.unsqueeze(1) - segments.mean(1)).abs()
    near = away <= radius * points.strides.unsqueeze(1)
    return inside & near & (low <= farther) & (farther < high)


def decode(points: Points, offsets: Tensor) -> Tensor:
    """Segments ``(..., N, 2)`` from distances ``(..., N, 2)`` in widths of the cells."""
    reach = offsets * points.strides.unsqueeze(1)
    return torch.stack([points.centres - reach[..., 0], points.centres + reach[..., 1]], -1)
