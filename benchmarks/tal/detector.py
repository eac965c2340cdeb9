"""Frames to actions: a backbone and a localizer in one network, and its detections in seconds.

A backbone's features are the localizer's cells: one per ``stride`` frames. Targets come in frames
and detections leave in seconds, so the cells are nobody else's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch
from .localizer import Found, Localizer, Targets
from .metrics import Detection
from .suppression import soft_nms


class Detector(nn.Module):
    """A backbone with a localizer on its features.

    Args:
        backbone: frames ``(B, 3, T, H, W)`` to features ``(B, C, T / stride)``; ``nn.Identity()``
            if the features are given instead of frames.
        localizer: on its features.
        stride: frames per feature.
    """

    def __init__(self, backbone: nn.Module, localizer: Localizer[Any], stride: int) -> None:
        super().__init__()
        self.backbone, self.localizer, self.stride = backbone, localizer, stride

    def forward(self, frames: Tensor, lengths: Tensor) -> Any:
        """What the localizer predicts.

        Args:
            frames: ``(B, 3, T, H, W)``, or features ``(B, C, cells)``.
            lengths: ``(B,)``, how many frames are not padding.
        """
        features = self.backbone(frames).float()
        cells = torch.arange(features.shape[-1], device=features.device)
        return self.localizer(features, cells < self.cells(lengths)[:, None])

    def cells(self, frames: Tensor) -> Tensor:
        """In how many cells some frames lie."""
        return torch.div(frames + self.stride - 1, self.stride, rounding_mode="floor")

    def targets(self, batch: Batch) -> Targets:
        """The actions of a batch in cells."""
        segments = [segments / self.stride for segments in batch.segments]
        return Targets(segments, [*batch.labels])

    def losses(self, predictions: Any, batch: Batch) -> dict[str, Tensor]:
        """The localizer's, in float32."""
        with torch.autocast(batch.frames.device.type, enabled=False):
            return self.localizer.losses(predictions, self.targets(batch))


def detector_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The losses of a `Detector`, or of what wraps one."""
    inner: Any = getattr(model, "module", model)
    losses: dict[str, Tensor] = inner.losses(model(batch.frames, batch.lengths), batch)
    return losses


@dataclass(frozen=True)
class Suppression:
    """How detections of one video are thinned out; arguments of `soft_nms`.

    Attributes:
        sigma: of the Gaussian.
        threshold: tIoU from which on scores fall.
        least: scores below are dropped.
        most: detections per video.
    """

    sigma: float = 0.5
    threshold: float = 0.1
    least: float = 1e-3
    most: int = 200


@torch.no_grad()
def detect(
    model: Detector,
    batches: Iterable[Batch],
    labels: Sequence[str],
    suppression: Suppression | None = None,
) -> list[Detection]:
    """The actions in some videos.

    Windows of one video may overlap: what they find is put together before it is thinned out.

    Args:
        model: put into eval mode for the time.
        batches: videos whole or in windows; broken ones have no detections.
        labels: the names of the classes.
        suppression: how to thin out.
    """
    found: dict[str, list[Found]] = {}
    training, device = model.training, next(model.localizer.parameters()).device
    model.eval()
    for batch in batches:
        if len(batch):
            given = batch.to(device)
            predictions = model(given.frames, given.lengths)
            parts = model.localizer.detections(predictions)
            places = zip(batch.videos, batch.offsets, batch.steps, parts, strict=True)
            for video, offset, step, part in places:
                found.setdefault(video, []).append(_seconds(part, offset, step * model.stride))
    model.train(training)
    kind = suppression or Suppression()
    return [d for video, parts in found.items() for d in _thinned(video, parts, labels, kind)]


def _seconds(found: Found, offset: float, cell: float) -> Found:
    return Found(found.segments.cpu() * cell + offset, found.scores.cpu(), found.labels.cpu())


def _thinned(
    video: str, parts: Sequence[Found], labels: Sequence[str], kind: Suppression
) -> list[Detection]:
    segments, scores, classes = soft_nms(
        torch.cat([part.segments for part in parts]).numpy(),
        torch.cat([part.scores for part in parts]).numpy(),
        torch.cat([part.labels for part in parts]).numpy(),
        sigma=kind.sigma, threshold=kind.threshold, least=kind.least, most=kind.most,
    )  # fmt: skip
    rows = zip(segments.tolist(), scores.tolist(), classes.tolist(), strict=True)
    return [Detection(video, labels[c], start, end, score) for (start, end), score, c in rows]
