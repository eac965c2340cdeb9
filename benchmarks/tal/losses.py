"""Losses of localizers: focal, and overlap losses of segments on the time axis.

The overlap losses take segments as ``(start, end)``, or as the distances ``(left, right)`` from a
point inside to both ends. Both of those of a prediction and of its target are about the same point.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Below any length that matters: two empty segments have no overlap rather than 0/0.
TINY = 1e-8


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """``-alpha_t (1 - p_t)^gamma log(p_t)`` per element (Lin et al., ICCV 2017, eq. 5).

    Args:
        logits: any shape, before the sigmoid.
        targets: of that shape, 0 or 1.
        alpha: weight of the ones; the zeros have ``1 - alpha``.
        gamma: how much less what is right already counts.

    Returns:
        the loss of every element.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p = logits.sigmoid()
    wrong = p * (1 - targets) + (1 - p) * targets  # 1 - p_t
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * wrong**gamma * entropy


def giou_loss(segments: Tensor, targets: Tensor) -> Tensor:
    """``1 - IoU + (hull - union) / hull`` of segments (Rezatofighi et al., CVPR 2019, in 1-d).

    Args:
        segments: ``(..., 2)``, start and end; one that ends before it starts overlaps nothing.
        targets: ``(..., 2)``.

    Returns:
        ``(...)``, from 0 to 2.
    """
    shared, union = _overlap(segments, targets)
    hull = _hull(segments, targets)
    return 1 - _ratio(shared, union) + _ratio(hull - union, hull)


def diou_loss(segments: Tensor, targets: Tensor) -> Tensor:
    """``1 - IoU + (distance of the centres / hull)^2`` (Zheng et al., AAAI 2020, eq. 6, in 1-d).

    Args:
        segments: ``(..., 2)``, start and end.
        targets: ``(..., 2)``.

    Returns:
        ``(...)``, from 0 to 2.
    """
    shared, union = _overlap(segments, targets)
    apart = (segments - targets).mean(-1)
    return 1 - _ratio(shared, union) + _ratio(apart, _hull(segments, targets)) ** 2


def giou_offset_loss(offsets: Tensor, targets: Tensor) -> Tensor:
    """`giou_loss` of segments ``(..., 2)`` as distances (left, right) from points inside.

    They share their point, so that it is ``1 - IoU``.
    """
    return giou_loss(_from_offsets(offsets), _from_offsets(targets))


def diou_offset_loss(offsets: Tensor, targets: Tensor) -> Tensor:
    """`diou_loss` of segments ``(..., 2)`` as distances (left, right) from points inside."""
    return diou_loss(_from_offsets(offsets), _from_offsets(targets))


def tiou(segments: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of each segment ``(n, 2)`` with each other ``(m, 2)``: ``(n, m)``."""
    return _ratio(*_overlap(segments[:, None], others[None]))


def balanced_loss(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy in which the ones together count as much as the zeros together.

    That of the boundary scores of BSN (Lin et al., ECCV 2018, sec. 3.4).

    Args:
        logits: any shape, before the sigmoid.
        targets: of that shape, 0 or 1.
        mask: of that shape, bool; the other elements do not count.

    Returns:
        a scalar; kinds without any element add nothing.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    ones = (targets > 0.5) & mask
    zeros = (targets <= 0.5) & mask
    return (_mean(entropy, ones) + _mean(entropy, zeros)) / 2


def _mean(values: Tensor, selected: Tensor) -> Tensor:
    return values[selected].sum() / selected.sum().clamp(min=1)


def _from_offsets(offsets: Tensor) -> Tensor:
    return torch.stack([-offsets[..., 0], offsets[..., 1]], -1)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of the intersection and of the union."""
    start, end = torch.maximum(a[..., 0], b[..., 0]), torch.minimum(a[..., 1], b[..., 1])
    shared = (end - start).clamp(min=0)
    return shared, _length(a) + _length(b) - shared


def _length(segments: Tensor) -> Tensor:
    return (segments[..., 1] - segments[..., 0]).clamp(min=0)


def _hull(a: Tensor, b: Tensor) -> Tensor:
    """Length of the shortest segment around both."""
    return torch.maximum(a[..., 1], b[..., 1]) - torch.minimum(a[..., 0], b[..., 0])


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp(min=TINY)
