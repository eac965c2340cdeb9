"""What a localizer takes and gives: features of a video's cells in, segments of actions out.

The unit of time is the **cell**, one position of the features: cell ``i`` spans ``[i, i + 1)`` and
has its centre at ``i + 0.5``. A segment is ``(start, end)`` in cells, as floating-point numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

P = TypeVar("P")

# The least length of an action to be learned, in cells: a shorter one might hold no cell's centre.
SHORTEST = 1.0


@dataclass(frozen=True)
class Targets:
    """The actions of a batch of videos.

    Attributes:
        segments: per video ``(n, 2)``, floating point, start and end in cells.
        labels: per video ``(n,)``, int64, from 0.
    """

    segments: list[Tensor]
    labels: list[Tensor]


@dataclass(frozen=True)
class Found:
    """What was detected in a video, best first.

    Attributes:
        segments: ``(n, 2)``, start and end in cells.
        scores: ``(n,)``, from 0 to 1.
        labels: ``(n,)``, int64.
    """

    segments: Tensor
    scores: Tensor
    labels: Tensor


class Localizer(nn.Module, ABC, Generic[P]):
    """Features to predictions, predictions to losses or to detections."""

    @abstractmethod
    def forward(self, features: Tensor, mask: Tensor) -> P:
        """Predict.

        Args:
            features: ``(B, C, T)``, floating point. What is outside the mask is not read.
            mask: ``(B, T)``, bool, the valid cells; at least one per video.
        """

    @abstractmethod
    def losses(self, predictions: P, targets: Targets) -> dict[str, Tensor]:
        """Scalars by name, with ``"total"``, the one to minimise."""

    @abstractmethod
    def detections(self, predictions: P, most: int = 200) -> list[Found]:
        """Per video the segments with the highest scores, before any suppression.

        Args:
            predictions: of `forward`.
            most: the most segments per video.

        Returns:
            segments sorted by score, clipped to the valid cells' extent, none of them empty.
        """


def widened(segments: Tensor, least: float = SHORTEST) -> Tensor:
    """Segments ``(n, 2)``, those shorter than ``least`` cells widened to it about their centres."""
    middle = segments.mean(1, keepdim=True)
    half = ((segments[:, 1:] - segments[:, :1]) / 2).clamp(min=least / 2)
    return torch.cat([middle - half, middle + half], 1)


def best(
    segments: Tensor, scores: Tensor, length: float, most: int, threshold: float = 0.0
) -> Found:
    """The pairs of a segment and a class with the highest scores.

    Args:
        segments: ``(n, 2)`` in cells.
        scores: ``(n, classes)``.
        length: to how many cells the segments are clipped; what is empty then is left out.
        most: how many pairs at the most.
        threshold: scores must be above it.
    """
    segments = segments.clamp(0, length)
    there = segments[:, 1] > segments[:, 0]
    segments, scores = segments[there], scores[there]
    flat = scores.flatten()
    order = flat.argsort(descending=True, stable=True)[:most]
    order = order[flat[order] > threshold]
    classes = scores.shape[1]
    rows = order.div(classes, rounding_mode="floor")
    return Found(segments[rows], flat[order], order % classes)


def merged(parts: list[Found], most: int) -> Found:
    """Detections of one video from several places, best first."""
    segments = torch.cat([part.segments for part in parts])
    scores = torch.cat([part.scores for part in parts])
    labels = torch.cat([part.labels for part in parts])
    order = scores.argsort(descending=True, stable=True)[:most]
    return Found(segments[order], scores[order], labels[order])
