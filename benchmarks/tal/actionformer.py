"""ActionFormer: every cell of a feature pyramid is classified and regresses an action's ends.

Zhang, Wu and Li, *ActionFormer: Localizing Moments of Actions with Transformers*, ECCV 2022. The
paper's encoder is in `actionformer_pyramid`, which cell learns what in `actionformer_targets`, its
decoder, the loss and the inference here.

Simplified: no position embedding, no stochastic depth, no label smoothing; the layer scales start
at 0.1 as CaiT's do in shallow networks; actions shorter than a cell are learned as a cell long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .actionformer_pyramid import Pyramid
from .actionformer_targets import Points, assign, decode, points_of
from .layers import ConvHead, padded, valid_length
from .localizer import Found, Localizer, Targets, best, merged
from .losses import diou_offset_loss, focal_loss


@dataclass(frozen=True)
class ActionFormerConfig:
    """Sizes and constants.

    Attributes:
        channels: of the features.
        classes: how many kinds of actions.
        width: channels inside.
        projection: convolutions that embed the features.
        stem: transformer blocks before the pyramid.
        levels: of the pyramid, on grids of 1, 2, 4, ... cells.
        heads: of the attention.
        window: of the attention, in cells of each level; odd.
        ratio: how much wider the MLPs are inside.
        dropout: in the MLPs.
        layer_scale: what the factors of the residual branches start at.
        head_layers: convolutions per head.
        distance: how the regression head's outputs become distances.
        radius: of centre sampling, in widths of a level's cell.
        base_range: up to what distance to an action's farther end the first level is for, in cells.
        prior: the probability that every class starts with.
        regression_weight: of the regression loss.
        normaliser: what the running number of positive cells starts at.
        momentum: of that number.
        threshold: scores up to it are dropped.
        per_level: the most detections per level.
    """

    channels: int
    classes: int
    width: int = 64
    projection: int = 2
    stem: int = 2
    levels: int = 5
    heads: int = 4
    window: int = 9
    ratio: int = 4
    dropout: float = 0.0
    layer_scale: float = 0.1
    head_layers: int = 3
    distance: Literal["relu", "exp"] = "relu"
    radius: float = 1.5
    base_range: float = 4.0
    prior: float = 0.01
    regression_weight: float = 1.0
    normaliser: float = 100.0
    momentum: float = 0.9
    threshold: float = 0.001
    per_level: int = 500


@dataclass(frozen=True)
class ActionFormerPredictions:
    """What the heads say about every cell, per level.

    Attributes:
        logits: ``(B, classes, T / 2**level)``, before the sigmoid.
        offsets: ``(B, 2, T / 2**level)``, distances to start and end, in widths of a level's cell.
        masks: ``(B, T / 2**level)``, the valid cells.
        length: ``(B,)``, up to where there are valid cells.
    """

    logits: list[Tensor]
    offsets: list[Tensor]
    masks: list[Tensor]
    length: Tensor


class Distances(nn.Module):
    """The regression head, shared by the levels but for a factor each (the paper's decoder)."""

    def __init__(self, config: ActionFormerConfig) -> None:
        super().__init__()
        self.exponential = config.distance == "exp"
        # Both start at about one cell to either side; ReLUs that start at zero may never move.
        bias = 0.0 if self.exponential else 1.0
        self.head = ConvHead(config.width, 2, config.head_layers, bias)
        self.scales = nn.Parameter(torch.ones(config.levels))

    def forward(self, x: Tensor, mask: Tensor, level: int) -> Tensor:
        """``(B, width, T)`` to ``(B, 2, T)``, not negative."""
        scaled = self.head(x, mask) * self.scales[level]
        return scaled.exp() if self.exponential else scaled.relu()


class ActionFormer(Localizer[ActionFormerPredictions]):
    """A single-stage localizer without anchors."""

    def __init__(self, config: ActionFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.pyramid = Pyramid(
            config.channels, config.width, config.projection, config.stem, config.levels,
            config.heads, config.window, config.ratio, config.dropout, config.layer_scale,
        )  # fmt: skip
        rarely = -math.log((1 - config.prior) / config.prior)
        self.classifier = ConvHead(config.width, config.classes, config.head_layers, rarely)
        self.regressor = Distances(config)
        self.normaliser: Tensor
        self.register_buffer("normaliser", torch.tensor(config.normaliser))

    def forward(self, features: Tensor, mask: Tensor) -> ActionFormerPredictions:
        """Classify all cells and regress distances; T is padded to what the levels need."""
        features, mask = padded(features, mask, 2 ** (self.config.levels - 1))
        levels, masks = self.pyramid(features, mask)
        pairs = list(zip(levels, masks, strict=True))
        logits = [self.classifier(x, valid) for x, valid in pairs]
        offsets = [self.regressor(x, valid, level) for level, (x, valid) in enumerate(pairs)]
        return ActionFormerPredictions(logits, offsets, masks, valid_length(mask))

    def losses(self, predictions: ActionFormerPredictions, targets: Targets) -> dict[str, Tensor]:
        """Focal loss of all valid cells and DIoU loss of those that learn an action.

        Both are divided by the running number of the latter, which moves at every call in training
        mode.

        Returns:
            ``"classification"``, ``"regression"`` and ``"total"``.
        """
        logits, offsets = _flat(predictions.logits), _flat(predictions.offsets)
        mask = torch.cat(predictions.masks, 1)
        labels, wanted = self._targets(predictions, targets)
        positive = (labels >= 0) & mask
        count = self._normaliser(positive.sum())
        ones = torch.zeros_like(logits)
        ones[positive, labels[positive]] = 1
        classification = focal_loss(logits, ones)[mask].sum() / count
        overlap = diou_offset_loss(offsets[positive], wanted[positive].to(offsets.dtype))
        regression = overlap.sum() / count
        total = classification + self.config.regression_weight * regression
        return {"classification": classification, "regression": regression, "total": total}

    @torch.no_grad()
    def detections(self, predictions: ActionFormerPredictions, most: int = 200) -> list[Found]:
        """The best of every level, decoded."""
        points = self._points(predictions)
        scores = _flat(predictions.logits).sigmoid()
        scores = scores * torch.cat(predictions.masks, 1).unsqueeze(-1)
        segments = decode(points, _flat(predictions.offsets))
        sizes = [mask.shape[1] for mask in predictions.masks]
        lengths = predictions.length.tolist()
        return [
            self._best(segments[i].split(sizes), scores[i].split(sizes), length, most)
            for i, length in enumerate(lengths)
        ]

    def _best(
        self, segments: tuple[Tensor, ...], scores: tuple[Tensor, ...], length: float, most: int
    ) -> Found:
        count, least = self.config.per_level, self.config.threshold
        levels = zip(segments, scores, strict=True)
        parts = [best(where, what, length, count, least) for where, what in levels]
        return merged(parts, most)

    def _points(self, predictions: ActionFormerPredictions) -> Points:
        sizes = [mask.shape[1] for mask in predictions.masks]
        return points_of(sizes, self.config.base_range, predictions.length.device)

    def _targets(
        self, predictions: ActionFormerPredictions, targets: Targets
    ) -> tuple[Tensor, Tensor]:
        """Per cell its class ``(B, N)``, -1 for none, and the distances to learn ``(B, N, 2)``."""
        points, labels, offsets = self._points(predictions), [], []
        for segments, kinds in zip(targets.segments, targets.labels, strict=True):
            index, wanted = assign(points, segments.to(points.centres), self.config.radius)
            # The last of the kinds is that of index -1.
            kinds = torch.cat([kinds.to(index), index.new_tensor([-1])])
            labels.append(kinds[index])
            offsets.append(wanted)
        return torch.stack(labels), torch.stack(offsets)

    @torch.no_grad()
    def _normaliser(self, positives: Tensor) -> Tensor:
        """The running number of positive cells, which never falls below one."""
        if self.training:
            self.normaliser.lerp_(
                positives.clamp(min=1).to(self.normaliser), 1 - self.config.momentum
            )
        return self.normaliser.clone()


def _flat(levels: list[Tensor]) -> Tensor:
    """Per level ``(B, C, T)`` to ``(B, N, C)``, in fp32 at least."""
    joined = torch.cat(levels, 2).transpose(1, 2)
    return joined.float() if joined.dtype in (torch.float16, torch.bfloat16) else joined
