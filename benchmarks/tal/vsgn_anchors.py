"""The anchors of VSGN, which of them learn which action, and where actions start and end.

VSGN (ICCV 2021), sec. 3.4; the labels of starts and ends are those of BSN (ECCV 2018), sec. 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layers import centres
from .localizer import widened
from .losses import tiou

# Predicted lengths are at most e^4, 55 times their anchor's: more would only overflow.
LONGEST = 4.0


def anchors_of(masks: Sequence[Tensor], sizes: Sequence[float]) -> Tensor:
    """Segments about the centre of every cell, level by level.

    Args:
        masks: of the levels, ``(B, T / 2**level)``.
        sizes: lengths of a cell's anchors, in widths of the level's cell.

    Returns:
        ``(B, N, 2)`` in cells, the anchors of a cell side by side.
    """
    return torch.cat([_anchors(mask, 2**level, sizes) for level, mask in enumerate(masks)], 1)


def _anchors(mask: Tensor, stride: int, sizes: Sequence[float]) -> Tensor:
    middle = centres(mask, stride)
    half = [size * stride / 2 for size in sizes]
    each = [torch.stack([middle - h, middle + h], -1) for h in half]
    return torch.stack(each, 2).flatten(1, 2)


def encode(anchors: Tensor, segments: Tensor) -> Tensor:
    """Segments ``(..., 2)`` as shifts of their anchors' centres, and logarithms of the growth."""
    length = anchors[..., 1] - anchors[..., 0]
    shift = (segments - anchors).mean(-1) / length
    growth = ((segments[..., 1] - segments[..., 0]) / length).log()
    return torch.stack([shift, growth], -1)


def decode(anchors: Tensor, deltas: Tensor) -> Tensor:
    """The inverse of `encode`."""
    length = anchors[..., 1] - anchors[..., 0]
    middle = anchors.mean(-1) + deltas[..., 0] * length
    half = length * deltas[..., 1].clamp(max=LONGEST).exp() / 2
    return torch.stack([middle - half, middle + half], -1)


def match(anchors: Tensor, valid: Tensor, segments: Tensor, threshold: float) -> Tensor:
    """Which action every anchor learns.

    That with which it overlaps most, if by ``threshold`` at least. The anchor that an action
    overlaps most learns it in any case, so that none is lost; a shorter action goes first.

    Args:
        anchors: ``(N, 2)``.
        valid: ``(N,)``, bool; the others learn nothing.
        segments: ``(n, 2)``; one shorter than a cell counts as one cell long.
        threshold: tIoU.

    Returns:
        ``(N,)`` int64, -1 for none.
    """
    if not len(segments):
        return torch.full_like(valid, -1, dtype=torch.int64)
    segments = widened(segments)
    overlap = tiou(anchors, segments).masked_fill(~valid.unsqueeze(1), -1.0)
    most, index = overlap.max(1)
    index = index.masked_fill(most < threshold, -1)
    longest_first = (segments[:, 1] - segments[:, 0]).argsort(descending=True)
    closest, found = overlap.argmax(0).tolist(), (overlap.amax(0) > 0).tolist()
    for action in longest_first.tolist():
        if found[action]:
            index[closest[action]] = action
    return index


def boundary_targets(cells: Tensor, segments: Tensor) -> Tensor:
    """Which cells are at a start, at an end or in an action.

    Args:
        cells: ``(T,)``, the centres of the cells.
        segments: ``(n, 2)``. About either end of one, a tenth of its length to both sides counts,
            but half a cell at least.

    Returns:
        ``(3, T)``, 0 or 1: start, end, action.
    """
    if not len(segments):
        return cells.new_zeros(3, len(cells))
    start, end = widened(segments).unsqueeze(-1).unbind(1)
    around = ((end - start) / 10).clamp(min=0.5)
    starts = (cells - start).abs() <= around
    ends = (cells - end).abs() <= around
    inside = (start <= cells) & (cells <= end)
    return torch.stack([starts.any(0), ends.any(0), inside.any(0)]).to(cells)
